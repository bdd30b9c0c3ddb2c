"""Fewer heads in an attention, fewer units in a feed-forward, fewer channels inside a ResNet block: the same layer, narrower.

What a layer takes and gives keeps its width, so that nothing around it changes. This file imports torch and nothing of lissom:
its text goes into artifacts, before that of standins.py.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

Runs = tuple[tuple[int, int], ...]  # indices as ranges (start, stop), one after the other
Picked = tuple[Runs, Runs]  # which rows (outputs; the bias has them too) and which columns (inputs) of an operator; (): all

# what a cut says -> the class in diffusers that it is for, and what it counts
NARROWS = {
    "keep_heads": ("Attention", "heads"),
    "keep_units": ("FeedForward", "units"),
    "keep_channels": ("ResnetBlock2D", "channels"),
}
# Processors that compute every head by itself. One that is not known may mix heads, or hold weights of its own.
PROCESSORS = (
    "AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "SanaLinearAttnProcessor2_0",
    "SanaAttnProcessor2_0",
)  # fmt: skip
GATED, PLAIN = ("GEGLU", "SwiGLU"), ("GELU", "ApproximateGELU", "LinearActivation")  # gated: value and gate in one projection


def width(layer: Any, what: str) -> tuple[int, int]:
    """How many heads, units or channels a layer has, and how many of them in a row go together (a group of a GroupNorm).

    Raises ValueError with the reason for a layer whose width cannot be cut, or not exactly.
    """
    wanted, counted = NARROWS[what]
    if (name := _class(layer)) != wanted:
        raise ValueError(f"a {name or type(layer).__name__} has no {counted} that can be cut")
    return {"keep_heads": _heads, "keep_units": _units, "keep_channels": _channels}[what](layer)


def picked(layer: Any, what: str, stay: Iterable[int]) -> dict[str, Picked]:
    """Which rows and columns of which operators inside a layer belong to these heads, units or channels.

    layer: one that `width` accepts. What is not named has no share in them, nor has the bias of an operator whose columns are.
    """
    count, stay = width(layer, what)[0], list(stay)
    kept = runs(stay)
    if what == "keep_heads":
        size = layer.to_q.out_features // count
        kept = runs(i for head in stay for i in range(head * size, (head + 1) * size))
        return {"to_q": (kept, ()), "to_k": (kept, ()), "to_v": (kept, ()), "to_out.0": ((), kept)}
    twice = runs([*stay, *(count + i for i in stay)])
    if what == "keep_units":
        return {"net.0.proj": (twice if _class(layer.net[0]) in GATED else kept, ()), "net.2": ((), kept)}
    parts: dict[str, Picked] = {"conv1": (kept, ()), "norm2": (kept, ()), "conv2": ((), kept)}
    if layer.time_emb_proj is not None:
        parts["time_emb_proj"] = (twice if layer.time_embedding_norm == "scale_shift" else kept, ())
    return parts


def narrowed(layer: Any, address: str, what: str, value: Any) -> Any:
    """A layer with fewer heads, units or channels: a copy that shares what it keeps whole. The layer itself if all stay.

    Without its other channels a group of a GroupNorm has another mean and variance: such a layer computes something else than
    one whose channels are masked. Without whole groups it computes the same.
    """
    counted = NARROWS[what][1]
    try:
        count, together = width(layer, what)
    except ValueError as e:
        raise ValueError(f"{address}: {counted} cannot be cut here, because {e}") from None
    stay = list(value) if isinstance(value, (list, tuple)) else []
    if not stay or stay != sorted(set(stay) & set(range(count))):
        raise ValueError(f"{address}: cannot keep {counted} {_short(value)} of {count} (they ascend, each once, from 0)")
    by_group = Counter(i // together for i in stay)
    left = [by_group[k] for k in range(count // together)]
    if len({n for n in left if n}) > 1:
        few, many = (left.index(n) for n in (min(n for n in left if n), max(left)))
        raise ValueError(
            f"{address}: cannot keep {left[few]} of the {together} channels of group {few} and {left[many]} of group {many}: "
            "each group of norm2 stays with equally many or goes"
        )
    if len(stay) == count:
        return layer
    taken = picked(layer, what, stay)
    new = _with(layer, {name: sliced(layer.get_submodule(name), *parts) for name, parts in taken.items()})
    if what == "keep_heads":
        new.heads = new.sliceable_head_dim = len(stay)
        new.inner_dim = new.inner_kv_dim = new.to_q.out_features
    elif what == "keep_channels":
        new.norm2.num_groups = sum(map(bool, left))
    new.narrowed_from = (address, taken)  # whoever saves the layer reads where its weights are from
    return new


def sliced(operator: Any, rows: Runs, columns: Runs) -> Any:
    """A copy of a Linear, Conv2d or GroupNorm with these outputs and these inputs."""
    new = unhooked(copy.copy(operator))
    new._parameters = dict(operator._parameters)
    offloads = next((hook for hook in _hooks(operator) if getattr(hook, "offload", False)), None)
    for name, whole in operator._parameters.items():
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
        if name in vars(operator):
            setattr(new, name, new.weight.shape[dim])
    if offloads is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        on = {"execution_device": offloads.execution_device, "io_same_device": offloads.io_same_device}
        add_hook_to_module(new, AlignDevicesHook(**on, offload=True, skip_keys=offloads.skip_keys))
    return new


def runs(indices: Iterable[int]) -> Runs:
    """
    >>> runs([0, 1, 2, 7, 9, 10])
    ((0, 3), (7, 8), (9, 11))
    """
    found: list[tuple[int, int]] = []
    for i in indices:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return tuple(found)


def unhooked(module: Any) -> Any:
    """A copied module without accelerate's hook: that sits on the instance, and still runs the module it was made for."""
    for name in ("forward", "_old_forward", "_hf_hook"):
        module.__dict__.pop(name, None)
    return module


