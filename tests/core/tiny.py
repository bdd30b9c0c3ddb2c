"""Tiny random pipelines of the real classes, built in well under a second each. Calling one gives a fresh, seeded model."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WIDTH = 32  # of the text embeddings
SIDE = 8  # of images and latents: the tiny VAEs do not downsample


def sd(pipeline: Any = StableDiffusionPipeline, scheduler: Any = None, **components: Any) -> Any:
    torch.manual_seed(0)
    return _quiet(
        pipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(_clip()),
            tokenizer=tokenizer(),
            unet=unet(),
            scheduler=scheduler or DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **components,
        )
    )


def sdxl(pipeline: Any = StableDiffusionXLPipeline) -> Any:
    torch.manual_seed(0)
    return _quiet(
        pipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(_clip()),
            text_encoder_2=CLIPTextModelWithProjection(_clip(projection_dim=WIDTH)),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=WIDTH + 6 * 8,
                cross_attention_dim=2 * WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True,
        )
    )


def sd3(pipeline: Any = StableDiffusion3Pipeline) -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    return _quiet(
        pipeline(
            transformer=_trained(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModelWithProjection(_clip(projection_dim=WIDTH)),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_clip(projection_dim=WIDTH)),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux(pipeline: Any = FluxPipeline) -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return _quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae(1, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModel(_clip()),
            tokenizer=tokenizer(),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
            ).eval(),
            tokenizer_2=tokenizer(),
            transformer=_trained(transformer),
        )
    )


def dit(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=SIDE,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    return _quiet(DiTPipeline(transformer=_trained(transformer), vae=vae(), scheduler=scheduler))


def ddpm() -> Any:
    torch.manual_seed(0)
    return _quiet(DDPMPipeline(unet=pixel_unet(), scheduler=DDPMScheduler(clip_sample=False)))


def ddim(channels: int = 3) -> Any:
    torch.manual_seed(0)
    return _quiet(DDIMPipeline(unet=pixel_unet(channels), scheduler=DDIMScheduler(clip_sample=False)))


def unet(**changes: Any) -> Any:
    config = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _trained(UNet2DConditionModel(**(config | changes)))


def pixel_unet(channels: int = 3) -> Any:
    return _trained(
        UNet2DModel(
            sample_size=SIDE,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def vae(channels: int = 4, **changes: Any) -> Any:
    config = {"block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": channels, "layers_per_block": 1}
    return AutoencoderKL(**(config | changes)).eval()


def tokenizer() -> Any:
    """One token a letter, 8 tokens a prompt."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8)


# name -> (pipeline, arguments of one call for a batch of n)
Family = tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]
FAMILIES: dict[str, Family] = {
    "sd": (
        sd,
        lambda n: {"prompt": ["a shoe", "a bag", "coat"][:n], "guidance_scale": 3.0, **size(), "output_type": "latent"},
    ),
    "sdxl": (sdxl, lambda n: {"prompt": ["a shoe", "a bag", "coat"][:n], **size(), "output_type": "latent"}),
    "sd3": (sd3, lambda n: {"prompt": ["a shoe", "a bag", "coat"][:n], **size(), "output_type": "latent"}),
    "flux": (flux, lambda n: {"prompt": ["a shoe", "a bag", "coat"][:n], **flux_size(), "output_type": "latent"}),
    "dit": (dit, lambda n: {"class_labels": [1, 5, 7][:n], "guidance_scale": 3.0, "output_type": "pt"}),
    "ddpm": (ddpm, lambda n: {"batch_size": n, "output_type": "pt"}),
    "ddim": (ddim, lambda n: {"batch_size": n, "output_type": "pt"}),
}


@functools.cache
def shared(name: str) -> Any:
    """A family's pipeline, built once: for tests that leave it as it was."""
    return FAMILIES[name][0]()


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(first + i) for i in range(n)]


def size() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def flux_size() -> dict[str, Any]:
    return {**size(), "guidance_scale": 3.0, "max_sequence_length": 8}


def _clip(**changes: Any) -> Any:
    config = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes)


def _trained(model: Any) -> Any:
    """Zero-initialised gates and outputs would hide every mistake: fill all vectors with noise."""
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
