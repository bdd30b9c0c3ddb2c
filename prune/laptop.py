"""LAPTOP-Diff: layers are scored one at a time by the loss at the denoiser's output, then chosen by a knapsack.

Zhang et al., "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models", arXiv 2404.11098.
The paper's problem: min over sets S of E|eps(S) - eps|^2 subject to a share of parameters pruned. Its one-shot criterion is the
output loss of each layer alone, which adds up (nearly), so that the problem becomes a 0-1 knapsack. Solver, number of calibration
calls and what counts as a layer are not in the texts that we could read: those are ours. `additivity` tests the assumption.
"""

import math
import random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ._task import SLACK, Additivity, Option, Pruned, Space, Task, enough, gathered, needed, rest, until_met, usable

if TYPE_CHECKING:
    from ..core.candidate import Cut

    Scores = dict[tuple[Cut, ...], float]

calibrated = True  # asks for losses on calibration calls


class Config(BaseModel):
    """Settings of LAPTOP-Diff."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.11098"

    solver: Literal["knapsack", "greedy"] = "knapsack"  # exact, or by loss per saved unit
    rounds: int = Field(default=1, ge=1)  # above 1: after each part of the target the layers left are scored again
    additivity: int = Field(default=16, ge=0)  # random subsets on which sum of scores and real loss are compared; 0: none


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The cuts whose scores add up to least among all that save enough.

    Raises UserError where losses that are not finite leave no choice that saves enough.
    """
    scores = _scored(task, task.spaces)
    finite = {Option(cuts, 0.0).name: score for cuts, score in scores.items() if cuts and math.isfinite(score)}
    if broken := len(scores) - 1 - len(finite):
        task.say(f"{broken} of {len(scores) - 1} cuts make the output infinite or NaN: they are not considered")
    spaces = usable("laptop", task.spaces, scores, task.need)
    additivity = _additivity(task, spaces, scores, config.additivity, rng)

    space, _ = _choose(spaces, scores, task.need, config.solver)
    base, taken, now = space.base, dict[Option, float](), scores  # taken: option -> what it added to the loss
    for number in range(1, config.rounds + 1):
        left, part = rest(space, list(taken)), base.saved + (task.need - base.saved) * number / config.rounds
        if enough(left.base.saved, part):
            continue
        if number > 1:  # what is chosen stays chosen; the rest is scored on top of it
            task.say(f"round {number} of {config.rounds}: {len(taken)} choices so far; the layers left are scored again")
            now = _scored(task, (left,), left.base.cuts)
        _, chosen = _choose(usable("laptop", (left,), now, task.need), now, part, config.solver)
        taken |= {option: now[option.cuts] for option in chosen}
    kept = needed(list(taken), base, task.need)
    return Pruned(
        cuts=gathered(base, kept),
        scores=finite,
        label="output loss",
        predicted=scores[base.cuts] + sum(taken[option] for option in kept),
        additivity=additivity,
    )


def _scored(task: Task, spaces: tuple[Space, ...], given: "tuple[Cut, ...]" = ()) -> "Scores":
    """The loss of every option alone, or of what it adds to the cuts that are given."""
    options = dict.fromkeys(o.cuts for space in spaces for site in (*space.sites, (space.base,)) for o in site)
    wanted = [cuts for cuts in options if cuts and cuts != given]
    known = task.losses([given, *((*given, *cuts) for cuts in wanted)]) if given else [0.0, *task.losses(wanted)]
    before, *after = known
    more = [loss - before if math.isfinite(loss - before) else math.inf for loss in after]
    return {(): 0.0, given: 0.0, **{cuts: max(0.0, loss) for cuts, loss in zip(wanted, more, strict=True)}}


def _choose(spaces: tuple[Space, ...], scores: "Scores", need: float, solver: str) -> tuple[Space, list[Option]]:
    """The best choice over all spaces."""
    from ._knapsack import solve

    best: tuple[float, Space, list[Option]] | None = None
    for space in sorted(spaces, key=lambda space: scores[space.base.cuts]):
        if best is not None and scores[space.base.cuts] >= best[0]:
            break  # and so it is for those that follow
        if solver == "greedy":
            cheapest = [min(site, key=lambda o: scores[o.cuts] / o.saved) for site in space.sites]
            chosen = until_met(sorted(cheapest, key=lambda o: scores[o.cuts] / o.saved), space.base, need)
        else:
            options = [[(scores[o.cuts], o.saved) for o in site] for site in space.sites]
            picks = solve(options, need * (1 - SLACK) - space.base.saved) or [None] * len(options)
            chosen = [site[pick] for site, pick in zip(space.sites, picks, strict=True) if pick is not None]
        loss = scores[space.base.cuts] + sum(scores[o.cuts] for o in chosen)
        if enough(space.base.saved + sum(o.saved for o in chosen), need) and (best is None or loss < best[0]):
            best = (loss, space, chosen)
    assert best is not None, "every space can reach the target"
    return best[1], best[2]


def _additivity(task: Task, spaces: tuple[Space, ...], scores: "Scores", count: int, rng: random.Random) -> Additivity | None:
    """Random subsets that save from a fifth of the target up to all of it, of two options or more: one adds up by itself."""
    if not count:
        return None
    subsets = []
    for _ in range(count):
        space = rng.choice(spaces)
        order = [rng.choice(site) for site in space.sites]
        rng.shuffle(order)
        chosen = until_met(order, space.base, task.need * rng.uniform(0.2, 1.0))
        least = 1 if space.base.cuts else 2
        subsets.append([space.base, *(chosen if len(chosen) >= least else order[:least])])
    losses = task.losses([gathered(base, chosen) for base, *chosen in subsets])
    sums = [sum(scores[o.cuts] for o in subset) for subset in subsets]
    finite = [(total, loss) for total, loss in zip(sums, losses, strict=True) if math.isfinite(loss)]
    return Additivity(tuple(total for total, _ in finite), tuple(loss for _, loss in finite))
