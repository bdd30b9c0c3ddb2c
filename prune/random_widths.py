"""Random heads, units and channels, seeded: what any criterion for widths has to beat. A baseline of Diff-Pruning's tables."""

import random
from typing import ClassVar

from ._task import Pruned, Task
from ._widths import Narrowing, chosen, ladders, many_shapes

calibrated = False
narrows = True  # cuts widths, not layers


class Config(Narrowing):
    """Settings that it shares; the seed is that of the run."""

    paper: ClassVar[str] = ""


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """As many of them as the target needs."""
    steps = ladders("random_widths", task, config)
    scores = {width: [rng.random() for _ in width.groups] for width in steps}
    cuts = chosen(task, steps, scores, config)
    return Pruned(cuts=cuts, warnings=many_shapes(task, cuts))
