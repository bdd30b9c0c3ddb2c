"""Gates: what is decided, by which interval, and what is refused."""

import random
import statistics
from pathlib import Path

import pytest
from lissom.core.candidate import Seeds
from lissom.core.errors import UserError
from lissom.core.gates import Check, Gate, check, incomparable, metrics_behind, metrics_known, overall, zero_tolerance
from lissom.core.measurement import Measurement, half_samples, images_needed
from lissom.core.recipe import parse, read_gates

RECIPE = "lissom: 1\nmodel: zoo:fashion\nstages:\n- {prune: laptop}\n"


def mean_of(values: list[float], **changes: object) -> Measurement:
    halves = tuple(statistics.fmean(values[i] for i in half) for half in half_samples(len(values)))
    fields = {
        "metric": "fid", "value": statistics.fmean(values), "direction": "lower", "n": len(values), "replicates": halves,
        "seeds": Seeds(role="report", base=0, count=len(values)), "features": "zoo:judge", "prompts": "p", "resize": "r",
        "reference": "f" * 64, "versions": {"features": "a", "evaluation": "1"},
    }  # fmt: skip
    return Measurement.model_validate(fields | changes)


def noise(n: int = 100, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(5, 1) for _ in range(n)]


def shifted(by: float, **changes: object) -> Measurement:
    """The same images, every one worse by about the same."""
    rng = random.Random(1)
    return mean_of([v + by + rng.gauss(0, 0.01) for v in noise()], **changes)


BASE = mean_of(noise())


@pytest.mark.parametrize(
    ("rule", "limit", "by", "verdict"),
    [
        ("max_increase", 0.5, 0.4, "PASS"), ("max_increase", 0.5, 0.6, "REGRESSION"), ("max_increase", 0.5, 0.5, "INCONCLUSIVE"),
        ("max_increase", 0.0, -1.0, "PASS"), ("max_decrease", 0.5, -0.4, "PASS"), ("max_decrease", 0.5, -0.6, "REGRESSION"),
        ("max_decrease", 0.0, 1.0, "PASS"), ("max_ratio", 1.1, 0.2, "PASS"), ("max_ratio", 1.1, 1.0, "REGRESSION"),
        ("min", 4.0, 0.0, "PASS"), ("min", 6.0, 0.0, "REGRESSION"), ("max", 6.0, 0.0, "PASS"), ("max", 4.0, 0.0, "REGRESSION"),
        ("max", 5.0, 0.0, "INCONCLUSIVE"), ("min", 5.0, 0.0, "INCONCLUSIVE"),
    ],
)  # fmt: skip
def test_each_rule_is_decided_by_its_interval(rule: str, limit: float, by: float, verdict: str) -> None:
    found = check("fid", rule, limit, BASE, shifted(by))  # type: ignore[arg-type]
    assert found.verdict == verdict, found.reason
    assert found.low is not None and found.high is not None and found.value is not None
    assert found.low <= found.value <= found.high
    inside = found.low <= limit <= found.high
    assert inside == (verdict == "INCONCLUSIVE")
    assert ("images would decide" in found.reason) == (found.images is not None) <= inside
    assert found.images is None or found.images > BASE.n


def test_equal_seeds_decide_what_other_seeds_cannot() -> None:
    worse = shifted(0.2)
    assert check("fid", "max_increase", 0.0, BASE, worse).verdict == "REGRESSION"
    others = worse.model_copy(update={"seeds": Seeds(role="report", base=1, count=100)})
    found = check("fid", "max_increase", 0.0, BASE, others)
    assert found.verdict == "INCONCLUSIVE" and found.low is not None and found.low < 0
    assert "about" in found.reason and "images would decide it" in found.reason


def test_a_model_against_itself_passes_at_zero_tolerance() -> None:
    assert check("fid", "max_increase", 0.0, BASE, BASE).verdict == "PASS"
    again = BASE.model_copy(
        update={"value": BASE.value * (1 + 1e-8), "replicates": tuple(r * (1 + 1e-8) for r in BASE.replicates)}
    )
    assert check("fid", "max_increase", 0.0, BASE, again).verdict == "PASS"  # another build's rounding is no regression


