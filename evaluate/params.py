"""Parameters of the denoiser: what `keep` of a pruning method is a share of. Counted, so that there is no interval."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._sample import Part, Sample, Score

parts = {"params": Part("lower", "parameters")}
needs = frozenset({"rig"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = ""


def evaluate(sample: Sample, config: Config) -> Score:
    """Numbers in the parameters of all denoisers of the pipeline."""
    assert sample.rig is not None  # in `needs`
    return Score(sample.rig.params, exact=True, n=0)
