"""Run a diffusers pipeline's own `__call__` along a sampling plan: see `follow`."""

from .drive import follow, watch
from .memo import Memo
from .refusals import check
from .run import CannotFollow, Run
from .schedulers import evaluations

__all__ = ["CannotFollow", "Memo", "Run", "check", "evaluations", "follow", "watch"]