def test_counted_numbers_have_no_doubt() -> None:
    params = Measurement(metric="params", value=100, direction="lower", n=0, exact=True)
    fewer = params.model_copy(update={"value": 75.0})
    assert check("params", "max_ratio", 0.75, params, fewer).verdict == "PASS"
    assert check("params", "max_ratio", 0.74, params, fewer).verdict == "REGRESSION"
    large = params.model_copy(update={"value": 859_520_964.0})
    for rule, limit in (("max_increase", 0.0), ("max_ratio", 1.0)):  # one more is more: nothing was rounded
        more = large.model_copy(update={"value": 859_520_965.0})
        assert check("params", rule, limit, large, more).verdict == "REGRESSION"  # type: ignore[arg-type]
    assert check("params", "max", 75, None, fewer).verdict == "PASS"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": 50}, "images (100 against 50)"), ({"prompts": "q"}, "prompt list (p against q)"), ({"resize": "s"}, "resizing (r against s)"),
        ({"features": "inception"}, "features (zoo:judge against inception)"), ({"reference": "0" * 64}, "reference (ffffffffffff against 000000000000)"),
        ({"versions": {"features": "b", "evaluation": "1"}}, "weights of the features (a against b)"),
        ({"settings": {"k": 5}}, "settings of the metric (none against {'k': 5})"),
        ({"versions": {"features": "a", "evaluation": "2"}}, "version of the evaluation (1 against 2)"),
        ({"conditions": {"batch": "8"}}, "batch (none against 8)"),
    ],
)  # fmt: skip
def test_what_makes_two_values_incomparable_is_named(changes: dict[str, object], named: str) -> None:
    other = mean_of(noise(), **changes) if "n" not in changes else mean_of(noise()[:50])
    assert named in (incomparable(BASE, other) or "")
    found = check("fid", "max_increase", 9.0, BASE, other)
    assert found.verdict == "INCOMPARABLE" and named in found.reason and found.value is None
    assert (
        check("fid", "max", 9.0, BASE, other).verdict == "PASS"
    )  # a limit of the candidate alone asks nothing of the baseline


def test_other_seeds_devices_and_library_versions_are_no_reason() -> None:
    other = BASE.model_copy(update={"seeds": Seeds(role="report", base=7, count=100), "device": "cuda", "dtype": "float16"})
    assert incomparable(BASE, other) is None
    newer = BASE.model_copy(update={"versions": BASE.versions | {"torch": "9"}})
    assert incomparable(BASE, newer) is None


def test_what_was_not_measured_cannot_be_decided() -> None:
    found = check("kid", "max_increase", 0.0, None, None)
    assert found.verdict == "INCOMPARABLE" and "of the baseline and the candidate: add it to --metrics" in found.reason
    assert "of the candidate:" in check("kid", "min", 0.0, BASE, None).reason
    bare = BASE.model_copy(update={"replicates": ()})
    found = check("fid", "max_increase", 9.0, bare, BASE)
    assert found.verdict == "INCONCLUSIVE" and "too few images" in found.reason
    zero = BASE.model_copy(update={"value": 0.0})
    found = check("fid", "max_ratio", 1.0, zero, BASE)
    assert found.verdict == "INCONCLUSIVE" and found.value is None and "not both positive" in found.reason


def test_a_certain_regression_outweighs_what_cannot_be_told() -> None:
    def of(*verdicts: str) -> list[Check]:
        return [
            Check.model_validate({"metric": "fid", "label": "FD", "rule": "max", "limit": 1, "verdict": v, "reason": ""})
            for v in verdicts
        ]

    assert overall([]) == "PASS" and overall(of("PASS", "PASS")) == "PASS"
    assert overall(of("PASS", "INCONCLUSIVE")) == "INCONCLUSIVE"
    assert overall(of("INCONCLUSIVE", "INCOMPARABLE")) == "INCOMPARABLE"
    assert overall(of("INCOMPARABLE", "REGRESSION", "PASS")) == "REGRESSION"


def test_zero_tolerance_points_the_metrics_way() -> None:
    assert zero_tolerance(BASE) == Gate(max_increase=0)
    assert zero_tolerance(BASE.model_copy(update={"direction": "higher"})) == Gate(max_decrease=0)


def test_images_needed_is_the_textbook_number() -> None:
    """n = 2 (1.96 + 0.84)^2 sigma^2 / delta^2 = 15.7 for sigma = delta."""
    found = [images_needed(mean_of(noise(400, seed)), 1.0) for seed in range(20)]
    assert statistics.fmean(n for n in found if n) == pytest.approx(15.7, rel=0.15)
    assert images_needed(BASE.model_copy(update={"seeds": None}), 1.0) is None
    assert images_needed(BASE.model_copy(update={"replicates": ()}), 1.0) is None


