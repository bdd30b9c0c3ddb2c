"""Each metric by hand, and what the Scorer records and refuses."""

import dataclasses
import statistics as stdlib
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from lissom.core import methods
from lissom.core.candidate import Seeds
from lissom.core.errors import UserError
from lissom.core.measurement import Measurement, half_samples
from lissom.evaluate import _frechet, accuracy, clip_score, fid
from lissom.evaluate._extractor import Features
from lissom.evaluate._sample import NEEDS, Sample, mean_score
from lissom.evaluate._scorer import Made, Scorer, Shown, View
from lissom.evaluate._statistics import Statistics, of
from lissom.tests.evaluate.judge import Means, Words, images
from torch import Tensor
from torch.nn.functional import normalize

ALL = ("fid", "clip_score", "accuracy")


def reference(features: Features, seed: int = 1) -> Statistics:
    return of(features, [images(60, seed=seed)], "reference")


def score(
    scorer: Scorer, pixels: Tensor, captions: Sequence[str | None] = (), labels: Sequence[int | None] = (), batch: int = 64
) -> dict[str, Measurement]:
    n, collector = len(pixels), scorer.collect()
    captions, labels = captions or [None] * n, labels or [None] * n
    for i in range(0, n, batch):
        collector.add(Shown(pixels[i : i + batch]), captions[i : i + batch], labels[i : i + batch])
    return {m.metric: m for m in collector.finish(made(n))}


def made(n: int, **changes: object) -> Made:
    seeds = Seeds(role="search", base=0, count=n)
    return dataclasses.replace(Made(seeds, "p" * 64, "cpu", "float32"), **changes)  # type: ignore[arg-type]


def scorer_of(metrics: Sequence[str], features: Features, target: Statistics | None, **settings: object) -> Scorer:
    """Every metric by the same view."""
    return Scorer(dict.fromkeys(metrics, View(features, target)), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", methods.names("evaluate"))
def test_every_metric_keeps_the_contract(name: str) -> None:
    module = methods.load("evaluate", name)
    assert module.parts and module.__doc__ and all("." not in part and "@" not in part for part in module.parts)
    assert all(part.direction in ("lower", "higher") for part in module.parts.values())
    assert module.needs and module.needs <= NEEDS
    assert module.Config.paper.startswith("https://") or module.needs == {"rig"}  # a count and a clock have no paper
    assert module.Config.model_config["frozen"] and module.Config.model_config["extra"] == "forbid"


def test_fid_and_its_replicates() -> None:
    target = reference(Means())
    x = Means().extract(images(50))
    halves = half_samples(50)
    found = fid.evaluate(Sample(features=x, reference=target, halves=halves), fid.Config())
    expected = _frechet.between(x.double().mean(0), _frechet.root(torch.cov(x.double().T)), target.mean, target.root)
    assert found.value == pytest.approx(expected, rel=1e-9)
    part = x[list(halves[3])]
    again = fid.evaluate(Sample(features=part, reference=target), fid.Config())
    assert found.replicates[3] == pytest.approx(again.value, rel=1e-9) and again.replicates == ()
    with pytest.raises(UserError, match="fid needs at least 2 images, got 1"):
        fid.evaluate(Sample(features=x[:1], reference=target), fid.Config())


def test_clip_score_is_the_mean_cosine_in_open_clip(judge: Features) -> None:
    pixels, captions = images(9, size=32), ["a bag", "a shoe", "a shirt"] * 3
    model = judge._model  # type: ignore[attr-defined]
    with torch.no_grad():
        image = model.encode_image(pixels.permute(0, 3, 1, 2) / 127.5 - 1, normalize=True)
        text = model.encode_text(judge._tokens(captions), normalize=True)  # type: ignore[attr-defined]
    found = score(scorer_of(["clip_score"], judge, None), pixels, captions)["clip_score"]
    assert found.value == pytest.approx((image * text).sum(1).mean().item(), abs=1e-6)
    assert (found.unit, found.direction, found.features, found.reference) == ("cosine", "higher", judge.name, None)


def test_clip_score_by_hand() -> None:
    x, t = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[10.0, 0.0], [0.0, -2.0]])
    assert clip_score.evaluate(Sample(features=x, text=t), clip_score.Config()).value == pytest.approx((0.6 + 0) / 2)


