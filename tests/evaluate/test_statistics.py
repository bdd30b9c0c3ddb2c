"""One pass in numpy is the truth; streaming, merging and files must not move it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate._statistics import KEY, Provenance, Statistics, of
from lissom.tests.evaluate.judge import Means, images
from safetensors import safe_open
from safetensors.torch import save_file


def features(n: int = 500, d: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn((n, d), generator=g) * torch.logspace(-2, 2, d) + 1e4  # an offset that cancels raw sums of squares


def stream(*parts: torch.Tensor) -> Statistics:
    statistics = Statistics.by(Means(), "here")
    for part in parts:
        statistics.update(part)
    return statistics


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    of(Means(), images(20).split(7), "here").save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def rewrite(path: Path, **changes: object) -> None:
    with safe_open(path, framework="pt") as f:
        record = json.loads(f.metadata()[KEY])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(tensors, path, {KEY: json.dumps({k: v for k, v in {**record, **changes}.items() if v is not None})})


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_streaming_equals_one_pass(batch: int) -> None:
    x = features()
    found, expected = stream(*x.split(batch)), x.double().numpy()
    assert found.n == 500 and found.dim == 6
    np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(expected.T), rtol=1e-9, atol=1e-9)


def test_merging_equals_one_pass() -> None:
    x = features()
    a, b, c = (stream(*part.split(33)) for part in (x[:3], x[3:250], x[250:]))
    whole = stream(x)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), stream().merge(whole), whole.merge(stream())):
        assert merged.n == 500
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    assert a.n == 3  # merging leaves its sides as they were


def test_images_merge_with_their_provenance() -> None:
    extractor, pixels = Means(), images(30)
    small = images(8, size=5, seed=1)
    a, b = of(extractor, pixels[:10].split(3), "a"), of(extractor, [pixels[10:], small], "b")
    whole = of(extractor, [small, pixels.flip(0)], "all")
    merged = a.merge(b)
    assert merged.provenance.sizes == whole.provenance.sizes == {"8x8": 30, "5x5": 8}
    assert merged.provenance.source == "a + b"
    assert merged.hash == whole.hash  # the images identify it, not their order, their split or the source's name
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    assert a.hash != whole.hash


def test_mixed_sizes_are_extracted_image_by_image() -> None:
    extractor = Means()
    mixed = [images(3), images(4, size=13, seed=1), images(2, size=5, seed=2), images(9, seed=3)]
    expected = torch.cat([extractor.extract(pixels) for pixels in mixed]).double()
    found = of(extractor, mixed, "mixed")
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(expected.T), rtol=1e-5, atol=1e-3)  # other batches, float32


def test_hash_of_bare_features_is_of_their_numbers() -> None:
    x = features()
    assert stream(x).hash == stream(x).hash != stream(x + 1).hash


def test_root_follows_updates() -> None:
    statistics = stream(features()[:100])
    for _ in range(2):
        torch.testing.assert_close(statistics.root @ statistics.root.T, statistics.covariance)
        assert statistics.root is statistics.root
        statistics.update(features()[100:])


def test_a_file_says_all_that_the_statistics_did(saved: Path) -> None:
    expected, found = of(Means(), [images(20)], "here"), Statistics.load(saved)
    assert found.n == 20 and found.hash == expected.hash
    assert found.provenance == Provenance(
        features="means", features_hash="f" * 64, resize="clean-bicubic-8", source="here",
        source_hash=expected.provenance.source_hash, sizes={"8x8": 20},
    )  # fmt: skip
    torch.testing.assert_close(found.m2, expected.m2, rtol=1e-12, atol=1e-9)
    assert [p.name for p in saved.parent.iterdir()] == ["s.safetensors"]


def test_other_features_are_refused_by_name(saved: Path) -> None:
    other = Means()
    other.name, other.size = "others", 16
    with pytest.raises(UserError, match=r"here: made by means \(f+, clean-bicubic-8\).* with others \(f+, clean-bicubic-16\)"):
        Statistics.load(saved).check(other)
    other.name, other.size, other.hash = "means", 8, "0" * 64
    with pytest.raises(UserError, match="000000000000"):
        Statistics.load(saved).merge(Statistics.by(other))
    Statistics.load(saved).check(Means())


def test_files_that_are_no_statistics(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="no such statistics file"):
        Statistics.load(tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    for content in (b"", b"no tensors", saved.read_bytes()[:-50]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="broken.safetensors: cannot be read as a statistics file"):
            Statistics.load(broken)
    save_file({"weight": torch.ones(3)}, broken)
    with pytest.raises(UserError, match="not of feature statistics"):
        Statistics.load(broken)


def test_damaged_newer_and_incomplete_files(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Statistics.load(saved)
    rewrite(saved, format=99)
    with pytest.raises(UserError, match="format 99 by a newer lissom"):
        Statistics.load(saved)
    rewrite(saved, format=1, resize=None)
    with pytest.raises(UserError, match="record is incomplete"):
        Statistics.load(saved)


def test_too_few_images_and_bad_numbers() -> None:
    with pytest.raises(UserError, match="here: a covariance needs 2 images, got 1"):
        _ = stream(features()[:1]).covariance
    with pytest.raises(UserError, match="not finite for here"):
        stream(torch.tensor([[1.0, float("nan")]]))
