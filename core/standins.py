"""What stands in for a layer of a denoiser that is skipped or cut, and how cuts change the module tree.

This file imports torch and of lissom only narrowing.py (and that slicing.py) and experts.py, which do the same: an artifact whose cuts no
stock config can express carries the text of all four, so that diffusers opens it where lissom is not installed. Cuts come as plain JSON: {"address": ...,
"what": ..., "value": ...}.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts import mixed
from .narrowing import NARROWS, narrowed, unhooked


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


def wrapped_input(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Transformer2DModel: the feature map (B, C, H, W) unchanged, in the container that was asked for."""
    if not kwargs.get("return_dict", True):
        return (hidden_states,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=hidden_states)


def plain_input(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer with one stream that holds its own residual: its first argument unchanged."""
    return hidden_states


def joint_input(
    layer: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor | None, Tensor]:
    """A block with two streams, SD3's or Flux's: text and image tokens unchanged, in that order.

    SD3's last block drops the text (`context_pre_only`) and returns None for it.
    """
    dropped = getattr(layer, "context_pre_only", False)
    return (None if dropped else encoder_hidden_states), hidden_states


def both_inputs(
    layer: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """A block with two streams, CogView's or HunyuanVideo's: image and text tokens unchanged, in that order."""
    return hidden_states, encoder_hidden_states


def x_input(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`plain_input` of a layer that calls its first argument x."""
    return x


def attention_absent(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention: its input where it adds the residual itself (pixel U-Nets), zeros where its parent does."""
    if layer.residual_connection:
        return hidden_states / layer.rescale_output_factor
    return torch.zeros_like(hidden_states)


def zeros(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A branch that its parent adds: nothing to add. (B, T, C)."""
    return torch.zeros_like(hidden_states)


# class name -> the function that stands in for it
STAND_INS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "BriaFiboSingleTransformerBlock", "ChromaSingleTransformerBlock", "Flux2SingleTransformerBlock", "HunyuanDiTBlock",
            "Ideogram4TransformerBlock", "Krea2TextFusionBlock", "Krea2TransformerBlock", "Lumina2TransformerBlock",
            "LuminaNextDiTBlock", "NucleusMoEImageTransformerBlock", "PRXBlock",
        ),
        plain_input,
    ),
    **dict.fromkeys(
        (
            "BriaFiboTransformerBlock", "ChromaTransformerBlock", "Flux2TransformerBlock", "LongCatImageTransformerBlock",
            "LongCatImageSingleTransformerBlock", "OvisImageTransformerBlock", "OvisImageSingleTransformerBlock",
            "QwenImageTransformerBlock",
        ),
        joint_input,
    ),
    **dict.fromkeys(
        (
            "CogVideoXBlock", "CogView3PlusTransformerBlock", "CogView4TransformerBlock", "GlmImageTransformerBlock",
            "HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock", "HunyuanVideoTransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
        ),
        both_inputs,
    ),
    **dict.fromkeys(("ErnieImageSharedAdaLNBlock", "ZImageTransformerBlock"), x_input),
    "ResnetBlock2D": resized_shortcut,
    "Transformer2DModel": wrapped_input,
    "BasicTransformerBlock": plain_input,
    "SanaTransformerBlock": plain_input,
    "WanTransformerBlock": plain_input,
    "JointTransformerBlock": joint_input,
    "FluxTransformerBlock": joint_input,
    "FluxSingleTransformerBlock": joint_input,
    "Attention": attention_absent,
    "FeedForward": zeros,
    "UNetMidBlock2DCrossAttn": plain_input,
    "UNetMidBlock2D": plain_input,
}  # fmt: skip
# What a stand-in still reads of the layer, or its parents do (channels tell which skip connection fits where).
ATTRIBUTES = (
    "output_scale_factor", "residual_connection", "rescale_output_factor", "context_pre_only", "in_channels", "out_channels",
)  # fmt: skip


