"""Weights that are spread over processes (FSDP): each holds its share of them, and of all that learning adds to them.

The student that the pipeline holds keeps its structure, but gives its weights away; a copy of it with shares of them learns.
So nothing that draws, measures or saves has to know of shares: where weights are needed they are put back for that time.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anatomy


def spread(student: nn.Module, forward: Callable[[], Any], device: str, processes: int) -> nn.Module:
    """A copy of the student with this process's shares of its weights; the student itself holds none afterwards.

    forward: runs the student once, to see which of its parts run on their own. All processes call it at the same time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    addresses = _parts(student)
    addresses = [*_strays(student, addresses, forward), *addresses]  # what is inside others first
    # The copy begins with the student's own weights: there is no room for them twice.
    own = {id(p): nn.Parameter(p.detach().contiguous(), p.requires_grad) for p in student.parameters()}
    learner = copy.deepcopy(student, own)
    mesh = init_device_mesh(device, (processes,))
    for module in [*(learner.get_submodule(address) for address in addresses), learner]:
        name = type(module).__name__
        fully_shard(module, mesh=mesh)
        type(module).__name__ = name  # it is FSDP's own class now; layers are known by the names of theirs
    _release(student)
    return learner


@contextmanager
def gathered(student: nn.Module, shares: Iterable[Tensor], keep: bool) -> Iterator[None]:
    """Inside, the student has these weights, where `keep` says so. All processes have to enter at the same time."""
    for parameter, share in zip(student.parameters(), shares, strict=True):
        whole = _whole(share)
        if keep:
            parameter.data = whole
    try:
        yield
    finally:
        _release(student)


def whole(value: Any, keep: bool) -> Any:
    """A state with full tensors in the host's memory in place of shares, and nothing in their place where not `keep`.

    All processes have to call it with the same state at the same time.
    """
    if _is_share(value):
        full = _whole(value)
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {k: whole(v, keep) for k, v in value.items()}
    return [whole(v, keep) for v in value] if isinstance(value, list) else value


def share(full: Tensor, like: Any) -> Tensor:
    """This process's share of a full tensor, cut and placed as `like` is; the full tensor where that is no share."""
    if not _is_share(like):
        return full
    with torch.no_grad():
        mine: Any = torch.empty_like(like)
        local = mine.to_local()
        start = like.device_mesh.get_local_rank() * math.ceil(len(full) / like.device_mesh.size())
        local.copy_(full[start : start + len(local)])
    out: Tensor = mine
    return out


def held(parameters: Iterable[Any]) -> int:
    """Numbers that this process holds of these parameters."""
    return sum(p.to_local().numel() if _is_share(p) else p.numel() for p in parameters)


def _is_share(value: Any) -> bool:
    """Whether it is a DTensor, asked without an import: torch is also built without its distributed part."""
    return hasattr(value, "full_tensor")


def _whole(tensor: Any) -> Tensor:
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
    return full


def _release(student: nn.Module) -> None:
    """Free the weights. Shapes stay, and whoever runs it nevertheless gets NaN."""
    for parameter in student.parameters():
        parameter.data = parameter.data.new_full((), math.nan).expand(parameter.shape)


def _parts(denoiser: nn.Module) -> list[str]:
    """Addresses of what is gathered as one when it runs: ResNets, transformer blocks; of unknown models, what lists hold."""
    known = [layer.address for layer in anatomy.layers(denoiser) if layer.kind in ("resnet", "transformer_block")]
    listed = [
        f"{name}.{k}"
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList)
        for k in range(len(child))
        if not any(_inside(address, f"{name}.{k}") for address in known)
    ]
    return [a for a in known if not any(a != b and _inside(a, b) for b in known)] + listed


def _strays(denoiser: nn.Module, parts: list[str], forward: Callable[[], Any]) -> list[str]:
    """Addresses inside these parts of what runs while its part does not: a DiT asks its first block to embed the time."""
    running, found, hooks = set[str](), list[str](), []

    def enter(part: str, address: str) -> None:
        if address == part:
            running.add(part)
        elif part not in running and not any(_inside(address, stray) for stray in found):
            found.append(address)

    for part in parts:
        for name, module in denoiser.get_submodule(part).named_modules(prefix=part):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part, name=name: enter(part, name)))
        leave = denoiser.get_submodule(part).register_forward_hook(lambda *_, part=part: running.discard(part))
        hooks.append(leave)
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _inside(address: str, outer: str) -> bool:
    return f"{address}.".startswith(f"{outer}.")
