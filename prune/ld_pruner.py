"""LD-Pruner: layers are scored by how far leaving them out moves the latents that sampling ends with.

Castells et al., "LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights", arXiv 2404.11936.
The paper's: every operator is modified alone, the model samples again, all the way from the same noise, and the operator's
score is the change of the latents' mean plus the change of their spread; the least significant go first, and what stays keeps
its weights. No metric is asked, so that any task will do. O(n m k) denoiser calls: n operators, m latents, k steps.

Notation: original, modified -> Z_org, Z_mod, the final latents of the same conditions and seeds; mu, sigma -> their mean and
population standard deviation over the samples, each as large as one latent.
Score = |mu_org - mu_mod|_2 + |sigma_org - sigma_mod|_2.

Not from the paper, whose full text we could not read: the formula's norms and the population deviation are those of
Hybrid-SD's code (github.com/bytedance/Hybrid-SD), which implements the score. Ours: what counts as an operator (the layers that
every method cuts, and with `units: [operator]` single ones: core/operators.py), removal as the only modification (the paper
also replaces by something cheaper), the number of latents and steps, scoring again after some removals, the rank per saved
unit, and giving back at the end what the target does not need.
"""

import math
import random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ._task import Option, Pruned, Space, Task, enough, gathered, needed, rest, until_met, usable, within

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.candidate import Cut

    Scores = dict[tuple[Cut, ...], float]

calibrated = "latents"  # asks for `measure` of the latents that whole trajectories end with


class Config(BaseModel):
    """Settings of LD-Pruner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.11936"

    rank: Literal["score", "score_per_saved"] = "score"  # lowest score first, or lowest score per saved unit (ours)
    rescore: int = Field(default=0, ge=0)  # after every so many removals the layers left are scored again, on top; 0: once
    solver_steps: int | None = Field(default=None, ge=1)  # of the scored trajectories; the pipeline's own number by default


def measure(original: "Tensor", modified: "Tensor") -> float:
    """The score: how far mean and spread of the latents moved. (N, …) each, image i of the same seed and condition in both."""
    before, after = original.double(), modified.double()
    mean = (before.mean(0) - after.mean(0)).norm()  # over all elements of one latent
    spread = (before.std(0, correction=0) - after.std(0, correction=0)).norm()
    return float(mean + spread)


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The cuts of lowest score, in order, until enough is saved.

    Raises UserError where scores that are not finite leave no choice that saves enough.
    """
    scores = _scored(task, task.spaces)
    finite = {Option(cuts, 0.0).name: score for cuts, score in scores.items() if cuts and math.isfinite(score)}
    if broken := len(scores) - 1 - len(finite):
        task.say(f"{broken} of {len(scores) - 1} cuts make the latents infinite or NaN: they are not considered")
    space = _best(usable("ld_pruner", task.spaces, scores, task.need), scores, task.need, config.rank)
    taken: list[Option] = []
    while not enough((left := rest(space, taken)).base.saved, task.need):
        if taken:  # what is taken stays taken; the others are scored on top of it
            task.say(f"{len(taken)} choices so far; the layers left are scored again")
            scores = _scored(task, (left,), left.base.cuts)
            (left,) = usable("ld_pruner", (left,), scores, task.need)
        saved = left.base.saved
        for option in _ranked(left, scores, config.rank)[: config.rescore or None]:
            taken.append(option)
            saved += option.saved
            if enough(saved, task.need):
                break
    cuts = gathered(space.base, needed(taken, space.base, task.need))
    return Pruned(cuts=cuts, scores=finite, label="latent mean and spread")


def _scored(task: Task, spaces: tuple[Space, ...], given: "tuple[Cut, ...]" = ()) -> "Scores":
    """The score of every option, with the cuts that are given: how far the latents then are from those of the whole model."""
    options = dict.fromkeys(o.cuts for space in spaces for site in (*space.sites, (space.base,)) for o in site)
    wanted = [cuts for cuts in options if cuts and cuts != given]
    found = task.losses([(*given, *cuts) for cuts in wanted])
    scores = {cuts: score if math.isfinite(score) else math.inf for cuts, score in zip(wanted, found, strict=True)}
    return {(): 0.0, given: 0.0, **scores}


def _ranked(space: Space, scores: "Scores", rank: str) -> list[Option]:
    """The best option of every site, in the order in which they go."""

    def key(option: Option) -> float:
        return scores[option.cuts] / (option.saved if rank == "score_per_saved" else 1.0)

    return sorted((min(site, key=key) for site in space.sites), key=key)


def _best(spaces: tuple[Space, ...], scores: "Scores", need: float, rank: str) -> Space:
    """Of several spaces (those of `require_plain_load`) the one whose choice has the least sum of scores. Ours."""

    def total(space: Space) -> float:
        return sum(scores[option.cuts] for option in (space.base, *until_met(_ranked(space, scores, rank), space.base, need)))

    return min(within(spaces, need), key=total)
