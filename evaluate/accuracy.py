"""Share of images recognised as the class they were asked to be: zero-shot classification, Radford et al., ICML 2021, Sec. 3.1.

An image counts when the caption of its class is, among the captions of all classes, the most similar to it. As a measure of
generators: Ravuri and Vinyals, https://arxiv.org/abs/1905.10887, with a fixed classifier in place of a retrained one.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ..core.errors import UserError
from ._sample import Part, Sample, Score, mean_score

parts = {"accuracy": Part("higher", "share")}  # 0..1
needs = frozenset({"features", "text", "labels"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.00020"


def evaluate(sample: Sample, config: Config) -> Score:
    """Share of images (N, D) whose nearest class (C, D) is their label. Raises UserError for a label that has no class."""
    import torch
    from torch.nn.functional import normalize

    assert sample.classes is not None  # in `needs`
    unknown = sorted({label for label in sample.labels if not 0 <= label < len(sample.classes)})
    if unknown:
        raise UserError(f"accuracy: label {unknown[0]} has no class, the features know classes 0 to {len(sample.classes) - 1}.")
    cosines = normalize(sample.features.double()) @ normalize(sample.classes.double()).T  # (N, C)
    right = cosines.argmax(1) == torch.tensor(sample.labels)  # (N,)
    return mean_score(right, sample.halves)
