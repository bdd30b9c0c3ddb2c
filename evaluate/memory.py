"""Peak memory while one call of the whole pipeline runs, weights included.

On CUDA it is what the allocator handed out at most, which is exact and repeats. Elsewhere it is the largest resident size of the
process in that time: the interpreter and its libraries are in it, and the operating system's habits too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ._sample import Part, Rig, Sample, Score

parts = {"memory": Part("lower", "MiB")}
needs = frozenset({"rig"})
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = ""
    batch: int = Field(1, ge=1)  # images per call
    repeats: int = Field(4, ge=4)  # calls, after one that is not counted


def evaluate(sample: Sample, config: Config) -> Score:
    """Median over calls of the peak, in MiB. Raises SamplingError for a batch that does not fit into memory."""
    import statistics

    from ..core.measurement import half_samples

    rig = sample.rig
    assert rig is not None  # in `needs`
    call = rig.call(config.batch)
    call()
    peaks, how = [], ""
    for _ in range(config.repeats):
        peak, how = _peak(rig, call)
        peaks.append(peak / 2**20)
    halves = tuple(statistics.median(peaks[i] for i in half) for half in half_samples(len(peaks)))
    conditions = {**rig.conditions, "batch": str(config.batch), "memory of": how}
    return Score(statistics.median(peaks), halves, n=len(peaks), conditions=conditions)


def _peak(rig: Rig, call: Callable[[], None]) -> tuple[float, str]:
    """Bytes, and what they are the peak of."""
    import torch

    if rig.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(rig.device)
        call()
        return float(torch.cuda.max_memory_allocated(rig.device)), "the device's allocator"
    try:
        RESET.write_text("5")  # from here on VmHWM is the peak since now
    except OSError:  # not Linux, or not allowed: the peak of the process's whole life
        import resource
        import sys

        call()
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), "the process since its start"
    call()
    line = next(text for text in STATUS.read_text().splitlines() if text.startswith("VmHWM"))
    return 1024.0 * int(line.split()[1]), "the process"
