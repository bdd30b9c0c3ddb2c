"""The door to feature extractors: what turns images into numbers that a metric can compare.

Shapes: B images, H x W pixels, S x S what the extractor sees, D features.
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
from ..core.methods import suggest
from . import _resize

BATCH = 64  # images or texts per forward pass, whatever the caller's batch: same kernels, same last digits
ZOO = Path(__file__).parents[1] / "zoo"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


class Features:
    """An extractor on a device. A subclass sets the attributes and `forward`; one with a text tower `encode_text` too."""

    name: str  # zoo:judge, ...: what reports print
    dim: int  # D
    hash: str  # sha256 of the weights file
    size: int  # S
    batch: int = BATCH
    has_text = False
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
        raise UserError(f"{self.name} cannot read text; choose features with a text tower, such as zoo:judge.")


class OpenClip(Features):
    """A CLIP-like model from a folder as open_clip writes it (its schema local-dir:), computed in float32."""

    has_text = True

    def __init__(self, name: str, folder: Path, device: str) -> None:
        """Raises UserError if the folder is not such a model."""
        weights = next((folder / w for w in WEIGHTS if (folder / w).is_file()), None)
        if weights is None:
            raise UserError(f"{folder}: no {WEIGHTS[0]} in it. lissom reads open_clip models as safetensors, never as pickles.")
        config = _json(folder / "open_clip_config.json")
        self.name, self.device = name, torch.device(device)
        self.hash = _sha256(weights)
        try:
            self._model = _build(config["model_cfg"], weights).eval().requires_grad_(False).to(self.device)
            self._tokens = _tokenizer(config["model_cfg"]["text_cfg"], folder)
            self.size = _square(self._model.visual.image_size)
            self.dim = int(config["model_cfg"]["embed_dim"])
        except UserError:
            raise
        except Exception as e:  # open_clip checks little: a wrong config ends in any kind of error
            raise UserError(f"{folder}: open_clip cannot build this model ({type(e).__name__}: {e}).") from e
        if (folder / "classes.json").is_file():
            self.classes = _json(folder / "classes.json")
        mean, std = _normalisation(config.get("preprocess_cfg", {}))
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1) * 255

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), _exact(self.device):
            return self._model.encode_image((images.to(self.device) - self._mean) / self._std).float().cpu()

    def encode_text(self, texts: list[str]) -> Tensor:
        parts = [torch.zeros((0, self.dim))]
        with torch.no_grad(), _exact(self.device):
            for start in range(0, len(texts), self.batch):
                ids = self._tokens(texts[start : start + self.batch]).to(self.device)
                parts.append(self._model.encode_text(ids).float().cpu())
        return torch.cat(parts)


def load(name: str, device: str = "cpu") -> Features:
    """The extractor of this name: zoo:NAME, or local-dir:FOLDER of an open_clip model.

    Raises UserError with what there is.
    """
    kind, _, where = name.partition(":")
    if kind == "zoo" and where in _embedded():
        return OpenClip(name, ZOO / where, device)
    if kind == "local-dir":
        folder = Path(where).expanduser()
        if not where or not folder.is_dir():
            raise UserError(f"features {name!r}: no such folder. Give local-dir:FOLDER with an open_clip model in it.")
        return OpenClip(f"local-dir:{folder.resolve().name}", folder, device)  # a record is read on other machines too
    known = [f"zoo:{n}" for n in _embedded()]
    there = ", ".join([*known, "local-dir:FOLDER"])
    raise UserError(
        f"no features {name!r}; there are {there} (an open_clip model). "
        f"Inception and open_clip's downloads come with a later version.{suggest(name, known)}"
    )


def _embedded() -> list[str]:
    return sorted(path.parent.name for path in ZOO.glob("*/open_clip_config.json"))


def _build(config: dict[str, Any], weights: Path) -> Any:
    """The model itself. open_clip's own factory would do, but it may prefer a pickle and sets up the root logger."""
    from open_clip.coca_model import CoCa
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    config = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    if "hf_model_name" in config["text_cfg"]:
        raise UserError(f"{weights.parent}: its text tower {config['text_cfg']['hf_model_name']!r} would come from a hub.")
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False  # the weights are in the file
    custom = config.pop("custom_text", False)
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    model = kind(**config)
    load_checkpoint(model, str(weights), strict=True)
    return model


def _tokenizer(text: dict[str, Any], folder: Path) -> Any:
    """Texts -> token ids (B, context), with the tokenizer files of the folder if its config says so, else CLIP's own."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    context = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text.get("tokenizer_kwargs", {})
    if text.get("hf_tokenizer_name"):
        return HFTokenizer(str(folder), context_length=context, tokenizer_mode=text.get("tokenizer_mode"), **options)
    return SimpleTokenizer(context_length=context, **options)


def _normalisation(preprocess: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return tuple(preprocess.get("mean", OPENAI_DATASET_MEAN)), tuple(preprocess.get("std", OPENAI_DATASET_STD))


def _square(size: int | tuple[int, int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"images must be square, this model wants {size}")
    return sides.pop()


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Full float32 on CUDA, where convolutions would round to 10 bits by default and pick kernels by trial."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e}).") from e


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
