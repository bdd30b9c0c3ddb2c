"""Slim U-Nets: the hand-made block maps of BK-SDM, SSD-1B, Vega and KOALA, and any map of one's own. Weights are inherited.

Kim et al., "BK-SDM", ECCV 2024, arXiv 2305.15798: of every pair of (ResNet, attention) layers on the way down the first stays,
of the three on the way up the first and the last (the last alone fits the skip connection of the stage before); small also
loses the middle, tiny the innermost stage. Gupta et al., "Progressive Knowledge Distillation of Stable Diffusion XL", arXiv
2401.02677 (SSD-1B, Vega) and Lee et al., "KOALA", arXiv 2312.04005 lower the number of transformer blocks per attention;
KOALA keeps the pairs of BK. Which blocks stay is not said in what we could read: here the first ones (ours).
"""

import random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.candidate import Cut
from ..core.errors import UserError
from ._task import Pruned, Task

calibrated = False
own_target = True  # the map says how much goes; there is no --keep

Count = Annotated[int, Field(ge=0)]
Depths = list[Count | list[Count]]
Middle = Literal["whole", "resnet", "none"]
# Attention stages hold this many blocks in the models that a preset is for.
SD, SDXL = [1, 1, 1, None], [None, 2, 10]
PRESETS: dict[str, tuple[list[int | None], dict[str, Any]]] = {
    "bk-base": (SD, {"layers_per_block": 1}),
    "bk-small": (SD, {"layers_per_block": 1, "middle": "none"}),
    "bk-tiny": (SD, {"layers_per_block": 1, "middle": "none", "stages": 3}),
    "ssd-1b": (SDXL, {"down_depths": [0, [2, 2], [4, 4]], "up_depths": [[4, 4, 10], [2, 1, 1], 0], "middle": "resnet"}),
    "vega": (SDXL, {"down_depths": [0, [1, 1], [2, 2]], "up_depths": [[2, 2, 2], [1, 1, 1], 0], "middle": "resnet"}),
    "koala-1b": (SDXL, {"layers_per_block": 1, "down_depths": [0, 2, 6], "up_depths": [6, 2, 0], "middle_depth": 6}),
    "koala-700m": (SDXL, {"layers_per_block": 1, "down_depths": [0, 2, 5], "up_depths": [5, 2, 0], "middle": "none"}),
}


class Config(BaseModel):
    """A preset, a map, or a preset and what differs from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.15798"

    preset: str | None = None  # bk-base, bk-small, bk-tiny (SD 1 and 2), ssd-1b, vega, koala-1b, koala-700m (SDXL)
    layers_per_block: Count | list[Count] | None = None  # pairs that stay in each stage down; one more stays on the way up
    down_depths: Depths | None = None  # transformer blocks that stay, per stage or per attention, outermost stage first
    up_depths: Depths | None = None  # the same on the way up, innermost stage first
    middle: Middle | None = None  # whole, one ResNet, or none
    middle_depth: int | None = Field(default=None, ge=0)  # transformer blocks that stay in the middle
    stages: int | None = Field(default=None, ge=1)  # outer stages that stay
    experts: bool = False  # convolutions that go become experts of those that stay (A-SDM): to be taught afterwards


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The cuts that turn the U-Net into the one of the map. Raises UserError where the map is not for this U-Net."""
    unet: Any = task.denoiser
    is_made_of_pairs(unet)
    given = {k: v for k, v in config.model_dump().items() if v is not None and v is not False and k != "preset"}
    if config.preset is not None:
        preset = _preset(config.preset, unet)
        if config.middle in ("resnet", "none"):
            preset.pop("middle_depth", None)
        given = {**preset, **given}
    if not given:
        raise UserError(
            f"slim_unet: say what stays: --set preset=NAME ({', '.join(PRESETS)}) or a map, e.g. layers_per_block=1."
        )
    return Pruned(cuts=tuple(_cuts(unet, Config(**given))))


def is_made_of_pairs(unet: Any) -> None:
    """UserError unless all stages are lists of ResNets and attentions, which is all that a map speaks of."""
    from ..core import surgery

    down, up = surgery.stages(unet)
    if not down:
        raise UserError(f"slim_unet: {type(unet).__name__} is no U-Net. Use laptop, which cuts the blocks of transformers too.")
    known = {"resnets", "attentions", "downsamplers", "upsamplers"}
    for block in (*down, *up):
        names = {name for name, _ in block.named_children()}
        if "resnets" not in names or names - known:
            raise UserError(
                f"slim_unet: {type(unet).__name__} has a {type(block).__name__}, which is not made of pairs of ResNets and "
                "attentions. Use laptop, which cuts single layers."
            )


def _preset(name: str, unet: Any) -> dict[str, Any]:
    from ..core.methods import suggest

    if name not in PRESETS:
        raise UserError(f"slim_unet: no preset {name!r}; there are {', '.join(PRESETS)}.{suggest(name, PRESETS)}")
    shape, settings = PRESETS[name]
    depths = [_depth(block) for block in unet.down_blocks]
    pairs = [len(block.resnets) for block in unet.down_blocks]
    if depths != shape or set(pairs) != {2}:
        family = "Stable Diffusion 1 or 2" if shape == SD else "SDXL"
        raise UserError(
            f"slim_unet: preset {name} is for a U-Net of {family}'s shape (transformer blocks per stage: {_said(shape)}, two pairs "
            f"each); this one has {_said(depths)} and {pairs} pairs. Choose another preset, or write a map of your own."
        )
    return dict(settings)


