"""Tiny random pipelines of more families than `tiny` has, in the same form: text, image to image, inpainting, control, video."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxTransformer2DModel,
    KandinskyV22Pipeline,
    LDMTextToImagePipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from lissom.tests.core import cutting, tiny
from lissom.tests.core.tiny import SIDE, WIDTH, _quiet, _trained, tokenizer, vae
from transformers import GemmaConfig, GemmaModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def pixart(pipeline: Any = PixArtSigmaPipeline, sample_size: int = SIDE) -> Any:
    """sample_size: of the latents; at 128 the model is told the resolution too, as PixArt-alpha 1024 is."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        cross_attention_dim=24,
        out_channels=8,
    )
    return _quiet(
        pipeline(
            transformer=_trained(transformer),
            vae=vae(),
            scheduler=DPMSolverMultistepScheduler(),
            text_encoder=t5(),
            tokenizer=tokenizer(),
        )
    )


def sana() -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=32,
    )
    gemma = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    return _quiet(
        SanaPipeline(
            transformer=_trained(transformer),
            vae=_dc(),
            scheduler=DPMSolverMultistepScheduler(**FLOW_DPM),
            text_encoder=GemmaModel(GemmaConfig(vocab_size=64, num_key_value_heads=2, **gemma)).eval(),
            tokenizer=tokenizer(),
        )
    )


def kandinsky() -> Any:
    """The decoder of Kandinsky 2.2: from image embeddings to latents, with a learned variance that its DDIM leaves out."""
    torch.manual_seed(0)
    unet = tiny.unet(
        out_channels=8,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    movq = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=12)
    return _quiet(KandinskyV22Pipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False), movq=movq.eval()))


def controlnet() -> Any:
    torch.manual_seed(0)
    unet = tiny.unet()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4,))
    for p in control.parameters():
        if not p.any():  # convolutions that start at zero would hide the picture
            torch.nn.init.normal_(p, std=0.3)
    return tiny.sd(StableDiffusionControlNetPipeline, controlnet=_trained(control))


def ldm() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 8}
    bert = LDMBertModel(LDMBertConfig(vocab_size=64, max_position_embeddings=80, **sizes)).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    return _quiet(LDMTextToImagePipeline(vqvae=vae(), bert=bert, tokenizer=tokenizer(), unet=tiny.unet(), scheduler=scheduler))


def inpaint_sd3() -> Any:
    """Its pipeline insists on the 16 latent channels of the real model."""
    base = tiny.sd3()
    torch.manual_seed(0)
    wide = type(base.transformer).from_config(base.transformer.config, in_channels=16, out_channels=16)
    coder = vae(16, shift_factor=0.06, scaling_factor=1.5)
    return _quiet(StableDiffusion3InpaintPipeline(**(base.components | {"transformer": _trained(wide), "vae": coder})))


def wan(experts: int = 1) -> Any:
    """Wan 2.1; with two experts Wan 2.2, whose second transformer takes over below 0.5 of the noise."""
    torch.manual_seed(0)

    def transformer() -> Any:
        heads = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 32}
        sizes = {"in_channels": 16, "out_channels": 16, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
        return _trained(WanTransformer3DModel(**heads, **sizes))

    both = [transformer() for _ in range(experts)]
    coder = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    text = UMT5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    return _quiet(
        WanPipeline(
            vae=coder.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=UMT5EncoderModel(text).eval(),
            tokenizer=tokenizer(),
            transformer=both[0],
            transformer_2=both[1] if experts == 2 else None,
            boundary_ratio=0.5 if experts == 2 else None,
        )
    )


def ltx() -> Any:
    torch.manual_seed(0)
    widths = {"attention_head_dim": 8, "num_attention_heads": 4, "cross_attention_dim": 32, "caption_channels": WIDTH}
    transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_layers=2, **widths)
    coder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return _quiet(
        LTXPipeline(
            transformer=_trained(transformer), vae=coder.eval(), scheduler=scheduler, text_encoder=t5(), tokenizer=tokenizer()
        )
    )


def t5() -> Any:
    config = T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    return T5EncoderModel(config).eval()


def _dc() -> Any:
    """Sana's autoencoder with the factor 32 of the real one left out: 4 channels at the size of the picture."""
    names = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=names,
        decoder_block_types=names,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41,
    ).eval()


def picture(n: int, channels: int = 3) -> torch.Tensor:
    """(n, channels, SIDE, SIDE) in 0..1; picture k is the same whatever n."""
    made = [torch.rand(channels, SIDE, SIDE, generator=torch.Generator().manual_seed(90 + k)) for k in range(n)]
    return torch.stack(made)


def embeds(n: int, seed: int) -> torch.Tensor:
    """(n, WIDTH); row k is the same whatever n."""
    return torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + k)) for k in range(n)])


def _prompts(n: int) -> dict[str, Any]:
    return {"prompt": ["a shoe", "a bag", "coat"][:n], "output_type": "latent"}


def _free(n: int, side: int = SIDE) -> dict[str, Any]:
    """For pipelines that would move a size to one that the model was trained with."""
    return {**_prompts(n), "height": side, "width": side, "use_resolution_binning": False, "max_sequence_length": 8}


def _image(n: int) -> dict[str, Any]:
    return {**_prompts(n), "image": picture(n), "strength": 0.6}


def _inpaint(n: int) -> dict[str, Any]:
    # All of it is painted: where the mask is 0 the pipeline puts the picture back after each step, which is no step's result.
    return {**_image(n), "mask_image": torch.ones(n, 1, SIDE, SIDE), **tiny.size()}


