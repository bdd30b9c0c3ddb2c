"""Statistics of many images: streamed, in shards, and going on where a killed one stopped.

A build leaves its state beside the output every CHECKPOINT images, in a file that is a statistics file with a position. It is
written only between two of the extractor's batches, so that whoever goes on from it takes the same images into the same
batches, and ends in the same bits as a build that nobody stopped.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.candidate import canonical
from ..core.errors import UserError
from ..core.files import write_bytes
from ._extractor import Features
from ._images import Images, printable
from ._sketch import KEEP
from ._statistics import Builder, Statistics

CHECKPOINT = 2048  # images (files looked at) between two writes of the state: at most these are lost
POSITION = "position"  # in the record of an unfinished build
Told = Callable[[int, bool], None]  # files looked at since the last call; False: by an earlier session

# What an unfinished build was begun with, as its file names it, and how the user knows it.
SETTINGS = {
    "images": "images (files were added, removed or changed)",
    "features": "features",
    "keep": "--keep-features",
    "shard": "--shard or --workers",
    "limit": "--limit",
}


class Extraction:
    """One build: which images, seen by what, and which share of them."""

    def __init__(
        self,
        sources: Sequence[Images],
        features: Features,
        *,
        keep: int = KEEP,
        limit: int | None = None,
        shard: tuple[int, int] = (1, 1),
        signature: str | None = None,
    ) -> None:
        """sources: taken as one list, in this order. limit: the first so many files of it only. shard (i, n): of these, every
        n-th, beginning with the i-th, 1 <= i <= n. signature: of the sources, where it is known already.
        """
        self.sources, self.features, self.keep, self.limit, self.shard = list(sources), features, keep, limit, shard
        self.signature = signature or signature_of(sources)

    @property
    def source(self) -> str:
        """What the statistics say they were taken from."""
        return " + ".join(str(images.source) for images in self.sources)

    @property
    def total(self) -> int:
        """Files to look at."""
        return sum(len(names) for _, names in share(self.sources, self.shard, self.limit))

    @property
    def record(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        f = self.features
        return {
            "images": self.signature,
            "features": [f.name, f.hash, f.resize, f.batch],
            "keep": self.keep,
            "shard": "{}/{}".format(*self.shard),
            "limit": self.limit,
            "names": _names(self.sources),
        }

    def run(
        self,
        partial: Path | None = None,
        every: int = CHECKPOINT,
        told: Told = lambda files, fresh: None,
        *,
        whole: bool = True,
    ) -> Statistics:
        """The statistics; goes on from `partial` where it is there, and leaves its state in it every `every` files.

        whole: fewer than 2 readable images are an error; a shard may hold fewer. The caller removes `partial` once the
        result is safe. Raises UserError if `partial` was begun with something else, or for features that are not finite.
        """
        statistics, done = self.begin(partial)
        given, saved = statistics.n, done
        builder = Builder(self.features, statistics)
        skipped, converted = list(statistics.provenance.skipped), Counter(statistics.provenance.converted)
        if done:
            told(done, False)
        since = done
        for images, names in share(self.sources, self.shard, self.limit, done):
            for name, pixels, kinds in images.pictures(names):
                done += 1
                shown = printable(name) if len(self.sources) == 1 else printable(f"{images.source}/{name}")
                if pixels is None:
                    skipped.append(shown)
                elif images.takes(pixels):
                    given += 1
                    converted.update(kinds)
                    builder.add(pixels[None], shown)
                if done - since >= self.features.batch:
                    told(done - since, True)
                    since = done
                if partial is not None and done - saved >= every and builder.settled:
                    builder.state().describe(skipped=tuple(skipped), converted=dict(sorted(converted.items())))
                    self.save(partial, statistics, done)
                    saved = done
        if done > since:
            told(done - since, True)
        if whole:
            self.check(done - len(skipped), given, skipped)
        found = builder.finish()
        found.describe(skipped=tuple(skipped), converted=dict(sorted(converted.items())))
        return found

    def save(self, partial: Path, statistics: Statistics, done: int) -> None:
        """Leave a state that `run` goes on from: the statistics of the first `done` files."""
        write_bytes(partial, statistics.content(**{POSITION: {**self.record, "done": done}}))

    def begin(self, partial: Path | None) -> tuple[Statistics, int]:
        """The statistics so far, and how many files they are of."""
        if partial is None or not partial.is_file():
            empty = Statistics.by(self.features, self.source, self.keep)
            if self.shard != (1, 1):
                empty.describe(shards=("{}/{}".format(*self.shard),))
            return empty, 0
        statistics, position = Statistics.read(partial, POSITION)
        if position is None:
            raise UserError(f"{partial}: not the state of an unfinished build. Remove it, or choose another --out.")
        check_record(partial, position, self.record)
        return statistics, int(position["done"])

    def check(self, readable: int, given: int, skipped: Sequence[str]) -> None:
        if len(self.sources) == 1:
            self.sources[0].check(readable, given, skipped)
        elif given < 2:
            raise UserError(f"{self.source}: {given} of {self.total} images can be read, statistics need at least 2.")


def share(
    sources: Sequence[Images], shard: tuple[int, int] = (1, 1), limit: int | None = None, done: int = 0
) -> Iterator[tuple[Images, list[str]]]:
    """The files of a shard (see `Extraction`) from its `done`-th on, source by source."""
    first, count = shard
    before = 0  # files of the sources so far
    for images in sources:
        end = len(images.names) if limit is None else max(limit - before, 0)
        names = images.names[(first - 1 - before) % count : end : count]
        before += len(images.names)
        yield images, names[done:]
        done = max(done - len(names), 0)


def signature_of(sources: Sequence[Images]) -> str:
    """Changes when the files do: a hash of their names, sizes and times."""
    digest = hashlib.sha256()
    for images in sources:
        digest.update(b"source\n")
        for stamp in images.stamps():
            digest.update(canonical(stamp).encode() + b"\n")
    return digest.hexdigest()


def _names(sources: Sequence[Images]) -> str:
    """A hash of the files' names: the same on all machines that hold the same files, so that their shards fit together."""
    digest = hashlib.sha256()
    for images in sources:
        digest.update("\n".join(["source", *map(printable, images.names)]).encode())
    return digest.hexdigest()


def check_record(path: Path, begun: dict[str, Any], asked: dict[str, Any], finished: bool = False) -> None:
    """Raises UserError, naming what differs, unless an earlier build was asked for the same."""
    for setting, named in SETTINGS.items():
        if begun.get(setting) != asked.get(setting):
            was = f"; then {begun.get(setting)}, now {asked.get(setting)}" if setting in ("keep", "limit", "shard") else ""
            what_now = "Name another --out" if finished else "Go on as it was begun, or remove it to start anew"
            raise UserError(f"{path}: was {'made' if finished else 'begun'} with other {named}{was}. {what_now}.")
