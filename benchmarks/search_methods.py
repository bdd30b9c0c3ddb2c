"""Search methods at equal denoiser calls, and the released loop: `python -m lissom.benchmarks.search_methods` (hours; resumable).

zoo:fashion, DDIM, 4 and 10 steps, three search seeds: autodiffusion, bayes, nsga2, cmaes and random_search with 256 images a candidate,
common seeds and shared prefixes. The best candidate so far by the search's own value is scored on unseen seeds whenever so many
denoiser calls are spent. Beside them the settings of AutoDiffusion's released loop (50 candidates in each of 10 generations,
timesteps alone, new noise and labels for every candidate, nothing shared; arXiv 2309.10438's code as described in docs/methods.md).
`--only 4/bayes/0 4/released/0` runs some of it, several processes side by side share the work; without it the missing ones are
run and the section is written.
"""

import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.candidate import Candidate, Request, Seeds, Step
from ..core.measurement import Trial
from ..search._space import Genome, Space
from . import _results
from ._search_bench import CHUNK, SAMPLES, UNSEEN, Bench, curve, once, only, searched

METHODS = ("autodiffusion", "bayes", "nsga2", "cmaes", "random_search")
SEEDS = 3
TRIALS = {4: 120, 10: 40}  # candidates
POINTS = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.45,
    0.65,
    1.0,
)  # of the calls that all trials take in a plain loop: where the best so far is scored
GENERATIONS, POPULATION, SELECTED, MUTATED, CROSSED, CHANCE = 10, 50, 10, 25, 15, 0.25  # the released loop at 4 steps


def job(name: str) -> dict[str, Any]:
    """`STEPS/METHOD/SEED`: points (denoiser calls, FD on unseen seeds of the best so far), and what was spent."""
    steps, method, seed = name.split("/")

    def run(file: Path) -> dict[str, Any]:
        released, count = method == "released", TRIALS[int(steps)]
        space = ("timesteps",) if method in ("cmaes", "released") else ("timesteps", "skips")
        bench = Bench("zoo:fashion", int(steps), space, ("fid", "macs") if method == "nsga2" else ("fid",))
        trials = _released(bench, int(seed), file) if released else searched(bench, method, int(seed), count, file)
        calls, plain = sum(t.calls for t in trials), count * int(steps) * math.ceil(SAMPLES / CHUNK)
        return {
            "points": curve(bench, trials, [calls] if released else [round(plain * p) for p in POINTS]),
            "calls": calls,
            "plain_calls": sum(t.plain_calls for t in trials),
            "candidates": len(trials),
        }

    return once("methods", name, run)


