"""Several processes that train one model together, as `accelerate launch` and torchrun start them.

The first one runs the command; the others wait until it comes to something that all must do, and are told what.
"""

import functools
import os
from datetime import timedelta
from typing import Any

PATIENT = timedelta(days=30)  # others wait while the first prepares, samples and scores; a dead one ends them by the launcher


def rank() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Processes that work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def team(device: str) -> "Team":
    """The one of this process."""
    return Team(device)


class Team:
    """The processes of a launch. Calls of `tell` in the first meet calls of `hear` in all others."""

    def __init__(self, device: str) -> None:
        """device: as given on the command line; on accelerators each process has its own."""
        from accelerate import PartialState

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
