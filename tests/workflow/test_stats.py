"""Statistics files built from folders and zips, in shards, and merged; odd and bad images."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _features, _workers
from lissom.evaluate._extraction import share
from lissom.evaluate._images import Images
from lissom.evaluate._statistics import Statistics, of
from lissom.tests.evaluate.judge import Means, images
from lissom.tests.evaluate.test_images import fill, odd, zipped
from lissom.tests.workflow import slow
from lissom.tests.workflow.builds import Notes, alike, built, pictures
from lissom.workflow._stats_check import verify
from lissom.workflow.stats import Build, build, say, show


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "load", slow.load)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


def test_a_build_equals_one_pass(folder: Path, tmp_path: Path) -> None:
    notes = Notes()
    made = built(tmp_path / "s.safetensors", folder, progress=notes, keep=20)
    found, expected = Statistics.load(tmp_path / "s.safetensors"), of(Means(), Images(folder), str(folder), keep=20)
    assert torch.equal(found.m2, expected.m2) and torch.equal(found.kept, expected.kept) and found.hash == expected.hash
    assert (made["n"], made["dim"], made["kept"], made["keep"], made["singular"]) == (58, 4, 20, 20, False)
    assert made["skipped"] == ["003-torn.png", "041-torn.png"] and made["converted"] == {"grayscale": 1}
    assert made["sizes"] == {"8x8": 57, "9x9": 1} and not made["finished_already"]
    assert {k: made[k] for k in show(tmp_path / "s.safetensors")} == show(tmp_path / "s.safetensors")
    assert notes.steps == [True] and notes.total == 1
    unread, odd_ones = notes.warnings
    assert unread == "2 of 60 files cannot be read as images and were left out: 003-torn.png, 041-torn.png"
    assert odd_ones.startswith("not plain 8-bit RGB: grayscale 1 (animated: the first frame; alpha: dropped;")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "s.safetensors"]


def test_a_zip_is_the_same_as_its_folder_and_sources_add_up(folder: Path, tmp_path: Path) -> None:
    packed = zipped(folder, [p.name for p in sorted(folder.iterdir(), reverse=True)])
    second = fill(tmp_path / "more", n=9, size=12)
    first, again, both = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    built(first, folder), built(again, packed), built(both, folder, second)
    a, b, c = map(Statistics.load, (first, again, both))
    assert a.hash == b.hash and torch.equal(a.m2, b.m2)
    assert c.n == a.n + 9 and c.provenance.source == f"{folder} + {second}"
    assert c.provenance.skipped == (f"{folder}/003-torn.png", f"{folder}/041-torn.png")
    assert c.hash == a.merge(of(Means(), Images(second), "")).hash


def test_shards_of_several_sources_miss_nothing(tmp_path: Path) -> None:
    sources = [Images(fill(tmp_path / name, n=n)) for name, n in (("a", 7), ("b", 2), ("c", 11))]
    every = [f"{source.source.name}/{name}" for source in sources for name in source.names]
    for count in (1, 2, 3, 7, 30):
        for limit in (None, 8, 100):
            for i in range(1, count + 1):
                parts = [
                    [
                        f"{source.source.name}/{name}"
                        for source, names in share(sources, (i, count), limit, done)
                        for name in names
                    ]
                    for done in (0, 2)
                ]
                assert parts[0] == every[:limit][i - 1 :: count] and parts[1] == parts[0][2:]


@pytest.mark.parametrize("count", [2, 3, 60])
def test_merged_shards_equal_one_build(folder: Path, tmp_path: Path, count: int) -> None:
    built(tmp_path / "whole.safetensors", folder, keep=20)
    parts = [tmp_path / f"{i}.safetensors" for i in range(1, count + 1)]
    for i, part in enumerate(parts, start=1):
        made = built(part, folder, shard=(i, count), keep=20)
        assert made["shards"] == [f"{i}/{count}"] and "merge it with the others" in made["notes"][0]
    some = built(tmp_path / "some.safetensors", *parts[1:], features=None)
    assert len(some["shards"]) == count - 1
    merged = built(tmp_path / "all.safetensors", tmp_path / "some.safetensors", parts[0], features=None)
    assert merged["shards"] == [] and merged["notes"] == []
    found, whole = Statistics.load(tmp_path / "all.safetensors"), Statistics.load(tmp_path / "whole.safetensors")
    found.describe(skipped=tuple(sorted(found.provenance.skipped)))
    assert alike(found, whole, 1e-6)  # batches hold other images: float32
    for part in parts[:2]:
        assert verify(part, [folder], "means")["ok"]


def test_merged_features_equal_one_pass(tmp_path: Path) -> None:
    """The same features in other parts: to rounding of float64."""
    x = torch.randn((999, 6), generator=torch.Generator().manual_seed(0)) + 100
    keys = torch.randint(2**62, (999,), generator=torch.Generator().manual_seed(1))
    whole = Statistics.by(Means(), "x", keep=50)
    whole.update(x, keys)
    files = []
    for start in range(0, 999, 111):
        part = Statistics.by(Means(), "x", keep=50)
        part.update(x[start : start + 111], keys[start : start + 111])
        files.append(tmp_path / f"{start}.safetensors")
        part.save(files[-1])
    build(Build(tuple(files), tmp_path / "all.safetensors"))
    found = Statistics.load(tmp_path / "all.safetensors")
    expected = x.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(expected.T), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.sketch.keys, whole.sketch.keys) and torch.equal(found.kept, whole.kept)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' parts, one after the other in this process."""

    def run(job: _workers.Job, partials: list[Path], device: str, told: Any, every: int) -> None:
        for number, partial in enumerate(partials, start=1):
            part = job.part(number, len(partials)).extraction(Means())
            part.save(partial, part.run(partial, every, told, whole=False), part.total)

    monkeypatch.setattr(_workers, "run", run)


