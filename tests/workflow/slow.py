"""An extractor that takes its time, so that a test can kill who uses it, and worse ones; other processes load them too."""

import os
import time

from lissom.core.errors import UserError
from lissom.tests.evaluate.judge import Means
from torch import Tensor

BATCH_SECONDS = 0.2


class Slow(Means):
    def forward(self, images: Tensor) -> Tensor:
        time.sleep(BATCH_SECONDS)
        return super().forward(images)


def load(name: str, device: str = "cpu") -> Means:
    """Means for any name; Slow for `slow`."""
    return Slow() if name == "slow" else Means()


def absent(name: str, device: str) -> Means:
    raise UserError("no such features here")


def broken(name: str, device: str) -> Means:
    raise ZeroDivisionError("by zero")


def deadly(name: str, device: str) -> Means:
    os._exit(7)
