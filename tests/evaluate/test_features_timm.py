"""DINOv2 and what else timm builds, with random weights of the real architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from lissom.core.errors import MissingOffline, UserError
from lissom.evaluate import _extractor, _features
from lissom.tests.evaluate.judge import images
from safetensors.torch import load_file, save_file
from torch import Tensor

VITS = "vit_small_patch14_dinov2.lvd142m"


def save(model: torch.nn.Module, path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub holds it: for 518 pixels."""
    torch.manual_seed(0)
    model = timm.create_model(VITS)
    for block in model.blocks:
        torch.nn.init.ones_(block.ls1.gamma)  # else every layer adds 1e-5 of itself, and anything would agree
        torch.nn.init.ones_(block.ls2.gamma)
    return save(model, tmp_path_factory.mktemp("dinov2") / "model.safetensors")


def by_hand(weights: Path, pixels: Tensor) -> Tensor:
    """The class token after the last norm, of pixels (B, 224, 224, 3), with the position embedding resampled as timm does."""
    from timm.layers import resample_abs_pos_embed

    model = timm.create_model(VITS, img_size=224).eval()
    state = load_file(weights)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=(16, 16), num_prefix_tokens=1)
    model.load_state_dict(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.forward_features(x)[:, 0]


def test_same_as_timm_by_hand(vits: Path) -> None:
    loaded = _features.load(f"dinov2:vits14/{vits}")
    assert (loaded.name, loaded.dim, loaded.resize) == ("dinov2:vits14/model.safetensors", 384, "clean-bicubic-224")
    assert loaded.hash == _extractor.sha256(vits) and not loaded.has_text and not loaded.has_probabilities
    pixels = images(3, size=224)
    found = loaded.extract(pixels)
    assert found.std(0).mean() > 0.01
    torch.testing.assert_close(found, by_hand(vits, pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([loaded.extract(p[None]) for p in pixels]), found, rtol=1e-4, atol=1e-5)


def test_one_model_has_one_name(vits: Path, cached: Callable[..., Path]) -> None:
    cached(f"timm/{VITS}", vits)
    loaded = [_features.load(f"dinov2:{name}") for name in ("vits14", VITS, VITS.partition(".")[0])]
    assert {f.name for f in loaded} == {"dinov2:vits14"} and {f.hash for f in loaded} == {_extractor.sha256(vits)}
    pixels = images(1, size=40)
    torch.testing.assert_close(loaded[0].extract(pixels), loaded[2].extract(pixels))


@pytest.mark.parametrize("size", ["small", "base", "large", "giant"])
def test_not_on_this_machine(size: str, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, repo = f"vit{size[0]}14", f"timm/vit_{size}_patch14_dinov2.lvd142m"
    for why in ("no connection in tests", "HF_HUB_OFFLINE is set"):
        with pytest.raises(MissingOffline) as refused:
            _features.load(f"dinov2:{short}")
        said = str(refused.value)
        assert refused.value.exit_code == 5 and why in said and str(caches / "hub") in said
        assert f"`hf download {repo} model.safetensors`" in said and f"dinov2:{short}/FILE.safetensors" in said
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_wrong_names_and_files(vits: Path, tmp_path: Path, caches: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as e:
            _features.load(name)
        assert e.value.exit_code == 2

    refused("dinov2:vits15", r"no 'vits15' in timm; there are vits14, .*reg4_dinov2.*Did you mean 'vits14'\?")
    refused("dinov2:", "no '' in timm")
    refused("dinov2:resnet50", "no 'resnet50' in timm")
    refused(f"dinov2:vitb14/{vits}", "timm cannot build it from")
    refused("dinov2:vits14/nowhere.safetensors", "no file nowhere.safetensors here")
    refused(f"dinov2:vits14{vits}", f"no file .*second slash: dinov2:vits14/{vits}")
    refused(f"dinov2:vits14/{vits.with_suffix('.pth')}", "never as .pth files")
    state = load_file(vits)
    del state["blocks.3.mlp.fc1.bias"]  # timm must not fill it up with random numbers
    save_file(state, tmp_path / "partial.safetensors")
    refused(f"dinov2:vits14/{tmp_path}/partial.safetensors", "timm cannot build it .*blocks.3.mlp.fc1.bias")
    (tmp_path / "cut.safetensors").write_bytes(vits.read_bytes()[:5000])
    refused(f"dinov2:vits14/{tmp_path}/cut.safetensors", "timm cannot build it")


def test_a_folder_as_timm_writes_it(vits: Path, tmp_path: Path) -> None:
    dino = tmp_path / "dino"
    dino.mkdir()
    (dino / "model.safetensors").symlink_to(vits)
    told = {"architecture": VITS.partition(".")[0], "pretrained_cfg": {"tag": "lvd142m", "input_size": [3, 518, 518]}}
    (dino / "config.json").write_text(json.dumps(told))
    loaded = _features.load(str(dino))
    assert (loaded.name, loaded.size) == ("dinov2:vits14/model.safetensors", 224)

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    folder = tmp_path / "own"
    folder.mkdir()
    weights = save(model, folder / "model.safetensors")
    trained = {"input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "num_classes": 7}
    trained |= {"hf_hub_id": "timm/elsewhere", "source": "hf-hub", "classifier": "fc", "first_conv": "conv1.0"}
    told = {"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": trained}
    told["model_args"] = {"checkpoint_path": "elsewhere.pth"}
    (folder / "config.json").write_text(json.dumps(told))
    pixels = images(2, size=48)
    x = ((pixels / 255 - torch.tensor(trained["mean"])) / torch.tensor(trained["std"])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    for name in (str(folder), str(weights)):
        loaded = _features.load(name)
        assert (loaded.name, loaded.resize) == ("timm:test_resnet/model.safetensors", "clean-bicubic-48")
        assert loaded.dim == expected.shape[1]
        torch.testing.assert_close(loaded.extract(pixels), expected, rtol=1e-4, atol=1e-5)
    (folder / "config.json").write_text(json.dumps({"architecture": "hf-hub:some/one", "num_classes": 7}))
    with pytest.raises(UserError, match="timm has no 'hf-hub:some/one'"):
        _features.load(str(folder))
