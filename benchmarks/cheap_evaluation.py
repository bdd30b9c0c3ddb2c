"""Ways to evaluate candidates cheaply, against full evaluation: `python -m lissom.benchmarks.cheap_evaluation` (an hour or two on one
slow core; resumable, a killed run loses one block of images).

zoo:fashion, DDIM, 4 steps, 100 candidates: a quarter random, half from the trajectory of an evolution on other seeds, a quarter
mutants of its best, with skips. Gold is the distance of 2,048 images of the report's seeds from the test images, as the mean of two
disjoint blocks; how well the blocks agree is what no estimator can be asked to exceed. Every estimator is computed from one
generation of 1,024 images of the search's seeds, against the training images.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from ..core.candidate import SamplingPlan, Seeds
from ..core.driving import Memo
from ..core.driving.memo_files import Files
from ..core.files import write_text
from ..core.sampling import Sampler
from ..evaluate import _frechet
from . import _results
from ._cheap_candidates import FD, STEPS, Drawn, Kept, draw
from ._cheap_estimators import CHUNK, DRAWS, Estimator, Trials
from ._search_bench import Bench

RESAMPLES = 1000  # of the candidates, for intervals
SUBSETS = 2000  # random choices of fewer candidates
TOP = 10
PROMOTED = 3  # candidates that the memo is tried on
MEMO = 512 * 2**20  # bytes, as by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--images", type=int, default=1024, help="of the search's seeds, a multiple of 64")
    parser.add_argument("--gold", type=int, default=1024, help="images in each of the two blocks of unseen seeds")
    parser.add_argument(
        "--print", action="store_true", dest="only_print", help="print the section, leave docs/results.md alone"
    )
    options = parser.parse_args()
    if options.images % CHUNK:
        parser.error(f"--images {options.images}: give a multiple of {CHUNK}")
    _results.RUNS.mkdir(parents=True, exist_ok=True)
    bench = Bench("zoo:fashion", STEPS, ("timesteps", "skips"))
    kept, drawn = Kept(bench), draw(bench, options.candidates)
    trials, gold = generate(bench, kept, drawn, options.images, options.gold)
    memo = remembered(bench, drawn, options.images, kept.folder / f"memo-{options.images}.json")
    text = section(trials, gold, np.array(drawn.near), memo, options.gold)
    if options.only_print:
        print(text)
    else:
        _results.write("cheap-evaluation", text)


def generate(bench: Bench, kept: Kept, drawn: Drawn, images: int, gold: int) -> tuple[Trials, np.ndarray]:
    """Everybody's images, and the gold values (2, C) of the two blocks."""
    searched = Seeds(role="search", base=0, count=images)
    unseen = [Seeds(role="report", base=0, count=gold, start=start) for start in (0, gold)]
    view, last = bench.search.scorer.views[FD], bench.last.scorer.views[FD]
    assert view is not None and view.reference is not None and last is not None and last.reference is not None
    steps = bench.subject.context.recipe.evaluate.teacher_steps
    teacher = kept.of("teacher", None, searched, steps=steps)
    usual = kept.of("fixed", drawn.reference.plan, searched)
    own, values = [], []
    for i, candidate in enumerate(drawn.candidates):
        name, began = candidate.digest()[:16], time.monotonic()
        own.append(kept.of(name, candidate.plan, searched))
        blocks = [kept.of(name, candidate.plan, seeds) for seeds in unseen]
        values.append([_frechet.distance(block.features, last.reference.mean, last.reference.root).item() for block in blocks])
        print(f"{i + 1} of {len(drawn.candidates)}: {values[-1][0]:.3g}, {time.monotonic() - began:.0f} s", flush=True)
    found = Trials(drawn.candidates, own, usual, drawn.reference, teacher, steps, view.reference, len(bench.subject.conditions))
    return found, np.array(values).T


