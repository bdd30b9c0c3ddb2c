"""The gates of a recipe: its own model and what its stages made, measured alike and compared."""

from dataclasses import replace
from pathlib import Path

from ..core import artifact, methods
from ..core.artifact import Artifact
from ..core.gates import metrics_behind
from ..core.recipe import Recipe
from ..report.compare_schema import CompareReport
from . import compare
from ._evaluation import Asked, evaluate
from ._source import Source
from .context import Context

FOLDER = "gates"  # in the run's folder


def judge(recipe: Recipe, made: Artifact, out: Path, context: Context) -> CompareReport:
    """Measure both on the report's seeds, and decide every gate. Measured once: a run that goes on finds the results.

    made: what the last stage left. The baseline is the recipe's own model with as many steps, on its stock schedule.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    asked = dict.fromkeys([*recipe.evaluate.metrics, *metrics_behind(recipe.gates, recipe.evaluate.metrics)])
    alone = [
        name for name in asked if "base" not in methods.load("evaluate", name).needs
    ]  # the baseline has no other to be like
    steps, settings = _steps(recipe, made), _settings(recipe)
    base = _measured(
        recipe, recipe.model, alone, Asked(recipe.model, steps=steps, settings=settings), folder / "base.json", context
    )
    ref = str(Path(made.ref).resolve())
    uncut = recipe.model if len(alone) < len(asked) else None
    candidate = _measured(
        recipe,
        ref,
        list(asked),
        Asked(ref, plan=made.plan, steps=steps, base=uncut, settings=settings),
        folder / "candidate.json",
        context,
    )
    again = f"lissom run {out}"
    report = compare.compare(
        base, candidate, recipe.gates, f"the recipe {recipe.name}", allow_inconclusive=False, command=again
    )
    return compare.write(report, base, candidate, folder / "report")


def _measured(recipe: Recipe, ref: str, metrics: list[str], asked: Asked, file: Path, context: Context) -> Source:
    """One side, along its plan where it has one."""
    own = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": tuple(metrics)})})
    planned = asked.plan is not None or _brings_plan(context.path(ref))
    asked = replace(asked, steps=None if planned else asked.steps, out=file, resume=True)
    evaluate(asked, replace(context, recipe=own), file.parent)
    return Source(str(file))


def _settings(recipe: Recipe) -> dict[str, dict[str, object]]:
    """Of metrics: the batch sizes that gates name, as latency@8."""
    batches = sorted({int(size) for name in recipe.gates if (size := name.partition("@")[2])})
    return {"latency": {"batches": [1, *batches]}} if batches else {}


def _steps(recipe: Recipe, made: Artifact) -> int | None:
    if made.plan is not None:
        return len(made.plan.steps)
    return next((stage.steps for stage in reversed(recipe.stages) if stage.steps is not None), None)


def _brings_plan(ref: str) -> bool:
    return Path(ref).is_dir() and (artifact.finished(Path(ref)) / artifact.PLAN).is_file()
