"""report.json: the single source of every report. Markdown and HTML are drawn from it and from nothing else."""

from typing import Literal

from pydantic import Field

from ..core.candidate import Data, SamplingPlan
from ..core.measurement import Measurement

SCHEMA = 1  # raised when a field changes its meaning; added fields do not raise it


class Scored(Data):
    """A plan and what was measured on seeds and reference images that the search never saw."""

    name: str  # "searched", "trailing", "leading", ...
    plan: SamplingPlan
    measurements: tuple[Measurement, ...]
    macs: int = 0  # denoiser multiply-accumulates per image over all steps
    macs_ratio: float = 1.0  # against the uncut run with the asked number of steps
    sheet: str | None = None  # contact sheet of samples, a PNG beside report.json
    searched_value: float | None = None  # the objective on the search's own seeds, for comparison: it is optimistic
    rescored: Measurement | None = None  # the objective on the re-scoring seeds, which named the winner


class Row(Data):
    """One candidate of the search, on the search's seeds."""

    number: int
    origin: str
    state: Literal["complete", "failed"]
    plan: SamplingPlan
    value: float | None = None  # the objective
    others: dict[str, float] = Field(default_factory=dict)  # further metrics
    macs_ratio: float = 1.0
    rescored: float | None = None
    calls: int = 0
    seconds: float = 0.0
    error: str | None = None


class Spent(Data):
    """What the whole run cost, summed over all its sessions."""

    evaluations: int  # candidates whose images were really made
    calls: int  # denoiser forwards executed
    plain_calls: int  # forwards that the same work takes without memoised prefixes
    seconds: float


class Ratio(Data):
    """Of the objective, searched against best fixed. Above 1: searched is better, whichever way the metric points."""

    value: float
    low: float | None = None
    high: float | None = None


class SearchReport(Data):
    """Everything a search found and how it was measured."""

    schema_version: int = SCHEMA
    kind: Literal["search"] = "search"
    lissom: str  # version
    model: str  # reference as the user gave it, with the pinned revision
    model_hash: str
    pipeline: str  # class name
    denoiser_parameters: int
    method: str
    settings: dict[str, object] = Field(default_factory=dict)
    paper: str = ""
    objective: str  # metric name
    objective_label: str  # as printed, e.g. FD[zoo:judge]
    steps: int
    trials: int
    samples: int  # images per candidate in the search
    report_samples: int
    budget: dict[str, float] = Field(default_factory=dict)
    reference: dict[str, str] = Field(default_factory=dict)  # role -> what the images were compared with
    winner: Scored
    baselines: tuple[Scored, ...]
    best_fixed: str  # name of the best baseline on the report's seeds
    ratio: Ratio | None = None
    candidates: tuple[Row, ...]
    spent: Spent
    command: str  # rebuilds this run
    stock_call: str | None = None  # Python that gives the same images with plain diffusers, where one call can
    environment: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
