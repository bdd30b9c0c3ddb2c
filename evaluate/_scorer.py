"""From images to Measurements: one Scorer per evaluation protocol, one Collector per set of generated images.

Shapes: B images of a batch, N images in all, H x W pixels, D features, C classes.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from . import _pixels
from ._extractor import Features
from ._sample import NEEDS, Base, Rig, Sample, Score
from ._statistics import Statistics

EVALUATION = 1  # raised when the same images would score differently: older trials are then not mixed with newer ones
LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions may move a value
PAINTED = NEEDS - {"rig"}  # what a metric may need that only images give


@dataclass(frozen=True)
class View:
    """What a metric sees images by, and what it compares them with."""

    features: Features
    reference: Statistics | None = None


@dataclass(frozen=True)
class Shown:
    """Images as they were made: pixels (B, H, W, 3) uint8, and their final latents (B, …) where they are known."""

    pixels: Tensor
    latents: Tensor | None = None


class Scorer:
    """Which metrics, each by its view. Holds no images, so one serves all candidates."""

    def __init__(self, metrics: Mapping[str, View | None], *, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """metrics: by name, in order; None is the view of one that looks at no image (params, latency, …).

        `settings` are the values of each metric's Config, by metric.
        Raises UserError for an unknown metric or setting; a reference that a metric needs but is missing or was made by
        other features; and features without text or classes where a metric needs them.
        """
        if not metrics:
            raise UserError(f"no metric to evaluate; there are {', '.join(methods.names('evaluate'))}.")
        self.modules: dict[str, ModuleType] = {name: methods.load("evaluate", name) for name in metrics}
        self.views = dict(metrics)
        settings = settings or {}
        for name, given in settings.items():
            if name not in self.modules:
                raise UserError(f"settings for {name!r}, which is not among the metrics {', '.join(self.modules)}.")
            if not isinstance(given, Mapping):
                raise UserError(f"settings for {name}: {given!r} belongs to none of them. Write {name}.KEY=VALUE.")
        self.configs = {name: _config(name, module, settings.get(name, {})) for name, module in self.modules.items()}
        self._texts: dict[tuple[str, str], Tensor] = {}  # embeddings (D,) of captions seen: every candidate has the same ones
        for name, module in self.modules.items():
            if module.needs & PAINTED:
                _fits(name, module.needs, self.views[name])

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(module.needs for module in self.modules.values()))

    @property
    def paints(self) -> bool:
        """Whether any metric looks at images."""
        return bool(self.needs & PAINTED)

    @property
    def extractors(self) -> dict[str, Features]:
        """Those that look at every image, by their hash."""
        return {v.features.hash: v.features for name, v in self.views.items() if v and self.modules[name].needs & PAINTED}

    @property
    def id(self) -> str:
        """sha256 of all that makes values comparable: metrics, settings, features, resizing, references, our own version."""
        record = {
            "evaluation": EVALUATION,
            "metrics": {name: config.model_dump(mode="json") for name, config in self.configs.items()},
            "views": {
                name: [v.features.name, v.features.hash, v.features.resize, self._reference_hash(name)]
                for name, v in self.views.items()
                if v is not None
            },
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

    def observe(self, made: Shown, base: Shown | None = None) -> dict[str, Tensor]:
        """All that is kept of a batch of images; base: the uncut model's images of the same seeds, where a metric asks.

        Raises UserError if features are not finite, or the two sets of images differ in size.
        """
        seen = {key: features.extract(made.pixels) for key, features in self.extractors.items()}
        if base is None or "base" not in self.needs:
            return seen
        if made.pixels.shape != base.pixels.shape:
            raise UserError(
                f"{self._asking('base')}: the images have the shape {tuple(made.pixels.shape)}, those of the base model "
                f"{tuple(base.pixels.shape)}. Compare models that paint the same size, or give height and width with --call."
            )
        for key, features in self.extractors.items():
            seen[f"base {key}"] = features.extract(base.pixels)
        seen["ssim"] = _pixels.ssim(made.pixels, base.pixels)
        seen["squared_error"] = _pixels.squared_error(made.pixels.double() / 255, base.pixels.double() / 255)
        if made.latents is not None and base.latents is not None and made.latents.shape == base.latents.shape:
            seen["latent_squared_error"] = _pixels.squared_error(made.latents.double().cpu(), base.latents.double().cpu())
        return seen

    def collect(self) -> "Collector":
        return Collector(self)

    def encode(self, features: Features, texts: Sequence[str]) -> Tensor:
        """float32 (len(texts), D), every distinct text encoded once in the Scorer's life."""
        new = [text for text in dict.fromkeys(texts) if (features.hash, text) not in self._texts]
        for text, embedding in zip(new, features.encode_text(new), strict=True):
            self._texts[features.hash, text] = embedding
        return torch.stack([self._texts[features.hash, text] for text in texts])

    def _reference_hash(self, name: str) -> str | None:
        view, needs = self.views[name], self.modules[name].needs
        if view is None or view.reference is None or not needs & {"reference", "kept"}:
            return None
        return view.reference.identity("kept" in needs)

    def _asking(self, need: str) -> str:
        return " and ".join(name for name, module in self.modules.items() if need in module.needs)


