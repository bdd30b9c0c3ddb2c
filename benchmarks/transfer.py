"""Do a model's searched schedules serve another one: `python -m lissom.benchmarks.transfer` (about an hour on one slow core; resumable).

AutoDiffusion (arXiv 2309.10438, abstract) reports that found sequences carry over between models. Here zoo:fashion (U-Net) and
zoo:fashion-dit (transformer), same latents, DDIM, 4 steps, three search seeds: the eight best candidates of a search on one
open a search on the other (`--warm-start`), beside the same search without them. Layers have other names there, so that only
timesteps carry over.
"""

import argparse
import json
import math
import statistics
from typing import Any

from ..workflow._opening import PLANS, fitted
from . import _results
from ._search_bench import CHUNK, SAMPLES, UNSEEN, Bench, curve, searched

MODELS = ("zoo:fashion", "zoo:fashion-dit")
STEPS, SEEDS, TRIALS = 4, 3, 40
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
    done = _results.RUNS / f"transfer-{name.replace('/', '-').replace(':', '-')}.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    print(name, flush=True)
    bench, start = Bench(model, STEPS, ("timesteps", "skips")), []
    if how == "warm":
        other = next(m for m in MODELS if m != model)
        best = job(f"{other}/cold/{seed}")["best"]
        from ..core.candidate import SamplingPlan

        plans = [SamplingPlan.model_validate(plan) for plan in best]
        start = [(f"warm start {n}", fitted(plan, bench.plans.space)) for n, plan in enumerate(plans, 1)]
    trials = searched(bench, "autodiffusion", int(seed), TRIALS, done.with_suffix(".jsonl"), start)
    per_candidate = STEPS * math.ceil(SAMPLES / CHUNK)
    ranked = sorted((t for t in trials if t.state == "complete"), key=lambda t: t.value("fid"))
    found = {
        "points": curve(bench, trials, [n * per_candidate for n in POINTS]),
        "best": [t.request.candidate.plan.plain() for t in ranked[:PLANS] if t.request.candidate.plan],
    }
    done.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="JOB", help="run these and write nothing, e.g. zoo:fashion/cold/0")
    options = parser.parse_args()
    _results.RUNS.mkdir(parents=True, exist_ok=True)
    if options.only:
        for name in options.only:
            job(name)
        return
    rows = []
    for model in MODELS:
        for how in ("cold", "warm"):
            runs = [job(f"{model}/{how}/{seed}") for seed in range(SEEDS)]
            rows.append([f"`{model}`", "the other's eight best" if how == "warm" else "nothing", *_values(runs)])
    marks = [n * STEPS * math.ceil(SAMPLES / CHUNK) for n in POINTS]
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
        mark = n * STEPS * math.ceil(SAMPLES / CHUNK)
        values = []
        for run in runs:
            so_far = [fd for calls, fd, _ in run["points"] if calls <= mark + STEPS * math.ceil(SAMPLES / CHUNK)]
            values.append(so_far[-1] if so_far else math.nan)
        cells.append(f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
    return cells


if __name__ == "__main__":
    main()
