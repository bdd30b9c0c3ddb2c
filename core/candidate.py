"""What a search proposes and what is scored: steps, plans, cuts, candidates, requests. Plain data with canonical JSON."""

import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

Role = Literal["calibrate", "search", "rescore", "report"]


class Data(BaseModel):
    """Frozen, refuses unknown fields, and writes itself as canonical JSON: sorted keys, fields at their default omitted.

    Because defaults are omitted, a field added later leaves the hash of older records as it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """JSON-ready dict without the fields that hold their default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def canonical(self) -> str:
        return canonical(self.plain())

    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Step(Data):
    """One solver interval. It may call the denoiser more than once (Heun, PLMS): what it says holds for all of its calls.

    >>> Step(timestep=999, skip=("b", "a", "a")).canonical()
    '{"skip":["a","b"],"timestep":999}'
    >>> Step(timestep=9, reuse=("a",)).executes("a.b"), Step(timestep=9, reuse=("a",)).executes("ab")
    (False, True)
    """

    timestep: float  # as the scheduler holds it: 0..N-1 for variance-preserving schedules, (0, N] for flow matching
    sigma: float | None = None  # noise level after all shifting, for schedulers whose sigma is not a function of the timestep
    skip: tuple[str, ...] = ()  # addresses of layers that are not executed in this step
    reuse: tuple[str, ...] = ()  # nor are these: what they did in the latest step that executed them is done again
    model: str | None = Field(default=None, pattern=r"^\w[\w-]*$")  # another model makes this step: the name it was lent under

    @field_validator("skip", "reuse")
    @classmethod
    def _sorted(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(addresses)))  # one set of layers, one key

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := sorted(set(self.skip) & set(self.reuse)):
            raise ValueError(f"a layer is skipped or reused in a step, not both: {', '.join(both)}")
        if self.model is not None and self.left_out:
            raise ValueError(f"a step that another model ({self.model}) makes executes all of it: leave out `skip` and `reuse`")
        return self

    @property
    def left_out(self) -> tuple[str, ...]:
        """Addresses of all layers that this step does not execute."""
        return (*self.skip, *self.reuse)

    def executes(self, address: str) -> bool:
        """Whether this step executes the layer: no other model makes it, and neither the layer nor one around it is left out."""
        return self.model is None and not any(address == a or address.startswith(a + ".") for a in self.left_out)

    @field_serializer("timestep")
    def _whole(self, timestep: float) -> float | int:
        return int(timestep) if timestep == int(timestep) else timestep


class Scheduler(Data):
    """A diffusers scheduler: class name and config (private keys and library versions left out)."""

    name: str  # e.g. "DDIMScheduler"
    config: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """Describe a diffusers scheduler instance."""
        config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
        return cls(name=type(scheduler).__name__, config=json.loads(json.dumps(config, default=_listed)))


class SamplingPlan(Data):
    """How to sample: the solver and its steps, timesteps strictly descending.

    >>> SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=(Step(timestep=3), Step(timestep=3)))
    Traceback (most recent call last):
    pydantic_core._pydantic_core.ValidationError: 1 validation error for SamplingPlan
      Value error, timesteps must strictly descend, got (3.0, 3.0) ...
    """

    scheduler: Scheduler
    steps: tuple[Step, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _descending(self) -> Self:
        times = self.timesteps
        if any(a <= b for a, b in itertools.pairwise(times)):
            raise ValueError(f"timesteps must strictly descend, got {times}")
        return self

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(step.timestep for step in self.steps)

    def renamed(self, name: Callable[[str], str | None]) -> Self:
        """The plan for a model whose layers go by other names: None for one that is gone, which is then left out of no step."""

        def of(addresses: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(sorted(new for a in addresses if (new := name(a)) is not None))

        steps = (s.model_copy(update={"skip": of(s.skip), "reuse": of(s.reuse)}) for s in self.steps)
        return self.model_copy(update={"steps": tuple(steps)})

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the other models that make some of the steps."""
        return tuple(sorted({step.model for step in self.steps if step.model is not None}))

    def without(self, *fields: Literal["skip", "reuse", "model"]) -> Self:
        """The plan without any skips, or reuse, or other models: the pipeline's own executes these layers, or makes these steps."""
        none: dict[str, Any] = {field: Step.model_fields[field].default for field in fields}
        return self.model_copy(update={"steps": tuple(step.model_copy(update=none) for step in self.steps)})

    def pretty(self) -> str:
        """The text of plan.json: canonical content, indented, one newline at the end."""
        return json.dumps(self.plain(), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class Cut(Data):
    """One change of a denoiser's structure."""

    address: str  # of the layer, in its immediate parent model
    # keep_layers: the (ResNet, attention) pairs of a U-Net's stage that stay; remove: a layer, a sampler, a whole stage
    what: Literal["remove", "keep_layers", "keep_heads", "keep_units", "keep_channels", "keep_modulation", "replace"]
    # Indices that stay; the name of the replacement ("empty"); of a removed block of a class that diffusers does not explain,
    # the arguments of its forward that are passed on.
    value: tuple[int, ...] | str | None = None


class Candidate(Data):
    """What is varied: a plan, cuts, or both. The plan's layers are then named as in the model before it is cut."""

    plan: SamplingPlan | None = None
    cuts: tuple[Cut, ...] = ()

    @field_validator("cuts")
    @classmethod
    def _sorted(cls, cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
        return tuple(sorted(set(cuts), key=lambda cut: cut.canonical()))


class Seeds(Data):
    """A block of image seeds. Image `index` of a role has one seed, whatever block, batch or machine it is drawn in.

    >>> Seeds(role="search", base=0, count=3).values() == Seeds(role="search", base=0, count=9).values()[:3]
    True
    >>> set(Seeds(role="search", base=0, count=99).values()) & set(Seeds(role="report", base=0, count=99).values())
    set()
    """

    role: Role
    base: int  # the user's --seed
    count: int = Field(ge=1)
    start: int = Field(default=0, ge=0)

    def values(self) -> tuple[int, ...]:
        return tuple(image_seed(self.role, self.base, i) for i in self.indices())

    def indices(self) -> range:
        return range(self.start, self.start + self.count)


class Request(Data):
    """A candidate and how to score it."""

    candidate: Candidate
    seeds: Seeds  # seeds.count is the number of samples
    origin: str = ""  # how it came about ("mutation", "uniform", ...): for the record, not part of the key
    # What it costs as shares of the uncut run (macs, latency, params), known before it is scored: not part of the key either.
    costs: dict[str, float] = Field(default_factory=dict)

    def key(self, evaluator: str) -> str:
        """The trial key: sha256 of candidate, evaluator, seeds and number of samples."""
        record = {"candidate": self.candidate.plain(), "evaluator": evaluator, "seeds": self.seeds.plain()}
        return hashlib.sha256(canonical(record).encode()).hexdigest()


def image_seed(role: str, base: int, index: int) -> int:
    """63-bit seed = hash(role, base, index): blocks of different roles or bases never overlap (up to 2^-63 chance)."""
    digest = hashlib.sha256(f"{role}/{base}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def canonical(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN.

    >>> canonical({"b": 1, "a": [2.5, None]})
    '{"a":[2.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _listed(value: Any) -> Any:
    """JSON for the odd things in scheduler configs (numpy arrays and scalars, tuples in older files)."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
