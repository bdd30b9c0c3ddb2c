"""Recipes as text: the shipped ones, the recipe that a command line amounts to, and what a recipe would cost."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..core import models
from ..core.errors import UserError
from ..core.methods import suggest
from ..core.recipe import Recipe, override

RECIPES = Path(__file__).parent.parent / "recipes"


def names() -> list[str]:
    """The shipped recipes, as folder/name."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))


def shipped(name: str) -> Path:
    """The file of a shipped recipe. Raises UserError with a suggestion."""
    name = name.removesuffix(".yaml")
    known = names()
    if name not in known:
        raise UserError(
            f"{name}: no such recipe, neither a file here nor shipped; there are {', '.join(known)}.{suggest(name, known)}"
        )
    return RECIPES / f"{name}.yaml"


def recipe_text(data: dict[str, Any]) -> str:
    """The YAML of what a command line asks for, with the model pinned to its revision and weights."""
    folder, ref = models.resolve(data["model"])
    pinned = {**data, "model": ref}
    if (folder / "model_index.json").is_file():
        models.check_folder(folder, trust_remote_code=True)
        pinned["model_hash"] = models.fingerprint(folder)
    if not ref.startswith("zoo:") and Path(ref).is_dir():
        pinned["model"] = str(Path(ref).resolve())
    order = [k for k in Recipe.model_fields if k in pinned]
    body = yaml.safe_dump({k: pinned[k] for k in order}, sort_keys=False, allow_unicode=True, width=120)
    return "# Written by `lissom search`; run it again with `lissom run`.\n" + body


def effective(text: str, overrides: Iterable[str]) -> str:
    """The recipe's text with overrides applied. Without overrides it is the exact text, comments and all."""
    changes = list(overrides)
    if not changes:
        return text
    data = yaml.safe_load(text)
    for change in changes:
        override(data, change)
    said = "".join(f"# --set {' '.join(change.split())}\n" for change in changes)
    return said + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def estimate(recipe: Recipe, context: Any) -> dict[str, Any]:
    """What the recipe's stages take at most: images, denoiser calls, and seconds by timing one batch on this machine."""
    import math
    import tempfile
    import time

    from ..core.candidate import Seeds
    from ._subject import Subject
    from .search import check_objective, plans_of

    chunk = context.options.chunk
    stages: list[dict[str, Any]] = []
    for stage in recipe.stages:
        subject = Subject.load(recipe.model, context, stage.scheduler)
        check_objective(stage, context, subject.conditions)
        if subject.reference != "teacher":
            with tempfile.TemporaryDirectory() as scratch:
                subject.evaluator("report", Path(scratch))  # what cannot be scored is refused here too
        plans = plans_of(subject, stage)
        fixed = len(plans.fixed)
        work = [  # (evaluations, images each)
            (fixed + stage.trials, stage.samples),
            (stage.rescore + 1, stage.rescore_samples),
            (1 + fixed, recipe.evaluate.samples),
        ]
        images = sum(count * n for count, n in work)
        batches = sum(count * math.ceil(n / chunk) for count, n in work)
        plan = next(iter(plans.fixed.values()))
        few = Seeds(role="calibrate", base=0, count=chunk)
        list(subject.sampler.images(plan, few))  # warm up
        before, began = subject.sampler.calls, time.monotonic()
        for batch in subject.sampler.images(plan, few.model_copy(update={"start": chunk})):
            if batch.pixels is not None:
                subject.features.extract(batch.pixels)
        seconds, calls = time.monotonic() - began, subject.sampler.calls - before
        if subject.reference == "teacher":
            teacher = 2 * math.ceil(recipe.evaluate.samples / chunk)
            images += 2 * recipe.evaluate.samples
            batches += teacher * recipe.evaluate.teacher_steps // stage.steps
        stages.append(
            {
                "stage": f"search: {stage.method}",
                "model": subject.model.ref,
                "steps": stage.steps,
                "trials": stage.trials,
                "skippable_layers": len(plans.space.layers),
                "images": images,
                "denoiser_calls": batches * calls,
                "seconds": round(batches * seconds),
            }
        )
    return {"recipe": recipe.name, "stages": stages}


def say(estimates: dict[str, Any]) -> str:
    """The estimate for people."""
    lines = [f"{estimates['recipe']}: nothing was run. At most, without shared prefixes:"]
    for s in estimates["stages"]:
        minutes = s["seconds"] / 60
        lines.append(
            f"  {s['stage']} on {s['model']}, {s['steps']} steps, {s['trials']} candidates, {s['skippable_layers']} skippable "
            f"layers: {s['images']:,} images, {s['denoiser_calls']:,} denoiser calls, about {minutes:.1f} minutes here"
        )
    return "\n".join(lines)
