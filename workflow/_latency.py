"""Time of a candidate from a table: milliseconds of the whole denoiser and of each layer, measured once, then added up.

The table is for one batch, image size, device and data type. How far the sums are off is measured too: some random candidates
are run through the whole pipeline, in turns with the uncut run.
"""

import hashlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import SamplingPlan, canonical
from ..core.errors import UserError
from ..core.stages import SearchStage
from ..report.schema import LatencyTable
from ._evaluator import trimmed
from ._gauge import Gauge, layer_times
from ._kept import kept
from ._prune_job import time_inside
from ._subject import Subject

if TYPE_CHECKING:
    from ..search._space import Price, Space

TABLE, CHECKED = "latency-table", "latency-checked"  # files in the run's folder, one for each set of conditions
CANDIDATES, TURNS = 6, 5  # random candidates that predictions are compared with, and how often each is timed


def table(stage: SearchStage, subject: Subject, gauge: Gauge, uncut: SamplingPlan, folder: Path | None) -> dict[str, Any]:
    """Times in milliseconds: `run` of the whole pipeline along `uncut`, `whole` of one denoiser evaluation, its `layers`, and of
    other `models` that may make steps.

    Measured once and kept in `folder`, so that a resumed search decides alike; on another device, batch or size it is measured anew.
    """
    from ..core import calibration
    from ..core.driving.switch import lent

    models = subject.context.recipe.models if "models" in stage.space else {}
    model, batch = subject.model, stage.latency_batch
    if not gauge.sized:
        raise UserError(
            f"latency: inputs of any batch size cannot be made up for {type(gauge.denoiser).__name__}, so that its layers cannot be "
            "timed. Use macs."
        )

    def make() -> dict[str, Any]:
        first = next(gauge.denoiser.parameters())
        with subject.asking():
            call = calibration.first(subject.sampler, subject.context.recipe.seed)
        rows = batch * (call.rows // len(call.images))  # guidance doubles them
        inputs = gauge.example(rows, first.device, first.dtype)
        whole, layers = layer_times(gauge.denoiser, inputs, [layer.address for layer in gauge.known], model.device)
        others = {}
        for name in models:
            other: Any = lent(model.pipe)[name][model.denoiser_name]
            others[name] = layer_times(other, inputs, [], model.device)[0]
        subject.context.progress.say(f"timing the uncut run and {len(layers)} layers of the denoiser, batch {batch}")
        run = statistics.median(_timed([_run(subject, uncut, batch)])[0])
        found = {"run": run, "whole": whole, "layers": layers, "latent": list(gauge.latent)}
        return {**found, "models": others} if others else found

    conditions = [
        model.fingerprint,
        batch,
        gauge.latent,
        gauge.text_tokens,
        model.device.partition(":")[0],
        model.dtype,
        uncut.plain(),
        *([{name: model.others[name].model_hash for name in models}] if models else []),
    ]
    found = make() if folder is None else kept(_file(folder, TABLE, conditions), conditions, make)
    return dict(found)


def price(measured: dict[str, Any], gauge: Gauge, space: "Space") -> "Price":
    """What the table says of a space's layers and choices. Time outside the denoiser cannot be saved."""
    from ..search._space import Price

    whole, layers = measured["whole"], measured["layers"]
    choices = {c.name: time_inside(gauge, layers, c.cuts) for site in space.sites for c in site}
    count = sum(space.evaluations or (1,) * space.steps)
    beside = max(0.0, measured["run"] - count * whole)
    return Price(whole, {a: layers[a] for a in space.layers if a in layers}, choices, beside, measured.get("models", {}))


def validated(
    stage: SearchStage, subject: Subject, space: "Space", measured: dict[str, Any], uncut: SamplingPlan, folder: Path
) -> LatencyTable:
    """The table with predictions beside what whole runs of the same candidates took. Kept in `folder` as the table is."""
    from ..search._space import Genome

    model, batch = subject.model, stage.latency_batch
    rng = random.Random(0)
    least = space.share(space.cheapest("latency"), "latency")
    genomes = []
    for _ in range(CANDIDATES if space.layers or space.models or space.sites else 0):
        within = replace(space, budget={"latency": rng.uniform(least + 0.1 * (1 - least), 1.0)})
        genomes.append(within.fill(within.random_steps(rng), rng))
    predicted = [round(space.share(genome, "latency"), 6) for genome in genomes]

    def make() -> list[float]:
        subject.context.progress.say(f"timing {len(genomes)} random candidates end to end, to see how far predictions are off")
        candidates = [space.candidate(genome) for genome in genomes]
        calls = [_run(subject, uncut, batch)]
        calls += [_run(subject, c.plan, batch, c.cuts) for c in candidates if c.plan is not None]
        whole, *others = _timed(calls)
        # Shares are of the dearest model's run, the run beside which the others are timed is the pipeline's own.
        own_share = space.share(Genome(uncut.steps, (0,) * len(space.sites)), "latency")
        return [own_share * statistics.median(a / b for a, b in zip(own, whole, strict=True)) for own in others]

    conditions = [model.fingerprint, batch, predicted, model.device.partition(":")[0], model.dtype]
    shares = kept(_file(folder, CHECKED, conditions), conditions, make) if genomes else []
    return LatencyTable(
        batch=batch,
        device=model.device,
        latent=tuple(measured["latent"]),
        whole=measured["whole"],
        layers=measured["layers"],
        predicted=tuple(predicted),
        measured=tuple(shares),
    )


def _file(folder: Path, kind: str, conditions: list[Any]) -> Path:
    """Other conditions have another file: a call that is refused afterwards must not take the table of the run away."""
    return folder / f"{kind}-{hashlib.sha256(canonical(conditions).encode()).hexdigest()[:12]}.json"


def _run(subject: Subject, plan: SamplingPlan, batch: int, cuts: Any = ()) -> Callable[[], float]:
    """One run of the pipeline along a plan, and how many milliseconds it took; cutting the model is not timed."""
    from ._rig import call_of

    def timed() -> float:
        with trimmed(subject.model, subject.sampler, plan, cuts) as moved:
            call = call_of(subject, moved, None, batch)
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)

    return timed


def _timed(calls: list[Callable[[], float]]) -> list[list[float]]:
    """Times of several calls, taken in turns: what slows the machine for a while slows them all."""
    for call in calls:
        call()  # warm up
    turns = [[call() for call in calls] for _ in range(TURNS)]
    return [list(own) for own in zip(*turns, strict=True)]