def test_accuracy_by_hand() -> None:
    x = torch.tensor([[9.0, 1.0], [0.2, 0.1], [1.0, 5.0], [-1.0, -2.0]])  # nearest classes 0, 0, 1, 0
    sample = Sample(features=x, classes=torch.tensor([[1.0, 0.0], [0.0, 7.0]]), labels=(0, 1, 1, 0), halves=((0, 1), (2, 3)))
    found = accuracy.evaluate(sample, accuracy.Config())
    assert found.value == 0.75 and found.replicates == (0.5, 1.0)
    assert accuracy.evaluate(Sample(x, classes=torch.eye(2), labels=(0, 0, 1, 0)), accuracy.Config()).value == 1.0
    with pytest.raises(UserError, match="label 2 has no class, the features know classes 0 to 1"):
        accuracy.evaluate(Sample(x, classes=torch.eye(2), labels=(0, 2, 1, 0)), accuracy.Config())


def test_half_samples_estimate_the_standard_error_of_a_mean() -> None:  # s / sqrt(n), which is known
    ratios = []
    for seed in range(40):
        values = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = mean_score(values, half_samples(200))
        m = Measurement(metric="x", value=found.value, direction="lower", n=200, replicates=found.replicates)
        assert m.standard_error is not None
        ratios.append(m.standard_error / (values.std().item() / 200**0.5))
    assert stdlib.mean(ratios) == pytest.approx(1.0, abs=0.05)  # each is good to about 16 %, 20 pairs of halves being mirrored


def test_scorer_in_one_go_and_in_batches() -> None:
    extractor, pixels = Words(), images(30)
    captions, labels = ["rg", "b", "gx"] * 10, [0, 2, 1] * 10
    scorer = scorer_of(ALL, extractor, reference(extractor))
    whole, parts = (score(scorer, pixels, captions, labels, batch) for batch in (30, 7))
    assert list(whole) == list(ALL)
    for name in ALL:
        assert whole[name].value == pytest.approx(parts[name].value, rel=1e-5)
        assert len(whole[name].replicates) == 40
    x = extractor.extract(pixels)
    cosines = (normalize(x) * normalize(extractor.encode_text(captions))).sum(1)
    assert whole["clip_score"].value == pytest.approx(cosines.mean().item(), rel=1e-5)
    nearest = (normalize(x) @ normalize(extractor.encode_text(["r", "g", "b"])).T).argmax(1)
    assert whole["accuracy"].value == (nearest == torch.tensor(labels)).double().mean().item()


def test_what_a_measurement_carries() -> None:
    extractor = Words()
    target = reference(extractor)
    found = score(scorer_of(ALL, extractor, target), images(8), ["r"] * 8, [0] * 8)
    m = found["fid"]
    assert (m.label, m.reference, m.resize, m.n, m.prompts) == ("FD[means]", target.hash, "clean-bicubic-8", 8, "p" * 64)
    assert m.seeds == Seeds(role="search", base=0, count=8) and m.versions["features"] == extractor.hash[:16]
    assert found["accuracy"].reference is None and found["accuracy"].unit == "share"
    assert Measurement.model_validate_json(m.canonical()) == m


def test_replicates_can_be_left_out_and_need_four_images() -> None:
    scorer = scorer_of(["fid"], Means(), reference(Means()))
    assert score(scorer, images(3))["fid"].replicates == ()
    collector = scorer.collect()
    collector.add(Shown(images(8)), [None] * 8, [None] * 8)
    (m,) = collector.finish(made(8, replicates=False, device="cuda", dtype="float16"))
    assert m.replicates == () and (m.device, m.dtype) == ("cuda", "float16")


