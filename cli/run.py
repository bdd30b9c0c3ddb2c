"""`lissom run RECIPE|RUN_DIR`: a chain of stages from a recipe, or on with an earlier run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o


def run(
    ctx: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN_DIR", help="A YAML file, the name of a shipped recipe, or the folder of a run to go on with."
        ),
    ],
    out: o.Out = None,
    resume: o.Resume = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the recipe's seed.")] = None,
    prompts: o.Prompts = None,
    set_: o.Set = None,
    dry_run: o.DryRun = False,
    json_: o.Json = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    offload: o.Offload = "none",
    chunk: o.Chunk = 64,
    memo: o.Memo = 512,
    memo_dir: o.MemoDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    max_time: o.MaxTime = None,
    storage: o.Storage = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run a recipe. Finished stages are not run again; an interrupted run goes on where it was.

    Example: lissom run zoo/fashion-4-steps --out runs/fashion
    """
    from ..core.errors import UserError
    from ..core.recipe import read
    from ..workflow.describe import effective, shipped
    from ..workflow.run import recipe_base, reopen
    from ._run import execute

    machine = o.options(device, dtype, offload, trust_remote_code, chunk, storage, max_time, memo, memo_dir)
    single, changes = False, list(set_ or ())
    if seed is not None:
        changes.append(f"seed={seed}")
    if prompts is not None:  # seen from here, not from the recipe's folder as a path in it would be
        changes.append(f"prompts={json.dumps(str(prompts.absolute()))}")
    if (path := Path(what)).is_dir():
        if out is not None or changes:
            raise UserError(
                f"{what}: a run goes on as it was started; --out, --set, --seed and --prompts belong to a new run of its recipe.yaml."
            )
        from ..workflow.context import Silent

        _, text, context, single = reopen(path, machine, Silent())
        folder, base, resume, machine = path, context.base, True, context.options
    else:
        path = path if path.is_file() else shipped(what)
        recipe, text = read(path, changes)
        text = effective(text, changes)
        folder, base = out or o.free_folder(recipe.name), recipe_base(path)
    o.remember(ctx, verbose, None if dry_run else o.go_on(folder, trust_remote_code))
    execute(text, str(path), base, folder, machine, resume=resume, dry_run=dry_run, as_json=json_, quiet=quiet, single=single)
