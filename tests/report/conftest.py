"""Synthetic search reports: many candidates, failures, skips, gains and no gains."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.candidate import SamplingPlan, Scheduler, Seeds, Step
from lissom.core.measurement import Measurement
from lissom.report.schema import Ratio, Row, Scored, SearchReport, Spent
from lissom.tests.report.scripts import Maker

LAYERS = ("down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.1.resnets.0", "up_blocks.2.attentions.0")
BASELINES = {"leading": (751, 501, 251, 1), "trailing": (999, 749, 499, 249), "linspace": (999, 666, 333, 0)}
GAIN = Ratio(value=1.63, low=1.55, high=1.71)


def plan(times: tuple[float, ...], skips: dict[int, tuple[str, ...]] | None = None) -> SamplingPlan:
    steps = tuple(Step(timestep=t, skip=(skips or {}).get(i, ())) for i, t in enumerate(times))
    return SamplingPlan(scheduler=Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000}), steps=steps)


def measured(metric: str, value: float, role: str = "report", n: int = 2048) -> Measurement:
    rng, spread = random.Random(f"{metric}{value}"), value * 0.01
    return Measurement(
        metric=metric,
        value=value,
        direction="lower" if metric == "fid" else "higher",
        features="zoo:judge" if metric == "fid" else None,
        reference="ab12" * 16,
        resize="clean",
        n=n,
        prompts="cd34" * 16,
        seeds=Seeds(role=role, base=0, count=n),  # type: ignore[arg-type]
        replicates=tuple(rng.gauss(value, spread) for _ in range(40)),
        versions={"torch": "2.14", "diffusers": "0.42"},
    )


def build(
    trials: int = 60,
    skips: bool = True,
    ratio: Ratio | None = GAIN,
    winner_macs: float = 0.85,
    **changes: object,
) -> SearchReport:
    """A report as a search of zoo:fashion would write it; every fifth candidate or so failed, `skips` varies the MACs."""
    rng, rows, wall = random.Random(1), [], 60.0
    for i in range(trials):
        wall = max(12.4, wall * rng.uniform(0.9, 1.02))
        times = tuple(sorted(rng.sample(range(1000), 4), reverse=True))
        skipped = {s: tuple(rng.sample(LAYERS, rng.randint(0, 3))) for s in range(4)} if skips else {}
        share = 1 - 0.03 * sum(map(len, skipped.values()))
        failed = rng.random() < 0.08
        rows.append(
            Row(
                number=i,
                origin="uniform" if i < 10 else f"mutation of {rng.randrange(i)}",
                state="failed" if failed else "complete",
                plan=plan(times, skipped),
                value=None if failed else wall * rng.uniform(1, 1.8),
                macs_ratio=share,
                rescored=None,
                calls=rng.randint(2, 4),
                seconds=2.5,
                error="CUDA out of memory at batch 1 <b>" if failed else None,
            )
        )
    best = min((r for r in rows if r.value is not None), key=lambda r: r.value or 0, default=None)
    rows = [r.model_copy(update={"rescored": 13.0}) if r is best else r for r in rows]
    chosen = {2: LAYERS[:1], 3: LAYERS[1:]} if skips else {}
    winner = Scored(
        name="searched",
        plan=plan((951, 713, 391, 87), chosen),
        measurements=(measured("fid", 12.3), measured("clip_score", 0.7)),
        macs=1_000_000,
        macs_ratio=winner_macs if skips else 1.0,
        sheet="searched.png",
        searched_value=12.4,
        rescored=measured("fid", 13.0, "rescore", 1024),
    )
    values = dict(zip(BASELINES, (31.7, 20.1, 28.2), strict=True))
    fixed = [
        Scored(
            name=name,
            plan=plan(times),
            measurements=(measured("fid", values[name]), measured("clip_score", 0.66)),
            sheet=f"{name}.png",
            searched_value=values[name] + 2,
        )
        for name, times in BASELINES.items()
    ]
    record: dict[str, object] = {
        "lissom": "0.1",
        "model": "zoo:fashion",
        "model_hash": "ef56" * 16,
        "pipeline": "StableDiffusionPipeline",
        "denoiser_parameters": 2_412_345,
        "method": "autodiffusion",
        "settings": {"population": 20, "seed": 0},
        "paper": "https://arxiv.org/abs/2309.10438",
        "objective": "fid",
        "objective_label": "FD[zoo:judge]",
        "steps": 4,
        "trials": trials,
        "samples": 512,
        "report_samples": 2048,
        "budget": {"macs": 0.9} if skips else {},
        "reference": {"search": "zoo:fashion, 60,000 training images", "report": "zoo:fashion, 10,000 test images"},
        "winner": winner,
        "baselines": tuple(fixed),
        "best_fixed": "trailing",
        "ratio": ratio,
        "candidates": tuple(rows),
        "spent": Spent(evaluations=trials + 12, calls=170, plain_calls=288, seconds=312.0),
        "command": "lissom search autodiffusion zoo:fashion --steps 4 --trials 60 --seed 0",
        "stock_call": "images = pipe(prompt, timesteps=[951, 713, 391, 87]).images",
        "environment": {"python": "3.13", "cpu": "2 cores"},
        "warnings": ("The journal had a torn last line, which was cut.",),
    }
    return SearchReport.model_validate(record | changes)


@pytest.fixture(scope="session")
def make_report() -> Callable[..., SearchReport]:
    return build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Maker], tuple[Any, Path]]:
    """A random pipeline and the folder it was saved to; made once per kind."""
    made: dict[Maker, tuple[Any, Path]] = {}

    def save(maker: Maker) -> tuple[Any, Path]:
        if maker not in made:
            torch.manual_seed(0)
            pipe, folder = maker(), tmp_path_factory.mktemp(maker.__name__)
            pipe.set_progress_bar_config(disable=True)
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()  # as from_pretrained does: DiT drops labels in training mode
            if hasattr(pipe, "text_encoder"):  # in half precision on disk, as many hub models are
                pipe.text_encoder.half()
            pipe.save_pretrained(folder)
            pipe.to(torch.float32)
            made[maker] = pipe, folder
        return made[maker]

    return save
