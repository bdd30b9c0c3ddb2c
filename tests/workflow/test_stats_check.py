"""Statistics files that are not what they say are found out, each by one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _features
from lissom.evaluate._statistics import Statistics
from lissom.tests.evaluate.judge import Means
from lissom.tests.evaluate.test_images import fill
from lissom.tests.workflow import slow
from lissom.tests.workflow.builds import built, pictures
from lissom.workflow._stats_check import verify


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "load", slow.load)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


def test_verify_finds_a_good_file_good(folder: Path, tmp_path: Path) -> None:
    for keep in (0, 20, 10_000):
        path = tmp_path / f"{keep}.safetensors"
        built(path, folder, keep=keep)
        assert verify(path)["ok"] and verify(path, [folder])["ok"]
        if keep:
            found = verify(path, [folder], "means")
            assert found["ok"] and found["checked"][-2:] == ["images", "features extracted again"]
    with pytest.raises(UserError, match="0.safetensors holds no features of single images that could be compared"):
        verify(tmp_path / "0.safetensors", [folder], "means")
    with pytest.raises(UserError, match="--features: extracting again needs the images too"):
        verify(path, [], "means")
    with pytest.raises(UserError, match="no such statistics file"):
        verify(tmp_path / "absent.safetensors")


def test_verify_finds_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"

    def wrong(says: str, *sources: Path, features: str | None = None, **changes: Any) -> None:
        """A file with these changes, sealed with a checksum that fits, is found out by one sentence."""
        made = Statistics.load(path)
        for name, value in changes.items():
            setattr(made, name, value)
        (tmp_path / "bad.safetensors").write_bytes(made.content())
        found = verify(tmp_path / "bad.safetensors", sources, features)
        assert not found["ok"] and len(found["problems"]) == 1
        assert found["problems"][0].startswith(f"{tmp_path / 'bad.safetensors'}: ") and says in found["problems"][0]

    built(path, folder)
    good = Statistics.load(path)
    wrong("not all of its numbers are finite", mean=good.mean / 0)
    wrong("negative eigenvalue", m2=-good.m2)
    skew = good.m2.clone()
    skew[0, 1] += 1
    wrong("not symmetric", m2=skew)
    wrong("but the other tensors have the shapes", m2=good.m2[:3, :3].contiguous())
    wrong("the mean of all its kept features is", mean=good.mean + 1)
    wrong("of 1 images; a covariance needs 2", n=1, sketch=type(good.sketch)(0))
    wrong("keeps features of 58 images, but is of 30", n=30)
    other = fill(tmp_path / "other", n=58, size=9)
    wrong("has as many images, but not the same ones", other)
    wrong("of 58 images, ", fill(tmp_path / "fewer", n=5))
    monkeypatch.setattr(Means, "forward", lambda self, batch, real=Means.forward: real(self, batch) * 1.03)
    wrong("features extracted again differ from the kept ones for 58 of 58 images, by up to 3.0%", folder, features="means")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "damaged" in verify(path)["problems"][0]


def test_verify_knows_a_sample_of_other_images(tmp_path: Path) -> None:
    x = torch.randn((5000, 4), generator=torch.Generator().manual_seed(0))
    keys = torch.randint(2**62, (5000,), generator=torch.Generator().manual_seed(1))
    for shift, good in ((0.0, True), (0.4, False)):
        statistics = Statistics.by(Means(), "x", keep=400)
        statistics.update(x + shift * (keys < keys.sort().values[400])[:, None], keys)
        statistics.save(tmp_path / "s.safetensors")
        found = verify(tmp_path / "s.safetensors")
        assert found["ok"] is good
        assert good or "standard errors away from its mean: they are of other images, or very many" in found["problems"][0]
