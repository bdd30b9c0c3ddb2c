"""report.json: the single source of every report. Markdown and HTML are drawn from it and from nothing else."""

from typing import Literal

from pydantic import Field

from ..core.candidate import Cut, Data, SamplingPlan
from ..core.measurement import Measurement

SCHEMA = 1  # raised when a field changes its meaning; added fields do not raise it


class Scored(Data):
    """A plan and what was measured on seeds and reference images that the search never saw."""

    name: str  # "searched", "trailing", "leading", ...
    plan: SamplingPlan  # layers named as in the model before it is cut
    cuts: tuple[Cut, ...] = ()  # of the model
    measurements: tuple[Measurement, ...]
    macs: int = 0  # denoiser multiply-accumulates per image over all steps
    macs_ratio: float = 1.0  # against the uncut run with the asked number of steps
    costs: dict[str, float] = Field(default_factory=dict)  # further shares of the uncut run: latency (predicted), params
    sheet: str | None = None  # contact sheet of samples, a PNG beside report.json
    searched_value: float | None = None  # the objective on the search's own seeds, for comparison: it is optimistic
    rescored: Measurement | None = None  # the objective on the re-scoring seeds, which named the winner


class Row(Data):
    """One candidate of the search, on the search's seeds."""

    number: int
    origin: str
    state: Literal["complete", "failed"]
    plan: SamplingPlan
    cuts: tuple[Cut, ...] = ()
    samples: int = 0  # images behind the value, where candidates were dropped after fewer than the others
    value: float | None = None  # the objective
    others: dict[str, float] = Field(default_factory=dict)  # further metrics
    macs_ratio: float = 1.0
    costs: dict[str, float] = Field(default_factory=dict)
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


class Gained(Data):
    """One more part of what was found, on top of those before: how the winner comes about from the best fixed schedule."""

    part: Literal["fixed", "timesteps", "models", "skips", "reuse", "cuts"]
    scored: Scored
    ratio: Ratio | None = None  # of the objective, the stage before against this one; above 1: this part made it better


class LatencyTable(Data):
    """Where predicted times come from, and how far they were off when whole runs were timed."""

    batch: int  # images in one call
    device: str
    latent: tuple[int, ...] = ()  # (C, H, W)
    whole: float  # milliseconds of one evaluation of the uncut denoiser
    layers: dict[str, float] = Field(default_factory=dict)  # milliseconds of each layer in it
    predicted: tuple[float, ...] = ()  # of some random candidates, as shares of the uncut run
    measured: tuple[float, ...] = ()  # the same candidates, whole pipeline runs timed in turns with the uncut one


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
    objective: str  # metric name; of several the first
    objectives: tuple[
        str, ...
    ] = ()  # all that were searched, where there are several: metrics and costs (macs, latency, params)
    objective_label: str  # as printed, e.g. FD[zoo:judge]
    space: tuple[str, ...] = ()  # what was varied: timesteps, skips, reuse, models, cuts, slim, masks, depth
    steps: int
    trials: int
    samples: int  # images per candidate in the search
    report_samples: int
    budget: dict[str, float] = Field(default_factory=dict)
    reference: dict[str, str] = Field(default_factory=dict)  # role -> what the images were compared with
    conditions: dict[str, str] = Field(default_factory=dict)  # whatever else the numbers depend on: screening, warm start, …
    winner: Scored
    front: tuple[
        Scored, ...
    ] = ()  # what can be picked: of several objectives the front, best first objective first; else elites
    picked: int = 1  # which of them the winner is, counted from 1
    gained: tuple[Gained, ...] = ()
    latency: LatencyTable | None = None
    baselines: tuple[Scored, ...]
    best_fixed: str  # name of the best baseline on the report's seeds
    ratio: Ratio | None = None
    candidates: tuple[Row, ...]
    spent: Spent
    command: str  # rebuilds this run
    opens: Literal["", "stock", "remote_code"] = ""  # how the cut model opens with diffusers; nothing: the model is not cut
    not_plain_because: str = ""  # of remote_code: which cut no stock config describes
    open_with: str = ""  # Python that opens the cut model with diffusers, without lissom
    stock_call: str | None = None  # Python that gives the same images with plain diffusers, where one call can
    environment: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
