"""What a search opens with, beside the fixed schedules: the choices of a prune method, and the best plans of another search."""

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..core import artifact
from ..core.candidate import Candidate, SamplingPlan, Step
from ..core.errors import UserError, one_line
from ..core.stages import PruneStage, SearchStage
from ..report.schema import SearchReport
from ._kept import kept
from ._learned import shares
from ._plans import Plans
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from ..search._space import Genome, Space

    Opening = list[tuple[str, Genome]]

PLANS = 8  # of another search that open this one


def pruned(stage: SearchStage, subject: Subject, plans: Plans, best: SamplingPlan, folder: Path) -> "Opening":
    """The best fixed schedule on models that a prune method has cut, to the `shares` of the MACs.

    The method's losses are kept in `folder`. Sizes that cannot be reached are passed over.
    """
    from ..core import methods
    from ._prune_job import choose, job_of
    from .prune import losses_of

    if stage.seeded_by is None or not stage.unlearned or not plans.space.sites:
        return []
    model, progress, gauge = subject.model, subject.context.progress, plans.weigh.gauge
    goal = plans.space.budget.get("macs")
    module = methods.load("prune", stage.seeded_by)
    if getattr(module, "narrows", False):
        raise UserError(
            f"seeded_by: {stage.seeded_by} makes layers narrower, and a search of cuts takes whole ones. Name another, e.g. laptop."
        )
    # The pruner's test of its own assumption is for its report; here it would only take time. Trajectories are as long as those
    # that are searched.
    wanted = {"additivity": 0, "solver_steps": stage.steps}
    settings = {key: value for key, value in wanted.items() if key in module.Config.model_fields}
    losses, found = None, []
    for keep in shares(goal):
        asked = PruneStage(
            prune=stage.seeded_by,
            keep=keep,
            of="macs",
            calibration=stage.calibration,
            require_plain_load="cuts" not in stage.space,
            settings=settings,
        )
        try:
            job = job_of(asked, gauge, model.parameters - gauge.params, model.ref, model.device, folder, model.fingerprint)
        except UserError as e:
            progress.say(f"{stage.seeded_by}: no opening with {keep:.0%} of the MACs ({e})")
            continue
        losses = losses or losses_of(asked, job, subject, folder)
        cuts = choose(job, losses, subject.context.recipe.seed, progress).cuts
        genome = plans.space.genome(Candidate(plan=best, cuts=cuts))
        if genome is None:
            continue
        if keep == goal or goal is None:  # budgets of time and parameters hold too
            genome = plans.space.fill(genome, random.Random(subject.context.recipe.seed))
        found.append((f"{stage.seeded_by}, {keep:.0%} of the MACs", genome))
    return found


def warm(stage: SearchStage, context: Context, space: "Space", folder: Path) -> "Opening":
    """The best plans of another search, fitted to this space. UserError for a folder that holds no finished search.

    Kept in `folder`: a search that goes on opens as it did, whatever has become of the other one.

    AutoDiffusion (arXiv 2309.10438) reports that found timesteps serve other models too. Here times are taken as shares of the
    training schedule, another number of steps is read off the line through them, and layers that this model has not do not count.
    """
    if stage.warm_start is None:
        return []
    return read(kept(folder / "warm-start.json", stage.warm_start, lambda: plain(_best(str(stage.warm_start), context, space))))


def _best(run: str, context: Context, space: "Space") -> "Opening":
    path = Path(context.file(run))
    path = artifact.finished(path) / "report.json" if path.is_dir() else path
    try:
        report = SearchReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as e:
        raise UserError(
            f"warm_start {run}: no report of a finished search there ({one_line(e)}). Give the folder of one."
        ) from e
    # The fixed schedules are scored in any case.
    rows = [row for row in report.candidates if row.value is not None and not row.origin.startswith("fixed")]
    rows = [row for row in rows if row.samples == max(row.samples for row in rows)]
    rescored = sorted((row for row in rows if row.rescored is not None), key=lambda row: _cost(report, row.rescored))
    others = sorted((row for row in rows if row.rescored is None), key=lambda row: _cost(report, row.value))
    best = [row.plan for row in (*rescored, *others)]
    found: Opening = []
    for number, plan in enumerate(dict.fromkeys(plan.canonical() for plan in best)):
        if number < PLANS:
            found.append((f"warm start {number + 1}", fitted(SamplingPlan.model_validate_json(plan), space)))
    return found


def _cost(report: SearchReport, value: float | None) -> float:
    assert value is not None  # only rows that have one are sorted
    measured = next(m for m in report.winner.measurements if m.metric == report.objective)
    return value if measured.direction == "lower" else -value


def fitted(plan: SamplingPlan, space: "Space") -> "Genome":
    """A plan of another model or number of steps as a genome of this space.

    Step i of K stands where i stands among the plan's own steps; it skips and reuses what the nearest one does, or is made by the
    same model, as far as this model has the layers and the space the way and the other model.
    """
    old, k = plan.steps, space.steps
    top = float(plan.scheduler.config.get("num_train_timesteps", 1000))
    own = float(space.scheduler.config.get("num_train_timesteps", 1000))
    genes = []
    for i in range(k):
        at = i * (len(old) - 1) / (k - 1) if k > 1 else 0.0
        low, part = int(at), at - int(at)
        high = min(low + 1, len(old) - 1)
        t = (1 - part) * old[low].timestep + part * old[high].timestep
        out = {way: tuple(a for a in getattr(old[round(at)], way) if a in space.layers) for way in space.ways}
        model = old[round(at)].model if old[round(at)].model in space.models else None
        genes.append(Step.model_validate({"timestep": t * own / top, "model": model, **out}))
    rng = random.Random(hashlib.sha256(plan.canonical().encode()).hexdigest())  # moves apart what has come together
    return space.fill(space.repair(genes, (0,) * len(space.sites), rng), rng)


def plain(opening: "Opening") -> list[Any]:
    """As JSON."""
    return [[origin, [step.plain() for step in genome.steps], list(genome.shape)] for origin, genome in opening]


def read(opening: list[Any]) -> "Opening":
    from ..search._space import Genome

    return [(origin, Genome(tuple(map(Step.model_validate, steps)), tuple(shape))) for origin, steps, shape in opening]
