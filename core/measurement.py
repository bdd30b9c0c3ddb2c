"""A number with everything that makes it comparable, and the trials that hold them."""

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from .candidate import Data, Request, Seeds
from .intervals import PAIRS, UNSEEN, Interval, mover, spread, t_95, wilson

REPLICATES = (
    2 * PAIRS
)  # half-samples behind an interval, in 20 pairs; the standard error is known to about 1 / sqrt(2 * 20) = 16 %
Z_POWER = 2.8016  # z_0.975 + z_0.8 of the normal distribution: a 95 % interval and a power of 80 %
# What a distance is called with Inception's features, and with any others: only the first are comparable with papers.
INCEPTIONS = {"fid": "FID", "fid_infinity": "FID∞", "kid": "KID"}
OTHERS = {"fid": "FD", "fid_infinity": "FD∞", "kid": "KD"}
SHARE = "share"  # the unit of what a count of images is divided by their number


class Measurement(Data):
    """One metric of one (model, plan) on given seeds.

    `replicates` are the values over fixed half-samples of the seed list (`half_samples`). Half-sampling is the
    delete-d jackknife with d = n/2 (Shao and Wu 1989): the spread of the replicates around their own mean estimates
    the standard error of `value`. Their mean is not used: a Frechet distance over n/2 images is biased upward.
    """

    metric: str  # fid, clip_score, accuracy, …: a file in evaluate/, or a part of what it measures (recall, latency_p90, …)
    value: float
    unit: str = ""
    direction: Literal["lower", "higher"]  # which way is better
    features: str | None = None  # zoo:judge, inception, clip:ViT-B-32/openai, ...
    reference: str | None = None  # hash of the reference statistics
    resize: str | None = None
    n: int  # images
    prompts: str | None = None  # hash of the conditions
    seeds: Seeds | None = None
    replicates: tuple[float, ...] = ()
    exact: bool = False  # counted, not sampled: parameters, MACs
    settings: dict[str, Any] = Field(default_factory=dict)  # of the metric, where they are not its defaults
    conditions: dict[str, str] = Field(default_factory=dict)  # of what depends on the machine: batch, threads, graphics card, …
    seen: str | None = None  # digest of the images' features: equal ones are equal images
    versions: dict[str, str] = Field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """The name to print, with the features behind it: no two models' values compare. FID and KID alone are Inception's."""
        if self.features == "inception" and self.metric in INCEPTIONS:
            return INCEPTIONS[self.metric]
        name = OTHERS.get(self.metric, self.metric)
        return f"{name}[{self.features}]" if self.features else name

    @property
    def standard_error(self) -> float | None:
        return 0.0 if self.exact else spread(self.replicates)

    def interval(self) -> Interval | None:
        """95 % interval of the value, or None without replicates. That of a share is never narrower than Wilson's."""
        error = self.standard_error
        if error is None:
            return None
        low, high = self.value - t_95(self.n) * error, self.value + t_95(self.n) * error
        if self.unit != SHARE or self.exact or not 0 <= self.value <= 1:
            return low, high
        least, most = wilson(self.value, self.n)  # of 8 right out of 8, half-samples show no spread at all
        return max(0.0, min(low, least)), min(1.0, max(high, most))

    def better(self, other: "Measurement") -> bool:
        return self.value < other.value if self.direction == "lower" else self.value > other.value


class Trial(Data):
    """One scored request."""

    number: int
    request: Request
    state: Literal["complete", "failed"] = "complete"
    measurements: tuple[Measurement, ...] = ()
    error: str | None = None
    calls: int = 0  # denoiser calls executed for it
    plain_calls: int = 0  # denoiser calls without shared prefixes
    seconds: float = 0.0

    def measured(self, metric: str) -> Measurement | None:
        return next((m for m in self.measurements if m.metric == metric), None)

    def value(self, metric: str) -> float:
        """A metric or a cost of the request, to minimise; infinite for a failed trial, so that every method survives failures."""
        found = self.measured(metric)
        if found is None:
            return self.request.costs.get(metric, math.inf) if self.state == "complete" else math.inf
        return found.value if found.direction == "lower" else -found.value


