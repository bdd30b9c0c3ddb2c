"""Do a model's searched schedules serve another one: `python -m lissom.benchmarks.transfer` (about an hour on one slow core; resumable).

AutoDiffusion (arXiv 2309.10438, abstract) reports that found sequences carry over between models. Here zoo:fashion (U-Net) and
zoo:fashion-dit (transformer), same latents, DDIM, 4 steps, three search seeds: the eight best candidates of a search on one
open a search on the other (`--warm-start`), beside the same search without them. Layers have other names there, so that only
timesteps carry over.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from ..core.candidate import SamplingPlan
from ..workflow._opening import PLANS, fitted
from . import _results
from ._search_bench import CHUNK, SAMPLES, UNSEEN, Bench, curve, once, only, searched

MODELS = ("zoo:fashion", "zoo:fashion-dit")
STEPS, SEEDS, TRIALS = 4, 3, 40
EACH = STEPS * math.ceil(SAMPLES / CHUNK)  # denoiser calls of a candidate that shares nothing
POINTS = (
    4,
    8,
    12,
    20,
    30,
    44,
)  # candidates that as many denoiser calls in a plain loop would pay for, the fixed schedules included


def job(name: str) -> dict[str, Any]:
    """`MODEL/cold/SEED` or `MODEL/warm/SEED`: (denoiser calls, FD on unseen seeds of the best so far, candidates)."""
    model, how, seed = name.split("/")

    def run(file: Path) -> dict[str, Any]:
        bench, start = Bench(model, STEPS, ("timesteps", "skips")), []
        if how == "warm":
            other = next(m for m in MODELS if m != model)
            plans = [SamplingPlan.model_validate(plan) for plan in job(f"{other}/cold/{seed}")["best"]]
            start = [(f"warm start {n}", fitted(plan, bench.plans.space)) for n, plan in enumerate(plans, 1)]
        trials = searched(bench, "autodiffusion", int(seed), TRIALS, file, start)
        ranked = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.value("fid"))
        return {
            "points": curve(bench, trials, [n * EACH for n in POINTS]),
            "best": [t.request.candidate.plan.plain() for t in ranked[:PLANS] if t.request.candidate.plan],
        }

    return once("transfer", name, run)


def main() -> None:
    if only(__doc__, job, "zoo:fashion/cold/0"):
        return
    rows = []
    for model in MODELS:
        for how in ("cold", "warm"):
            runs = [job(f"{model}/{how}/{seed}") for seed in range(SEEDS)]
            rows.append([f"`{model}`", "the other's eight best" if how == "warm" else "nothing", *_values(runs)])
    marks = [n * EACH for n in POINTS]
    _results.write(
        "transfer",
        f"autodiffusion, DDIM, {STEPS} steps, {SAMPLES} images a candidate, timesteps and skips, {TRIALS} candidates; the best candidate so far by "
        f"the search's own value, on {UNSEEN:,} images of unseen seeds: FD[zoo:judge], mean over {SEEDS} search seeds [least, most], after so "
        f"many denoiser forwards of {CHUNK}. The calls of the other search are not counted. {_results.machine()}.\n\n"
        + _results.table(["model", "opens with", *(f"{m} calls" for m in marks)], rows),
    )


def _values(runs: list[dict[str, Any]]) -> list[str]:
    cells = []
    for n in POINTS:
        values = []
        for run in runs:
            so_far = [fd for calls, fd, _ in run["points"] if calls <= (n + 1) * EACH]
            values.append(so_far[-1] if so_far else math.nan)
        cells.append(f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
    return cells


if __name__ == "__main__":
    main()
