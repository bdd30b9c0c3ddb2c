"""A randomly initialised judge in the same format as zoo:judge, and extractors that need no model at all."""

import json
from pathlib import Path

import torch
from lissom.evaluate._extractor import Features
from safetensors.torch import save_file
from torch import Tensor

CLASSES = ("shirt", "shoe", "bag")
CONTEXT = 8


def save_judge(folder: Path, seed: int = 0) -> Path:
    """An open_clip folder of a tiny ResNet and text tower: 16 features of 32x32 pixels, fp16 weights, three classes."""
    from open_clip.model import CLIP
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=CONTEXT).save_pretrained(folder)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
        "text_cfg": {
            "context_length": CONTEXT, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "local", "vocab_size": len(words)
        },
    }  # fmt: skip
    torch.manual_seed(seed)
    weights = CLIP(**model).state_dict()  # type: ignore[arg-type]
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(half, folder / "open_clip_model.safetensors")
    preprocess = {"size": 32, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    (folder / "classes.json").write_text(json.dumps([{"name": c, "caption": f"a {c}"} for c in CLASSES]))
    return folder


class Means(Features):
    """Features that a test can work out by hand: red, green, blue means and the red standard deviation."""

    name, dim, hash, size, batch = "means", 4, "f" * 64, 8, 5

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(2)
        return torch.cat([flat.mean(2), flat[:, :1].std(2)], dim=1)


class Words(Means):
    """Means with a text tower: a text's embedding is its character counts of r, g, b and x."""

    has_text = True

    def __init__(self) -> None:
        self.classes = [{"name": name, "caption": name[0]} for name in ("red", "green", "blue")]

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(text.count(c)) for c in "rgbx"] for text in texts]).view(-1, 4)


def images(n: int, size: int = 8, seed: int = 0) -> Tensor:
    """Random uint8 pixels (n, size, size, 3)."""
    return torch.randint(256, (n, size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
