"""How good the embedded models are: `python -m lissom.benchmarks.zoo_quality` (about five minutes on two slow cores).

Samples at 50 DDIM steps scored by the judge, forward times as ratios, sizes, and sheets in docs/images/.
"""

import statistics
import time

from ..core import anatomy, cost, models
from ..core.candidate import Seeds
from ..core.measurement import Measurement
from ..core.sampling import Sampler
from ..evaluate import _features, _reference
from ..evaluate._scorer import View
from ..workflow._evaluator import Evaluator
from . import _results

SAMPLES, STEPS = 1024, 50
IMAGES = _results.RESULTS.parent / "images"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    rows = []
    for name in models.zoo():
        model = models.load(f"zoo:{name}", device="cpu")
        assert model.conditions is not None
        sampler = Sampler(model.pipe, model.conditions, call={"guidance_scale": 1.0})
        judge = _features.load("zoo:judge")
        view = View(judge, _reference.load("zoo:fashion", judge, "report").statistics)
        evaluator = Evaluator(model, sampler, model.conditions, dict.fromkeys(["fid", "clip_score", "accuracy"], view), {})
        seeds = Seeds(role="report", base=0, count=SAMPLES)
        score = evaluator.score(None, seeds, steps=STEPS, replicates=True, sheet=IMAGES / f"{name}-{STEPS}-steps.png")
        costs = cost.measure(model.pipe, {**model.conditions.arguments(range(1)), "guidance_scale": 1.0})
        tables = anatomy.label_tables(model.denoiser)
        rows.append(
            [
                f"zoo:{name}",
                f"{model.parameters:,}" + (f" ({tables:,} of them label tables)" if tables else ""),
                f"{costs.total / 1e6:.1f} M",
                f"{_forward(sampler) * 1000:.0f} ms",
                *(_interval(m) for m in score.measurements),
            ]
        )
    size = sum(p.stat().st_size for p in models.ZOO.rglob("*") if p.suffix in (".safetensors", ".json", ".jsonl")) / 1e6
    head = [
        "model",
        "denoiser parameters",
        "MACs a step",
        "forward of 64",
        "FD[zoo:judge]",
        "CLIP score",
        "recognised by the judge",
    ]
    _results.write(
        "zoo",
        f"{SAMPLES:,} images at {STEPS} DDIM steps, unseen seeds, against the 10,000 test images; {_results.machine()}. "
        f"All of the zoo: {size:.1f} MB.\n\n" + _results.table(head, rows)
        + "\n\n" + "\n\n".join(f"`zoo:{n}`, {STEPS} steps:\n\n![samples](images/{n}-{STEPS}-steps.png)" for n in models.zoo()),
    )  # fmt: skip


def _forward(sampler: Sampler) -> float:
    """Median seconds of a denoiser forward of 64 images: nine steps less one, divided by eight."""
    seeds = Seeds(role="calibrate", base=0, count=64)

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        list(sampler.images(None, seeds, steps=steps, output="latents"))
        return time.perf_counter() - began

    seconds(1)
    return statistics.median((seconds(9) - seconds(1)) / 8 for _ in range(5))


def _interval(m: Measurement) -> str:
    interval = m.interval()
    assert interval is not None
    return f"{m.value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


if __name__ == "__main__":
    main()
