"""One pass in numpy is the truth; streaming, merging and files must not move it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate._sketch import Sketch, key
from lissom.evaluate._statistics import KEY, Provenance, Statistics, image_hash, of
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


def keyed(x: torch.Tensor, keys: torch.Tensor, keep: int, batch: int = 33) -> Statistics:
    statistics = Statistics.by(Means(), "here", keep)
    for part, part_keys in zip(x.split(batch), keys.split(batch), strict=True):
        statistics.update(part, part_keys)
    return statistics


def some_keys(n: int = 500, seed: int = 1) -> torch.Tensor:
    return torch.randint(2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))


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


def test_kept_are_the_images_with_the_smallest_keys_however_they_come() -> None:
    x, keys = features().div(1e3), some_keys()
    order = keys.argsort()[:60]
    whole = keyed(x, keys, 60)
    assert torch.equal(whole.sketch.keys, keys[order]) and torch.equal(whole.kept, x[order].half().float())
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    a, b, c = (keyed(x[s], keys[s], 60, batch) for s, batch in ((shuffle[:7], 1), (shuffle[7:300], 500), (shuffle[300:], 3)))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), Statistics.by(Means(), keep=9).merge(b.merge(c).merge(a))):
        assert torch.equal(merged.sketch.keys, whole.sketch.keys) and torch.equal(merged.kept, whole.kept)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-9, atol=1e-9)
        assert merged.sketch.limit == 60
    assert len(keyed(x, keys, 10_000).kept) == 500


def test_the_smaller_limit_holds_for_a_merged_sample() -> None:
    x, keys = features().div(1e3), some_keys()
    a, b, none = keyed(x[:250], keys[:250], 40), keyed(x[250:], keys[250:], 25), keyed(x[:9], keys[:9], 0)
    assert torch.equal(a.merge(b).kept, x[keys.argsort()[:25]].half().float())
    assert len(a.merge(none).kept) == 0 and a.merge(none).sketch.limit == 0
    a.keep_at_most(10)
    assert torch.equal(a.kept, x[keys[:250].argsort()[:10]].half().float()) and a.sketch.limit == 10


def test_equal_images_are_kept_once() -> None:
    pixels = images(12)
    found = of(Means(), [pixels, pixels.flip(0), pixels[:5]], "copies", keep=10)
    expected = sorted(key(image_hash(image)) for image in pixels)[:10]
    assert found.n == 29 and found.sketch.keys.tolist() == expected
    again = of(Means(), [pixels], "here", keep=10)
    assert found.merge(again).sketch.keys.tolist() == expected
    torch.testing.assert_close(found.kept, again.kept, rtol=2**-11, atol=1e-3)


def test_kept_features_are_those_of_their_images() -> None:
    pixels = images(30)
    found = of(Means(), pixels.split(4), "here", keep=8)
    by_key = {key(image_hash(image)): image for image in pixels}
    expected = torch.cat([Means().extract(by_key[k][None]) for k in found.sketch.keys.tolist()])
    assert (found.kept - expected).abs().max() <= expected.abs().max() * 2**-11  # float16


def test_kept_features_need_keys_and_numbers_that_float16_holds() -> None:
    with pytest.raises(ValueError, match="keys"):
        Statistics.by(Means(), "here", keep=5).update(features())
    with pytest.raises(UserError, match="features as large as 7e[+]04 cannot be kept .* use --keep-features 0"):
        keyed(torch.full((2, 4), 7e4), some_keys(2), 5)
    for keys, rows in ((some_keys(3), torch.zeros(2, 4)), (torch.tensor([2, 1]), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match="belong together"):
            Sketch(5, keys, rows.half())


def test_what_depends_on_kept_features_is_told_apart() -> None:
    pixels = images(40)
    bare, few, more = (of(Means(), [pixels], "here", keep) for keep in (0, 10, 20))
    plenty = of(Means(), pixels.flip(0).split(3), "there", 10_000), of(Means(), [pixels], "here", 40)
    assert len({s.hash for s in (bare, few, more, *plenty)}) == 1
    assert bare.identity(False) == few.identity(False) == few.hash
    assert len({s.identity(True) for s in (bare, few, more, plenty[0])}) == 4
    assert plenty[0].identity(True) == plenty[1].identity(True)  # the same images are kept, whatever the limit
    assert (
        stream(*features().split(33)).hash == keyed(features(), some_keys(), 5).hash
    )  # bare features: their bytes, kept or not


def test_a_metric_that_needs_kept_features_says_so() -> None:
    assert of(Means(), [images(3)], "here").need_kept("kid").shape == (3, 4)
    with pytest.raises(
        UserError, match="^here: holds no features of single images, which kid needs: build it again with --keep-features 10000"
    ):
        of(Means(), [images(3)], "here", keep=0).need_kept("kid")
    with pytest.raises(UserError, match="only one image, too few for what cmmd needs"):
        of(Means(), [images(1).repeat(3, 1, 1, 1)], "here").need_kept("cmmd")


def test_files_keep_features_and_their_sample(saved: Path) -> None:
    expected, found = of(Means(), images(20).split(7), "here"), Statistics.load(saved)
    assert torch.equal(found.kept, expected.kept) and torch.equal(found.sketch.keys, expected.sketch.keys)
    assert found.sketch.limit == 10_000 and found.identity(True) == expected.identity(True)
    with safe_open(saved, framework="pt") as f:
        assert json.loads(f.metadata()[KEY])["format"] == 2
        assert f.get_tensor("kept").dtype == torch.float16 and f.get_tensor("keys").dtype == torch.int64
    rows = Statistics.load(saved).sketch.rows.clone()
    rows[3, 2] += 1
    damaged = Statistics(found.provenance, found.n, found.mean, found.m2, Sketch(10_000, found.sketch.keys, rows))
    content = bytearray(damaged.content())
    saved.write_bytes(content.replace(damaged.checksum.encode(), found.checksum.encode()))
    with pytest.raises(UserError, match="damaged"):
        Statistics.load(saved)


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    """As 0.1 wrote them; and what needs nothing newer is still written so."""
    expected = of(Means(), [images(20)], "here", keep=0)
    record = {
        "format": 1, "n": 20, "checksum": expected.checksum, "features": "means", "features_hash": "f" * 64,
        "resize": "clean-bicubic-8", "source": "here", "source_hash": expected.provenance.source_hash,
        "sizes": {"8x8": 20}, "skipped": [], "version": "0.1.0",
    }  # fmt: skip
    save_file({"mean": expected.mean, "m2": expected.m2}, tmp_path / "old.safetensors", {KEY: json.dumps(record)})
    old = Statistics.load(tmp_path / "old.safetensors")
    assert old.hash == expected.hash and old.kept.shape == (0, 4) and old.sketch.limit == 0
    expected.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()[KEY]) == record and set(f.keys()) == {"mean", "m2"}
    newer = of(Means(), [images(20, seed=1)], "there")
    assert old.merge(newer).n == 40 and len(old.merge(newer).kept) == 0


def test_conversions_and_shards_merge(tmp_path: Path) -> None:
    a, b = of(Means(), [images(3)], "x"), of(Means(), [images(1, seed=1)], "x")
    a.describe(converted={"grayscale": 2, "alpha": 1}, shards=("1/2",))
    b.describe(converted={"grayscale": 5}, shards=("2/2",))
    b.save(tmp_path / "one.safetensors")  # a shard may hold one image
    merged = a.merge(Statistics.load(tmp_path / "one.safetensors"))
    assert merged.provenance.converted == {"alpha": 1, "grayscale": 7}
    assert merged.provenance.shards == () and merged.provenance.source == "x"
    with pytest.raises(UserError, match="a covariance needs 2 images, got 1"):
        of(Means(), [images(1)], "x").save(tmp_path / "no.safetensors")


def test_memory_that_runs_out_halves_the_batch() -> None:
    class Small(Means):
        fits = 2

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > self.fits:
                raise torch.OutOfMemoryError("no room")
            return super().forward(batch)

    small = Small()
    torch.testing.assert_close(of(small, [images(13)], "x").mean, of(Means(), [images(13)], "x").mean)
    small.fits = 0
    with pytest.raises(UserError, match="means: memory runs out even for one image"):
        of(small, [images(2)], "x")
