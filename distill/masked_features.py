"""Masked feature distillation: hidden states of blocks against the teacher's, without the few activations that are far out.

Fang et al., "TinyFusion", arXiv 2412.01199, Sec. 3.4 and Table 5: diffusion transformers have massive activations that a student
of another depth cannot copy; plain feature distillation diverges on them. Per sample, over tokens and channels, what lies k = 2 or more standard
deviations from the mean is set to zero, in student and teacher each by its own statistics; the term is the mean square of
the difference, averaged over the matched blocks. Its weight falls linearly to zero over the training (beta: 1e-2 -> 0).

Notation: sigmas -> k, decay -> whether beta falls; `at` says which blocks are matched. The paper's map is fixed by depth: block i of a
model of half the blocks learns what block 2i + 1 of the teacher gives. `carried` is that for any structure (ours): a block answers for
those after it that were removed, so it is compared with the last teacher's block before the next one that stayed; `own` compares
it with what it was. `mask: either` drops an activation that is far out in one of the two (ours), `none` is the plain loss.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from ._seen import Pairing, Seen, Site

taught = True


class Config(BaseModel):
    """Settings of masked feature distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"

    at: Literal["carried", "own"] = "carried"  # the teacher's last block before the next that stayed, or the block itself
    sigmas: float = Field(default=2.0, gt=0)  # k: standard deviations from the mean beyond which an activation does not count
    mask: Literal["each", "either", "none"] = "each"  # each by its own; what is far out in either is dropped in both; no mask
    decay: bool = True  # whether the weight falls linearly to zero over the training


def sites(pairing: "Pairing", config: Config) -> "list[Site]":
    """Where both models are watched."""
    from . import _sites

    return _sites.carried(pairing) if config.at == "carried" else _sites.blocks(pairing)


def loss(seen: "Seen", config: Config) -> "Tensor":
    """The mean over blocks. Masked elements count in the mean, as zeros."""
    import torch

    from ._seen import mean_square

    terms = []
    for student, teacher in seen.features.values():
        ours, theirs = near(student, config.sigmas), near(teacher, config.sigmas)
        if config.mask == "either":
            ours = theirs = ours & theirs
        masked = (student, teacher) if config.mask == "none" else (student.float() * ours, teacher.float() * theirs)
        terms.append(mean_square(*masked).mean())
    left = 1 - seen.done if config.decay else 1.0
    return left * torch.stack(terms).mean()


def near(hidden: "Tensor", sigmas: float) -> "Tensor":
    """Which activations of a sample are less than so many standard deviations from its mean. (B, …) -> (B, …) bool."""
    flat = hidden.float().flatten(1)
    shape = (-1, *[1] * (hidden.ndim - 1))
    mean, spread = flat.mean(1).view(shape), flat.std(1, unbiased=False).view(shape)
    found: Tensor = (hidden.float() - mean).abs() < sigmas * spread
    return found
