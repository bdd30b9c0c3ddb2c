"""reproduce.py and the stock call are really run, and compared with following the plan and with each other."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import UserError
from lissom.core.spacing import fixed
from lissom.report import reproduce
from lissom.report.reproduce import ModelCall
from lissom.tests.report.scripts import (
    BETAS,
    PROMPTS,
    SEEDS,
    TIMES,
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
from lissom.zoo import _models


def test_in_a_fresh_process_without_lissom(saved: Any, tmp_path: Path) -> None:
    pipe, folder = saved(stable_diffusion)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    skips = {
        0: ("down_blocks.0.resnets.0", "mid_block.resnets.0"),  # the first projects its shortcut
        2: ("up_blocks.1.attentions.1", "down_blocks.0.resnets.0"),
        3: (f"{block}.attn1", f"{block}.ff", "up_blocks.1.attentions.0.transformer_blocks.0"),
    }
    plan = plan_of(pipe.scheduler, skips)
    text = reproduce.emit(plan, call_of(pipe, folder, plan, PROMPTS, guidance_scale=1.0))
    assert "lissom" not in "".join(line for line in text.splitlines() if "import" in line)
    (tmp_path / "reproduce.py").write_text(text)
    watched = "import runpy, sys; runpy.run_path('reproduce.py', run_name='__main__'); sys.exit('lissom' in sys.modules)"
    command = [sys.executable, "-c", watched, "--save", "pixels.npy", "--out", "sheet.png"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sheet.png").is_file()
    want = followed(pipe, plan, PROMPTS, guidance_scale=1.0)
    assert largest_difference(np.load(tmp_path / "pixels.npy"), want) < TOLERANCE
    whole = followed(pipe, plan_of(pipe.scheduler), PROMPTS, guidance_scale=1.0)
    assert largest_difference(whole, want) > 10 * TOLERANCE  # the skips matter, else this test would see nothing


def test_fewer_than_100_lines_with_16_prompts_and_many_skips() -> None:
    classes = ("ResnetBlock2D", "Transformer2DModel", "FeedForward")
    kinds = {f"blocks.{i}.layer": classes[i % 3] for i in range(6)}
    plan = plan_of(_models.scheduler(), {i: tuple(kinds) for i in range(4)}, tuple(range(990, 0, -20)))
    rows = tuple({"prompt": f"a rather long caption of a picture, number {i}, " + "with details " * 4} for i in range(16))
    text = reproduce.emit(plan, ModelCall("StableDiffusionPipeline", "a/b", tuple(range(2**62, 2**62 + 64)), rows, {}, kinds))
    assert len(text.splitlines()) < 100
    compile(text, "reproduce.py", "exec")
    assert 8 <= sum(row["prompt"] in text for row in rows) < 16  # fewer images, so that it stays short

    half = {address: cls for address, cls in kinds.items() if cls != "FeedForward"}  # what a search leaves out
    steps = (Step(timestep=t, skip=tuple(half)[:2], reuse=tuple(half)[2:]) for t in range(890, 0, -100))
    both = SamplingPlan(scheduler=plan.scheduler, steps=(Step(timestep=990), *steps))
    text = reproduce.emit(both, ModelCall("StableDiffusionPipeline", "a/b", tuple(range(16)), rows, {}, half))
    assert len(text.splitlines()) < 100 and "range(1, 10)" in text and rows[3]["prompt"] in text
    compile(text, "reproduce.py", "exec")


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**{**_models.SCHEDULER, "set_alpha_to_one": True, "prediction_type": "v_prediction"}),
        DDIMScheduler(**{**_models.SCHEDULER, "clip_sample": True, "clip_sample_range": 0.8}),
        DDIMScheduler(**{**_models.SCHEDULER, "thresholding": True, "prediction_type": "sample"}),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True),
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear", final_sigmas_type="sigma_min"),
        diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        diffusers.UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True),
        diffusers.DEISMultistepScheduler(**BETAS, timestep_spacing="trailing"),
        diffusers.HeunDiscreteScheduler(**BETAS),
        diffusers.LMSDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        diffusers.EulerAncestralDiscreteScheduler(**BETAS),
        diffusers.LCMScheduler(**BETAS),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__} {scheduler.config.get('prediction_type')}",
)
def test_schedulers(scheduler: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder = saved(stable_diffusion)
    skips = {0: ("up_blocks.1.attentions.1",), 1: ("mid_block.attentions.0",)}
    plan, arguments = plan_of(scheduler, skips), {"guidance_scale": 4.0, "negative_prompt": "shoe"}
    made = run_here(reproduce.emit(plan, call_of(pipe, folder, plan, PROMPTS, **arguments)), tmp_path, monkeypatch)
    want = followed(pipe, plan, PROMPTS, guidance_scale=4.0, negative_prompt=["shoe"] * len(SEEDS))
    assert largest_difference(made, want) < TOLERANCE


@pytest.mark.parametrize(
    ("maker", "rows", "times", "layers"),
    [
        (stable_diffusion_3, PROMPTS, (987.5, 700.25, 333, 61), ("transformer_blocks.0", "transformer_blocks.1.ff")),
        (dit, ({"class_labels": 3}, {"class_labels": 5}), TIMES, ("transformer_blocks.1", "transformer_blocks.0.attn1")),
        (unconditional, ({},), TIMES, ("down_blocks.0.attentions.0", "down_blocks.0.downsamplers.0")),
    ],
)
def test_pipelines(
    maker: Maker, rows: Any, times: Any, layers: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = saved(maker)
    plan = plan_of(pipe.scheduler, {2: tuple(a for a in layers if "downsamplers" not in a)}, times)
    made = run_here(reproduce.emit(plan, call_of(pipe, folder, plan, rows)), tmp_path, monkeypatch)
    assert largest_difference(made, followed(pipe, plan, rows)) < TOLERANCE


def test_noise_levels_of_the_plan(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder = saved(stable_diffusion_3)
    steps = tuple(Step(timestep=t, sigma=s) for t, s in ((900, 0.95), (500, 0.6), (100, 0.2)))
    plan = SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)
    made = run_here(reproduce.emit(plan, call_of(pipe, folder, plan, PROMPTS)), tmp_path, monkeypatch)
    assert largest_difference(made, followed(pipe, plan, PROMPTS)) < TOLERANCE


@pytest.mark.parametrize("skips", [{}, {1: ("transformer_blocks.0",)}], ids=["whole", "skips"])
def test_flow_heun(skips: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder = saved(stable_diffusion_3)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    for plan in (plan_of(scheduler, skips, (987.5, 700.25, 333)), fixed(scheduler, 3)["stock"]):
        made = run_here(reproduce.emit(plan, call_of(pipe, folder, plan, PROMPTS)), tmp_path, monkeypatch)
        assert largest_difference(made, followed(pipe, plan, PROMPTS)) < TOLERANCE


HELD = [EulerDiscreteScheduler, DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler, diffusers.UniPCMultistepScheduler]


@pytest.mark.parametrize("cls", HELD)
def test_stock_karras_levels(cls: Any, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder = saved(stable_diffusion)
    plan = fixed(cls(beta_schedule="scaled_linear", use_karras_sigmas=True), 3)["stock"]
    made = run_here(reproduce.emit(plan, call_of(pipe, folder, plan, PROMPTS)), tmp_path, monkeypatch)
    assert largest_difference(made, followed(pipe, plan, PROMPTS)) < TOLERANCE


def run_stock(text: str, pipe: Any, prompt: str) -> np.ndarray:
    """Execute the snippet; without a generator of its own it draws from the global one."""
    before = pipe.scheduler
    torch.manual_seed(SEEDS[0])
    names: dict[str, Any] = {"pipe": pipe, "prompt": prompt}
    try:
        exec(text, names)  # noqa: S102  the snippet is ours
    finally:
        pipe.scheduler = before
    return names["images"]


@pytest.mark.parametrize(
    ("maker", "scheduler", "times"),
    [
        (stable_diffusion, DDIMScheduler(**_models.SCHEDULER), TIMES),
        (stable_diffusion, DDIMScheduler(**{**_models.SCHEDULER, "set_alpha_to_one": True}), TIMES),
        (stable_diffusion, DDIMScheduler(**{**_models.SCHEDULER, "prediction_type": "v_prediction"}), (*TIMES, 0)),
        (stable_diffusion, EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True), TIMES),
        (stable_diffusion, DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True), TIMES),
        (stable_diffusion, diffusers.HeunDiscreteScheduler(**BETAS), TIMES),
        (stable_diffusion_3, FlowMatchEulerDiscreteScheduler(shift=3.0), (987.5, 700.25, 333, 61)),
    ],
    ids=["ddim", "ddim-alpha-one", "ddim-v", "euler-karras", "dpm++2m-karras", "heun", "flow"],
)
def test_stock_call(maker: Maker, scheduler: Any, times: Any, saved: Any) -> None:
    pipe, _ = saved(maker)
    plan, before = plan_of(scheduler, times=times), pipe.scheduler
    text = reproduce.stock_call(plan, type(pipe).__name__, {"guidance_scale": 2.0, "output_type": "np"})
    assert text is not None
    pipe.scheduler = scheduler  # the snippet starts from the pipeline's own
    try:
        made = run_stock(text, pipe, str(PROMPTS[0]["prompt"]))
    finally:
        pipe.scheduler = before
    assert largest_difference(made, followed(pipe, plan, PROMPTS, guidance_scale=2.0)[:1]) < TOLERANCE


def test_no_stock_call() -> None:
    ddim = DDIMScheduler(**_models.SCHEDULER)
    assert reproduce.stock_call(plan_of(ddim, {1: ("mid_block.attentions.0",)}), "StableDiffusionPipeline") is None
    assert reproduce.stock_call(plan_of(ddim), "DiTPipeline") is None  # takes no timesteps
    assert reproduce.stock_call(plan_of(DDIMScheduler()), "StableDiffusionPipeline") is None  # clips x0
    assert reproduce.stock_call(plan_of(ddim), "NoSuchPipeline") is None
    for name in (
        "DEISMultistep",
        "UniPCMultistep",
        "EulerAncestralDiscrete",
        "LMSDiscrete",
        "LCM",
        "DDPM",
    ):  # no list, or noise
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        assert reproduce.stock_call(plan_of(scheduler), "StableDiffusionPipeline") is None
    assert reproduce.stock_call(plan_of(diffusers.PNDMScheduler(skip_prk_steps=True)), "StableDiffusionPipeline") is None
    assert reproduce.stock_call(plan_of(diffusers.FlowMatchHeunDiscreteScheduler()), "StableDiffusion3Pipeline") is None


@pytest.mark.parametrize(
    ("scheduler", "changes", "word"),
    [
        (diffusers.DDPMScheduler(), {}, "not for DDPMScheduler"),
        (diffusers.PNDMScheduler(), {}, "PNDMScheduler cannot follow it (with skip_prk_steps=False"),
        (diffusers.LCMScheduler(), {"pipeline": "DiTPipeline"}, "DiTPipeline hands on no generators"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), {}, "use_flow_sigmas"),
        (DDIMScheduler(), {"arguments": {"eta": 0.5}}, "eta = 0.5"),
        (DDIMScheduler(), {"rows": ({"prompt_embeds": object()},)}, "'prompt_embeds'"),
        (DDIMScheduler(), {"rows": ({"image": "a.png"},)}, "input images"),
        (DDIMScheduler(), {"layers": {}}, "mid_block.attentions.0"),
        (DDIMScheduler(), {"layers": {"mid_block.attentions.0": "Mystery"}}, "Mystery"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}, "noise at every step"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), {}, "use_flow_sigmas"),
    ],
)
def test_refusals(scheduler: Any, changes: dict[str, Any], word: str) -> None:
    given: dict[str, Any] = {
        "pipeline": "StableDiffusionPipeline",
        "layers": {"mid_block.attentions.0": "Transformer2DModel"},
        **changes,
    }
    with pytest.raises(UserError, match="no reproduce.py for this plan") as caught:
        plan = plan_of(scheduler, {1: ("mid_block.attentions.0",)})
        reproduce.emit(plan, ModelCall(reference="x", seeds=SEEDS, **given))
    assert word in str(caught.value)
