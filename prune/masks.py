"""Differentiable masks: which heads, units and modulation channels go is learned through whole sampling trajectories.

Zhang et al., "Learnable Sparsity for Vision Generative Models" ("Effortless Efficiency", EcoDiff), arXiv 2412.02852: hard-concrete gates
on attention heads and feed-forward units (of FLUX also on what its norms are told: `modulation`), shared over all timesteps and
by both halves of guidance; the objective is the distance of the final latents E |F(z, y) - F(z, y, M)|^2 from those of the
whole model, F the whole sampler, differentiated by checkpointing the denoiser at every timestep. Weights stay as they are.

Notation: logits -> lambda of a gate, all equal to begin with; delta -> the noise's end, rate -> learning rate; F's steps -> solver_steps.

What differs, and why. The paper adds a norm of lambda to the loss, which pulls to gates that are half open and does not know what a
gate costs. Here the expected cost in closed form, sum of c_i P(M_i > 0), is a constraint: in every step all logits are shifted by the one number
with which it is the user's target (`_hard_concrete.shift`; a budget over all layers that is kept in every step is the idea of
Zhou et al., arXiv 2105.01571; the shift and its gradient are ours), which rises over the first part (`ramp`). So gates compete: one opens
where that lowers the distance by more than the same cost does elsewhere, and nothing weighs the cost against the distance. No weight
decay. Noise is drawn once per step of the optimiser: one structure for a whole trajectory, as after pruning, and the same when a call is computed
again. In the last part (`settle`) the gates are those that will be cut, 0 or 1, with a straight-through gradient: what is learned
is what is deployed. What goes is decided over all layers by lambda, negative ones too.
"""

import math
import random
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..core.candidate import Cut
from ..core.errors import UserError
from ..core.widths import Width, by_class, limited, rounded
from ._task import Pruned, Task, enough
from ._widths import many_shapes

if TYPE_CHECKING:
    from torch import Tensor

calibrated = "trajectories"  # asks for distances of final latents
narrows = True  # cuts widths, not layers

Scores = Mapping[Width, Sequence[float]]  # of each head, unit or channel group
What = Literal["heads", "units", "channels", "modulation"]
BOTH: tuple[What, ...] = ("heads", "units")
HALF_OPEN = 1.34  # logits nearer to zero are gates of 0.1 to 0.9 without noise: ALPHA log 5