class Absent(nn.Module):
    """Takes the place of a layer that was cut: the same call, the same kind of answer, no weights but those it still needs.

    A ResNet keeps its resampling and its trained 1x1 shortcut; the first block of a DiT keeps the embedder that the output
    layer reads. `returns`: for a class that STAND_INS does not know, the names of the arguments that it passes on, in order,
    separated by commas.
    """

    def __init__(self, layer: Any, returns: str | None = None, embedder: bool = False) -> None:
        super().__init__()
        self.was, self.returns = type(layer).__name__, returns
        for name in ATTRIBUTES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        if self.was == "ResnetBlock2D":
            self.conv_shortcut, self.upsample, self.downsample = layer.conv_shortcut, layer.upsample, layer.downsample
        if embedder:
            self.norm1 = nn.Module()
            self.norm1.emb = layer.norm1.emb
        self.arguments = _arguments(layer) if returns else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.returns is None:
            return STAND_INS[self.was](self, *args, **kwargs)
        given = {**dict(zip(self.arguments, args)), **kwargs}  # noqa: B905  there may be fewer arguments than names
        passed = tuple(given[name] for name in self.returns.split(","))
        return passed if len(passed) > 1 else passed[0]

    def extra_repr(self) -> str:
        return self.was


def _arguments(layer: Any) -> list[str]:
    return list(inspect.signature(type(layer).forward).parameters)[1:]


def emptied(layer: Any) -> Any:
    """A Transformer2DModel without blocks whose output projection is zero: its input passes through, by its residual.

    Unlike Absent it keeps norm and projections, and a stock config can express it.
    """
    empty = unhooked(copy.copy(layer))
    empty._modules = dict(layer._modules)
    empty.transformer_blocks = nn.ModuleList()
    # A hook is not copied: under sequential offload it holds all weights of the model.
    hooks = [m._hf_hook for m in layer.proj_out.modules() if hasattr(m, "_hf_hook")]
    empty.proj_out = copy.deepcopy(layer.proj_out, {id(hook): hook for hook in hooks}).requires_grad_(False)
    for module in empty.proj_out.modules():
        computes_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        unhooked(module)
        for name, p in module.named_parameters(recurse=False):
            if not p.is_meta:
                p.zero_()
            elif computes_on is not None:  # the hook that would have brought the weights is gone
                module._parameters[name] = nn.Parameter(torch.zeros_like(p, device=computes_on), requires_grad=False)
    return empty


