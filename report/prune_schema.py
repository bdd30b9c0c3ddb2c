"""report.json of `lissom prune`: the single source of its Markdown and HTML pages."""

from typing import Literal

from pydantic import Field

from ..core.candidate import Cut, Data
from ..core.measurement import Measurement
from .schema import SCHEMA, Ratio


class Size(Data):
    """What a denoiser weighs."""

    params: int  # numbers in the parameters of all denoisers of the pipeline
    macs: int  # multiply-accumulates per image and call of the denoiser, attention included; guidance calls it twice
    disk: int  # bytes of the denoiser's weight files


class Latency(Data):
    """Time of one call of the denoiser, before and after, taken in turns in one process on one machine."""

    batch: int  # images in the call, before guidance doubles them
    before: float  # milliseconds, median
    after: float
    ratio: Ratio  # after / before: below 1 the pruned model is faster; the interval covers the repetitions


class LayerScore(Data):
    """A layer that could have been cut."""

    address: str  # in the parent, e.g. "up_blocks.1.attentions.0"
    kind: str  # resnet, attention, transformer_block, ...
    params: int  # freed by cutting it
    macs: int | None = None  # saved by cutting it, per image and call
    score: float | None = None  # what the method thinks its loss is; None for methods that score nothing
    cut: bool = False
    width: int | None = None  # heads, units or channels, where it could have got narrower: params and macs are those of all


class Additivity(Data):
    """Whether the sum of single-layer scores tells what leaving out several layers costs (the assumption of one-shot scores)."""

    sums: tuple[float, ...]  # of random subsets: the sum of their layers' scores
    losses: tuple[float, ...]  # of the same subsets, really left out together
    rank_correlation: float  # Spearman's, over the subsets
    ratio: float  # median of loss / sum


class Scored(Data):
    """A model and what was measured on seeds that nothing else used."""

    name: Literal["teacher", "before", "after"]
    measurements: tuple[Measurement, ...]
    sheet: str | None = None  # contact sheet of samples, a PNG beside report.json; the same seeds in both


class PruneReport(Data):
    """What was cut, what it saved, what it cost in quality, and how the result is opened."""

    schema_version: int = SCHEMA
    kind: Literal["prune"] = "prune"
    lissom: str  # version
    model: str  # the parent's reference, with the pinned revision
    model_hash: str
    pipeline: str  # class name
    denoiser: str  # class name
    method: str
    settings: dict[str, object] = Field(default_factory=dict)
    paper: str = ""
    stage: dict[str, object] = Field(default_factory=dict)  # as in a recipe, its settings apart
    seed: int = 0
    keep: float | None = None  # the share that was asked for; None where the method brings its own structure
    of: Literal["params", "macs", "latency"] = "params"  # what `keep` is a share of
    before: Size
    after: Size
    latency: tuple[Latency, ...] = ()
    score_label: str = ""  # what the scores of the layers are, e.g. "output loss"
    layers: tuple[LayerScore, ...] = ()  # in the order of the network
    cuts: tuple[Cut, ...]
    loss: float | None = None  # of all cuts together
    loss_is: str = "E |eps(pruned) - eps|^2 per element on the calibration calls"  # what `loss` is
    predicted_loss: float | None = None  # the sum of the scores of what was cut
    additivity: Additivity | None = None
    scored: tuple[Scored, ...] = ()  # before and after; empty when nothing was sampled
    samples: int = 0  # images behind each measurement
    steps: int | None = None  # solver steps of the images
    reference: str = ""
    opens_plain: bool  # whether DiffusionPipeline.from_pretrained opens it without trust_remote_code
    open_with: str  # Python that opens it
    not_plain_because: str = ""
    renamed: int = 0  # modules whose names changed; lissom.json has the map
    reload_difference: float  # largest difference of outputs, relative to their largest, between memory and a fresh process
    calibration: dict[str, object] = Field(default_factory=dict)
    spent: dict[str, float] = Field(default_factory=dict)  # seconds; full forwards' worth of work
    command: str
    environment: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
