"""`lissom stats`: reference statistics files: build and merge, show, verify."""

import re
from pathlib import Path
from typing import Annotated

import typer

from . import _options as o

app = typer.Typer(no_args_is_help=True, help="Reference statistics files: build, show, verify.", rich_markup_mode=None)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A statistics file (.safetensors).")]


@app.command()
def build(
    ctx: typer.Context,
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCES...", help="Image folders and zips; or statistics files, to be merged.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The statistics file to write (.safetensors).")],
    features: Annotated[
        str | None, typer.Option("--features", help="What to see images by: inception, clip:ViT-B-32/openai, zoo:judge, …")
    ] = None,
    keep_features: Annotated[
        int | None,
        typer.Option(
            "--keep-features",
            min=0,
            metavar="N",
            help="Features of N single images are kept, for kid, cmmd, precision and recall [default: 10000].",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, metavar="N", help="Only the first N files, by name.")] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Only every N-th file, from the I-th: one machine of N.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes, spread over the GPUs.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped build; starts where there is none.")] = False,
    device: o.Device = "auto",
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make a statistics file from images, or one from several.

    Example: lissom stats build coco/val2014 --features inception --out coco.safetensors
    """
    import json
    import shlex
    import sys

    from ..workflow import stats as work
    from ._progress import watch

    again = shlex.join(["lissom", *sys.argv[1:]]) if sys.argv[1:3] == ["stats", "build"] else None
    o.remember(ctx, verbose, again and (again if resume else f"{again} --resume"))
    asked = work.Build(
        sources=tuple(sources),
        out=out,
        features=features,
        keep=keep_features,
        limit=limit,
        shard=_shard(shard),
        workers=workers,
        resume=resume,
        device=device,
    )
    with watch(quiet) as progress:
        made = work.build(asked, progress)
    if json_:
        print(json.dumps(made, indent=2))
    else:
        print(f"{out}: finished already" if made["finished_already"] else work.say(made))


@app.command()
def show(ctx: typer.Context, file: File, json_: o.Json = False, verbose: o.Verbose = False) -> None:
    """Say what a statistics file is of, and what was kept, skipped and converted.

    Example: lissom stats show coco.safetensors
    """
    import json

    from ..workflow import stats as work

    o.remember(ctx, verbose)
    found = work.show(file)
    print(json.dumps(found, indent=2) if json_ else work.say(found))


@app.command()
def verify(
    ctx: typer.Context,
    file: File,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SOURCES...]", help="What it was built from: the images are hashed again and compared."),
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="Extract some of the images again and compare with what was kept.")
    ] = None,
    device: o.Device = "auto",
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Check a statistics file: its numbers, and whether it fits its images. Exit code 2 with what is wrong.

    Example: lissom stats verify coco.safetensors coco/val2014
    """
    import json

    from ..core.errors import USAGE, UserError
    from ..workflow import _stats_check as work
    from ._progress import watch

    o.remember(ctx, verbose)
    with watch(quiet) as progress:
        found = work.verify(file, sources or [], features, device, progress)
    if json_:
        print(json.dumps(found, indent=2))
        raise typer.Exit(0 if found["ok"] else USAGE)
    if found["problems"]:
        raise UserError("\n".join(found["problems"]))
    print(f"{file}: good ({', '.join(found['checked'])})")


def _shard(text: str | None) -> tuple[int, int]:
    """Which part of how many.

    >>> _shard("2/4"), _shard(None)
    ((2, 4), (1, 1))
    """
    match = re.fullmatch(r"(\d+)/(\d+)", "1/1" if text is None else text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r}: write which part of how many, from 1/4 to 4/4.", param_hint="--shard")
    return int(match[1]), int(match[2])
