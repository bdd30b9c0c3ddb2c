"""The training loop: teacher and student see the same noised samples, the weighted losses are summed, the student learns.

Every draw is a function of the sample's number in the training, not of a generator's state: which image, which noise, which level.
So a run that was killed goes on exactly, and one process with accumulation sees what several processes see together.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.anatomy import uncompiled
from ..core.errors import UserError
from ..core.files import disk_errors
from . import _checkpoint, _spread
from ._forward import check_fit, forward
from ._seen import Pairing, Seen, Site, watching

EVERY = 10  # iterations between lines of the log
SAVE_SECONDS = 60.0  # between checkpoints: kill -9 loses at most this much


@dataclass(frozen=True)
class Sample:
    """Inputs of both denoisers, and what the noise says the answer is."""

    kwargs: dict[str, Any]  # of the denoisers' forward, by name; floating tensors in float32
    target: Tensor  # (B, C, …)


class Samples(Protocol):
    """Where training samples come from."""

    def __call__(self, positions: Sequence[int], salt: int) -> Sample:
        """The samples of these numbers. salt: another one gives other noise; it changes after a NaN."""


@dataclass(frozen=True)
class Term:
    """A loss of the sum."""

    name: str
    weight: float
    module: ModuleType
    config: Any
    sites: tuple[Site, ...] = ()

    def __call__(self, seen: Seen) -> Tensor:
        if self.sites:
            own = {site: seen.features[site] for site in self.sites}
            seen = Seen(seen.student, seen.target, seen.teacher, own, seen.done)
        value: Tensor = self.module.loss(seen, self.config)
        return value


@dataclass(frozen=True)
class Settings:
    """How to train."""

    iterations: int
    batch: int  # samples behind each update, over all processes
    accumulate: int = 1  # forwards that each process splits its part of a batch into
    learning_rate: float = 5e-5
    schedule: str = "constant"  # or cosine, to zero
    warmup: int = 0  # iterations of linear warm-up
    weight_decay: float = 0.01
    clip: float | None = 1.0  # of the gradient's norm
    ema: float = 0.999  # decay of the average of weights; 0: none
    check_every: int = 0  # iterations between checks; 0: none
    patience: int = 0  # checks without improvement after which training stops; 0: never


@dataclass
class Outcome:
    """How a training ended."""

    iteration: int
    stopped_early: bool = False
    restarts: int = 0  # after a NaN
    frozen: int = 0  # parameters that no loss reaches
    checks: list[tuple[int, float]] = field(default_factory=list)  # (iteration, value: lower is better)


class Trainer:
    """Trains a student in place. All processes make the same calls."""

    def __init__(
        self,
        pairing: Pairing,
        terms: Sequence[Term],
        samples: Samples,
        settings: Settings,
        accelerator: Any,
        folder: Path,
        identity: str,
        *,
        teacher_context: Callable[[], Any] = nullcontext,
        spread: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """accelerator: an accelerate.Accelerator. folder: keeps checkpoint.pt and losses.jsonl. identity: of everything that
        decides the training. teacher_context: entered around the teacher's forwards (see workflow: offload). spread: the
        student's weights over the processes; it then has them inside `averaged` alone, in the first process.
        """
        share, rest = divmod(settings.batch, accelerator.num_processes * settings.accumulate)
        if rest or not share:
            parts = f"{accelerator.num_processes} processes" + (
                f" x accumulate {settings.accumulate}" * (settings.accumulate > 1)
            )
            raise UserError(f"batch {settings.batch}: cannot be split evenly over {parts}. Choose a multiple of that.")
        self.pairing, self.terms, self.samples, self.settings = pairing, list(terms), samples, settings
        self.accelerator, self.folder, self.identity, self.say = accelerator, folder, identity, say
        self.teacher_context, self.micro, self.spread = teacher_context, share, spread
        self.learner = pairing.student  # its weights are what learns: the student's own, or shares of them in a copy
        self.model: nn.Module | None = None  # the learner as accelerate runs it
        self.sites = list(dict.fromkeys(site for term in self.terms for site in term.sites))
        self.taught = any(term.module.taught for term in self.terms)
        self.outcome = Outcome(0)
        self.salt = 0
        self.window: dict[str, float] = {}  # sums since the last line of the log
        self.counted = 0
        self.done_here = 0  # iterations of this session

    def scales(self) -> dict[str, float]:
        """Each term, unweighted, on the first samples. Freezes what no loss reaches; UserError where the models do not fit."""
        student, reached = self.pairing.student, set[int]()

        def reach(parameter: Tensor) -> None:
            reached.add(id(parameter))
            parameter.grad = None  # one at a time: all of them may not fit before they are spread

        student.requires_grad_(True)
        seen = self._seen(student, list(range(min(self.micro, 8))), probing=True)
        values = {term.name: term(seen) for term in self.terms}
        total = torch.stack([term.weight * values[term.name] for term in self.terms]).sum()
        hooks = [parameter.register_post_accumulate_grad_hook(reach) for parameter in student.parameters()]
        total.backward()
        for hook in hooks:
            hook.remove()
        for parameter in student.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)
                self.outcome.frozen += parameter.numel()
        return {name: value.item() for name, value in values.items()}

    def run(self, check: Callable[[int], float] | None = None, advance: Callable[[str], None] = lambda note: None) -> Outcome:
        """Train to the end, from the checkpoint where there is one.

        check: called every `check_every` iterations with the averaged weights in the student. Raises UserError when the loss
        is not finite a second time.
        """
        s = self.settings
        if self.spread:
            self.learner = self._spread_out()
        learning = [p for p in self.learner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=s.learning_rate, weight_decay=s.weight_decay)
        self.model = self.learner if self.spread else self.accelerator.prepare(self.learner)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.average = self._average()
        self._load()
        saved = time.monotonic()
        self._save()  # where a NaN of the first minute goes back to
        while self.outcome.iteration < s.iterations and not self.outcome.stopped_early:
            at = self.outcome.iteration
            values = self._update(at)
            if values is None:
                self._back(at)
                continue
            self.outcome.iteration = at = at + 1
            self.done_here += 1
            self._log(values, at)
            advance(f"loss {values['total']:.4g}")
            if check is not None and s.check_every and at % s.check_every == 0:
                self._check(check, at)
            if at == s.iterations or self.outcome.stopped_early or self._first(time.monotonic() - saved > SAVE_SECONDS):
                self._save()
                saved = time.monotonic()
        return self.outcome

    def loss_on(self, samples: Samples, batches: int) -> float:
        """The weighted sum on other samples, without learning."""
        mine, total = self.samples, 0.0
        self.samples = samples
        try:
            with torch.no_grad():
                for k in range(batches):
                    seen = self._seen(self.pairing.student, list(range(k * self.micro, (k + 1) * self.micro)))
                    total += sum(term.weight * term(seen).item() for term in self.terms) / batches
        finally:
            self.samples = mine
        return total

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student has its averaged weights."""
        if self.spread:
            shares = self.learner.parameters() if self.average is None else self.average.shadow_params
            with _spread.gathered(self.pairing.student, shares, self.accelerator.is_main_process):
                yield
            return
        if self.average is None:
            yield
            return
        parameters = list(self.pairing.student.parameters())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def _average(self) -> Any:
        from diffusers.training_utils import EMAModel

        return EMAModel(self.learner.parameters(), decay=self.settings.ema) if self.settings.ema else None

    def _spread_out(self) -> nn.Module:
        """The student's weights over the processes; what learns then."""
        student, sample, processes = self.pairing.student, self.samples([0], self.salt), self.accelerator.num_processes
        with torch.no_grad(), self.accelerator.autocast():
            learner = _spread.spread(student, lambda: forward(student, sample.kwargs), self.accelerator.device.type, processes)
        held, count = _spread.held(learner.parameters()), sum(p.numel() for p in learner.parameters())
        self.say(f"weights are spread over {processes} processes: {held:,} of {count:,} are in this one")
        return learner

    def _update(self, at: int) -> dict[str, float] | None:
        """One optimiser step; the terms' values, or None where one is not finite."""
        s, sums = self.settings, torch.zeros(len(self.terms) + 1, device=self.accelerator.device)
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * self._rate(at)
        assert self.model is not None
        start = at * s.batch + self.accelerator.process_index * self.micro * s.accumulate
        for part in range(s.accumulate):
            last = part == s.accumulate - 1
            # To wait for the last part would take room for all gradients in each process: shares are summed after every part.
            with nullcontext() if last or self.spread else self.accelerator.no_sync(self.model):
                first = start + part * self.micro
                seen = self._seen(self.model, list(range(first, first + self.micro)))
                values = torch.stack([term(seen) for term in self.terms])
                total = (values * values.new_tensor([term.weight for term in self.terms])).sum()
                # A layer's weights are gathered again where the way back passes it: no loss may leave the output out.
                if self.spread:
                    total = total + 0.0 * seen.student.sum()
                self.accelerator.backward(total / s.accumulate)
            sums += torch.cat([values.detach(), total.detach()[None]]).float() / s.accumulate
        sums = self.accelerator.reduce(sums, reduction="mean")
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), s.clip if s.clip is not None else math.inf)
        if self.spread:
            norm = norm.full_tensor()
        found = dict(zip([*(term.name for term in self.terms), "total"], sums.tolist(), strict=True))
        fine = all(math.isfinite(v) for v in found.values()) and (
            math.isfinite(float(norm)) or self.accelerator.scaler is not None  # a scaler skips such a step, and goes on
        )
        if fine:
            self.optimizer.step()
            if self.average is not None:
                self.average.step(self.learner.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        # An overflow under a scaler is no step, and not a number that JSON has.
        return {**found, "gradient_norm": float(norm) if math.isfinite(float(norm)) else 0.0} if fine else None

    def _seen(self, model: nn.Module, positions: list[int], probing: bool = False) -> Seen:
        """Both models on the same samples."""
        sample = self.samples(positions, self.salt)
        teacher, theirs = None, dict[str, Tensor]()
        watched = self.learner if model is self.model else uncompiled(self.pairing.student)
        with ExitStack() as stack:
            ours = stack.enter_context(watching(watched, [site.student for site in self.sites]))
            if self.taught:
                with (
                    torch.no_grad(),
                    self.teacher_context(),
                    watching(uncompiled(self.pairing.teacher), [site.teacher for site in self.sites]) as found,
                ):
                    teacher = forward(self.pairing.teacher, sample.kwargs).float()
                    theirs = dict(found)
            with self.accelerator.autocast():
                student = forward(model, sample.kwargs).float()
            features = {site: (ours[site.student], theirs[site.teacher]) for site in self.sites}
        if probing:
            check_fit(student, teacher, features)
        done = self.outcome.iteration / self.settings.iterations
        return Seen(student, sample.target, teacher, features, done)

    def _rate(self, at: int) -> float:
        """Share of the learning rate in iteration `at`, counted from 0."""
        s = self.settings
        if at < s.warmup:
            return (at + 1) / s.warmup
        if s.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (at - s.warmup) / max(s.iterations - s.warmup, 1))) / 2

    def _first(self, mine: float) -> float:
        """What the first process has: clocks and images of the others may differ, their decisions must not."""
        said = torch.tensor([mine], dtype=torch.float64, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(said, 0)
        return float(said.item())

    def _log(self, values: dict[str, float], at: int) -> None:
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.counted += 1
        if at % EVERY and at != self.settings.iterations:
            return
        line = {name: total / self.counted for name, total in self.window.items()}
        self.window, self.counted = {}, 0
        line["learning_rate"] = self.settings.learning_rate * self._rate(at - 1)
        if self.accelerator.is_main_process:
            with disk_errors(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": at, **line}) + "\n")
        self.accelerator.log(line, step=at)

    def _check(self, check: Callable[[int], float], at: int) -> None:
        value = math.nan
        with self.averaged():
            if self.accelerator.is_main_process:  # the others wait
                value = check(at)
        value = self._first(value)
        self.outcome.checks.append((at, value))
        past = [v for _, v in self.outcome.checks]
        best = past.index(min(past))
        if self.settings.patience and len(past) - 1 - best >= self.settings.patience:
            self.outcome.stopped_early = True
            self.say(f"no improvement in {self.settings.patience} checks: stopped after iteration {at}")

    @property
    def log(self) -> Path:
        return self.folder / "losses.jsonl"

    def _save(self) -> None:
        first = self.accelerator.is_main_process
        if not first and not self.spread:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": self.identity,
            "iteration": self.outcome.iteration,
            "salt": self.salt,
            "stopped_early": self.outcome.stopped_early,
            "restarts": self.outcome.restarts,
            "checks": [list(one) for one in self.outcome.checks],
            "window": self.window,
            "counted": self.counted,
            **_checkpoint.learned(self.learner, self.average, self.optimizer, first),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": torch.get_rng_state(),
        }
        if first:
            _checkpoint.write(self.folder / "checkpoint.pt", state)

    def _load(self) -> None:
        state = _checkpoint.read(self.folder / "checkpoint.pt", self.identity, mapped=self.spread)
        if state is not None:
            _checkpoint.learn(state, self.learner, self.average, self.optimizer, self.accelerator.device)
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"])
            self.salt, self.window, self.counted = state["salt"], state["window"], state["counted"]
            self.outcome.iteration, self.outcome.restarts = state["iteration"], state["restarts"]
            self.outcome.stopped_early = state["stopped_early"]
            self.outcome.checks = [(int(at), float(value)) for at, value in state["checks"]]
        if self.accelerator.is_main_process:
            _checkpoint.rewind(self.log, self.outcome.iteration)

    def _back(self, at: int) -> None:
        """Return to the last checkpoint once; the second time is the end."""
        if self.outcome.restarts:
            raise UserError(
                f"the loss became NaN or infinite in iteration {at + 1}, for the second time. The weights of the last good "
                f"iterations are in {self.folder / 'checkpoint.pt'}. Lower the learning rate, or use precision: no."
            )
        self._load()
        self.say(
            f"the loss became NaN or infinite in iteration {at + 1}: back to iteration {self.outcome.iteration}, with other noise"
        )
        self.outcome.restarts, self.salt = 1, self.salt + 1
