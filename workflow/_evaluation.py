"""One model measured: images made once and kept batch by batch, metrics on what was seen of them, timings at the end."""

import contextlib
import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import methods
from ..core.candidate import SamplingPlan, Seeds
from ..core.errors import UserError
from ..core.files import write_text
from ..core.measurement import Measurement
from ..report.evaluation import Evaluation
from ._evaluator import described, hashes
from ._gallery import IMAGES, Gallery, check_work, differing, discard, locked
from ._identity import Base, Who, said
from ._painting import draw
from ._report import environment
from ._resolution import check_power, power, warnings
from ._rig import machine, rig_of
from ._source import Source
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from ..evaluate._scorer import Collector

PICTURES = 64  # images kept as PNG beside the result


@dataclass(frozen=True)
class Asked:
    """What to evaluate, beside what the context's recipe says of metrics, samples and references."""

    ref: str
    plan: SamplingPlan | None = None  # to follow; an artifact's own where neither plan nor steps are given
    steps: int | None = None  # of the stock schedule
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of metrics, by metric
    base: str | None = None  # the uncut model; a pruned model's parent where none is named
    power: Mapping[str, float] = field(default_factory=dict)  # differences that should be seen, by metric
    out: Path | None = None  # FILE.json
    pictures: int = PICTURES
    resume: bool = False
    command: str = ""


def evaluate(asked: Asked, context: Context, cache: Path) -> Evaluation:
    """Measure, and write asked.out where it is given. Goes on with interrupted work; returns what is finished already.

    cache: for reference statistics, and for the work where nothing is to be kept.
    """
    from ..evaluate._scorer import Scorer

    needs = metric_needs(context)
    seat = _Seat(context)
    plan = planned(seat.take(asked.ref), asked.plan, asked.steps)
    who, told = Who.of(seat.subject), described(seat.subject.conditions)
    pruned_from = seat.subject.model.origin if seat.subject.model.origin != seat.subject.model.ref else None
    uncut = _base_ref(asked, seat.subject, plan, pruned_from, needs)
    seeds = Seeds(role="report", base=context.recipe.seed, count=context.recipe.evaluate.samples)
    if "rig" in needs:  # numbers of one machine are not another's
        who = replace(who, machine={**machine(who.device, who.dtype), "offload": context.options.offload})
    with contextlib.ExitStack() as stack:
        others = {"models": hashes(seat.subject.model, plan)} if plan is not None and plan.models else {}
        early = {**vars(who), **others, "plan": plan and plan.plain(), "steps": asked.steps, "seeds": seeds.plain()}
        if asked.out is not None:
            stack.enter_context(locked(asked.out, folder_of(asked.out)))
            _refuse(asked, asked.out, early)  # before a reference is made that may take hours
        teacher = pruned_from if pruned_from is not None and seat.subject.has_teacher else asked.ref
        scorer = Scorer(seat.take(teacher, who.prompts).views("report", cache), settings=asked.settings)
        scorer.check(*told)
        check_power(asked.power, scorer)
        base = None
        if "base" in needs:
            base = Base.of(seat.take(uncut, who.prompts), plan, asked.steps, own=uncut != asked.ref)
        identity = {**early, "metrics": scorer.id, "base": base and base.plain()}
        if (known := _known(asked, identity)) is not None:
            context.progress.say(f"{asked.out}: finished already")
            return known
        gallery = _gallery(asked, stack, cache, identity)
        if base is not None:
            draw(seat.subject, base.plan, base.steps, seeds, gallery, "base", f"images of {base.said}")
        subject, collector = seat.take(asked.ref), scorer.collect()
        if scorer.paints:
            what = f"images of {asked.ref}"
            draw(subject, plan, asked.steps, seeds, gallery, "images", what, scorer, asked.pictures)
            for indices, seen in gallery.read():
                collector.append(seen, *_told(subject, indices))
        measurements = _measured(subject, plan, asked.steps, seeds, collector, base)
        calls, seconds = gallery.spent()
        found = Evaluation(
            identity=identity,
            lissom=__version__,
            model=subject.model.ref,
            model_hash=subject.model.fingerprint,
            pipeline=type(subject.model.pipe).__name__,
            plan=plan,
            steps=len(plan.steps) if plan else asked.steps,
            what=said(plan, asked.steps),
            samples=seeds.count if scorer.paints else 0,
            seeds=seeds if scorer.paints else None,
            measurements=measurements,
            base=base.said if base is not None else "",
            images=folder_of(asked.out).name if asked.out is not None and scorer.paints else None,
            power=power(asked.power, measurements),
            denoiser_calls=calls,
            seconds=round(seconds, 2),
            environment=environment(subject.model.device, subject.model.dtype),
            command=asked.command,
            warnings=tuple(warnings(measurements, scorer, subject)),
        )
        if asked.out is not None:
            if scorer.paints:
                gallery.tell(_each(subject, seeds, collector))
            write_text(asked.out, found.text())
            gallery.finish()
    for text in found.warnings:
        context.progress.warn(text)
    return found


