"""Options that several commands share, and what they become."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..workflow.context import Options

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="zoo:NAME, a diffusers folder, a lissom run, or a hub id (owner/name@revision).")
]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder [default: runs/… in this folder].")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Base of every random choice.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help=".txt with one prompt a line, or .jsonl of call arguments.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; starts where there is none.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set a key of the stage or its method (in `run`: any key of the recipe). Repeatable."
    ),
]
Call = Annotated[
    list[str] | None, typer.Option("--call", metavar="KEY=VALUE", help="Pipeline call argument, e.g. guidance_scale=5.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it costs, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16, bfloat16.")]
Offload = Annotated[str, typer.Option("--offload", help="none, model, sequential: keep weights off the device between uses.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", metavar="2h", help="Start no further candidate after this time (90s, 30m, 2h).")
]
STORAGE = "LISSOM_STORAGE"  # a URL there is not seen by `ps`, as one in a command is
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", envvar=STORAGE, help="Optuna storage instead of the journal file."),
]
Chunk = Annotated[int, typer.Option("--chunk", min=1, help="Images per pipeline call; halved when memory runs out.")]
Memo = Annotated[int, typer.Option("--memo", min=0, metavar="MIB", help="Memory for results that candidates share.")]
MemoDir = Annotated[
    Path | None, typer.Option("--memo-dir", metavar="DIR", help="Folder for such results, shared with other processes.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--models", metavar="NAME=MODEL", help="Another model that may make steps of a plan. Repeatable."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")]
Reference = Annotated[
    str | None, typer.Option("--reference", metavar="SRC", help="Image folder, zip, statistics file, zoo:NAME or teacher.")
]
Features = Annotated[str | None, typer.Option("--features", help="Feature extractor behind Frechet distances, e.g. zoo:judge.")]
Metrics = Annotated[
    str, typer.Option("--metrics", help="Comma-separated: fid, kid, clip_score, accuracy, … (all: docs/metrics.md).")
]


def seconds(text: str | None, flag: str = "--max-time") -> float | None:
    """Seconds of a duration. flag: the option that it was given for.

    >>> seconds("1.5h"), seconds("30m"), seconds("45"), seconds(None)
    (5400.0, 1800.0, 45.0, None)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time. Write 90s, 30m or 2h.", param_hint=flag)
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def options(
    device: str,
    dtype: str,
    offload: str,
    trust_remote_code: bool,
    chunk: int,
    storage: str | None = None,
    max_time: str | None = None,
    memo: int = 512,
    memo_dir: Path | None = None,
) -> "Options":
    from ..workflow.context import Options

    return Options(
        device=device,
        dtype=dtype,
        offload=offload,
        trust_remote_code=trust_remote_code,
        chunk=chunk,
        storage=storage,
        max_time=seconds(max_time),
        memo_mib=memo,
        memo_dir=str(memo_dir.resolve()) if memo_dir else None,
    )


def pairs(texts: list[str] | None) -> dict[str, Any]:
    """`key=value` options as a dict; dotted keys nest, values are read as YAML."""
    from ..core.recipe import override

    data: dict[str, Any] = {}
    for text in texts or []:
        override(data, text)
    return data


def words(text: str) -> list[str]:
    """A comma-separated list.

    >>> words("fid, clip_score,")
    ['fid', 'clip_score']
    """
    return [w.strip() for w in text.split(",") if w.strip()]


def others(texts: list[str] | None) -> dict[str, str] | None:
    """`NAME=MODEL` options, folders as seen from anywhere; None where there are none.

    >>> others(["small=zoo:fashion"]), others([])
    ({'small': 'zoo:fashion'}, None)
    """
    found = {}
    for text in texts or []:
        name, equals, ref = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w-]*", name) or not ref or name in found:
            raise typer.BadParameter(
                f"{text!r}: write a name and a model, e.g. small=runs/small, each name once.", param_hint="--models"
            )
        found[name] = str(Path(ref).resolve()) if Path(ref).is_dir() else ref
    return found or None


def shares(texts: list[str] | None) -> dict[str, Any]:
    """`macs=0.8` options as numbers."""
    found = pairs(texts)
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise typer.BadParameter(f"{name}={value}: write a share, e.g. macs=0.8.", param_hint="--budget")
    return found


def choices(texts: list[str] | None) -> str | dict[str, str] | None:
    """`NAME` for all metrics, `METRIC=NAME` for one; a plain name where only that is given.

    >>> choices(["inception", "clip_score=zoo:judge"]), choices(["./a=b"]), choices([])
    ({'default': 'inception', 'clip_score': 'zoo:judge'}, './a=b', None)
    """
    from ..core.methods import names

    found = {}
    for text in texts or []:
        metric, equals, name = text.partition("=")
        single = bool(equals) and metric in names("evaluate")
        found[metric if single else "default"] = name if single else text
    return found["default"] if set(found) == {"default"} else found or None


def numbers(texts: list[str] | None, flag: str) -> dict[str, float]:
    """`metric=0.5` options as positive numbers."""
    found = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < float("inf"):
            raise typer.BadParameter(f"{text!r}: write a metric and a difference above 0, e.g. fid=0.5.", param_hint=flag)
    return found


def remember(ctx: typer.Context, verbose: bool, go_on: str | None = None) -> None:
    """Tell the error handler of the command line whether tracebacks are wanted, and how an interrupted run goes on."""
    root = ctx.find_root()
    root.obj = {"verbose": verbose, "go_on": go_on}


def go_on(folder: Path, trust_remote_code: bool) -> str:
    """The command that goes on with a run; what it was started with is in its folder, save for trust."""
    return f"lissom run {shlex.quote(str(folder))}" + (" --trust-remote-code" if trust_remote_code else "")


def free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, … : the first that is not there or is empty."""
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
        number += 1
