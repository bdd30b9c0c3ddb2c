"""Learning gates: what a method learns from, and the loop. Killed, it goes on exactly where it was."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..core.masking import Masks

SAVE_SECONDS = 60.0  # between saves: kill -9 loses at most this much


class Lesson(Protocol):
    """What a method learns from. Everything about sample or trajectory number n is a function of n and the run's seed."""

    device: Any
    folder: Any
    chunk: int  # samples that are computed at once
    by_block: bool  # whether the backward pass computes blocks again

    def fitting(self, run: Callable[[], float]) -> float:
        """What `run` comes to; where memory runs out, it is run again with `chunk` halved, at last `by_block`. UserError where that
        is too much still."""

    def samples(self, positions: Sequence[int], salt: int) -> "tuple[dict[str, Any], Tensor]":
        """Keyword arguments of the denoiser's forward, and what it should answer, (B, C, …). salt: another one, other noise.

        Of a method that says `calibrated = "learned"`.
        """

    def distance(self, positions: Sequence[int], masks: "Masks") -> "Tensor":
        """How far the final latents of whole trajectories move under masks: the mean square, as a share of the latents' variance.

        With the graph of all steps. Of a method that says `calibrated = "trajectories"`.
        """

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, if any; UserError where it is of another run."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace it, whole or not at all."""

    def keep(self, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> None:
        """Write gates.safetensors: what was learned, to be cut again otherwise."""

    def read(self, path: str) -> "dict[str, Tensor]":
        """What an earlier run kept. UserError where there is none."""

    def began(self, iterations: int) -> None:
        """The learning begins."""

    def advance(self, note: str, *, fresh: bool = True) -> None:
        """A step is done."""


def split(positions: range, most: int) -> list[range]:
    """In parts of at most so many.

    >>> split(range(5, 10), 2)
    [range(5, 7), range(7, 9), range(9, 10)]
    """
    return [positions[k : k + most] for k in range(0, len(positions), most)]


class Settings(Protocol):
    """What the loop reads of a method's Config."""

    @property
    def iterations(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def clip(self) -> float: ...


class Loop:
    """An optimiser over named parameters, an average of some of them, and a state that survives kill -9."""

    def __init__(
        self,
        lesson: Lesson,
        groups: "Sequence[dict[str, Any]]",
        averaged: "Mapping[str, nn.Parameter]",
        config: Settings,
        loss: "Callable[[int, int], Generator[Tensor, None, None]]",
        pace: Callable[[int], float] = lambda at: 1.0,
    ) -> None:
        """groups: of AdamW, each with its `params` as a mapping of names. averaged: those whose mean is asked for.

        loss: (step, salt) -> what the step makes smaller, in parts that are summed, each asked for when the one before is done
        with its graph. salt: another one, other noise; it changes after a NaN. pace: share of the learning rates in a step.
        """
        import torch

        self.lesson, self.config, self.loss, self.averaged, self.pace = lesson, config, loss, averaged, pace
        self.rates = [group["lr"] for group in groups]
        self.named = {name: p for group in groups for name, p in group["params"].items()}
        self.optimizer = torch.optim.AdamW([{**g, "params": list(g["params"].values())} for g in groups], weight_decay=0.0)
        self.average = {name: p.detach().clone() for name, p in averaged.items()}
        self.at, self.salt, self.restarts = 0, 0, 0

    def run(self) -> "dict[str, Tensor]":
        """Learn to the end; the averages."""
        c = self.config
        self._restore()
        self.lesson.began(c.iterations)
        for _ in range(self.at):
            self.lesson.advance("", fresh=False)
        saved = time.monotonic()
        self._save()  # where a NaN of the first minute goes back to
        while self.at < c.iterations:
            loss = self._step()
            if loss is None:
                self._back()
                continue
            self.at += 1
            self.lesson.advance(f"loss {loss:.4g}")
            if self.at == c.iterations or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        return self.average

    def _step(self) -> float | None:
        """One step of the optimiser; the loss, or None where something is not finite."""
        import torch

        c = self.config
        loss = self.lesson.fitting(self._summed)
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), c.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            return None
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.pace(self.at)
        self.optimizer.step()
        decay = min(c.ema, (1 + self.at) / (10 + self.at))  # a short search is not averaged with its beginning
        for name, p in self.averaged.items():
            self.average[name].lerp_(p.detach(), 1 - decay)
        fine = all(bool(torch.isfinite(p.detach()).all()) for p in self.averaged.values())
        return loss if fine else None

    def _summed(self) -> float:
        """The loss of this step; its gradients are then in the parameters."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with torch.enable_grad(), closing(self.loss(self.at, self.salt)) as parts:  # closed too where memory runs out
            for part in parts:
                part.backward()
                total += part.item()
        return total

    def _save(self) -> None:
        state = {
            "at": self.at,
            "salt": self.salt,
            "restarts": self.restarts,
            "chunk": self.lesson.chunk,
            "named": {name: p.detach() for name, p in self.named.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        self.lesson.save(state)

    def _restore(self) -> None:
        import torch

        state = self.lesson.load()
        if state is None:
            return
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(state["named"][name])
        self.average = {name: value.to(self.averaged[name]) for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.salt, self.restarts = state["at"], state["salt"], state["restarts"]
        self.lesson.chunk = min(self.lesson.chunk, state["chunk"])  # what fitted, to the last bit

    def _back(self) -> None:
        """Return to the last save once, with other noise; the second time is the end."""
        at = self.at + 1
        if self.restarts:
            raise UserError(
                f"the loss or the gates became NaN or infinite in step {at}, for the second time. What was learned before is kept in "
                f"{self.lesson.folder}. Lower the learning rates."
            )
        self._restore()
        self.restarts, self.salt = 1, self.salt + 1
        self._save()


@contextmanager
def updated(denoiser: "nn.Module", how: str, rank: int, seed: int = 0) -> "Iterator[dict[str, nn.Parameter]]":
    """Inside, a denoiser with weights that learn, by name: low-rank ones beside every linear layer, all of its own, or none.

    Afterwards it has the layers, the weights and the settings that it had. seed: of the first low-rank weights.
    """
    import torch
    from torch import nn

    before = [(p, p.requires_grad, p.grad) for p in denoiser.parameters()]
    whole = {name: p.detach().clone() for name, p in denoiser.named_parameters()} if how == "full" else {}
    linear = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)} if how == "lora" else {}
    adapted = "peft_config" in vars(denoiser)  # before
    try:
        for p, *_ in before:
            p.requires_grad_(how == "full" and p.is_floating_point())
            p.grad = None
        if linear:
            from peft import LoraConfig, inject_adapter_in_model

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linear)), denoiser)
        yield {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    finally:
        for name, module in linear.items():
            above, _, last = name.rpartition(".")
            setattr(denoiser.get_submodule(above), last, module)
        with torch.no_grad():
            for name, p in denoiser.named_parameters():
                if name in whole:
                    p.copy_(whole[name])
        if linear and not adapted:
            vars(denoiser).pop("peft_config", None)
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
