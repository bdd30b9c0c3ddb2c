"""Teacher-trajectory error: how far a candidate's images end from those that the model itself makes of the same noise.

A sixteenth of a usual evaluation, in latents, so that nothing is decoded. It measures faithfulness, not quality: at few steps a
plan may reach other images that are as good, which is why schedules learned from a teacher soften such a loss (Tong et al.,
2405.15506). So it screens and does not judge. Solvers that add noise at every step end elsewhere whatever the plan: with them
it says little.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut, SamplingPlan, Seeds, canonical
from ..core.errors import SamplingError
from ..core.measurement import Measurement
from ._evaluator import Score, trimmed
from ._teacher import Teacher, function_of

if TYPE_CHECKING:
    from torch import Tensor

METRIC = "teacher_error"
SCREENED = 16  # images


@dataclass
class Screen:
    """Scores candidates by their distance from the uncut model's own images of `steps` steps."""

    teacher: Teacher
    steps: int
    folder: Path  # keeps the teacher's latents
    _latents: "dict[Seeds, Tensor]" = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Hash of all that values depend on beside plan, cuts and seeds."""
        function = function_of(self.teacher, self.steps, Seeds(role="search", base=0, count=SCREENED))
        model, chunk = self.teacher.model, self.teacher.sampler.chunk
        parts = [METRIC, function, chunk, model.device.partition(":")[0], model.dtype]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()

    def score(self, plan: SamplingPlan | None, seeds: Seeds, *, cuts: tuple[Cut, ...] = ()) -> Score:
        """The mean over images of the squared distance of final latents from the teacher's, in units of the teacher's variance.

        0 is the teacher itself; a candidate that made the teacher's images in any other order would have about 2. Raises
        SamplingError for a pipeline that shows no latents. The teacher's own calls are not counted.
        """
        teacher, sampler = self.teacher, self.teacher.sampler
        wanted = self.latents(seeds)
        began, calls, served = time.monotonic(), sampler.calls, sampler.served
        with trimmed(teacher.model, sampler, plan, cuts) as moved:
            made = self._made(moved, seeds, None)
        if made.shape != wanted.shape:
            raise SamplingError(f"latents of the shape {tuple(made.shape)}, the whole model's have {tuple(wanted.shape)}.")
        measured = Measurement(
            metric=METRIC,
            value=error(made, wanted),
            direction="lower",
            n=seeds.count,
            prompts=teacher.conditions.hash,
            seeds=seeds,
            settings={"steps": self.steps},
            device=teacher.model.device,
            dtype=teacher.model.dtype,
        )
        executed = sampler.calls - calls
        return Score((measured,), executed, executed + sampler.served - served, time.monotonic() - began)

    def latents(self, seeds: Seeds) -> "Tensor":
        """The teacher's final latents (N, …), float64; made once and kept in the folder."""
        if seeds not in self._latents:
            from safetensors.torch import save

            from ..core.files import write_bytes

            model = self.teacher.model
            identity = canonical([function_of(self.teacher, self.steps, seeds), model.device.partition(":")[0], model.dtype])
            path = self.folder / f"teacher-latents-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.safetensors"
            found = _read(path, identity)
            if found is None:
                found = self._made(None, seeds, self.steps)
                write_bytes(path, save({"latents": found}, {"identity": identity}))
            self._latents[seeds] = found
        return self._latents[seeds]

    def _made(self, plan: SamplingPlan | None, seeds: Seeds, steps: int | None) -> "Tensor":
        import torch

        batches = self.teacher.sampler.images(plan, seeds, steps=steps, output="latents")
        return torch.cat([b.latents.double().cpu() for b in batches if b.latents is not None])


def error(made: "Tensor", teacher: "Tensor") -> float:
    """Mean squared difference of latents (N, …) over the variance of the teacher's between images, N >= 2, both float64."""
    variance = (teacher - teacher.mean(0)).square().sum() / (len(teacher) - 1)
    if variance == 0:
        raise SamplingError("all images of the model are the same: distances from them have no unit.")
    return ((made - teacher).square().sum() / len(teacher) / variance).item()


def _read(path: Path, identity: str) -> "Tensor | None":
    """The latents of a file, or None where it is missing, damaged, or of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kept: Any = file.metadata() or {}
            return file.get_tensor("latents") if kept.get("identity") == identity else None
    except (OSError, SafetensorError, json.JSONDecodeError):
        return None