def _video(n: int, side: int = 16) -> dict[str, Any]:
    return {**_prompts(n), "height": side, "width": side, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 8}


FAMILIES: dict[str, tiny.Family] = {
    "pixart-sigma": (pixart, lambda n: _free(n) | {"clean_caption": False}),
    "pixart-alpha": (functools.partial(pixart, PixArtAlphaPipeline, 128), lambda n: _free(n) | {"clean_caption": False}),
    "sana": (sana, lambda n: _free(n, 32) | {"complex_human_instruction": None}),
    "kandinsky": (
        kandinsky,
        lambda n: {
            "image_embeds": embeds(n, 10), "negative_image_embeds": embeds(n, 20), **tiny.size(),
            "output_type": "latent",
        },
    ),
    "controlnet": (controlnet, lambda n: {**_prompts(n), "image": picture(n), "control_guidance_end": 0.5}),
    # The pipeline takes the latents to be 1/8 of the picture, whatever its autoencoder does.
    "ldm": (ldm, lambda n: {**_prompts(n), "height": 64, "width": 64, "guidance_scale": 3.0, "output_type": "np"}),
    "img2img": (functools.partial(tiny.sd, StableDiffusionImg2ImgPipeline), _image),
    "img2img-sdxl": (functools.partial(tiny.sdxl, StableDiffusionXLImg2ImgPipeline), _image),
    "img2img-sd3": (functools.partial(tiny.sd3, StableDiffusion3Img2ImgPipeline), lambda n: {**_image(n), **tiny.size()}),
    "img2img-flux": (functools.partial(tiny.flux, FluxImg2ImgPipeline), lambda n: {**_image(n), **tiny.flux_size()}),
    "inpaint": (functools.partial(tiny.sd, StableDiffusionInpaintPipeline), _inpaint),
    "inpaint-sdxl": (functools.partial(tiny.sdxl, StableDiffusionXLInpaintPipeline), _inpaint),
    "inpaint-sd3": (inpaint_sd3, _inpaint),
    "inpaint-flux": (functools.partial(tiny.flux, FluxInpaintPipeline), lambda n: {**_inpaint(n), **tiny.flux_size()}),
    "wan": (wan, _video),
    "wan-2.2": (functools.partial(wan, 2), _video),
    "ltx": (ltx, lambda n: _video(n, 32)),
}  # fmt: skip


@functools.cache
def shared(name: str) -> Any:
    """A family's pipeline, built once: for tests that leave it as it was."""
    return FAMILIES[name][0]()


def _transformer(cls: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return _trained(cls(**{"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, **settings}))


SMALL = {"in_channels": 4, "out_channels": 4, "patch_size": 1}
# Transformers of several heads each, and of such sizes that matrix products add up all there is, or half of it, one after the
# other: then the sum over the half that stays is that over all with zeros among them, bit for bit.
WIDE: dict[str, Callable[[], Any]] = {
    "dit": lambda: _transformer(
        DiTTransformer2DModel, sample_size=SIDE, in_channels=4, out_channels=8, num_embeds_ada_norm=1000
    ),
    "pixart": lambda: _transformer(
        PixArtTransformer2DModel, sample_size=SIDE, caption_channels=WIDTH, cross_attention_dim=32, out_channels=8
    ),
    # Attention to the picture alone beside the joint one, norms of single heads; the last block drops the text.
    "sd3": lambda: _transformer(
        SD3Transformer2DModel, sample_size=SIDE, caption_projection_dim=32, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, dual_attention_layers=(0,), qk_norm="rms_norm", **SMALL,
    ),
    "flux": lambda: _transformer(FluxTransformer2DModel, **FLUX),
    "chroma": lambda: _transformer(
        ChromaTransformer2DModel, num_single_layers=2, joint_attention_dim=WIDTH, axes_dims_rope=[2, 2, 4],
        approximator_layers=1, approximator_num_channels=8, approximator_hidden_dim=16, **SMALL,
    ),
    "sana": lambda: _transformer(SanaTransformer2DModel, **SANA),
    "sana-1.5": lambda: _transformer(SanaTransformer2DModel, qk_norm="rms_norm_across_heads", **SANA),
    "wan": lambda: _transformer(
        WanTransformer3DModel, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=64, rope_max_seq_len=32
    ),
}  # fmt: skip
FLUX: dict[str, Any] = {
    "num_single_layers": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "axes_dims_rope": [2, 2, 4],
    "guidance_embeds": True, **SMALL,
}  # fmt: skip
SANA: dict[str, Any] = {
    "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": WIDTH,
    "sample_size": SIDE, "mlp_ratio": 2.0, **SMALL,
}  # fmt: skip


@functools.cache
def wide(kind: str) -> Any:
    """One of WIDE, built once: for tests that leave it as it was."""
    return WIDE[kind]()


def arguments(denoiser: Any) -> dict[str, Any]:
    """`cutting.inputs`, and those of a Chroma, for which nothing can be made up outside of tests."""
    if type(denoiser).__name__.removeprefix("Pruned") != "ChromaTransformer2DModel":
        return cutting.inputs(denoiser)
    drawn, places = torch.Generator().manual_seed(0), torch.zeros(16, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=drawn), "img_ids": places, "txt_ids": torch.zeros(5, 3),
        "encoder_hidden_states": torch.randn(2, 5, WIDTH, generator=drawn), "timestep": torch.tensor([0.7, 0.1]),
    }  # fmt: skip


@torch.no_grad()
def output(denoiser: Any) -> torch.Tensor:
    """`cutting.output` for any of WIDE."""
    out: torch.Tensor = denoiser(**arguments(denoiser), return_dict=False)[0]
    return out
