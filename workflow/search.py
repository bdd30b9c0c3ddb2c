"""The search stage: fixed schedules, the method's candidates, elites on fresh seeds, the picked one on unseen seeds."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import methods, recipe
from ..core.artifact import Artifact
from ..core.candidate import Candidate, Request, Seeds
from ..core.errors import UserError
from ..core.measurement import Trial
from ..core.stages import SearchStage
from ..core.store import TrialStore
from . import _learned, _opening, _work
from ._elites import default_pick, elites, front, parts
from ._evaluator import draw_sheet, trimmed
from ._judges import Judge, judges
from ._ladder import Ladder
from ._plans import Plans, check_objectives, plans_of
from ._settle import Clock, settled
from ._stores import open_stores
from ._subject import Subject
from .context import Context, Progress, Silent

if TYPE_CHECKING:
    from ._opening import Opening


@dataclass
class _Search:
    """A search under way."""

    stage: SearchStage
    subject: Subject
    plans: Plans
    stores: dict[str, TrialStore]
    judges: dict[str, Judge]
    clock: Clock

    def settle(self, study: str, requests: Iterable[tuple[Request, int | None]]) -> list[Trial]:
        """Score requests of a study; of the search itself only as long as there is time. Answers come in order."""
        searching = study in ("search", "screen")
        progress = self.subject.context.progress
        if searching and self.in_rungs:
            progress = _Unmoved(progress)
        clock = self.clock if searching else Clock(None)
        return settled(self.stores[study], list(requests), self.judges[study], progress, clock, self.counts)

    def counts(self, trial: Trial) -> bool:
        """Whether a trial may win: within every budget, and not scored on fewer images than the others."""
        few = trial.request.seeds.role == "search" and trial.request.seeds.count < self.stage.samples
        return not few and self.plans.feasible(trial.request.costs)

    @property
    def in_rungs(self) -> bool:
        """Whether candidates are screened or scored several times, so that requests are no measure of how far the search is."""
        return bool(self.stage.fidelity or self.stage.screen or self.stage.control)

    def request(self, candidate: Candidate, seeds: Seeds, origin: str = "") -> Request:
        return Request(candidate=candidate, seeds=seeds, origin=origin, costs=self.plans.shares(candidate))

    def fixed(self, study: str, seeds: Seeds) -> list[Trial]:
        """The fixed schedules on these seeds."""
        plans = self.plans.fixed.items()
        return self.settle(study, [(self.request(Candidate(plan=p), seeds, f"fixed: {name}"), None) for name, p in plans])


class _Unmoved:
    """A Progress that is told of everything but how far it is."""

    def __init__(self, progress: Progress) -> None:
        self.say, self.warn, self.phase = progress.say, progress.warn, progress.phase

    def advance(self, note: str = "", *, fresh: bool = True) -> None: ...


def run_stage(stage: SearchStage, artifact_in: Artifact, folder: Path, context: Context) -> Artifact:
    """Search, and leave plan.json, reports, samples and reproduce.py in `folder`. Resumes what is in the folder already.

    Where the picked candidate cuts the model, the cut model is in `folder`/model.
    """
    from . import _report, _searched

    progress, seed = context.progress, context.recipe.seed
    module = methods.load("search", stage.method)
    config = recipe.settings("search", stage.method, stage.settings)
    subject = Subject.load(artifact_in.ref, context, stage.scheduler)
    check_objectives(stage, context, subject.conditions)
    _searched.check(stage, subject, folder)
    plans = plans_of(subject, stage, folder)
    warm = _opening.warm(stage, context, plans.space, folder)
    found = judges(stage, subject, folder)
    stores = open_stores(stage, subject, {name: judge.id for name, judge in found.items()}, folder)
    for name in ("rescore", "report"):
        stores[name].retry()  # not the search's own: what its failures led to is proposed already
    latency = plans.validated(stage, subject, folder)
    stores["search"].remember(facts=_report.facts(stage, module, config, subject, plans, latency, folder))
    # Anyone who reaches the storage may help; who searches on one machine need not be told.
    listener = progress if context.options.storage else Silent()
    _work.offer(stores["search"], _work.describe(stage, artifact_in, subject, folder), listener)
    run = _Search(stage, subject, plans, stores, found, Clock(context.options.max_time, context.began))

    # Common seeds for all candidates: differences between plans are not drowned by differences between images.
    seeds = Seeds(role="search", base=seed, count=stage.samples)
    progress.phase("fixed schedules", len(plans.fixed))
    known = run.fixed("search", seeds)
    scored, stopped = _propose(run, module, config, known, seeds, warm, folder)
    members, pick = _members(run, scored, known)
    _searched.reopen(folder)
    winner = members[pick - 1].request.candidate

    # Unseen seeds and unseen reference images, the same for all.
    unseen = Seeds(role="report", base=seed, count=context.recipe.evaluate.samples)
    _report_on(run, [t.request.candidate for t in members], winner, unseen, folder)
    stores["search"].remember(
        members=[t.request.candidate.plain() for t in members], picked=pick, stopped=stopped, winner=winner.plain()
    )
    _work.close(stores["search"])
    return _searched.finish(stage, artifact_in, subject, plans, stores, winner, unseen, stopped, folder)


def _propose(
    run: _Search, module: Any, config: Any, known: list[Trial], seeds: Seeds, opening: "Opening", folder: Path
) -> tuple[list[Trial], int | None]:
    """Let the method propose until its trials are spent or time is over: (all that was scored in full, trials if stopped)."""
    from ..search._task import Task

    stage, progress, seed = run.stage, run.subject.context.progress, run.subject.context.recipe.seed
    first = stage.objective[0]
    usual = sorted((t for t in known if t.state == "complete"), key=lambda t: t.value(first))
    best = usual[0].request.candidate.plan if usual else None
    usual_plan = best or next(iter(run.plans.fixed.values()))
    opening = [*opening, *_opening.pruned(stage, run.subject, run.plans, usual_plan, folder)]
    opening += _learned.opening(run.plans.learned, run.plans.space, usual_plan, seed)
    ladder = Ladder(stage, run.settle, usual[0] if usual else None)
    task = Task(run.plans.space, stage.trials, seeds, stage.objective, tuple(ladder.known(known)), tuple(opening))
    proposals = module.search(task, config, random.Random(seed))
    progress.phase(stage.method, stage.trials)
    asked: list[Trial] = []
    answers: list[Trial] | None = None
    while not run.clock.over():
        try:
            batch = proposals.send(answers)
        except StopIteration:
            break
        answers = ladder.answers(batch, len(asked))
        asked += answers
        for _ in answers if run.in_rungs else ():
            progress.advance()
        if len(answers) < len(batch):  # out of time in the middle of a batch
            break
    stopped = None if len(asked) >= stage.trials or not run.clock.over() else len(asked)
    scored = ladder.full(asked)
    if not any(t.state == "complete" and run.counts(t) for t in scored):
        if stopped is not None and not any(t.state == "failed" for t in asked):
            raise UserError(
                f"--max-time ended the search after {len(asked)} candidates, none that counts. Go on with more time."
            )
        raise UserError(_nothing(asked, run.plans))
    return scored, stopped


def _members(run: _Search, scored: list[Trial], known: list[Trial]) -> tuple[list[Trial], int]:
    """What can be picked, and which is. The search's own values are optimistic, the best of many noisy ones: elites compete
    again on fresh seeds, with the best fixed schedule among them.
    """
    stage, context = run.stage, run.subject.context
    best = elites([t for t in scored if t.state == "complete" and run.counts(t)], stage.objective, stage.rescore)
    fixed = elites([t for t in known if t.state == "complete"], stage.objective[:1], 1)  # to compare with, whatever it costs
    seeds = Seeds(role="rescore", base=context.recipe.seed, count=stage.rescore_samples)
    pool = [(run.request(t.request.candidate, seeds), None) for t in (*best, *fixed)]
    context.progress.phase("elites on fresh seeds", len(pool))
    rescored = run.settle("rescore", pool)
    complete = [t for t in rescored if t.state == "complete"]
    if not any(run.counts(t) for t in complete):
        raise UserError(_nothing(rescored, run.plans))
    usual = next((t for t in complete if fixed and t.request.candidate == fixed[0].request.candidate), None)
    complete = [t for t in complete if run.counts(t)]
    members = (
        elites(complete, stage.objective, len(complete)) if len(stage.objective) == 1 else front(complete, stage.objective)
    )
    if stage.pick is not None and stage.pick > len(members):
        what = "elites" if len(stage.objective) == 1 else "members of the front"
        raise UserError(
            f"pick: {stage.pick}: there are {len(members)} {what}, counted from 1, the best {stage.objective[0]} first."
        )
    return members, stage.pick or default_pick(members, stage.objective, usual)


def _report_on(run: _Search, members: list[Candidate], winner: Candidate, unseen: Seeds, folder: Path) -> None:
    """Score on unseen seeds: what can be picked, the fixed schedules, and the winner's parts one by one."""
    progress, subject = run.subject.context.progress, run.subject
    asked = {candidate.digest(): candidate for candidate in (*members, *parts(winner).values())}
    progress.phase("report on unseen seeds", len(asked) + len(run.plans.fixed))
    run.settle("report", [(run.request(candidate, unseen), None) for candidate in asked.values()])
    run.fixed("report", unseen)
    if run.stores["search"].recall("winner", winner.plain()) != winner.plain():
        (folder / "samples" / "searched.png").unlink(missing_ok=True)  # an earlier session picked another one
    shown = {"searched": winner, **{name: Candidate(plan=plan) for name, plan in run.plans.fixed.items()}}
    complete = {t.request.candidate.digest() for t in run.stores["report"].trials.values() if t.state == "complete"}
    for name, candidate in shown.items():
        sheet = folder / "samples" / f"{name}.png"
        if candidate.digest() in complete and not sheet.is_file():
            with trimmed(subject.model, subject.sampler, candidate.plan, candidate.cuts) as plan:
                draw_sheet(subject.sampler, plan, unseen, sheet)


def _nothing(trials: list[Trial], plans: Plans) -> str:
    failed = [t for t in trials if t.state == "failed"]
    if failed:
        which = "all" if len(failed) == len(trials) else "too many"
        return f"{which} candidates failed ({len(failed)} of {len(trials)}), the first with: {failed[0].error} No winner can be named."
    said = ", ".join(f"{name}={most:g}" for name, most in plans.space.budget.items())
    if not trials:
        return f"no candidate was found that keeps the budget {said}. Raise it, or let the search leave more out (--space)."
    least = min(trials, key=lambda t: max(t.request.costs[name] / most for name, most in plans.space.budget.items()))
    cheapest = ", ".join(f"{name}={least.request.costs[name]:.3f}" for name in plans.space.budget)
    return (
        f"no candidate among {len(trials)} keeps the budget {said}; the cheapest was number {least.number} with {cheapest}. "
        "Give more --trials, a smaller stage_one, or a larger budget."
    )
