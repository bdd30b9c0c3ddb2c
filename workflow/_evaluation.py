"""One model measured: images made once and kept batch by batch, metrics on what was seen of them, timings at the end."""

import contextlib
import gc
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import methods
from ..core.candidate import SamplingPlan, Scheduler, Seeds, canonical
from ..core.errors import UserError
from ..core.files import write_text
from ..core.measurement import Measurement
from ..report.evaluation import Evaluation
from ._evaluator import described
from ._gallery import Gallery, locked
from ._painting import draw
from ._report import environment
from ._resolution import check_power, power, warnings
from ._rig import rig_of
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from ..evaluate._scorer import Collector

PICTURES = 64  # images kept as PNG beside the result
IMAGES = ".images"  # FILE.images/ stands beside FILE.json


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

    progress = context.progress
    needs = metric_needs(context)
    subject, plan = ready(asked.ref, asked.plan, asked.steps, context)
    parent = _parent(asked, subject, plan, needs)
    who = _Who.of(subject)
    with contextlib.ExitStack() as stack:
        if asked.out is not None:
            stack.enter_context(locked(folder_of(asked.out)))
        if parent is None:
            uncut = subject
        else:  # two models need not fit into memory together: this one comes back below
            del subject
            gc.collect()
            uncut = Subject.load(parent, context)
            if uncut.conditions.hash != who.prompts:
                raise UserError(
                    f"{parent}: has other prompts of its own than {asked.ref}. Give both the same with --prompts FILE."
                )
        scorer = Scorer(uncut.views("report", cache), settings=asked.settings)
        scorer.check(*described(uncut.conditions))
        check_power(asked.power, scorer)
        seeds = Seeds(role="report", base=context.recipe.seed, count=context.recipe.evaluate.samples)
        base = _Base.of(uncut, plan, asked.steps, own=parent is not None) if "base" in needs else None
        identity = {
            **who.plain(), "plan": plan and plan.plain(), "steps": asked.steps, "seeds": seeds.plain(), "metrics": scorer.id,
            "base": base and base.plain(), "power": dict(asked.power),
        }  # fmt: skip
        digest = hashlib.sha256(canonical(identity).encode()).hexdigest()
        if (known := _known(asked, digest)) is not None:
            progress.say(f"{asked.out}: finished already")
            return known
        gallery = _gallery(asked, stack, cache, identity)
        if base is not None:
            draw(uncut, base.plan, base.steps, seeds, gallery, "base", f"images of {base.said}")
        if parent is not None:
            del uncut
            gc.collect()
            subject, _ = ready(asked.ref, asked.plan, asked.steps, context)
        collector = scorer.collect()
        if scorer.paints:
            what = f"images of {asked.ref}"
            draw(subject, plan, asked.steps, seeds, gallery, "images", what, scorer, asked.pictures)
            for indices, seen in gallery.read():
                collector.append(seen, *_told(subject, indices))
        measurements = _measured(subject, plan, asked.steps, seeds, collector)
        calls, seconds = gallery.spent()
        found = Evaluation(
            id=digest,
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
        progress.warn(text)
    return found


def folder_of(out: Path) -> Path:
    """FILE.images/ beside FILE.json: pictures, per-image.jsonl, unfinished work, and reference statistics that had to be made."""
    return out.with_name(out.stem + IMAGES)


def ready(ref: str, plan: SamplingPlan | None, steps: int | None, context: Context) -> tuple[Subject, SamplingPlan | None]:
    """The model and the plan to follow: the given one, else an artifact's own, else none. Refused before any image is made."""
    from ..core import driving

    subject = Subject.load(ref, context)
    plan = plan or (subject.model.plan if steps is None else None)
    if plan is not None:
        driving.check(subject.model.pipe, plan)
    elif steps is not None:
        subject.check_steps(steps)
    return subject, plan


def said(plan: SamplingPlan | None, steps: int | None) -> str:
    """How the images are made, in words."""
    if plan is None:
        return f"stock schedule of {steps} steps" if steps else "the pipeline's default schedule"
    skips = sum(len(s.skip) for s in plan.steps)
    times = ", ".join(f"{t:g}" for t in plan.timesteps)
    return f"a plan of {len(plan.steps)} steps ({times}){f', {skips} layers skipped' if skips else ''}"


@dataclass(frozen=True)
class _Who:
    """What the images are a function of, beside plan and seeds."""

    model: str
    scheduler: dict[str, Any]
    prompts: str
    call: dict[str, str]
    device: str
    dtype: str

    @classmethod
    def of(cls, subject: Subject) -> "_Who":
        model = subject.model
        return cls(
            model.fingerprint,
            Scheduler.of(model.pipe.scheduler).plain(),  # not in the fingerprint: a plan would hold it
            subject.conditions.hash,
            {key: repr(value) for key, value in subject.call.items()},
            model.device.partition(":")[0],
            model.dtype,
        )

    def plain(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class _Base:
    """How the uncut model paints: the same timesteps, no layer skipped."""

    fingerprint: str
    plan: SamplingPlan | None
    steps: int | None
    said: str

    @classmethod
    def of(cls, uncut: Subject, plan: SamplingPlan | None, steps: int | None, *, own: bool) -> "_Base":
        """own: the uncut model is another one than the one that is measured, so that a plan that it brings counts."""
        from ..core import driving

        if plan is not None:
            plan = plan.model_copy(update={"steps": tuple(s.model_copy(update={"skip": ()}) for s in plan.steps)})
        plan = (uncut.model.plan if own and steps is None else None) or plan
        if plan is not None:
            driving.check(uncut.model.pipe, plan)
        return cls(uncut.model.fingerprint, plan, steps, f"{uncut.model.ref}, {said(plan, steps)}")

    def plain(self) -> dict[str, Any]:
        return {"model": self.fingerprint, "plan": self.plan and self.plan.plain(), "steps": self.steps}


def metric_needs(context: Context) -> frozenset[str]:
    """What the recipe's metrics need, all together."""
    return frozenset[str]().union(*(methods.load("evaluate", name).needs for name in context.recipe.evaluate.metrics))


def _parent(asked: Asked, subject: Subject, plan: SamplingPlan | None, needs: frozenset[str]) -> str | None:
    """The other model that is needed: to be compared with image by image, or as the teacher of a pruned model."""
    model = subject.model
    pruned_from = model.origin if model.origin != model.ref else None
    if "base" in needs:
        parent = asked.base or pruned_from
        if parent is None and not any(step.skip for step in (plan.steps if plan else ())):
            raise UserError(f"fidelity: {model.ref} is the uncut model itself. Say with --base MODEL what to compare with.")
        return parent
    if asked.base is not None:
        raise UserError("--base: no metric that was asked for compares with it; add fidelity to --metrics.")
    return pruned_from if subject.has_teacher else None


def _known(asked: Asked, digest: str) -> Evaluation | None:
    """The finished evaluation that is there already."""
    if asked.out is None or not asked.out.is_file():
        return None
    if not asked.resume:
        raise UserError(
            f"{asked.out}: is there already. Remove it, choose another --out, or add --resume to keep it if it is this one."
        )
    found = Evaluation.parse(asked.out.read_text(encoding="utf-8"), str(asked.out))
    if found.id != digest:
        raise UserError(
            f"{asked.out}: holds another evaluation ({found.model}, {found.what}). Remove it, or choose another --out."
        )
    return found


def _gallery(asked: Asked, stack: contextlib.ExitStack, cache: Path, identity: dict[str, Any]) -> Gallery:
    """Beside the result, or, where none is written, in a folder that goes when the stack ends."""
    if asked.out is not None:
        return Gallery(folder_of(asked.out), identity, asked.resume)
    cache.mkdir(parents=True, exist_ok=True)
    return Gallery(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache))), identity, resume=False)


def _measured(
    subject: Subject, plan: SamplingPlan | None, steps: int | None, seeds: Seeds, collector: "Collector"
) -> tuple[Measurement, ...]:
    from ..evaluate._scorer import Made

    rig = rig_of(subject, plan, steps) if "rig" in collector.scorer.needs else None
    model, prompts = subject.model, subject.conditions
    with subject.asking():
        return collector.finish(Made(seeds, prompts.hash, model.device, model.dtype, len(prompts), rig=rig))


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