@pytest.mark.parametrize(("workers", "shard"), [(2, (1, 1)), (3, (2, 2)), (4, (1, 3)), (80, (1, 1))])
def test_workers_share_a_shard(in_turn: None, folder: Path, tmp_path: Path, workers: int, shard: tuple[int, int]) -> None:
    one, several, notes = tmp_path / "one.safetensors", tmp_path / "several.safetensors", Notes()
    built(one, folder, shard=shard)
    built(several, folder, shard=shard, workers=workers, progress=notes)
    a, b = Statistics.load(one), Statistics.load(several)
    b.describe(skipped=tuple(sorted(b.provenance.skipped)))
    assert alike(b, a, 1e-6) and a.build == b.build and len(notes.steps) == notes.total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "one.safetensors", "several.safetensors"]


def test_what_cannot_be_built_is_refused_before_anything(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    statistics = of(Means(), [images(5)], "here")
    statistics.save(tmp_path / "there.safetensors")
    (tmp_path / "none").mkdir()
    cases: list[tuple[dict[str, Any], tuple[Path, ...], str]] = [
        ({}, (tmp_path / "absent",), "absent: no such folder or file"),
        ({}, (tmp_path / "none",), "none: 0 images in it"),
        ({}, (tmp_path / "there.safetensors", folder), "there.safetensors: a statistics file among images"),
        ({}, (tmp_path / "there.safetensors",), "--features: for images only"),
        ({"features": None, "workers": 2}, (tmp_path / "there.safetensors",), "--workers: for images only"),
        ({"features": None, "shard": (1, 2)}, (tmp_path / "there.safetensors",), "--shard: for images only"),
        ({"features": None}, (tmp_path / "no.safetensors",), "no.safetensors: no such statistics file"),
        ({"features": None}, (folder,), "say with --features what to see the images by"),
        ({"device": "tpu7"}, (folder,), "--device tpu7: cannot be used here"),
    ]
    for settings, sources, says in cases:
        with pytest.raises(UserError, match=says):
            built(out, *sources, **settings)
    with pytest.raises(UserError, match="s.npz: a statistics file ends in .safetensors"):
        built(tmp_path / "s.npz", folder)
    with pytest.raises(UserError, match="none: is a folder"):
        built(tmp_path / "none", folder)
    with pytest.raises(UserError, match="there.safetensors: exists already. Name another --out"):
        built(tmp_path / "there.safetensors", folder)
    with pytest.raises(UserError, match="there.safetensors: exists already and was not built from images like this"):
        built(tmp_path / "there.safetensors", folder, resume=True)
    assert not list(tmp_path.glob("s.*"))


def test_features_that_are_not_finite_name_the_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Means):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            found = super().forward(batch)
            found[3] = float("nan")
            return found

    monkeypatch.setattr(_features, "load", lambda name, device="cpu": Bad())
    with pytest.raises(UserError, match=r"^003.png: means gave features that are not finite for this image. Take it out"):
        built(tmp_path / "s.safetensors", folder)


