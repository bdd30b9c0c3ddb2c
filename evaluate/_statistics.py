"""Mean and covariance of image features: streamed, merged, and saved with everything that makes them comparable.

Shapes: B images, D features, K images whose features are kept.
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
from ..core.errors import SamplingError, UserError
from ..core.files import write_bytes
from ..core.memory import ran_out
from . import _frechet
from ._sketch import KEEP, Sketch, key

if TYPE_CHECKING:
    from ._extractor import Features

FORMAT = 2  # of a file with more than mean and m2, or with conversions or shards named; others stay 1; a newer one is refused
KEY = "lissom_statistics"  # of the provenance in the file's metadata


OPTIONAL = ("function", "converted", "shards")  # entries of a record that format 1 does not know


class Provenance(BaseModel):
    """What the statistics were taken from, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    features: str  # zoo:judge, ...
    features_hash: str  # sha256 of the extractor's weights
    resize: str  # clean-bicubic-32, ...
    source: str = ""  # a folder, a zip, zoo:fashion/train, teacher, ...
    source_hash: str = ""  # sum of the sha256 of all images, modulo 2^256: the same in any order and however it was split
    # Of generated images: a hash of all that they are a function of. They are known by it and not by their pixels, of which
    # another device or library version moves some.
    function: str = ""
    sizes: dict[str, int] = {}  # images by size before resizing: {"28x28": 60000}, width first
    skipped: tuple[str, ...] = ()  # images that could not be read
    converted: dict[str, int] = {}  # images that were not plain 8-bit RGB: {"grayscale": 5, "alpha": 2}; one may count twice
    shards: tuple[str, ...] = ()  # the parts of a build that are here, as long as some are missing: ("1/4", "3/4")
    version: str = __version__  # of lissom


