"""Normalized feature distillation (NFD): feature terms on one scale, so that none drowns the others.

Zhang et al., "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models", arXiv 2404.11098: terms with
numerically large features dominate plain feature distillation, so that each is weighted by the norm of the teacher's features.
The exact constant and whose statistics it is made of are not in the texts that we could read. Ours: each sample's term is divided
by the mean square of the teacher's features of that sample, |f_student - f_teacher|^2 / |f_teacher|^2, a relative squared error, which
is the same however a batch is split.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Pairing, Seen, Site

taught = True
SMALLEST = 1e-12  # of a mean square: a layer whose features are all zero teaches nothing


class Config(BaseModel):
    """Settings of normalized feature distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.11098"

    at: Literal["stages", "layers", "blocks"] = "stages"  # of a U-Net: stages; its ResNets and attentions; transformer blocks


def sites(pairing: "Pairing", config: Config) -> "list[Site]":
    """Where both models are watched: BK-SDM's sites, as in `features`."""
    from . import _sites

    return _sites.AT[config.at](pairing)


def loss(seen: "Seen", config: Config) -> "Tensor":
    """The sum over sites of relative squared errors: each is 1 for a student that answers with zeros."""
    import torch

    from ._seen import mean_square

    terms = []
    for student, teacher in seen.features.values():
        scale = mean_square(teacher, torch.zeros_like(teacher)).clamp(min=SMALLEST)
        terms.append((mean_square(student, teacher) / scale).mean())
    return torch.stack(terms).sum()
