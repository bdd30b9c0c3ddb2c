"""Modules of the user's own, and what is not one."""

import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _extractor, _features
from lissom.tests.evaluate.judge import images
from torch import Tensor, nn


class Extent(nn.Module):
    """Mean and maximum of each channel, of images of one size only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == self.size and x.shape[3] == self.size, "another size"
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(3), x


class Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def saved(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.mark.parametrize("suffix", ["pt", "pth", "ts"])
@pytest.mark.filterwarnings("error")
def test_a_module_by_hand(suffix: str, tmp_path: Path) -> None:
    path = saved(Extent(16), tmp_path / f"mine.{suffix}")
    pixels = images(70, size=16)
    expected = torch.cat([pixels.double().mean((1, 2)), pixels.double().amax((1, 2))], 1)
    for name in (f"torchscript:{path}@16", f"{path}@16"):
        loaded = _features.load(name)
        assert (loaded.name, loaded.dim, loaded.resize) == (f"torchscript:mine.{suffix}@16", 6, "clean-bicubic-16")
        assert loaded.hash == _extractor.sha256(path) and not loaded.has_text and not loaded.has_probabilities
        torch.testing.assert_close(loaded.extract(pixels).double(), expected, rtol=1e-5, atol=1e-4)
        assert loaded.extract(images(1, size=40)).shape == (1, 6) and loaded.extract(images(0)).shape == (0, 6)


def test_299_pixels_unless_told(tmp_path: Path) -> None:
    loaded = _features.load(f"torchscript:{saved(Extent(299), tmp_path / 'a.pt')}")
    assert (loaded.name, loaded.size) == ("torchscript:a.pt", 299)
    with pytest.raises(
        UserError, match=r"b.pt: fails on float32 \(B, 3, 299, 299\) \(.*another size\). Give its size as torchscript:FILE@S"
    ):
        _features.load(f"torchscript:{saved(Extent(16), tmp_path / 'b.pt')}")


def test_what_does_not_return_features(tmp_path: Path) -> None:
    def refused(module: nn.Module, match: str) -> None:
        with pytest.raises(UserError, match=match):
            _features.load(f"torchscript:{saved(module, tmp_path / 'x.pt')}@8")

    refused(Pair(), r"gives a tuple for one image of \(B, 3, 8, 8\), where features are \(1, D\)")
    refused(Image(), r"gives \(1, 3, 8, 8\) for one image")
    refused(nn.Flatten(0), r"gives \(192,\) for one image")
    with pytest.raises(UserError, match="no translation of Inception, it has no `layers`. Give torchscript:"):
        _features.load(f"inception:{saved(Extent(299), tmp_path / 'y.pt')}")


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torchscript", "inception"])
def test_pickles_are_refused_and_not_opened(kind: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    zipped, plain = tmp_path / "zipped.pt", tmp_path / "plain.pth"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "trap": Trap(sprung)}, zipped)
    plain.write_bytes(pickle.dumps(Trap(sprung)))
    for path in (zipped, plain):
        with pytest.raises(UserError, match="not TorchScript, or cut short. A pickled checkpoint is never read") as e:
            _features.load(f"{kind}:{path}")
        assert e.value.exit_code == 2 and not sprung.exists()


def test_damaged_files(tmp_path: Path) -> None:
    whole = saved(Extent(8), tmp_path / "whole.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not TorchScript, or cut short"):
        _features.load(f"torchscript:{cut}@8")
    spoiled = tmp_path / "spoiled.pt"
    with zipfile.ZipFile(spoiled, "w") as archive:
        archive.writestr("spoiled/constants.pkl", b"")
    with pytest.raises(UserError, match="spoiled.pt: torch cannot read this TorchScript file"):
        _features.load(f"{spoiled}@8")
    with pytest.raises(UserError, match=r"features 'torchscript:nowhere.pt@8': no file nowhere.pt here"):
        _features.load("torchscript:nowhere.pt@8")
    with pytest.raises(UserError, match="no file nowhere.ts here"):
        _features.load("nowhere.ts")
