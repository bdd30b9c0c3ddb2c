"""Single operators that can be left out: what takes a tensor and gives one of the same shape. Its input passes through.

A finer unit than the layers of `anatomy`, listed only where it is asked for (`units: [operator]`). What is listed: convolutions
and linear layers with as many channels out as in (stride 1, padding that keeps the size), norms and activations; each of them
called at least once in a forward, with a tensor of the shape that it returns.

Not listed: whatever lies inside an attention. Its linear layers and norms are called, fused or read as weights by a processor,
which can be exchanged in a model that is open already (IP adapters, fused projections), so that a test with one of them says
nothing of the others: attention is cut as a whole. Nor are operators inside the stand-in of an earlier cut, and those of
which a parent reads more than what they return.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import surgery
from .anatomy import Layer, uncompiled
from .candidate import Cut
from .standins import Absent

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = ("GroupNorm", "LayerNorm", "FP32LayerNorm", "RMSNorm", "BatchNorm2d")  # of torch and of diffusers alike


def operators(denoiser: nn.Module, forward: Callable[[], Any]) -> list[Layer]:
    """Every operator that can be left out, in the order of `named_modules()`, with the MACs that it takes in this forward.

    forward: runs the denoiser once on any input of one image, in eval mode; on the meta device too.
    """
    denoiser = uncompiled(denoiser)
    macs: dict[str, int | None] = {}  # None: it has been seen with an output of another shape
    hooks = []
    for address, module in _leaves(denoiser):

        def watch(module: Any, args: Any, output: Any, address: str = address) -> None:
            alike = len(args) == 1 and isinstance(output, Tensor) and _same(args[0], output)
            before = macs.get(address, 0)
            macs[address] = before + output.numel() * _per_element(module) if alike and before is not None else None

        hooks.append(module.register_forward_hook(watch))
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for address, spent in macs.items():
        if spent is not None:
            module = denoiser.get_submodule(address)
            params = sum(p.numel() for p in module.parameters())
            argument = list(inspect.signature(type(module).forward).parameters)[1]
            found.append(Layer(address, "operator", params, spent, "input", returns=argument))
    order = {address: i for i, (address, _) in enumerate(denoiser.named_modules())}
    return _running(denoiser, sorted(found, key=lambda layer: order[layer.address]), forward)


def _leaves(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Operators whose class says that they keep the shape, outside of attentions and stand-ins."""
    outside: list[tuple[str, nn.Module]] = []
    closed: list[str] = []  # what nothing is listed of
    for address, module in denoiser.named_modules():
        if any(address.startswith(a + ".") for a in closed):
            continue
        if address and (isinstance(module, Absent) or "Attention" in type(module).__name__):
            closed.append(address)
        elif address and _keeps_shape(module):
            outside.append((address, module))
    return outside


def _keeps_shape(module: Any) -> bool:
    if any(True for _ in module.children()):
        return False
    if isinstance(module, CONVOLUTIONS):
        size = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padded = module.padding == "same" or [2 * p for p in module.padding if not isinstance(p, str)] == size
        return module.in_channels == module.out_channels and set(module.stride) == {1} and padded
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    kind = type(module)
    activation = kind.__module__ in ("torch.nn.modules.activation", "diffusers.models.activations")
    return activation or kind.__name__ in NORMS


def _same(given: Any, output: Tensor) -> bool:
    return isinstance(given, Tensor) and given.shape == output.shape and given.dtype == output.dtype


def _per_element(module: Any) -> int:
    """Multiply-accumulates behind an element of the output; as in `cost`, norms and activations have none."""
    if isinstance(module, CONVOLUTIONS):
        return int(module.in_channels // module.groups * torch.Size(module.kernel_size).numel())
    return int(module.in_features) if isinstance(module, nn.Linear) else 0


def _running(denoiser: nn.Module, found: list[Layer], forward: Callable[[], Any]) -> list[Layer]:
    """Those without which the denoiser still runs: a parent may read weights or settings of an operator."""

    def runs(layers: list[Layer]) -> bool:
        cuts = [Cut(address=layer.address, what="remove", value=layer.returns) for layer in layers]
        try:
            with surgery.applied(denoiser, cuts), torch.no_grad():
                forward()
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
        return True

    return found if runs(found) else [layer for layer in found if runs([layer])]
