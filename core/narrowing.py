"""Fewer heads of an attention, units of a feed-forward, channels inside a ResNet block or told to a norm: the layer, narrower.

What a layer takes and gives keeps its width, so that nothing around it changes. This file imports torch and of lissom only
slicing.py, which does the same: its text goes into artifacts, between that of slicing.py and that of standins.py.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .slicing import Nothing, Picked, Runs, Spread, flat, runs, sliced, spread, unhooked, with_only

# Blocks whose attention and feed-forward run side by side: their proj_out reads the heads of attn, then the units of proj_mlp.
PARALLEL = ("FluxSingleTransformerBlock", "ChromaSingleTransformerBlock")
# what a cut says -> what it counts, and the classes in diffusers that have some
NARROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "keep_heads": ("heads", ("Attention", "FluxAttention", "WanAttention", "LTXAttention")),
    "keep_units": ("units", ("FeedForward", "GLUMBConv", *PARALLEL)),
    "keep_channels": ("channels", ("ResnetBlock2D",)),
    # Outputs of the Linear that makes a norm's shifts, scales and gates from the timestep: each is that of one channel.
    "keep_modulation": (
        "modulation channels",
        ("AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX", "AdaLayerNormContinuous"),
    ),
}
# Processors that compute every head by itself. One that is not known may mix heads, or hold weights of its own.
PROCESSORS = (
    "AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "JointAttnProcessor2_0",
    "XFormersJointAttnProcessor", "SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0", "FluxAttnProcessor", "WanAttnProcessor",
    "LTXVideoAttnProcessor",
)  # fmt: skip
# Those that norm queries and keys and then part the heads, with nothing in between (LTX turns them by their positions there).
NORM_FIRST = ("SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0", "WanAttnProcessor")
# projections of an attention, those of the text or of an image too -> the norm of what they give
PROJECTIONS = {
    "to_q": "norm_q", "to_k": "norm_k", "to_v": None,
    "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k", "add_v_proj": None,
}  # fmt: skip
GATED, PLAIN = ("GEGLU", "SwiGLU"), ("GELU", "ApproximateGELU", "LinearActivation")  # gated: value and gate in one projection


class NoHeads(nn.Module):
    """Takes the place of an attention that keeps no head: what is left of it are the biases of its outputs, for every token.

    Its processor would not do: most cannot divide what there is not among no heads, and any other may be set later.
    """

    def __init__(self, layer: Any, outputs: dict[str, Any]) -> None:
        """outputs: what takes the place of to_out.0 and to_add_out; none of the first where the block reads the heads."""
        super().__init__()
        self.to_out = nn.ModuleList([outputs["to_out.0"], *layer.to_out[1:]]) if "to_out.0" in outputs else None
        self.to_add_out = outputs.get("to_add_out")
        self.joint = getattr(layer, "add_q_proj", None) is not None
        self.residual_connection = getattr(layer, "residual_connection", False)
        self.rescale_output_factor = getattr(layer, "rescale_output_factor", 1.0)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """(B, T, C) or (B, C, H, W) -> the same; joint: a pair, of which the text is (B, T', C')."""
        is_map = hidden_states.ndim == 4
        out = (hidden_states.flatten(2).transpose(1, 2) if is_map else hidden_states)[..., :0]
        for part in self.to_out or ():
            out = part(out)
        if is_map:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if self.residual_connection:
            out = out + hidden_states
        out = out / self.rescale_output_factor
        if not self.joint or encoder_hidden_states is None:
            return out
        text = encoder_hidden_states  # SD3's last block does not look at it any more
        return out, text if self.to_add_out is None else self.to_add_out(text[..., :0])


def width(layer: Any, what: str) -> tuple[int, int]:
    """How many heads, units or channels a layer has, and how many of them in a row go together (a group of a GroupNorm).

    Raises ValueError with the reason for a layer whose width cannot be cut, or not exactly.
    """
    counted, classes = NARROWS[what]
    if (name := kind(layer)) not in classes:
        raise ValueError(f"a {name or type(layer).__name__} has no {counted} that can be cut")
    counts = {"keep_heads": _heads, "keep_units": _units, "keep_channels": _channels, "keep_modulation": _modulation}
    return counts[what](layer)


def picked(layer: Any, what: str, stay: Iterable[int]) -> dict[str, Picked]:
    """Which rows and columns of which operators inside a layer belong to these heads, units or channels.

    layer: one that `width` accepts. What is not named has no share in them, nor has the bias of an operator whose columns are.
    """
    count, stay = width(layer, what)[0], list(stay)
    kept = runs(stay)
    if what == "keep_heads":
        kept = _channels_of(layer, stay)
        rows = {name: (kept, ()) for name in _rows(layer) if not _across(layer, name)}
        return rows | {name: ((), kept) for name in readers(layer, what)}
    if what == "keep_modulation":
        return {"linear": (kept, ())}
    twice = runs([*stay, *(count + i for i in stay)])
    if what == "keep_channels":
        parts: dict[str, Picked] = {"conv1": (kept, ()), "norm2": (kept, ()), "conv2": ((), kept)}
        if layer.time_emb_proj is not None:
            parts["time_emb_proj"] = (twice if layer.time_embedding_norm == "scale_shift" else kept, ())
        return parts
    if (name := kind(layer)) == "GLUMBConv":
        return {"conv_inverted": (twice, ()), "conv_depth": (twice, ()), "conv_point": ((), kept)}
    if name in PARALLEL:
        heads = layer.proj_out.in_features - count
        return {"proj_mlp": (kept, ()), "proj_out": ((), runs(heads + i for i in stay))}
    return {"net.0.proj": (twice if kind(layer.net[0]) in GATED else kept, ()), "net.2": ((), kept)}


def narrowed(layer: Any, address: str, what: str, value: Any) -> Any:
    """A layer with fewer heads, units or channels: a copy that shares what it keeps whole. The layer itself if all stay.

    With no heads or no units at all the biases of its outputs are left. Modulation channels that go are zero, as their norm
    reads all of them. Without its other channels a group of a GroupNorm has another mean and variance: such a layer computes
    something else than one whose channels are masked. Without whole groups it computes the same. A block of PARALLEL gives up
    what reads the heads that its attention has lost already.
    """
    counted = NARROWS[what][0]
    try:
        count, together = width(layer, what)
    except ValueError as e:
        raise ValueError(f"{address}: {counted} cannot be cut here, because {e}") from None
    stay = list(value) if isinstance(value, (list, tuple)) else [-1]
    if stay != sorted(set(stay) & set(range(count))) or not stay and what == "keep_channels":
        raise ValueError(f"{address}: cannot keep {counted} {_short(value)} of {count} (they ascend, each once, from 0)")
    by_group = Counter(i // together for i in stay)
    left = [by_group[k] for k in range(count // together)]
    if len({n for n in left if n}) > 1:
        few, many = (left.index(n) for n in (min(n for n in left if n), max(left)))
        raise ValueError(
            f"{address}: cannot keep {left[few]} of the {together} channels of group {few} and {left[many]} of group {many}: "
            "each group of norm2 stays with equally many or goes"
        )
    taken = picked(layer, what, stay)
    if parallel := kind(layer) in PARALLEL:
        taken = _with_columns_of_heads(layer, taken, count, stay)
    if len(stay) == count and not (parallel and taken):
        return layer
    if what == "keep_heads":
        new, taken = _fewer_heads(layer, taken, stay)
    elif what == "keep_modulation":
        new = _with(layer, {"linear": spread(layer.linear, taken["linear"][0])})
    else:
        new = _with(layer, _sliced(layer, taken))
    if what == "keep_channels":
        new.norm2.num_groups = sum(map(bool, left))
    elif parallel:
        new.mlp_hidden_dim = len(stay)
        if hasattr(new.proj_out, "_tp_packed_row_blocks"):  # which several devices share each for itself
            new.proj_out._tp_packed_row_blocks = [new.proj_out.in_features - len(stay), len(stay)]
    new.narrowed_from = (address, taken)  # whoever saves the layer reads where its weights are from
    return new


def _fewer_heads(layer: Any, taken: dict[str, Picked], stay: list[int]) -> tuple[Any, dict[str, Picked]]:
    """An attention with these heads, and what it took. Norms over all heads still look at them, and pass on those that stay."""
    if not stay:
        taken = {name: taken[name] for name in readers(layer, "keep_heads")}
        return NoHeads(layer, _sliced(layer, taken)), taken
    across = {norm for name in _rows(layer) if (norm := _across(layer, name)) is not None}
    kept = _channels_of(layer, stay)
    new = _with(layer, _sliced(layer, taken) | {norm: with_only(layer.get_submodule(norm), kept) for norm in across})
    told = dict.fromkeys(("heads", "sliceable_head_dim"), len(stay))
    told |= dict.fromkeys(("inner_dim", "inner_kv_dim", "kv_inner_dim"), new.to_v.out_features)
    vars(new).update({name: value for name, value in told.items() if name in vars(new)})  # what processors read
    return new, taken | dict.fromkeys(sorted(across), ((), ()))


def _with_columns_of_heads(block: Any, taken: dict[str, Picked], units: int, stay: list[int]) -> dict[str, Picked]:
    """What a block of PARALLEL loses with some of its units and with the heads that its attention has lost already."""
    attn, read = block.attn, block.proj_out.in_features - units
    now = 0 if isinstance(attn, NoHeads) else attn.to_v.out_features
    left = list(range(read)) if now == read else flat(attn.narrowed_from[1]["to_v"][0]) if now else []
    found = {"proj_out": ((), runs([*left, *(read + i for i in stay)]))} if now < read or len(stay) < units else {}
    return found | ({"proj_mlp": taken["proj_mlp"]} if len(stay) < units else {})


def _sliced(layer: Any, taken: dict[str, Picked]) -> dict[str, Any]:
    return {name: sliced(layer.get_submodule(name), *picks) for name, picks in taken.items()}


def readers(layer: Any, what: str) -> list[str]:
    """The operators of a layer that sum over its heads, units or channels. None where its block does."""
    if what == "keep_heads":
        found = ["to_out.0"] if getattr(layer, "to_out", None) else []
        return [*found, "to_add_out"] if getattr(layer, "to_add_out", None) is not None else found
    return {"FeedForward": ["net.2"], "GLUMBConv": ["conv_point"], "ResnetBlock2D": ["conv2"]}.get(kind(layer), [])


def kind(module: Any) -> str:
    """The name of a module's class in diffusers, whatever class steers it; empty for one of anybody else."""
    return next((c.__name__ for c in type(module).__mro__ if c.__module__.startswith("diffusers.")), "")


