"""Tiny random components, by class: what a pipeline's `__init__` asks for, in a fraction of a second.

A component is built from the settings of its class, made small by their names (SMALL), then by its class (PARTS),
    then by what
one family of pipelines needs (`_families_recipes`). Text is given as embeddings wherever a pipeline takes them, so that most
text encoders are never needed.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import nn

WIDTH = 32  # of text embeddings
CHANNELS = 4  # of latents
LIMIT = 5_000_000  # parameters of a tiny model
SIDE = 16  # of latents, and of images where the autoencoder does not downsample

# By the name of a setting, for every diffusers model that has it. Heads are of 16 numbers; rotary positions take 4 + 4 + 8.
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "caption_channels": WIDTH,
    "caption_projection_dim": 32,
    "cross_attention_dim": WIDTH,
    "text_embed_dim": WIDTH,
    "text_dim": WIDTH,
    "cap_feat_dim": WIDTH,
    "context_in_dim": WIDTH,
    "time_embed_dim": 32,
    "hidden_size": 32,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "sample_size": SIDE,
    "pos_embed_max_size": 32,
    "axes_dims_rope": (4, 4, 8),
    "axes_dims": (4, 4, 8),
    "axes_lens": (64, 64, 64),
    "norm_num_groups": 4,
    "guidance_embeds": False,
}
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}
SDXL_CONTROL = {k: v for k, v in SDXL.items() if k != "up_block_types"}
CONTROL = {k: v for k, v in UNET.items() if k not in ("sample_size", "up_block_types")} | {
    "num_attention_heads": None,
    "cross_attention_dim": WIDTH,
    "conditioning_embedding_out_channels": (4,),
}
WAN: dict[str, Any] = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
DC_BLOCKS = ("ResBlock", "EfficientViTBlock")
PACKED: dict[str, Any] = {"in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS}  # squares of 2 x 2 latents as one token

PARTS: dict[str, dict[str, Any]] = {
    # denoisers
    "UNet2DConditionModel": UNET | {"num_attention_heads": None, "cross_attention_dim": WIDTH},
    "UNet2DModel": UNET | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
    "BriaFiboTransformer2DModel": {"in_channels": 16, "text_encoder_dim": WIDTH // 2},
    "BriaTransformer2DModel": {"in_channels": 16},
    "ChromaTransformer2DModel": {
        "in_channels": 16, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1,
    },
    "CogView3PlusTransformer2DModel": {"in_channels": 4, "out_channels": 4, "condition_dim": 4},
    "CogView4Transformer2DModel": {"in_channels": 4, "out_channels": 4, "condition_dim": 4, "rope_axes_dim": (16, 16)},
    "CosmosTransformer3DModel": {
        "in_channels": 17, "out_channels": 16, "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
    },
    "DiTTransformer2DModel": {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000},
    "ErnieImageTransformer2DModel": PACKED | {"ffn_hidden_size": 32, "text_in_dim": WIDTH, "rope_axes_dim": (4, 4, 8)},
    "Flux2Transformer2DModel": {"in_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
    "FluxTransformer2DModel": {"in_channels": 16},
    "GlmImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 16,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_channels": (WIDTH, WIDTH), "text_emb_dim": 2 * WIDTH,
        "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 16),
            "llama_layers": (0, 1, 0, 1),
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4, "patch_size": 2, "hidden_size": 32, "cross_attention_dim_t5": WIDTH, "text_len": 5,
        "text_len_t5": 5, "pooled_projection_dim": 16,
    },
    "HunyuanDiT2DControlNetModel": {
        "in_channels": 4, "patch_size": 2, "hidden_size": 32, "cross_attention_dim_t5": WIDTH, "text_len": 5,
        "text_len_t5": 5, "pooled_projection_dim": 16,
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "num_layers": 1, "num_single_layers": 1,
        "mlp_ratio": 1.0, "text_embed_2_dim": WIDTH, "rope_axes_dim": (8, 8),
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3, "block_out_channels": (8, 16),
            "encoder_hid_dim": WIDTH,
    },
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1,
            "num_visual_blocks": 2,
        "axes_dims": (4, 4, 8), "in_visual_dim": 4, "out_visual_dim": 4,
    },
    "Krea2Transformer2DModel": {
        "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": WIDTH,
            "num_text_layers": 2,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    },
    "LongCatImageTransformer2DModel": {"in_channels": 16},
    "Lumina2Transformer2DModel": {
        "in_channels": 4, "num_refiner_layers": 1, "num_kv_heads": 2, "multiple_of": 4, "axes_dim_rope": (4, 4, 8),
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "multiple_of": 4},
    "NucleusMoEImageTransformer2DModel": {
        "out_channels": 16, "num_experts": 2, "moe_intermediate_dim": 16, "capacity_factors": 2.0,
    },
    "OvisImageTransformer2DModel": PACKED,
    "PRXTransformer2DModel": {"in_channels": 4, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": (8, 8)},
    "PixArtTransformer2DModel": {},
    "QwenImage21Transformer2DModel": {},
    "Ideogram4Transformer2DModel": {
        "in_channels": 16, "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": WIDTH, "mrope_section": (4, 2, 2),
    },
    "DreamLiteUNetModel": {
        "block_out_channels": (8, 16, 16), "layers_per_block": 1, "attention_head_dim": 8, "num_attention_heads": None,
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 32,
        "vocab_size": 32, "codebook_size": 32, "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1,
            "block_num_heads": 1,
        "num_hidden_layers": 1, "intermediate_size": 32,
    },
    "QwenImageTransformer2DModel": {"in_channels": 64, "out_channels": 16},
    "SD3Transformer2DModel": {"in_channels": 4, "out_channels": 4},
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
    },
    "ZImageTransformer2DModel": {"in_channels": 4, "axes_dims": (4, 4, 8)},
    "UNetFlatConditionModel": UNET | {
        "num_attention_heads": None, "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
        "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
    },
    "StableCascadeUNet": {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16, "patch_size": 2, "conditioning_dim": 32,
            "block_out_channels": (16, 32),
        "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": WIDTH,
        "effnet_in_channels": 16,
    },
    "WuerstchenDiffNeXt": {
        "c_cond": 32, "c_hidden": [8, 16], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"],
            "inject_effnet": [False, True],
        "clip_embd": WIDTH,
    },
    "WuerstchenPrior": {"c": 32, "c_cond": WIDTH, "depth": 2, "nhead": 2},
    "PriorTransformer": {"embedding_dim": WIDTH, "num_embeddings": 8},
    "UnCLIPTextProjModel": {"clip_embeddings_dim": WIDTH, "time_embed_dim": 32, "cross_attention_dim": WIDTH},
    "Transformer2DModel": {
        "sample_size": 8, "num_vector_embeds": 12, "num_embeds_ada_norm": 12, "norm_type": "ada_norm", "in_channels": None,
    },
    "ZImageControlNetModel": {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4},
    # of video
    "WanTransformer3DModel": {"freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32},
    "LTXVideoTransformer3DModel": {"in_channels": 8, "out_channels": 8, "attention_head_dim": 16},
    "CogVideoXTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "sample_width": 2, "sample_height": 2, "sample_frames": 9,
            "max_text_seq_length": 5,
    },
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
            "mlp_ratio": 1.0,
        "rope_axes_dim": (4, 4, 8), "guidance_embeds": True,
    },
    "MochiTransformer3DModel": {"max_sequence_length": 5, "attention_head_dim": 8, "num_attention_heads": 4},
    "UNet3DConditionModel": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4, "num_attention_heads": None,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": (2, 4), "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24, "num_frames": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    },
    "SanaVideoTransformer3DModel": {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "rope_max_seq_len": 32},
    "MotionAdapter": {
        "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 2,
    },
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32,), "latent_channels": 4},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "patch_size": 1, "patch_size_t": 1,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLHunyuanVideo": {
        "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5,
    },
    "T2IAdapter": {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 1},
    # controls
    "ControlNetModel": CONTROL,
    "ControlNetUnionModel": CONTROL,
    "FluxControlNetModel": {"in_channels": 16},
    "QwenImageControlNetModel": {"in_channels": 64},
    "SD3ControlNetModel": {"in_channels": 4, "out_channels": 4},
    "SanaControlNetModel": {
        "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "num_layers": 1,
    },
    # autoencoders
    "AutoencoderKL": {
        "block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": CHANNELS, "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
    "AutoencoderKLWan": WAN,
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLQwenImage21": WAN | {
        "decoder_base_dim": 4, "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
        "spatial_compression_ratio": 2, "scaling_factor": 0.5,
    },
    "PaellaVQModel": {"levels": 1, "bottleneck_blocks": 1, "embed_dim": 8, "num_vq_embeddings": 12},
    "StableUnCLIPImageNormalizer": {"embedding_dim": WIDTH},
    "VQModel": {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 12},
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": DC_BLOCKS, "decoder_block_types": DC_BLOCKS,
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
        "upsample_block_type": "interpolate", "downsample_block_type": "conv",
    },
    "AutoencoderKLFlux2": {
        "block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
        "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
}  # fmt: skip


def model(cls: Any, **changes: Any) -> Any:
    """A tiny random model of a diffusers class, in evaluation mode, whose zero-initialised weights are filled too."""
    config = settings(cls) | changes
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(**config).parameters())
    if size > LIMIT:
        raise NotImplementedError(f"a {cls.__name__} of {size / 1e6:.0f} M parameters at least")
    return filled(cls(**config))


def settings(cls: Any) -> dict[str, Any]:
    names = inspect.signature(cls.__init__).parameters
    return {k: v for k, v in (SMALL | PARTS.get(cls.__name__, {})).items() if k in names}


def filled(module: nn.Module) -> nn.Module:
    """Zero-initialised gates and outputs would hide every difference."""
    for p in module.parameters():
        if p.ndim == 1 or not p.any():
            nn.init.normal_(p, std=0.1)
    return module.eval()


def scheduler(cls: Any) -> Any:
    """With the betas of Stable Diffusion, where the class takes them."""
    if cls.__name__ == "AmusedScheduler":
        return cls(mask_token_id=31)
    if cls.__name__ == "VQDiffusionScheduler":
        return cls(num_vec_classes=12)
    if cls.__name__ == "UnCLIPScheduler":
        return cls()
    betas = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    names = inspect.signature(cls.__init__).parameters
    return cls(**{k: v for k, v in betas.items() if k in names})


def deep(blocks: int) -> dict[str, Any]:
    """Settings of an AutoencoderKL that makes pictures 2 ** (blocks - 1) times smaller."""
    down, up = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
    return {"block_out_channels": (8,) * blocks, "down_block_types": down, "up_block_types": up}


def clip(projection: bool = False, **changes: Any) -> Any:
    config = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = transformers.CLIPTextConfig(
        **config, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(made).eval()


def vision() -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    ).eval()


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def tokenizer() -> Any:
    """One token a letter, 8 tokens a prompt."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8)


def bert() -> Any:
    """The text encoder of LDM's text to image."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    sizes = {"d_model": WIDTH, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 8}
    return LDMBertModel(LDMBertConfig(vocab_size=64, max_position_embeddings=80, **sizes)).eval()


def learned() -> Any:
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

    return LearnedClassifierFreeSamplingEmbeddings(learnable=False)
