"""Fashion-MNIST (Xiao et al., https://arxiv.org/abs/1708.07747, MIT licence) as 32x32 RGB images with captions."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
ARCHIVE = "fashion-mnist-train.zip"  # what `--data-only` writes, in lissom's cache
CLASSES = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEMPLATES = ("a photo of {}", "a product photo of {}", "a picture of {}", "an image of {}", "{}")


def phrase(label: int) -> str:
    """The class with its article.

    >>> phrase(9)
    'an ankle boot'
    """
    name = CLASSES[label]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(label: int, template: int = 0) -> str:
    """One of the five captions that the models were trained on."""
    return TEMPLATES[template].format(phrase(label))


def images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, 28, 28) and labels as int64 (N,); split is train (60,000) or t10k (10,000)."""
    pixels = _idx(folder / f"{split}-images-idx3-ubyte.gz", offset=16).reshape(-1, 28, 28)
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", offset=8)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


def to_rgb(pixels: Tensor) -> Tensor:
    """uint8 (B, 28, 28) -> float (B, 3, 32, 32) in [-1, 1]; the margin of 2 is the data's own black."""
    x = torch.nn.functional.pad(pixels.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return x[:, None].expand(-1, 3, -1, -1)


def _idx(path: Path, offset: int) -> np.ndarray:
    if not path.is_file():
        raise SystemExit(
            f"{path}: not found. Install Debian's dataset-fashion-mnist, or pass --data FOLDER with the four .gz files."
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=offset)