class Config(BaseModel):
    """Settings of learned masks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.02852"

    what: tuple[What, ...] = Field(default=BOTH, min_length=1)  # of attentions, feed-forwards, norms (FLUX); ours: of ResNets
    # Distance of the final latents; or of every answer by itself, on what the whole model came to.
    objective: Literal["final", "steps"] = "final"  # of what the distance is taken; steps: the paper's ablation
    solver_steps: int | None = Field(default=10, ge=1)  # steps of the trajectories; the paper has 50, SDXL's and FLUX-dev's own
    iterations: int = Field(default=100, ge=1)  # steps of the optimiser; the paper: 100 of 4 trajectories
    batch: int = Field(default=4, ge=1)  # trajectories behind each step
    images: int = Field(default=100, ge=1)  # different trajectories that are learned from, again and again; the paper's 100
    rate: float = Field(default=0.1, gt=0)  # learning rate of the logits; the paper's for SDXL
    delta: float = Field(default=1e-8, gt=0)  # end of the noise, at log((1 + delta) / delta); the paper's SDXL: 0.5
    ramp: float = Field(default=0.4, ge=0, lt=1)  # share of the steps over which the target rises from nothing
    settle: float = Field(default=0.25, ge=0, lt=1)  # share of the steps, the last ones, with the gates that will be cut
    least: float = Field(default=0.0, ge=0, le=1)  # share of every layer that stays; one head, unit or group in any case
    round_to: int = Field(default=1, ge=1)  # what stays of all but heads is a multiple of this: fast kernels want 8 or 64
    shapes: int | None = Field(default=None, ge=1)  # different widths at most in the blocks of one class; torch.compile makes 8
    by_block: bool = False  # compute blocks again one by one too: less memory, one more forward
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of averaged logits; 0: the last ones count
    clip: float = Field(default=1.0, gt=0)  # of the gradient's norm
    gates: str | None = None  # gates.safetensors of an earlier run: cut by these, at another ratio, nothing is learned

    @model_validator(mode="after")
    def _sensible(self) -> "Config":
        if self.by_block and self.objective == "steps":
            raise ValueError("by_block: with objective=steps nothing is computed again. Leave it out")
        return self


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Learn gates and cut what is least open, as much as the target needs. UserError where gates that were given do not fit."""
    widths = task.widths
    if task.need <= 0:
        return Pruned(cuts=())
    need = _reachable(task, widths, config)
    lesson = task.lesson()
    logits = (
        lesson.read(config.gates) if config.gates is not None else _learned(task, widths, config, need, rng.getrandbits(62))
    )
    scores = _by_width(widths, logits)
    lesson.keep(logits, {"widths": [[w.address, w.what, w.count, w.granule] for w in widths]})
    cuts = chosen(task, widths, scores, config)
    values = [value for one in scores.values() for value in one]
    undecided = sum(abs(value) < HALF_OPEN for value in values)
    warnings = list(many_shapes(task, cuts))
    if 2 * undecided > len(values):
        warnings.append(f"{undecided} of {len(values)} gates are half open: learn for longer, or let the target rise faster")
    elif max(values) - min(values) < HALF_OPEN:
        warnings.append("the gates hardly differ, so that what goes is hardly chosen: learn for longer, or at a higher rate")
    return Pruned(
        cuts=cuts,
        scores={width.address: math.fsum(one) / len(one) for width, one in scores.items()},
        label="mean of the learned logits",
        warnings=tuple(warnings),
    )


def _learned(task: Task, widths: Sequence[Width], config: Config, need: float, seed: int) -> "dict[str, Tensor]":
    """The logits of every width's groups, by name."""
    import torch
    from torch import nn

    from ._hard_concrete import gate, shift, stretched
    from ._learning import Loop

    lesson = task.lesson()
    logits = {name(w): nn.Parameter(torch.zeros(len(w.groups), device=lesson.device)) for w in widths}
    prices = [task.saves((_all_but_one(w),)) / max(len(w.groups) - 1, 1) for w in widths]  # of one group
    settled = round(config.iterations * (1 - config.settle))

    def loss(at: int, salt: int) -> "Generator[Tensor, None, None]":
        positions = range(at * config.batch, (at + 1) * config.batch)
        target = need * min(1.0, (at + 1) / max(config.ramp * config.iterations, 1))
        b = shift(list(logits.values()), prices, target, config.delta)
        shifted = {w: logits[name(w)] + b for w in widths}
        if at >= settled:
            stay = _stays(task, widths, _by_width(widths, logits), config)
            soft = {w: stretched(one) for w, one in shifted.items()}
            hard = {w: torch.tensor([float(k in stay[w]) for k in range(len(w.groups))], device=lesson.device) for w in widths}
            gates = {w: hard[w] + (soft[w] - soft[w].detach()) for w in widths}
        else:
            drawn = torch.Generator().manual_seed((seed + 7919 * salt + at) % 2**63)
            noise = {w: torch.rand(len(w.groups), generator=drawn).to(lesson.device) for w in widths}
            gates = {w: gate(one, noise[w], config.delta) for w, one in shifted.items()}
        yield lesson.distance(positions, masks(gates))

    def pace(at: int) -> float:
        """In the last part to nothing, linearly: at the full rate the last few steps would have the last word."""
        return min(1.0, (config.iterations - at) / max(config.iterations - settled, 1))

    found = Loop(lesson, [{"params": logits, "lr": config.rate}], logits, config, loss, pace).run()
    b = shift(list(found.values()), prices, need, config.delta)
    return {key: one + b for key, one in found.items()}


