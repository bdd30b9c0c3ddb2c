"""What A-SDM's ways and T-Stitch's reach here: `python -m lissom.benchmarks.assembly` (two hours on two slow cores; resumable).

zoo:fashion at 10 steps. Assembly: the slim U-Net of recipes/zoo/fashion-assembly.yaml with and without multi-expert convolutions,
taught alike. Inheritance: searches that may skip, or reuse, at 1 / 1.4 of the arithmetic (the abstract's +40 %), beside
seven whole steps. Switching: the taught slim U-Net makes the first steps, the whole model the others. Three seeds: of
training, search and images. `--only assembly/experts/0 inheritance/reuse/1 switching/2` runs some of it, several processes side by
side share the work; without it the missing ones are run and the section is written.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.candidate import SamplingPlan
from ..core.measurement import Measurement
from ..core.recipe import Recipe, build, parse
from ..core.stages import SearchStage
from ..report.distill_schema import DistillReport
from ..report.prune_schema import PruneReport
from ..workflow._evaluation import Asked, evaluate
from ..workflow._latency import _run as timed_run
from ..workflow._latency import _timed
from ..workflow._plans import plans_of
from ..workflow._subject import Subject
from ..workflow.context import Context, Options, Silent
from ..workflow.evaluate import lone
from ..workflow.run import run
from . import _results
from ._search_bench import once, only
from .recovery import COMMON

MODEL, STEPS, SEEDS, IMAGES = "zoo:fashion", 10, 3, 1024
SHARE = 0.714  # 1 / 1.4: +40 % speed, if time went with arithmetic
FEWER = 7  # whole steps that cost about as much
SLIM: dict[str, Any] = {"prune": "slim_unet", "layers_per_block": 1, "middle": "resnet", "measure": False}
SPACES = {"skips": ["skips"], "reuse": ["reuse"]}
EVALUATE: dict[str, Any] = {"reference": MODEL, "metrics": ["fid", "clip_score", "accuracy"], "samples": IMAGES}
BATCH = 64  # images in a call that is timed


def job(name: str) -> dict[str, Any]:
    """`assembly/plain|experts/SEED`, `inheritance/SPACE/SEED`, `switching/SEED`."""
    kind, *rest = name.split("/")
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "assembly": _assembly,
        "inheritance": _inheritance,
        "switching": _switching,
    }
    return once("assembly", name, lambda file: jobs[kind](file.with_suffix(""), *rest))


def _assembly(folder: Path, what: str, seed: str) -> dict[str, Any]:
    stages = [{**SLIM, "experts": what == "experts", "latency_batches": [BATCH]}, COMMON]
    text = json.dumps({"lissom": 1, "model": MODEL, "seed": int(seed), "evaluate": EVALUATE, "stages": stages}, indent=1)
    run(parse(text, "benchmark"), text, folder, _context(parse(text, "benchmark")), resume=True)
    pruned = PruneReport.model_validate_json((folder / "01-prune-slim_unet" / "report.json").read_text())
    found = DistillReport.model_validate_json((folder / "02-distill-laptop" / "report.json").read_text())
    return {
        "params": pruned.after.params / pruned.before.params,
        "macs": pruned.after.macs / pruned.before.macs,
        "latency": pruned.latency[0].ratio.value,
        **{one.name: next(m.value for m in one.measurements if m.metric == "fid") for one in found.scored},
    }


def _inheritance(folder: Path, what: str, seed: str) -> dict[str, Any]:
    stage = {
        "search": "autodiffusion", "steps": STEPS, "trials": 60, "samples": 256, "rescore": 6, "rescore_samples": 512,
        "space": ["timesteps", *SPACES[what]], "budget": {"macs": SHARE},
    }  # fmt: skip
    recipe = build({"lissom": 1, "model": MODEL, "seed": int(seed), "evaluate": EVALUATE, "stages": [stage]}, "benchmark")
    text = json.dumps({"lissom": 1, "model": MODEL, "seed": int(seed), "evaluate": EVALUATE, "stages": [stage]}, indent=1)
    run(recipe, text, folder, _context(recipe), resume=True, single=True)
    found = json.loads((folder / "report.json").read_text())
    plan = SamplingPlan.model_validate(found["winner"]["plan"])
    subject = Subject.load(MODEL, _context(recipe))
    fixed = _fixed(subject, recipe)["trailing"]
    whole, own = _timed([timed_run(subject, one, BATCH) for one in (fixed, plan)])
    gained = {part["part"]: _fid(part["scored"]) for part in found["gained"]}
    return {
        "fid": _fid(found["winner"]),
        "fixed": gained["fixed"],
        "timesteps": gained["timesteps"],
        "fewer": _fewer(recipe, folder),
        "macs": found["winner"]["macs_ratio"],
        "latency": statistics.median(b / a for a, b in zip(whole, own, strict=True)),
    }


def _fewer(recipe: Recipe, folder: Path) -> float:
    """The best fixed schedule of as many whole steps as the budget pays for, on the same images."""
    subject = Subject.load(MODEL, _context(recipe))
    asked = Asked(ref=MODEL, pictures=0)
    values = []
    for plan in _fixed(subject, recipe, FEWER).values():
        found = evaluate(replace(asked, plan=plan), _context(recipe), folder / "cache")
        values.append(next(m.value for m in found.measurements if m.metric == "fid"))
    return min(values)


def _switching(folder: Path, seed: str) -> dict[str, Any]:
    job(f"assembly/plain/{seed}")  # makes the small model
    small = _results.RUNS / f"assembly-assembly-plain-{seed}" / "02-distill-laptop"
    recipe = lone(MODEL, seed=int(seed), evaluate=EVALUATE, models={"small": str(small.absolute())})
    context = _context(recipe)
    subject = Subject.load(MODEL, context)
    fixed = _fixed(subject, recipe)["trailing"]
    shares: dict[str, Any] = {}
    plans = {n: _stitched(fixed, n) for n in range(STEPS + 1)}
    for n, plan in plans.items():
        found = evaluate(Asked(ref=MODEL, plan=plan, pictures=0), context, folder / "cache")
        shares[str(n)] = {m.metric: m.value for m in found.measurements}
    times = _timed([timed_run(subject, plans[n], BATCH) for n in (0, 4, STEPS)])
    latency = [statistics.median(b / a for a, b in zip(times[0], own, strict=True)) for own in times]
    return {"shares": shares, "latency": dict(zip(("0", "4", str(STEPS)), latency, strict=True))}


def _fixed(subject: Subject, recipe: Recipe, steps: int = STEPS) -> dict[str, SamplingPlan]:
    """The fixed schedules of a recipe's one search, with so many steps."""
    stage = recipe.stages[0]
    assert isinstance(stage, SearchStage)
    return plans_of(subject, stage.model_copy(update={"steps": steps, "budget": {}, "space": ("timesteps",)})).fixed


