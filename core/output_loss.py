"""The output loss of cuts: E |eps(cut) - eps|^2, paired on recorded calls (LAPTOP-Diff, arXiv 2404.11098, its criterion).

A cut changes nothing that runs before the first layer that it touches. So the whole denoiser runs once, its parts' outputs
are kept, and with every cut the parts that ran before are answered with what was kept: the same numbers, for the work of what
comes after. What counts as a part is found from the cuts: whatever holds no cut layer inside runs, or is answered, as one.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import surgery
from .anatomy import uncompiled
from .calibration import Inputs
from .candidate import Cut
from .driving.steering import steerable


class OutputLoss:
    """Losses of cuts, each alone against the whole denoiser, on some recorded calls."""

    def __init__(self, denoisers: Mapping[str, nn.Module], calls: Sequence[Inputs], *, reuse: bool = True) -> None:
        """denoisers: of the pipeline, by component name; the cuts are of the first. Calls of others are passed over.

        reuse: False runs the whole denoiser for every cut, as a check.
        """
        name, self.denoiser = next(iter(denoisers.items()))
        self.calls, self.reuse = [call for call in calls if call.name == name], reuse
        self.seconds = self.whole_seconds = 0.0  # spent on cut denoisers; what as many whole forwards would have taken

    def each(self, options: Sequence[Sequence[Cut]]) -> list[float]:
        """The mean squared difference of outputs per element, summed up in float64; infinite where it is not finite."""
        if not self.calls:
            return [0.0 for _ in options]
        squares, elements = [0.0 for _ in options], 0
        for call in self.calls:
            found, size = self._on(call, options)
            squares = [total + one for total, one in zip(squares, found, strict=True)]
            elements += size
        return [total / elements if math.isfinite(total) else math.inf for total in squares]

    def _on(self, call: Inputs, options: Sequence[Sequence[Cut]]) -> tuple[list[float], int]:
        """(sum of squared differences of every option, elements of the output) on one call."""
        outputs = self.outputs(call, options)
        whole = next(outputs)
        return [_squares(out, whole) for out in outputs], whole.numel()

    def outputs(self, call: Inputs, options: Sequence[Sequence[Cut]]) -> Iterator[Tensor]:
        """What the whole denoiser predicts on a call, then what it predicts with each option's cuts."""
        target = uncompiled(self.denoiser)
        began = self._now()
        with _taped(_parts(target, options) if self.reuse else {}) as tape:
            whole = tape.record(lambda: call(target))
            plain_seconds = self._now() - began
            yield whole
            for cuts in options:
                with surgery.applied(target, cuts):
                    began = self._now()
                    out = tape.replay(lambda: call(target), {id(m) for m in target.modules()})
                    self.seconds += self._now() - began
                self.whole_seconds += plain_seconds
                yield out

    def _now(self) -> float:
        device = next(self.denoiser.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


class _Tape:
    """The outputs of a denoiser's parts in one forward, in the order of the calls."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, Any, Any]] = []  # (id of the part, its output, versions of the tensors in it)
        self.answered = 0  # calls from the start that the tape answers
        self.at: int | None = None  # the next call; None while the tape stands still
        self.recording = self.copying = False

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a forward and keep what the parts return. If a later layer writes into it, keep copies: a second forward."""
        whole = self._run(forward)
        if any(_versions(output) != versions for _, output, versions in self.kept):
            self.copying = True
            whole = self._run(forward)
        return whole

    def replay(self, forward: Callable[[], Tensor], there: set[int]) -> Tensor:
        """A forward that answers every part before the first one that is gone. there: ids of the modules that are left."""
        first = next((i for i, (part, _, _) in enumerate(self.kept) if part not in there), len(self.kept))
        self.answered, self.at = first, 0
        try:
            return forward()
        finally:
            self.at = None

    def __call__(self, part: nn.Module, execute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.recording:
            output = execute(*args, **kwargs)
            kept = _copy(output) if self.copying else output
            self.kept.append((id(part), kept, _versions(kept)))
            return output
        if self.at is None or self.at >= self.answered:
            return execute(*args, **kwargs)
        known, output, _ = self.kept[self.at]
        assert known == id(part), "parts run in the same order until something differs"
        self.at += 1
        return _copy(output) if self.copying else output

    def _run(self, forward: Callable[[], Tensor]) -> Tensor:
        self.kept, self.recording = [], True
        try:
            return forward()
        finally:
            self.recording = False


@contextmanager
def _taped(parts: Mapping[str, nn.Module]) -> Iterator[_Tape]:
    """Pass every call of the parts through a tape, by a subclass of their class, as a steered denoiser does."""
    tape = _Tape()
    classes: dict[str, Any] = {address: type(module) for address, module in parts.items()}
    try:
        for address, module in parts.items():
            module.__dict__["_lissom"] = functools.partial(_through, tape)
            module.__class__ = steerable(classes[address])
        yield tape
    finally:
        for address, module in parts.items():
            module.__class__ = classes[address]
            module.__dict__.pop("_lissom", None)


def _through(tape: _Tape, execute: Callable[..., Any], part: nn.Module, args: Any, kwargs: Any) -> Any:
    return tape(part, execute, args, kwargs)


def _parts(denoiser: nn.Module, options: Sequence[Sequence[Cut]]) -> dict[str, nn.Module]:
    """The modules that run as one: those that no cut reaches into, and that lie in none that is such a part already.

    A cut of a layer replaces it in its parent, so that the parent has to run as it is. One that keeps some layers of a stage
    (`keep_layers`) changes that stage, whose layers are parts then.
    """
    open_: set[str] = {""}
    for cut in (cut for cuts in options for cut in cuts):
        address = cut.address if cut.what == "keep_layers" else cut.address.rpartition(".")[0]
        while address:
            open_.add(address)
            address = address.rpartition(".")[0]
    parts: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for address, module in denoiser.named_modules(remove_duplicate=False):
        above = address.rpartition(".")[0]
        if address in open_ or any(above == p or above.startswith(p + ".") for p in parts) or id(module) in seen:
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            open_.add(address)
            continue
        parts[address] = module
        seen.add(id(module))
    return parts


def _squares(out: Tensor, whole: Tensor) -> float:
    """Summed up in float64, on the CPU: not every device has it."""
    return float((out.float() - whole.float()).cpu().double().square().sum())


def _versions(output: Any) -> list[int]:
    """How often every tensor in an output was written into."""
    return [t._version for t in _tensors(output)]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))


def _copy(output: Any) -> Any:
    """Fresh tensors in the same containers."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return type(output)(**{k: _copy(v) for k, v in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_copy(v) for v in output)
    return output