class _Seat:
    """For one model at a time: several need not fit into memory together. Nobody else may hold on to its subject."""

    def __init__(self, context: Context) -> None:
        self.context, self.ref = context, ""
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        assert self._subject is not None  # one was taken
        return self._subject

    def take(self, ref: str, prompts: str | None = None) -> Subject:
        """The model of this name. prompts: hash of those that it must have."""
        if ref != self.ref:
            self._subject, self.ref = None, ""
            gc.collect()
            self._subject, self.ref = Subject.load(ref, self.context), ref
        if prompts is not None and self.subject.conditions.hash != prompts:
            raise UserError(
                f"{ref}: has other prompts of its own than the model that is measured. Give both the same with --prompts FILE."
            )
        return self.subject


def folder_of(out: Path) -> Path:
    """FILE.images/ beside FILE.json: pictures, per-image.jsonl, unfinished work, and reference statistics that had to be made."""
    return out.with_name(out.stem + IMAGES)


def ready(ref: str, plan: SamplingPlan | None, steps: int | None, context: Context) -> tuple[Subject, SamplingPlan | None]:
    """The model and the plan to follow. Refused before any image is made."""
    subject = Subject.load(ref, context)
    return subject, planned(subject, plan, steps)


def planned(subject: Subject, plan: SamplingPlan | None, steps: int | None) -> SamplingPlan | None:
    """The plan to follow: the given one, else an artifact's own, else none. Raises UserError for what cannot be followed."""
    from ..core import driving

    plan = plan or (subject.model.plan if steps is None else None)
    if plan is not None:
        driving.check(subject.model.pipe, plan)
    elif steps is not None:
        subject.check_steps(steps)
    return plan


def metric_needs(context: Context) -> frozenset[str]:
    """What the recipe's metrics need, all together."""
    return frozenset[str]().union(*(methods.load("evaluate", name).needs for name in context.recipe.evaluate.metrics))


def _base_ref(asked: Asked, subject: Subject, plan: SamplingPlan | None, pruned_from: str | None, needs: frozenset[str]) -> str:
    """The model to be compared with image by image, where a metric does that."""
    if "base" not in needs and asked.base is not None:
        raise UserError("--base: no metric that was asked for compares with it; add fidelity to --metrics.")
    uncut = asked.base or pruned_from
    if "base" in needs and uncut is None and not any(step.left_out or step.model for step in (plan.steps if plan else ())):
        raise UserError(f"fidelity: {subject.model.ref} is the uncut model itself. Say with --base MODEL what to compare with.")
    return uncut or asked.ref


def _refuse(asked: Asked, out: Path, early: dict[str, Any]) -> None:
    """UserError where what is at `out`, finished or not, is not to go on or is another evaluation, as far as is known by now."""
    if not out.is_file():
        check_work(folder_of(out), early, asked.resume)
        return
    if not asked.resume:
        raise UserError(
            f"{out}: is there already. Remove it, choose another --out, or add --resume to keep it if it is this one."
        )
    found = Source(str(out)).evaluation()
    _same(out, found, {**found.identity, **early})


def _same(out: Path, found: Evaluation, identity: dict[str, Any]) -> None:
    if (other := differing(found.identity, identity)) is not None:
        raise UserError(
            f"{out}: holds an evaluation with another {other} ({found.model}, {found.what}). Remove it, or choose another --out."
        )


def _known(asked: Asked, identity: dict[str, Any]) -> Evaluation | None:
    """The finished evaluation that is there already, with what is asked of its resolution now."""
    if asked.out is None or not asked.out.is_file():
        return None
    found = Source(str(asked.out)).evaluation()
    _same(asked.out, found, identity)
    discard(folder_of(asked.out))  # work that a kill left between the result and its end
    renewed = found.model_copy(update={"power": power(asked.power, found.measurements)})
    if renewed != found:
        write_text(asked.out, renewed.text())
    return renewed


def _gallery(asked: Asked, stack: contextlib.ExitStack, cache: Path, identity: dict[str, Any]) -> Gallery:
    """Beside the result, or, where none is written, in a folder that goes when the stack ends."""
    if asked.out is not None:
        return Gallery(folder_of(asked.out), identity, asked.resume)
    cache.mkdir(parents=True, exist_ok=True)
    return Gallery(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache))), identity, resume=False)


def _measured(
    subject: Subject, plan: SamplingPlan | None, steps: int | None, seeds: Seeds, collector: "Collector", base: Base | None
) -> tuple[Measurement, ...]:
    from ..evaluate._scorer import Made

    rig = rig_of(subject, plan, steps) if "rig" in collector.scorer.needs else None
    model, prompts = subject.model, subject.conditions
    made = Made(seeds, prompts.hash, model.device, model.dtype, len(prompts), rig=rig, base=base.digest if base else "")
    return collector.finish(made)


def _told(subject: Subject, indices: range) -> tuple[list[str | None], list[int | None]]:
    """Captions and labels of some images."""
    return [subject.conditions.caption(i) for i in indices], [subject.conditions.label(i) for i in indices]


def _each(subject: Subject, seeds: Seeds, collector: "Collector") -> list[dict[str, Any]]:
    """per-image.jsonl: what each image shows, its seed, and every number that it has of its own."""
    rows = []
    for place, (index, seed) in enumerate(zip(seeds.indices(), seeds.values(), strict=True)):
        caption = subject.conditions.caption(index)
        values = {name: round(numbers[place], 6) for name, numbers in collector.each.items()}
        rows.append({"index": index, "seed": seed, **({"caption": caption} if caption is not None else {}), **values})
    return rows