def _with(module: Any, parts: dict[str, Any]) -> Any:
    """A copy of a module with other parts. What lies on the way to them is copied too, the rest is shared."""
    new = unhooked(copy.copy(module))
    new._modules = dict(module._modules)
    for name, part in parts.items():
        head, _, rest = name.partition(".")
        new._modules[head] = _with(new._modules[head], {rest: part}) if rest else part
    return new


def _taken(values: Tensor, dim: int, kept: Runs) -> Tensor:
    return values.index_select(dim, torch.tensor([i for a, b in kept for i in range(a, b)], device=values.device))


def _hooks(module: Any) -> tuple[Any, ...]:
    """accelerate's hooks of a module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


def _class(module: Any) -> str:
    """The name of a module's class in diffusers, whatever class steers it; empty for one of anybody else."""
    return next((c.__name__ for c in type(module).__mro__ if c.__module__.startswith("diffusers.")), "")


def _heads(layer: Any) -> tuple[int, int]:
    if layer.added_kv_proj_dim is not None:
        raise ValueError("it attends to keys and values of a second stream (joint attention)")
    if layer.to_k is None or not layer.to_out:
        raise ValueError("it lacks keys, values or an output of its own")
    if layer.fused_projections:
        raise ValueError("its projections are fused (`unfuse_qkv_projections` takes them apart)")
    if layer.inner_kv_dim != layer.inner_dim:
        raise ValueError("its heads share keys and values in groups")
    if (processor := type(layer.processor).__name__) not in PROCESSORS:
        raise ValueError(f"nothing is known of what its {processor} does with single heads")
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        _plain(layer, name, nn.Linear)
    inner = layer.to_q.out_features
    if inner % layer.heads or not inner == layer.to_v.out_features == layer.to_out[0].in_features:
        raise ValueError(f"its projections are not {layer.heads} heads of one size")
    for name in ("norm_q", "norm_k"):
        if (norm := getattr(layer, name)) is not None:
            size = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
            if not isinstance(size, tuple) or tuple(size) != (inner // layer.heads,):
                raise ValueError(f"its {name} looks at all heads together")
    return layer.heads, 1


def _units(layer: Any) -> tuple[int, int]:
    net: Any = getattr(layer, "net", ())
    if len(net) < 3 or (activation := _class(net[0])) not in GATED + PLAIN:
        raise ValueError("its activation is none that treats every unit alike")
    _plain(layer, "net.0.proj", nn.Linear)
    _plain(layer, "net.2", nn.Linear)
    units = net[2].in_features
    if net[0].proj.out_features != units * (2 if activation in GATED else 1):
        raise ValueError(f"its {activation} makes another number of units than its output reads")
    return units, 1


def _channels(layer: Any) -> tuple[int, int]:
    for name, kind in (("conv1", nn.Conv2d), ("norm2", nn.GroupNorm), ("conv2", nn.Conv2d)):
        _plain(layer, name, kind)
    channels = layer.conv1.out_channels
    if not channels == layer.norm2.num_channels == layer.conv2.in_channels or max(layer.conv1.groups, layer.conv2.groups) > 1:
        raise ValueError("its convolutions do not simply follow one another")
    if layer.time_emb_proj is not None:
        _plain(layer, "time_emb_proj", nn.Linear)
        if layer.time_emb_proj.out_features != channels * (2 if layer.time_embedding_norm == "scale_shift" else 1):
            raise ValueError("its timestep does not speak to every channel alike")
    return channels, channels // layer.norm2.num_groups


def _plain(layer: Any, name: str, kind: type[nn.Module]) -> None:
    """ValueError unless a part of a layer is an operator of this class with numbers that can be picked one by one."""
    part: Any = layer.get_submodule(name)
    weight = part._parameters.get("weight") if isinstance(part, kind) else None
    if weight is None or not weight.is_floating_point() or len(weight) != getattr(part, "out_features", len(weight)):
        raise ValueError(f"its {name} is no plain {kind.__name__} (an adapter, a cut or a quantization is in the way)")


def _short(value: Any) -> str:
    """
    >>> _short((3, 1)), _short(range(5000)), _short(None)
    ('3, 1', '0, 1, 2, 3, …, 4999 (5000 of them)', 'None')
    """
    if not isinstance(value, (list, tuple, range)):
        return str(value)
    if len(value) > 8:
        return f"{', '.join(map(str, value[:4]))}, …, {value[-1]} ({len(value)} of them)"
    return ", ".join(map(str, value)) or "none"
