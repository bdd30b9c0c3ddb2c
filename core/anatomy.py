"""The layers of a denoiser that can be left out: where they are, what they weigh, and what stands in for them.

Layers are found by the class they have in diffusers, never by shape or name: what a layer returns, and whether its parent
adds that to a residual, is a property of the code. An unknown class is not listed. Skipping a layer in some steps and
removing it for good share the same substitute, so that both give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Removal = Literal["input", "shortcut", "zero"]
Substitute = Callable[..., Any]  # (layer, *args, **kwargs of its forward) -> what is returned in its place


@dataclass(frozen=True)
class Layer:
    """One layer that can be left out.

    `removal` says what its absence leaves behind: "input" (the layer holds its own residual: its input passes through),
    "shortcut" (a ResNet block: the resized and projected input), "zero" (a branch that its parent adds to a residual).
    """

    address: str  # in `denoiser.named_modules()`, e.g. "down_blocks.0.attentions.0"
    kind: str  # resnet, attention, transformer_block, self_attention, cross_attention, feed_forward
    params: int  # numbers in its parameters
    macs: int | None  # multiply-accumulates that leaving it out saves, per image and step; None until cost.measure ran
    removal: Removal


def layers(denoiser: nn.Module) -> list[Layer]:
    """Every layer of a denoiser that can be left out, in the order of `named_modules()`.

    `params` counts parameters that the layer shares with others too. A layer inside a listed layer is listed as well:
    leaving out both is the same as leaving out the outer one.
    """
    found, denoiser = [], uncompiled(denoiser)
    for address, module in denoiser.named_modules():
        parent = denoiser.get_submodule(address.rpartition(".")[0])
        known = _known(module, parent)
        if address and known is not None:  # the denoiser itself (address "") may be of a listed class: not a layer of itself
            params = sum(p.numel() for p in module.parameters())
            found.append(Layer(address, known.kind(module), params, None, known.removal(module)))
    return found


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
    return CLASSES[_name(layer)].substitute


def resized_shortcut(layer: Any, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """ResnetBlock2D: the shortcut path alone. (B, C_in, H, W) -> (B, C_out, H', W')."""
    x = input_tensor
    if layer.upsample is not None:
        x = layer.upsample(x.contiguous())  # upsampling a large channels-last batch needs it, as in the block itself
    elif layer.downsample is not None:
        x = layer.downsample(x)
    if layer.conv_shortcut is not None:
        x = layer.conv_shortcut(x)
    return x / layer.output_scale_factor


def wrapped_input(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Transformer2DModel: the feature map (B, C, H, W) unchanged, in the container that was asked for."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=hidden_states) if kwargs.get("return_dict", True) else (hidden_states,)


def plain_input(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A transformer block with one stream: the tokens (B, T, C) unchanged."""
    return hidden_states


def joint_input(
    layer: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor | None, Tensor]:
    """A block with two streams, SD3's or Flux's: text and image tokens unchanged, in that order.

    SD3's last block drops the text (`context_pre_only`) and returns None for it.
    """
    dropped = getattr(layer, "context_pre_only", False)
    return (None if dropped else encoder_hidden_states), hidden_states


def attention_absent(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention: its input where it adds the residual itself (pixel U-Nets), zeros where its parent does."""
    if layer.residual_connection:
        return hidden_states / layer.rescale_output_factor
    return torch.zeros_like(hidden_states)


def zeros(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A branch that its parent adds: nothing to add. (B, T, C)."""
    return torch.zeros_like(hidden_states)


@dataclass(frozen=True)
class _Class:
    kind: Callable[[Any], str]
    removal: Callable[[Any], Removal]
    substitute: Substitute
    parents: tuple[str, ...] = ()  # if given: offered only directly inside these classes, which add what it returns


def _attention_kind(layer: Any) -> str:
    if layer.residual_connection:
        return "attention"
    return "cross_attention" if layer.is_cross_attention else "self_attention"


def _block(stand_in: Substitute) -> _Class:
    return _Class(lambda layer: "transformer_block", lambda layer: "input", stand_in)


# Attention inside SD3's and Flux's blocks returns a pair or is fused with the feed-forward: not offered.
CLASSES: dict[str, _Class] = {
    "ResnetBlock2D": _Class(lambda layer: "resnet", lambda layer: "shortcut", resized_shortcut),
    "Transformer2DModel": _Class(lambda layer: "attention", lambda layer: "input", wrapped_input),
    "BasicTransformerBlock": _block(plain_input),
    "SanaTransformerBlock": _block(plain_input),
    "WanTransformerBlock": _block(plain_input),
    "JointTransformerBlock": _block(joint_input),
    "FluxTransformerBlock": _block(joint_input),
    "FluxSingleTransformerBlock": _block(joint_input),
    "Attention": _Class(
        _attention_kind,
        lambda layer: "input" if layer.residual_connection else "zero",
        attention_absent,
        parents=("BasicTransformerBlock", "SanaTransformerBlock"),
    ),
    "FeedForward": _Class(
        lambda layer: "feed_forward",
        lambda layer: "zero",
        zeros,
        parents=("BasicTransformerBlock", "WanTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock"),
    ),
}


def _name(module: nn.Module) -> str:
    """The class name of a diffusers module; empty for anyone else's, whose "Attention" may return anything."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("diffusers.") else ""


def _known(module: Any, parent: nn.Module) -> _Class | None:
    known = CLASSES.get(_name(module))
    if known is None or not known.parents or _name(parent) in known.parents:
        return known
    return known if getattr(module, "residual_connection", False) else None
