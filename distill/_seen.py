"""What a loss is given: the outputs of student and teacher on the same inputs, and their features at matching places."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.errors import UserError
from ..core.standins import STAND_INS, joint_input


@dataclass(frozen=True)
class Site:
    """A place where both models are watched: the output of a layer, of the first tensor where it returns several."""

    student: str  # address in the student, e.g. "up_blocks.1"
    teacher: str


@dataclass(frozen=True)
class Pairing:
    """A student, its teacher, and which layer of the one was which of the other."""

    student: nn.Module
    teacher: nn.Module
    origin: Mapping[str, str]  # every module of the student that the teacher has -> its address there

    def site(self, address: str) -> Site:
        """The place where a layer of the student and its counterpart are watched. UserError where the teacher has none."""
        if (there := self.origin.get(address)) is None:
            raise UserError(
                f"{address}: the teacher has no counterpart of this layer of the student, so that they cannot be compared there. "
                "Name the model that the student was pruned from as the teacher, or leave the losses of features out."
            )
        return Site(address, there)


@dataclass(frozen=True)
class Seen:
    """Some samples as both models saw them. All tensors are float32; B is the number of samples."""

    student: Tensor  # (B, C', …): what the student predicts, a variance included where it predicts one
    target: Tensor  # (B, C, …): what the sample's own noise says, C <= C'
    teacher: Tensor | None = None  # (B, C', …); None where no loss asks for a teacher
    features: Mapping[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of student and teacher, (B, …) each
    done: float = 0.0  # share of the training that is over


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample, in float32. (B, …), (B, …) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


@contextmanager
def watching(denoiser: nn.Module, addresses: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs of the named layers are found in the mapping after each forward: of several the image's.

    With gradient checkpointing a layer runs a second time in the backward; what the first run gave is what counts: take it
    out of the mapping (`dict.copy`) before the backward.
    """
    found: dict[str, Tensor] = {}

    def keep(address: str, module: nn.Module, output: Any) -> None:
        second = STAND_INS.get(type(module).__name__) is joint_input  # text comes first there
        found[address] = output[second] if isinstance(output, tuple) else getattr(output, "sample", output)

    hooks = [
        denoiser.get_submodule(a).register_forward_hook(lambda module, args, out, a=a: keep(a, module, out)) for a in addresses
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
