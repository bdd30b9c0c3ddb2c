"""What generated images are compared with: statistics found, or made once, for one of the two roles of a reference."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from ..core.candidate import canonical
from ..core.errors import UserError
from ..core.methods import suggest
from ._extraction import Extraction
from ._extractor import Features
from ._features import ZOO
from ._images import Images
from ._statistics import Statistics

Role = Literal["search", "report"]
FOLDER = ZOO / "statistics"
HALVES: dict[str, Role] = {"train": "search", "test": "report"}  # a search sees the training images, a report the test images


@dataclass(frozen=True)
class Reference:
    """Statistics and their part in a run."""

    statistics: Statistics
    source: str
    role: Role
    shared: bool  # search and report have to use the same statistics: a report then says so

    @classmethod
    def of(cls, statistics: Statistics, role: Role, shared: bool = False) -> Self:
        """For statistics made elsewhere, such as those of the model's own many-step outputs."""
        return cls(statistics, statistics.provenance.source, role, shared)


def load(source: str, features: Features, role: Role, cache: Path | None = None) -> Reference:
    """The reference SRC of a command line, as these features see it.

    `source`: an image folder or a zip (one half of the images for each role), a statistics file (.safetensors; the
    same for both roles), or zoo:NAME (training images to search with, test images to report; zoo:NAME/train and
    zoo:NAME/test are the same for both roles). Statistics of images hold features of 10,000 single ones too. They are kept
    in `cache` and taken from there while the files stay as they are; a killed run goes on where it was. Raises UserError
    for what is missing, damaged, made by other features, or too few images.
    """
    if source.startswith("zoo:"):
        name, _, part = source.removeprefix("zoo:").partition("/")
        path, shared = _embedded(source, name, part or next(p for p, r in HALVES.items() if r == role)), bool(part)
    elif source.endswith(".safetensors"):
        path, shared = Path(source).expanduser(), True
    else:
        return Reference(_of_images(Path(source).expanduser(), features, role, cache), source, role, shared=False)
    statistics = Statistics.load(path)
    statistics.check(features)
    if missing := statistics.provenance.shards:
        raise UserError(f"{path}: only part {', '.join(missing)} of a reference. Merge all parts with `lissom stats build`.")
    return Reference(statistics, source, role, shared)


def _embedded(source: str, name: str, part: str) -> Path:
    path = FOLDER / f"{name}-{part}.safetensors"
    known = sorted({file.stem.rpartition("-")[0] for file in FOLDER.glob("*.safetensors")})
    if name not in known or part not in HALVES:
        there = ", ".join(f"zoo:{n}" for n in known) or "none"
        hint = suggest(f"zoo:{name}", [f"zoo:{n}" for n in known])
        raise UserError(f"no reference {source!r}; there are {there}, each also with /train or /test.{hint}")
    return path


def _of_images(source: Path, features: Features, role: Role, cache: Path | None) -> Statistics:
    images = Images(source, role)
    identity = [images.signature(), str(source.resolve()), role, features.name, features.hash, features.resize]
    key = hashlib.sha256(canonical(identity).encode()).hexdigest()[:16]
    extraction = Extraction([images], features, signature=key)
    if cache is None:
        return extraction.run()
    kept = cache / f"reference-{role}-{key}.safetensors"
    if kept.is_file():
        with suppress(UserError):  # a damaged copy is made again: the images are still there
            statistics = Statistics.load(kept)
            statistics.check(features)
            if len(statistics.sketch):  # of an earlier lissom, which kept no features of single images
                return statistics
    partial = kept.with_name(f"{kept.name}.partial")  # what a killed run has left
    try:
        extraction.begin(partial)
    except UserError:
        partial.unlink()
    statistics = extraction.run(partial)
    statistics.save(kept)
    partial.unlink(missing_ok=True)
    return statistics
