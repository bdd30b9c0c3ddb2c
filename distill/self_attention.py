"""Self-attention distillation: the outputs of the self-attention layers against the teacher's.

Lee et al., "KOALA: Empirical Lessons Toward Memory-Efficient and Fast Diffusion Models for Text-to-Image Synthesis", arXiv 2312.04005:
among the features of SDXL's U-Net those of its self-attention layers matter most as distillation targets. Layers are matched by where
the student's come from: a KOALA student keeps the first blocks of each transformer, so that they are compared with the teacher's
first blocks. Which stages take part, and the terms' weights, are not in the texts that we could read: all that are left, summed, is ours.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Pairing, Seen, Site

taught = True


class Config(BaseModel):
    """Settings of self-attention distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.04005"


def sites(pairing: "Pairing", config: Config) -> "list[Site]":
    """The self-attention layers that the student still has."""
    from . import _sites

    return _sites.self_attentions(pairing)


def loss(seen: "Seen", config: Config) -> "Tensor":
    """The sum over layers of mean squared differences of their outputs."""
    import torch

    from ._seen import mean_square

    return torch.stack([mean_square(*pair).mean() for pair in seen.features.values()]).sum()
