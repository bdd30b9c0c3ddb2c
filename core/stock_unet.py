"""What the config of a stock U-Net can express, and how to read it off a cut one: UNet2DConditionModel and UNet2DModel.

Stages may hold fewer (ResNet, attention) pairs, the same number down and (plus one) up; every attention its own number of
transformer blocks; a stage's side no attention at all; the middle is whole, one ResNet, or not there; inner stages may be
missing. A ResNet or attention left out alone is not expressible. A UNet2DModel has the same number of pairs in all stages, and
its middle is whole, without attention, or not there.
"""

from typing import Any

from .standins import Absent

PER_STAGE = (
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim", "num_attention_heads",
    "cross_attention_dim", "only_cross_attention", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
)  # fmt: skip
INNERMOST_FIRST = ("up_block_types", "reverse_transformer_layers_per_block")
WITHOUT_ATTENTION = {
    "CrossAttnDownBlock2D": "DownBlock2D", "AttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D", "AttnUpBlock2D": "UpBlock2D",
}  # fmt: skip


def express_unet(unet: Any, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    """(config, moved modules) of a U-Net that holds stand-ins, or the reason why no stock config has its shape."""
    if inner := _inside(unet):
        return inner
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    new = _fewer_stages(config, len(down))
    sizes = [len(block.resnets) for block in down]
    for k, block in enumerate(up):
        if len(block.resnets) != sizes[-1 - k] + 1:
            mirrored = len(down) - 1 - k
            return (
                f"down_blocks.{mirrored} has {sizes[mirrored]} layers and up_blocks.{k} {len(block.resnets)}: a stock config "
                "gives it one more"
            )
    uneven = [k for k, size in enumerate(sizes) if size != sizes[0]]
    if uneven and "transformer_layers_per_block" not in config:
        return f"down_blocks.{uneven[0]} has {sizes[uneven[0]]} layers and down_blocks.0 {sizes[0]}: this class has one number"
    new["layers_per_block"] = sizes if uneven else sizes[0]

    moved: dict[str, str] = {}
    sides: dict[str, list[Any]] = {}
    for side, blocks in (("down", down), ("up", up)):
        types, depths = list(new[f"{side}_block_types"]), []
        for k, block in enumerate(blocks):
            slots = list(getattr(block, "attentions", ()))
            gone = [isinstance(a, Absent) for a in slots]
            if slots and all(gone):
                if types[k] not in WITHOUT_ATTENTION:
                    return f"{side}_blocks.{k}: a {types[k]} without attention has no stock class"
                types[k] = WITHOUT_ATTENTION[types[k]]
                slots = []
            elif any(gone):
                return f"{side}_blocks.{k}.attentions.{gone.index(True)} is left out alone (others of its stage stay)"
            found = [_compact(a, f"{side}_blocks.{k}.attentions.{i}", moved) for i, a in enumerate(slots)]
            depths.append(None if None in found else found or None)
        new[f"{side}_block_types"] = types
        sides[side] = depths
    middle = _middle(unet, new, moved)
    if isinstance(middle, str):
        return middle
    if "transformer_layers_per_block" not in config:
        return new, moved
    return _depths(new, config, sides["down"], sides["up"], middle[0]) or (new, moved)


def _inside(unet: Any) -> str | None:
    """A reason for what is left out where configs do not reach: one ResNet of a stage, parts of a transformer block."""
    for address, module in unet.named_modules():
        if not isinstance(module, Absent):
            continue
        slot = address.rpartition(".")[0].endswith((".resnets", ".attentions"))
        if module.returns is not None and not slot:  # an operator: some have no weights, so that names and shapes show nothing
            return f"{address}: no stock config leaves out a single operator"
        if module.was == "ResnetBlock2D" and not address.startswith("mid_block."):
            return f"{address} is left out alone, without its pair's slot"
        if ".transformer_blocks." in address and "." in address.rpartition(".transformer_blocks.")[2]:
            return f"{address}: no stock config leaves out a layer inside a block"
    return None


def _fewer_stages(config: dict[str, Any], count: int) -> dict[str, Any]:
    """A config whose settings per stage are those of the `count` outermost stages."""
    new = dict(config)
    before = len(config["down_block_types"])
    for key in PER_STAGE:
        value = new.get(key)
        if isinstance(value, list) and len(value) == before and count < before:
            new[key] = value[-count:] if key in INNERMOST_FIRST else value[:count]
    return new


def _compact(attention: Any, address: str, moved: dict[str, str]) -> int | None:
    """Number the transformer blocks that stay anew; returns how many there are. None for attention that holds no such blocks."""
    if not hasattr(attention, "transformer_blocks"):
        return None
    stay = [i for i, block in enumerate(attention.transformer_blocks) if not isinstance(block, Absent)]
    for position, i in enumerate(stay):
        if i != position:
            moved[f"{address}.transformer_blocks.{i}"] = f"{address}.transformer_blocks.{position}"
    return len(stay)


def _middle(unet: Any, new: dict[str, Any], moved: dict[str, str]) -> tuple[int | None] | str:
    """Set mid_block_type; returns the depth of the middle's attention in a tuple (None: it has none), or a reason."""
    middle = unet.mid_block
    if middle is None:
        new["mid_block_type"] = None
        return (None,)
    resnets = [i for i, r in enumerate(middle.resnets) if not isinstance(r, Absent)]
    attentions = [a for a in middle.attentions if a is not None and not isinstance(a, Absent)]
    gone = [
        f"mid_block.{part}.{i}"
        for part in ("resnets", "attentions")
        for i, module in enumerate(getattr(middle, part))
        if isinstance(module, Absent)
    ]
    if not gone:
        return (_compact(attentions[0], "mid_block.attentions.0", moved) if attentions else None,)
    if not attentions:
        if not resnets:
            new["mid_block_type"] = None
            return (None,)
        if new.get("add_attention") and len(resnets) == len(middle.resnets):
            new["add_attention"] = False
            return (None,)
        if new["mid_block_type"] == "UNetMidBlock2DCrossAttn" and len(resnets) == 1:
            new["mid_block_type"] = "UNetMidBlock2D"
            if resnets[0] != 0:
                moved[f"mid_block.resnets.{resnets[0]}"] = "mid_block.resnets.0"
            return (None,)
    stock = "whole, without attention" if "add_attention" in new else "whole, one ResNet"
    return f"{gone[0]} is left out and other parts of the middle stay: a stock one is {stock}, or not there"


def _depths(new: dict[str, Any], config: dict[str, Any], down: list[Any], up: list[Any], middle: int | None) -> str | None:
    """Set transformer_layers_per_block (and its reverse) from the depth of every attention. A reason where it cannot be.

    The middle's depth is the last entry, or its first number where that is a list: with attention in the last stage (SDXL)
    it is tied to that stage's first attention, without (SD 1) it is free.
    """
    old = config["transformer_layers_per_block"]
    usual = [old] * len(config["down_block_types"]) if isinstance(old, int) else list(old)
    forward: list[Any] = []
    for k, depths in enumerate(down):
        forward.append(depths if depths is not None else usual[k])
    if middle is not None:
        if down[-1] is None:
            forward[-1] = middle
        elif down[-1][0] != middle:
            return (
                f"mid_block.attentions.0 has {middle} blocks and down_blocks.{len(down) - 1}.attentions.0 {down[-1][0]}: a stock "
                "config ties them"
            )
    backward = [depths if depths is not None else 1 for depths in up]
    forward = [_single(entry) for entry in forward]
    backward = [_single(entry) for entry in backward]
    mirrored = list(reversed(backward))
    even = all(not isinstance(e, list) for e in (*forward, *backward))
    if even and all(f == b or up[-1 - k] is None for k, (f, b) in enumerate(zip(forward, mirrored, strict=True))):
        new["transformer_layers_per_block"] = forward[0] if isinstance(old, int) and len(set(forward)) == 1 else forward
        new["reverse_transformer_layers_per_block"] = None
    else:
        new["transformer_layers_per_block"] = forward
        new["reverse_transformer_layers_per_block"] = backward
    return None


def _single(entry: Any) -> Any:
    """[2, 2] -> 2: a number where all attentions of a stage agree."""
    return entry[0] if isinstance(entry, list) and len(set(entry)) == 1 else entry
