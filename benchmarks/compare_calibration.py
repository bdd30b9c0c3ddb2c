"""Whether verdicts of `lissom compare` can be trusted: `python -m lissom.benchmarks.compare_calibration` (a quarter of an hour).

One pool of 16,384 images of zoo:fashion at 4 steps is cut into blocks, in many random ways. Blocks against blocks at a
zero-tolerance gate are models that are equal: a REGRESSION among them is a false alarm. Then noise is added to the denoiser's
weights, in five strengths, and blocks of the noisy models are compared with blocks of the pool, on the same seeds and on others: a
REGRESSION is a detection. For false alarms of paired comparisons, each pair of images of one seed is dealt to the two sides by a
coin, so that neither side is better. Resumable: features stay in runs/benchmarks/compare/.
"""

from pathlib import Path

import torch

from ..core.candidate import Seeds
from ..core.gates import check, zero_tolerance
from ..core.measurement import Measurement
from ..core.recipe import build
from ..evaluate._scorer import Made, Scorer, Shown
from ..workflow._gallery import Gallery
from ..workflow._subject import Subject
from ..workflow.context import Context, Options, Silent
from . import _results

STEPS, POOL, NOISY = 4, 16384, 8192  # images of the model itself, and of each noisy one
METRICS = ("fid", "clip_score", "accuracy")
BLOCKS = (256, 512, 1024, 2048, 4096)
SPLITS, DEALS = 40, 10  # random ways to cut the pool; coin tosses per block
STRENGTHS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of the noise, in standard deviations of each weight tensor


