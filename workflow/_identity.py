"""What the images of an evaluation are a function of: an equal one is gone on with, or not measured again."""

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from .. import __version__
from ..core.candidate import SamplingPlan, Scheduler, canonical
from ._evaluator import hashes
from ._subject import Subject


def said(plan: SamplingPlan | None, steps: int | None) -> str:
    """How the images are made, in words."""
    if plan is None:
        return f"stock schedule of {steps} steps" if steps else "the pipeline's default schedule"
    skips, reused = (sum(len(getattr(s, way)) for s in plan.steps) for way in ("skip", "reuse"))
    others = "".join(f", {sum(s.model == name for s in plan.steps)} of them made by {name}" for name in plan.models)
    times = ", ".join(f"{t:g}" for t in plan.timesteps)
    left_out = f"{f', {skips} layers skipped' if skips else ''}{f', {reused} layers reused' if reused else ''}"
    return f"a plan of {len(plan.steps)} steps ({times}){others}{left_out}"


@dataclass(frozen=True)
class Who:
    """What the images are a function of, beside plan and seeds."""

    model: str
    scheduler: dict[str, Any]
    prompts: str
    call: dict[str, str]
    chunk: int
    device: str
    dtype: str
    versions: dict[str, str]
    machine: dict[str, str] = field(default_factory=dict)  # where times or memory are measured

    @classmethod
    def of(cls, subject: Subject) -> "Who":
        model = subject.model
        return cls(
            model.fingerprint,
            Scheduler.of(model.pipe.scheduler).plain(),  # not in the fingerprint: a plan would hold it
            subject.conditions.hash,
            {key: repr(value) for key, value in subject.call.items()},
            subject.context.options.chunk,  # moves the last digits, and so where a resumed evaluation ends
            model.device.partition(":")[0],
            model.dtype,
            {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"lissom": __version__},
        )


@dataclass(frozen=True)
class Base:
    """How the uncut model paints: the same timesteps, all of them its own, no layer left out."""

    who: dict[str, Any]
    plan: SamplingPlan | None
    steps: int | None
    said: str

    @classmethod
    def of(cls, uncut: Subject, plan: SamplingPlan | None, steps: int | None, *, own: bool) -> "Base":
        """own: the uncut model is another one than the one that is measured, so that a plan that it brings counts."""
        from ..core import driving

        if plan is not None:
            plan = plan.without("skip", "reuse", "model")
        plan = (uncut.model.plan if own and steps is None else None) or plan
        if plan is not None:
            driving.check(uncut.model.pipe, plan)
        who = Who.of(uncut)
        what = {"model": who.model, "scheduler": None if plan else who.scheduler, "call": who.call}
        if plan is not None and plan.models:
            what["models"] = hashes(uncut.model, plan)
        return cls(what, plan, steps, f"{uncut.model.ref}, {said(plan, steps)}")

    def plain(self) -> dict[str, Any]:
        return {**self.who, "plan": self.plan and self.plan.plain(), "steps": self.steps}

    @property
    def digest(self) -> str:
        """What numbers against this base are comparable by."""
        return hashlib.sha256(canonical(self.plain()).encode()).hexdigest()[:12]
