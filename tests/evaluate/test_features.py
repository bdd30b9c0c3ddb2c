import json
import logging
import shutil
import socket
from pathlib import Path

import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate import _features
from lissom.evaluate._extractor import Features
from lissom.tests.evaluate.judge import CLASSES, Means, images, save_judge
from PIL import Image


@pytest.fixture
def copy(judge_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judge_folder, tmp_path / "copy"))


def test_what_a_judge_says_of_itself(judge: Features, judge_folder: Path, tmp_path: Path) -> None:
    assert (judge.name, judge.dim, judge.resize) == ("local-dir:tiny-judge", 16, "clean-bicubic-32")
    assert judge.classes is not None and [row["name"] for row in judge.classes] == list(CLASSES)
    other = _features.load(f"local-dir:{save_judge(tmp_path / 'other', seed=1)}")
    assert len(judge.hash) == 64 and other.hash != judge.hash
    assert _features.load(f"local-dir:{judge_folder}").hash == judge.hash


def test_same_as_open_clip_by_hand(judge: Features, judge_folder: Path) -> None:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{judge_folder}")
    model.eval()  # its batch norms would normalise by the batch at hand
    tokens = open_clip.get_tokenizer(f"local-dir:{judge_folder}")
    pixels, texts = images(5, size=32), ["a bag", "A  shoe", ""]
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(Image.fromarray(image.numpy())) for image in pixels]))
        torch.testing.assert_close(judge.extract(pixels), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(judge.encode_text(texts), model.encode_text(tokens(texts)), rtol=1e-5, atol=1e-6)
    assert judge.extract(pixels).norm(dim=1).sub(1).abs().min() > 0.01  # not normalised


@pytest.mark.parametrize("batch", [1, 7, 64, 150])
def test_any_batch_size_gives_the_same_features(judge: Features, batch: int) -> None:
    pixels = images(150, size=40)
    found = torch.cat([judge.extract(part) for part in pixels.split(batch)])
    assert found.dtype == torch.float32 and found.shape == (150, 16) and not found.requires_grad
    torch.testing.assert_close(found, judge.extract(pixels), rtol=1e-5, atol=1e-5)


def test_texts_in_any_number(judge: Features) -> None:
    texts = [f"a {word}" for word in ("bag", "shirt", "shoe")] * 40
    found = judge.encode_text(texts)
    assert found.shape == (120, 16)
    torch.testing.assert_close(found[117:], judge.encode_text(texts[:3]), rtol=1e-5, atol=1e-5)
    assert judge.encode_text([]).shape == judge.extract(images(0)).shape == (0, 16)


def test_loading_needs_no_network_and_leaves_the_root_logger_alone(judge_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    before = list(logging.getLogger().handlers)
    _features.load(f"local-dir:{judge_folder}").encode_text(["a bag"])
    assert logging.getLogger().handlers == before


def test_nan_is_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "open_clip_model.safetensors")
    weights["visual.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, copy / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"features of 3 of 3 images are not finite \(first: image 0\)"):
        _features.load(f"local-dir:{copy}").extract(images(3, size=32))


def test_unknown_names() -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as e:
            _features.load(name)
        assert e.value.exit_code == 2

    refused(
        "inceptoin", r"no features 'inceptoin'; there are zoo:judge, inception .*clip:.*dinov2:.*Did you mean 'inception'\?"
    )
    refused("zoo:nothing", "no features 'zoo:nothing'")
    refused("local-dir:/nowhere/at/all", "no such folder")
    refused("nowhere/at/all", "no such file or folder here")
    refused("weights.safetensors", "no such file or folder here")
    refused("weights.bin", "never as .bin files")
    refused("", "no features ''")


def test_a_path_that_says_itself_what_it_is(judge: Features, judge_folder: Path, copy: Path, tmp_path: Path) -> None:
    for name in (str(judge_folder), str(judge_folder / "open_clip_model.safetensors")):
        loaded = _features.load(name)
        assert (loaded.name, loaded.hash, loaded.classes) == (judge.name, judge.hash, judge.classes)
    (copy / "open_clip_model.safetensors").rename(copy / "step-9.safetensors")
    assert _features.load(str(copy / "step-9.safetensors")).name == "local-dir:copy/step-9.safetensors"
    lone = tmp_path / "lone.safetensors"
    shutil.copy(judge_folder / "open_clip_model.safetensors", lone)
    for path in (lone, tmp_path):
        with pytest.raises(UserError, match=r"beside the weights. Say what they are: clip:ARCH/.* or dinov2:NAME/"):
            _features.load(str(path))


def test_classes_by_their_captions(judge: Features, judge_folder: Path) -> None:
    assert judge.has_probabilities and judge.classes is not None
    features, captions = judge.extract(images(5, size=32)), judge.encode_text([row["caption"] for row in judge.classes])
    found = judge.probabilities(features, captions)
    assert found.dtype == torch.float32 and found.shape == (5, 3)
    cosine = torch.nn.functional.cosine_similarity(features.double()[:, None], captions.double()[None], dim=2)
    by_hand = (cosine / 0.07).exp()  # open_clip's initial temperature
    torch.testing.assert_close(found.double(), by_hand / by_hand.sum(1, keepdim=True), rtol=2e-3, atol=1e-6)  # saved in fp16
    torch.testing.assert_close(judge.probabilities(features), found)


def test_truncated_texts_are_counted(judge: Features) -> None:
    assert judge.truncated(["a bag", "abcdef", "abcdefg", "abcdefgh " * 9, ""]) == 2  # 8 tokens, two of them start and end
    assert judge.truncated([]) == 0
    torch.testing.assert_close(judge.encode_text(["abcdefg"]), judge.encode_text(["abcdefh"]))


def test_folders_that_are_no_model(copy: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            _features.load(f"local-dir:{copy}")

    config = json.loads((copy / "open_clip_config.json").read_text())

    def rewrite(model: dict[str, object]) -> None:
        (copy / "open_clip_config.json").write_text(json.dumps({**config, "model_cfg": {**config["model_cfg"], **model}}))

    rewrite({"embed_dim": 17})
    refused("open_clip cannot build this model")
    rewrite({"text_cfg": {"hf_model_name": "roberta-base"}})
    refused("text tower 'roberta-base' would come from a hub")
    rewrite({})
    (copy / "tokenizer.json").rename(copy / "elsewhere.json")  # transformers would make up an empty one
    refused("its tokenizer is missing: put its tokenizer.json")
    (copy / "elsewhere.json").rename(copy / "tokenizer.json")
    (copy / "open_clip_config.json").write_text("[]")
    refused("open_clip_config.json: holds no open_clip config")
    (copy / "open_clip_config.json").write_text("{")
    refused("open_clip_config.json: cannot be read")
    (copy / "open_clip_config.json").unlink()
    refused("open_clip_config.json: cannot be read")
    (copy / "open_clip_model.safetensors").rename(copy / "open_clip_pytorch_model.bin")
    refused("never as pickles")


def test_damaged_weights(copy: Path) -> None:
    content = (copy / "open_clip_model.safetensors").read_bytes()
    (copy / "open_clip_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="open_clip cannot build this model"):
        _features.load(f"local-dir:{copy}")


def test_without_a_text_tower() -> None:
    with pytest.raises(UserError, match="means cannot read text"):
        Means().encode_text(["a"])
    with pytest.raises(UserError, match="means cannot tell classes; choose inception, or .*classes.json"):
        Means().probabilities(torch.zeros(1, 4))
    assert not Means().has_probabilities and Means().truncated(["a"]) == 0


@pytest.mark.skipif(
    not (_features.ZOO / "judge" / "open_clip_model.safetensors").is_file(), reason="zoo:judge is being trained"
)
def test_the_embedded_judge() -> None:
    judge = _features.load("zoo:judge")
    assert (judge.name, judge.dim, judge.resize) == ("zoo:judge", 64, "clean-bicubic-32")
    assert judge.classes is not None and len(judge.classes) == 10
    text = torch.nn.functional.normalize(judge.encode_text([row["caption"] for row in judge.classes]))
    assert (text @ text.T - torch.eye(10)).max() < 0.9  # ten captions, ten directions
    assert judge.extract(images(2, size=28)).shape == (2, 64)
    assert judge.has_probabilities and judge.truncated(["a photo of a dress", "a photo of " * 99]) == 1