@dataclass(frozen=True)
class Made:
    """What images were made from and on; device and dtype go into the record."""

    seeds: Seeds
    prompts_hash: str | None
    device: str
    dtype: str
    period: int = 1  # after how many images the conditions repeat, so that half-samples are balanced (see `half_samples`)
    replicates: bool = True
    rig: Rig | None = None
    base: str = ""  # what identifies the uncut model's images, where metrics compare with them


@dataclass
class Collector:
    """Takes images batch by batch and keeps what was observed of them."""

    scorer: Scorer
    seen: list[dict[str, Tensor]] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    _digests: dict[str, str] = field(default_factory=dict)
    each: dict[str, tuple[float, ...]] = field(default_factory=dict)  # after `finish`: numbers of single images, by metric

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, made: Shown, captions: Sequence[str | None], labels: Sequence[int | None], base: Shown | None = None) -> None:
        """Images in the order of the seeds. Raises UserError if their features are not finite."""
        if not len(made.pixels) == len(captions) == len(labels):
            raise ValueError(f"{len(made.pixels)} images, {len(captions)} captions and {len(labels)} labels")
        self.append(self.scorer.observe(made, base), captions, labels)

    def append(self, seen: dict[str, Tensor], captions: Sequence[str | None], labels: Sequence[int | None]) -> None:
        """What `Scorer.observe` gave, now or in an earlier session."""
        self.seen.append(seen)
        self.captions += captions
        self.labels += labels

    def finish(self, made: Made) -> tuple[Measurement, ...]:
        """Measurements of every metric, in the Scorer's order.

        Raises UserError if captions or labels are missing, and for too few images for a metric.
        """
        scorer, n = self.scorer, len(self)
        if scorer.paints and n != made.seeds.count:
            raise ValueError(f"{n} images for {made.seeds.count} seeds")
        captions = tuple(c for c in self.captions if c is not None)
        labels = tuple(int(label) for label in self.labels if label is not None)
        if scorer.paints:
            scorer.check(len(captions) == n, len(labels) == n)
        halves = half_samples(n, made.period) if made.replicates and n >= 4 else ()  # a half needs 2 for its covariance
        found: list[Measurement] = []
        for name, module in scorer.modules.items():
            sample = self._sample(name, made, captions, labels, halves)
            scores = module.evaluate(sample, scorer.configs[name])
            for part, score in ({next(iter(module.parts)): scores} if isinstance(scores, Score) else scores).items():
                found.append(self._measurement(name, part, score, made))
                if score.each:
                    self.each[part] = score.each
        return tuple(found)

    def _sample(
        self, name: str, made: Made, captions: tuple[str, ...], labels: tuple[int, ...], halves: tuple[tuple[int, ...], ...]
    ) -> Sample:
        scorer, view, needs = self.scorer, self.scorer.views[name], self.scorer.modules[name].needs
        if view is None:
            return Sample(features=torch.zeros((0, 0)), rig=made.rig)
        features = view.features
        embedded = self._column(features.hash)
        classes = [row["caption"] for row in features.classes or ()]
        named = scorer.encode(features, classes) if classes and needs & {"labels", "probabilities"} else None
        return Sample(
            features=embedded,
            reference=view.reference,
            text=scorer.encode(features, captions) if "captions" in needs else None,
            classes=named,
            probabilities=features.probabilities(embedded, named) if "probabilities" in needs else None,
            captions=captions,
            labels=labels,
            period=made.period,
            halves=halves,
            base=self._base(features) if "base" in needs else None,
            rig=made.rig,
        )

    def _base(self, features: Features) -> Base:
        latents = all("latent_squared_error" in seen for seen in self.seen)
        return Base(
            features=self._column(f"base {features.hash}"),
            ssim=self._column("ssim"),
            squared_error=self._column("squared_error"),
            latent_squared_error=self._column("latent_squared_error") if latents else None,
        )

    def _digest(self, features: Features) -> str:
        """Of the images, as far as these features tell them apart."""
        if features.hash not in self._digests:
            content = self._column(features.hash).contiguous().numpy().tobytes()
            self._digests[features.hash] = hashlib.sha256(content).hexdigest()[:16]
        return self._digests[features.hash]

    def _column(self, key: str) -> Tensor:
        return torch.cat([seen[key] for seen in self.seen])

    def _measurement(self, name: str, part: str, score: Score, made: Made) -> Measurement:
        scorer, module, view = self.scorer, self.scorer.modules[name], self.scorer.views[name]
        painted = bool(module.needs & PAINTED)
        kind = module.parts[part.partition("@")[0]]
        features = view.features if view is not None and "features" in module.needs and kind.featured else None
        return Measurement(
            metric=part,
            value=score.value,
            unit=kind.unit,
            direction=kind.direction,
            features=features.name if features else None,
            reference=scorer._reference_hash(name),
            resize=features.resize if features else None,
            n=len(self) if score.n is None else score.n,
            prompts=made.prompts_hash if painted else None,
            seeds=made.seeds if painted else None,
            replicates=score.replicates,
            exact=score.exact,
            seen=self._digest(view.features) if view is not None and painted else None,
            settings=scorer.configs[name].model_dump(mode="json", exclude_defaults=True),
            conditions={**score.conditions, "base": made.base} if "base" in module.needs else score.conditions,
            versions=_versions(features),
            device=made.device,
            dtype=made.dtype,
        )


def _fits(name: str, needs: frozenset[str], view: View | None) -> None:
    """UserError where the view does not show what a metric needs."""
    assert view is not None  # whoever builds a Scorer gives one to every metric that looks at images
    features, reference = view.features, view.reference
    if needs & {"reference", "kept"}:
        if reference is None:
            raise UserError(f"{name} needs reference images: give a folder, a zip or a statistics file.")
        reference.check(features)
        if "kept" in needs:
            reference.need_kept(name)
    if "text" in needs and not features.has_text:
        raise UserError(
            f"{name} compares images with text, which {features.name} cannot read. "
            f"Give it features with a text tower, e.g. --features {name}=clip:ViT-B-32/openai."
        )
    if "labels" in needs and not features.classes:
        raise UserError(f"{name} needs features that know the classes; {features.name} has no classes.json.")
    if "probabilities" in needs and not features.has_probabilities:
        raise UserError(f"{name} needs features that classify images, such as inception; {features.name} does not.")


def _config(name: str, module: ModuleType, settings: Mapping[str, Any]) -> Any:
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
