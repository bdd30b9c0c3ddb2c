"""Run a recipe: its stages in order, each in its own folder, finished ones not again."""

import contextlib
import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..core import artifact, processes, storages
from ..core.artifact import Artifact
from ..core.errors import UserError, one_line
from ..core.files import prepare, write_text
from ..core.recipe import Recipe, Stage, read, verb_of
from ..core.stages import DistillStage, SearchStage
from . import distill, prune, search
from ._stage import stage_hash
from ._stores import read_stores
from .context import Context, Options, Progress

# One contract for every verb: run_stage(stage, artifact_in, folder, context) -> artifact_out.
ENVIRONMENT = "environment.json"
KEPT = ("trials.journal", "scores.jsonl", "checkpoint.pt", "learning.pt", artifact.MANIFEST)  # files that hold work
REMEMBERED = ("device", "dtype", "offload", "chunk", "storage")  # options that `lissom run RUN_DIR` takes from the first run
STAGES: dict[str, Callable[[Any, Artifact, Path, Context], Artifact]] = {
    "search": search.run_stage,
    "prune": prune.run_stage,
    "distill": distill.run_stage,
}


def run(recipe: Recipe, text: str, out: Path, context: Context, *, resume: bool, single: bool = False) -> Artifact:
    """Run every stage of a recipe in `out`; returns what the last one made.

    text: the recipe's exact text, kept as recipe.yaml. single: the one stage's files go into `out` itself instead of
    NN-verb-method/. Raises UserError when `out` holds another recipe's run. Of several processes (`accelerate launch`) the
    first runs this, the others `distill.follow`.
    """
    if processes.count() > 1 and not any(isinstance(stage, DistillStage) for stage in recipe.stages):
        raise UserError(f"{processes.count()} processes: only a distill stage is shared by several. Start this command alone.")
    storage = context.options.storage and storages.without_password(context.options.storage)
    if context.options.storage and not (out / ENVIRONMENT).is_file():
        storages.check(context.options.storage)  # before anything is loaded or written
    new = not out.exists()
    prepare(out, resume)
    empty = not any(out.iterdir())
    try:
        with _locked(out):
            _keep_recipe(out / "recipe.yaml", text)
            # Written once: a later call with other options is refused by the store, and must not change what the run is.
            known = _record(out) if (out / ENVIRONMENT).is_file() else None
            if known is not None and bool(known.get("storage")) != bool(storage):
                raise UserError(
                    f"{out}: this run keeps its trials in {known.get('storage') or 'its own journal'}, not in "
                    f"{storage or 'a journal'}. Go on with `lissom run {out}`, or choose another --out."
                )
            record = known or {
                "lissom": __version__,
                "id": uuid.uuid4().hex[:12],
                "base": str(context.base.resolve()),
                "layout": "single" if single else "chain",
                **{name: getattr(context.options, name) for name in REMEMBERED},
                "storage": storage,
            }
            write_text(out / ENVIRONMENT, json.dumps(record, indent=2) + "\n")
            made = _stages(recipe, out, replace(context, run_id=record["id"]), single)
            write_text(out / "recipe.yaml", text)
            if context.options.push_to_hub:
                _push(made, context)
            if processes.count() > 1:
                processes.team(context.options.device).tell(None)
            return made
    except UserError:
        if empty and not context.options.storage:  # trials elsewhere belong to what is written here
            _clear(out, new)
        raise


def _stages(recipe: Recipe, out: Path, context: Context, single: bool) -> Artifact:
    current = Artifact(ref=recipe.model)
    for number, stage in enumerate(recipe.stages, 1):
        folder = stage_folder(out, number, stage, single)
        done = artifact.manifest(folder)
        if done is not None and done.stage == stage_hash(stage, current, context):
            context.progress.say(f"{folder.name}: finished already")
            plan = artifact.read_plan(folder) if (folder / artifact.PLAN).is_file() else None
            current = Artifact(ref=str(folder), plan=plan)
            continue
        folder.mkdir(exist_ok=True)
        # Seen from anywhere: a recipe's own relative paths start from its folder, not from here.
        given = replace(current, ref=str(Path(current.ref).resolve())) if number > 1 else current
        current = STAGES[verb_of(stage)](stage, given, folder, context)
    return current


def _push(made: Artifact, context: Context) -> None:
    """Upload the model of the last stage, finished now or before."""
    from ._pruned_model import push

    folder = artifact.made_model(Path(made.ref))
    if folder is None:
        raise UserError(f"--push-to-hub: {made.ref} holds a plan, not a model. Upload models that were pruned.")
    push(folder, str(context.options.push_to_hub), context.progress)


