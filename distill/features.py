"""Feature distillation: the outputs of a U-Net's stages (or of a transformer's blocks) against the teacher's.

L = sum over sites of E |f_student - f_teacher|^2, each term a mean over elements: the third term of BK-SDM's loss (Kim et al.,
arXiv 2305.15798). Its sites, as its published code hooks them: the outputs of all down and up stages, the down stages' after their
downsampler, the middle left out. Where the student's last down stage lost its downsampler with the stage after it (BK-SDM-Tiny), the
last layer of the stage is compared instead; the paper's code takes that layer's output projection, ours its output. For
transformers, which the paper does not treat, the sites are the outputs of all blocks that are left: ours.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Pairing, Seen, Site

taught = True


class Config(BaseModel):
    """Settings of feature distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.15798"

    at: Literal["stages", "layers", "blocks"] = "stages"  # of a U-Net: stages; its ResNets and attentions; transformer blocks


def sites(pairing: "Pairing", config: Config) -> "list[Site]":
    """Where both models are watched."""
    from . import _sites

    return _sites.AT[config.at](pairing)


def loss(seen: "Seen", config: Config) -> "Tensor":
    """The sum over sites: a site with large activations counts for more."""
    import torch

    from ._seen import mean_square

    return torch.stack([mean_square(*pair).mean() for pair in seen.features.values()]).sum()
