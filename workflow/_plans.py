"""What may be searched on a model and what it costs: the space, its prices, its fixed schedules."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import methods, narrowing
from ..core.candidate import Candidate, Cut, SamplingPlan
from ..core.conditions import Conditions
from ..core.errors import UserError
from ..core.stages import COSTS, SearchStage
from ._gauge import Gauge
from ._learned import Learned, learned
from ._prune_job import gauge_of
from ._sites import sites
from ._subject import Subject
from ._widths import macs_of
from .context import Context

if TYPE_CHECKING:
    from ..core.cost import Costs
    from ..report.schema import LatencyTable
    from ..search._space import Price, Space

SKIPPABLE = ("resnet", "attention", "transformer_block")  # AutoDiffusion's units: residual blocks and attention blocks


FOUND = 50  # random candidates, of which one at least has to keep all budgets together


@dataclass
class Plans:
    """What may be searched on this model, and what it costs."""

    space: "Space"
    fixed: dict[str, SamplingPlan]
    costs: "Costs"
    weigh: "_Weigh"
    learned: Learned  # what the sites of masks and depth are made of
    times: dict[str, Any] | None = None  # the latency table, where latency counts

    def shares(self, candidate: Candidate) -> dict[str, float]:
        """Every cost of a candidate as a share of the uncut run."""
        genome = self.space.genome(candidate)
        assert genome is not None, "candidates come from this space"
        return self.space.shares(genome)

    def feasible(self, costs: dict[str, float]) -> bool:
        """Whether every budget holds."""
        return all(costs[name] <= most + 1e-9 for name, most in self.space.budget.items())

    def validated(self, stage: SearchStage, subject: Subject, folder: Path) -> "LatencyTable | None":
        """How far predicted times are off, where latency counts."""
        from . import _latency

        if self.times is None:
            return None
        return _latency.validated(stage, subject, self.space, self.times, next(iter(self.fixed.values())), folder)


class _Weigh:
    """The gauge of a model, made when something asks for it: it takes a call of the pipeline."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    @cached_property
    def gauge(self) -> Gauge:
        return gauge_of(self._subject)


def plans_of(subject: Subject, stage: SearchStage, folder: Path | None = None) -> Plans:
    """The space of candidates on this pipeline, its fixed schedules and its costs; UserError for what cannot be searched.

    folder: keeps measured times. Without one they are measured for the moment.
    """
    from ..core import anatomy, cost, spacing
    from ..core.candidate import Scheduler
    from ..core.driving.schedulers import evaluations
    from ..core.driving.steering import denoisers
    from ..search._space import Space
    from . import _latency

    pipe = subject.model.pipe
    scheduler = Scheduler.of(pipe.scheduler)
    subject.check_solver()
    times = spacing.times(pipe.scheduler)
    subject.check_steps(stage.steps)
    if "reuse" in stage.space and len(parts := denoisers(pipe)) > 1:
        raise UserError(
            f"space: reuse: {type(pipe).__name__} hands over from {' to '.join(parts)} on the way, and one has nothing to reuse of the "
            "other. Take reuse out of --space."
        )
    models = tuple(subject.context.recipe.models) if "models" in stage.space else ()
    with subject.asking():
        costs = cost.measure(pipe, {**subject.conditions.arguments(range(1)), **subject.call}, models)
    layers: dict[str, int] = {}
    if stage.ways:
        found = [layer.address for layer in anatomy.layers(subject.model.denoiser) if layer.kind in SKIPPABLE]
        outermost = [a for a in found if not any(a.startswith(b + ".") for b in found)]
        layers = {a: costs.layers[a] for a in outermost if costs.layers.get(a)}
    fixed = spacing.fixed(pipe.scheduler, stage.steps)
    weigh = _Weigh(subject)
    scores = learned(stage, weigh.gauge, subject.context, folder) if stage.learning else Learned()
    bare = Space(
        scheduler=scheduler,
        steps=stage.steps,
        low=times.lowest,
        high=times.highest,
        whole=times.integer,
        prices={},
        layers=tuple(layers),
        sites=sites(stage, weigh.gauge, subject.model.ref, scores) if stage.cutting else (),
        budget={str(name): most for name, most in stage.budget.items()},
        evaluations=evaluations(next(iter(fixed.values()))),
        ways=stage.ways,
        models=models,
    )
    wanted = {*stage.budget, *stage.objective}
    prices = {"macs": _macs(costs, layers, bare, weigh)}
    if bare.sites:
        prices["params"] = _params(subject, bare, weigh)
    elif "params" in wanted:
        raise UserError("params: nothing in the space removes parameters. Add cuts to it: --space timesteps,skips,cuts.")
    measured = None
    if "latency" in wanted:
        measured = _latency.table(stage, subject, weigh.gauge, next(iter(fixed.values())), folder)
        prices["latency"] = _latency.price(measured, weigh.gauge, bare)
    space = Space(**{**vars(bare), "prices": prices})
    _reachable(space, stage)
    _together(space)
    return Plans(space, fixed, costs, weigh, scores, measured)


def _macs(costs: "Costs", layers: dict[str, int], space: "Space", weigh: _Weigh) -> "Price":
    from ..search._space import Price

    saved = {}
    for choice in (choice for site in space.sites for choice in site):
        alone = [_saved(costs, cut, weigh.gauge) for cut in choice.cuts]
        if all(macs is not None for macs in alone):
            saved[choice.name] = float(sum(macs or 0.0 for macs in alone))
        else:  # counted on one image without guidance's second half
            saved[choice.name] = costs.total * (1 - weigh.gauge.after(choice.cuts)[1] / weigh.gauge.macs)
    models = {name: float(macs) for name, macs in costs.models.items()}
    return Price(float(costs.total), {a: float(macs) for a, macs in layers.items()}, saved, models=models)


