"""What learning masks gains: `python -m lissom.benchmarks.learned_masks` (an hour on two slow cores; resumable).

zoo:fashion with 20 and 50 % fewer of the parameters that its heads and units hold, nothing retrained: gates learned by the final
latents of whole trajectories (EcoDiff), the same gates learned by every step alone with the same budget, and what needs no
learning. Three seeds: of what is learned from, of random choices, and of the images that are scored. `--only 20/masks/0` runs some of it,
several processes side by side share the work; without it the missing ones are run and the section is written.
"""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from ..core.recipe import parse
from ..report.prune_schema import PruneReport
from ..workflow.context import Context, Options, Silent
from ..workflow.run import run
from . import _results
from ._search_bench import once, only

MODEL, SEEDS, STEPS, IMAGES = "zoo:fashion", 3, 10, 1024
SHARES = {"20": 0.2, "50": 0.5}  # per cent of the maskable parameters that go -> share
MASKABLE = 0.300  # of the parameters, as every report says
LEARNED: dict[str, Any] = {"prune": "masks", "solver_steps": STEPS, "iterations": 100, "batch": 4, "images": 100}
WHAT = {"what": ["heads", "units"]}
METHODS: dict[str, dict[str, Any]] = {
    "masks": LEARNED,
    "masks, never settled": {**LEARNED, "settle": 0},
    "masks, step by step": {**LEARNED, "objective": "steps"},
    "magnitude_widths": {"prune": "magnitude_widths"},
    "magnitude_widths, global": {"prune": "magnitude_widths", "scope": "global"},
    "diff_pruning": {"prune": "diff_pruning"},  # Taylor importance
    "diff_pruning, global": {"prune": "diff_pruning", "scope": "global"},
    "random_widths": {"prune": "random_widths"},
}
BESIDE = ("masks, step by step", "masks, never settled", "magnitude_widths, global", "diff_pruning, global")
METRICS = ("fid", "clip_score", "accuracy")


def job(name: str) -> dict[str, Any]:
    """`SHARE/METHOD/SEED`: sizes, distance of the final latents, and metrics before and after."""
    share, method, seed = name.split("/")
    stage = {**METHODS[method], **WHAT, "keep": round(1 - SHARES[share] * MASKABLE, 4), "steps": STEPS, "latency_batches": []}
    return once("learned-masks", name, lambda file: _run(file.with_suffix(""), stage, int(seed)))


def _run(folder: Path, stage: dict[str, Any], seed: int) -> dict[str, Any]:
    evaluate = {"reference": MODEL, "metrics": list(METRICS), "samples": IMAGES}
    text = json.dumps({"lissom": 1, "model": MODEL, "seed": seed, "evaluate": evaluate, "stages": [stage]}, indent=1)
    recipe = parse(text, "benchmark")
    run(recipe, text, folder, Context(recipe, Path.cwd(), Options(device="cpu"), Silent()), resume=True)
    (at,) = folder.glob("01-*")
    found = PruneReport.model_validate_json((at / "report.json").read_text())
    shutil.rmtree(at / "model", ignore_errors=True)  # the figures stay
    return {
        "params": found.after.params / found.before.params,
        "macs": found.after.macs / found.before.macs,
        "maskable": found.calibration.get("maskable"),
        "layers": len(found.cuts),
        "seconds": sum(value for key, value in found.spent.items() if key.startswith("seconds_for_")),
        "scored": {s.name: [m.plain() for m in s.measurements] for s in found.scored},
    }


def main() -> None:
    if only(__doc__, job, "20/masks/0 50/random_widths/1"):
        return
    found = {(share, m): [job(f"{share}/{m}/{s}") for s in range(SEEDS)] for share in SHARES for m in METHODS}
    head = (
        f"`{MODEL}`, heads and units, which hold {MASKABLE:.0%} of the parameters; nothing retrained. Gates: {LEARNED['iterations']} steps of "
        f"{LEARNED['batch']} trajectories of {STEPS} steps. {IMAGES:,} images at {STEPS} DDIM steps of unseen seeds against the 10,000 test images. Mean over "
        f"{SEEDS} seeds with Student's t interval; FD / FD(whole) paired by seed. {_results.machine()}."
    )
    _results.write("learned-masks", f"{head}\n\n{_table(found)}")


def _table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    head = [
        "of the maskable go",
        "method",
        "parameters",
        "MACs",
        "narrower layers",
        "FD",
        "FD / FD(whole)",
        "CLIP score",
        "recognised",
        "seconds",
    ]
    whole = next(iter(found.values()))
    rows = [
        ["", "whole", "1", "1", "", _results.mean(_results.values(whole, "before", "fid")), "1"]
        + [_results.mean(_results.values(whole, "before", metric)) for metric in METRICS[1:]]
        + [""]
    ]
    for (share, method), runs in found.items():
        sizes = [_results.mean([one[key] for one in runs]) for key in ("params", "macs", "layers")]
        pairs = zip(_results.values(runs, "after", "fid"), _results.values(runs, "before", "fid"), strict=True)
        ratio = _results.mean([math.log(after / before) for after, before in pairs], math.exp)
        after = [_results.mean(_results.values(runs, "after", metric)) for metric in METRICS]
        seconds = f"{statistics.fmean(one['seconds'] for one in runs):.3g}"
        rows.append([f"{share} %", method, *sizes, after[0], ratio, *after[1:], seconds])
    beside = "".join(f"\n- FD(masks) / FD({other}), paired by seed: {_beside(found, other)}" for other in BESIDE)
    return f"{_results.table(head, rows)}\n{beside}"


def _beside(found: dict[tuple[str, str], list[dict[str, Any]]], other: str) -> str:
    ratios = []
    for share in SHARES:
        pairs = [_results.values(found[share, name], "after", "fid") for name in ("masks", other)]
        ratios.append(f"{share} %: {_results.mean([math.log(a / b) for a, b in zip(*pairs, strict=True)], math.exp)}")
    return ", ".join(ratios)


if __name__ == "__main__":
    main()
