"""What a metric sees of a set of generated images, and what it answers. This module must import without torch.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.candidate import SamplingPlan
    from ..core.cost import Costs
    from ._statistics import Statistics

Halves = tuple[tuple[int, ...], ...]
# What a metric may ask for in its `needs`. kept: features of single reference images. base: the same seeds painted by the uncut
# model. rig: the pipeline itself, to be timed or counted.
NEEDS = frozenset({"features", "reference", "kept", "text", "captions", "labels", "probabilities", "base", "rig"})


@dataclass(frozen=True)
class Part:
    """One of the numbers that a metric gives: which way is better, and its unit."""

    direction: Literal["lower", "higher"]
    unit: str = ""
    featured: bool = True  # whether it depends on the features, of a metric that needs some


@dataclass(frozen=True)
class Base:
    """The images of the uncut model on the same seeds, and how far the sample's own are from them: one number an image."""

    features: Tensor  # (N, D) float32, of the same extractor
    ssim: Tensor  # (N,) float64
    squared_error: Tensor  # (N,) float64, mean over the pixels of one image in 0..1
    latent_squared_error: Tensor | None  # (N,) float64, mean over the final latent; None where latents differ in shape


@dataclass(frozen=True)
class Rig:
    """The pipeline, ready to run as the images were made."""

    plan: SamplingPlan | None
    evaluations: int  # of the denoiser in a run: solver steps, more where the solver evaluates twice in a step
    params: int  # numbers in the parameters of all denoisers
    device: str
    costs: Callable[[], Costs]  # of one step of one image
    call: Callable[[int], Callable[[], None]]  # for a batch size: one run of the pipeline, over when the device has finished
    weights: Callable[[], Iterable[Tensor]]  # of all components
    compiled: Callable[[], AbstractContextManager[None]]  # in it, the denoiser is compiled
    conditions: dict[str, str] = field(default_factory=dict)  # device, dtype, threads: what a time depends on


@dataclass(frozen=True)
class Sample:
    """N images as their features; what a metric does not list in its `needs` may be absent."""

    features: Tensor  # (N, D) float32 image embeddings, not normalised
    reference: Statistics | None = None  # with `kept` in needs: its features (K, D), K >= 2
    text: Tensor | None = None  # (N, D) float32 embedding of each image's caption, not normalised
    classes: Tensor | None = None  # (C, D) float32 embedding of each class's caption, not normalised
    probabilities: Tensor | None = None  # (N, C) float32: what a classifier says of each image
    captions: tuple[str, ...] = ()  # N of them
    labels: tuple[int, ...] = ()  # N of them, in 0..C-1
    period: int = 1  # after how many images the conditions repeat: images i and i + period show the same
    halves: Halves = ()  # index sets of core.measurement.half_samples(N); empty without replicates
    base: Base | None = None
    rig: Rig | None = None


@dataclass(frozen=True)
class Score:
    """A value, and its values over `Sample.halves`, in that order."""

    value: float
    replicates: tuple[float, ...] = ()
    each: tuple[float, ...] = ()  # one number per image, of metrics that are means over images
    exact: bool = False  # counted, not sampled: the interval is the value
    n: int | None = None  # what it was taken over, where that is not the images: repetitions of a timing
    conditions: dict[str, str] = field(default_factory=dict)


def mean_score(values: Tensor, halves: Halves) -> Score:
    """The mean of one number per image, values (N,), and its mean over every half-sample."""
    numbers = [float(v) for v in values.tolist()]
    return Score(_mean(numbers), tuple(_mean([numbers[i] for i in half]) for half in halves), tuple(numbers))


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
