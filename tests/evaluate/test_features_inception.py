"""FID's Inception: the same numbers as clean-fid, by the right file only."""

from pathlib import Path

import pytest
import torch
from lissom.core.errors import MissingOffline, UserError
from lissom.core.measurement import Measurement
from lissom.evaluate import _download, _extractor, _features, _torchscript
from lissom.evaluate._extractor import Features
from lissom.tests.evaluate.judge import images
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Features:
    return _features.load(f"inception:{inception_file}")


@pytest.fixture
def official(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> _download.Remote:
    """A world in which NVIDIA's file is the random one."""
    remote = _download.Remote(
        inception_file.name, "https://example.org/i.pt", inception_file.stat().st_size, _extractor.sha256(inception_file)
    )
    monkeypatch.setattr(_torchscript, "INCEPTION", remote)
    return remote


def pictures() -> list[Tensor]:
    """Noise, a gradient and a flat image, of three sizes, one of them the network's own: (1, H, W, 3) each."""
    ramp = torch.arange(96).view(1, 1, 96, 1).expand(1, 40, 96, 3).to(torch.uint8)
    return [images(1, size=64), ramp, torch.full((1, 350, 330, 3), 200, dtype=torch.uint8), images(1, size=299, seed=3)]


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:FutureWarning")  # clean-fid's
def test_same_as_cleanfid(inception: Features, inception_file: Path, tmp_path: Path) -> None:
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    files = []
    for i, picture in enumerate(pictures()):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(picture[0].numpy()).save(files[-1])
    theirs = InceptionV3W(str(inception_file.parent), download=False)
    expected = torch.from_numpy(
        get_files_features(files, theirs, num_workers=0, batch_size=4, device=torch.device("cpu"), mode="clean", verbose=False)
    )
    found = torch.cat([inception.extract(picture) for picture in pictures()])
    assert (inception.dim, inception.resize, inception.has_text) == (2048, "clean-bicubic-299", False)
    assert expected.std(0).mean() > 0.1  # else anything would agree
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_same_as_its_own_forward(inception: Features, inception_file: Path) -> None:
    module = _torchscript.open_module(inception_file, torch.device("cpu"))
    ramps = torch.arange(299).view(1, 299, 1).expand(299, 299, 3) // 2
    pixels = torch.stack([ramps, 255 - ramps.transpose(0, 1)]).to(torch.uint8)
    floats = pixels.permute(0, 3, 1, 2).float()
    features = inception.extract(pixels)
    with torch.no_grad():
        own = module(floats, return_features=True)  # it resamples to 299 once more
        assert (features - own).norm() / own.norm() < 1e-3
        probabilities = inception.probabilities(features)
        torch.testing.assert_close(probabilities, module(floats, no_output_bias=True), rtol=1e-3, atol=1e-6)
        assert not torch.allclose(probabilities, module(floats), rtol=1e-2)  # the bias would show
    by_hand = (features.double() @ module.output.weight.double().T).exp()
    torch.testing.assert_close(probabilities.double(), by_hand / by_hand.sum(1, keepdim=True), rtol=1e-4, atol=1e-7)
    assert inception.has_probabilities and probabilities.dtype == torch.float32 and probabilities.shape == (2, 1008)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))


def test_only_the_official_file_gives_an_fid(
    inception: Features, inception_file: Path, official: _download.Remote, tmp_path: Path
) -> None:
    assert inception.name == "inception:inception-2015-12-05.pt"
    label = Measurement(metric="fid", value=1.0, direction="lower", n=2, features=inception.name).label
    assert label == "FD[inception:inception-2015-12-05.pt]"
    renamed = tmp_path / "mine.pt"
    renamed.symlink_to(inception_file)
    for name in (f"inception:{renamed}", str(renamed), f"torchscript:{renamed}"):  # its own forward would give classes
        loaded = _features.load(name)
        assert (loaded.name, loaded.hash, loaded.dim) == ("inception", official.sha256, 2048)
    assert Measurement(metric="fid", value=1.0, direction="lower", n=2, features=loaded.name).label == "FID"


def test_from_the_cache(inception_file: Path, official: _download.Remote, caches: Path) -> None:
    place = caches / "lissom" / "inception-2015-12-05.pt"
    with pytest.raises(MissingOffline) as refused:
        _features.load("inception")
    assert refused.value.exit_code == 5 and str(place) in str(refused.value) and official.url in str(refused.value)
    assert "no connection in tests" in str(refused.value) and not place.exists()
    place.symlink_to(inception_file)
    assert (loaded := _features.load("inception")).name == "inception" and loaded.hash == official.sha256
    place.unlink()
    place.write_bytes(inception_file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"inception-2015-12-05.pt: is not .* \(sha256 .*Delete it"):
        _features.load("inception")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_nothing_is_tried_offline(variable: str, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(_download.urllib.request, "urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    with pytest.raises(MissingOffline) as refused:
        _features.load("inception")
    said = str(refused.value)
    assert f"{variable} is set" in said and str(caches / "lissom" / "inception-2015-12-05.pt") in said
    assert (
        "https://nvlabs-fi-cdn.nvidia.com/" in said and "sha256 f58cb9b6ec323ed6" in said and "or give inception:FILE" in said
    )
    assert not (caches / "lissom").exists()  # nor is anything written


def test_what_is_no_inception(tmp_path: Path, inception: Features) -> None:
    with pytest.raises(UserError, match=r"features 'inception:nowhere.pt': no file nowhere.pt here"):
        _features.load("inception:nowhere.pt")
    with pytest.raises(UserError, match="no features 'inception:'"):
        _features.load("inception:")
    with pytest.raises(UserError, match="cannot read text; choose features with a text tower"):
        inception.encode_text(["a"])
    assert inception.truncated(["a " * 500]) == 0
