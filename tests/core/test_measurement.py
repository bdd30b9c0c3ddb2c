"""Half-samples and the intervals that are made from them, against closed forms and simulation."""

import math
import random
import statistics

import pytest
from lissom.core.candidate import Candidate, Request, Seeds
from lissom.core.measurement import REPLICATES, T_95, Measurement, Trial, difference, half_samples, ratio


def measured(value: float, replicates: tuple[float, ...] = (), **changes: object) -> Measurement:
    seeds = Seeds(role="report", base=0, count=8)
    fields = {"metric": "fid", "value": value, "direction": "lower", "n": 8, "seeds": seeds, "replicates": replicates}
    return Measurement.model_validate(fields | changes)


def mean_of(values: list[float], **changes: object) -> Measurement:
    """A metric whose standard error is known: the mean of independent values."""
    halves = tuple(statistics.fmean(values[i] for i in half) for half in half_samples(len(values)))
    return measured(statistics.fmean(values), halves, n=len(values), **changes)


@pytest.mark.parametrize(("n", "period"), [(4, 1), (7, 1), (64, 10), (65, 10), (12, 3), (15, 10)])
def test_halves_are_complementary_balanced_and_fixed(n: int, period: int) -> None:
    halves = half_samples(n, period)
    assert len(halves) == REPLICATES and halves == half_samples(n, period)
    for one, two in zip(halves[::2], halves[1::2], strict=True):
        assert sorted(one + two) == list(range(n)) and abs(len(one) - len(two)) <= 1
        if 2 * period <= n:
            for condition in range(period):
                shares = [sum(i % period == condition for i in half) for half in (one, two)]
                assert abs(shares[0] - shares[1]) <= 1
    assert len(set(halves)) > REPLICATES // 2 or n < 8


def test_the_quantile_is_that_of_student() -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert scipy.t.ppf(0.975, REPLICATES / 2) == pytest.approx(T_95, abs=1e-5)


def test_the_standard_error_of_a_mean_is_sigma_over_root_n() -> None:
    """(1 - 1/2) sigma^2 / (n/2) = sigma^2 / n: half-samples without replacement give it exactly, on average."""
    rng, n = random.Random(0), 200
    ratios = [e * math.sqrt(n) for _ in range(40) if (e := mean_of([rng.gauss(5, 1) for _ in range(n)]).standard_error)]
    assert statistics.fmean(ratios) == pytest.approx(1, abs=0.05)


def test_the_interval_holds_the_truth_19_times_in_20() -> None:
    rng, hits = random.Random(1), 0
    for _ in range(300):
        interval = mean_of([rng.gauss(5, 1) for _ in range(60)]).interval()
        assert interval is not None
        hits += interval[0] <= 5 <= interval[1]
    assert 0.90 <= hits / 300 <= 0.99


def test_the_same_seeds_make_differences_sharp_and_other_seeds_do_not() -> None:
    rng = random.Random(2)
    noise = [rng.gauss(0, 1) for _ in range(100)]
    a, b = mean_of([5 + x for x in noise]), mean_of([4 + x for x in noise])
    value, interval = difference(a, b)
    assert value == pytest.approx(1) and interval is not None and interval[1] - interval[0] < 1e-9
    for other in (b.model_copy(update={"seeds": Seeds(role="report", base=1, count=8)}), b.model_copy(update={"prompts": "x"})):
        _, wide = difference(a, other)
        assert wide is not None and wide[1] - wide[0] > 0.4
    quotient, paired = ratio(a, b)
    assert quotient == pytest.approx(a.value / b.value) and paired is not None and paired[0] < quotient < paired[1]


def test_a_plan_against_itself_is_exactly_one() -> None:
    a = mean_of([random.Random(3).gauss(5, 1) for _ in range(50)])
    assert ratio(a, a) == (1.0, (1.0, 1.0)) and difference(a, a) == (0.0, (0.0, 0.0))


def test_no_interval_where_one_of_the_spreads_is_unknown() -> None:
    known, bare, single = mean_of([1.0, 2.0, 3.0, 4.0]), measured(2.0), measured(2.0, (2.0,))
    for other in (bare, single):
        for pair in ((known, other), (other, known)):
            assert ratio(*pair)[1] is None and difference(*pair)[1] is None
    assert bare.interval() is None and ratio(measured(-1.0, (1.0, -1.0)), known)[1] is None


def test_fid_is_kept_for_inception() -> None:
    assert measured(1.0, features="inception").label == "FID"
    assert measured(1.0, features="zoo:judge").label == "FD[zoo:judge]"
    assert measured(1.0, metric="clip_score", features="zoo:judge").label == "clip_score[zoo:judge]"


def test_a_cost_points_down_and_better_points_the_metrics_way() -> None:
    high = measured(0.9, metric="accuracy", direction="higher")
    low = high.model_copy(update={"value": 0.5})
    assert high.better(low) and measured(1.0).better(measured(2.0))
    request = Request(candidate=Candidate(), seeds=Seeds(role="search", base=0, count=8))
    trial = Trial(number=0, request=request, measurements=(high,))
    assert trial.value("accuracy") == -0.9 and trial.value("fid") == math.inf
