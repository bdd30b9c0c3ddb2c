"""Making the images of an evaluation, and keeping what is seen of each batch before the next one begins."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..core.candidate import SamplingPlan, Seeds
from ._gallery import Gallery
from ._subject import Subject
from .context import remaining

if TYPE_CHECKING:
    from ..core.sampling import Batch
    from ..evaluate._scorer import Scorer


def draw(
    subject: Subject,
    plan: SamplingPlan | None,
    steps: int | None,
    seeds: Seeds,
    gallery: Gallery,
    part: str,
    what: str,
    scorer: "Scorer | None" = None,
    pictures: int = 0,
) -> None:
    """Make the images that the gallery lacks, and keep what the scorer sees of them; without one, the images themselves."""
    from ..evaluate._scorer import Shown

    progress = subject.context.progress
    left = remaining(progress, what, seeds, gallery.done(part), subject.context.options.chunk)
    if left is None:
        return
    calls, began = subject.sampler.calls, time.monotonic()
    for batch in _asked(subject, subject.sampler.images(plan, left, steps=steps)):
        assert batch.pixels is not None  # latents alone were not asked for
        made = Shown(batch.pixels, batch.latents)
        if scorer is None:
            seen = {"pixels": made.pixels} | ({} if made.latents is None else {"latents": made.latents})
        else:
            seen = scorer.observe(made, _base_of(gallery, batch) if "base" in scorer.needs else None)
        for index, pixels in zip(batch.indices, made.pixels, strict=True):
            if index < pictures:
                gallery.show(index, pixels)
        spent = (subject.sampler.calls - calls, time.monotonic() - began) if scorer is not None else (0, 0.0)
        gallery.add(batch.indices, seen, part, *spent)
        calls, began = subject.sampler.calls, time.monotonic()
        progress.advance()


def _base_of(gallery: Gallery, batch: "Batch") -> Any:
    from ..evaluate._scorer import Shown

    kept = gallery.slice(batch.indices, "base")
    return Shown(kept["pixels"], kept.get("latents"))


def _asked(subject: Subject, batches: "Iterator[Batch]") -> "Iterator[Batch]":
    """Batch by batch, with what the pipeline says of its arguments as one sentence; what is done with a batch is not its fault."""
    while True:
        with subject.asking():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