def section(trials: Trials, gold: np.ndarray, near: np.ndarray, memo: dict[str, Any], block: int) -> str:
    """The text of docs/results.md."""
    one, two = gold
    mean = gold.mean(0)
    ceiling = [
        interval(lambda at, m=m: kendalltau(one[m][at], two[m][at]).statistic, int(m.sum()))  # type: ignore[misc]
        for m in (np.ones(len(mean), bool), near)
    ]
    found = trials.estimators()
    head = ["estimator", "calls", "tau_b", "Spearman", f"top {TOP}", "regret", "tau_b, near", "regret, near"]
    rows = [[e.name, f"{e.calls:.1f}", *_measures(e, mean), *_measures(e, mean, near)[::3]] for e in found]
    whole = next(e for e in found if e.name == f"FD, {trials.count} images")
    equal = ["estimator", "calls", "tau_b", "regret", "images", "their tau_b", "their regret", "candidates", "their regret"]
    intro = (
        f"`zoo:fashion`, DDIM, {STEPS} steps, timesteps and skips, {len(mean)} candidates: a quarter random, half from an evolution on other "
        f"seeds, a quarter mutants of its best. Gold: FD[zoo:judge] of {2 * block:,} images of unseen seeds against the test images (mean of two "
        f"blocks), from {mean.min():.2f} to {mean.max():.2f}, median {np.median(mean):.2f}. Estimators: {trials.count:,} images of other seeds at "
        f"most, the same for all, against the training images. Calls: denoiser forwards of {CHUNK} images for one candidate without shared "
        f"prefixes, its share of the teacher's {trials.teacher_steps} steps and of the best fixed schedule included. Top {TOP}: how many of the "
        f"{TOP} best are among its {TOP} best. Regret: gold of its best less the best gold. Near: the {int(near.sum())} of the evolution's second "
        f"half and the mutants. Intervals: {RESAMPLES:,} resamples of the candidates; means over {DRAWS} draws where batches or seeds are left to "
        f"chance. {_results.machine()}."
    )
    same = (
        f"With the same calls, full evaluation ({trials.count:,} images) reaches, on fewer images for all, or in full on fewer candidates drawn at "
        f"random ({SUBSETS:,} draws):"
    )
    agreed = (
        f"Two blocks of {block:,} images agree by tau_b {ceiling[0]} (near: {ceiling[1]}): no estimator can be asked for more."
    )
    equals = [_equal(e, trials, whole, mean) for e in found]
    return "\n\n".join([intro, agreed, _results.table(head, rows), same, _results.table(equal, equals), _remembered_text(memo)])


def _measures(estimator: Estimator, gold: np.ndarray, part: np.ndarray | None = None) -> list[str]:
    """tau_b, Spearman's rho, share of the best found, regret: each with its interval, on a part of the candidates."""
    chosen = np.ones(len(gold), bool) if part is None else part
    values, truth = estimator.values[:, chosen], gold[chosen]
    rng = np.random.default_rng(0)

    def over(measure: Callable[[np.ndarray, np.ndarray], float]) -> str:
        centre = float(np.mean([measure(row, truth) for row in values]))
        resampled = interval(lambda at: measure(values[rng.integers(len(values))][at], truth[at]), len(truth), centre)
        return resampled

    return [over(tau), over(rho), over(recall), over(regret)]


def tau(values: np.ndarray, gold: np.ndarray) -> float:
    return float(kendalltau(rankdata(values), gold).statistic)


def rho(values: np.ndarray, gold: np.ndarray) -> float:
    return float(spearmanr(rankdata(values), gold).statistic)


