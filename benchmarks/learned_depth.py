"""What learning depth gains: `python -m lissom.benchmarks.learned_depth` (two hours on two slow cores; resumable).

zoo:fashion-dit from 12 blocks to 6, one of every two or as many wherever the method says, by each way to choose, before and after
the same 500 iterations; and the learned six blocks under different losses: TinyFusion's masked features, the same features
unmasked, output alone, and the task alone, which on real images is plain fine-tuning. Three seeds: of choices, of the teacher's
images, of training, and of the images that are scored. `--only depth/tinyfusion/0 recovery/masked/2` runs some of it, several processes side by side share the work; without
it the missing ones are run and the section is written.
"""

import json
import math
import shutil
import statistics
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
from .recovery import COMMON

MODEL, SEEDS, STEPS, IMAGES, BATCH = "zoo:fashion-dit", 3, 10, 1024, 64
LEARNED: dict[str, Any] = {
    "prune": "tinyfusion", "structure": "1:2", "iterations": 300, "images": 2048, "data_steps": 20, "update_rate": 5e-4, "gate_rate": 5e-3, "ema": 0.98,
}  # fmt: skip
KEEP = 0.52  # six blocks fewer, whichever they are: each is a little more than a thirteenth
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "tinyfusion": lambda: LEARNED,
    "tinyfusion, no update": lambda: {**LEARNED, "update": "none"},
    "hand_map": lambda: {"prune": "hand_map", "structure": "1:2"},
    "random_depth": lambda: {"prune": "random_depth", "structure": "1:2"},
    "median_loss": lambda: {"prune": "median_loss", "structure": "1:2"},
    "min_loss": lambda: {"prune": "min_loss", "structure": "1:2"},
    "shortgpt": lambda: {"prune": "shortgpt", "keep": KEEP},
    "sensitivity": lambda: {"prune": "sensitivity", "keep": KEEP},
}
PAPER = {"output": 0.9, "task": 0.1, "masked_features": 0.01}  # TinyFusion's sum
SUMS: dict[str, dict[str, Any]] = {
    "output": {"losses": {"output": 1.0}},
    "masked": {"losses": PAPER},
    "unmasked": {"losses": {**PAPER, "masked_features": {"weight": 0.01, "mask": "none"}}},
    "task": {"losses": {"task": 1.0}},
    "task, real images": {"losses": {"task": 1.0}, "data": "zoo:fashion"},  # plain fine-tuning
    "masked, real images": {"losses": PAPER, "data": "zoo:fashion"},
}
RECOVERY = {**COMMON, "losses": {"output": 1.0}}  # the task on the teacher's own images does harm: docs/results.md, recovery


def job(name: str) -> dict[str, Any]:
    """`depth/METHOD/SEED` or `recovery/SUM/SEED`: sizes, speed, loss after pruning, and FD of teacher, before and after."""
    group, what, seed = name.split("/")
    stage = METHODS[what]() if group == "depth" else LEARNED
    taught = RECOVERY if group == "depth" else {**COMMON, **SUMS[what]}
    return once("learned-depth", name, lambda file: _run(file.with_suffix(""), [stage, taught], int(seed)))