def masks(gates: "Mapping[Width, Tensor]") -> "dict[str, tuple[str, Tensor]]":
    """A factor for each head, unit or channel from the gates of their groups."""
    return {w.address: (w.what, g.repeat_interleave(w.granule)) for w, g in gates.items()}


def name(width: Width) -> str:
    return f"{width.address} {width.what}"


def chosen(task: Task, widths: Sequence[Width], scores: Scores, config: Config) -> tuple[Cut, ...]:
    """The cuts that keep the most open groups of all layers, as many as the target allows."""
    return _cuts(_stays(task, widths, scores, config))


def _stays(task: Task, widths: Sequence[Width], scores: Scores, config: Config) -> dict[Width, set[int]]:
    """Of every width the groups that stay: the fewest least open ones go with which enough is saved."""
    order = sorted((value, i, k) for i, w in enumerate(widths) for k, value in enumerate(scores[w]))
    classes = {} if config.shapes is None else by_class(task.denoiser)

    ranks = {w: sorted(range(len(w.groups)), key=lambda k: (scores[w][k], k)) for w in widths}

    def left(count: int) -> dict[Width, set[int]]:
        gone: dict[Width, int] = dict.fromkeys(widths, 0)
        for _, i, _k in order[:count]:
            gone[widths[i]] += 1
        counts = {w: w.granule * _count(w, len(w.groups) - gone[w], config) for w in widths}
        if config.shapes is not None:
            counts = limited(classes, counts, config.shapes)
        return {w: set(ranks[w][len(w.groups) - counts[w] // w.granule :]) for w in widths}

    low, high = 0, len(order)  # enough is saved with `high`, which `_reachable` has seen to
    while low < high:
        middle = (low + high) // 2
        if enough(task.saves(_cuts(left(middle))), task.need):
            high = middle
        else:
            low = middle + 1
    return left(high)


def _count(width: Width, stay: int, config: Config) -> int:
    """How many groups stay: at least one, at least `least`, and of all but heads multiples of `round_to`."""
    fewest = max(1, math.ceil(config.least * len(width.groups) - 1e-9))
    stay = max(stay, fewest)
    if width.what == "keep_heads" or config.round_to == 1:
        return stay
    wide = rounded(stay * width.granule, config.round_to, width.count)
    return wide // width.granule if wide % width.granule == 0 else len(width.groups)


def _cuts(stays: Mapping[Width, set[int]]) -> tuple[Cut, ...]:
    return tuple(_keeping(w, sorted(stay)) for w, stay in stays.items() if len(stay) < len(w.groups))


def _keeping(width: Width, groups: Sequence[int]) -> Cut:
    stay = tuple(i for k in groups for i in width.groups[k])
    return Cut.model_validate({"address": width.address, "what": width.what, "value": stay})


def _all_but_one(width: Width) -> Cut:
    return _keeping(width, range(1))


def _reachable(task: Task, widths: Sequence[Width], config: Config) -> float:
    """The target. UserError where all that may go is not enough."""
    most = task.saves(_cuts({w: set(range(_count(w, 0, config))) for w in widths})) if widths else 0.0
    if not widths or not enough(most, task.need):
        share = most / task.need if task.need else 0.0
        raise UserError(
            f"masks: with what={', '.join(config.what)}, least={config.least:g} and round_to={config.round_to} only {share:.0%} of what "
            "has to go can go. Allow more of them, or raise keep."
        )
    return task.need


def _by_width(widths: Sequence[Width], logits: "Mapping[str, Tensor]") -> dict[Width, list[float]]:
    """UserError for gates of other layers or sizes."""
    found = {}
    for width in widths:
        values = logits.get(name(width))
        if values is None or len(values) != len(width.groups):
            there = "no gates" if values is None else f"{len(values)} gates"
            raise UserError(
                f"masks: gates: {width.address} has {len(width.groups)} {width.what.removeprefix('keep_')} to choose from and {there} in the file. "
                "Give the file of a run on the same model, with the same `what`."
            )
        found[width] = values.detach().tolist()
    return found
