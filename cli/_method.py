"""What commands of the form `lissom VERB METHOD MODEL` share: help that shows the method's settings, and the run of one stage."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from . import _options as o

if TYPE_CHECKING:
    from ..workflow.context import Options


class MethodCommand(TyperCommand):
    """A command whose --help also shows the settings of the METHOD that stands on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["lissom.words"] = [a for a in args if not a.startswith("-")]
        return super().parse_args(ctx, args)


def helper(verb: str) -> Callable[[typer.Context, bool], None]:
    """The callback of --help."""

    def show(ctx: typer.Context, asked: bool) -> None:
        if not asked:
            return
        print(ctx.get_help())
        from ..core.recipe import names

        known = names(verb)
        words = ctx.meta["lissom.words"]
        if method := next((w for w in words if w in known), words[0] if words else None):
            _print_settings(verb, method)
        raise typer.Exit()

    return show


def _print_settings(verb: str, method: str) -> None:
    """The method's own settings, each with the comment that stands beside it in its file; a preset's losses."""
    from ..core import methods

    if verb == "distill":
        if preset := methods.presets().get(method):
            print(f"{method}: {preset.says}, {preset.paper}")
            for name, weight in preset.losses.items():
                print(f"  {name:24}  weight {weight:g}")
        return
    module = methods.load(verb, method)
    paper = f", {module.Config.paper}" if module.Config.paper else ""
    print(f"Settings of {method} (--set KEY=VALUE){paper}")
    comments = methods.comments(module)
    for name, field in module.Config.model_fields.items():
        print(f"  {f'{name} = {field.default!r}':24}  {comments.get(name, '')}")
    if not module.Config.model_fields:
        print("  none")


def run_one(
    ctx: typer.Context,
    verb: str,
    stage: Mapping[str, Any],
    *,
    name: str,
    model: str,
    seed: int,
    prompts: Path | None,
    call: list[str] | None,
    evaluate: Mapping[str, Any],
    models: Mapping[str, str] | None = None,
    machine: "Options",
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Run a recipe of one stage, or say what it would do. name: of the recipe, and so of the folder where none is given.

    stage: as it stands in the recipe; see `given`.
    """
    from ..core import processes
    from ..core.errors import UserError
    from ..core.recipe import build, settings
    from ..workflow.describe import dump, recipe_text
    from ._run import execute

    settings(verb, stage[verb], {})  # an unknown method is named before anything else
    data: dict[str, Any] = {
        "lissom": 1,
        "name": name,
        "model": model,
        "seed": seed,
        "prompts": str(prompts.resolve()) if prompts else None,
        "call": o.pairs(call),
        "evaluate": {k: v for k, v in evaluate.items() if v is not None},
        "models": models,
        "stages": [dict(stage)],
    }
    data = {k: v for k, v in data.items() if v not in (None, {})}
    try:
        build(data, "options")  # every mistake in the options, before the model is touched
    except UserError as e:
        raise UserError(re.sub(r"stages\.0[.:] ?", "", str(e))) from e
    structure = dry_run and model.startswith("config:")  # there is nothing to pin
    text = dump(data) if structure else recipe_text(data, verb)
    if out is None and processes.count() > 1:
        raise UserError("--out: name a folder, so that all processes mean the same one.")
    folder = out or o.free_folder(data["name"])
    o.remember(ctx, verbose, None if dry_run else o.go_on(folder, machine.trust_remote_code))
    execute(
        text,
        "options",
        Path.cwd(),
        folder,
        machine,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
        single=True,
    )


def given(options: Mapping[str, Any], set_: list[str] | None) -> dict[str, Any]:
    """A stage's keys: the options that were given a value, then those of --set, whatever their values."""
    return {k: v for k, v in options.items() if v not in (None, {}, [])} | o.pairs(set_)


def short_name(model: str) -> str:
    """The part of a reference that names the model, for a folder's name.

    >>> short_name("zoo:fashion"), short_name("owner/name@main"), short_name("./my-sd15/")
    ('fashion', 'name', 'my-sd15')
    """
    return Path(model.replace("zoo:", "").replace("config:", "")).name.partition("@")[0]
