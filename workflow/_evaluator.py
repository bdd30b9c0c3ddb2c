"""Plan and seeds in, measurements out: sampling, features and metrics behind one call."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut, SamplingPlan, Seeds, canonical
from ..core.conditions import Conditions
from ..core.errors import UserError
from ..core.measurement import Measurement
from ..core.models import Model

if TYPE_CHECKING:
    from ..core.sampling import Sampler
    from ..evaluate._scorer import View

SHEET = 32  # images on a contact sheet


@dataclass(frozen=True)
class Score:
    """What one evaluation gave and took."""

    measurements: tuple[Measurement, ...]
    calls: int  # denoiser forwards executed
    plain_calls: int  # without shared prefixes
    seconds: float


class Evaluator:
    """Scores plans of one model with one set of metrics, each by its view. Deterministic given its `id`."""

    def __init__(
        self,
        model: Model,
        sampler: "Sampler",
        conditions: Conditions,
        metrics: "Mapping[str, View | None]",
        call: dict[str, Any],
    ) -> None:
        """Raises UserError for metrics that cannot be had of every candidate."""
        from ..evaluate._scorer import Scorer

        self.model, self.sampler, self.conditions = model, sampler, conditions
        self.scorer = Scorer(metrics)
        for name, module in self.scorer.modules.items():
            if module.needs & {"rig", "base"}:
                raise UserError(
                    f"metrics: {name} is measured once, by `lissom evaluate` and for a recipe's gates, not of every candidate. Leave it out."
                )
        self.scorer.check(*described(conditions))
        parts = {
            "scorer": self.scorer.id,
            "model": model.fingerprint,
            "conditions": conditions.hash,
            "call": call,
            "chunk": sampler.chunk,
            "device": model.device.partition(":")[0],
            "dtype": model.dtype,
        }
        if model.others:
            parts["models"] = hashes(model)
        self.id = hashlib.sha256(canonical(parts).encode()).hexdigest()

    def score(
        self,
        plan: SamplingPlan | None,
        seeds: Seeds,
        *,
        cuts: tuple[Cut, ...] = (),
        steps: int | None = None,
        replicates: bool = False,
        sheet: Path | None = None,
    ) -> Score:
        """Make the images of a seed block and measure them.

        plan None: the pipeline's stock run with `steps`. cuts: the model is cut for the time being; the plan's layers are named
        as in the whole one. sheet: where to write a contact sheet of the first images.
        """
        began, calls, served = time.monotonic(), self.sampler.calls, self.sampler.served
        from ..evaluate._scorer import Made, Shown

        collector = self.scorer.collect()
        shown: list[Any] = []
        with trimmed(self.model, self.sampler, plan, cuts) as moved:
            for batch in self.sampler.images(moved, seeds, steps=steps):
                captions = [self.conditions.caption(i) for i in batch.indices]
                labels = [self.conditions.label(i) for i in batch.indices]
                assert batch.pixels is not None  # latents were not asked for
                collector.add(Shown(batch.pixels), captions, labels)
                if sheet is not None and sum(map(len, shown)) < SHEET:
                    shown.append(batch.pixels.numpy())
        if sheet is not None:
            _sheet(shown, sheet)
        made = Made(seeds, self.conditions.hash, self.model.device, self.model.dtype, len(self.conditions), replicates)
        measurements = collector.finish(made)
        executed = self.sampler.calls - calls
        return Score(measurements, executed, executed + self.sampler.served - served, time.monotonic() - began)


@contextmanager
def trimmed(
    model: Model, sampler: "Sampler", plan: SamplingPlan | None, cuts: tuple[Cut, ...]
) -> Iterator[SamplingPlan | None]:
    """Inside, the model is cut and the sampler's memo knows it; gives the plan with its layers named as in the cut model.

    Layers to skip or reuse that are gone are left out. Raises CannotCut for cuts that do not fit.
    """
    if not cuts:
        yield plan
        return
    from ..core import surgery

    whole = sampler.fingerprint
    named = {address for step in plan.steps for address in step.left_out} if plan else set()
    with surgery.applied(model.denoiser, cuts, following=named) as names:
        sampler.fingerprint = canonical([whole, [cut.plain() for cut in cuts]])
        try:
            yield plan and plan.renamed(names.get)
        finally:
            sampler.fingerprint = whole


def hashes(model: Model, plan: SamplingPlan | None = None) -> dict[str, str]:
    """Fingerprints of the other models that may make steps, by name; of those that a plan names, if one is given."""
    return {n: other.model_hash for n, other in sorted(model.others.items()) if plan is None or n in plan.models}


def draw_sheet(sampler: "Sampler", plan: SamplingPlan | None, seeds: Seeds, path: Path, steps: int | None = None) -> None:
    """Write a contact sheet of the first images of a seed block."""
    few = seeds.model_copy(update={"count": min(SHEET, seeds.count)})
    _sheet([b.pixels.numpy() for b in sampler.images(plan, few, steps=steps) if b.pixels is not None], path)


def _sheet(shown: list[Any], path: Path) -> None:
    import numpy as np

    from ..report.sheets import sheet

    sheet(np.concatenate(shown)[:SHEET], path)


def described(conditions: Conditions) -> tuple[bool, bool]:
    """Whether every image has a caption, and a label."""
    rows = range(len(conditions))
    return all(conditions.caption(i) is not None for i in rows), all(conditions.label(i) is not None for i in rows)


def chosen(given: str | dict[str, str] | None, metric: str) -> str | None:
    """The features or the reference of a metric: its own, else the default, else none."""
    if isinstance(given, dict):
        return given.get(metric, given.get("default"))
    return given


def features_for(name: str | None, model: Model) -> str:
    """The named extractor, or the zoo's judge for the zoo's models."""
    if name is None and not model.origin.startswith("zoo:"):
        raise UserError(f"{model.ref}: say with --features what to compare images by, e.g. --features zoo:judge.")
    return name or "zoo:judge"


def default_reference(name: str | None, model: Model) -> str:
    """The named reference; else the training data of a zoo model, else the model's own many-step outputs."""
    if name is not None:
        return name
    return "zoo:fashion" if model.origin.startswith("zoo:") else "teacher"