def _depth(block: Any) -> int | None:
    """Transformer blocks of a stage's attentions; None without attention."""
    found = {len(a.transformer_blocks) for a in getattr(block, "attentions", ()) if hasattr(a, "transformer_blocks")}
    return max(found) if found else None


def _said(depths: list[int | None]) -> str:
    return ", ".join("none" if d is None else str(d) for d in depths)


def _cuts(unet: Any, config: Config) -> list[Cut]:
    """Cuts in the addresses of the U-Net as it is."""
    count = len(unet.down_blocks)
    stages = config.stages or count
    if stages > count:
        raise UserError(f"slim_unet: stages: {stages}: the U-Net has {count}.")
    cuts = [Cut(address=f"down_blocks.{k}", what="remove") for k in range(stages, count)]
    cuts += [Cut(address=f"up_blocks.{k}", what="remove") for k in range(count - stages)]
    if stages < count and unet.down_blocks[stages - 1].downsamplers is not None:
        cuts.append(Cut(address=f"down_blocks.{stages - 1}.downsamplers.0", what="remove"))
    layers = config.layers_per_block
    wanted = [layers] * stages if isinstance(layers, int) else layers or [len(b.resnets) for b in unet.down_blocks[:stages]]
    _fits("layers_per_block", wanted, stages)
    for k in range(stages):
        for side, n, keep in (("down", k, wanted[k]), ("up", count - 1 - k, wanted[k] + 1)):
            address = f"{side}_blocks.{n}"
            block = unet.get_submodule(address)
            have = len(block.resnets)
            if not 1 <= keep <= have:
                raise UserError(f"slim_unet: layers_per_block: {wanted[k]}: {address} has {have} layers and would keep {keep}.")
            # The last pair of an up stage alone fits the skip connection of the stage before.
            stay = tuple(range(keep)) if side == "down" else (*range(keep - 1), have - 1)
            if keep < have:
                cuts.append(Cut(address=address, what="keep_layers", value=stay))
                cuts += _experts(address, block, stay) if config.experts else []
            depths = config.down_depths if side == "down" else config.up_depths
            if depths is not None:
                _fits(f"{side}_depths", depths, stages)
                position = k if side == "down" else stages - 1 - k
                cuts += _shallower(address, block, stay, depths[position])
    return cuts + _middle(unet, config)


def _experts(address: str, block: Any, stay: tuple[int, ...]) -> list[Cut]:
    """A-SDM's assembly (arXiv 2406.00210): each 3x3 convolution that goes becomes an expert of the nearest one of its shape that stays.

    Which convolutions inherit from which is not in the text that we could read: ours.
    """
    taken: dict[str, list[str]] = {}
    for i in (i for i in range(len(block.resnets)) if i not in stay):
        for name in ("conv1", "conv2"):
            shape = getattr(block.resnets[i], name).weight.shape
            fits = [j for j in stay if getattr(block.resnets[j], name).weight.shape == shape]
            if fits:
                nearest = min(fits, key=lambda j: (abs(j - i), j))
                taken.setdefault(f"{address}.resnets.{nearest}.{name}", []).append(f"{address}.resnets.{i}.{name}")
    return [Cut(address=kept, what="replace", value=" ".join(["experts", *gone])) for kept, gone in taken.items()]


def _shallower(address: str, block: Any, stay: tuple[int, ...], depth: int | list[int]) -> list[Cut]:
    """Cuts of the transformer blocks beyond the depths. depth: of all attentions that stay, or of each."""
    attentions = list(getattr(block, "attentions", ()))
    if not attentions:
        return []
    wanted = [depth] * len(stay) if isinstance(depth, int) else depth
    _fits(f"depths of {address}", wanted, len(stay))
    return [
        cut
        for i, keep in zip(stay, wanted, strict=True)
        for cut in first_blocks(f"{address}.attentions.{i}", attentions[i], keep)
    ]


def first_blocks(address: str, attention: Any, keep: int) -> list[Cut]:
    """Cuts that leave the first transformer blocks of an attention. Of none, the projections are left, and do nothing."""
    have = len(getattr(attention, "transformer_blocks", ()))
    if keep > have:
        raise UserError(f"slim_unet: {address} has {have} transformer blocks and cannot keep {keep}.")
    if keep == 0 and have:
        return [Cut(address=address, what="replace", value="empty")]
    return [Cut(address=f"{address}.transformer_blocks.{j}", what="remove") for j in range(keep, have)]


def _middle(unet: Any, config: Config) -> list[Cut]:
    if config.middle_depth is not None and config.middle in ("resnet", "none"):
        raise UserError(
            f"slim_unet: middle_depth={config.middle_depth}: with middle={config.middle} no attention is left there."
        )
    if unet.mid_block is None or config.middle == "none":
        return [] if unet.mid_block is None else [Cut(address="mid_block", what="remove")]
    attentions = {i: a for i, a in enumerate(unet.mid_block.attentions) if a is not None}
    if config.middle == "resnet":
        gone = [f"attentions.{i}" for i in attentions] + [f"resnets.{i}" for i in range(1, len(unet.mid_block.resnets))]
        return [Cut(address=f"mid_block.{name}", what="remove") for name in gone]
    if config.middle_depth is None:
        return []
    return [cut for i, a in attentions.items() for cut in first_blocks(f"mid_block.attentions.{i}", a, config.middle_depth)]


def _fits(name: str, values: list[Any], count: int) -> None:
    if len(values) != count:
        raise UserError(f"slim_unet: {name}: {values} has {len(values)} entries, {count} are needed.")