def _with(module: Any, parts: dict[str, Any]) -> Any:
    """A copy of a module with other parts. What lies on the way to them is copied too, the rest is shared."""
    new = unhooked(copy.copy(module))
    new._modules = dict(module._modules)
    for name, part in parts.items():
        head, _, rest = name.partition(".")
        new._modules[head] = _with(new._modules[head], {rest: part}) if rest else part
    return new


def norms_all(layer: Any) -> bool:
    """Whether an attention's queries or keys are normed over all heads, so that they stay whole when heads go."""
    return any(_across(layer, name) is not None for name in _rows(layer))


def _rows(layer: Any) -> list[str]:
    """The projections that an attention has."""
    return [name for name in PROJECTIONS if getattr(layer, name, None) is not None]


def _channels_of(layer: Any, heads: list[int]) -> Runs:
    """Where heads lie in what an attention hands to its output."""
    size = layer.to_v.out_features // layer.heads
    return runs(i for head in heads for i in range(head * size, (head + 1) * size))


def _across(layer: Any, name: str) -> str | None:
    """The norm of a projection, if it looks at all heads together. The projection then stays whole, and so does the norm."""
    norm = getattr(layer, PROJECTIONS[name] or "", None)
    size = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    own = isinstance(size, tuple) and tuple(size) == (layer.to_v.out_features // layer.heads,)
    return None if norm is None or own else PROJECTIONS[name]


def _heads(layer: Any) -> tuple[int, int]:
    summing = readers(layer, "keep_heads")
    if getattr(layer, "to_k", None) is None or not summing and kind(layer) != "FluxAttention":
        raise ValueError("it lacks keys, values or an output of its own")
    if getattr(layer, "fused_projections", False):
        raise ValueError("its projections are fused (`unfuse_qkv_projections` takes them apart)")
    if (processor := type(layer.processor).__name__) not in PROCESSORS:
        raise ValueError(f"nothing is known of what its {processor} does with single heads")
    for name in (*_rows(layer), *summing):
        _plain(layer, name, nn.Linear)
    inner = layer.to_v.out_features
    if layer.to_k.out_features != layer.to_q.out_features:
        raise ValueError("its heads share keys and values in groups")
    if inner % layer.heads or any(layer.get_submodule(name).in_features != inner for name in summing):
        raise ValueError(f"its projections are not {layer.heads} heads of one size")
    for name in _rows(layer):
        norm, made = _across(layer, name), layer.get_submodule(name).out_features
        size = getattr(getattr(layer, norm or "", None), "normalized_shape", None)
        if norm is not None and (processor not in NORM_FIRST or size is not None and tuple(size) != (made,)):
            raise ValueError(f"its {norm} looks at all heads together")
        if norm is None and made != inner:
            raise ValueError(f"its projections are not {layer.heads} heads of one size")
    return layer.heads, 1


def _units(layer: Any) -> tuple[int, int]:
    if (name := kind(layer)) == "GLUMBConv":
        return _units_of_maps(layer)
    if name in PARALLEL:
        return _units_beside_heads(layer)
    net: Any = getattr(layer, "net", ())
    if len(net) < 3 or (activation := kind(net[0])) not in GATED + PLAIN:
        raise ValueError("its activation is none that treats every unit alike")
    _plain(layer, "net.0.proj", nn.Linear)
    _plain(layer, "net.2", nn.Linear)
    units = net[2].in_features
    if net[0].proj.out_features != units * (2 if activation in GATED else 1):
        raise ValueError(f"its {activation} makes another number of units than its output reads")
    return units, 1


def _units_of_maps(layer: Any) -> tuple[int, int]:
    for name in ("conv_inverted", "conv_depth", "conv_point"):
        _plain(layer, name, nn.Conv2d)
    units, twice = layer.conv_point.in_channels, layer.conv_depth
    if not 2 * units == layer.conv_inverted.out_channels == twice.in_channels == twice.out_channels == twice.groups:
        raise ValueError("its convolutions do not simply follow one another")
    if layer.conv_inverted.groups > 1 or layer.conv_point.groups > 1:
        raise ValueError("its convolutions keep units in groups")
    return units, 1


def _units_beside_heads(layer: Any) -> tuple[int, int]:
    _plain(layer, "proj_out", nn.Linear)
    if isinstance(layer.proj_mlp, Nothing):
        return 0, 1
    _plain(layer, "proj_mlp", nn.Linear)
    return layer.proj_mlp.out_features, 1


def _channels(layer: Any) -> tuple[int, int]:
    for name, cls in (("conv1", nn.Conv2d), ("norm2", nn.GroupNorm), ("conv2", nn.Conv2d)):
        _plain(layer, name, cls)
    channels = layer.conv1.out_channels
    if not channels == layer.norm2.num_channels == layer.conv2.in_channels or max(layer.conv1.groups, layer.conv2.groups) > 1:
        raise ValueError("its convolutions do not simply follow one another")
    if layer.time_emb_proj is not None:
        _plain(layer, "time_emb_proj", nn.Linear)
        if layer.time_emb_proj.out_features != channels * (2 if layer.time_embedding_norm == "scale_shift" else 1):
            raise ValueError("its timestep does not speak to every channel alike")
    return channels, channels // layer.norm2.num_groups


def _modulation(layer: Any) -> tuple[int, int]:
    _plain(layer, "linear", nn.Linear)
    return len(layer.linear.weight), 1


def _plain(layer: Any, name: str, cls: type[nn.Module]) -> None:
    """ValueError unless a part of a layer is an operator of this class with numbers that can be picked one by one."""
    part: Any = layer.get_submodule(name)
    weight = part._parameters.get("weight") if isinstance(part, cls) else None
    rows = len(part.places) if isinstance(part, Spread) else getattr(part, "out_features", None)
    if weight is None or not weight.is_floating_point() or rows not in (None, len(weight)):
        raise ValueError(f"its {name} is no plain {cls.__name__} (an adapter, a cut or a quantization is in the way)")


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
