"""Peak memory of tensors while one call of the whole pipeline runs, its weights included.

On CUDA it is what the allocator handed out at most, elsewhere the sum of all storages that were alive at once. Both repeat to the
byte and leave out whatever else the process holds: the interpreter, its libraries, feature extractors. What kernels take for
themselves while they run is seen on CUDA only.
"""

import gc
from collections.abc import Callable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ._sample import Part, Rig, Sample, Score

parts = {"memory": Part("lower", "MiB")}
needs = frozenset({"rig"})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = ""
    batch: int = Field(1, ge=1)  # images per call


def evaluate(sample: Sample, config: Config) -> Score:
    """The peak of a second call, in MiB. Raises SamplingError for a batch that does not fit into memory."""
    rig = sample.rig
    assert rig is not None  # in `needs`
    call = rig.call(config.batch)
    call()  # what is made once and kept, such as compiled kernels, is not the second call's
    gc.collect()  # nor is what the first one left lying about
    cuda = rig.device.startswith("cuda")
    peak = _allocated(rig, call) if cuda else _alive(rig, call)
    kept = ("device", "dtype") if cuda else ("dtype",)
    conditions = {key: rig.conditions[key] for key in kept if key in rig.conditions}
    return Score(
        peak / 2**20, exact=True, n=0, conditions={**conditions, "batch": str(config.batch), "memory of": rig.device[:4]}
    )


def _allocated(rig: Rig, call: Callable[[], None]) -> float:
    """Bytes: the weights that wait on the device, and what the call adds to them."""
    import torch

    waiting = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in rig.weights() if t.is_cuda}
    before = torch.cuda.memory_allocated(rig.device)
    torch.cuda.reset_peak_memory_stats(rig.device)
    call()
    return float(sum(waiting.values()) + torch.cuda.max_memory_allocated(rig.device) - before)


def _alive(rig: Rig, call: Callable[[], None]) -> float:
    """Bytes of all storages that were alive at once: the weights, and what operators returned and was still held."""
    from ._storages import Storages

    with Storages(rig.weights()) as storages:
        call()
    return float(storages.peak)
