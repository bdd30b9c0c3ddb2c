"""open_clip's published models, with random weights: real names, real code, few and narrow layers."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from lissom.core.errors import MissingOffline, UserError
from lissom.evaluate import _extractor, _features, _open_clip
from lissom.tests.evaluate.judge import images
from open_clip import factory
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

OPENAI, LAION, COCA, SIGLIP = (
    "timm/vit_base_patch32_clip_224.openai",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "timm/ViT-B-16-SigLIP",
)
VISION = {"layers": 2, "width": 64, "head_width": 32}
TEXT = {"layers": 2, "width": 64, "heads": 2}
NARROW = {
    "ViT-B-32": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT},
    "ViT-B-32-quickgelu": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT},
    "coca_ViT-B-32": {
        "embed_dim": 64,
        "vision_cfg": {**VISION, "attn_pooler_heads": 2},
        "text_cfg": TEXT,
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
    "ViT-B-16-SigLIP": {
        "embed_dim": 192,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"},
        "text_cfg": {"layers": 2, "width": 192, "heads": 3, "vocab_size": 600},
    },
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real configs, made small: every other setting stays."""
    configs = copy.deepcopy(factory._MODEL_CONFIGS)
    for arch, changes in NARROW.items():
        for key, value in changes.items():
            if isinstance(value, dict):
                configs[arch][key].update(value)
            else:
                configs[arch][key] = value
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", configs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random weights of an architecture, in half precision as the hub holds many."""
    folder = tmp_path_factory.mktemp("open_clip")

    def of(arch: str) -> Path:
        path = folder / arch / "open_clip_model.safetensors"
        if not path.exists():
            path.parent.mkdir()
            torch.manual_seed(0)
            state = open_clip.create_model(arch, pretrained_text=False).state_dict()
            save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}, path)
        return path

    return of


def by_hand(arch: str, file: Path, pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Any]:
    """Features of pixels (B, 224, 224, 3) by open_clip's own loading and preprocessing, and its model."""
    model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=str(file), image_mean=mean, image_std=std)
    with torch.no_grad():
        return model.eval().visual(torch.stack([preprocess(Image.fromarray(p.numpy())) for p in pixels])), model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_openai_weights_get_their_activation(weights: Callable[[str], Path], cached: Callable[..., Path]) -> None:
    file, pixels, texts = weights("ViT-B-32"), images(3, size=224), ["a cat", "two  dogs"]
    cached(OPENAI, file)
    cached(LAION, file)
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
    for name, arch in (("openai", "ViT-B-32-quickgelu"), ("laion2b_s34b_b79k", "ViT-B-32")):
        loaded = _features.load(f"clip:ViT-B-32/{name}")
        expected, model = by_hand(arch, file, pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        close(loaded.extract(pixels), expected)
        close(loaded.encode_text(texts), model.encode_text(tokens).detach())
        assert (loaded.name, loaded.dim, loaded.resize) == (f"clip:ViT-B-32/{name}", 48, "clean-bicubic-224")
        assert loaded.hash == _extractor.sha256(file) and loaded.has_text and not loaded.has_probabilities
    other = _features.load("clip:ViT-B-32/openai").extract(pixels)
    assert (other - expected).abs().max() > 1e-3  # the activations do differ


def test_every_tag_gets_the_activation_that_open_clip_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, bool]] = []
    monkeypatch.setattr(_open_clip, "hub_file", lambda asked, repo, *_: Path(repo))
    monkeypatch.setattr(
        _open_clip, "_make", lambda asked, name, config, *_: built.append((name, config.get("quick_gelu", False)))
    )
    pickled = set()
    for arch, tag in open_clip.list_pretrained():
        try:
            _features.load(f"clip:{arch}/{tag}")
        except UserError as e:
            assert "published as a pickle (pytorch_model.bin), which is never read" in str(e)
            pickled.add(arch)
    assert len(built) > 150 and all(arch.startswith("ViTamin") for arch in pickled)
    for name, quick in built:
        arch, tag = name.removeprefix("clip:").split("/")
        asked = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)
        assert quick == (asked or open_clip.get_model_config(arch).get("quick_gelu", False))
    assert ("clip:ViT-L-14-336/openai", True) in built and ("clip:ViT-L-14/laion2b_s32b_b82k", False) in built