class Bench:
    def __init__(self) -> None:
        evaluate = {"reference": "zoo:fashion", "metrics": list(METRICS)}
        data = {"lissom": 1, "model": "zoo:fashion", "evaluate": evaluate, "stages": [{"search": "random_search"}]}
        context = Context(build(data, "benchmark"), Path.cwd(), Options(device="cpu"), Silent())
        self.subject = Subject.load("zoo:fashion", context)
        self.scorer = Scorer(self.subject.views("report", _results.RUNS))

    def features(self, strength: float, count: int) -> dict[str, torch.Tensor]:
        """What the scorer sees of the first images of the report's seeds, of the model with this much noise."""
        model, sampler = self.subject.model, self.subject.sampler
        identity = {"model": model.fingerprint, "scorer": self.scorer.id, "strength": strength, "steps": STEPS}
        gallery = Gallery(_results.RUNS / "compare" / f"{strength:g}", identity, resume=True)
        before = {name: p.clone() for name, p in model.denoiser.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for p in model.denoiser.parameters():
            if strength and p.numel() > 1:
                p.add_(torch.randn(p.shape, generator=generator) * p.std() * strength)
        if (done := gallery.done()) < count:
            for batch in sampler.images(None, Seeds(role="report", base=0, start=done, count=count - done), steps=STEPS):
                assert batch.pixels is not None
                gallery.add(batch.indices, self.scorer.observe(Shown(batch.pixels)))
                if batch.indices.stop % 1024 == 0:
                    print(f"noise {strength:g}: {batch.indices.stop} of {count} images", flush=True)
        for name, p in model.denoiser.named_parameters():
            p.copy_(before[name])
        return gallery.slice(range(count), "images")

    def block(
        self, seen: dict[str, torch.Tensor], start: int, n: int, order: torch.Tensor | None = None
    ) -> dict[str, Measurement]:
        """Measurements of one block of images: those from `start` on, in their own order or in another."""
        conditions, collector = self.subject.conditions, self.scorer.collect()
        at = torch.arange(start, start + n) if order is None else order[start : start + n]
        captions, labels = [conditions.caption(i) for i in at.tolist()], [conditions.label(i) for i in at.tolist()]
        collector.append({key: value[at] for key, value in seen.items()}, captions, labels)
        seeds = Seeds(role="report", base=0, start=start, count=n)
        return {m.metric: m for m in collector.finish(Made(seeds, conditions.hash, "cpu", "float32", len(conditions)))}


def verdict(metric: str, base: dict[str, Measurement], candidate: dict[str, Measurement]) -> str:
    ((rule, limit),) = zero_tolerance(base[metric]).rules()
    return check(metric, rule, limit, base[metric], candidate[metric]).verdict


def share(verdicts: list[str]) -> str:
    found = sum(v == "REGRESSION" for v in verdicts)
    return f"{found / len(verdicts):.1%} ({found} of {len(verdicts)})"


@torch.no_grad()
def main() -> None:
    bench = Bench()
    pool = bench.features(0.0, POOL)
    blocks = {n: [bench.block(pool, start, n) for start in range(0, POOL - n + 1, n)] for n in BLOCKS}
    alarms = []
    for n in BLOCKS:
        pairs = [pair for split in range(SPLITS) for pair in _pairs(bench, pool, n, split)]
        both = [*pairs, *((b, a) for a, b in pairs)]
        alarms.append([f"{n:,}", *(share([verdict(m, a, b) for a, b in both]) for m in METRICS)])
    effects, detected, dealt = [], [], []
    for strength in STRENGTHS:
        noisy = bench.features(strength, NOISY)
        whole, same = bench.block(noisy, 0, NOISY), bench.block(pool, 0, NOISY)
        effects.append([f"{strength:g}", *(f"{same[m].value:.3f} to {whole[m].value:.3f}" for m in METRICS)])
        for n in BLOCKS[:-1]:
            coins = [pair for deal in range(DEALS) for pair in _dealt(bench, pool, noisy, n, deal)]
            dealt.append([f"{strength:g}", f"{n:,}", *(share([verdict(m, a, b) for a, b in coins]) for m in METRICS)])
            others = [bench.block(noisy, start, n) for start in range(0, NOISY - n + 1, n)]
            cells = []
            for metric in METRICS:
                paired = [verdict(metric, a, b) for a, b in zip(blocks[n], others, strict=False)]
                unpaired = [verdict(metric, a, b) for i, b in enumerate(others) for j, a in enumerate(blocks[n]) if i != j]
                cells.append(f"{_share(paired)} / {_share(unpaired)}")
            detected.append([f"{strength:g}", f"{n:,}", *cells])
    names = ["FD[zoo:judge]", "CLIP score", "recognised"]
    _results.write(
        "compare",
        f"zoo:fashion at {STEPS} DDIM steps against the 10,000 test images, one pool of {POOL:,} images cut into blocks; {_results.machine()}.\n\n"
        f"False alarms: share of REGRESSION at a zero-tolerance gate among pairs of disjoint blocks of {SPLITS} random cuts of the pool, both ways "
        "round (the same model on other seeds, so that intervals are unpaired). Nominal: 5 %, of which the half on the worse side, 2.5 %, is "
        "an alarm. Cuts of one pool are not independent of each other.\n\n"
        + _results.table(["images a side", *names], alarms)
        + f"\n\nWhat the noise does, over {NOISY:,} images on the same seeds:\n\n"
        + _results.table(["noise", *names], effects)
        + "\n\nDetections: share of REGRESSION at the same gate, on the same seeds / on other seeds.\n\n"
        + _results.table(["noise", "images a side", *names], detected)
        + f"\n\nFalse alarms on the same seeds: each pair of images (of the model, of the noisy one) dealt to the sides by a coin, {DEALS} times a "
        "block; neither side is better. Nominal as above.\n\n" + _results.table(["noise", "images a side", *names], dealt),
    )


Pair = tuple[dict[str, Measurement], dict[str, Measurement]]


def _pairs(bench: Bench, pool: dict[str, torch.Tensor], n: int, split: int) -> list[Pair]:
    """Disjoint pairs of blocks of one random cut of the pool. Whole turns of the ten classes move, so that blocks stay balanced."""
    period = len(bench.subject.conditions)
    turns = torch.randperm(POOL // period, generator=torch.Generator().manual_seed(split))
    order = (turns[:, None] * period + torch.arange(period)).flatten()
    starts = range(0, len(order) - 2 * n + 1, 2 * n)
    return [(bench.block(pool, start, n, order), bench.block(pool, start + n, n, order)) for start in starts]


def _dealt(bench: Bench, pool: dict[str, torch.Tensor], noisy: dict[str, torch.Tensor], n: int, deal: int) -> list[Pair]:
    """The blocks of the pool and of a noisy model, every pair of images swapped or not by a coin."""
    coin = torch.rand(NOISY, generator=torch.Generator().manual_seed(deal)) < 0.5
    one = {key: torch.where(coin[:, None], pool[key][:NOISY], noisy[key]) for key in noisy}
    two = {key: torch.where(coin[:, None], noisy[key], pool[key][:NOISY]) for key in noisy}
    return [(bench.block(one, start, n), bench.block(two, start, n)) for start in range(0, NOISY - n + 1, n)]


def _share(verdicts: list[str]) -> str:
    return f"{sum(v == 'REGRESSION' for v in verdicts) / len(verdicts):.0%}"


if __name__ == "__main__":
    main()
