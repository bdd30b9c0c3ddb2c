"""reproduce.py of plans whose steps reuse layers, or are made by other models."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lissom.core.driving.switch import lend
from lissom.core.errors import UserError
from lissom.report import reproduce
from lissom.tests.report.scripts import (
    BETAS,
    PROMPTS,
    TOLERANCE,
    Maker,
    call_of,
    dit,
    followed,
    largest_difference,
    plan_of,
    run_here,
    stable_diffusion,
    stable_diffusion_3,
    unconditional,
)


@pytest.mark.parametrize(
    ("maker", "rows", "scheduler", "layers"),
    [
        (stable_diffusion, PROMPTS, None, ("down_blocks.0", "mid_block", "up_blocks.1.attentions.1")),
        (stable_diffusion, PROMPTS, diffusers.HeunDiscreteScheduler(**BETAS), ("up_blocks.1", "down_blocks.0.resnets.0")),
        (stable_diffusion, PROMPTS, diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True), ("up_blocks.1.attentions.0",)),
        (stable_diffusion_3, PROMPTS, None, ("transformer_blocks.0", "transformer_blocks.1.ff")),
        (dit, ({"class_labels": 3}, {"class_labels": 5}), None, ("transformer_blocks.1", "transformer_blocks.0.attn1")),
        (unconditional, ({},), None, ("up_blocks.0", "down_blocks.0.attentions.0")),
    ],
    ids=["sd", "sd-heun", "sd-plms", "sd3", "dit", "unconditional"],
)
def test_reuse(
    maker: Maker, rows: Any, scheduler: Any, layers: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = saved(maker)
    plan = plan_of(scheduler or pipe.scheduler, {3: layers[-1:]})
    steps = (s.model_copy(update={"reuse": layers}) if i in (1, 2) else s for i, s in enumerate(plan.steps))
    reusing = plan.model_copy(update={"steps": tuple(steps)})
    text = reproduce.emit(reusing, call_of(pipe, folder, reusing, rows))
    assert len(text.splitlines()) < 100
    want = followed(pipe, reusing, rows)
    assert largest_difference(run_here(text, tmp_path, monkeypatch), want) < TOLERANCE
    assert largest_difference(want, followed(pipe, reusing.without("reuse"), rows)) > 2 * TOLERANCE
    assert reproduce.stock_call(reusing, type(pipe).__name__) is None


@pytest.mark.parametrize("scheduler", [None, diffusers.HeunDiscreteScheduler(**BETAS)], ids=["ddim", "heun"])
def test_other_models(scheduler: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder = saved(stable_diffusion)
    torch.manual_seed(1)
    other = stable_diffusion()
    other.save_pretrained(tmp_path / "other")
    lend(pipe, "small", lambda: {"unet": other.unet})
    plan = plan_of(scheduler or pipe.scheduler, {3: ("mid_block.attentions.0",)})
    steps = (s.model_copy(update={"model": "small"}) if i in (0, 1) else s for i, s in enumerate(plan.steps))
    stitched = plan.model_copy(update={"steps": tuple(steps)})
    call = call_of(pipe, folder, stitched, PROMPTS)
    text = reproduce.emit(stitched, dataclasses.replace(call, models={"small": str(tmp_path / "other")}))
    assert len(text.splitlines()) < 100
    want = followed(pipe, stitched, PROMPTS)
    assert largest_difference(run_here(text, tmp_path, monkeypatch), want) < TOLERANCE
    assert largest_difference(want, followed(pipe, plan, PROMPTS)) > 10 * TOLERANCE
    assert reproduce.stock_call(stitched, type(pipe).__name__) is None
    with pytest.raises(UserError, match="where its model small is kept is not known"):
        reproduce.emit(stitched, call)
