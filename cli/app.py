"""The command line: parse, call workflow, print. One file per command."""

import signal
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ..core.errors import INTERNAL, INTERRUPTED, UserError
from . import compare, distill, doctor, evaluate, inspect, prune, recipes, report, run, sample, search, stats, worker
from ._method import MethodCommand


class _Group(TyperGroup):
    """Ends every command with one sentence and the right exit code instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as e:
            code, text = e.exit_code, str(e)
            trouble: BaseException = e
        except KeyboardInterrupt as e:
            code, text, trouble = INTERRUPTED, "interrupted; everything that was complete is kept.", e
            if go_on := (ctx.obj or {}).get("go_on"):
                text += f" Go on with: {go_on}"
        except BrokenPipeError as e:
            code, text, trouble = INTERNAL, "the program that reads the output has gone.", e
        except (typer.Exit, typer.Abort):
            raise
        except Exception as e:
            if type(e).__module__.startswith("typer."):  # usage errors print themselves
                raise
            frame = traceback.extract_tb(e.__traceback__)[-1]
            code, trouble = INTERNAL, e
            text = f"internal error: {type(e).__name__}: {e} (at {frame.filename}:{frame.lineno}). Run it again with -v and report it."
        if (ctx.obj or {}).get("verbose") and not isinstance(trouble, KeyboardInterrupt):
            traceback.print_exception(trouble)
        print(f"lissom: {text}", file=sys.stderr)
        raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Group,
    name="lissom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Make diffusion models small and fast.",
)
app.command("search", cls=MethodCommand)(search.search)
app.command("prune", cls=MethodCommand)(prune.prune)
app.command("distill", cls=MethodCommand)(distill.distill)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("sample")(sample.sample)
app.command("run")(run.run)
app.command("worker")(worker.worker)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)
app.add_typer(stats.app, name="stats")
app.add_typer(recipes.app, name="recipes")
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def top(ctx: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """Entry point of the `lissom` command. SIGTERM ends a run as cleanly as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
