"""What a metric sees of a set of generated images, and what it answers. This module must import without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ._statistics import Statistics


@dataclass(frozen=True)
class Sample:
    """N images as their features; what a metric does not list in its `needs` may be absent."""

    features: Tensor  # (N, D) float32 image embeddings, not normalised
    reference: Statistics | None = None
    text: Tensor | None = None  # (N, D) float32 embedding of each image's caption, not normalised
    classes: Tensor | None = None  # (C, D) float32 embedding of each class's caption, not normalised
    captions: tuple[str, ...] = ()  # N of them
    labels: tuple[int, ...] = ()  # N of them, in 0..C-1
    halves: tuple[tuple[int, ...], ...] = ()  # index sets of core.measurement.half_samples(N); empty without replicates


@dataclass(frozen=True)
class Score:
    """A metric's value, and its values over `Sample.halves`, in that order."""

    value: float
    replicates: tuple[float, ...] = ()


def mean_score(values: Tensor, halves: tuple[tuple[int, ...], ...]) -> Score:
    """The mean of one number per image, values (N,), and its mean over every half-sample."""
    numbers = [float(v) for v in values.tolist()]
    return Score(_mean(numbers), tuple(_mean([numbers[i] for i in half]) for half in halves))


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
