"""What a prune method learns from (noised samples, or whole trajectories), and a place to keep what it has learned so far."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import memory
from ..core.candidate import Cut, canonical
from ..core.errors import UserError, one_line
from ..core.files import write_bytes
from ..core.stages import PruneStage
from ._gradients import Wanted
from ._subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

GATES, STATE = "gates.safetensors", "learning.pt"
HELD_OUT = 4  # batches under other noise that the loss of a choice of cuts is measured on


class Book:
    """Keeps the state of learning, its result, and how long it took."""

    def __init__(self, stage: PruneStage, subject: Subject, config: Any, folder: Path, identity: str) -> None:
        """config: the method's, with `batch`. folder: keeps everything. identity: of everything that the state depends on.

        UserError where this device or type cannot learn.
        """
        from ..core.anatomy import uncompiled
        from ..core.driving.checkpoint import can_recompute

        options = subject.context.options
        if options.dtype not in ("float32", "fp32"):
            raise UserError(
                f"--dtype {options.dtype}: gates are learned in float32. Leave it out; save_dtype is that of the result."
            )
        if options.offload != "none":
            raise UserError(f"--offload {options.offload}: learning needs the denoiser in one place. Leave it out.")
        self.stage, self.subject, self.config, self.folder, self.identity = stage, subject, config, folder, identity
        self.denoiser: Any = uncompiled(subject.model.denoiser)
        self.device = next(self.denoiser.parameters()).device
        self.by_block: bool = getattr(config, "by_block", False) and getattr(config, "gates", None) is None
        can = can_recompute(self.denoiser)
        if self.by_block and not can:
            raise UserError(f"by_block: diffusers cannot compute blocks of {type(self.denoiser).__name__} again. Leave it out.")
        # Where memory runs out with a single sample, blocks are computed again even if nobody asked for it.
        self._spare = can and hasattr(config, "by_block") and getattr(config, "objective", "final") != "steps"
        self.chunk = min(options.chunk, config.batch)  # samples that are computed at once
        self._began, self._seconds, self._steps = 0.0, 0.0, 0

    def fitting(self, run: Callable[[], float]) -> float:
        """See `_learning.Lesson.fitting`."""
        while True:
            try:
                return run()
            except RuntimeError as e:
                if not memory.ran_out(e):
                    raise
            self._less()  # only after the frame whose traceback holds the tensors is gone

    def _less(self) -> None:
        """Ask for less memory from now on, in ways that change no result but by rounding."""
        if self.chunk > 1:
            self.chunk //= 2
            how = f"in parts of {self.chunk}"
        elif self._spare and not self.by_block:
            self.by_block, how = True, "with blocks computed again in the backward pass"
        else:
            raise UserError(f"{self.device}: out of memory with a single sample to learn from. Take a device with more of it.")
        memory.give_back()
        self.subject.context.progress.warn(f"{self.device}: out of memory; learning goes on {how}")

    def load(self) -> dict[str, Any] | None:
        from ..distill import _checkpoint

        state = _checkpoint.read(self.folder / STATE, self.identity)
        return None if state is None else state["state"]

    def save(self, state: dict[str, Any]) -> None:
        from ..distill import _checkpoint

        _checkpoint.write(self.folder / STATE, {"identity": self.identity, "state": state})

    def keep(self, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> None:
        from safetensors.torch import save

        found = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self.folder / GATES, save(found, metadata={name: json.dumps(value) for name, value in facts.items()}))

    def read(self, path: str) -> "dict[str, Tensor]":
        """What an earlier run kept: a file, or the folder of the run. UserError where there is none."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ..core import artifact

        place = Path(self.subject.context.file(path))
        place = artifact.finished(place) / GATES if place.is_dir() else place
        try:
            found: dict[str, Tensor] = load_file(place)
        except (OSError, SafetensorError) as e:
            raise UserError(
                f"gates: {place}: cannot be read ({one_line(e)}). Name the folder of a run that learned gates."
            ) from e
        return found

    def began(self, iterations: int) -> None:
        self._began = time.monotonic()
        self.subject.context.progress.phase("learning what stays", iterations)

    def advance(self, note: str, *, fresh: bool = True) -> None:
        self._steps += fresh
        self._seconds = time.monotonic() - self._began
        self.subject.context.progress.advance(note, fresh=fresh)

    def spent(self) -> dict[str, float]:
        """Of this session: what was found in the folder took nothing."""
        if not self._steps:
            return {}
        return {
            "learning_steps": float(self._steps),
            "samples_in_a_step": float(self.config.batch),
            "seconds_for_learning": self._seconds,
        }


