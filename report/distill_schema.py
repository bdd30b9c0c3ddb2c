"""report.json of `lissom distill`: the single source of its Markdown and HTML pages."""

from typing import Literal

from pydantic import Field

from ..core.candidate import Data
from .prune_schema import Scored
from .schema import SCHEMA


class Line(Data):
    """The losses of some iterations, averaged."""

    iteration: int  # the last of them, counted from 1
    terms: dict[str, float]  # each loss, before its weight
    total: float  # the weighted sum
    gradient_norm: float  # before clipping
    learning_rate: float


class Check(Data):
    """The averaged weights, looked at along the way. Not on the seeds that the result is reported on."""

    iteration: int
    value: float  # lower is better; of DistillReport.check_label
    sheet: str | None = None  # contact sheet, a PNG beside report.json


class DistillReport(Data):
    """What was taught, how it went, and what it gave back in quality."""

    schema_version: int = SCHEMA
    kind: Literal["distill"] = "distill"
    lissom: str  # version
    model: str  # the student's reference, with the pinned revision
    model_hash: str
    teacher: str
    teacher_hash: str
    pipeline: str  # class name
    denoiser: str  # class name
    preset: str
    losses: dict[str, float]  # a loss -> its weight
    paper: str = ""
    stage: dict[str, object] = Field(default_factory=dict)  # as in a recipe
    seed: int = 0
    params: int  # of the student's denoisers
    teacher_params: int
    scales: dict[str, float] = Field(default_factory=dict)  # each loss, before its weight, before the first iteration
    sites: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # a loss of features -> the student's layers it compares
    curve: tuple[Line, ...] = ()
    check_label: str = ""  # e.g. "FD[zoo:judge] on 256 images", or "validation loss"
    checks: tuple[Check, ...] = ()
    iterations: int  # that were done
    asked: int  # for
    stopped_early: bool = False
    restarts: int = 0  # returns to an earlier state after a NaN
    frozen: int = 0  # parameters that no loss reaches, which stayed as they were
    scored: tuple[Scored, ...] = ()  # teacher, before and after; empty when nothing was sampled
    samples: int = 0  # images behind each measurement
    steps: int | None = None  # solver steps of the images
    reference: str = ""
    opens_plain: bool
    open_with: str  # Python that opens it
    not_plain_because: str = ""
    reload_difference: float  # largest difference of outputs, relative to their largest, between memory and a fresh process
    data: dict[str, object] = Field(default_factory=dict)  # what was trained on, as facts
    spent: dict[str, float] = Field(default_factory=dict)  # of this session: seconds, iterations
    command: str
    environment: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
