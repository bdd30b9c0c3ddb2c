"""Time of one call of the whole pipeline: text encoder, every step, decoder. Medians and 90th percentiles, after a warm-up.

The clock stops when the device has finished. The interval covers the repetitions of this run; a machine that is busier
tomorrow is outside it, so compare values that were taken on one machine in one job. The record names device, data type,
threads and whether the denoiser is compiled, and values under other conditions are not compared.
"""

import time
from contextlib import nullcontext
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ._sample import Part, Rig, Sample, Score

parts = {"latency": Part("lower", "ms per call"), "latency_p90": Part("lower", "ms per call")}
needs = frozenset({"rig"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = ""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1
    )  # images per call; the first has the plain names
    warmup: int = Field(2, ge=0)  # calls that are not timed: kernels are chosen and compiled in them
    repeats: int = Field(20, ge=4)  # timed calls per batch size
    compile: bool = False  # torch.compile the denoiser first; compiling itself is not timed


def evaluate(sample: Sample, config: Config) -> dict[str, Score]:
    """latency and latency_p90 of the first batch size, latency@B and latency_p90@B of the others, in milliseconds.

    Raises SamplingError for a batch that does not fit into memory.
    """
    rig = sample.rig
    assert rig is not None  # in `needs`
    found = {}
    with rig.compiled() if config.compile else nullcontext():
        for place, batch in enumerate(config.batches):
            times = _times(rig, batch, config.warmup + config.compile, config.repeats)
            suffix = "" if place == 0 else f"@{batch}"
            conditions = {**rig.conditions, "batch": str(batch), "compiled": "yes" if config.compile else "no"}
            for name, share in (("latency", 0.5), ("latency_p90", 0.9)):
                found[name + suffix] = _quantile_score(times, share, conditions)
    return found


def _times(rig: Rig, batch: int, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of every timed call."""
    call = rig.call(batch)
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def _quantile_score(times: list[float], share: float, conditions: dict[str, str]) -> Score:
    import numpy as np

    from ..core.measurement import half_samples

    halves = tuple(float(np.quantile([times[i] for i in half], share)) for half in half_samples(len(times)))
    return Score(float(np.quantile(times, share)), halves, n=len(times), conditions=conditions)
