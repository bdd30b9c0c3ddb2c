"""The search stage: fixed schedules, the method's candidates, elites on fresh seeds, the winner on unseen seeds."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import methods, recipe
from ..core.artifact import Artifact, Manifest, save
from ..core.candidate import Candidate, Request, SamplingPlan, Seeds, Step
from ..core.conditions import Conditions
from ..core.errors import SamplingError, UserError, one_line
from ..core.measurement import Trial
from ..core.recipe import SearchStage
from ..core.store import TrialStore, identity_of
from ._evaluator import Evaluator
from ._stage import stage_hash
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from ..core.cost import Costs
    from ..search._space import Space

STUDIES = ("search", "rescore", "report")
SKIPPABLE = ("resnet", "attention", "transformer_block")  # AutoDiffusion's units: residual blocks and attention blocks


@dataclass
class Plans:
    """What may be searched on this model, and what it costs."""

    space: "Space"
    fixed: dict[str, SamplingPlan]
    costs: "Costs"

    def share(self, plan: SamplingPlan, steps: int) -> float:
        """MACs of a plan as a share of `steps` uncut steps."""
        from ..core.cost import plan_macs

        return plan_macs(self.costs, plan) / (steps * self.costs.total)


@dataclass
class Clock:
    """--max-time: after it, no further candidate is started."""

    seconds: float | None
    began: float = 0.0  # as time.monotonic() tells it

    def over(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.began > self.seconds


def run_stage(stage: SearchStage, artifact_in: Artifact, folder: Path, context: Context) -> Artifact:
    """Search, and leave plan.json, reports, samples and reproduce.py in `folder`. Resumes what is in the folder already."""
    from . import _report

    progress, seed = context.progress, context.recipe.seed
    module = methods.load("search", stage.method)
    config = recipe.settings("search", stage.method, stage.settings)
    subject = Subject.load(artifact_in.ref, context, stage.scheduler)
    check_objective(stage, context, subject.conditions)
    plans = plans_of(subject, stage)
    evaluator = subject.evaluator("search", folder)
    last = subject.evaluator("report", folder)  # made now, so that a reference unfit for the report is refused before any work
    stores = open_stores(stage, subject, {"search": evaluator.id, "rescore": evaluator.id, "report": last.id}, folder)
    for name in ("rescore", "report"):
        stores[name].retry()  # not the search's own: what its failures led to is proposed already
    stores["search"].remember(facts=_report.facts(stage, module, config, subject, plans, folder))
    clock = Clock(context.options.max_time, context.began)

    def settle(name: str, requests: Iterable[tuple[Request, int | None]], judge: Evaluator, **extra: Any) -> list[Trial]:
        timed = clock if name == "search" else Clock(None)
        return _settle(stores[name], list(requests), judge, progress, timed, lambda t: feasible(t, plans, stage), **extra)

    # Common seeds for all candidates: differences between plans are not drowned by differences between images.
    seeds = Seeds(role="search", base=seed, count=stage.samples)
    progress.phase("fixed schedules", len(plans.fixed))
    known = settle(
        "search",
        ((Request(candidate=Candidate(plan=p), seeds=seeds, origin=f"fixed: {n}"), None) for n, p in plans.fixed.items()),
        evaluator,
    )
    from ..search._space import Task

    task = Task(space=plans.space, trials=stage.trials, seeds=seeds, objective=stage.objective, known=tuple(known))
    proposals = module.search(task, config, random.Random(seed))
    progress.phase(f"{stage.method}", stage.trials)
    scored: list[Trial] = []
    answers: list[Trial] | None = None
    while not clock.over():
        try:
            batch = proposals.send(answers)
        except StopIteration:
            break
        answers = settle("search", ((r, len(scored) + i) for i, r in enumerate(batch)), evaluator)
        scored += answers
        if len(answers) < len(batch):  # out of time in the middle of a batch
            break

    # The search's own values are optimistic: the best of many noisy ones. Elites compete again on fresh seeds.
    # Equal values keep the order of proposal: a resumed run numbers its trials differently.
    best = sorted(
        (t for t in scored if t.state == "complete" and feasible(t, plans, stage)), key=lambda t: t.value(stage.objective)
    )
    if not best and clock.over() and not any(t.state == "failed" for t in scored):
        raise UserError(f"--max-time ended the search after {len(scored)} candidates, none that counts. Go on with more time.")
    if not best:
        raise UserError(_nothing(scored, plans))
    fixed = sorted(
        (t for t in known if t.state == "complete" and feasible(t, plans, stage)), key=lambda t: t.value(stage.objective)
    )
    again = Seeds(role="rescore", base=seed, count=stage.rescore_samples)
    pool = [t.request.candidate for t in (*best[: stage.rescore], *fixed[:1])]
    progress.phase("elites on fresh seeds", len(pool))
    rescored = settle("rescore", ((Request(candidate=c, seeds=again), None) for c in pool), evaluator)
    elites = [t for t in rescored if t.state == "complete"]
    if not elites:
        raise UserError(_nothing(rescored, plans))
    winner = min(elites, key=lambda t: t.value(stage.objective)).request.candidate.plan
    assert winner is not None

    # Unseen seeds and unseen reference images, the same for all.
    progress.phase("report on unseen seeds", 1 + len(plans.fixed))
    unseen = Seeds(role="report", base=seed, count=context.recipe.evaluate.samples)
    if stores["search"].study.user_attrs.get("winner", winner.canonical()) != winner.canonical():
        (folder / "samples" / "searched.png").unlink(missing_ok=True)  # --max-time ended an earlier session with another one
    named = {"searched": winner, **plans.fixed}
    for name, plan in named.items():
        sheet = folder / "samples" / f"{name}.png"
        request = Request(candidate=Candidate(plan=plan), seeds=unseen, origin=name)
        (trial,) = settle("report", [(request, None)], last, replicates=True, sheet=sheet)
        if trial.state == "complete" and not sheet.is_file():
            last.draw_sheet(plan, unseen, sheet)

    stopped = None if len(scored) >= stage.trials or not clock.over() else len(scored)
    stores["search"].remember(winner=winner.canonical(), stopped=stopped)
    built = _report.write(folder, stores)
    manifest = Manifest(
        parent=subject.model.ref,
        model_hash=subject.model.fingerprint,
        stage=stage_hash(stage, artifact_in, context) if stopped is None else f"stopped after {stopped} candidates",
        made_by=stage.plain(),
        measurements=built.winner.measurements,
        versions={"lissom": __version__},
    )
    _report.write_reproduce(folder, winner, subject, unseen)
    save(folder, manifest, winner)
    return Artifact(ref=str(folder), plan=winner)


def plans_of(subject: Subject, stage: SearchStage) -> Plans:
    """The space of plans on this pipeline, its fixed schedules and its costs; UserError for what cannot be searched."""
    from ..core import anatomy, cost, driving, spacing
    from ..core.candidate import Scheduler
    from ..search._space import Space

    pipe = subject.model.pipe
    scheduler = Scheduler.of(pipe.scheduler)
    middle = max(1, pipe.scheduler.config.get("num_train_timesteps", 1000) // 2)
    probe = SamplingPlan(scheduler=scheduler, steps=(Step(timestep=middle),))
    driving.check(pipe, probe)  # refuses schedulers and pipelines that cannot follow any plan
    times = spacing.times(pipe.scheduler)
    subject.check_steps(stage.steps)
    with subject.asking():
        costs = cost.measure(pipe, {**subject.conditions.arguments(range(1)), **subject.call})
    layers: dict[str, int] = {}
    if "skips" in stage.space:
        found = [layer.address for layer in anatomy.layers(subject.model.denoiser) if layer.kind in SKIPPABLE]
        outermost = [a for a in found if not any(a.startswith(b + ".") for b in found)]
        layers = {a: costs.layers[a] for a in outermost if costs.layers.get(a)}
    space = Space(
        scheduler=scheduler,
        steps=stage.steps,
        low=times.lowest,
        high=times.highest,
        whole=times.integer,
        macs=costs.total,
        layers=layers,
        budget=stage.budget.get("macs", 1.0),
    )
    if space.cheapest() > space.budget:
        raise UserError(
            f"budget macs={space.budget:g}: cannot be met with {stage.steps} steps; the cheapest plan, which skips every "
            f"layer that can be skipped, still costs {space.cheapest():.3f}. Raise the budget or lower --steps."
        )
    return Plans(space, spacing.fixed(pipe.scheduler, stage.steps), costs)


def open_stores(stage: SearchStage, subject: Subject, evaluators: Mapping[str, str], folder: Path) -> dict[str, TrialStore]:
    """The run's three studies, in its journal or in --storage. evaluators: the id of each study's evaluator."""
    place, prefix = _place(folder, subject.context.options.storage, subject.context.run_id)
    same = identity_of(
        lissom=__version__,
        model=subject.model.fingerprint,
        stage=stage.plain(),
        seed=subject.context.recipe.seed,
        evaluation=subject.context.recipe.evaluate.plain(),
        call=subject.call,
        prompts=subject.conditions.hash,
        device=subject.model.device.partition(":")[0],
        dtype=subject.model.dtype,
        chunk=subject.context.options.chunk,
    )
    return {
        name: TrialStore.open(place, prefix + name, {**same, "evaluator": evaluators[name]}, evaluators[name], stage.objective)
        for name in STUDIES
    }


def read_stores(folder: Path, storage: str | None, run_id: str) -> dict[str, TrialStore]:
    """The studies of a run as they are, for a report: nothing is checked against a recipe, nothing can be added."""
    place, prefix = _place(folder, storage, run_id)
    if isinstance(place, Path) and not place.is_file():
        raise UserError(f"{place}: not there; the search in {folder} has not started. Go on with `lissom run {folder}`.")
    facts = TrialStore.read(place, prefix + "search", "").study.user_attrs.get("facts")
    if facts is None:
        raise UserError(f"{folder}: the search has not started yet. Go on with `lissom run {folder}`.")
    return {name: TrialStore.read(place, prefix + name, facts["objective"]) for name in STUDIES}


def _place(folder: Path, storage: str | None, run_id: str) -> tuple[str | Path, str]:
    """Where a run's studies are, and what their names begin with there: many runs share one database."""
    return (storage, f"{run_id}/{folder.resolve().name}/") if storage else (folder / "trials.journal", "")