class Lessons(Book):
    """Noised samples. As losses: what the model was trained with, on samples under noise that was not learned from."""

    what = "training loss of the pruned model on samples under noise that was not learned from"

    def __init__(self, stage: PruneStage, subject: Subject, config: Any, folder: Path, identity: str) -> None:
        """config: the method's, with `images`, `data_steps`, `batch`. Nothing is made yet, but what cannot be done is refused."""
        from ..core.denoiser_calls import Calls
        from ..core.driving.steering import denoisers
        from ..core.noising import Noising
        from ..core.sampling import Sampler
        from ..distill._samples import Noised
        from . import _training_data as data

        super().__init__(stage, subject, config, folder, identity)
        options, seed = subject.context.options, subject.context.recipe.seed
        if len(denoisers(subject.model.pipe)) > 1:
            raise UserError(
                f"{stage.method}: {type(subject.model.pipe).__name__} shares its noise levels between several denoisers, and samples of "
                "all of them say nothing of one. laptop looks at the first one alone."
            )
        wanted = Wanted(config.images, config.data_steps)
        self.data = (
            data.Taught(wanted, subject, folder)
            if stage.data in (None, "teacher")
            else data.Folder(wanted, data.source_of(str(stage.data), subject.context), subject)
        )
        self.identity = hashlib.sha256(canonical([identity, self.data.signature]).encode()).hexdigest()
        sampler = Sampler(
            subject.model.pipe, getattr(self.data, "rows", subject.conditions), chunk=options.chunk, call=subject.call
        )
        with subject.asking():
            calls = Calls(sampler, seed)
        self.data.like = calls.shape
        noising = Noising.of(subject.model.pipe.scheduler)
        self._seen, self._unseen = (
            Noised(self.data, self.data.conditions, calls, noising, s, self.device) for s in (seed, seed + 1)
        )

    def lesson(self) -> "Lessons":
        """See `Task.lesson`."""
        self.data.make()
        return self

    def samples(self, positions: Sequence[int], salt: int) -> "tuple[dict[str, Any], Tensor]":
        found = self._seen(positions, salt)
        return found.kwargs, found.target

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """The training loss of the denoiser with each choice of cuts."""
        from ..core import surgery

        found = []
        for cuts in options:
            with surgery.applied(self.denoiser, cuts):
                found.append(self._loss())
        return found

    def facts(self) -> dict[str, object]:
        """What was learned from, for the report."""
        own = {k: v for k, v in self.data.facts.items() if k == "steps of each"}
        return {"images": len(self.data.conditions), **own, "loss of the whole model": f"{self._loss():.4g}"}

    def _loss(self) -> float:
        import torch

        from ..prune._learning import split

        self.data.make()

        def summed() -> float:
            total, count = 0.0, HELD_OUT * self.config.batch
            with torch.no_grad():
                for few in split(range(count), self.chunk):
                    found = self._unseen(few, 0)
                    answer = self.denoiser(**found.kwargs, return_dict=False)[0].float()[:, : found.target.shape[1]]
                    total += float((answer - found.target.to(answer)).square().mean()) * len(few) / count
            return total

        return self.fitting(summed)
