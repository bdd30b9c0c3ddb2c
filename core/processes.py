"""Several processes that train one model together, as `accelerate launch` and torchrun start them.

The first one runs the command; the others wait until it comes to something that all must do, and are told what.
"""

import functools
import gc
import os
from datetime import timedelta
from typing import Any

from .errors import UserError

PATIENT = timedelta(days=30)  # others wait while the first prepares, samples and scores; a dead one ends them by the launcher
REFUSED = (  # of accelerate's settings, with what to do instead
    ("FSDP_VERSION", "1", "Launch with --use_fsdp --fsdp_version 2"),
    ("FSDP_OFFLOAD_PARAMS", "true", "Leave it out, and start more processes where memory is short"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "Leave it out, and give lissom --set checkpointing=true"),
)


def rank() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Processes that work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def spread() -> bool:
    """Whether the launch asks for weights that are spread over the processes: `accelerate launch --use_fsdp`.

    Takes the wish out of the environment: accelerate would spread by rules of its own and on GPUs alone, and transformers load
    empty weights in all processes but the first.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and count() > 1
    for name, value, instead in REFUSED if asked else ():
        if os.environ.get(name, "").lower() == value:
            raise UserError(f"accelerate launch --{name.lower()} {value}: not supported here. {instead}.")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return asked


@functools.cache
def team(device: str) -> "Team":
    """The one of this process."""
    return Team(device)


def end() -> None:
    """End the groups of this process while the interpreter is whole: their threads may hold tensors, and abort it otherwise.

    What holds groups (weights that are spread) refers to itself, so that only the collector lets go of it. Only for a process that
    has done its work: after an error in one, the groups of a graphics card would wait for the others, and these for the launcher.
    """
    from torch import distributed

    team.cache_clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()


class Team:
    """The processes of a launch. Calls of `tell` in the first meet calls of `hear` in all others."""

    def __init__(self, device: str) -> None:
        """device: as given on the command line; on accelerators each process has its own."""
        from accelerate import PartialState

        spread()  # before anything is loaded
        self.state = PartialState(cpu=device == "cpu", timeout=PATIENT)
        self.device = str(self.state.device)
        self._group: Any = None
        if count() > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo", timeout=PATIENT)  # words, not tensors on a device

    def tell(self, words: Any) -> None:
        """From the first process to all others."""
        self._share([words])

    def hear(self) -> Any:
        """What the first process tells."""
        return self._share([None])

    def _share(self, box: list[Any]) -> Any:
        if self._group is not None:
            from torch import distributed

            distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
