"""Learning gates: the loop that TinyFusion and others share. Killed, it goes on exactly where it was."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ._depth_gates import Gates

SAVE_SECONDS = 60.0  # between saves: kill -9 loses at most this much


class Lesson(Protocol):
    """What a method learns from. Everything about sample number n is a function of n and the run's seed."""

    device: Any
    folder: Any

    def samples(self, positions: Sequence[int], salt: int) -> "tuple[dict[str, Any], Tensor]":
        """Keyword arguments of the denoiser's forward, and what it should answer, (B, C, …). salt: another one, other noise."""

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, if any; UserError where it is of another run."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace it, whole or not at all."""

    def keep(self, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> None:
        """Write gates.safetensors: what was learned, to be cut again otherwise."""

    def began(self, iterations: int) -> None:
        """The learning begins."""

    def advance(self, note: str, *, fresh: bool = True) -> None:
        """A step is done."""


class Settings(Protocol):
    """What the loop reads of a method's Config."""

    @property
    def iterations(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def update(self) -> Literal["lora", "full", "none"]: ...
    @property
    def rank(self) -> int: ...
    @property
    def update_rate(self) -> float: ...
    @property
    def gate_rate(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def clip(self) -> float: ...


class Loop:
    """Trains gates, and an update of the weights that is thrown away at the end: the denoiser leaves as it came."""

    def __init__(
        self,
        lesson: Lesson,
        denoiser: "nn.Module",
        gates: "Gates",
        config: Settings,
        draw: Callable[[int, int], None],
        seed: int,
    ) -> None:
        """draw: (step, samples) sets the gates' masks of that step. seed: of the first weights of the update."""
        self.lesson, self.denoiser, self.gates, self.config, self.draw = lesson, denoiser, gates, config, draw
        self.seed = seed
        self.at, self.salt, self.restarts = 0, 0, 0

    def run(self) -> "list[Tensor]":
        """Learn to the end; the averaged logits."""
        import torch

        c = self.config
        with updated(self.denoiser, c.update, c.rank, self.seed) as weights, self.gates.on(self.denoiser):
            groups = [{"params": list(self.gates.logits), "lr": c.gate_rate}]
            groups += [{"params": list(weights.values()), "lr": c.update_rate}] if weights else []
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            self.weights = weights
            self.average = [g.detach().clone() for g in self.gates.logits]
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
        kwargs, target = self.lesson.samples(range(self.at * c.batch, (self.at + 1) * c.batch), self.salt)
        self.draw(self.at, len(target))
        with torch.enable_grad():
            answer = self.denoiser(**kwargs, return_dict=False)[0].float()[:, : target.shape[1]]
            loss = torch.nn.functional.mse_loss(answer, target.to(answer))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(every, c.clip))
        if not math.isfinite(loss.item()) or not math.isfinite(norm):
            return None
        self.optimizer.step()
        decay = min(c.ema, (1 + self.at) / (10 + self.at))  # a short search is not averaged with its beginning
        for mean, now in zip(self.average, self.gates.logits, strict=True):
            mean.lerp_(now.detach(), 1 - decay)
        return loss.item() if self.gates.finite() else None

    def _save(self) -> None:
        state = {
            "at": self.at,
            "salt": self.salt,
            "restarts": self.restarts,
            "logits": [g.detach() for g in self.gates.logits],
            "average": self.average,
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        self.lesson.save(state)

    def _restore(self) -> None:
        import torch

        state = self.lesson.load()
        if state is None:
            return
        with torch.no_grad():
            for g, value in zip(self.gates.logits, state["logits"], strict=True):
                g.copy_(value)
            for name, p in self.weights.items():
                p.copy_(state["weights"][name])
        self.average = [value.to(g) for g, value in zip(self.gates.logits, state["average"], strict=True)]
        self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.salt, self.restarts = state["at"], state["salt"], state["restarts"]

    def _back(self) -> None:
        """Return to the last save once, with other noise; the second time is the end."""
        at = self.at + 1
        if self.restarts:
            raise UserError(
                f"the loss or the gates became NaN or infinite in step {at}, for the second time. What was learned before is kept in "
                f"{self.lesson.folder}. Lower update_rate and gate_rate."
            )
        self._restore()
        self.restarts, self.salt = 1, self.salt + 1
        self._save()


@contextmanager
def updated(denoiser: "nn.Module", how: str, rank: int, seed: int = 0) -> "Iterator[dict[str, nn.Parameter]]":
    """Inside, a denoiser with weights that learn, by name: low-rank ones beside every linear layer, all of its own, or none.

    Afterwards it has the layers, the weights and the settings that it had.
    """
    import torch
    from torch import nn

    before = [(p, p.requires_grad, p.grad) for p in denoiser.parameters()]
    whole = {name: p.detach().clone() for name, p in denoiser.named_parameters()} if how == "full" else {}
    linear = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)} if how == "lora" else {}
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
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