def half_samples(n: int, period: int = 1) -> tuple[tuple[int, ...], ...]:
    """REPLICATES index sets of size about n / 2: complementary halves of fixed shuffles, a function of n and period alone.

    period: after how many images the conditions repeat (10 for ten classes in turn). Every half then holds half of each
    condition's images: unstratified halves would count the chance of an uneven mix, which balanced seed blocks never have.

    >>> halves = half_samples(12, period=3)
    >>> len(halves), sorted(halves[0] + halves[1]) == list(range(12)), sum(i % 3 == 0 for i in halves[0])
    (40, True, 2)
    """
    rng, halves = random.Random(n), []
    strata = [range(start, n, period) for start in range(period)] if 2 * period <= n else [range(n)]
    for _ in range(REPLICATES // 2):
        one: list[int] = []
        two: list[int] = []
        for number, stratum in enumerate(strata):
            order = list(stratum)
            rng.shuffle(order)
            middle = (len(order) + number % 2) // 2  # strata of odd size give their odd one to either half in turn
            one += order[:middle]
            two += order[middle:]
        halves += [tuple(sorted(one)), tuple(sorted(two))]
    return tuple(halves)


def ratio(a: Measurement, b: Measurement) -> tuple[float, Interval | None]:
    """a / b with its 95 % interval, paired by half-sample when both used the same seeds, unpaired (wider) otherwise.

    The spread is that of the replicates relative to the full values, by the delta method on log(a / b). The replicates' own
    ratios would be too even: a Frechet distance over half the images is larger by its bias, above and below the line.
    """
    if b.value == 0:
        return (1.0 if a.value == 0 else math.copysign(math.inf, a.value)), None
    value = a.value / b.value
    if not _known(a, b) or a.value <= 0 or b.value <= 0:
        return value, None
    if _shares(a, b) and not paired(a, b):
        low, high = _logs(a), _logs(b)
        if low is None or high is None:
            return value, None
        logs = mover(math.log(a.value), low, math.log(b.value), high)
        return value, (math.exp(logs[0]), math.exp(logs[1]))
    error = _paired([x / a.value for x in a.replicates], [x / b.value for x in b.replicates], paired(a, b))
    half = max(t_95(min(a.n, b.n)) * error, _doubt(a, b) / min(a.value, b.value))
    return value, (value * math.exp(-half), value * math.exp(half))


def difference(a: Measurement, b: Measurement) -> tuple[float, Interval | None]:
    """a - b with its 95 % interval, paired as in `ratio`."""
    value, within_a, within_b = a.value - b.value, a.interval(), b.interval()
    if within_a is None or within_b is None:
        return value, None
    if _shares(a, b) and not paired(a, b):
        return value, mover(a.value, within_a, b.value, within_b)
    half = max(t_95(min(a.n, b.n)) * _paired(a.replicates, b.replicates, paired(a, b)), _doubt(a, b))
    return value, (value - half, value + half)


def _known(a: Measurement, b: Measurement) -> bool:
    """Whether both spreads are known: with only one of them, an interval would be too narrow."""
    return a.standard_error is not None and b.standard_error is not None


def _shares(a: Measurement, b: Measurement) -> bool:
    return a.unit == b.unit == SHARE and not a.exact and max(a.value, b.value) <= 1


def _logs(m: Measurement) -> Interval | None:
    """The interval of the logarithm, or None where it reaches 0."""
    within = m.interval()
    return (math.log(within[0]), math.log(within[1])) if within is not None and within[0] > 0 else None


def _doubt(a: Measurement, b: Measurement) -> float:
    """How far two shares of the same seeds may be apart at least: images that came out alike in n tries might not in the next.

    Of the same images there is no doubt.
    """
    same = a.seen is not None and a.seen == b.seen
    return 0.0 if same or not _shares(a, b) else UNSEEN / min(a.n, b.n)


def images_needed(measured: Measurement, difference: float) -> int | None:
    """Images on each side that show a difference of this size, where the two sides have other seeds. None without an interval.

    The textbook n = 2 (z_0.975 + z_0.8)^2 s^2 / difference^2 with s^2 / n the squared standard error: a 95 % interval that leaves
    out zero four times in five. On the same seeds fewer do, as far as the two sets of images agree.
    """
    error = measured.standard_error
    if error is None or measured.seeds is None or difference <= 0:
        return None
    return max(4, math.ceil(measured.n * 2 * (Z_POWER * error / difference) ** 2))


def paired(a: Measurement, b: Measurement) -> bool:
    """Whether both are of the same seeds and conditions, so that their half-samples hold the same images."""
    return a.seeds is not None and (a.seeds, a.n, a.prompts) == (b.seeds, b.n, b.prompts)


def _paired(a: Sequence[float], b: Sequence[float], same_seeds: bool) -> float:
    if same_seeds and len(a) == len(b):
        return spread([x - y for x, y in zip(a, b, strict=True)]) or 0.0
    return math.hypot(spread(a) or 0.0, spread(b) or 0.0)
