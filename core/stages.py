"""What the stages of a recipe say: one frozen model for each verb. A method's own settings stand beside these keys."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .candidate import Data

COSTS = ("macs", "latency", "params")  # what a candidate costs, known before it is scored: shares of the uncut K-step run


class SearchStage(Data):
    """Search a sampling plan and cuts: `{search: METHOD, steps: K, …}`. The method's own settings stand beside these keys."""

    search: str  # a file in search/, or a module of your own (mylab.search.mine)
    steps: int = Field(default=4, ge=1)  # K: solver steps of the plan
    trials: int = Field(default=120, ge=1)  # candidates scored, baselines and re-scores excluded
    samples: int = Field(default=256, ge=4)  # images per candidate, the same seeds for all
    # What is searched: a metric, or several metrics and costs (macs, latency, params), the one that matters most first.
    objective: tuple[str, ...] = Field(default=("fid",), min_length=1)
    budget: dict[Literal["macs", "latency", "params"], float] = Field(
        default_factory=dict
    )  # at most this share of the uncut run
    # What is varied: timesteps, layers that single steps skip, layers that they reuse from earlier ones, which of the recipe's
    # models makes a step, cuts of single layers, the slim U-Nets' grammar of stages, heads and units by learned gates, depth
    # blocks by their learned chance to stay.
    space: tuple[Literal["timesteps", "skips", "reuse", "models", "cuts", "slim", "masks", "depth"], ...] = Field(
        default=("timesteps", "skips"), min_length=1
    )
    scheduler: str | None = None  # a diffusers scheduler class to use instead of the model's own
    rescore: int = Field(default=8, ge=1)  # elites scored again on fresh seeds before a winner is named
    rescore_samples: int = Field(default=1024, ge=4)
    pick: int | None = Field(default=None, ge=1)  # of the elites, or of the front of several objectives, which is exported
    warm_start: str | None = None  # folder of another search, whose best plans open this one
    learned: tuple[str, ...] = ()  # runs whose scores `masks` and `depth` in the space start from: of prune masks, tinyfusion
    seeded_by: str | None = "laptop"  # prune method whose choices open a search of cuts; null for none
    calibration: int = Field(default=64, ge=1)  # images whose denoiser calls that method's losses are measured on
    latency_batch: int = Field(default=1, ge=1)  # images in a call, where latency counts
    # Images at which candidates are compared; the best part of them goes on to the next number, the last is `samples`.
    fidelity: tuple[Annotated[int, Field(ge=4)], ...] = ()
    screen: float | None = Field(default=None, gt=0, lt=1)  # share of the candidates that passes by teacher-trajectory error
    control: bool = False  # correct values by what the best fixed schedule does on the same seeds (control variate)
    settings: dict[str, Any] = Field(default_factory=dict)  # the method's Config, validated

    @field_validator("objective", "learned", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _sensible(self) -> "SearchStage":
        for name, share in self.budget.items():
            if not 0 < share <= 1:
                raise ValueError(f"budget {name}={share:g}: must be above 0 and at most 1, a share of the uncut run")
        if "timesteps" not in self.space:
            raise ValueError("space must contain timesteps")
        if "reuse" in self.space and self.steps < 2:
            raise ValueError("space: reuse: a single step has no step before it. Give more steps, or take skips instead")
        if self.learning and not self.learned:
            raise ValueError(
                f"space: {self.learning[0]}: starts from learned scores. Name the run that learned them (learned: RUN, --learned RUN)"
            )
        if self.learned and not self.learning:
            raise ValueError("learned: has no effect on this space. Add masks or depth to it, whichever was learned")
        if "latency" in {*self.budget, *self.objective} and "masks" in self.space:
            raise ValueError(
                "space: masks: how time shrinks with width is not in the table of layer times. Use macs instead of latency"
            )
        if len(set(self.objective)) < len(self.objective):
            raise ValueError(f"objective {', '.join(self.objective)}: names one twice")
        if self.objective[0] in COSTS:
            raise ValueError(
                f"objective {self.objective[0]}: a cost alone is least for a model that does nothing. Name a metric first"
            )
        if list(self.fidelity) != sorted(set(self.fidelity)) or (self.fidelity and self.fidelity[-1] != self.samples):
            raise ValueError(
                f"fidelity {list(self.fidelity)}: numbers of images that ascend, the last equal to samples ({self.samples})"
            )
        return self

    @property
    def method(self) -> str:
        return self.search

    @property
    def ways(self) -> tuple[Literal["skip", "reuse"], ...]:
        """How a step may leave layers out, if it may."""
        skips: tuple[Literal["skip"], ...] = ("skip",) if "skips" in self.space else ()
        return (*skips, "reuse") if "reuse" in self.space else skips

    @property
    def cutting(self) -> bool:
        """Whether the model itself is varied."""
        return self.unlearned or bool(self.learning)

    @property
    def unlearned(self) -> bool:
        """Whether it is by cuts that need no learning."""
        return "cuts" in self.space or "slim" in self.space

    @property
    def learning(self) -> tuple[str, ...]:
        """The parts of the space that start from learned scores."""
        return tuple(part for part in self.space if part in ("masks", "depth"))


KEEP = 0.7  # share that is left where none is given


class PruneStage(Data):
    """Make the model smaller: `{prune: METHOD, keep: R, …}`. The method's own settings stand beside these keys."""

    prune: str  # a file in prune/, or a module of your own (mylab.prune.mine)
    keep: float | None = None  # share of the cost that is left at most [0.7]; methods that bring a structure take none
    of: Literal["params", "macs", "latency"] = "params"  # what `keep` is a share of: of all denoisers of the pipeline
    calibration: int = Field(default=64, ge=1)  # images whose denoiser calls the losses are measured on
    times: int = Field(default=8, ge=1)  # noise levels that these calls are spread over
    data: str | None = None  # image folder or zip to take them from; teacher (the model's own trajectories) by default
    units: tuple[str, ...] = ()  # kinds of layers that may be cut; resnet, attention and transformer_block by default
    shortcuts: bool = True  # ResNets that change the number of channels may go too: their trained 1x1 shortcut stays
    include: tuple[str, ...] = ()  # patterns of addresses (up_blocks.*): only these layers may be cut
    exclude: tuple[str, ...] = ()  # patterns of addresses: these layers may not be cut
    require_plain_load: bool = False  # only cuts that a stock config expresses: no trust_remote_code is ever needed
    measure: bool = True  # score the model before and after, where there are prompts and features
    steps: int | None = Field(default=None, ge=1)  # solver steps of the images that are scored; the pipeline's default
    latency_batches: tuple[Annotated[int, Field(ge=1)], ...] = (
        1,
        64,
    )  # batches at which one call of the denoiser is timed; [] for none
    save_dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the saved weights; the parent's by default
    variant: str | None = Field(default=None, pattern=r"^\w+$")  # in the names of the weight files, e.g. fp16
    shard_size: str = Field(default="5GB", pattern=r"^\d+(MB|GB)$")  # of a weight file at most
    settings: dict[str, Any] = Field(default_factory=dict)  # the method's Config, validated

    @model_validator(mode="after")
    def _sensible(self) -> "PruneStage":
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep:g}: must be above 0 and at most 1, the share of the {self.of} that is left")
        return self

    @property
    def method(self) -> str:
        return self.prune

    @property
    def share(self) -> float:
        """`keep`, or its default."""
        return KEEP if self.keep is None else self.keep


