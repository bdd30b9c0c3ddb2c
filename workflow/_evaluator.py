"""Plan and seeds in, measurements out: sampling, features and metrics behind one call."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import SamplingPlan, Seeds, canonical
from ..core.conditions import Conditions
from ..core.errors import UserError
from ..core.measurement import Measurement
from ..core.models import Model

if TYPE_CHECKING:
    from ..core.sampling import Sampler
    from ..evaluate._features import Features
    from ..evaluate._reference import Reference

SHEET = 32  # images on a contact sheet


@dataclass(frozen=True)
class Score:
    """What one evaluation gave and took."""

    measurements: tuple[Measurement, ...]
    calls: int  # denoiser forwards executed
    plain_calls: int  # without shared prefixes
    seconds: float


class Evaluator:
    """Scores plans of one model against one reference, with one set of metrics. Deterministic given its `id`."""

    def __init__(
        self,
        model: Model,
        sampler: "Sampler",
        conditions: Conditions,
        features: "Features",
        reference: "Reference | None",
        metrics: Sequence[str],
        call: dict[str, Any],
    ) -> None:
        from ..evaluate._scorer import Scorer

        self.model, self.sampler, self.conditions = model, sampler, conditions
        self.scorer = Scorer(metrics, features, reference.statistics if reference else None)
        first = range(len(conditions))
        self.scorer.check(
            all(conditions.caption(i) is not None for i in first), all(conditions.label(i) is not None for i in first)
        )
        parts = {
            "scorer": self.scorer.id,
            "model": model.fingerprint,
            "conditions": conditions.hash,
            "call": call,
            "chunk": sampler.chunk,
            "device": model.device.partition(":")[0],
            "dtype": model.dtype,
        }
        self.id = hashlib.sha256(canonical(parts).encode()).hexdigest()

    def score(
        self,
        plan: SamplingPlan | None,
        seeds: Seeds,
        *,
        steps: int | None = None,
        replicates: bool = False,
        sheet: Path | None = None,
    ) -> Score:
        """Make the images of a seed block and measure them.

        plan None: the pipeline's stock run with `steps`. sheet: where to write a contact sheet of the first images.
        """
        began, calls, served = time.monotonic(), self.sampler.calls, self.sampler.served
        collector = self.scorer.collect()
        shown: list[Any] = []
        for batch in self.sampler.images(plan, seeds, steps=steps):
            captions = [self.conditions.caption(i) for i in batch.indices]
            labels = [self.conditions.label(i) for i in batch.indices]
            assert batch.pixels is not None  # latents were not asked for
            collector.add(batch.pixels, captions, labels)
            if sheet is not None and sum(map(len, shown)) < SHEET:
                shown.append(batch.pixels.numpy())
        if sheet is not None:
            _sheet(shown, sheet)
        measurements = collector.finish(
            seeds=seeds,
            prompts_hash=self.conditions.hash,
            replicates=replicates,
            device=self.model.device,
            dtype=self.model.dtype,
            period=len(self.conditions),
        )
        executed = self.sampler.calls - calls
        return Score(measurements, executed, executed + self.sampler.served - served, time.monotonic() - began)

    def draw_sheet(self, plan: SamplingPlan | None, seeds: Seeds, path: Path, steps: int | None = None) -> None:
        """Only the contact sheet: the first images of a seed block."""
        draw_sheet(self.sampler, plan, seeds, path, steps)


def draw_sheet(sampler: "Sampler", plan: SamplingPlan | None, seeds: Seeds, path: Path, steps: int | None = None) -> None:
    """Write a contact sheet of the first images of a seed block."""
    few = seeds.model_copy(update={"count": min(SHEET, seeds.count)})
    _sheet([b.pixels.numpy() for b in sampler.images(plan, few, steps=steps) if b.pixels is not None], path)


def _sheet(shown: list[Any], path: Path) -> None:
    import numpy as np

    from ..report.sheets import sheet

    sheet(np.concatenate(shown)[:SHEET], path)


def features_for(name: str | None, model: Model) -> "Features":
    """The named extractor, or the zoo's judge for the zoo's models."""
    from ..evaluate import _features

    if name is None:
        if not model.origin.startswith("zoo:"):
            raise UserError(f"{model.ref}: say with --features what to compare images by, e.g. --features zoo:judge.")
        name = "zoo:judge"
    return _features.load(name, device=model.device)


def default_reference(name: str | None, model: Model) -> str:
    """The named reference; else the training data of a zoo model, else the model's own many-step outputs."""
    if name is not None:
        return name
    return "zoo:fashion" if model.origin.startswith("zoo:") else "teacher"