def check_objective(stage: SearchStage, context: Context, conditions: Conditions) -> None:
    """The searched metric is measured, and so is another one where the images have captions or labels to measure it by."""
    metrics = context.recipe.evaluate.metrics
    measured = [part for name in metrics for part in methods.load("evaluate", name).parts]  # precision_recall gives recall, …
    if stage.objective not in measured:
        raise UserError(
            f"objective {stage.objective!r} is not among what is measured, {', '.join(measured)}."
            f"{methods.suggest(stage.objective, measured)}"
        )
    if len(metrics) < 2 and (conditions.caption(0) is not None or conditions.label(0) is not None):
        raise UserError(
            f"metrics: {metrics[0]} alone is what the search optimises. Add one that it does not, e.g. clip_score or accuracy, "
            "so that the report can show both."
        )


def feasible(trial: Trial, plans: Plans, stage: SearchStage) -> bool:
    plan = trial.request.candidate.plan
    return plan is not None and plans.share(plan, stage.steps) <= plans.space.budget + 1e-9


def _settle(
    store: TrialStore,
    requests: list[tuple[Request, int | None]],
    evaluator: Evaluator,
    progress: Any,
    clock: Clock,
    counts: Callable[[Trial], bool],  # whether a trial may be called the best so far
    **extra: Any,
) -> list[Trial]:
    """Enqueue, claim, evaluate, tell: the same loop that a worker elsewhere runs. Answers come by key, in order."""
    from torch import AcceleratorError

    from ..core.driving import CannotFollow

    keys = [store.propose(request, index) for request, index in requests]
    for key in keys:
        if key in store.trials:
            progress.advance(_note(store, counts), fresh=False)
    while not clock.over() and (claim := store.claim()):
        began, sampler = time.monotonic(), evaluator.sampler
        executed, served = sampler.calls, sampler.served
        try:
            score = evaluator.score(claim.request.candidate.plan, claim.request.seeds, **extra)
        except AcceleratorError:
            raise  # the device is lost, whatever the candidate: it stays in flight and is taken up again on resume
        except (SamplingError, CannotFollow, RuntimeError, ValueError, LookupError, ArithmeticError) as e:
            error = f"{type(e).__name__}: {one_line(e)}"
            progress.warn(f"candidate {claim.trial.number} failed and is recorded as such: {error}")
            calls, spared = sampler.calls - executed, sampler.served - served
            store.tell(claim, error=error, calls=calls, plain_calls=calls + spared, seconds=time.monotonic() - began)
        else:
            store.tell(claim, score.measurements, calls=score.calls, plain_calls=score.plain_calls, seconds=score.seconds)
        if claim.key in keys:  # the rest was proposed before an interruption, and belongs to a later phase
            progress.advance(_note(store, counts))
    return [store.trials[key] for key in keys if key in store.trials]


def _note(store: TrialStore, counts: Callable[[Trial], bool]) -> str:
    done = [t for t in store.trials.values() if t.state == "complete" and counts(t)]
    if not done:
        return ""
    best = min(done, key=lambda t: t.value(store.objective)).measured(store.objective)
    return f"best {best.label} {best.value:.4g}" if best else ""


def _nothing(trials: list[Trial], plans: Plans) -> str:
    failed = [t for t in trials if t.state == "failed"]
    if failed:
        which = "all" if len(failed) == len(trials) else "too many"
        return f"{which} candidates failed ({len(failed)} of {len(trials)}), the first with: {failed[0].error} No winner can be named."
    return (
        f"no candidate among {len(trials)} keeps the budget macs={plans.space.budget:g}. "
        "Give more --trials, a smaller stage_one, or a larger budget."
    )