class DistillStage(Data):
    """Give a smaller model its quality back: `{distill: PRESET, iterations: N, …}`. The student is what the stage before it made."""

    distill: str  # a preset: the sum of losses that a paper recovers quality with
    teacher: str | None = None  # model to learn from; the one that the student was pruned from by default
    # A file in distill/, or a module of your own -> its weight, or a mapping of weight and the loss's settings; instead of the preset's.
    losses: dict[str, float | dict[str, Any]] = Field(default_factory=dict)
    iterations: int = Field(default=500, ge=1)
    batch: int = Field(default=64, ge=1)  # samples behind each update, over all processes
    accumulate: int = Field(default=1, ge=1)  # parts that each process runs its share of a batch in
    learning_rate: float = Field(default=5e-5, gt=0)  # of AdamW
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)  # iterations in which the rate rises from zero
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float | None = Field(default=1.0, gt=0)  # of the gradient's norm; null for none
    ema: float = Field(default=0.999, ge=0, lt=1)  # decay of the averaged weights, which are what is saved; 0 for none
    precision: Literal["no", "fp16", "bf16"] = "no"  # of the student's forward; its weights stay float32
    teacher_dtype: Literal["float32", "float16", "bfloat16"] | None = None  # float16 on an accelerator, float32 elsewhere
    checkpointing: bool = False  # of gradients: less memory, one more forward of the student
    data: str | None = None  # image folder or zip, zoo:fashion; teacher (its own trajectories, no images at all) by default
    images: int = Field(default=1024, ge=1)  # made by the teacher, where it is the data
    data_steps: int | None = Field(default=None, ge=1)  # solver steps of these images; the pipeline's default
    flip: bool = False  # show images of a folder mirrored too
    check_every: int = Field(default=0, ge=0)  # iterations between looks at the averaged weights; 0 for none
    check_samples: int = Field(default=256, ge=4)  # images of such a look
    patience: int = Field(default=0, ge=0)  # looks without improvement after which the training ends; 0 for never
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # that accelerate logs to, beside losses.jsonl
    measure: bool = True  # score teacher and student before and after, where there are prompts and features
    steps: int | None = Field(default=None, ge=1)  # solver steps of the images that are scored; the pipeline's default
    save_dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the saved weights; the student's by default
    variant: str | None = Field(default=None, pattern=r"^\w+$")  # in the names of the weight files, e.g. fp16
    shard_size: str = Field(default="5GB", pattern=r"^\d+(MB|GB)$")  # of a weight file at most
    settings: dict[str, Any] = Field(default_factory=dict)  # presets have none of their own

    @model_validator(mode="after")
    def _sensible(self) -> "DistillStage":
        if self.patience and not self.check_every:
            raise ValueError("patience: without check_every there is nothing that could improve. Give check_every too")
        for name, given in self.losses.items():
            weight = given if not isinstance(given, dict) else given.get("weight", 1.0)
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"losses: {name}: its weight must be a number above 0, got {weight!r}")
        return self

    @property
    def method(self) -> str:
        return self.distill