def _released(bench: Bench, seed: int, file: Path) -> list[Trial]:
    """The released loop's settings: every candidate on its own noise, the best value ever seen wins."""
    rng, space = random.Random(seed), bench.plans.space
    uniform = space.genome(Candidate(plan=bench.plans.fixed["leading"]))
    assert uniform is not None
    trials: list[Trial] = []
    archive: list[tuple[float, Genome]] = []
    parents: list[Genome] = []
    visited: set[Genome] = set()

    def add(new: list[Genome], count: int, make: Callable[[], Genome]) -> None:
        """Up to `count` more that were never visited, in ten attempts each at most."""
        goal = len(new) + count
        for _ in range(10 * count):
            if len(new) < goal and (genome := make()) not in visited:
                visited.add(genome)
                new.append(genome)

    for generation in range(GENERATIONS):
        new: list[Genome] = []
        if generation == 0:
            add(new, 1, lambda: uniform)
            add(new, POPULATION // 2 - 1, lambda: _mutant(uniform, space, 0.1, rng))
        else:
            add(new, MUTATED, lambda: _mutant(rng.choice(parents), space, CHANCE, rng))
            add(new, CROSSED, lambda: _child(rng.choice(parents), rng.choice(parents), space, rng))
        add(new, POPULATION - len(new), lambda: space.random_times(rng))
        requests = []
        for i, genome in enumerate(new, len(trials)):
            own = Seeds(role="search", base=1000 + seed, count=SAMPLES, start=i * SAMPLES)
            requests.append(Request(candidate=space.candidate(genome), seeds=own, costs=space.shares(genome)))
        answers = bench.scored(file, requests, len(trials))
        trials += answers
        better = [*archive, *((t.value("fid"), g) for t, g in zip(answers, new, strict=True))]
        archive = sorted(better, key=lambda one: one[0])[:SELECTED]
        parents[:] = [genome for _, genome in archive]
    return trials


def _mutant(genome: Genome, space: Space, chance: float, rng: random.Random) -> Genome:
    """Every timestep is replaced by any other one with a chance."""
    genes = [Step(timestep=space.draw(rng)) if rng.random() < chance else step for step in genome.steps]
    return space.repair(genes, (), rng)


def _child(one: Genome, two: Genome, space: Space, rng: random.Random) -> Genome:
    """Position by position from either parent."""
    return space.repair([rng.choice(pair) for pair in zip(one.steps, two.steps, strict=True)], (), rng)


def main() -> None:
    if only(__doc__, job, "4/bayes/0 10/nsga2/2 4/released/0"):
        return
    found = {(k, m): [job(f"{k}/{m}/{s}") for s in range(SEEDS)] for k in TRIALS for m in METHODS}
    released = job("4/released/0")
    _results.write("search-methods", _section(found, released))


def _section(found: dict[tuple[int, str], list[dict[str, Any]]], released: dict[str, Any]) -> str:
    head = (
        f"`zoo:fashion`, DDIM, {SAMPLES} images a candidate on common seeds, timesteps and per-step skips (cmaes: timesteps alone; random_search "
        f"without a budget too; nsga2: FD and MACs), no re-scoring. The best candidate so far by the search's own value, scored on "
        f"{UNSEEN:,} images of unseen seeds (FD[zoo:judge], lower is better; mean over {SEEDS} search seeds [least, most]), after so many denoiser "
        f"forwards of {CHUNK} images, fixed schedules included. {_results.machine()}."
    )
    text = [head]
    for steps, trials in TRIALS.items():
        plain = trials * steps * math.ceil(SAMPLES / CHUNK)
        marks = [round(plain * p) for p in POINTS]
        rows = [[m, *(_at(found[steps, m], mark) for mark in marks), _spent(found[steps, m])] for m in METHODS]
        columns = ["method", *(f"{mark:,} calls" for mark in marks), "candidates, calls in all"]
        text.append(f"{steps} steps:\n\n" + _results.table(columns, rows))
    goal, calls = released["points"][-1][1], released["plain_calls"]
    text.append(
        f"The released loop's settings at 4 steps ({POPULATION} x {GENERATIONS} generations, timesteps alone, new noise for every candidate, "
        f"nothing shared, one seed): FD {goal:.2f} on the same unseen seeds after {calls:,} calls. Calls until the best so far is as good on "
        f"unseen seeds, by search seed, and as a share of those: "
        + "; ".join(f"{m} {_reached(found[4, m], goal, calls)}" for m in METHODS)
        + "."
    )
    return "\n\n".join(text)


def _at(runs: list[dict[str, Any]], mark: int) -> str:
    values = []
    for run in runs:
        so_far = [fd for calls, fd, _ in run["points"] if calls <= mark * 1.1 + 16]
        values.append(so_far[-1] if so_far else math.nan)
    if any(map(math.isnan, values)):
        return "–"
    return f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _spent(runs: list[dict[str, Any]]) -> str:
    return f"{statistics.fmean(r['candidates'] for r in runs):.0f}, {statistics.fmean(r['calls'] for r in runs):,.0f}"


def _reached(runs: list[dict[str, Any]], goal: float, calls: int) -> str:
    first = [next((c for c, fd, _ in run["points"] if fd <= goal), None) for run in runs]
    return ", ".join("never" if c is None else f"{c:,} (1/{calls / c:.0f})" for c in first)


if __name__ == "__main__":
    main()
