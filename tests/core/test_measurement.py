"""Half-samples and the intervals that are made from them, against closed forms and simulation."""

import math
import random
import statistics

import pytest
from lissom.core.candidate import Candidate, Request, Seeds
from lissom.core.intervals import T_95, mover, t_95, wilson
from lissom.core.measurement import REPLICATES, Measurement, Trial, difference, half_samples, ratio


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
    assert scipy.t.ppf(0.975, range(1, 21)) == pytest.approx(T_95, abs=1e-5)
    assert (t_95(4), t_95(21), t_95(10**6)) == (T_95[2], T_95[19], T_95[19])  # few values know less than 20 pairs of halves


def test_wilson_is_scipys_and_newcombes_example() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for k, n in ((0, 8), (8, 8), (3, 10), (820, 1024)):
        found = scipy.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k / n, n) == pytest.approx((found.low, found.high), abs=1e-6)
    one, two = 56 / 70, 48 / 80  # Newcombe 1998, table II (a): 0.0524 to 0.3339
    assert mover(one, wilson(one, 70), two, wilson(two, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


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


def share_of(flags: list[bool], **changes: object) -> Measurement:
    return mean_of([float(f) for f in flags], metric="accuracy", unit="share", direction="higher", **changes)


def test_a_share_of_few_images_is_never_certain() -> None:
    """Of 8 right out of 8 no half-sample shows any spread."""
    all_right = share_of([True] * 8)
    assert all_right.standard_error == 0 and all_right.interval() == pytest.approx(wilson(1.0, 8))
    none = share_of([False] * 8, seeds=Seeds(role="report", base=1, count=8))
    other = none.model_copy(update={"seeds": Seeds(role="report", base=2, count=8)})
    gap, interval = difference(none, other)
    assert gap == 0 and interval is not None and interval[0] < -0.3 and interval[1] > 0.3
    _, paired = difference(all_right, all_right)  # images that came out alike in 8 tries might not in the next
    assert paired is not None and paired[1] == pytest.approx(-math.log(0.025) / 8)
    same = all_right.model_copy(update={"seen": "a"})
    assert difference(same, same) == (0.0, (0.0, 0.0)) and ratio(same, same) == (1.0, (1.0, 1.0))  # equal images leave no doubt
    assert ratio(none, other)[1] is None


@pytest.mark.parametrize(("n", "truth"), [(8, 0.9), (16, 0.97), (64, 0.99), (64, 0.5)])
def test_intervals_of_shares_hold_the_truth(n: int, truth: float) -> None:
    rng, held, apart = random.Random(n), 0, 0
    for _ in range(400):
        one, two = (
            share_of([rng.random() < truth for _ in range(n)], seeds=Seeds(role="report", base=b, count=n)) for b in (0, 1)
        )
        low, high = one.interval() or (2, 2)
        held += low <= truth <= high
        _, interval = difference(one, two)
        assert interval is not None
        apart += interval[0] <= 0 <= interval[1]
    assert held / 400 >= 0.93 and apart / 400 >= 0.93