def cut(denoiser: Any, cuts: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
    """Apply cuts to a denoiser in place; returns a function that undoes them exactly. Raises ValueError for one that does not fit.

    remove: an Absent takes the layer's place; a sampler, a whole stage or the middle of a U-Net is taken out.
    keep_layers: a block of a U-Net keeps the (ResNet, attention) pairs of these indices, renumbered.
    keep_heads, keep_units, keep_channels, keep_modulation: a layer keeps those of these indices; see `narrowed`.
    replace by "empty": see `emptied`; by "experts ADDRESS …": see `mixed`. Those others have to be cut.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def set_module(parent: Any, name: str, module: Any) -> None:
        undo.append((parent._modules, name, parent._modules[name]))
        parent._modules[name] = module

    def back() -> None:
        for place, name, before in reversed(undo):
            place[name] = before

    try:
        # All layers are looked up before any is moved: addresses are those of the denoiser as it was given.
        found = [(each, *find(denoiser, each["address"])) for each in cuts]
        others = {each["address"]: [find(denoiser, a)[2] for a in named] for each in cuts if (named := _experts(each))}
        for each, parent, name, layer in sorted(found, key=_order):
            address, what, value = each["address"], each["what"], each.get("value")
            if what == "keep_layers":
                lists = {k: m for k, m in layer._modules.items() if isinstance(m, nn.ModuleList) and not k.endswith("samplers")}
                count = len(lists.get("resnets", ()))
                stay = list(value) if isinstance(value, (list, tuple)) else []
                if not stay or stay != sorted(set(stay) & set(range(count))) or any(len(m) != count for m in lists.values()):
                    raise ValueError(f"{address}: cannot keep layers {value} of {count}")
                for part, entries in lists.items():  # what runs side by side: resnets, attentions, motion modules, ...
                    set_module(layer, part, nn.ModuleList(entries[i] for i in stay))
            elif what in NARROWS:
                if (narrow := narrowed(layer, address, what, value)) is not layer:
                    set_module(parent, name, narrow)
            elif what == "replace" and value == "empty" and type(layer).__name__ == "Transformer2DModel":
                set_module(parent, name, emptied(layer))
            elif address in others:
                try:
                    set_module(parent, name, mixed(layer, others[address]))
                except ValueError as e:
                    raise ValueError(f"{address}: {e}") from None
            elif what != "remove":
                raise ValueError(f"{address}: {what} {value if value is not None else ''} cannot be applied here")
            elif isinstance(parent, nn.ModuleList) and address.rpartition(".")[0] in ("down_blocks", "up_blocks"):
                side = address.partition(".")[0]
                set_module(denoiser, side, nn.ModuleList(m for m in denoiser._modules[side] if m is not layer))
            elif _is_sampler(parent, address, layer):
                block, part = address.rpartition(".")[0].rpartition(".")[::2]
                set_module(denoiser.get_submodule(block), part, None)
            elif address == "mid_block":
                set_module(denoiser, address, None)
            else:
                first_of_dit = (
                    address == "transformer_blocks.0" and getattr(getattr(layer, "norm1", 0), "emb", None) is not None
                )
                if value is None and type(layer).__name__ not in STAND_INS:
                    raise ValueError(f"{address}: what stands in for {type(layer).__name__} is not known")
                if value is not None and (strange := [n for n in value.split(",") if n not in _arguments(layer)]):
                    raise ValueError(f"{address}: {type(layer).__name__} has no argument {strange[0]!r} to pass on")
                set_module(parent, name, Absent(layer, value, embedder=first_of_dit))
        if "num_upsamplers" in denoiser.__dict__:  # UNet2DConditionModel tells from it which sizes it takes
            undo.append((denoiser.__dict__, "num_upsamplers", denoiser.num_upsamplers))
            denoiser.num_upsamplers = sum(getattr(b, "upsamplers", None) is not None for b in denoiser.up_blocks)
        taken = {id(other) for each in others.values() for other in each}
        for address, module in denoiser.named_modules(remove_duplicate=False) if taken else ():
            if id(module) in taken and ".experts." not in address:
                raise ValueError(f"{address}: is an expert of another layer and still there itself; cut it")
    except BaseException:
        back()
        raise
    return back


def _experts(each: Mapping[str, Any]) -> list[str]:
    """The addresses of the layers that become experts beside the one that a cut replaces."""
    value = each.get("value")
    return value.split()[1:] if each["what"] == "replace" and isinstance(value, str) and value.startswith("experts ") else []


def _is_sampler(parent: Any, address: str, layer: Any) -> bool:
    """Whether a block does without a layer once its list of samplers is gone. One that is a ResNet still has to resample."""
    samplers = isinstance(parent, nn.ModuleList) and address.rpartition(".")[0].endswith("samplers")
    return samplers and type(layer).__name__ not in STAND_INS


def find(denoiser: Any, address: str) -> tuple[Any, str, Any]:
    above, _, name = address.rpartition(".")
    try:
        parent = denoiser.get_submodule(above)
        layer = parent._modules[name]
    except (AttributeError, KeyError):
        layer = None
    if layer is None or not address:
        raise ValueError(f"{address}: the denoiser has no such layer")
    return parent, name, layer


def _order(item: tuple[Mapping[str, Any], Any, str, Any]) -> tuple[Any, ...]:
    """Inner layers first, lists of layers after what is in them, stages last and from the end."""
    address, what = item[0]["address"], item[0]["what"]
    stage = address.count(".") == 1 and address.startswith(("down_blocks", "up_blocks")) and what == "remove"
    return (stage, what == "keep_layers", -address.count("."), address)


def pruned(base: Any) -> Any:
    """The subclass of a diffusers model that applies `cuts` after it is built: groups of cuts, one after the other.

    diffusers keeps only the config keys that it finds in the signature of `__init__`, hence the signature.
    """

    class Pruned(base):
        def __init__(self, *args: Any, cuts: Any = (), **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_to_config(cuts=[[dict(each) for each in group] for group in cuts])
            for group in cuts:
                cut(self, group)

    own = inspect.signature(base.__init__)
    cuts = inspect.Parameter("cuts", inspect.Parameter.KEYWORD_ONLY, default=())
    init: Any = Pruned.__init__
    init.__signature__ = own.replace(parameters=[*own.parameters.values(), cuts])
    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    return Pruned