def recall(values: np.ndarray, gold: np.ndarray) -> float:
    """Share of the best by gold among as many best by values."""
    count = max(1, min(TOP, len(gold) // 2))
    best = set(np.argsort(gold, kind="stable")[:count])
    return len(best & set(np.argsort(values, kind="stable")[:count])) / count


def regret(values: np.ndarray, gold: np.ndarray) -> float:
    return float(gold[np.argmin(values)] - gold.min())


def interval(measure: Callable[[np.ndarray], float], count: int, centre: float | None = None) -> str:
    """A number (of all candidates) and its 95 % interval over resamples of them: percentiles of the bootstrap."""
    rng = np.random.default_rng(1)
    centre = measure(np.arange(count)) if centre is None else centre
    found = [measure(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(found, (2.5, 97.5))  # a resample of a single candidate has no correlation
    return f"{centre:.2f} [{low:.2f}, {high:.2f}]"


def _equal(estimator: Estimator, trials: Trials, whole: Estimator, gold: np.ndarray) -> list[str]:
    """What full evaluation does with the calls of an estimator."""
    images = min(trials.count, max(4, round(estimator.calls / STEPS * CHUNK)))
    fewer = trials.full(images)[0]
    count = min(len(gold), max(1, round(len(gold) * estimator.calls / whole.calls)))
    rng, values = np.random.default_rng(2), whole.values[0]
    lost = []
    for _ in range(SUBSETS):
        some = rng.permutation(len(gold))[:count]
        lost.append(gold[some[np.argmin(values[some])]] - gold.min())
    own = [float(np.mean([measure(row, gold) for row in estimator.values])) for measure in (tau, regret)]
    cells: list[float | int] = [*own, images, tau(fewer, gold), regret(fewer, gold), count, float(np.mean(lost))]
    return [
        estimator.name,
        f"{estimator.calls:.1f}",
        *(f"{cell:,}" if isinstance(cell, int) else f"{cell:.2f}" for cell in cells),
    ]


def remembered(bench: Bench, drawn: Drawn, images: int, file: Path) -> dict[str, Any]:
    """What promoted candidates find in the memo, and a second worker in its files; kept in a file."""
    if file.is_file():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    rungs, subject = (images // 16, images // 4, images), bench.subject
    plans = [c.plan for c in drawn.candidates[:PROMOTED] if c.plan is not None]

    def sampler(memo: Memo) -> Sampler:
        return Sampler(
            subject.model.pipe,
            subject.conditions,
            chunk=CHUNK,
            call=subject.call,
            memo=memo,
            fingerprint=subject.model.fingerprint,
        )

    alone = sampler(Memo(MEMO))
    shares = {}
    for n in rungs:
        before, served = alone.calls, alone.served
        for plan in plans:
            _draw(alone, plan, n)
        shares[n] = (alone.served - served) / (alone.calls - before + alone.served - served)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        _draw(sampler(Memo(MEMO)), plans[0], CHUNK)  # warm
        times = {"executed": _seconds(sampler(Memo(MEMO)), plans), "stored": _seconds(sampler(Memo(MEMO, Files(files))), plans)}
        second = sampler(Memo(MEMO, Files(files)))
        times["files"] = _seconds(second, plans)
        times["memory"] = _seconds(second, plans)
        size = sum(path.stat().st_size for path in files.rglob("*.safetensors")) / len(list(files.rglob("*.safetensors")))
        shared = second.served / (second.served + second.calls)
    found = {"shares": shares, "seconds": times, "bytes": size, "served": shared}
    write_text(file, json.dumps(found))
    known = json.loads(json.dumps(found))
    return known


def _draw(sampler: Sampler, plan: SamplingPlan, n: int) -> None:
    for _ in sampler.images(plan, Seeds(role="search", base=0, count=n), output="latents"):
        pass


def _seconds(sampler: Sampler, plans: list[SamplingPlan]) -> float:
    """Of one step of a chunk, the pipeline's own work included."""
    began = time.perf_counter()
    for plan in plans:
        _draw(sampler, plan, CHUNK)
    return (time.perf_counter() - began) / sum(len(plan.steps) for plan in plans)


def _remembered_text(memo: dict[str, Any]) -> str:
    shares = ", ".join(f"{100 * share:.0f} % on {n} images" for n, share in memo["shares"].items())
    ms = {name: f"{1000 * seconds:.1f} ms" for name, seconds in memo["seconds"].items()}
    return (
        f"Memo: of the denoiser calls of {PROMOTED} candidates that climb all rungs, so many are served: {shares}. A second worker with the same "
        f"files finds {100 * memo['served']:.0f} % of the calls of candidates that another has scored. One step of {CHUNK} images takes {ms['executed']} "
        f"executed, {ms['stored']} executed and stored in files ({memo['bytes'] / 1024:.0f} KiB each), {ms['files']} from files, {ms['memory']} from memory."
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
