"""Operators with fewer outputs or inputs: copies whose weights are slices. What all kinds of narrower layers are made of.

This file imports torch and nothing of lissom: its text goes into artifacts, before that of narrowing.py.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Runs = tuple[tuple[int, int], ...]  # indices as ranges (start, stop), one after the other; (): all there are
Picked = tuple[Runs, Runs]  # which rows (outputs; the bias has them too) and which columns (inputs) of an operator; (): all
NONE: Runs = ((0, 0),)  # not one index


class Bias(nn.Linear):
    """Takes the place of a Linear none of whose inputs is left: its bias, at every position.

    There is no weight to be saved, trained or multiplied, but the shape of one: adapters that are put on every layer of a name
    look at it, and learn nothing here.
    """

    def __init__(self, operator: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = 0, operator.out_features
        self.register_parameter("bias", operator.bias)
        _without_weight(self, operator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 0) -> (..., C)."""
        out = x.new_zeros(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Nothing(nn.Linear):
    """Takes the place of a Linear none of whose outputs is left: no channels, at every position. See `Bias`."""

    def __init__(self, operator: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = operator.in_features, 0
        self.register_parameter("bias", None)
        _without_weight(self, operator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 0)."""
        return x[..., :0]


def _without_weight(new: nn.Linear, operator: Any) -> None:
    place = None if operator.weight.is_meta else operator.weight.device  # what no file holds would stay on meta
    empty = torch.empty(new.out_features, new.in_features, dtype=operator.weight.dtype, device=place)
    new.register_buffer("weight", empty, persistent=False)


class BiasOfMap(nn.Module):
    """`Bias` in the place of a Conv2d: (B, 0, H, W) -> (B, C, H, W)."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.channels = operator.out_channels
        self.bias: Any = operator.bias

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.channels, *x.shape[2:])
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class NothingOfMap(nn.Module):
    """`Nothing` in the place of a Conv2d: (B, C, H, W) -> (B, 0, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :0]


class Zeros(Nothing):
    """`Nothing` where what reads it counts on all outputs: they are zero. An adapter adds to them."""

    def __init__(self, operator: Any) -> None:
        super().__init__(operator)
        self.out_features = operator.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Spread(nn.Linear):
    """A Linear that has some of its outputs only, and gives zeros for the others: what reads it finds each in its place.

    `weight` and `bias` have the rows that are left. `out_features` are all outputs, for the sake of adapters: these add to what
    is given, and cannot be merged into rows that are gone.
    """

    kept: Runs  # outputs that are left, of all that there were before any cut
    places: Tensor  # the same, (K,)

    def __init__(self, operator: Any, rows: Runs) -> None:
        """rows: of the operator, which may be one of these itself. It is left to `spread` to take them."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.training = operator.in_features, operator.out_features, operator.training
        self._parameters = operator._parameters
        if "_hf_hook" in vars(operator):  # knows where the weights are
            self._hf_hook = operator._hf_hook
        if isinstance(operator, Spread):
            left = flat(operator.kept)
            rows = runs(left[i] for i in flat(rows))
        self.kept = rows
        self._place(operator.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return self.spread(nn.functional.linear(x, self.weight, self.bias))

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of the outputs that are left, among zeros for the others: (..., K) -> (..., C')."""
        out = values.new_zeros(*values.shape[:-1], self.out_features)
        return out.index_copy(-1, self.places.to(values.device), values)

    def _place(self, device: torch.device) -> None:
        # Never on meta: in no file is what could fill it later.
        places = torch.tensor(flat(self.kept), device="cpu" if device.type == "meta" else device)
        self.register_buffer("places", places, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place(self.places.device)  # after `to_empty` there would be any numbers
        return self


class Only:
    """A forward hook after which an operator's last dimension has only these channels."""

    def __init__(self, kept: Runs) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[..., start:stop] for start, stop in self.kept], -1)


def sliced(operator: Any, rows: Runs = (), columns: Runs = ()) -> Any:
    """A copy of a Linear, Conv2d or norm with these outputs and these inputs. Of a depthwise convolution: rows alone."""
    of_maps = isinstance(operator, nn.Conv2d)
    if rows == NONE:
        return NothingOfMap() if of_maps else Nothing(operator)
    if columns == NONE:
        new: Any = BiasOfMap(operator) if of_maps else Bias(operator)
    else:
        new = unhooked(copy.copy(operator))
        new._parameters = dict(operator._parameters)
    offloads = next((hook for hook in _hooks(operator) if getattr(hook, "offload", False)), None)
    for name, whole in new._parameters.items():
        if whole is None or not (rows or columns and whole.ndim > 1 or offloads):
            continue  # the bias of what only loses inputs stays the same parameter
        # Under sequential offload the hook holds the weights; here there are only their shapes.
        values = offloads.weights_map[name] if offloads is not None and whole.is_meta else whole.detach()
        for dim, kept in enumerate((rows, columns)):
            if kept and dim < values.ndim:
                values = _taken(values, dim, kept)
        new._parameters[name] = nn.Parameter(values, requires_grad=whole.requires_grad)
    outputs, inputs = ("out_features", "out_channels", "num_channels"), ("in_features", "in_channels")
    for name, dim in (*((n, 0) for n in outputs if rows), *((n, 1) for n in inputs if columns)):
        if name in vars(new) and columns != NONE:
            setattr(new, name, new.weight.shape[dim])
    if rows and getattr(new, "groups", 1) > 1:
        new.groups = new.in_channels = new.out_channels
    if offloads is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        on = {"execution_device": offloads.execution_device, "io_same_device": offloads.io_same_device}
        add_hook_to_module(new, AlignDevicesHook(**on, offload=True, skip_keys=offloads.skip_keys))
    return new


def spread(operator: Any, rows: Runs) -> Any:
    """A copy of a Linear with these outputs among zeros for the others."""
    if rows == NONE:
        return Zeros(operator)
    new = sliced(Spread(operator, rows), rows)
    new.out_features = operator.out_features
    return new


def with_only(operator: Any, kept: Runs) -> Any:
    """A copy of a norm that looks at all channels, and passes these on: each is what it would be among the others."""
    new = sliced(operator)
    new._forward_hooks = operator._forward_hooks.copy()  # of an earlier cut, say, whose channels are all there are
    new.register_forward_hook(Only(kept))
    return new


def runs(indices: Iterable[int]) -> Runs:
    """
    >>> runs([0, 1, 2, 7, 9, 10]), runs([])
    (((0, 3), (7, 8), (9, 11)), ((0, 0),))
    """
    found: list[tuple[int, int]] = []
    for i in indices:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return tuple(found) or NONE


def flat(kept: Runs) -> list[int]:
    """The indices in ranges."""
    return [i for start, stop in kept for i in range(start, stop)]


def unhooked(module: Any) -> Any:
    """A copied module without accelerate's hook: that sits on the instance, and still runs the module it was made for."""
    for name in ("forward", "_old_forward", "_hf_hook"):
        module.__dict__.pop(name, None)
    return module


def _taken(values: Tensor, dim: int, kept: Runs) -> Tensor:
    return values.index_select(dim, torch.tensor(flat(kept), device=values.device))


def _hooks(module: Any) -> tuple[Any, ...]:
    """accelerate's hooks of a module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