class Statistics:
    """n, mean (D,) and m2 (D, D), the sum of outer products of the deviations from the mean, in float64 on the CPU.

    Chan, Golub and LeVeque 1979: parts are combined without the cancellation of a raw sum of squares, so that any
    split of the images ends in the same statistics to about 1e-12. A `Sketch` beside them keeps the features of some
    single images, for metrics that compare images one by one.
    """

    def __init__(
        self,
        provenance: Provenance,
        n: int = 0,
        mean: Tensor | None = None,
        m2: Tensor | None = None,
        sketch: Sketch | None = None,
    ) -> None:
        self.provenance, self.n = provenance, n
        self.mean = torch.zeros(0, dtype=torch.float64) if mean is None else mean
        self.m2 = torch.zeros((0, 0), dtype=torch.float64) if m2 is None else m2
        self.sketch = Sketch(0) if sketch is None else sketch
        self.build: dict[str, Any] = {}  # what a finished build has to know again when it is asked for once more
        self._root: Tensor | None = None
        self._kept: Tensor | None = None

    @classmethod
    def by(cls, features: Features, source: str = "", keep: int = 0) -> Statistics:
        """Empty statistics of what this extractor sees; features of `keep` images will be kept."""
        identity = Provenance(features=features.name, features_hash=features.hash, resize=features.resize, source=source)
        return cls(identity, sketch=Sketch(keep))

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
    def kept(self) -> Tensor:
        """(K, D) float32: features of single images, in the order of their keys; (0, D) where none are kept."""
        if self._kept is None:
            self._kept = self.sketch.rows.float() if len(self.sketch) else torch.zeros((0, self.dim))
        return self._kept

    def need_kept(self, who: str) -> Tensor:
        """`kept`, for a metric of that name. Raises UserError where there are fewer than 2."""
        if len(self.sketch) < 2:
            there = (
                "features of only one image, too few for what" if len(self.sketch) else "no features of single images, which"
            )
            raise UserError(
                f"{self.provenance.source or 'statistics'}: holds {there} {who} needs: "
                f"build it again with --keep-features {KEEP}."
            )
        return self.kept

    @property
    def hash(self) -> str:
        """sha256 of what the statistics are of: features, resizing, and the images; the same with and without kept features.

        With known images it does not change with the number of threads or the machine, which move the last digits of
        the tensors; statistics of bare features are identified by their bytes.
        """
        p = self.provenance
        content = p.function or p.source_hash or self._digest()
        return hashlib.sha256(canonical([p.features, p.features_hash, p.resize, self.n, content]).encode()).hexdigest()

    @property
    def checksum(self) -> str:
        """sha256 of n and all tensors, as the file holds it."""
        return self._digest(*((self.sketch.keys, self.sketch.rows) if self.sketch.limit else ()))

    def identity(self, kept: bool) -> str:
        """What a metric's value depends on: `hash`, and, for one that uses kept features, also which images they are of."""
        if not kept:
            return self.hash
        if self.provenance.function:  # which images have the smallest hashes is chance
            return hashlib.sha256(f"{self.hash}/{len(self.sketch)}".encode()).hexdigest()
        return hashlib.sha256(self.hash.encode() + self.sketch.keys.numpy().tobytes()).hexdigest()

    def update(self, features: Tensor, keys: Tensor | None = None) -> None:
        """Add images: features (B, D) of any float type, and their keys (B,) int64 where some are to be kept.

        Raises UserError for values that are not finite, or too large to be kept.
        """
        x = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(x).all():
            raise UserError(f"{self.provenance.features} gave features that are not finite for {self.provenance.source}.")
        if self.sketch.limit and keys is None:
            raise ValueError("features can be kept only with the keys of their images")
        if len(x):
            if keys is not None:
                self.sketch.add(keys, features.detach().cpu())
            mean = x.mean(0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of images, equal to one pass over them. Raises UserError if they do not match.

        Kept are as many features as both sides allow: the fewer of the two limits.
        """
        a, b = self.provenance, other.provenance
        _match(a, b.features, b.features_hash, b.resize)
        known = [s for s in (self, other) if s.n]
        merged = a.model_copy(
            update={
                "source": " + ".join(dict.fromkeys(p.source for p in (a, b) if p.source)),
                "source_hash": sum_hashes(p.source_hash for p in (a, b))
                if all(s.provenance.source_hash for s in known)
                else "",
                "function": "",
                "sizes": _added(a.sizes, b.sizes),
                "skipped": a.skipped + b.skipped,
                "converted": _added(a.converted, b.converted),
                "shards": _shards(a.shards + b.shards),
            }
        )
        sketch = Sketch(min((s.sketch.limit for s in known), default=self.sketch.limit))
        result = Statistics(merged, self.n, self.mean.clone(), self.m2.clone(), sketch)
        for side in known:
            sketch.add(side.sketch.keys, side.sketch.rows)
        if other.n:
            result._add(other.n, other.mean, other.m2)
        return result

    def keep_at_most(self, limit: int) -> None:
        """Forget kept features until at most `limit` are left."""
        old, self._kept = self.sketch, None
        self.sketch = Sketch(min(limit, old.limit), old.keys[:limit], old.rows[:limit])

    def check(self, features: Features) -> None:
        """Raises UserError, naming both sides, unless these features and this resizing made the statistics."""
        _match(self.provenance, features.name, features.hash, features.resize)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises DiskError or UserError if it cannot be written.

        Kept features are stored as they are in memory, rounded to float16 (see `Sketch`).
        """
        if not self.provenance.shards:  # a shard may hold one image or none
            self.covariance  # noqa: B018  # refuses what could not be used
        write_bytes(path, self.content())

    def content(self, **also: Any) -> bytes:
        """The bytes of the file; `also` goes into its record."""
        given = {k: v for k, v in self.provenance.model_dump(mode="json").items() if v or k not in OPTIONAL}
        tensors = {"mean": self.mean.contiguous(), "m2": self.m2.contiguous()}
        newer = {"keep": self.sketch.limit, "build": self.build, **also}
        record = {"n": self.n, **given, **{k: v for k, v in newer.items() if v}}
        if self.sketch.limit:
            tensors |= {"keys": self.sketch.keys, "kept": self.sketch.rows}
        record["format"] = FORMAT if record.keys() & {*OPTIONAL, *newer} else 1
        record["checksum"] = self.checksum
        return save(tensors, {KEY: canonical(record)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises UserError for a file that is missing, damaged, newer or something else."""
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: Path, also: str = "") -> tuple[Statistics, Any]:
        """What `content` wrote, and what it was given under the name `also` (None: nothing)."""
        record, tensors = _read(path)
        if record.get("format", 0) > FORMAT:
            raise UserError(f"{path}: written in format {record['format']} by a newer lissom; this one reads up to {FORMAT}.")
        try:
            n, checksum = int(record.pop("n")), record.pop("checksum")
            record.pop("format")
            build, keep, more = record.pop("build", {}), int(record.pop("keep", 0)), record.pop(also, None)
            sketch = Sketch(keep, tensors["keys"], tensors["kept"]) if keep else None
            result = cls(Provenance(**record), n, tensors["mean"], tensors["m2"], sketch)
        except (KeyError, TypeError, ValueError, ValidationError) as e:
            raise UserError(f"{path}: its record is incomplete ({_first_line(e)}). Build the statistics again.") from e
        result.build = build
        if result.checksum != checksum:
            raise UserError(f"{path}: damaged, the numbers do not fit their checksum. Build the statistics again.")
        return result, more

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
        self.n, self._root, self._kept = total, None, None

    def _digest(self, *also: Tensor) -> str:
        digest = hashlib.sha256(str(self.n).encode())
        for tensor in (self.mean, self.m2, *also):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Builder:
    """Statistics of images that come in any number and any size: hashed, resized, and extracted `features.batch` at a time.

    What the extractor sees at a time depends on the order of the images alone, so that the same order gives the same bits.
    """

    def __init__(self, features: Features, statistics: Statistics) -> None:
        """`statistics` are filled: empty ones, or those that an earlier builder of the same features left when settled."""
        self.features, self._statistics = features, statistics
        self._content, self._sizes = statistics.provenance.source_hash, Counter(statistics.provenance.sizes)
        self._waiting: list[tuple[Tensor, int, str]] = []  # resized (3, S, S), key, name

    @property
    def settled(self) -> bool:
        """Whether all images so far have been extracted."""
        return not self._waiting

    def add(self, pixels: Tensor, name: str = "") -> None:
        """uint8 pixels (B, H, W, 3). Raises UserError, with the name, for features that are not finite."""
        pixels = pixels.cpu()
        hashes = [image_hash(image) for image in pixels]
        self._content = sum_hashes([self._content, *hashes])
        self._sizes[f"{pixels.shape[2]}x{pixels.shape[1]}"] += len(pixels)
        self._waiting.extend((image, key(h), name) for image, h in zip(self.features.prepare(pixels), hashes, strict=True))
        while len(self._waiting) >= self.features.batch:
            self._extract()

    def state(self) -> Statistics:
        """The statistics, when settled; more images may follow."""
        if not self.settled:
            raise ValueError(f"{len(self._waiting)} images are waiting")
        self._statistics.describe(source_hash=self._content, sizes=dict(sorted(self._sizes.items())))
        return self._statistics

    def finish(self) -> Statistics:
        """The statistics of all images."""
        if not self.settled:
            self._extract()
        return self.state()

    def _extract(self) -> None:
        now, self._waiting = self._waiting[: self.features.batch], self._waiting[self.features.batch :]
        found = _forward(self.features, torch.stack([image for image, _, _ in now]))
        bad = (~torch.isfinite(found).all(1)).nonzero().flatten().tolist()
        if bad and now[bad[0]][2]:
            raise UserError(
                f"{now[bad[0]][2]}: {self.features.name} gave features that are not finite for this image. "
                "Take it out, or use other features."
            )
        self._statistics.update(found, torch.tensor([k for _, k, _ in now]))


def of(features: Features, batches: Iterable[Tensor], source: str, keep: int = KEEP) -> Statistics:
    """Statistics of images: uint8 batches (B, H, W, 3) of any sizes; features of `keep` of them are kept."""
    builder = Builder(features, Statistics.by(features, source, keep))
    for batch in batches:
        builder.add(batch)
    return builder.finish()


def image_hash(pixels: Tensor) -> str:
    """sha256 of one image (H, W, 3), uint8: its size and its bytes, whatever file they came from."""
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes()).hexdigest()


def _forward(features: Features, images: Tensor) -> Tensor:
    """images (B, 3, S, S) -> (B, D); in halves where memory runs out. Raises SamplingError where it does for one image."""
    try:
        return features.forward(images)
    except Exception as e:
        if not ran_out(e):
            raise
        if len(images) == 1:
            raise SamplingError(f"{features.name}: memory runs out even for one image. Use another --device.") from e
    return torch.cat([_forward(features, part) for part in images.chunk(2)])


def sum_hashes(hashes: Iterable[str]) -> str:
    """A hash of many hashes that does not depend on their order or grouping."""
    return f"{sum(int(h or '0', 16) for h in hashes) % 2**256:064x}"


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(a) + Counter(b)).items()))


def _shards(parts: tuple[str, ...]) -> tuple[str, ...]:
    """What is left of shards "I/N" when every complete set of N is taken as the whole that it is.

    >>> _shards(("1/2", "1/3", "2/2")), _shards(("2/2", "2/2", "1/2"))
    (('1/3',), ('2/2',))
    """
    left = Counter(parts)
    for count in {part.partition("/")[2] for part in left}:
        whole = [f"{i}/{count}" for i in range(1, int(count) + 1)]
        times = min(left[part] for part in whole)
        left.subtract(dict.fromkeys(whole, times))
    return tuple(sorted(left.elements()))


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