def test_id_changes_with_all_that_makes_values_comparable() -> None:
    extractor = Words()
    target = reference(extractor)
    other = Words()
    other.hash = "0" * 64
    ids = [
        scorer_of(metrics, features, given).id
        for metrics, features, given in [
            (ALL, extractor, target),
            (["fid"], extractor, target),
            (["fid"], extractor, reference(extractor, seed=2)),
            (["clip_score"], extractor, target),
            (["clip_score"], other, None),
        ]
    ]
    assert len(set(ids)) == 5 and len(ids[0]) == 64
    assert scorer_of(ALL, Words(), target).id == ids[0]
    assert scorer_of(["clip_score"], extractor, None).id == ids[3]  # a reference that no metric reads does not count
    assert all(a != b for a, b in pairwise(ids))


def test_every_text_is_encoded_once() -> None:
    asked: list[str] = []

    class Counted(Words):
        def encode_text(self, texts: list[str]) -> Tensor:
            asked.extend(texts)
            return super().encode_text(texts)

    scorer = scorer_of(["clip_score", "accuracy"], Counted(), None)
    for _ in range(3):
        score(scorer, images(8), ["r", "gg"] * 4, [0] * 8)
    assert sorted(asked) == ["b", "g", "gg", "r"]


def test_what_is_missing_is_said_before_any_work() -> None:
    words, means = Words(), Means()
    with pytest.raises(UserError, match=r"fid needs reference images: give a folder"):
        scorer_of(["fid"], means, None)
    with pytest.raises(UserError, match="clip_score compares images with text, which means cannot read"):
        scorer_of(["clip_score"], means, None)
    words.classes = None
    with pytest.raises(UserError, match="accuracy needs features that know the classes; means has no classes.json"):
        scorer_of(["accuracy"], words, None)
    scorer = scorer_of(["clip_score", "accuracy"], Words(), None)
    with pytest.raises(UserError, match="clip_score needs a caption for every image"):
        scorer.check(has_captions=False, has_labels=True)
    with pytest.raises(UserError, match="accuracy needs a label for every image"):
        scorer.check(has_captions=True, has_labels=False)
    scorer.check(has_captions=True, has_labels=True)
    with pytest.raises(UserError, match="needs a caption"):
        score(scorer, images(2), ["r", None], [0, 1])


def test_wrong_metrics_settings_and_references() -> None:
    target = reference(Means())
    with pytest.raises(UserError, match=r"no method 'fdi' in evaluate/; .*Did you mean 'fid'"):
        scorer_of(["fdi"], Means(), target)
    with pytest.raises(UserError, match="no metric to evaluate; there are accuracy, clip_score"):
        scorer_of([], Means(), target)
    with pytest.raises(UserError, match=r"settings of fid: wings: Extra inputs are not permitted, got 2"):
        scorer_of(["fid"], Means(), target, settings={"fid": {"wings": 2}})
    with pytest.raises(UserError, match="settings for 'kid', which is not among the metrics fid"):
        scorer_of(["fid"], Means(), target, settings={"kid": {}})
    other = Means()
    other.name = "others"
    with pytest.raises(UserError, match="reference: made by means .* with others"):
        scorer_of(["fid"], other, target)


def test_nan_features_are_said() -> None:
    class Broken(Means):
        def forward(self, batch: Tensor) -> Tensor:
            return super().forward(batch) * torch.tensor([1, 1, 1, float("nan")])

    scorer = scorer_of(["fid"], Broken(), reference(Means()))
    with pytest.raises(UserError, match="means: features of 3 of 3 images are not finite"):
        scorer.collect().add(Shown(images(3)), [None] * 3, [None] * 3)


def test_misuse_is_an_internal_error() -> None:
    collector = scorer_of(["fid"], Means(), reference(Means())).collect()
    with pytest.raises(ValueError, match="3 images, 2 captions and 3 labels"):
        collector.add(Shown(images(3)), [None] * 2, [None] * 3)
    collector.add(Shown(images(3)), [None] * 3, [None] * 3)
    with pytest.raises(ValueError, match="3 images for 4 seeds"):
        collector.finish(made(4))


def test_metric_configs_import_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lissom.core import methods; [methods.load('evaluate', n) for n in methods.names('evaluate')]; "
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
