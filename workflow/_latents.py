"""How far cuts move the latents that sampling ends with, kept on disk as measured: kill -9 loses one choice of cuts."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut, Seeds, canonical
from ..core.errors import NotFinite
from ..core.files import write_bytes
from ._scores import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.sampling import Sampler

Measure = Callable[["Tensor", "Tensor"], float]  # (latents of the whole model, those with cuts), (N, …) each
FILE = "latents.safetensors"


class Latents:
    """A method's `measure` of the final latents of whole trajectories; asked twice, answered from the file.

    The trajectories are the pipeline's own, with its scheduler, from the same seeds and conditions for every choice of cuts. Of
    a pipeline without latents they are the samples themselves. Only the numbers are kept, and the latents of the whole model.
    """

    what = "mean and spread of the final latents, of the pruned model against those of its parent"

    def __init__(
        self, sampler: "Sampler", seeds: Seeds, steps: int | None, measure: Measure, folder: Path, identity: str, progress: Any
    ) -> None:
        """steps: solver steps of every trajectory; the pipeline's own number where none are given.

        identity: of everything that the numbers depend on beside the cuts. UserError where the folder's file has another.
        """
        from ..core.driving.steering import denoisers

        self.sampler, self.seeds, self.steps, self.measure, self.progress = sampler, seeds, steps, measure, progress
        # Of two, the second takes over at low noise and is not cut.
        self.denoiser = next(iter(denoisers(sampler.pipe).values()))
        self.cuts_scored = self.calls = 0  # in this session: choices of cuts, and denoiser calls of a batch
        self.seconds = 0.0
        self._scores = Scores(folder / "scores.jsonl", identity)
        self.whole = self._kept(folder / FILE, identity)

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """What every option scores, each alone against the whole model; infinite where the samples are not finite."""
        keys = [(canonical(sorted(cut.canonical() for cut in set(cuts))),) for cuts in options]  # their order changes nothing
        self.progress.phase(f"final latents with {len(options)} choices of cuts", len(options))
        for key, cuts in zip(keys, options, strict=True):
            fresh = bool(cuts) and key not in self._scores.known
            if fresh:
                self._scores.add([key], [self._scored(cuts)])
                self.cuts_scored += 1
            self.progress.advance(fresh=fresh)
        return [self._scores.known[key] if cuts else 0.0 for key, cuts in zip(keys, options, strict=True)]

    def facts(self) -> dict[str, object]:
        """What the scores were measured on, for the report."""
        shape = " x ".join(map(str, self.whole.shape[1:]))
        steps = self.steps if self.steps is not None else "the pipeline's own number"
        return {"images": self.seeds.count, "solver steps": steps, "latents": shape}

    def spent(self) -> dict[str, float]:
        """Of this session: what was found in the folder took nothing."""
        if not self.calls:
            return {}
        return {
            "choices_scored": float(self.cuts_scored),
            "denoiser_forwards": float(self.calls),  # of a batch
            "images_in_a_forward": float(min(self.sampler.chunk, self.seeds.count)),
            "seconds_for_scores": self.seconds,
        }

    def _scored(self, cuts: tuple[Cut, ...]) -> float:
        from ..core import surgery

        try:
            with surgery.applied(self.denoiser, cuts):
                score = self.measure(self.whole, self._sampled())
        except NotFinite:
            return math.inf
        return score if math.isfinite(score) else math.inf

    def _sampled(self) -> "Tensor":
        """The final latents of all seeds, (N, …), in float32 on the CPU. Without a plan: the memo answers nothing."""
        import torch

        began, before = time.monotonic(), self.sampler.calls
        try:
            batches = list(self.sampler.images(None, self.seeds, steps=self.steps, output="latents"))
        finally:
            self.calls += self.sampler.calls - before
            self.seconds += time.monotonic() - began
        return torch.cat([batch.latents.float().cpu() for batch in batches if batch.latents is not None])

    def _kept(self, path: Path, identity: str) -> "Tensor":
        """The latents of the whole model, read where they were made before: a resumed run compares with the same bits."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save

        if path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    if (file.metadata() or {}).get("identity") == identity:
                        found: Tensor = file.get_tensor("latents")
                        return found
            except SafetensorError:
                pass  # not written by us, who write it whole: made again
        self.progress.say(f"sampling the final latents of {self.seeds.count} images with the whole model")
        whole = self._sampled().contiguous()
        write_bytes(path, save({"latents": whole}, metadata={"identity": identity}))
        return whole
