"""How well images show their captions. CLIPScore, Hessel et al., EMNLP 2021, https://arxiv.org/abs/2104.08718

The value is the raw mean cosine (Sec. 3 without the factor w = 2.5 and without max(0, .)): other tools print it x 2.5 or
x 100. It depends on the model that reads both, so only values of the same features compare.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._sample import Part, Sample, Score, mean_score

parts = {"clip_score": Part("higher", "cosine")}  # -1..1
needs = frozenset({"features", "text", "captions"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08718"


def evaluate(sample: Sample, config: Config) -> Score:
    """Mean cosine between sample.features (N, D) and sample.text (N, D), row by row."""
    from torch.nn.functional import cosine_similarity

    assert sample.text is not None  # in `needs`
    return mean_score(cosine_similarity(sample.features.double(), sample.text.double()), sample.halves)  # (N,)
