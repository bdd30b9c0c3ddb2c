"""Reference statistics of a model's own many-step images, for when there is no data set: made in one pass for all extractors."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.candidate import Scheduler, Seeds, canonical
from ..core.conditions import Conditions
from ..core.errors import UserError
from ..core.models import Model
from .context import Context, remaining

if TYPE_CHECKING:
    from ..core.sampling import Batch, Sampler
    from ..evaluate._extractor import Features
    from ..evaluate._statistics import Statistics

DONE = "done"  # in the record of unfinished statistics: how many images they are of


@dataclass(frozen=True)
class Teacher:
    """A model, ready to paint with many steps."""

    model: Model
    conditions: Conditions
    sampler: "Sampler"
    context: Context


def taught(
    teacher: Teacher, role: Literal["search", "report"], cache: Path, extractors: "Sequence[Features]"
) -> "dict[str, Statistics]":
    """By each extractor's hash. Kept in `cache`, finished or not, so that kill -9 loses about a batch of images.

    The two roles have other seeds than each other, and than everything that is measured.
    """
    from ..evaluate._statistics import Statistics

    evaluate, seed, progress = teacher.context.recipe.evaluate, teacher.context.recipe.seed, teacher.context.progress
    count = evaluate.samples
    seeds = Seeds(role="calibrate", base=seed, count=count, start=0 if role == "search" else count)
    function = function_of(teacher, evaluate.teacher_steps, seeds)
    model = teacher.model
    source = (
        f"teacher: {model.ref}, {evaluate.teacher_steps} steps, seeds calibrate/{seed}/{seeds.start}+{count}, weights "
        f"{model.fingerprint[:16]}, conditions {teacher.conditions.hash[:16]}, function {function[:16]}, {model.device}, {model.dtype}"
    )
    if len(teacher.conditions) > count:
        progress.warn(
            f"{len(teacher.conditions)} conditions but {count} images: candidates and the model's own images show "
            "different ones. Give as many samples as conditions, or fewer conditions."
        )
    paths = {features.hash: cache / f"teacher-{role}-{features.hash[:12]}.safetensors" for features in extractors}
    found = {}
    for key, path in paths.items():
        with suppress(UserError):  # missing or damaged: made again
            statistics = Statistics.load(path)
            if statistics.provenance.source == source:
                found[key] = statistics
    lacking = [_Unfinished(f, paths[f.hash], source, function) for f in extractors if f.hash not in found]
    if lacking:
        _paint(teacher, seeds, evaluate.teacher_steps, lacking, f"{role} reference, {evaluate.teacher_steps} steps an image")
        for one in lacking:
            found[one.features.hash] = one.finish()
    return found


def function_of(teacher: Teacher, steps: int, seeds: Seeds) -> str:
    """A hash of all that its images are a function of; device and data type only move their last digits."""
    call = {key: repr(value) for key, value in teacher.sampler.call.items()}
    scheduler = Scheduler.of(teacher.model.pipe.scheduler).plain()
    parts = [teacher.model.fingerprint, scheduler, call, teacher.conditions.hash, steps, seeds.plain()]
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


class _Unfinished:
    """Statistics on their way, with a state beside their file."""

    def __init__(self, features: "Features", path: Path, source: str, function: str) -> None:
        """function: hash of all that the images are a function of."""
        from ..evaluate._sketch import KEEP
        from ..evaluate._statistics import Builder, Statistics

        self.features, self.path, self.partial, self.function = features, path, path.with_suffix(".part"), function
        statistics, self.done = Statistics.by(features, source, KEEP), 0
        if self.partial.is_file():
            kept, done = Statistics.read(self.partial, DONE)
            if kept.provenance.source == source and done is not None:
                statistics, self.done = kept, int(done)
        self.builder: Builder = Builder(features, statistics)

    def add(self, batch: "Batch", start: int) -> None:
        """The images of a batch that are not in yet; start: the index of the first of all."""
        assert batch.pixels is not None  # latents alone were not asked for
        new = self.done - (batch.indices.start - start)
        if new < len(batch.indices):
            self.builder.add(batch.pixels[max(new, 0) :])
            self.done = batch.indices.stop - start

    def save(self) -> None:
        from ..core.files import write_bytes

        write_bytes(self.partial, self.builder.state().content(**{DONE: self.done}))

    def finish(self) -> "Statistics":
        statistics = self.builder.finish()
        statistics.describe(function=self.function)
        statistics.save(self.path)
        self.partial.unlink(missing_ok=True)
        return statistics


def _paint(teacher: Teacher, seeds: Seeds, steps: int, lacking: list[_Unfinished], what: str) -> None:
    """Make the images that at least one of them lacks."""
    progress, done = teacher.context.progress, min(one.done for one in lacking)
    left = remaining(progress, what, seeds, done, teacher.context.options.chunk)
    if left is None:
        return
    for batch in teacher.sampler.images(None, left, steps=steps):
        for one in lacking:
            one.add(batch, seeds.start)
        if all(one.builder.settled for one in lacking):
            for one in lacking:
                one.save()
        progress.advance()