def _stitched(plan: SamplingPlan, count: int) -> SamplingPlan:
    steps = (s.model_copy(update={"model": "small"}) if i < count else s for i, s in enumerate(plan.steps))
    return plan.model_copy(update={"steps": tuple(steps)})


def _context(recipe: Recipe) -> Context:
    return Context(recipe, Path.cwd(), Options(device="cpu"), Silent())


def _fid(scored: dict[str, Any]) -> float:
    return next(Measurement.model_validate(m).value for m in scored["measurements"] if m["metric"] == "fid")


def main() -> None:
    if only(__doc__, job, "assembly/experts/0 switching/1"):
        return
    seeds = range(SEEDS)
    head = (
        f"`{MODEL}`, {STEPS} DDIM steps, FD[zoo:judge] on {IMAGES:,} images of unseen seeds against the 10,000 test images. Mean over "
        f"{SEEDS} seeds with Student's t interval; latency is that of a pipeline call of {BATCH} images (assembly: of a denoiser "
        f"call) as a share of the whole model's, taken in turns. {_results.machine()}."
    )
    parts = [
        head,
        "Assembly, 500 iterations of task, output and normalised features:",
        _assembled({what: [job(f"assembly/{what}/{s}") for s in seeds] for what in ("plain", "experts")}),
        f"Inheritance, autodiffusion, 60 candidates of 256 images, at most {SHARE} of the MACs of {STEPS} whole steps:",
        _inherited({what: [job(f"inheritance/{what}/{s}") for s in seeds] for what in SPACES}),
        "Switching, trailing schedule, the slim U-Net without experts first:",
        _switched([job(f"switching/{s}") for s in seeds]),
    ]
    _results.write("assembly", "\n\n".join(parts))


def _assembled(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["structure", "parameters", "MACs", "latency", "FD before", "FD after", "FD of the teacher"]
    keys = ("params", "macs", "latency", "before", "after", "teacher")
    return _results.table(
        head, [[what, *(_results.mean([one[key] for one in runs]) for key in keys)] for what, runs in found.items()]
    )


def _inherited(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["may", "MACs", "latency", "FD", f"FD / FD(best fixed, {STEPS} steps)", f"FD / FD(best fixed, {FEWER} steps)"]
    rows = []
    for what, runs in found.items():
        paired = [
            _results.mean([math.log(one["fid"] / one[beside]) for one in runs], math.exp) for beside in ("fixed", "fewer")
        ]
        rows.append([what, *(_results.mean([one[key] for one in runs]) for key in ("macs", "latency", "fid")), *paired])
    first = next(iter(found.values()))  # the same for all
    base = " and ".join(
        f"{_results.mean([one[key] for one in first])} at {count}" for key, count in (("fixed", STEPS), ("fewer", FEWER))
    )
    return f"{_results.table(head, rows)}\n\nBest fixed schedule: FD {base} whole steps."


def _switched(runs: list[dict[str, Any]]) -> str:
    counts = [str(n) for n in range(STEPS + 1)]
    rows = [
        ["FD", *(_results.mean([one["shares"][n]["fid"] for one in runs]) for n in counts)],
        [
            "FD / FD(whole)",
            *(
                _results.mean([math.log(one["shares"][n]["fid"] / one["shares"]["0"]["fid"]) for one in runs], math.exp)
                for n in counts
            ),
        ],
        ["recognised", *(_results.mean([one["shares"][n]["accuracy"] for one in runs]) for n in counts)],
        ["latency", *(_results.mean([one["latency"][n] for one in runs if n in one["latency"]]) for n in counts)],
    ]
    return _results.table(["steps of the small model", *counts], rows)


if __name__ == "__main__":
    main()
