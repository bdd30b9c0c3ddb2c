"""What searching a schedule gains: `python -m lissom.benchmarks.search_quality` (about an hour on two slow cores; resumable).

zoo:fashion, DDIM: autodiffusion with three search seeds at 4 steps, random_search with the same seeds and the same number of
denoiser calls, and autodiffusion with one seed at 6 and 10 steps. Every number is on images of seeds and a reference (the
10,000 test images) that no search saw. `--only 4/0 random/0 6/0` runs some of the searches, several processes side by side
share the work; without it, the missing ones are run and the table is written.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from ..core.intervals import t_95
from ..core.recipe import build
from ..workflow.context import Context, Options, Silent
from ..workflow.run import run
from . import _results

TRIALS, SAMPLES = 120, 256  # candidates at 4 steps, images each
MORE_STEPS = {6: 60, 10: 60}  # steps -> candidates
RESCORED, REPORTED = 512, 1024  # images behind the choice of the winner, and behind each number reported


class _Lines(Silent):
    def phase(self, name: str, total: int) -> None:
        print(f"  {name}: {total}", flush=True)


def search(method: str, steps: int, seed: int, trials: int, folder: Path) -> dict[str, Any]:
    """Run one search, or take the finished one; its report.json."""
    stage = {"search": method, "steps": steps, "trials": trials, "samples": SAMPLES, "space": ["timesteps", "skips"]}
    stage |= {"rescore": 6, "rescore_samples": RESCORED}
    evaluate = {"reference": "zoo:fashion", "metrics": ["fid", "clip_score", "accuracy"], "samples": REPORTED}
    data = {"lissom": 1, "name": folder.name, "model": "zoo:fashion", "seed": seed, "evaluate": evaluate, "stages": [stage]}
    recipe = build(data, folder.name)
    print(f"{folder.name}", flush=True)
    run(
        recipe, json.dumps(data), folder, Context(recipe, Path.cwd(), Options(device="cpu"), _Lines()), resume=True, single=True
    )
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def job(name: str) -> dict[str, Any]:
    """`4/SEED`, `6/SEED`, `10/SEED`: autodiffusion at that many steps; `random/SEED`: random_search at 4 steps."""
    kind, _, seed = name.partition("/")
    folder = _results.RUNS / name.replace("/", "-seed")
    if kind != "random":
        steps = int(kind)
        return search("autodiffusion", steps, int(seed), MORE_STEPS.get(steps, TRIALS), folder)
    calls, _ = _searched_calls(job(f"4/{seed}"))
    trials = round(calls / (4 * math.ceil(SAMPLES / 64)))  # random plans hardly ever share a prefix
    return search("random_search", 4, int(seed), trials, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="JOB", help="run these and write nothing, e.g. 4/0 random/2 10/0")
    options = parser.parse_args()
    _results.RUNS.mkdir(parents=True, exist_ok=True)
    if options.only:
        for name in options.only:
            job(name)
        return
    seeds = range(options.seeds)
    own = [job(f"4/{seed}") for seed in seeds]
    random = [job(f"random/{seed}") for seed in seeds]
    longer = [job(f"{steps}/0") for steps in MORE_STEPS]
    head = [
        "method",
        "steps",
        "seed",
        "candidates",
        "best fixed",
        "its FD",
        "searched FD",
        "ratio",
        "accuracy",
        "MACs",
        "calls",
        "timesteps (layers skipped)",
    ]
    executed, plain = (sum(column) for column in zip(*map(_searched_calls, own), strict=True))
    summary = [
        f"FD(best fixed) / FD(searched) at 4 steps, autodiffusion: {_mean([f['ratio']['value'] for f in own])}; "
        + f"random_search at the same denoiser calls: {_mean([f['ratio']['value'] for f in random])}.",
        f"Denoiser calls of the {len(own)} autodiffusion searches at 4 steps against the plain loop: "
        + f"{executed:,} of {plain:,} ({executed / plain:.2f}).",
    ]
    _results.write(
        "search",
        f"`zoo:fashion`, DDIM, {SAMPLES} images a candidate, timesteps and skips, no budget, winner chosen on {RESCORED} fresh seeds; every number on "
        f"{REPORTED:,} images of unseen seeds against the 10,000 test images. Intervals of a row: half-samples of its images; of the "
        f"summary: Student's t over search seeds. Accuracy: best fixed → searched. MACs: searched, as a share of the uncut steps. Calls: denoiser forwards of 64 for the "
        f"candidates. Without a budget random_search draws timesteps alone. "
        f"{_results.machine()}.\n\n"
        + _results.table(head, [_row(found) for found in (*own, *random, *longer)])
        + "\n\n"
        + "\n\n".join(summary),
    )


def _searched_calls(found: dict[str, Any]) -> tuple[int, int]:
    """Denoiser calls of the candidates: executed, and in a loop that shares nothing."""
    own = [c for c in found["candidates"] if not c["origin"].startswith("fixed")]
    plain = sum(len(c["plan"]["steps"]) for c in own) * math.ceil(SAMPLES / 64)
    return sum(c["calls"] for c in own), plain


def _row(found: dict[str, Any]) -> list[str]:
    fixed = next(b for b in found["baselines"] if b["name"] == found["best_fixed"])
    ratio = found["ratio"]
    return [
        found["method"],
        str(found["steps"]),
        str(found["winner"]["measurements"][0]["seeds"]["base"]),
        str(found["trials"]),
        fixed["name"],
        _value(fixed, "fid"),
        _value(found["winner"], "fid"),
        f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        f"{_value(fixed, 'accuracy')} → {_value(found['winner'], 'accuracy')}",
        f"{found['winner']['macs_ratio']:.2f}",
        f"{_searched_calls(found)[0]:,}",
        ", ".join(f"{s['timestep']:g} ({len(s['skip'])})" for s in found["winner"]["plan"]["steps"]),
    ]


def _value(scored: dict[str, Any], metric: str) -> str:
    return f"{next(m['value'] for m in scored['measurements'] if m['metric'] == metric):.3g}"


def _mean(values: list[float]) -> str:
    """Geometric mean over search seeds with its 95 % interval (Student's t on the logarithms)."""
    logs = [math.log(v) for v in values]
    centre = math.exp(statistics.fmean(logs))
    if len(logs) < 2:
        return f"{centre:.2f}"
    error = t_95(len(logs)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{centre:.2f} [{centre * math.exp(-error):.2f}, {centre * math.exp(error):.2f}] over {len(logs)} search seeds"


if __name__ == "__main__":
    main()