def test_merging_says_what_is_lost_or_counted_twice(folder: Path, tmp_path: Path) -> None:
    a, b, bare, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "bare", "out"))
    of(Means(), [images(9)], "a").save(a)
    of(Means(), [images(12)[4:]], "b").save(b)
    of(Means(), [images(5, seed=3)], "bare", keep=0).save(bare)
    with pytest.raises(UserError, match=r"a.safetensors: is named twice, and its images would count twice. Name it once"):
        built(out, a, b, a, features=None)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(a.read_bytes())
    with pytest.raises(UserError, match=r"copy.safetensors: holds the same images as .*a.safetensors. Merge each only once"):
        built(out, a, b, copy, features=None)
    notes = Notes()
    made = built(out, a, b, features=None, progress=notes)
    assert made["n"] == 17 and made["kept"] == 12 and notes.warnings[0].startswith("5 kept images are in more than one")
    assert built(out, b, a, features=None, resume=True)["finished_already"]
    with pytest.raises(UserError, match="out.safetensors: exists already and was made from other files"):
        built(out, a, features=None, resume=True)
    notes = Notes()
    made = built(tmp_path / "all.safetensors", a, bare, features=None, progress=notes)
    assert made["kept"] == made["keep"] == 0 and "bare.safetensors holds no features of single images" in notes.warnings[0]
    assert built(tmp_path / "fewer.safetensors", a, features=None, keep=3)["kept"] == 3
    other = Means()
    other.hash = "0" * 64
    of(other, [images(5, seed=4)], "other").save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="which cannot be compared with means"):
        built(tmp_path / "wrong.safetensors", a, tmp_path / "other.safetensors", features=None)


def test_shards_of_another_list_of_files_are_loud(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))  # as on another machine, with times of its own
    os.utime(copied / "000.png")
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    built(one, folder, shard=(1, 2))
    for expected in (0, 1):
        two.unlink(missing_ok=True)
        built(two, copied, shard=(2, 2))
        notes = Notes()
        built(tmp_path / f"all-{expected}.safetensors", one, two, features=None, progress=notes)
        assert (
            len([text for text in notes.warnings if "the shards were taken from folders with other files" in text]) == expected
        )
        (copied / "000.png").unlink(missing_ok=True)


def test_odd_images_of_every_kind(tmp_path: Path) -> None:
    folder, notes = fill(tmp_path / "images", n=2), Notes()
    for name, (content, _) in odd().items():
        (folder / name).write_bytes(content)
    made = built(tmp_path / "s.safetensors", folder, progress=notes)
    assert made["converted"] == {"16-bit": 2, "alpha": 3, "animated": 4, "cmyk": 1, "grayscale": 4, "palette": 4}
    assert made["n"] == 2 + len(odd()) and made["skipped"] == []
    assert "16-bit 2, alpha 3" in notes.warnings[0] and "16-bit 2, alpha 3" in say(made)


def test_mostly_unreadable_folders_are_loud_and_empty_ones_refused(in_turn: None, tmp_path: Path) -> None:
    folder, notes = fill(tmp_path / "images", n=2), Notes()
    for i in range(5):
        (folder / f"bad{i}.jpg").write_bytes(b"<html>")
    built(tmp_path / "s.safetensors", folder, progress=notes)
    assert notes.warnings[0].startswith(
        "5 of 7 files cannot be read as images and were left out: bad0.jpg, bad1.jpg, bad2.jpg, …"
    )
    assert notes.warnings[1].startswith("MORE THAN HALF of the files cannot be read.")
    (folder / "000.png").write_bytes(b"")
    for workers in (1, 2, 3):
        with pytest.raises(UserError, match="images: 1 of its 7 images can be read, a reference needs at least 2"):
            built(tmp_path / f"t{workers}.safetensors", folder, workers=workers)


def test_few_images_are_called_singular(tmp_path: Path) -> None:
    made = built(tmp_path / "s.safetensors", fill(tmp_path / "a", n=4))
    assert made["singular"] and "4 images for 4 features: the covariance is singular" in say(made)


def test_a_limit_takes_the_first_files(folder: Path, tmp_path: Path) -> None:
    made = built(tmp_path / "s.safetensors", folder, limit=10)
    assert made["n"] == 9 and made["skipped"] == ["003-torn.png"]
    assert verify(tmp_path / "s.safetensors", [folder])["ok"]
