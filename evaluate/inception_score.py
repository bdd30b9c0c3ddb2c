"""Inception score: sure of every image, and of many kinds of them. Salimans et al., https://arxiv.org/abs/1606.03498

exp of the mean Kullback-Leibler divergence of what the classifier says of an image, p(y|x), from its mean over all images,
p(y) (Sec. 4): 1 if all images look alike to it, C if every image is surely of one of C classes, all equally often. Taken
over all images; papers average it over 10 splits, which lowers it (each split has its own p(y)).
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._sample import Part, Sample, Score

parts = {"inception_score": Part("higher")}  # 1..C
needs = frozenset({"features", "probabilities"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/1606.03498"


def evaluate(sample: Sample, config: Config) -> Score:
    """Score of sample.probabilities (N, C), whose rows add up to 1."""
    import torch

    from . import _kernels

    assert sample.probabilities is not None  # in `needs`
    p = sample.probabilities.double()
    sets = _kernels.members(len(p), sample.halves)  # (S, N)
    sets = sets / sets.sum(1, keepdim=True)
    mean = sets @ p  # (S, C)
    # mean over x of sum p(y|x) log p(y|x), less sum p(y) log p(y); 0 log 0 is 0
    divergence = sets @ torch.xlogy(p, p).sum(1) - torch.xlogy(mean, mean).sum(1)
    value, *replicates = divergence.exp().tolist()
    return Score(value, tuple(replicates))
