"""From images to Measurements: one Scorer per evaluation protocol, one Collector per set of generated images.

Shapes: B images of a batch, N images in all, D features.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from .. import __version__
from ..core import methods
from ..core.candidate import Seeds, canonical
from ..core.errors import UserError
from ..core.measurement import Measurement, half_samples
from ._features import Features
from ._sample import Sample
from ._statistics import Statistics

EVALUATION = 1  # raised when the same images would score differently: older trials are then not mixed with newer ones
LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions may move a value


class Scorer:
    """Which metrics, on which features, against which reference. Holds no images, so one serves all candidates."""

    def __init__(
        self,
        metrics: Sequence[str],
        features: Features,
        reference: Statistics | None,
        *,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """`settings` are the values of each metric's Config, by metric.

        Raises UserError for an unknown metric or setting; a reference that a metric needs but is missing or was made by
        other features; and features without text or classes where a metric needs them.
        """
        if not metrics:
            raise UserError(f"no metric to evaluate; there are {', '.join(methods.names('evaluate'))}.")
        self.features, self.reference = features, reference
        self.modules: dict[str, ModuleType] = {name: methods.load("evaluate", name) for name in dict.fromkeys(metrics)}
        settings = settings or {}
        for name in settings.keys() - self.modules.keys():
            raise UserError(f"settings for {name!r}, which is not among the metrics {', '.join(self.modules)}.")
        self.configs = {name: _config(name, module, settings.get(name, {})) for name, module in self.modules.items()}
        self._texts: dict[str, Tensor] = {}  # embeddings (D,) of captions seen: every candidate has the same ones
        if "reference" in self.needs:
            if reference is None:
                raise UserError(
                    f"{self._asking('reference')} needs reference images: give a folder, a zip or a statistics file."
                )
            reference.check(features)
        if "text" in self.needs and not features.has_text:
            raise UserError(f"{self._asking('text')} compares images with text, which {features.name} cannot read.")
        if "labels" in self.needs and not features.classes:
            raise UserError(
                f"{self._asking('labels')} needs features that know the classes; {features.name} has no classes.json."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(module.needs for module in self.modules.values()))

    @property
    def id(self) -> str:
        """sha256 of all that makes values comparable: metrics, settings, features, resizing, reference, our own version."""
        record = {
            "evaluation": EVALUATION,
            "metrics": {name: config.model_dump(mode="json") for name, config in self.configs.items()},
            "features": [self.features.name, self.features.hash, self.features.resize],
            "reference": self._reference_hash(self.needs),
        }
        return hashlib.sha256(canonical(record).encode()).hexdigest()

    def check(self, has_captions: bool, has_labels: bool) -> None:
        """Call before any image is made. Raises UserError if a metric needs captions or labels that will not be there."""
        if "captions" in self.needs and not has_captions:
            raise UserError(
                f"{self._asking('captions')} needs a caption for every image: give prompts, or rows with a caption."
            )
        if "labels" in self.needs and not has_labels:
            raise UserError(f"{self._asking('labels')} needs a label for every image: give rows with a label or class_labels.")

    def collect(self) -> "Collector":
        return Collector(self)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 (len(texts), D), every distinct text encoded once in the Scorer's life."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        self._texts.update(zip(new, self.features.encode_text(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def _reference_hash(self, needs: frozenset[str]) -> str | None:
        return self.reference.hash if self.reference is not None and "reference" in needs else None

    def _asking(self, need: str) -> str:
        return " and ".join(name for name, module in self.modules.items() if need in module.needs)


class Collector:
    """Takes images batch by batch and keeps their features only."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._features: list[Tensor] = []
        self._captions: list[str | None] = []
        self._labels: list[int | None] = []

    def __len__(self) -> int:
        return len(self._captions)

    def add(self, pixels: Tensor, captions: Sequence[str | None], labels: Sequence[int | None]) -> None:
        """uint8 pixels (B, H, W, 3) in the order of the seeds. Raises UserError if their features are not finite."""
        if not len(pixels) == len(captions) == len(labels):
            raise ValueError(f"{len(pixels)} images, {len(captions)} captions and {len(labels)} labels")
        self._features.append(self._scorer.features.extract(pixels))
        self._captions += captions
        self._labels += labels

    def finish(
        self, *, seeds: Seeds, prompts_hash: str | None, replicates: bool, device: str, dtype: str, period: int = 1
    ) -> tuple[Measurement, ...]:
        """One Measurement per metric, in the Scorer's order. `device` and `dtype` are those the images were made with.

        period: after how many images the conditions repeat, so that half-samples are balanced (see `half_samples`).

        Raises UserError if captions or labels are missing, and for too few images for a metric.
        """
        if len(self) != seeds.count:
            raise ValueError(f"{len(self)} images for {seeds.count} seeds")
        scorer = self._scorer
        captions = tuple(c for c in self._captions if c is not None)
        labels = tuple(int(label) for label in self._labels if label is not None)
        scorer.check(len(captions) == len(self), len(labels) == len(self))
        classes = [row["caption"] for row in scorer.features.classes or ()]
        sample = Sample(
            features=torch.cat(self._features),
            reference=scorer.reference,
            text=scorer.encode(captions) if "captions" in scorer.needs else None,
            classes=scorer.encode(classes) if "labels" in scorer.needs else None,
            captions=captions,
            labels=labels,
            halves=half_samples(len(self), period)
            if replicates and len(self) >= 4
            else (),  # a half needs 2 for its covariance
        )
        measured = []
        for name, module in scorer.modules.items():
            score = module.evaluate(sample, scorer.configs[name])
            on_features = "features" in module.needs
            measured.append(
                Measurement(
                    metric=name,
                    value=score.value,
                    unit=module.unit,
                    direction=module.direction,
                    features=scorer.features.name if on_features else None,
                    reference=scorer._reference_hash(module.needs),
                    resize=scorer.features.resize if on_features else None,
                    n=len(self),
                    prompts=prompts_hash,
                    seeds=seeds,
                    replicates=score.replicates,
                    versions=_versions(scorer.features if on_features else None),
                    device=device,
                    dtype=dtype,
                )
            )
        return tuple(measured)


def _config(name: str, module: ModuleType, settings: dict[str, Any]) -> Any:
    try:
        return module.Config(**settings)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}, got {x['input']!r}" for x in e.errors())
        known = ", ".join(module.Config.model_fields) or "none"
        raise UserError(f"settings of {name}: {wrong}. Its settings are: {known}.") from e


def _versions(features: Features | None) -> dict[str, str]:
    versions = {"lissom": __version__, "evaluation": str(EVALUATION), **_libraries()}
    return versions if features is None else {**versions, "features": features.hash[:16]}


@functools.cache
def _libraries() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
