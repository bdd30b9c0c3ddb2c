"""reproduce.py and the stock call are really run, and compared with following the plan and with each other."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import follow
from lissom.core.errors import UserError
from lissom.core.spacing import fixed
from lissom.report import reproduce
from lissom.report.reproduce import ModelCall
from lissom.zoo import _models
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SEEDS = tuple(2**62 + i for i in range(3))  # as large as image seeds get
PROMPTS = ({"prompt": 'a photo of a "sneaker"', "label": 7}, {"prompt": "a photo of a \\ bag", "label": 8})
TIMES = (930, 612, 391, 40)
TOLERANCE = 1e-4
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
Maker = Callable[[], Any]


def vae() -> AutoencoderKL:
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8, shift_factor=0.0)


def stable_diffusion() -> StableDiffusionPipeline:
    tokens = _models.tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_models.TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    parts = {"vae": vae(), "text_encoder": _models.text_encoder(tokens), "tokenizer": tokens, "unet": unet}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **extra, scheduler=_models.scheduler())


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    tokens = _models.tokenizer()
    width = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text = CLIPTextConfig(vocab_size=len(tokens), num_attention_heads=2, max_position_embeddings=_models.CONTEXT, **width)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(text) for n in ("", "_2")} | {"text_encoder_3": t5}
    tokenizers = {f"tokenizer{n}": tokens for n in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(**encoders, **tokenizers, vae=vae(), transformer=transformer, scheduler=scheduler)


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8
    )
    return DiTPipeline(transformer, vae(), DDIMScheduler(clip_sample=False))


def unconditional() -> DDIMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, DDIMScheduler())


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


def plan_of(scheduler: Any, skips: dict[int, tuple[str, ...]] | None = None, times: tuple[float, ...] = TIMES) -> SamplingPlan:
    steps = tuple(Step(timestep=t, skip=(skips or {}).get(i, ())) for i, t in enumerate(times))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def call_of(pipe: Any, folder: Path, plan: SamplingPlan, rows: tuple[Any, ...], **arguments: Any) -> ModelCall:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = reproduce.layer_classes(getattr(pipe, name), plan)
    return ModelCall(type(pipe).__name__, str(folder), SEEDS, rows, arguments, layers, denoiser=name)


def followed(pipe: Any, plan: SamplingPlan, rows: tuple[Any, ...], **arguments: Any) -> np.ndarray:
    """The images that lissom makes: (N, H, W, 3) in 0..1."""
    keys = [key for key in rows[0] if key != "label"]
    inputs: dict[str, Any] = {key: [rows[i % len(rows)][key] for i in range(len(SEEDS))] for key in keys}
    if not keys:
        inputs["batch_size"] = len(SEEDS)
    inputs["generator"] = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with follow(pipe, plan):
        return pipe(**inputs, **arguments, num_inference_steps=len(plan.steps), output_type="np").images


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def run_here(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    script, out = tmp_path / "reproduce.py", tmp_path / "pixels.npy"
    script.write_text(text)
    monkeypatch.setattr(sys, "argv", [str(script), "--save", str(out), "--out", str(tmp_path / "sheet.png"), "--batch", "2"])
    runpy.run_path(str(script), run_name="__main__")
    return np.load(out)


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
    assert largest_difference(want, followed(pipe, reusing.executing("reuse"), rows)) > 2 * TOLERANCE
    assert reproduce.stock_call(reusing, type(pipe).__name__) is None
