"""The layers of a denoiser that can be left out: where they are, what they weigh, and what their absence leaves behind.

Layers are found by the class they have in diffusers: what a layer returns, and whether its parent adds that to a residual,
is a property of the code. Blocks of classes that are not known here are found by tracing one forward (`traced`). Skipping a
layer in some steps and cutting it for good share the same stand-in (standins.py), so that both give the same numbers.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .standins import STAND_INS, Absent, both_inputs, joint_input, plain_input, x_input

Removal = Literal["input", "shortcut", "zero"]
UNETS = "diffusers.models.unets."  # where the classes of U-Nets' blocks are
Substitute = Callable[..., Any]  # (layer, *args, **kwargs of its forward) -> what is returned in its place


@dataclass(frozen=True)
class Layer:
    """One layer that can be left out.

    `removal` says what its absence leaves behind: "input" (the layer holds its own residual: its input passes through),
    "shortcut" (a ResNet block: the resized and projected input), "zero" (a branch that its parent adds to a residual).
    """

    address: str  # in `denoiser.named_modules()`, e.g. "down_blocks.0.attentions.0"
    kind: str  # resnet, attention, transformer_block, self_attention, cross_attention, feed_forward, middle
    params: int  # numbers in its parameters
    macs: int | None  # multiply-accumulates that leaving it out saves, per image and step; None until cost.measure ran
    removal: Removal
    kept: int = 0  # parameters that stay when it is cut: a ResNet's 1x1 shortcut, the embedder in a DiT's first block
    returns: str | None = None  # of a traced block: the arguments of its forward that it passes on when cut (Cut.value)

    @property
    def freed(self) -> int:
        """Parameters that cutting it frees."""
        return self.params - self.kept


def layers(denoiser: nn.Module) -> list[Layer]:
    """Every layer of a denoiser that can be left out, in the order of `named_modules()`.

    `params` counts parameters that the layer shares with others too. A layer inside a listed layer is listed as well:
    leaving out both is the same as leaving out the outer one. Layers that are cut already are not there any more.
    """
    found, denoiser = [], uncompiled(denoiser)
    for address, module in denoiser.named_modules():
        parent = denoiser.get_submodule(address.rpartition(".")[0])
        known = _known(module, parent)
        if address and known is not None:  # the denoiser itself (address "") may be of a listed class: not a layer of itself
            kept = _size(_stays(module, address))
            found.append(Layer(address, known.kind(module), _size(module), None, known.removal(module), kept))
    return found


def stages(denoiser: nn.Module) -> list[str]:
    """Addresses of a U-Net's blocks on its way down and up. Nothing stands in for one, since it changes widths or sizes and
    hands skip connections over: a step cannot skip it, but what it returned before can be returned again.
    """
    denoiser = uncompiled(denoiser)
    return [
        address
        for address, module in denoiser.named_modules()
        if address.rpartition(".")[0] in ("down_blocks", "up_blocks") and type(module).__module__.startswith(UNETS)
    ]


def offered(layer: nn.Module, parent: nn.Module) -> bool:
    """Whether `layers` lists a layer inside this parent."""
    return _known(layer, parent) is not None


def traced(denoiser: nn.Module, forward: Callable[[], Any]) -> list[Layer]:
    """Blocks of classes that `layers` does not know, found by watching one forward; in the order in which they ran.

    A block is an entry of a list of modules (not inside a known layer, and not a single operator) each of whose outputs has
    the shape and type of one of its tensor arguments. Cutting it passes those arguments on. Where two arguments have the
    output's shape, the one most alike in value is taken, as a residual block's output is; without values (meta) none is.
    forward: runs the denoiser once on any input, in eval mode.
    """
    denoiser = uncompiled(denoiser)
    found: dict[str, Layer] = {}
    hooks = []
    for address, module in unlisted(denoiser):

        def watch(module: Any, args: Any, kwargs: Any, output: Any, address: str = address) -> None:
            returns = _passed(module, args, kwargs, output)
            if returns is not None and address not in found:
                attends = any("Att" in type(m).__name__ for m in module.modules())
                kind = "transformer_block" if attends else "block"
                found[address] = Layer(address, kind, _size(module), None, "input", returns=returns)

        hooks.append(module.register_forward_hook(watch, with_kwargs=True))
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for a, layer in found.items() if not any(a.startswith(b + ".") for b in found)]


def unlisted(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Entries of lists of modules, with addresses, that `layers` does not explain: neither in a listed layer, nor around one."""
    denoiser = uncompiled(denoiser)
    listed = [layer.address for layer in layers(denoiser)]
    return [
        (address, module)
        for address, module in _entries(denoiser)
        if not isinstance(module, Absent)
        and not any(address == k or address.startswith(k + ".") or k.startswith(address + ".") for k in listed)
    ]


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """The model inside a torch.compile'd one: it has the addresses that plans use, and its layers are those that run."""
    inner = getattr(denoiser, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else denoiser


def label_tables(denoiser: nn.Module) -> int:
    """Parameters in the lookup tables of class labels: weight on disk that costs no arithmetic and that no layer removal
    shrinks. A DiT has one per block.
    """
    return sum(p.numel() for m in denoiser.modules() if isinstance(m, nn.Embedding) for p in m.parameters())


def substitute(layer: nn.Module) -> Substitute:
    """The function that stands in for a layer which `layers` lists. KeyError for any other class."""
    return STAND_INS[_name(layer)]


@dataclass(frozen=True)
class _Class:
    kind: Callable[[Any], str]
    removal: Callable[[Any], Removal]
    parents: tuple[str, ...] = ()  # if given: offered only directly inside these classes, which add what it returns
    fits: Callable[[Any], bool] = lambda layer: True  # offered only if so


def _attention_kind(layer: Any) -> str:
    if layer.residual_connection:
        return "attention"
    return "cross_attention" if layer.is_cross_attention else "self_attention"


def _keeps_width(layer: Any) -> bool:
    """ControlNet-XS feeds its middle with the other network's channels too: there nothing could take its place."""
    return bool(layer.resnets[0].in_channels == layer.resnets[-1].out_channels)


def _always(kind: str, removal: Removal) -> _Class:
    return _Class(lambda layer: kind, lambda layer: removal)


# Attention inside SD3's and Flux's blocks returns a pair or is fused with the feed-forward: not offered.
CLASSES: dict[str, _Class] = {
    **{
        name: _always("transformer_block", "input")
        for name, stand_in in STAND_INS.items()
        if stand_in in (plain_input, joint_input, both_inputs, x_input) and not name.startswith("UNet")
    },
    "ResnetBlock2D": _always("resnet", "shortcut"),
    "Transformer2DModel": _always("attention", "input"),
    **{
        name: _Class(lambda layer: "middle", lambda layer: "input", fits=_keeps_width)
        for name in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
    },
    "Attention": _Class(
        _attention_kind,
        lambda layer: "input" if layer.residual_connection else "zero",
        parents=("BasicTransformerBlock", "SanaTransformerBlock"),
    ),
    "FeedForward": _Class(
        lambda layer: "feed_forward",
        lambda layer: "zero",
        parents=("BasicTransformerBlock", "WanTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock"),
    ),
}


def _name(module: nn.Module) -> str:
    """The class name of a diffusers module; empty for anyone else's, whose "Attention" may return anything."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("diffusers.") else ""


def _known(module: Any, parent: nn.Module) -> _Class | None:
    known = CLASSES.get(_name(module))
    if known is None or not known.fits(module):
        return None
    if not known.parents or _name(parent) in known.parents:
        return known
    return known if getattr(module, "residual_connection", False) else None


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _stays(layer: Any, address: str) -> nn.Module | None:
    """The part of a layer that its stand-in keeps."""
    if _name(layer) == "ResnetBlock2D":
        parts = [m for m in (layer.conv_shortcut, layer.upsample, layer.downsample) if isinstance(m, nn.Module)]
        return nn.ModuleList(parts)
    if address == "transformer_blocks.0":  # the output layer of a DiT reads the embedder of the first block
        emb = getattr(getattr(layer, "norm1", None), "emb", None)
        return emb if isinstance(emb, nn.Module) else None
    return None


def _entries(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Entries of lists of modules that are more than one operator, with their addresses. Samplers change sizes: not they."""
    for name, group in denoiser.named_modules():
        if isinstance(group, nn.ModuleList) and not name.endswith("samplers"):
            for i, module in enumerate(group):
                if any(True for _ in module.children()) and _size(module):
                    yield f"{name}.{i}" if name else str(i), module


def _passed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str | None:
    """The arguments that have the shapes of the outputs, in their order; None if there is no such reading."""
    outputs = output if isinstance(output, tuple) else (output,)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {k: v for k, v in {**dict(zip(names, args, strict=False)), **kwargs}.items() if isinstance(v, Tensor)}
    chosen: list[str] = []
    for out in outputs:
        if not isinstance(out, Tensor):
            return None
        fits = [k for k, v in given.items() if v.shape == out.shape and v.dtype == out.dtype and k not in chosen]
        if len(fits) > 1 and out.is_meta or not fits:
            return None
        chosen.append(max(fits, key=lambda k: _alike(given[k], out)) if len(fits) > 1 else fits[0])
    return ",".join(chosen)


def _alike(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
