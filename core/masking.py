"""Heads, units, channels and modulation channels masked by factors that may learn, without touching a weight.

A factor multiplies what the output of a layer reads: of a head all channels that it hands to the output projections. That is
the same as multiplying its values, but not its queries and keys: with those at zero it would still attend, to all alike. At
one nothing changes, bit for bit; at zero the head, unit or channel is gone as if it were cut (`narrowing.narrowed`), and where
all are, the biases are left. Nothing sums over modulation channels: those are multiplied as they come out, and are zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from . import narrowing, widths
from .anatomy import uncompiled
from .errors import UserError
from .slicing import Spread

Masks = Mapping[str, tuple[str, Tensor]]  # address as in `Width` -> (`Width.what`, a factor for each head, unit or channel)


@contextmanager
def masked(denoiser: nn.Module, masks: Masks) -> Iterator[None]:
    """Inside, the denoiser runs with its heads, units, … multiplied by these factors, which may require gradients.

    The factors are held by hooks on single modules, so that it does not matter in which order, how often and by which processor
    those are called: checkpoints run them again with the same factors. A tensor may be exchanged in place between two calls.
    A denoiser may be compiled inside, not before: what is compiled already does not look for new hooks.
    ValueError with the reason for a layer whose width cannot be cut, or for as many factors as it does not have.
    """
    target = uncompiled(denoiser)
    if target is not denoiser or any(m._compiled_call_impl is not None for m in target.modules()):
        raise UserError(
            "the denoiser is compiled already, so that masks would be passed over. Compile it with the masks in place."
        )
    hooks = [hook for address, (what, factors) in masks.items() for hook in _hooks(target, address, what, factors)]
    with ExitStack() as stack:
        for module, before, hook in hooks:
            held = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            stack.callback(held.remove)
        yield


def _hooks(denoiser: Any, address: str, what: str, factors: Tensor) -> Iterator[tuple[Any, bool, Callable[..., Any]]]:
    """What multiplies a layer: the module, whether what it is given (or what it returns), and the hook that does so."""
    try:
        count, _ = widths.width(denoiser, address, what)
    except ValueError as e:
        raise ValueError(f"{address}: {narrowing.NARROWS[what][0]} cannot be masked here, because {e}") from None
    if factors.shape != (count,):
        raise ValueError(f"{address}: has {count} {narrowing.NARROWS[what][0]} and was given {tuple(factors.shape)} factors")
    layer = denoiser.get_submodule(address)
    dim = 1 if narrowing.kind(layer) in ("GLUMBConv", "ResnetBlock2D") else -1

    def given(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_scaled(args[0], factors, dim), *args[1:])

    def returned(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _scaled(output, factors, dim)

    def among_zeros(module: Spread, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _scaled(output, module.spread(factors), dim)

    if what == "keep_modulation":
        yield layer.linear, False, among_zeros if isinstance(layer.linear, Spread) else returned
    # Where one operator reads heads and units side by side, they are multiplied before they are put together: what it is given
    # is a copy of both, which nothing else keeps for the backward pass.
    elif (block := widths.beside(denoiser, address)) is not None and what == "keep_units":
        yield denoiser.get_submodule(f"{block}.act_mlp"), False, returned
    elif readers := narrowing.readers(layer, what):
        for name in readers:
            yield layer.get_submodule(name), True, given
    else:
        yield layer, False, returned


def _scaled(x: Tensor, factors: Tensor, dim: int) -> Tensor:
    """Every head, unit or channel times its factor. x: (B, N, heads x size), or (B, C, H, W) with dim = 1.

    For the backward pass autograd keeps x beside the factors. Of an attention x is mostly what that keeps itself, its output,
    so that its mask is free (SD3 and Flux copy it to part two streams); of a feed-forward x is one more (B, N, units). Factors
    on the columns of the output's weight instead, W diag(f), would keep x just as well, for the gradient of that product, and
    the product too, and multiply two large matrices to get it: more of everything as long as W itself does not learn.
    """
    factors = factors.to(x.device, x.dtype)  # they learn in float32 whatever the denoiser computes in
    out = x * factors[:, None, None] if dim == 1 else (x.unflatten(-1, (len(factors), -1)) * factors[:, None]).flatten(-2)
    if x.is_contiguous() or not out.is_contiguous():
        return out
    # The tokens of one stream, say, out of those of two: products of matrices round differently by how the numbers lie.
    return x.new_empty_strided(x.shape, x.stride()).copy_(out)
