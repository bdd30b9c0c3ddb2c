"""Random pipelines that reproduce.py is tried on, saved once, and ways to run a script and to compare images."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import follow
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