def test_coca_is_not_normalised(weights: Callable[[str], Path], cached: Callable[..., Path]) -> None:
    file, pixels = weights("coca_ViT-B-32"), images(2, size=224)
    cached(COCA, file)
    loaded = _features.load("clip:coca_ViT-B-32/laion2b_s13b_b90k")
    (expected, _), model = by_hand("coca_ViT-B-32", file, pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    close(loaded.extract(pixels), expected)
    text = model.encode_text(open_clip.get_tokenizer("coca_ViT-B-32")(["a cat"]), normalize=False)
    close(loaded.encode_text(["a cat"]), text.detach())
    assert (text.norm() - 1).abs() > 0.01 and (expected.norm(dim=1) - 1).abs().min() > 0.01
    assert loaded.truncated(["cat " * 74, "cat " * 75]) == 1  # 76 tokens with start and end


def test_siglip(weights: Callable[[str], Path], cached: Callable[..., Path], judge_folder: Path) -> None:
    file, pixels, texts = weights("ViT-B-16-SigLIP"), images(2, size=224), ["A cat!", "two  dogs"]
    snapshot = cached(SIGLIP, file)
    with pytest.raises(MissingOffline, match=r"needs the tokenizer of the hub's timm/ViT-B-16-SigLIP") as e:
        _features.load("clip:ViT-B-16-SigLIP/webli")  # the weights alone are no tokenizer
    assert e.value.exit_code == 5 and '`hf download timm/ViT-B-16-SigLIP --include "*token*"' in str(e.value)
    cached(SIGLIP, judge_folder / "tokenizer.json", judge_folder / "tokenizer_config.json")
    loaded = _features.load("clip:ViT-B-16-SigLIP/webli")
    expected, model = by_hand("ViT-B-16-SigLIP", file, pixels, (0.5,) * 3, (0.5,) * 3)
    close(loaded.extract(pixels), expected)
    tokens = open_clip.tokenizer.HFTokenizer(str(snapshot), context_length=64, clean="canonicalize")
    close(loaded.encode_text(texts), model.encode_text(tokens(texts)).detach())
    close(loaded.encode_text(["a cat"]), loaded.encode_text(["A cat!"]))  # it reads no capitals
    assert loaded.truncated(["a" * 62, "a" * 63, "b" * 99]) == 2 and (loaded.name, loaded.dim) == (
        "clip:ViT-B-16-SigLIP/webli",
        192,
    )
    captions, features = loaded.encode_text(texts), loaded.extract(pixels)
    logits = model.logit_scale.exp() * torch.cosine_similarity(features[:, None], captions[None], dim=2)
    close(loaded.probabilities(features, captions), (logits + model.logit_bias).softmax(1).detach())
    with pytest.raises(UserError, match="clip:ViT-B-16-SigLIP/webli cannot tell classes"):
        loaded.probabilities(features)


def test_a_local_file(
    weights: Callable[[str], Path], caches: Path, judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, openai = images(2, size=224), (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    file = shutil.copy(weights("ViT-B-32"), tmp_path / "mine.safetensors")
    loaded = _features.load(f"clip:ViT-B-32/{file}")
    assert loaded.name == "clip:ViT-B-32/mine.safetensors"
    close(loaded.extract(pixels), by_hand("ViT-B-32", file, pixels, *openai)[0])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "read with GELU; name ViT-B-32-quickgelu if" in said[0]
    quick = by_hand("ViT-B-32-quickgelu", file, pixels, *openai)[0]
    close(_features.load(f"clip:ViT-B-32-quickgelu/{file}").extract(pixels), quick)
    assert capsys.readouterr().err == ""
    told = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    close(
        _features.load(f"clip:ViT-B-32/{file}").extract(pixels),
        by_hand("ViT-B-32-quickgelu", file, pixels, (0.5,) * 3, (0.25,) * 3)[0],
    )
    (tmp_path / "open_clip_config.json").unlink()
    assert capsys.readouterr().err == ""
    siglip = shutil.copy(weights("ViT-B-16-SigLIP"), tmp_path / "siglip.safetensors")
    with pytest.raises(MissingOffline, match="the tokenizer of the hub's timm/ViT-B-16-SigLIP"):
        _features.load(f"clip:ViT-B-16-SigLIP/{siglip}")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # beside the file it is found
        shutil.copy(judge_folder / name, tmp_path)
    found = _features.load(f"clip:ViT-B-16-SigLIP/{siglip}")
    close(found.extract(pixels), by_hand("ViT-B-16-SigLIP", siglip, pixels, (0.5,) * 3, (0.5,) * 3)[0])


def test_not_on_this_machine(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for why in ("no connection in tests", "HF_HUB_OFFLINE is set"):
        with pytest.raises(MissingOffline) as refused:
            _features.load("clip:ViT-B-32/openai")
        said = str(refused.value)
        assert refused.value.exit_code == 5 and why in said and str(caches / "hub") in said
        assert f"`hf download {OPENAI} open_clip_model.safetensors`" in said
        assert "clip:ViT-B-32-quickgelu/FILE.safetensors" in said  # the architecture that the file would need
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_text_tower_of_transformers(cached: Callable[..., Path], judge_folder: Path, tmp_path: Path) -> None:
    """Only its shape comes from the hub: its weights are in the file."""
    told = {"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    told |= {"intermediate_size": 64, "vocab_size": 600, "pad_token_id": 1, "max_position_embeddings": 90, "bos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = factory._MODEL_CONFIGS["roberta-ViT-B-32"]
    config["vision_cfg"].update(VISION)
    snapshot = cached("roberta-base", tmp_path / "config.json")
    config["text_cfg"]["hf_model_name"] = str(snapshot)
    torch.manual_seed(0)
    model = open_clip.create_model("roberta-ViT-B-32", pretrained_text=False).eval()
    config["text_cfg"]["hf_model_name"] = "roberta-base"
    file = tmp_path / "open_clip_model.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(MissingOffline, match="the tokenizer of the hub's roberta-base"):
        _features.load(f"clip:roberta-ViT-B-32/{file}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        cached("roberta-base", judge_folder / name)
    loaded = _features.load(f"clip:roberta-ViT-B-32/{file}")
    tokens = open_clip.tokenizer.HFTokenizer(str(snapshot), context_length=77)(["a cat", "b"])
    with torch.no_grad():
        close(loaded.encode_text(["a cat", "b"]), model.encode_text(tokens))


def test_wrong_names(weights: Callable[[str], Path], caches: Path, tmp_path: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as e:
            _features.load(name)
        assert e.value.exit_code == 2

    refused("clip:ViT-B-33/openai", r"open_clip has no architecture 'ViT-B-33'.*Did you mean 'ViT-B-32'\?")
    refused("clip:", "no architecture ''")
    refused("clip:hf-hub:some/model", "no architecture 'hf-hub:some'")
    refused("clip:ViT-B-32/openia", r"ViT-B-32 has no weights 'openia'; there are openai, .*Did you mean 'openai'\?")
    refused("clip:ViT-B-32", "has no weights ''; there are openai")
    refused("clip:coca_base/openai", "has no weights 'openai'; none were published")
    refused(
        "clip:ViTamin-L/datacomp1b", r"published as a pickle \(pytorch_model.bin\).*Choose another architecture, or convert"
    )
    refused("clip:ViT-B-32/some/weights.bin", "never as .bin files")
    refused("clip:ViT-B-32/nowhere.safetensors", "no file nowhere.safetensors here")
    file = weights("ViT-B-32")
    refused(f"clip:ViT-B-32{file}", f"Its absolute path needs a second slash: clip:ViT-B-32/{file}")
    refused(f"clip:ViT-B-16/{file}", "open_clip cannot build this model")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    refused(f"clip:ViT-B-32/{tmp_path / 'cut.safetensors'}", "open_clip cannot build this model")
