"""Statistics files: built from images, merged, shown. (`_stats_check` verifies them.)"""

import functools
import glob
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import check_target, locked
from .context import Progress, Silent

if TYPE_CHECKING:
    from ..evaluate._extraction import Extraction
    from ..evaluate._extractor import Features
    from ..evaluate._statistics import Statistics
    from ..evaluate._workers import Job

ENDING = ".safetensors"
BLOCK = 64  # files between two steps of the progress


@dataclass(frozen=True)
class Build:
    """What `lissom stats build` is asked for."""

    sources: tuple[Path, ...]  # folders and zips, or statistics files
    out: Path
    features: str | None = None
    keep: int | None = None  # features of single images; None: 10,000, and of merged files what they have
    limit: int | None = None  # files of the list that are taken
    shard: tuple[int, int] = (1, 1)  # (i, n): every n-th file, beginning with the i-th
    workers: int = 1
    resume: bool = False
    device: str = "auto"
    every: int | None = None  # files between two writes of the state


def build(asked: Build, progress: Progress | None = None) -> dict[str, Any]:
    """Make a statistics file, and say what is in it: what `show` gives, with `seconds` and `finished_already`.

    Raises UserError for sources, features or an output that cannot be used, before any image is read.
    """
    began, progress = time.monotonic(), progress or Silent()
    check_target(asked.out)
    if asked.out.suffix != ENDING:
        raise UserError(f"{asked.out}: a statistics file ends in {ENDING}. Name the output so.")
    if asked.out.exists() and not asked.resume:
        raise UserError(f"{asked.out}: exists already. Name another --out, or add --resume to see whether it is finished.")
    files = [source for source in asked.sources if source.suffix == ENDING]
    if files and len(files) < len(asked.sources):
        raise UserError(
            f"{files[0]}: a statistics file among images. Build statistics of the images first, then merge all the files."
        )
    if twice := next((source for i, source in enumerate(asked.sources) if source in asked.sources[:i]), None):
        raise UserError(f"{twice}: is named twice, and its images would count twice. Name it once.")
    with locked(asked.out.with_name(f".{asked.out.name}.lock"), asked.out):
        was_there = _merge(asked, progress) if files else _extract(asked, progress)
    return {**show(asked.out), "seconds": round(time.monotonic() - began, 2), "finished_already": was_there}


def _extract(asked: Build, progress: Progress) -> bool:
    """From images; True if the file was there."""
    from ..evaluate import _features, _workers
    from ..evaluate._extraction import CHECKPOINT, check_record
    from ..evaluate._sketch import KEEP
    from ..evaluate._statistics import Statistics

    if asked.features is None:
        raise UserError("say with --features what to see the images by, e.g. --features inception, or zoo:judge.")
    count, every = asked.workers, asked.every or CHECKPOINT
    keep = KEEP if asked.keep is None else asked.keep
    job = _workers.Job(asked.sources, asked.features, keep, asked.limit, asked.shard, _features.load)
    partials = _partials(asked)
    where = _workers.devices(asked.device, count)
    features = job.load(asked.features, where[0] if count == 1 else "cpu")  # with workers, only its name and hash are asked for
    extraction = job.extraction(features)
    if asked.out.exists():
        earlier = Statistics.load(asked.out).build
        if "images" not in earlier:
            raise UserError(f"{asked.out}: exists already and was not built from images like this. Name another --out.")
        check_record(asked.out, earlier, extraction.record, finished=True)
        for partial in partials:
            partial.unlink(missing_ok=True)
        return True
    told = Blocks(progress, extraction.total)
    if count == 1:
        statistics = extraction.run(partials[0], every, told, whole=asked.shard == (1, 1))
    else:
        _workers.run(job, partials, asked.device, told, every)
        statistics = _gathered(job, partials, features, extraction)
    statistics.build = extraction.record
    statistics.save(asked.out)
    for left in (*partials, *asked.out.parent.glob(f".{glob.escape(asked.out.name)}.*.tmp")):  # the latter of killed processes
        left.unlink(missing_ok=True)
    _warn(asked.out, statistics, extraction.total, progress)
    return False


