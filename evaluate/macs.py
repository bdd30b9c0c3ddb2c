"""Multiply-accumulates of the denoiser for one image, all steps, guidance and attention included (core/cost.py). Counted."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._sample import Part, Sample, Score

parts = {"macs": Part("lower", "MACs per image")}
needs = frozenset({"rig"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = ""


def evaluate(sample: Sample, config: Config) -> Score:
    """Of the plan, with its skips, or of as many plain steps. Raises CannotFollow for a pipeline that cannot be driven."""
    from ..core.cost import plan_macs

    rig = sample.rig
    assert rig is not None  # in `needs`
    costs = rig.costs()
    macs = plan_macs(costs, rig.plan) if rig.plan is not None else costs.total * rig.evaluations
    return Score(macs, exact=True, n=0)
