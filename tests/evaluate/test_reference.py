from pathlib import Path

import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _extraction, _reference
from lissom.evaluate._images import Images
from lissom.evaluate._reference import Reference
from lissom.evaluate._statistics import Statistics, of
from lissom.tests.evaluate.judge import Means, images
from lissom.tests.evaluate.test_images import encode, fill, zipped
from PIL import Image


class Counting(Means):
    """Means that counts the images it saw."""

    seen = 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen += len(batch)
        return super().forward(batch)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_reference, "FOLDER", tmp_path)
    for seed, name in enumerate(("dots-train", "dots-test")):
        of(Means(), [images(10, seed=seed)], name).save(tmp_path / f"{name}.safetensors")
    return tmp_path


def test_a_folder_gives_each_role_its_half(tmp_path: Path) -> None:
    folder, extractor = fill(tmp_path / "a", n=40), Means()
    (folder / "broken.png").write_bytes(b"")
    search, report = (_reference.load(str(folder), extractor, role) for role in ("search", "report"))
    assert not search.shared and search.role == "search" and search.source == str(folder)
    assert search.statistics.provenance.skipped == ("broken.png",)
    assert search.statistics.n + report.statistics.n == 40
    assert search.statistics.merge(report.statistics).hash == of(extractor, Images(folder), "").hash
    names = [f"{i:03}.png" for i in reversed(range(40))]
    assert _reference.load(str(zipped(folder, names)), extractor, "search").statistics.hash == search.statistics.hash


def test_statistics_of_images_are_kept(tmp_path: Path) -> None:
    folder, cache, extractor = fill(tmp_path / "a", n=40), tmp_path / "cache", Counting()
    first = _reference.load(str(folder), extractor, "search", cache).statistics
    seen = extractor.seen
    assert _reference.load(str(folder), extractor, "search", cache).statistics.hash == first.hash
    assert extractor.seen == seen
    next(cache.iterdir()).write_bytes(b"torn")
    assert _reference.load(str(folder), extractor, "search", cache).statistics.hash == first.hash
    assert extractor.seen == 2 * seen
    for name in [p.name for p in folder.iterdir()][:10]:
        (folder / name).unlink()
    assert _reference.load(str(folder), extractor, "search", cache).statistics.n < first.n
    extractor.size = 4
    assert _reference.load(str(folder), extractor, "search", cache).statistics.provenance.resize == "clean-bicubic-4"


def test_a_reference_keeps_features_of_single_images(tmp_path: Path) -> None:
    folder, cache = fill(tmp_path / "a", n=40), tmp_path / "cache"
    (folder / "grey.png").write_bytes(encode(Image.fromarray(images(1)[0, :, :, 0].numpy())))
    for where in (None, cache, cache):  # made, made and kept, found
        found = _reference.load(str(folder), Means(), "search", where).statistics
        assert found.kept.shape == (found.n, 4) and found.sketch.limit == 10_000
    parts = [_reference.load(str(folder), Means(), role).statistics.provenance.converted for role in ("search", "report")]
    assert sorted(parts, key=len) == [{}, {"grayscale": 1}]


def test_a_kept_reference_without_single_images_is_stale(tmp_path: Path) -> None:
    folder, cache, extractor = fill(tmp_path / "a", n=40), tmp_path / "cache", Counting()
    first = _reference.load(str(folder), extractor, "search", cache).statistics
    (path,), seen = list(cache.iterdir()), extractor.seen
    old = Statistics.load(path)
    old.keep_at_most(0)
    old.save(path)
    again = _reference.load(str(folder), extractor, "search", cache).statistics
    assert extractor.seen == 2 * seen and torch.equal(again.kept, first.kept)
    assert list(cache.iterdir()) == [path] and len(Statistics.load(path).kept) == first.n


def test_a_killed_reference_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = fill(tmp_path / "a", n=60), tmp_path / "cache"
    expected = _reference.load(str(folder), Means(), "search").statistics

    class Dying(Counting):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            if self.seen >= 15:
                raise KeyboardInterrupt
            return super().forward(batch)

    monkeypatch.setattr(_extraction.Extraction.run, "__defaults__", (None, 10, lambda files, fresh: None))
    with pytest.raises(KeyboardInterrupt):
        _reference.load(str(folder), Dying(), "search", cache)
    (partial,), extractor = list(cache.iterdir()), Counting()
    state = partial.read_bytes()
    for content in (state, state[:-9]):  # a damaged state is begun anew
        for path in cache.iterdir():
            path.unlink()
        partial.write_bytes(content)
        extractor.seen = 0
        found = _reference.load(str(folder), extractor, "search", cache).statistics
        assert torch.equal(found.m2, expected.m2) and torch.equal(found.kept, expected.kept)
        assert extractor.seen < found.n if content == state else extractor.seen == found.n
        assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


def test_a_statistics_file_serves_both_roles_and_says_so(tmp_path: Path) -> None:
    statistics = of(Means(), [images(10)], "here")
    statistics.save(tmp_path / "s.safetensors")
    for role in ("search", "report"):
        found = _reference.load(str(tmp_path / "s.safetensors"), Means(), role)
        assert found.shared and found.role == role and found.statistics.hash == statistics.hash
    other = Means()
    other.name = "others"
    with pytest.raises(UserError, match="here: made by means .* with others"):
        _reference.load(str(tmp_path / "s.safetensors"), other, "search")


def test_zoo(zoo: Path) -> None:
    search, report = (_reference.load("zoo:dots", Means(), role) for role in ("search", "report"))
    assert (search.statistics.provenance.source, report.statistics.provenance.source) == ("dots-train", "dots-test")
    assert not search.shared and not report.shared
    explicit = _reference.load("zoo:dots/train", Means(), "report")
    assert explicit.shared and explicit.statistics.hash == search.statistics.hash
    for wrong in ("zoo:dost", "zoo:dots/half"):
        with pytest.raises(UserError, match=f"no reference '{wrong}'; there are zoo:dots, each also with /train or /test"):
            _reference.load(wrong, Means(), "search")


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such statistics file"):
        _reference.load(str(tmp_path / "no.safetensors"), Means(), "search")
    with pytest.raises(UserError, match="no such folder or file"):
        _reference.load(str(tmp_path / "no"), Means(), "search")


def test_made_elsewhere() -> None:
    statistics = Statistics.by(Means(), "teacher")
    assert Reference.of(statistics, "search") == Reference(statistics, "teacher", "search", shared=False)


def test_a_part_of_a_reference_is_refused(tmp_path: Path) -> None:
    part = of(Means(), [images(20)], "part")
    part.describe(shards=("1/2",))
    part.save(tmp_path / "part.safetensors")
    with pytest.raises(
        UserError, match=r"part.safetensors: only part 1/2 of a reference. Merge all parts with `lissom stats build`"
    ):
        _reference.load(str(tmp_path / "part.safetensors"), Means(), "report")