def _gathered(job: "Job", partials: list[Path], features: "Features", whole: "Extraction") -> "Statistics":
    """The statistics of all workers together."""
    parts = []
    for number, partial in enumerate(partials, start=1):
        part = job.part(number, len(partials)).extraction(features, whole.signature)
        found, done = part.begin(partial)
        if done < part.total:
            raise UserError(f"{partial}: its worker has not finished. Go on with --resume.")
        parts.append(found)
    merged = functools.reduce(lambda one, other: one.merge(other), parts)
    split = whole.shard != (1, 1)
    merged.describe(source=whole.source, shards=("{}/{}".format(*whole.shard),) if split else ())
    if not split:
        whole.check(whole.total - len(merged.provenance.skipped), merged.n, merged.provenance.skipped)
    return merged


def _partials(asked: Build) -> list[Path]:
    """The state files of a build, one for each worker. Raises UserError for those of another build."""
    stem, count = f"{asked.out.name}.partial", asked.workers
    names = [stem] if count == 1 else [f"{stem}-{i}-of-{count}" for i in range(1, count + 1)]
    there = sorted(path.name for path in asked.out.parent.glob(f"{glob.escape(stem)}*"))
    if there and not asked.resume:
        raise UserError(
            f"{asked.out.parent / there[0]}: an unfinished build of {asked.out.name}. "
            "Go on with --resume, or remove it to start anew."
        )
    if other := [name for name in there if name not in names]:
        was = other[0].rpartition("-of-")[2] if "-of-" in other[0] else "1"
        raise UserError(
            f"{asked.out.parent / other[0]}: an unfinished build with --workers {was}. "
            "Go on with as many, or remove it to start anew."
        )
    return [asked.out.with_name(name) for name in names]


def _merge(asked: Build, progress: Progress) -> bool:
    """From statistics files; True if the file was there."""
    from ..evaluate._statistics import Statistics

    given = {"--features": asked.features, "--limit": asked.limit, "--shard": asked.shard != (1, 1)}
    for flag, value in {**given, "--workers": asked.workers > 1}.items():
        if value:
            raise UserError(f"{flag}: for images only; {asked.sources[0]} holds statistics that are merged as they are.")
    parts = [Statistics.load(path) for path in asked.sources]
    contents: dict[str, Path] = {}
    for path, part in zip(asked.sources, parts, strict=True):
        if part.n and part.hash in contents:
            raise UserError(
                f"{path}: holds the same images as {contents[part.hash]}. Merge each only once, or they count twice."
            )
        contents[part.hash] = path
    record = {"merged": sorted(part.identity(True) for part in parts), "keep": asked.keep}
    if asked.out.exists():
        if Statistics.load(asked.out).build != record:
            raise UserError(f"{asked.out}: exists already and was made from other files. Name another --out.")
        return True
    merged = functools.reduce(lambda one, other: one.merge(other), parts)
    if asked.keep is not None:
        merged.keep_at_most(asked.keep)
    merged.build = record
    merged.save(asked.out)
    if twice := sum(len(part.sketch) for part in parts) - len({key for part in parts for key in part.sketch.keys.tolist()}):
        progress.warn(f"{twice:,} kept images are in more than one of the files: equal images, or images that count twice.")
    if len({part.build["names"] for part in parts if part.provenance.shards and "names" in part.build}) > 1:
        progress.warn("the shards were taken from folders with other files: images may be missing or count twice.")
    bare = next((path for path, part in zip(asked.sources, parts, strict=True) if part.n and not part.sketch.limit), None)
    if bare and any(part.sketch.limit for part in parts):
        progress.warn(f"{bare} holds no features of single images, and so neither does {asked.out}.")
    _warn(asked.out, merged, merged.n + len(merged.provenance.skipped), progress)
    return False