def _saved(costs: "Costs", cut: Cut, gauge: Gauge) -> float | None:
    """MACs that one cut saves, where the layers' own say so. Of an attention that is emptied only its blocks go."""
    if cut.what in narrowing.NARROWS:
        return macs_of(gauge, cut) * costs.total / gauge.macs
    if cut.what == "remove":
        return costs.layers.get(cut.address)
    blocks = [macs for a, macs in costs.layers.items() if a.rpartition(".")[0] == f"{cut.address}.transformer_blocks"]
    return sum(blocks) if cut.what == "replace" and blocks else None


def _params(subject: Subject, space: "Space", weigh: _Weigh) -> "Price":
    from ..search._space import Price

    saved = {c.name: float(weigh.gauge.params_saved(c.cuts)) for site in space.sites for c in site}
    return Price(float(subject.model.parameters), {}, saved)


def _reachable(space: "Space", stage: SearchStage) -> None:
    """UserError for a budget that nothing satisfies; it names the cheapest candidate."""
    for name, most in space.budget.items():
        cheapest = space.cheapest(name)
        least = space.share(cheapest, name)
        if least > most:
            cut = [choice.name for choice in space.chosen(cheapest)]
            other = cheapest.steps[-1].model
            how = " and ".join(
                [f"lets {other} make every step"] * bool(other)
                + [_all_of(space)] * bool(space.layers and not other)
                + [f"makes {len(cut)} cuts ({', '.join(cut[:3])}{', …' if len(cut) > 3 else ''})"] * bool(cut)
            )
            more = "" if stage.cutting and space.layers else " or let the search leave more out (--space timesteps,skips,cuts)"
            raise UserError(
                f"budget {name}={most:g}: cannot be met with {stage.steps} steps; the cheapest candidate"
                f"{f', which {how},' if how else ', with nothing to leave out,'} still costs {least:.3f}. "
                f"Raise the budget, lower --steps{more}."
            )


def _all_of(space: "Space") -> str:
    if "skip" in space.ways:
        return f"skips all {len(space.layers)} layers that can be skipped in every step"
    return f"reuses all {len(space.layers)} layers that can be reused in every step but the first"


def _together(space: "Space") -> None:
    """UserError for budgets that hold one by one, and by no candidate together that could be found."""
    if len(space.budget) < 2:
        return
    rng = random.Random(0)
    tried = [space.cheapest(name) for name in space.budget]
    tried += [space.fill(space.random_times(rng), rng) for _ in range(FOUND)]
    if not any(space.fits(genome) for genome in tried):
        said = ", ".join(f"{name}={most:g}" for name, most in space.budget.items())
        best = min(tried, key=lambda genome: max(space.broken(genome).values()))
        costs = ", ".join(f"{name}={space.share(best, name):.3f}" for name in space.budget)
        raise UserError(
            f"budget {said}: no candidate was found that keeps all of it; the nearest one costs {costs}. Raise one of them."
        )


def check_objectives(stage: SearchStage, context: Context, conditions: Conditions) -> None:
    """What is searched is measured, or is a cost; the method can do it; another metric is measured that is not searched."""
    module, metrics = methods.load("search", stage.method), context.recipe.evaluate.metrics
    measured = [part for name in metrics for part in methods.load("evaluate", name).parts]  # precision_recall gives recall, …
    for name in stage.objective:
        if name not in measured and name not in COSTS:
            here = (
                ""
                if name.partition(":")[0].partition("@")[0] not in COSTS
                else (" Costs are those of the machine that searches: run the search where they matter.")
            )
            raise UserError(
                f"objective {name!r} is not among what is measured, {', '.join(measured)}, nor a cost that is known here, "
                f"{', '.join(COSTS)}.{here or methods.suggest(name, [*measured, *COSTS])}"
            )
    if len(stage.objective) > 1 and not getattr(module, "several", False):
        can = ", ".join(n for n in methods.names("search") if getattr(methods.load("search", n), "several", False))
        raise UserError(
            f"{stage.method} searches one objective, not {len(stage.objective)}. Set a --budget for the others, or take one of {can}."
        )
    if len(stage.objective) < getattr(module, "least", 1):
        raise UserError(f"{stage.method} looks for a front, which takes two objectives. Add one, e.g. --objective macs.")
    varies = getattr(module, "varies", frozenset({"timesteps", "skips", "cuts"}))
    foreign = [part for part in stage.space if ("cuts" if part in ("slim", *stage.learning) else part) not in varies]
    if foreign:
        left = ",".join(part for part in stage.space if part not in foreign)
        raise UserError(f"{stage.method} does not vary {' or '.join(foreign)}. Give --space {left}, or take another method.")
    missing: set[str] = {*getattr(module, "needs", ())} - {*stage.space}
    if missing:
        raise UserError(
            f"{stage.method} varies {' and '.join(sorted(missing))}: give --space {','.join([*stage.space, *sorted(missing)])}."
        )
    if "models" in stage.space and not context.recipe.models:
        raise UserError(
            "space: models: there is no other model that could make steps. Give one, --models small=MODEL (in a recipe "
            "`models: {small: MODEL}`)."
        )
    free = [name for name in metrics if not set(methods.load("evaluate", name).parts) & set(stage.objective)]
    if not free and (conditions.caption(0) is not None or conditions.label(0) is not None):
        alone = "alone is" if len(metrics) == 1 else "are"
        raise UserError(
            f"metrics: {' and '.join(metrics)} {alone} what the search optimises. Add one that it does not, e.g. clip_score or "
            "accuracy, so that the report can show both."
        )
    if stage.unlearned and stage.seeded_by is not None:
        methods.load("prune", stage.seeded_by)  # refuses an unknown one
