"""What distillation gives back: `python -m lissom.benchmarks.recovery` (hours; resumable).

zoo:fashion at about 30 and 50 % fewer parameters, by each way to choose what goes, before and after the same 500 iterations of the same
losses; and one student, BK-SDM's map at 30 %, under different losses. Three seeds: of the choice where it is random, of the teacher's
images, of the training, and of the images that are scored. `--only 30/laptop/0 losses/output/2` runs some of it, several processes
side by side share the work; without it the missing ones are run and the sections are written.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.recipe import parse
from ..report.distill_schema import DistillReport
from ..report.prune_schema import PruneReport
from ..workflow.context import Context, Options, Silent
from ..workflow.run import run
from . import _results
from ._search_bench import once, only

MODEL, SEEDS, STEPS, IMAGES = "zoo:fashion", 3, 10, 1024
KEEP = {"30": 0.7, "50": 0.5}  # per cent fewer -> share that is left
# BK-SDM's way of cutting at these sizes, as in prune_quality.
MAPS: dict[str, dict[str, Any]] = {
    "30": {"layers_per_block": [2, 1, 1, 1]},
    "50": {"layers_per_block": [2, 1, 1], "stages": 3, "middle": "resnet"},
}
METHODS: dict[str, Callable[[str], dict[str, Any]]] = {
    "laptop": lambda size: {"prune": "laptop", "keep": KEEP[size], "additivity": 0},
    "ld_pruner": lambda size: {"prune": "ld_pruner", "keep": KEEP[size], "solver_steps": STEPS},
    "BK map": lambda size: {"prune": "slim_unet", **MAPS[size]},
    "diff_pruning": lambda size: {"prune": "diff_pruning", "keep": KEEP[size]},
    "magnitude": lambda size: {"prune": "magnitude", "keep": KEEP[size]},
    "random": lambda size: {"prune": "random_cuts", "keep": KEEP[size]},
}
SUMS: dict[str, dict[str, float]] = {
    "task": {"task": 1},
    "output": {"output": 1},
    "task and output": {"task": 1, "output": 1},
    "output and features": {"output": 1, "features": 1},
    "output and normalised features": {"output": 1, "normalized_features": 1},
    "output and self-attention": {"output": 1, "self_attention": 1},
}
COMMON: dict[str, Any] = {
    "distill": "laptop", "iterations": 500, "learning_rate": 5e-4, "images": 2048, "data_steps": 20, "steps": STEPS,
}  # fmt: skip
METRICS = ("fid", "clip_score", "accuracy")


def job(name: str) -> dict[str, Any]:
    """`SIZE/METHOD/SEED` or `losses/SUM/SEED`: sizes, latency, and metrics of teacher, before and after."""
    group, what, seed = name.split("/")

    def make(file: Path) -> dict[str, Any]:
        size = "30" if group == "losses" else group
        stage = METHODS["BK map" if group == "losses" else what](size)
        taught = {**COMMON, "losses": SUMS[what]} if group == "losses" else COMMON
        latency = [] if group == "losses" else [64]
        return _run(file.with_suffix(""), [{**stage, "measure": False, "latency_batches": latency}, taught], int(seed))

    return once("recovery", name, make)


def _run(folder: Path, stages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Prune and teach; what all runs of a seed share (the teacher's images and their score) is made once."""
    evaluate = {"reference": MODEL, "metrics": list(METRICS), "samples": IMAGES}
    text = json.dumps({"lissom": 1, "model": MODEL, "seed": seed, "evaluate": evaluate, "stages": stages}, indent=1)
    place, shared = folder / f"02-distill-{stages[1]['distill']}", _results.RUNS / f"recovery-shared-{seed}"
    if shared.is_dir() and not place.is_dir():
        shutil.copytree(shared, place)
    run(
        parse(text, "benchmark"),
        text,
        folder,
        Context(parse(text, "benchmark"), Path.cwd(), Options(device="cpu"), Silent()),
        resume=True,
    )
    if not shared.is_dir():
        shutil.copytree(place / "data", shared / "data")
        shutil.copy(place / "quality-teacher.json", shared)
    (first,) = folder.glob("01-*")
    pruned = PruneReport.model_validate_json((first / "report.json").read_text())
    found = DistillReport.model_validate_json((place / "report.json").read_text())
    for path in (first / "model", place / "model", place / "data", place / "samples"):
        shutil.rmtree(path, ignore_errors=True)  # the figures stay
    return {
        "params": pruned.after.params / pruned.before.params,
        "macs": pruned.after.macs / pruned.before.macs,
        "latency": [one.ratio.value for one in pruned.latency],
        "cuts": [cut.plain() for cut in pruned.cuts],
        "scored": {s.name: [m.plain() for m in s.measurements] for s in found.scored},
        "seconds": found.spent.get("training_seconds"),
    }


def main() -> None:
    if only(__doc__, job, "30/laptop/0 losses/output/1"):
        return
    head = (
        f"`{MODEL}`, {COMMON['iterations']} iterations of 64 samples on {COMMON['images']:,} of the teacher's own images, AdamW at "
        f"{COMMON['learning_rate']:g}, averaged weights; {IMAGES:,} images at {STEPS} DDIM steps of unseen seeds against the 10,000 test images. Mean "
        f"over {SEEDS} seeds with Student's t interval. {_results.machine()}."
    )
    sums = {name: [job(f"losses/{name}/{s}") for s in range(SEEDS)] for name in SUMS}
    _results.write("recovery-losses", f"{head} One student, BK-SDM's map at 30 % fewer parameters.\n\n{_sums(sums)}")
    sizes = {(size, m): [job(f"{size}/{m}/{s}") for s in range(SEEDS)] for size in KEEP for m in METHODS}
    _results.write("recovery", f"{head} Losses: task, output and normalised features, weight 1 each.\n\n{_sizes(sizes)}")


def _sizes(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    head = [
        "fewer",
        "method",
        "parameters",
        "MACs",
        "latency, batch 64",
        "FD before",
        "FD after",
        "CLIP score after",
        "recognised after",
    ]
    whole = next(iter(found.values()))
    rows = [["", "whole", "1", "1", "1", "", *(_results.mean(_results.values(whole, "teacher", metric)) for metric in METRICS)]]
    for (size, method), runs in found.items():
        shares = [_results.mean([run[key] for run in runs]) for key in ("params", "macs")]
        latency = _results.mean([run["latency"][0] for run in runs if run["latency"]])
        after = [_results.mean(_results.values(runs, "after", metric)) for metric in METRICS]
        rows.append([f"{size} %", method, *shares, latency, _results.mean(_results.values(runs, "before", "fid")), *after])
    return _results.table(head, rows)


def _sums(found: dict[str, list[dict[str, Any]]]) -> str:
    """Each beside output distillation alone, paired by seed."""
    head = ["losses", "FD after", "FD / FD(output alone)", "CLIP score after", "recognised after", "seconds"]
    alone = _results.values(found["output"], "after", "fid")
    rows = []
    for name, runs in found.items():
        after = [_results.mean(_results.values(runs, "after", metric)) for metric in METRICS]
        ratios = [math.log(a / b) for a, b in zip(_results.values(runs, "after", "fid"), alone, strict=True)]
        paired = "1" if name == "output" else _results.mean(ratios, math.exp)
        rows.append([name, after[0], paired, *after[1:], _results.mean([run["seconds"] for run in runs if run["seconds"]])])
    before = _results.mean(_results.values(found["output"], "before", "fid"))
    return f"FD before: {before}.\n\n{_results.table(head, rows)}"


if __name__ == "__main__":
    main()
