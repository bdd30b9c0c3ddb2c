"""What `optuna-dashboard` shows of a request: a few parameters. The full genome sits in the request itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .candidate import Request

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

VISIBLE = 50  # parameters at most: each is a row of its own in a database


def visible(request: Request) -> dict[str, float]:
    """The part of a request that the dashboard plots: timesteps, layers that each step skips and reuses, others' steps, cuts."""
    plan, cuts = request.candidate.plan, request.candidate.cuts
    shown = {"cuts": float(len(cuts))} if cuts else {}
    if plan is not None:
        width = len(str(len(plan.steps) - 1))
        shown |= {f"t{i:0{width}}": float(s.timestep) for i, s in enumerate(plan.steps)}
        skips = {f"skipped{i:0{width}}": float(len(s.skip)) for i, s in enumerate(plan.steps)}
        shown |= skips if any(skips.values()) else {}
        reused = {f"reused{i:0{width}}": float(len(s.reuse)) for i, s in enumerate(plan.steps)}
        shown |= reused if any(reused.values()) else {}
        shown |= {f"steps by {name}": float(sum(s.model == name for s in plan.steps)) for name in plan.models}
    return dict(list(shown.items())[:VISIBLE])


def ranges(shown: Mapping[str, float]) -> "dict[str, BaseDistribution]":
    """What the dashboard takes the axes from."""
    from optuna.distributions import FloatDistribution

    most = {name: max(1000.0, value) if name.startswith("t") else 10_000.0 for name, value in shown.items()}
    return {name: FloatDistribution(min(0.0, shown[name]), high) for name, high in most.items()}
