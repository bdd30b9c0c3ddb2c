"""Gradients of a denoiser's training loss, summed over noise levels and kept on disk: kill -9 loses a minute of them."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import memory
from ..core.candidate import Cut, canonical, image_seed
from ..core.errors import SamplingError, UserError
from ..core.files import disk_errors
from ..core.stages import PruneStage
from ._subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "gradients.safetensors"
SAVE_SECONDS = 60.0  # between writes of the file
LOOKS = 8  # noise levels at most that all cuts together are measured at

Counts = Callable[[Sequence[float]], bool]  # told the losses so far: whether the last of them is added


@dataclass(frozen=True)
class Wanted:
    """Data of a prune stage, as `_training_data` is asked for it."""

    images: int
    data_steps: int | None
    flip: bool = False


class Gradients:
    """The sum of the gradients of L_t over noise levels t, on one batch and one noise for all t."""

    what = "E |eps(pruned) - eps|^2 per element on the calibration batch, at noise levels that counted"

    def __init__(
        self, stage: PruneStage, subject: Subject, layers: Sequence[str], steps: int | None, folder: Path, identity: str
    ) -> None:
        """layers: addresses of those whose parameters are looked at; all where none are named. steps: of the trajectories whose
        ends are the data, where no images are given. folder: keeps the file. identity: of everything that the sums depend on
        beside the data; UserError where the folder's file has another. Nothing is made yet, but what cannot be done is refused.
        """
        from ..core.anatomy import uncompiled
        from ..core.denoiser_calls import Calls
        from ..core.noising import Noising
        from ..core.sampling import Sampler
        from . import _training_data as data

        _check(stage, subject)
        self.subject, self.progress = subject, subject.context.progress
        self.denoiser: Any = uncompiled(subject.model.denoiser)
        inside = tuple(address + "." for address in layers)
        self.parameters = {n: p for n, p in self.denoiser.named_parameters() if not inside or n.startswith(inside)}
        wanted = Wanted(stage.calibration, steps)
        self.data = (
            data.Taught(wanted, subject, folder)
            if stage.data in (None, "teacher")
            else data.Folder(wanted, data.source_of(str(stage.data), subject.context), subject)
        )
        self.path = folder / FILE
        self.identity = hashlib.sha256(canonical([identity, self.data.signature, sorted(self.parameters)]).encode()).hexdigest()
        self.noising = Noising.of(subject.model.pipe.scheduler)
        options, seed = subject.context.options, subject.context.recipe.seed
        conditions = getattr(self.data, "rows", subject.conditions)
        with subject.asking():
            sampler = Sampler(subject.model.pipe, conditions, chunk=options.chunk, call=subject.call)
            self.calls = Calls(sampler, seed)
        self.data.like = self.calls.shape
        self.seed, self.chunk, self.count = seed, options.chunk, min(stage.calibration, len(self.data.conditions))
        self.losses: dict[float, float] = {}  # of the visited levels
        self.ended = False  # at a level that does not count
        self.forwards = self.backwards = 0  # of one image, in this session
        self.seconds = 0.0

    @contextmanager
    def gradients(self, stride: int, counts: Counts) -> Iterator[Mapping[float, float]]:
        """See `Task.gradients`."""
        first = 1 if self.noising.kind == "flow" else 0  # at 0 of a flow there is no noise to tell from
        times = [float(t) for t in range(first, first + self.noising.levels, stride)]
        self._ready()
        before = [(p, p.requires_grad, p.grad) for p in self.denoiser.parameters()]
        try:
            for p in self.denoiser.parameters():
                p.grad = None
                p.requires_grad_(False)
            for p in self.parameters.values():
                p.requires_grad_(p.is_floating_point())
            self.progress.phase(f"gradients at up to {len(times)} noise levels", len(times))
            began = time.monotonic()
            while not self._visited(times, counts):  # only after the frame whose traceback holds the tensors is gone
                self._halve()
            self.seconds += time.monotonic() - began
            yield dict(self.losses)
        finally:
            for p, flag, grad in before:
                p.grad = grad
                p.requires_grad_(flag)

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """How far cuts move what the denoiser answers: the mean over some of the levels that counted."""
        import torch

        from ..core import surgery

        counted = self._counted()
        times = [counted[i * len(counted) // min(LOOKS, len(counted))] for i in range(min(LOOKS, len(counted)))]
        totals = [0.0] * len(options)
        with torch.no_grad():
            for t in times:
                for part in self._parts():
                    whole = self._answer(t, part)[0]
                    for i, cuts in enumerate(options):
                        with surgery.applied(self.denoiser, cuts):
                            gap = (self._answer(t, part)[0] - whole).square().mean().item()
                        totals[i] += gap * len(part) / (self.count * len(times))
        return totals

    def facts(self) -> dict[str, object]:
        """What the gradients were taken on, for the report."""
        counted = self._counted()
        own = {k: v for k, v in self.data.facts.items() if k == "steps of each"}
        levels = f"{len(counted)} of {len(self.losses)} visited, t = {counted[0]:g} to {counted[-1]:g}" if counted else "none"
        return {
            "images": self.count,
            **own,
            "timesteps that counted": levels,
            "largest loss": f"{max(self.losses.values(), default=0.0):.4g}",
        }

    def spent(self) -> dict[str, float]:
        """Of this session: what was found in the folder took nothing."""
        if not self.forwards:
            return {}
        return {
            "forwards_of_one_image": float(self.forwards),
            "backwards_of_one_image": float(self.backwards),
            "seconds_for_gradients": self.seconds,
        }

    def _counted(self) -> list[float]:
        visited = list(self.losses)
        return visited[:-1] if self.ended else visited

    def _ready(self) -> None:
        """The batch and its noise, the same for all levels."""
        import torch

        self.data.make()
        self.clean = self.data(range(self.count))
        self.noise = torch.stack([self._noise(i) for i in range(self.count)])

    def _noise(self, index: int) -> "Tensor":
        """Not that which the image itself was made from."""
        import torch

        drawn = torch.Generator().manual_seed(image_seed("calibrate, noise", self.seed, index))
        return torch.randn(tuple(self.clean.shape[1:]), generator=drawn)

    def _visited(self, times: Sequence[float], counts: Counts) -> bool:
        """Go on from what is on disk to the end; False where memory runs out on the way."""
        self._restore()
        done, saved = len(self.losses), time.monotonic()
        try:
            for number, t in enumerate(times):
                if number < done:
                    self.progress.advance(fresh=False)
                    continue
                if self.ended:
                    break
                self._visit(t, counts)
                self.progress.advance(f"loss {self.losses[t]:.4g}")
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        except RuntimeError as e:
            if not memory.ran_out(e):
                raise
            return False
        if len(self.losses) > done or not self.path.is_file():
            self._save()
        return True

    def _visit(self, t: float, counts: Counts) -> None:
        """The loss of one level, and its gradient if it counts. A batch that is taken in parts runs forward twice then."""
        import torch

        parts = self._parts()
        with torch.set_grad_enabled(len(parts) == 1):
            losses = [self._loss(t, part) for part in parts]
        value = math.fsum(loss.item() for loss in losses)
        if not math.isfinite(value):
            raise UserError(
                f"the loss at timestep {t:g} is NaN or infinite: {self.subject.model.ref} is broken, or its data is."
            )
        if not counts([*self.losses.values(), value]):
            self.losses[t], self.ended = value, True
            return
        for loss, part in zip(losses, parts, strict=True):
            with torch.enable_grad():
                (loss if loss.requires_grad else self._loss(t, part)).backward()
            self.backwards += len(part)
        self.losses[t] = value

    def _loss(self, t: float, part: range) -> "Tensor":
        """A part's share of the mean over the batch."""
        answer, target = self._answer(t, part)
        self.forwards += len(part)
        return (answer - target).square().sum() / (target[0].numel() * self.count)

    def _answer(self, t: float, part: range) -> "tuple[Tensor, Tensor]":
        """What the denoiser answers at a level, a variance left out, and what it should: (B, C, …) each."""
        import torch

        device = next(iter(self.parameters.values())).device
        times = torch.full((len(part),), t)
        clean, noise = self.clean[part.start : part.stop].to(device), self.noise[part.start : part.stop].to(device)
        shown, target = self.noising(clean, noise, times.long() if self.noising.kind != "flow" else times)
        # Under guidance a step calls the denoiser with and without the condition: images take turns.
        rows = [i % self.calls.rows for i in part]
        kwargs = self.calls([self.data.conditions[i] for i in part], rows, shown, times)
        out = self.denoiser(**kwargs, return_dict=False)[0].float()
        return out[:, : target.shape[1]], target

    def _parts(self) -> list[range]:
        return [range(start, min(start + self.chunk, self.count)) for start in range(0, self.count, self.chunk)]

    def _halve(self) -> None:
        largest = min(self.chunk, self.count)
        if largest == 1:
            raise SamplingError(
                "out of memory while the gradient of a single image is taken. Use a larger device, or narrow include."
            )
        self.chunk = -(-largest // 2)
        self.progress.warn(f"out of memory: gradients go on with {self.chunk} images at a time")

    def _restore(self) -> None:
        """Zero, or what an earlier run left. UserError where that was under other conditions."""
        import torch
        from safetensors import SafetensorError, safe_open

        self.losses, self.ended = {}, False
        for p in self.parameters.values():  # zero too for what no loss reaches
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
                if told.get("identity") != self.identity:
                    raise UserError(
                        f"{self.path}: holds gradients that were summed under other conditions (device, chunk, prompts, data, "
                        "settings, or another lissom). Go on as the run was started, or choose another --out."
                    )
                for name in file.keys():  # noqa: SIM118  not a dict
                    parameter = self.parameters[name]
                    parameter.grad = file.get_tensor(name).to(parameter)
                self.losses, self.ended = {float(t): v for t, v in json.loads(told["losses"])}, told["ended"] == "yes"
        except SafetensorError:
            return  # not written by us, who write it whole: made again

    def _save(self) -> None:
        from safetensors.torch import save_file

        found = {name: p.grad.contiguous() for name, p in self.parameters.items() if p.grad is not None}
        told = {
            "identity": self.identity,
            "losses": json.dumps(list(self.losses.items())),
            "ended": "yes" if self.ended else "no",
        }
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".tmp")
            save_file(found, beside, metadata=told)
            beside.replace(self.path)


def _check(stage: PruneStage, subject: Subject) -> None:
    """UserError for what gradients cannot be taken of."""
    from ..core.driving.steering import denoisers

    options, model = subject.context.options, subject.model
    if options.dtype not in ("float32", "fp32"):
        raise UserError(
            f"--dtype {options.dtype}: gradients are summed in float32. Leave it out; save_dtype is that of the result."
        )
    if options.offload != "none":
        raise UserError(f"--offload {options.offload}: gradients need the denoiser in one place. Leave it out.")
    there: list[nn.Module] = list(denoisers(model.pipe).values())
    if len(there) > 1:
        raise UserError(
            f"{stage.method}: {type(model.pipe).__name__} shares its noise levels between {len(there)} denoisers, and losses "
            "over all of them say nothing of one. laptop looks at the first one alone."
        )
    if any(p.is_meta for p in there[0].parameters()):
        raise UserError(
            f"{stage.method}: {model.ref} is a structure without weights, which has no gradients. Use one with weights."
        )
