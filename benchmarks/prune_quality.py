"""What cutting layers costs before any retraining: `python -m lissom.benchmarks.prune_quality` (half an hour on two slow cores).

zoo:fashion and zoo:fashion-dit at about 15, 30 and 50 % fewer parameters: laptop (one-shot knapsack, and with re-scoring), a
hand-made map, magnitude, random cuts (3 seeds), all at the hand-made map's parameters within 2 %. Losses are measured on calls
that no method saw, images have seeds of their own and are compared with the 10,000 test images. Resumable: what is measured
stays in runs/benchmarks/prune-quality.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core import calibration, surgery
from ..core.candidate import Cut, Seeds
from ..core.driving.steering import denoisers
from ..core.measurement import Measurement, ratio
from ..core.output_loss import OutputLoss
from ..core.recipe import build
from ..core.stages import PruneStage
from ..prune import slim_unet
from ..prune._task import Pruned
from ..workflow._losses import Losses
from ..workflow._prune_job import Job, choose, gauge_of, job_of
from ..workflow._prune_report import additivity
from ..workflow._subject import Subject
from ..workflow.context import Context, Options, Silent
from . import _results

STEPS, IMAGES = 10, 2048  # DDIM steps and images behind each distance
CALIBRATION, TIMES, SUBSETS = 256, 16, 64  # images and noise levels that losses are measured on; random sets for additivity
NEAR = 0.02  # of all parameters: how far from the hand-made map's size another result may be
SEEDS = 3  # of random cuts
# The hand-made maps are BK-SDM's way of cutting (arXiv 2305.15798): (ResNet, attention) pairs go, outer stages last; then the
# middle and the innermost stage. On the DiT every n-th block goes, never the first or the last.
MAPS: dict[str, dict[str, Any]] = {
    "15 %": {"layers_per_block": [2, 1, 2, 1]},
    "30 %": {"layers_per_block": [2, 1, 1, 1]},
    "50 %": {"layers_per_block": [2, 1, 1], "stages": 3, "middle": "resnet"},
}
# A second one of one's own, where there is one of that size: the innermost layers alone.
INNERMOST: dict[str, dict[str, Any]] = {
    "15 %": {"layers_per_block": [2, 2, 2, 1], "middle": "none"},
    "30 %": {"layers_per_block": [2, 2, 2], "stages": 3, "middle": "none"},
}
BLOCKS: dict[str, tuple[int, ...]] = {"15 %": (4, 8), "30 %": (2, 4, 6, 8), "50 %": (1, 3, 5, 7, 9, 10)}
MODELS = ("zoo:fashion", "zoo:fashion-dit")


class Bench:
    """A model with what was measured of it so far."""

    def __init__(self, ref: str, known: dict[str, Any]) -> None:
        evaluate = {"reference": "zoo:fashion", "metrics": ["fid", "clip_score", "accuracy"], "samples": IMAGES}
        data = {"lissom": 1, "model": ref, "evaluate": evaluate, "stages": [{"prune": "laptop"}]}
        context = Context(build(data, "benchmark"), Path.cwd(), Options(device="cpu"), Silent())
        self.subject = Subject.load(ref, context)
        self.gauge = gauge_of(self.subject)
        folder = _results.RUNS / ref.replace(":", "-")
        self.evaluator = self.subject.evaluator("report", folder)
        calls = calibration.record(self.subject.sampler, CALIBRATION, TIMES, seed=0)
        self.losses = Losses(self.subject.model.pipe, calls, folder / "scores.jsonl", self.subject.model.fingerprint, Silent())
        unseen = calibration.record(self.subject.sampler, CALIBRATION, TIMES, seed=1)
        self.unseen = OutputLoss(denoisers(self.subject.model.pipe), unseen)
        self.known, self.ref = known, ref

    def job(self, method: str, keep: float | None, **settings: Any) -> Job:
        stage = PruneStage(prune=method, keep=keep, settings=settings)
        return job_of(stage, self.gauge, 0, self.ref, "cpu", None)

    def chosen(self, job: Job, seed: int = 0) -> Pruned:
        return choose(job, self.losses if job.module.calibrated else None, seed, Silent())

    def measure(self, name: str, cuts: Sequence[Cut]) -> dict[str, Any]:
        """Loss on unseen calls and metrics of images; from the file where it is there."""
        key, plain = f"{self.ref} {name}", [cut.plain() for cut in cuts]
        if self.known.get(key, {}).get("of") != plain:
            with surgery.applied(self.subject.model.denoiser, cuts):
                score = self.evaluator.score(None, Seeds(role="report", base=0, count=IMAGES), steps=STEPS, replicates=True)
            (loss,) = self.unseen.each([cuts]) if cuts else (0.0,)
            params, macs = self.gauge.after(cuts)
            self.known[key] = {
                "params": params / self.gauge.params,
                "macs": macs / self.gauge.macs,
                "loss": loss,
                "cuts": len(cuts),
                "of": plain,
                "measurements": [m.plain() for m in score.measurements],
            }
            _store().parent.mkdir(parents=True, exist_ok=True)
            _store().write_text(json.dumps(self.known, indent=1))
            print(f"{key}: {self.known[key]['params']:.3f} of the parameters, loss {loss:.3g}", flush=True)
        found: dict[str, Any] = self.known[key]
        return found


def hand_made(bench: Bench, size: str) -> tuple[Cut, ...]:
    if bench.ref == "zoo:fashion-dit":
        return tuple(Cut(address=f"transformer_blocks.{i}", what="remove") for i in BLOCKS[size])
    return mapped(bench, MAPS[size])


def mapped(bench: Bench, block_map: dict[str, Any]) -> tuple[Cut, ...]:
    return bench.chosen(bench.job("slim_unet", None, **slim_unet.Config(**block_map).model_dump(exclude_none=True))).cuts


def nearest(bench: Bench, share: float, make: Callable[[float], Pruned]) -> tuple[Cut, ...]:
    """The result nearest to a share of the parameters, of keeps a little above it: a method stops at the first layer too many."""
    found = [make(min(1.0, share + NEAR * k / 20)).cuts for k in range(21)]
    return min(found, key=lambda cuts: abs(bench.gauge.after(cuts)[0] / bench.gauge.params - share))


def random_cuts(bench: Bench, share: float, seed: int) -> tuple[Cut, ...]:
    """The first of many random choices that is near enough."""
    for attempt in range(1000):
        cuts = bench.chosen(bench.job("random_cuts", share), seed=1000 * seed + attempt).cuts
        if abs(bench.gauge.after(cuts)[0] / bench.gauge.params - share) <= NEAR:
            return cuts
    raise SystemExit(f"no random choice within {NEAR:.0%} of {share:.3f}")


def rows(bench: Bench, size: str) -> list[tuple[str, dict[str, Any]]]:
    hand = hand_made(bench, size)
    own = bench.measure(f"{size} hand-made map", hand)
    share = own["params"]
    found = [("hand-made map", own)]
    if bench.ref == "zoo:fashion" and size in INNERMOST:
        name = "hand-made, innermost only"
        found.append((name, bench.measure(f"{size} {name}", mapped(bench, INNERMOST[size]))))
    for name, settings in (("laptop", {"additivity": 0}), ("laptop, 4 rounds", {"additivity": 0, "rounds": 4})):
        cuts = nearest(bench, share, lambda keep, s=settings: bench.chosen(bench.job("laptop", keep, **s)))  # type: ignore[misc]
        found.append((name, bench.measure(f"{size} {name}", cuts)))
    cuts = nearest(bench, share, lambda keep: bench.chosen(bench.job("magnitude", keep)))
    found.append(("magnitude", bench.measure(f"{size} magnitude", cuts)))
    for seed in range(SEEDS):
        name = f"random {seed}"
        found.append((name, bench.measure(f"{size} {name}", random_cuts(bench, share, seed))))
    return found


def text(bench: Bench) -> str:
    whole = bench.measure("whole", ())
    head = [
        "size",
        "method",
        "cuts",
        "parameters",
        "MACs",
        "output loss",
        "FD[zoo:judge]",
        "FD / FD(whole)",
        "CLIP score",
        "recognised",
    ]
    lines = [["", "whole", "0", "1.000", "1.000", "0", *_quality(whole, whole)]]
    for size in MAPS:
        for name, found in rows(bench, size):
            lines.append(
                [size, name, str(found["cuts"]), f"{found['params']:.3f}", f"{found['macs']:.3f}", f"{found['loss']:.3g}"]
                + _quality(found, whole)
            )
    sums = []
    for size in MAPS:
        job = bench.job("laptop", bench.measure(f"{size} hand-made map", hand_made(bench, size))["params"], additivity=SUBSETS)
        result = bench.chosen(job)
        add = additivity(result)
        assert add is not None
        (joint,) = bench.losses([result.cuts])
        sums.append(
            f"{size}: rank correlation {add.rank_correlation:.3f}, loss / sum of scores {add.ratio:.2f} (median); "
            f"of the chosen cuts {joint:.3g}, predicted {result.predicted:.3g}"
        )
    return f"`{bench.ref}`\n\n{_results.table(head, lines)}\n\nAdditivity over {SUBSETS} random sets: {'. '.join(sums)}."


def _quality(found: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    own, before = ({m["metric"]: Measurement.model_validate(m) for m in x["measurements"]} for x in (found, whole))
    quotient, interval = ratio(own["fid"], before["fid"])
    relative = f"{quotient:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval and found is not whole else "1"
    return [_said(own["fid"]), relative, _said(own["clip_score"]), _said(own["accuracy"])]


def _said(m: Measurement) -> str:
    interval = m.interval()
    assert interval is not None
    return f"{m.value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _store() -> Path:
    return _results.RUNS / "prune-quality.json"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    known = json.loads(_store().read_text()) if _store().is_file() else {}
    parts = [text(Bench(ref, known)) for ref in MODELS]
    intro = (
        f"{IMAGES:,} images at {STEPS} DDIM steps, unseen seeds, against the 10,000 test images; 95 % intervals over the images, ratios "
        f"paired. Output loss: mean squared difference of the predicted noise on {CALIBRATION} unseen denoiser calls at {TIMES} noise "
        f"levels. Nothing was retrained. {_results.machine()}."
    )
    _results.write("prune", "\n\n".join([intro, *parts]))


if __name__ == "__main__":
    main()
