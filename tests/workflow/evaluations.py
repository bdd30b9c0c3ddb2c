"""Evaluations that nobody had to measure, with pictures beside them."""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from lissom.core.candidate import Seeds
from lissom.core.measurement import Measurement, half_samples
from lissom.report.evaluation import Evaluation
from PIL import Image

IMAGES = 64


def measured(metric: str, worse: float = 0.0, base: int = 0, n: int = IMAGES, noise: int = 0, **changes: Any) -> Measurement:
    """A mean over images: the same seeds share their spread, `noise` is what single images change by."""
    higher = metric in ("clip_score", "accuracy")
    drawn, own = random.Random(base), random.Random(f"{metric}/{noise}")
    values = [drawn.gauss(5, 1) + (-worse if higher else worse) + (own.gauss(0, 0.02) if noise else 0) for _ in range(n)]
    halves = tuple(statistics.fmean(values[i] for i in half) for half in half_samples(n))
    fields = {
        "metric": metric, "value": statistics.fmean(values), "direction": "higher" if higher else "lower", "n": n, "replicates": halves,
        "features": "zoo:judge", "prompts": "p" * 64, "resize": "clean-bicubic-32", "reference": "f" * 64,
        "seeds": Seeds(role="report", base=base, count=n), "versions": {"features": "a", "evaluation": "1", "torch": "2"},
    }  # fmt: skip
    return Measurement.model_validate(fields | changes)


def counted(metric: str, value: float) -> Measurement:
    return Measurement(metric=metric, value=value, direction="lower", n=0, exact=True, versions={"evaluation": "1"})


def evaluation(*measurements: Measurement, **changes: Any) -> Evaluation:
    seeds = next((m.seeds for m in measurements if m.seeds), None)
    fields: dict[str, Any] = {
        "lissom": "0.1.0", "model": "zoo:fashion", "model_hash": "7" * 64, "pipeline": "StableDiffusionPipeline", "steps": 4,
        "what": "stock schedule of 4 steps", "samples": seeds.count if seeds else 0, "seeds": seeds, "measurements": measurements,
    }  # fmt: skip
    return Evaluation.model_validate(fields | changes)


def write(file: Path, found: Evaluation, pictures: int = 0, brightness: int = 0) -> Path:
    """FILE.json, and pictures beside it whose image i changes by i x brightness."""
    if pictures:
        found = found.model_copy(update={"images": f"{file.stem}.images"})
        folder = file.with_name(f"{file.stem}.images")
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(pictures):
            Image.fromarray(np.full((8, 8, 3), 10 + i * brightness, np.uint8)).save(folder / f"{i:06}.png")
        rows = [json.dumps({"index": i, "caption": f"picture {i}"}) + "\n" for i in range(pictures)]
        (folder / "per-image.jsonl").write_text("".join(rows))
    file.write_text(found.text())
    return file
