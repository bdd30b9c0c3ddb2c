"""Layers that are not executed in a step: what they did in the latest step that executed them is done again.

Feature inheritance, after A-SDM (Zhu et al., https://arxiv.org/abs/2406.00210): features change little from one step to the
next, so that blocks, layers or units may hand on what they computed before. Of the paper only the abstract could be read; the
details are ours:

- A layer with a residual of its own (ResNet, Transformer2DModel, transformer block, the middle of a U-Net) adds to its new
  input what it added before: kept is the difference between its output and what stands in for it where it is skipped. What
  comes from the layers before it is therefore always new.
- A branch whose parent adds it (attn1, attn2, ff) returns its old output: the same rule, for where it is skipped stand zeros.
- A block on a U-Net's way down or up (`anatomy.stages`) returns its old output, skip connections included, as DeepCache
  (Ma et al., https://arxiv.org/abs/2312.00858) does with the deep branch.
- Where a step calls the denoiser several times, the latest call counts; where guidance is a call of its own, it reuses its own.
- What lies in a reused layer is not executed, and a step that left the layer out is no source: the one before that is.

Kept are only layers that a later step reuses, one tensor each (one for each output of a block), until the pipeline sets its
timesteps again. Keeping a ResNet computes its 1x1 shortcut and resampling a second time, which no count of MACs includes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import anatomy
from .run import CannotFollow
from .schedulers import disguised
from .skip import find
from .steering import Call, Next

Features = dict[str, Any]  # address -> (shape of the layer's input, what it did)


def reuse(call: Call, following: Next) -> Any:
    run = call.run
    if not run.step.reuse and not run.kept:
        return following(call)
    features = run.features.setdefault((call.name, run.ordinal), {})
    with _inheriting(call.module, features, run.step.reuse, run.kept):
        return following(call)


@contextmanager
def _inheriting(denoiser: nn.Module, features: Features, reused: tuple[str, ...], kept: tuple[str, ...]) -> Iterator[None]:
    """Inside, `reused` layers are not executed, and what `kept` ones do is remembered. Another denoiser's are passed over."""
    swapped: list[tuple[nn.Module, Any]] = []
    try:
        for address, make in (*((a, _reusing) for a in reused), *((a, _keeping) for a in kept)):
            layer = find(denoiser, address)
            if layer is not None:
                swapped.append((layer, type(layer)))
                layer.__dict__["_lissom_features"] = features, address
                layer.__class__ = make(swapped[-1][1], _stand_in(layer))
        yield
    finally:
        for layer, cls in reversed(swapped):
            layer.__class__ = cls
            layer.__dict__.pop("_lissom_features", None)


@functools.cache
def _keeping(cls: Any, stand_in: anatomy.Substitute | None) -> Any:
    """Overrides `__call__`, not `forward`: see `skip`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        features, address = self.__dict__["_lissom_features"]
        output = cls.__call__(self, *args, **kwargs)
        did = pytree.tree_map(_copy, output)  # pipelines and parents may write into what they get
        if stand_in is not None:
            did = pytree.tree_map(_minus, output, stand_in(self, *args, **kwargs))
        features[address] = _shape(args, kwargs), did
        return output

    return disguised(cls, {"__call__": __call__})


@functools.cache
def _reusing(cls: Any, stand_in: anatomy.Substitute | None) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        features, address = self.__dict__["_lissom_features"]
        shape, did = features.get(address, (None, None))
        if shape != _shape(args, kwargs):
            before = "nothing was kept of it" if shape is None else f"it was kept for inputs of another shape, {tuple(shape)}"
            raise CannotFollow(
                f"the plan reuses {address!r} in a call for which {before}: another denoiser made the steps before, or "
                "guidance begins or ends on the way. Take it out of the `reuse` of the steps concerned."
            )
        return pytree.tree_map(_copy, did) if stand_in is None else pytree.tree_map(_plus, stand_in(self, *args, **kwargs), did)

    return disguised(cls, {"__call__": __call__})


def _stand_in(layer: nn.Module) -> anatomy.Substitute | None:
    """None for a block on the way down or up."""
    try:
        return anatomy.substitute(layer)
    except KeyError:
        return None


def _shape(args: Any, kwargs: Any) -> torch.Size | None:
    """Of a layer's input: its first tensor."""
    return next((leaf.shape for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _minus(output: Any, stand_in: Any) -> Any:
    return output - stand_in if isinstance(output, Tensor) else output  # SD3's last block returns None for the text


def _plus(stand_in: Any, did: Any) -> Any:
    return stand_in + did if isinstance(stand_in, Tensor) else stand_in
