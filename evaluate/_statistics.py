"""Mean and covariance of image features: streamed, merged, and saved with everything that makes them comparable.

Shapes: B images, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..core.candidate import canonical
from ..core.errors import UserError
from ..core.files import write_bytes
from . import _frechet

if TYPE_CHECKING:
    from ._features import Features

FORMAT = 1  # of the file; a newer one is refused
KEY = "lissom_statistics"  # of the provenance in the file's metadata


class Provenance(BaseModel):
    """What the statistics were taken from, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: str  # zoo:judge, ...
    features_hash: str  # sha256 of the extractor's weights
    resize: str  # clean-bicubic-32, ...
    source: str = ""  # a folder, a zip, zoo:fashion/train, teacher, ...
    source_hash: str = ""  # sum of the sha256 of all images, modulo 2^256: the same in any order and however it was split
    sizes: dict[str, int] = {}  # images by size before resizing: {"28x28": 60000}, width first
    skipped: tuple[str, ...] = ()  # images that could not be read
    version: str = __version__  # of lissom


class Statistics:
    """n, mean (D,) and m2 (D, D), the sum of outer products of the deviations from the mean, in float64 on the CPU.

    Chan, Golub and LeVeque 1979: parts are combined without the cancellation of a raw sum of squares, so that any
    split of the images ends in the same statistics to about 1e-12.
    """

    def __init__(self, provenance: Provenance, n: int = 0, mean: Tensor | None = None, m2: Tensor | None = None) -> None:
        self.provenance, self.n = provenance, n
        self.mean = torch.zeros(0, dtype=torch.float64) if mean is None else mean
        self.m2 = torch.zeros((0, 0), dtype=torch.float64) if m2 is None else m2
        self._root: Tensor | None = None

    @classmethod
    def by(cls, features: Features, source: str = "") -> Statistics:
        """Empty statistics of what this extractor sees."""
        identity = Provenance(features=features.name, features_hash=features.hash, resize=features.resize, source=source)
        return cls(identity)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by n - 1."""
        if self.n < 2:
            raise UserError(f"{self.provenance.source or 'statistics'}: a covariance needs 2 images, got {self.n}.")
        return self.m2 / (self.n - 1)

    @property
    def root(self) -> Tensor:
        """(D, r) float64 with covariance = root @ root.T; worked out once, as every Frechet distance needs it."""
        if self._root is None:
            self._root = _frechet.root(self.covariance)
        return self._root

    @property
    def hash(self) -> str:
        """sha256 of what the statistics are of: features, resizing, and the images.

        With known images it does not change with the number of threads or the machine, which move the last digits of
        the tensors; statistics of bare features are identified by their bytes.
        """
        p = self.provenance
        content = p.source_hash or self._checksum()
        return hashlib.sha256(canonical([p.features, p.features_hash, p.resize, self.n, content]).encode()).hexdigest()

    def update(self, features: Tensor) -> None:
        """Add images: features (B, D) of any float type. Raises UserError for values that are not finite."""
        x = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise UserError(f"{self.provenance.features} gave features that are not finite for {self.provenance.source}.")
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of images, equal to one pass over them. Raises UserError if they do not match."""
        a, b = self.provenance, other.provenance
        _match(a, b.features, b.features_hash, b.resize)
        known = [s for s in (self, other) if s.n]
        merged = a.model_copy(
            update={
                "source": " + ".join(dict.fromkeys(p.source for p in (a, b) if p.source)),
                "source_hash": _sum(p.source_hash for p in (a, b)) if all(s.provenance.source_hash for s in known) else "",
                "sizes": dict(Counter(a.sizes) + Counter(b.sizes)),
                "skipped": a.skipped + b.skipped,
            }
        )
        result = Statistics(merged, self.n, self.mean.clone(), self.m2.clone())
        if other.n:
            result._add(other.n, other.mean, other.m2)
        return result

    def check(self, features: Features) -> None:
        """Raises UserError, naming both sides, unless these features and this resizing made the statistics."""
        _match(self.provenance, features.name, features.hash, features.resize)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises DiskError or UserError if it cannot be written."""
        self.covariance  # noqa: B018  # refuses what could not be used
        record = {"format": FORMAT, "n": self.n, "checksum": self._checksum(), **self.provenance.model_dump(mode="json")}
        write_bytes(path, save({"mean": self.mean.contiguous(), "m2": self.m2.contiguous()}, {KEY: canonical(record)}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises UserError for a file that is missing, damaged, newer or something else."""
        record, tensors = _read(path)
        if record.get("format", 0) > FORMAT:
            raise UserError(f"{path}: written in format {record['format']} by a newer lissom; this one reads up to {FORMAT}.")
        try:
            n, checksum = int(record.pop("n")), record.pop("checksum")
            record.pop("format")
            result = cls(Provenance(**record), n, tensors["mean"], tensors["m2"])
        except (KeyError, TypeError, ValueError, ValidationError) as e:
            raise UserError(f"{path}: its record is incomplete ({_first_line(e)}). Build the statistics again.") from e
        if result._checksum() != checksum:
            raise UserError(f"{path}: damaged, the numbers do not fit their checksum. Build the statistics again.")
        return result

    def describe(self, **changes: Any) -> None:
        """Fill in provenance that is known only after the last image."""
        self.provenance = self.provenance.model_copy(update=changes)

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> None:
        if self.n and self.dim != len(mean):
            raise ValueError(f"statistics of {self.dim} features cannot take {len(mean)}")
        total = self.n + n
        if self.n:
            shift = mean - self.mean
            self.mean = self.mean + shift * (n / total)
            self.m2 = self.m2 + m2 + torch.outer(shift, shift) * (self.n * n / total)
        else:
            self.mean, self.m2 = mean.clone(), m2.clone()
        self.n, self._root = total, None

    def _checksum(self) -> str:
        digest = hashlib.sha256(str(self.n).encode())
        for tensor in (self.mean, self.m2):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def of(features: Features, batches: Iterable[Tensor], source: str) -> Statistics:
    """Statistics of images: uint8 batches (B, H, W, 3) of any sizes, resized one by one and extracted many at a time."""
    result = Statistics.by(features, source)
    waiting: list[Tensor] = []  # resized images (3, S, S)
    content = ""
    sizes: Counter[str] = Counter()
    for batch in batches:
        pixels = batch.cpu()
        sizes[f"{pixels.shape[2]}x{pixels.shape[1]}"] += len(pixels)
        content = _sum([content, *(image_hash(image) for image in pixels)])
        waiting.extend(features.prepare(pixels))
        while len(waiting) >= features.batch:
            result.update(features.forward(torch.stack(waiting[: features.batch])))
            del waiting[: features.batch]
    if waiting:
        result.update(features.forward(torch.stack(waiting)))
    result.describe(source_hash=content, sizes=dict(sorted(sizes.items())))
    return result


def image_hash(pixels: Tensor) -> str:
    """sha256 of one image (H, W, 3), uint8: its size and its bytes, whatever file they came from."""
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes()).hexdigest()


def _sum(hashes: Iterable[str]) -> str:
    """A hash of many hashes that does not depend on their order or grouping."""
    return f"{sum(int(h or '0', 16) for h in hashes) % 2**256:064x}"


def _match(a: Provenance, name: str, weights: str, resize: str) -> None:
    if (a.features, a.features_hash, a.resize) != (name, weights, resize):
        raise UserError(
            f"{a.source or 'statistics'}: made by {a.features} ({a.features_hash[:12]}, {a.resize}), which cannot be compared"
            f" with {name} ({weights[:12]}, {resize}). Use the same features, or build the statistics again from images."
        )


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: no such statistics file.")
    try:
        with safe_open(path, framework="pt") as f:
            record = json.loads((f.metadata() or {}).get(KEY, "null"))
            tensors = {key: f.get_tensor(key) for key in f.keys()} if record else {}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a statistics file ({_first_line(e)}). Build it again.") from e
    if not isinstance(record, dict):
        raise UserError(f"{path}: a safetensors file, but not of feature statistics. Give a file that lissom wrote.")
    return record, tensors


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