def _run(folder: Path, stages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Prune and teach; what all runs of a seed share (the teacher's images and score, what is learned) is made once."""
    first = {"measure": False, "latency_batches": [BATCH], **stages[0]}
    evaluate = {"reference": "zoo:fashion", "metrics": ["fid", "clip_score", "accuracy"], "samples": IMAGES}
    made = {"lissom": 1, "model": MODEL, "seed": seed, "evaluate": evaluate, "stages": [first, stages[1]]}
    text = json.dumps(made, indent=1)
    place, shared = folder / "02-distill-laptop", _results.RUNS / f"learned-depth-shared-{seed}"
    if shared.is_dir() and not place.is_dir():
        shutil.copytree(shared, place)
    recipe = parse(text, "benchmark")
    run(recipe, text, folder, Context(recipe, Path.cwd(), Options(device="cpu"), Silent()), resume=True)
    if not shared.is_dir() and (place / "data").is_dir():  # real images are not made here
        shutil.copytree(place / "data", shared / "data")
        shutil.copy(place / "quality-teacher.json", shared)
    (at,) = folder.glob("01-*")
    pruned = PruneReport.model_validate_json((at / "report.json").read_text())
    found = DistillReport.model_validate_json((place / "report.json").read_text())
    for path in (at / "model", at / "data", place / "model", place / "data", place / "samples"):
        shutil.rmtree(path, ignore_errors=True)  # the figures stay
    return {
        "params": pruned.after.params / pruned.before.params,
        "latency": pruned.latency[0].ratio.value,
        "gone": sorted(int(cut.address.rpartition(".")[2]) for cut in pruned.cuts),
        "seconds": sum(value for key, value in pruned.spent.items() if key.startswith("seconds_for_")),
        "scored": {s.name: [m.plain() for m in s.measurements] for s in found.scored},
    }


def main() -> None:
    if only(__doc__, job, "depth/tinyfusion/0 recovery/masked/1"):
        return
    depth = {name: [job(f"depth/{name}/{s}") for s in range(SEEDS)] for name in METHODS}
    sums = {name: [job(f"recovery/{name}/{s}") for s in range(SEEDS)] for name in SUMS}
    head = (
        f"`{MODEL}`, 12 blocks to 6; {COMMON['iterations']} iterations of 64 samples on {COMMON['images']:,} of the teacher's own images, AdamW at "
        f"{COMMON['learning_rate']:g}, averaged weights; {IMAGES:,} images at {STEPS} DDIM steps of unseen seeds against the 10,000 test images. Mean "
        f"over {SEEDS} seeds with Student's t interval. {_results.machine()}."
    )
    parts = [
        f"{head} Recovery by output distillation alone; the search of tinyfusion has {LEARNED['iterations']} steps of 64.",
        _depth(depth),
        "The learned six blocks (LoRA) under other losses:",
        _sums(sums),
    ]
    _results.write("learned-depth", "\n\n".join(parts))


def _depth(found: dict[str, list[dict[str, Any]]]) -> str:
    head = [
        "method",
        "blocks that go, by seed",
        "parameters",
        "latency, batch 64",
        "FD before",
        "FD after",
        "FD after / tinyfusion's",
        "recognised after",
        "seconds to choose",
    ]
    whole = next(iter(found.values()))
    rows = [
        [
            "whole",
            "",
            "1",
            "1",
            "",
            _results.mean(_results.values(whole, "teacher", "fid")),
            "",
            _results.mean(_results.values(whole, "teacher", "accuracy")),
            "",
        ]
    ]
    best = _results.values(whole, "after", "fid")
    for name, runs in found.items():
        gone = "; ".join(" ".join(map(str, one["gone"])) for one in runs)
        sizes = [_results.mean([one[key] for one in runs]) for key in ("params", "latency")]
        fd = [_results.mean(_results.values(runs, when, "fid")) for when in ("before", "after")]
        ratios = [math.log(a / b) for a, b in zip(_results.values(runs, "after", "fid"), best, strict=True)]
        paired = "1" if name == "tinyfusion" else _results.mean(ratios, math.exp)
        seconds = statistics.fmean(one["seconds"] for one in runs)
        rows.append(
            [name, gone, *sizes, *fd, paired, _results.mean(_results.values(runs, "after", "accuracy")), f"{seconds:.2g}"]
        )
    return _results.table(head, rows)


def _sums(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["losses", "FD after", "FD / FD(output alone)", "recognised after"]
    alone = _results.values(found["output"], "after", "fid")
    rows = []
    for name, runs in found.items():
        ratios = [math.log(a / b) for a, b in zip(_results.values(runs, "after", "fid"), alone, strict=True)]
        paired = "1" if name == "output" else _results.mean(ratios, math.exp)
        rows.append(
            [
                name,
                _results.mean(_results.values(runs, "after", "fid")),
                paired,
                _results.mean(_results.values(runs, "after", "accuracy")),
            ]
        )
    return _results.table(head, rows)


if __name__ == "__main__":
    main()