def test_every_number_has_a_metric_and_gates_find_it() -> None:
    known = metrics_known()
    assert known["fid"] == "fid" and known["recall"] == "precision_recall" and known["latency_p90"] == "latency"
    gates = {"latency@8": Gate(max_ratio=1), "recall": Gate(max_decrease=0.1), "precision": Gate(min=0.5)}
    assert metrics_behind(gates) == ["latency", "precision_recall"]
    with pytest.raises(UserError, match="no metric 'recal'; .* Did you mean 'recall'"):
        metrics_behind({"recal": Gate(min=0)})


def test_a_gates_file_is_what_stands_under_gates_in_a_recipe(tmp_path: Path) -> None:
    text = "fid: {max_ratio: 1.3}\nparams: {max_ratio: 0.75}\n"
    (tmp_path / "gates.yaml").write_text(text)
    found = read_gates(tmp_path / "gates.yaml")
    indented = "".join(f"  {line}\n" for line in text.splitlines())
    assert (
        parse(f"{RECIPE}gates:\n{indented}", "r.yaml").gates
        == found
        == {"fid": Gate(max_ratio=1.3), "params": Gate(max_ratio=0.75)}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fdi: {max: 1}", r"gates.yaml:1: no metric 'fdi'; there are .*Did you mean 'fid'"),
        ("fid: {max: 1}\nkid:\n  max_increse: 2\n", r"gates.yaml:3: kid.max_increse: unknown key. Known here: max_increase, .*Did you mean 'max_increase'"),
        ("fid: {max_ratio: -1}", r"gates.yaml:1: fid.max_ratio: input should be greater than 0, got -1"),
        ("fid: {max_increase: a lot}", r"fid.max_increase: input should be a valid number"),
        ("fid: {}", r"at least one of max_increase"),
        ("fid: 3", r"gates.yaml:1: fid: "),
        ("gates: {fid: {max: 1}}", r"leave the key `gates:` out"),
        ("", r"gates are a mapping such as .*; this is empty"),
        ("{}", r"no gate in it"),
        ("fid: {max: 1}\nfid: {max: 2}", r"gates.yaml:2: 'fid' is given twice"),
        ("- fid", r"this is a list"),
        ("fid: {max: 1", r"not valid YAML"),
    ],
)  # fmt: skip
def test_a_gates_file_with_mistakes_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_gates(tmp_path / "gates.yaml")


def test_every_mistake_at_once_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("fdi: {max: 1}\nkid: {mx: 2}\n")
    with pytest.raises(UserError) as refused:
        read_gates(tmp_path / "gates.yaml")
    assert len(str(refused.value).splitlines()) >= 2
    with pytest.raises(UserError, match="none.yaml: cannot read the gates"):
        read_gates(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ("gates: {fdi: {max: 1}}", r"r.yaml:5: gates.fdi: no metric 'fdi'"),
        ("gates: {fid: {max_increse: 1}}", r"r.yaml:5: gates.fid.max_increse: unknown key. Known here: max_increase"),
        ("gates: {fid: {}}", r"r.yaml:5: gates.fid: a gate holds at least one of"),
    ],
)  # fmt: skip
def test_gates_in_a_recipe_are_checked_when_it_is_read(gates: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(RECIPE + gates, "r.yaml")


def test_features_and_references_of_single_metrics() -> None:
    evaluate = "evaluate: {metrics: [fid, clip_score], features: {default: inception, clip_score: 'zoo:judge'}}\n"
    assert parse(RECIPE + evaluate, "r.yaml").evaluate.features == {"default": "inception", "clip_score": "zoo:judge"}
    with pytest.raises(UserError, match=r"features.kid: neither default nor one of the metrics \(fid, clip_score\)"):
        parse(RECIPE + "evaluate: {features: {kid: inception}}\n", "r.yaml")


@pytest.mark.parametrize("n", [8, 16, 32])
def test_a_handful_of_images_proves_no_share(n: int) -> None:
    perfect = mean_of([1.0] * n, metric="accuracy", unit="share", direction="higher")
    assert check("accuracy", "min", 0.95, None, perfect).verdict == "INCONCLUSIVE"
    assert check("accuracy", "min", 0.6, None, perfect).verdict == "PASS"
