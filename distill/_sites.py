"""Places where student and teacher are compared, found in the student's structure."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core import anatomy
from ..core.errors import UserError
from ..core.surgery import stages as unet_stages
from ._seen import Pairing, Site


def stages(pairing: Pairing) -> list[Site]:
    """The outputs of a U-Net's down and up stages; of models without stages the outputs of their blocks."""
    down, up = unet_stages(pairing.student)
    if not down:
        return blocks(pairing)
    found = []
    for address in (*(f"down_blocks.{k}" for k in range(len(down))), *(f"up_blocks.{k}" for k in range(len(up)))):
        site = pairing.site(address)
        if _resamples(pairing.student, site.student) == _resamples(pairing.teacher, site.teacher):
            found.append(site)
        else:  # it ends at another size than the teacher's stage: compared before the resampling
            found.append(Site(_last(pairing.student, site.student), _last(pairing.teacher, site.teacher)))
    return found


def layers(pairing: Pairing) -> list[Site]:
    """The outputs of all ResNets and attentions (in transformers: of all blocks) that the student still has."""
    kinds = ("resnet", "attention") if unet_stages(pairing.student)[0] else ("transformer_block",)
    return _of_kinds(pairing, kinds)


def blocks(pairing: Pairing) -> list[Site]:
    """The outputs of all transformer blocks that the student still has."""
    return _of_kinds(pairing, ("transformer_block",))


def self_attentions(pairing: Pairing) -> list[Site]:
    """The outputs of all self-attention layers that the student still has."""
    return _of_kinds(pairing, ("self_attention",))


def carried(pairing: Pairing) -> list[Site]:
    """The outputs of all transformer blocks that the student still has, each against the teacher's last block before the next one
    that stayed: what the removed blocks after it did is its to do.
    """
    found = blocks(pairing)
    there: dict[str, list[str]] = {}  # the teacher's blocks, by the list that they are in
    for layer in anatomy.layers(pairing.teacher):
        if layer.kind == "transformer_block":
            there.setdefault(layer.address.rpartition(".")[0], []).append(layer.address)
    stayed = {site.teacher for site in found}
    sites = []
    for site in found:
        after = there[site.teacher.rpartition(".")[0]]
        last = after.index(site.teacher)
        while last + 1 < len(after) and after[last + 1] not in stayed:
            last += 1
        sites.append(Site(site.student, after[last]))
    return sites


AT: dict[str, Callable[[Pairing], list[Site]]] = {"stages": stages, "layers": layers, "blocks": blocks}


def _of_kinds(pairing: Pairing, kinds: tuple[str, ...]) -> list[Site]:
    found = [pairing.site(layer.address) for layer in anatomy.layers(pairing.student) if layer.kind in kinds]
    if not found:
        wanted = " or ".join(kind.replace("_", " ") for kind in kinds)
        raise UserError(
            f"{type(anatomy.uncompiled(pairing.student)).__name__}: the student has no {wanted} layer to compare. Choose other losses."
        )
    return found


def _resamples(denoiser: nn.Module, stage: str) -> bool:
    block: Any = denoiser.get_submodule(stage)
    return bool(getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None))


def _last(denoiser: nn.Module, stage: str) -> str:
    """The last layer of a stage before it resamples: its last attention, or ResNet where it has none."""
    block: Any = denoiser.get_submodule(stage)
    part = "attentions" if len(getattr(block, "attentions", ())) else "resnets"
    return f"{stage}.{part}.{len(getattr(block, part)) - 1}"