def _warn(out: Path, statistics: "Statistics", total: int, progress: Progress) -> None:
    """What must not be missed about a new file."""
    p = statistics.provenance
    if p.skipped:
        examples = ", ".join(p.skipped[:3]) + (", …" if len(p.skipped) > 3 else "")
        progress.warn(f"{len(p.skipped):,} of {total:,} files cannot be read as images and were left out: {examples}")
        if len(p.skipped) * 2 > total:
            progress.warn(f"MORE THAN HALF of the files cannot be read. Is {p.source} what you mean?")
    if p.converted:
        progress.warn(f"not plain 8-bit RGB: {counted(p.converted)} ({HOW}).")
    for note in _notes(statistics):
        progress.warn(f"{out}: {note}")


HOW = "animated: the first frame; alpha: dropped; grayscale, palette, cmyk, 16-bit: made 8-bit RGB"


def show(path: Path) -> dict[str, Any]:
    """What is in a statistics file, ready for JSON."""
    from ..evaluate._statistics import Statistics

    statistics = Statistics.load(path)
    p = statistics.provenance.model_dump(mode="json")
    return {
        "schema_version": 1,
        "kind": "statistics",
        "file": str(path),
        "lissom": p.pop("version"),
        "n": statistics.n,
        "dim": statistics.dim,
        "kept": len(statistics.sketch),
        "keep": statistics.sketch.limit,
        **p,
        "hash": statistics.hash,
        "checksum": statistics.checksum,
        "singular": statistics.n <= statistics.dim,
        "notes": _notes(statistics),
    }


def _notes(statistics: "Statistics") -> list[str]:
    n, dim, notes = statistics.n, statistics.dim, []
    if statistics.provenance.shards:
        notes.append(f"holds shards {', '.join(statistics.provenance.shards)} only: merge it with the others.")
    elif n <= dim:
        notes.append(
            f"{n:,} images for {dim:,} features: the covariance is singular, and Frechet distances are biased far upward. "
            f"Take more than {dim:,} images, or use kid or cmmd."
        )
    return notes


def say(found: dict[str, Any]) -> str:
    """The content of a statistics file for people."""
    sizes = dict(sorted(found["sizes"].items(), key=lambda item: -item[1]))
    most = counted(dict(list(sizes.items())[:5])) + (f" and {len(sizes) - 5:,} other sizes" if len(sizes) > 5 else "")
    rows = {
        "images": f"{found['n']:,} of {found['source'] or 'unknown source'}",
        "features": f"{found['dim']:,} by {found['features']} ({found['features_hash'][:12]}), {found['resize']}",
        "kept": f"features of {found['kept']:,} single images (at most {found['keep']:,})" if found["keep"] else "none",
        "sizes": most or "unknown",
        "converted": counted(found["converted"]) or "none",
        "skipped": f"{len(found['skipped']):,}: {', '.join(found['skipped'][:3])}" if found["skipped"] else "none",
        "hash": found["hash"],
        "checksum": found["checksum"],
        "lissom": found["lissom"],
    }
    lines = [f"{found['file']}:", *(f"  {name:10} {value}" for name, value in rows.items())]
    return "\n".join([*lines, *(f"  note: {note}" for note in found["notes"])])


def counted(counts: dict[str, int]) -> str:
    """Counts by name.

    >>> counted({"alpha": 2, "grayscale": 1500})
    'alpha 2, grayscale 1,500'
    """
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


class Blocks:
    """Files looked at, as steps of a Progress: one for every BLOCK."""

    def __init__(self, progress: Progress, total: int, what: str = "images") -> None:
        self._progress, self._total, self._seen, self._steps = progress, total, 0, 0
        progress.phase(f"blocks of {BLOCK} {what}", math.ceil(total / BLOCK))

    def __call__(self, files: int, fresh: bool) -> None:
        self._seen += files
        while self._steps < (self._seen // BLOCK if self._seen < self._total else math.ceil(self._total / BLOCK)):
            self._steps += 1
            self._progress.advance(f"{min(self._steps * BLOCK, self._total):,} of {self._total:,}", fresh=fresh)
