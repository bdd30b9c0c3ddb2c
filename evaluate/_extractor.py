"""What an extractor of features is: the part that all of them share. `_features` opens them by name.

Shapes: B images, H x W pixels, S x S what the extractor sees, D features, N images whose features are known, C classes.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SamplingError, UserError
from . import _resize

BATCH = 64  # images or texts per forward pass, whatever the caller's batch: same kernels, same last digits
LARGE = 32  # the same for networks that see 224 pixels and more: half the memory, no slower


class Features:
    """An extractor on a device. A subclass sets the attributes and `forward`; one with a text tower `encode_text` too."""

    name: str  # zoo:judge, inception, ...: what reports print; no path, as records are read on other machines
    dim: int  # D
    hash: str  # sha256 of the weights file
    size: int  # S
    batch: int = BATCH
    has_text = False
    has_probabilities = False  # whether `probabilities` works
    classes: list[dict[str, str]] | None = None  # [{"name": "dress", "caption": "a photo of a dress"}, ...]

    @property
    def resize(self) -> str:
        return _resize.record(self.size)

    def extract(self, pixels: Tensor) -> Tensor:
        """Features of uint8 pixels (B, H, W, 3): float32 (B, D) on the CPU, the same for any B to 1e-5.

        Raises UserError if one is not a finite number.
        """
        parts = [self.forward(self.prepare(part)) for part in pixels.split(self.batch)] if len(pixels) else []
        found = torch.cat(parts) if parts else torch.zeros((0, self.dim))
        bad = (~torch.isfinite(found).all(1)).nonzero().flatten().tolist()
        if bad:
            raise SamplingError(
                f"{self.name}: features of {len(bad)} of {len(found)} images are not finite (first: image {bad[0]})."
            )
        return found

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) of any size -> float32 (B, 3, S, S) in 0..255, image by image."""
        return _resize.resize(pixels, self.size)

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, 3, S, S) in 0..255, B <= batch -> float32 (B, D) on the CPU."""
        raise NotImplementedError

    def encode_text(self, texts: list[str]) -> Tensor:
        """float32 (B, D) on the CPU, not normalised. Raises UserError for an extractor without a text tower."""
        raise UserError(f"{self.name} cannot read text; choose features with a text tower, such as clip:ViT-B-32/openai.")

    def truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than what `encode_text` reads: the rest of them is dropped without a word."""
        return 0

    def probabilities(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """What a classifier says of images by their features (N, D): float32 (N, C) on the CPU, rows that sum to 1.

        classes: (C, D) embeddings of the class captions, for an extractor that classifies by captions; None: its own.
        Raises UserError for an extractor that cannot classify.
        """
        raise UserError(
            f"{self.name} cannot tell classes; choose inception, or an open_clip model with a classes.json, such as zoo:judge."
        )


class Normalised(Features):
    """An extractor in float32 whose network wants pixels of a given mean and standard deviation."""

    def _place(self, device: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """mean and std per channel, of pixels in 0..1."""
        self.device = torch.device(device)
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1) * 255

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), exact(self.device):
            return self._see((images.to(self.device) - self._mean) / self._std).float().cpu()

    def _see(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) on the device -> (B, D)."""
        raise NotImplementedError


def weights_in(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that the folder holds. Raises UserError: the weights must be safetensors."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: no {names[0]} in it. lissom reads weights as safetensors, never as pickles.")
    return found


def local_weights(name: str, where: str) -> Path:
    """The safetensors file that a name ends in. Raises UserError if there is none, or if it is a pickle."""
    path = Path(where).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"features {name!r}: lissom reads weights as safetensors, never as {path.suffix or 'other'} files.")
    if not path.is_file():
        absolute = (
            f" Its absolute path needs a second slash: {name[: -len(where)]}/{where}." if Path("/" + where).is_file() else ""
        )
        raise UserError(f"features {name!r}: no file {path} here.{absolute}")
    return path


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Full float32 on CUDA, where convolutions would round to 10 bits by default and pick kernels by trial."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e}).") from e


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