def stage_folder(out: Path, number: int, stage: Stage, single: bool) -> Path:
    """Where a stage of a run (counted from 1) leaves its files."""
    return out if single else out / f"{number:02}-{verb_of(stage)}-{stage.method.rpartition('.')[2]}"


def _keep_recipe(kept: Path, text: str) -> None:
    """Write recipe.yaml; UserError where another recipe's is there. One that picks another member is the same search.

    That one is written when it has led to something: until then the run is what it was.
    """
    if not kept.is_file():
        write_text(kept, text)
        return
    before = kept.read_text(encoding="utf-8")
    if before.splitlines() == text.splitlines():
        return
    if _but_pick(before) != _but_pick(text):
        new = next((line.strip() for line in text.splitlines() if line not in before.splitlines()), "fewer lines")
        raise UserError(
            f"{kept}: this folder holds the run of another recipe (this one has: {new}). Choose another --out folder, "
            "or give the settings that it was started with."
        )
    old, new_stages = (yaml.safe_load(one)["stages"] for one in (before, text))
    changed = [n for n, (a, b) in enumerate(zip(old, new_stages, strict=True), 1) if a.get("pick") != b.get("pick")]
    if changed and changed[0] < len(old):
        raise UserError(
            f"{kept}: stage {changed[0]} picks another member, but the stages after it were made from the earlier one. "
            "Choose another --out folder."
        )


def _but_pick(text: str) -> Any:
    """What a recipe says beside which member of a front is exported."""
    data = yaml.safe_load(text)
    return {**data, "stages": [{k: v for k, v in stage.items() if k != "pick"} for stage in data["stages"]]}


def _clear(out: Path, new: bool) -> None:
    """Take back what a run wrote that was refused before anything was scored."""
    if any(any(out.rglob(name)) for name in KEPT):
        return
    for name in ("recipe.yaml", ENVIRONMENT, ".lock"):
        (out / name).unlink(missing_ok=True)
    for folder in [*out.glob("[0-9][0-9]-*"), *([out] if new else [])]:
        with contextlib.suppress(OSError):  # not empty: references that took time to make stay
            folder.rmdir()


def reopen(folder: Path, options: Options, progress: Progress) -> tuple[Recipe, str, Context, bool]:
    """What `run` needs to go on with an earlier run's folder: recipe, text, context, and whether it has the single layout."""
    recipe, text = read(folder / "recipe.yaml")
    record = _record(folder)
    usual = Options()
    kept = {n: record.get(n) or getattr(usual, n) for n in REMEMBERED if getattr(options, n) == getattr(usual, n)}
    kept["storage"] = _storage(record, options.storage)
    context = Context(recipe, Path(record["base"]), replace(options, **kept), progress)
    return recipe, text, context, record["layout"] == "single"


def rebuild(folder: Path, storage: str | None = None) -> list[Path]:
    """Write every report of a run again from what it stored; returns the HTML files."""
    from . import _distill_report, _prune_report, _report

    recipe, _ = read(folder / "recipe.yaml")
    record = _record(folder)
    single = record["layout"] == "single"
    written = []
    for number, stage in enumerate(recipe.stages, 1):
        place = stage_folder(folder, number, stage, single)
        if not place.is_dir():
            break
        if isinstance(stage, SearchStage):
            _report.write(place, read_stores(place, _storage(record, storage), record["id"]))
        elif isinstance(stage, DistillStage):
            _distill_report.rewrite(place)
        else:
            _prune_report.rewrite(place)
        written.append(place / "report.html")
    if not written:
        raise UserError(f"{folder}: no stage of the recipe {recipe.name!r} has started yet. Go on with `lissom run {folder}`.")
    return written


def recipe_base(path: Path) -> Path:
    """Where a recipe's relative paths start from: its own folder, or, for the copy that a run keeps, where that run's did."""
    kept = path.name == "recipe.yaml" and (path.parent / ENVIRONMENT).is_file()
    return Path(_record(path.parent)["base"]) if kept else path.resolve().parent


def _record(folder: Path) -> dict[str, Any]:
    """environment.json: how a run was started."""
    path = folder / ENVIRONMENT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "base": record["base"], "layout": record["layout"], "id": record["id"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {one_line(e)}); is this a run's folder?") from e


def _storage(record: dict[str, Any], given: str | None) -> str | None:
    """The storage of an earlier run, unless another URL is given: passwords are not kept.

    A run that began in its own journal goes on there, also where LISSOM_STORAGE is set for others.
    """
    kept = record.get("storage")
    if given is None and kept and "***" in kept:
        raise UserError(f"{kept}: its password is not kept in the run's folder. Give --storage URL again, or LISSOM_STORAGE.")
    return (given or kept) if kept else None


def _locked(folder: Path) -> Any:
    """One process per run folder; the operating system frees the lock when its holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another lissom process is working in it. Wait for it, or choose another --out.") from None
