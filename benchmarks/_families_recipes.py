"""What families of pipelines need beside what the names of their arguments say: settings, parts, arguments."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from . import _families_parts as parts
from ._families_parts import SIDE, WIDTH

TOKENS = 5  # of a prompt
TEXTS = ["a shoe", "a bag"]


@dataclass(frozen=True)
class Recipe:
    """What a family of pipelines needs beside what the names say."""

    config: dict[str, dict[str, Any]] = field(default_factory=dict)  # component -> changes of its settings
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)  # component -> builds it
    call: dict[str, Callable[[int], Any]] = field(default_factory=dict)  # argument -> its value for a batch of n
    leave: tuple[str, ...] = ()  # arguments of the call that are not given
    patch: Callable[[Any], None] | None = None  # changes the pipeline that was built
    size: int = SIDE  # pixels of a side
    texts: bool = False  # texts are given beside their embeddings
    slow: str = ""  # why it is not tried
    output: str = ""  # output_type, where the pipeline offers "latent" and cannot do it

    def __or__(self, other: "Recipe") -> "Recipe":
        return Recipe(
            {k: self.config.get(k, {}) | other.config.get(k, {}) for k in {**self.config, **other.config}},
            self.parts | other.parts,
            self.call | other.call,
            self.leave + other.leave,
            other.patch or self.patch,
            other.size if other.size != SIDE else self.size,
            self.texts or other.texts,
            other.slow or self.slow,
            other.output or self.output,
        )


def recipe_for(name: str) -> Recipe:
    whole = Recipe()
    for pattern, recipe in RECIPES:
        if re.fullmatch(pattern, name.removesuffix("Pipeline")):
            whole = whole | recipe
    return whole


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(n: int, side: int, channels: int = 3) -> Tensor:
    """In 0..1."""
    return torch.rand((n, channels, side, side), generator=torch.Generator().manual_seed(3))


def embeds(*shape: int, seed: int = 7) -> Callable[[int], Tensor]:
    return lambda n: noise(n, *shape, seed=seed)


class _Template:
    """Qwen's processor is asked for the length of its template while the pipeline is built."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [1]


class _Harmless:
    """Cosmos insists on a checker, whose package is not installed: this one lets everything pass."""

    def to(self, *args: Any) -> "_Harmless":
        return self

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _longcat(pipe: Any) -> None:
    """It takes embeddings only beside the texts that they stand for, and refuses both."""
    pipe._encode_prompt = lambda texts: noise(len(texts), TOKENS, WIDTH)


def _bria_fibo(pipe: Any) -> None:
    half = WIDTH // 2

    def embeddings(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        n = len([prompt] if isinstance(prompt, str) else prompt)
        return noise(n, TOKENS, WIDTH), [noise(n, TOKENS, half, seed=i) for i in range(4)], torch.ones(n, TOKENS)

    pipe.get_prompt_embeds = embeddings


def _ideogram(pipe: Any) -> None:
    def embeddings(prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        n, pixels = len(prompt), torch.zeros(len(prompt), grid_h * grid_w, WIDTH)
        ids = pipe._prepare_ids([TOKENS] * n, grid_h, grid_w, TOKENS, device)
        return torch.cat([noise(n, TOKENS, WIDTH), pixels], dim=1), *ids

    pipe.encode_prompt = embeddings


def _hidream(pipe: Any) -> None:
    pipe.default_sample_size = SIDE  # it scales every size to that


def _kandinsky(pipe: Any) -> None:
    def embeddings(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        n = 2 * len(prompt)
        return noise(n, WIDTH), noise(n, TOKENS, WIDTH, seed=8), torch.ones(n, TOKENS)

    pipe._encode_prompt = embeddings


def _xs(changes: dict[str, Any]) -> Any:
    unet = parts.model(diffusers.UNet2DConditionModel, **changes, **XS)
    sizes = {"block_out_channels": [4, 8], "num_attention_heads": [2, 2], "conditioning_embedding_out_channels": [4]}
    return parts.filled(diffusers.ControlNetXSAdapter.from_unet(unet, **sizes))


PICTURES = [Image.fromarray((x.movedim(0, -1).numpy() * 255).astype("uint8")) for x in picture(2, 2 * SIDE)]
XS = {"layers_per_block": 2}  # ControlNet-XS knows no other
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
EULER = Recipe(parts={"scheduler": lambda: parts.scheduler(diffusers.EulerDiscreteScheduler)})
K22 = {
    "out_channels": 8,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "cross_attention_dim": WIDTH,
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
K21 = K22 | {
    "encoder_hid_dim_type": "text_image_proj",
    "addition_embed_type": "text_image",
    "resnet_time_scale_shift": "scale_shift",
}

# Pattern of the name without "Pipeline" -> recipe; all that match apply, later ones over earlier ones.
RECIPES: list[tuple[str, Recipe]] = [
    (r"(?!I2VGen).*XL.*", Recipe(config={"unet": parts.SDXL, "controlnet": parts.SDXL_CONTROL}) | EULER),
    (r"LatentConsistency.*", Recipe(config={"unet": {"time_cond_proj_dim": 8}})),
    (r"KandinskyV22.*", Recipe(config={"unet": K22})),
    (r"QwenImage.*|Cosmos2Text.*|Sana.*", Recipe(size=32)),
    (r"Flux2(Klein(KV)?)?|GlmImage|QwenImage21", Recipe(leave=("image",))),
    (r"QwenImageEdit.*|JoyImageEdit", Recipe(slow="minutes: it enlarges every picture to a million pixels")),
    (r"QwenImageLayered|BriaFibo(2|Edit)|LongCatImageEdit", Recipe(call={"image": lambda n: PICTURES[:n]})),
    (r"Kandinsky(Img2Img|Inpaint)", Recipe(config={"unet": K21}, patch=_kandinsky)),
    (r"Kandinsky.*Inpaint(Combined)?", Recipe(config={"unet": {"in_channels": 9}})),
    (r"Kandinsky5I2I", Recipe(config={"transformer": {"in_visual_dim": 4, "visual_cond": True}})),
    (r"StableDiffusion(XL)?Adapter", Recipe(config={"adapter": {"channels": [8, 16]}})),
    (r"StableDiffusionDepth2Img", Recipe(parts={"depth_estimator": lambda: None})),
    (r"StableDiffusionImageVariation|UnCLIPImageVariation", Recipe(parts={"image_encoder": parts.vision})),
    (r"Marigold.*", Recipe(config={"unet": {"in_channels": 8}}, call={"processing_resolution": lambda n: 0})),
    (
        r"StableDiffusion3Inpaint",
        Recipe(config={"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}}),
    ),
    (r"LDMSuperResolution", Recipe(config={"unet": {"in_channels": 6}, "vqvae": {"latent_channels": 3}})),
    (
        r"StableUnCLIPImg2Img",
        Recipe(
            config={"unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}},
            parts={"image_encoder": parts.vision},
            leave=("image",),
        ),
    ),
    (r"PaintByExample", Recipe(call={"example_image": lambda n: picture(n, SIDE)})),
    (
        r"LTX.*|Cog.*|Hunyuan.*Video.*|Mochi.*|Wan.*|SkyReels.*|Sana.*Video",
        Recipe(size=32, call={"num_frames": lambda n: 5}),
    ),
    (r"Mochi", Recipe(call={"num_frames": lambda n: 7})),
    (r"AnimateDiff.*|TextToVideoSD|VideoToVideoSD|StableVideo.*", Recipe(call={"num_frames": lambda n: 2})),
    (r"Wan|SkyReelsV2", Recipe(leave=("transformer_2",))),
    (
        r"StableVideoDiffusion",
        Recipe(
            parts={
                "image_encoder": parts.vision,
                "feature_extractor": parts.image_processor,
                "scheduler": lambda: diffusers.EulerDiscreteScheduler(
                    timestep_type="continuous",
                    prediction_type="v_prediction",
                    use_karras_sigmas=True,
                    sigma_min=0.002,
                    sigma_max=700.0,
                ),
            }
        ),
    ),
    (r"SanaVideo", Recipe(parts={"vae": lambda: parts.model(diffusers.AutoencoderKLWan)})),
    (r"FluxFill", Recipe(config={"transformer": {"in_channels": 36, "out_channels": 16}})),
    (r"IF.*", Recipe(call={"original_image": lambda n: picture(n, SIDE)})),
    (r"Cycle.*", Recipe(leave=EMBEDS, call={"source_prompt": lambda n: TEXTS[:n]})),
    (r"DreamLite.*", Recipe(call={"prompt": lambda n: TEXTS[0]})),
    (r"StableDiffusionInstructPix2Pix|StableDiffusionXLInstructPix2Pix", Recipe(config={"unet": {"in_channels": 8}})),
    (
        r"StableDiffusionDepth2Img",
        Recipe(config={"unet": {"in_channels": 5}}, call={"depth_map": lambda n: picture(n, SIDE, 1)[:, 0]}),
    ),
    (r"StableDiffusionUpscale", Recipe(config={"unet": {"in_channels": 7, "num_class_embeds": 1000}})),
    (r"FluxControl(Img2Img|Inpaint)?", Recipe(config={"transformer": {"in_channels": 32, "out_channels": 16}})),
    (r"CogView4Control", Recipe(config={"transformer": {"in_channels": 8, "out_channels": 4}})),
    (r"Cosmos2Text.*", Recipe(config={"transformer": {"in_channels": 16}}, parts={"safety_checker": _Harmless})),
    (
        r"HiDreamImage",
        Recipe(
            patch=_hidream,
            call={
                "prompt_embeds_llama3": lambda n: noise(2, n, TOKENS, WIDTH),
                "negative_prompt_embeds_llama3": lambda n: noise(2, n, TOKENS, WIDTH, seed=8),
                "pooled_prompt_embeds": embeds(2 * WIDTH),
                "negative_pooled_prompt_embeds": embeds(2 * WIDTH, seed=8),
            },
        ),
    ),
    (r"IF.*", Recipe(config={"unet": {"in_channels": 3, "out_channels": 6}})),
    (r"IF.*SuperResolution", Recipe(config={"unet": {"in_channels": 6, "num_class_embeds": 1000}})),
    (
        r"Ideogram4",
        Recipe(
            patch=_ideogram,
            call={
                "max_sequence_length": lambda n: TOKENS,
                "guidance_scale": lambda n: 3.0,
                "guidance_schedule": lambda n: None,
            },
        ),
    ),
    (r"Kandinsky3.*", Recipe(call={k: lambda n: torch.ones(n, TOKENS) for k in ("attention_mask", "negative_attention_mask")})),
    (
        r"Kandinsky5(T2I|I2I)",
        Recipe(
            config={"vae": parts.deep(6)},
            call={
                "prompt_embeds_clip": embeds(WIDTH),
                "negative_prompt_embeds_clip": embeds(WIDTH, seed=8),
                **{
                    k: lambda n: torch.arange(0, (n + 1) * TOKENS, TOKENS, dtype=torch.int32)
                    for k in ("prompt_cu_seqlens", "negative_prompt_cu_seqlens")
                },
            },
        ),
    ),
    (
        r"Krea2",
        Recipe(call={"prompt_embeds": embeds(TOKENS, 2, WIDTH), "negative_prompt_embeds": embeds(TOKENS, 2, WIDTH, seed=8)}),
    ),
    (r"LDM", Recipe(config={"unet": {"in_channels": 4, "out_channels": 4}})),
    (r"Amused.*", Recipe(leave=EMBEDS)),
    (
        r"LongCat.*",
        Recipe(
            config={"transformer": {"in_channels": 64}},
            patch=_longcat,
            call={"enable_prompt_rewrite": lambda n: False},
            leave=EMBEDS,
        ),
    ),
    (r"BriaFibo", Recipe(parts={"text_encoder": parts.clip}, patch=_bria_fibo)),
    (r"Kandinsky", Recipe(config={"unet": K21}, patch=_kandinsky)),
    (
        r"GlmImage",
        Recipe(
            config={"vae": {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}},
            parts={"vision_language_encoder": lambda: None},
            call={"prior_token_ids": lambda n: torch.zeros(n, 64, dtype=torch.long)},
        ),
    ),
    (r"QwenImage21", Recipe(parts={"processor": _Template}, config={"transformer": {"in_channels": 4, "out_channels": 4}})),
    (r"QwenImageControlNetInpaint", Recipe(config={"controlnet": {"extra_condition_channels": 4}})),
    (r"StableDiffusion3ControlNetInpainting", Recipe(config={"controlnet": {"extra_conditioning_channels": 1}})),
    (
        r"SanaSprint.*",
        Recipe(
            parts={"scheduler": diffusers.SCMScheduler},
            config={"transformer": {"guidance_embeds": True}},
            call={"intermediate_timesteps": lambda n: None},
        ),
    ),
    (r"StableDiffusionControlNetXS", Recipe(config={"unet": XS}, parts={"controlnet": lambda: _xs({})})),
    (r"StableDiffusionXLControlNetXS", Recipe(config={"unet": XS}, parts={"controlnet": lambda: _xs(parts.SDXL)})),
    (
        r"StableDiffusionPix2PixZero",
        Recipe(
            parts={k: lambda: None for k in ("caption_generator", "caption_processor", "inverse_scheduler")},
            call={"source_embeds": embeds(TOKENS, WIDTH), "target_embeds": embeds(TOKENS, WIDTH, seed=8)},
        ),
    ),
    (
        r"StableDiffusionXLControlNetUnion.*",
        Recipe(
            config={"controlnet": {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}},
            call={"control_mode": lambda n: [1]},
        ),
    ),
    (
        r"ZImage.*",
        Recipe(
            call={
                "prompt_embeds": lambda n: list(noise(n, TOKENS, WIDTH)),
                "negative_prompt_embeds": lambda n: list(noise(n, TOKENS, WIDTH, seed=8)),
            }
        ),
    ),
    (
        r"ZImageOmni",
        Recipe(
            call={
                "prompt_embeds": lambda n: [[x] for x in noise(n, TOKENS, WIDTH)],
                "negative_prompt_embeds": lambda n: [[x] for x in noise(n, TOKENS, WIDTH, seed=8)],
            },
            config={"transformer": {"siglip_feat_dim": WIDTH}},
            parts={"siglip": lambda: None},
            leave=("image",),
        ),
    ),
    (
        r"LDMTextToImage",
        Recipe(
            parts={
                "bert": parts.bert,
                "tokenizer": parts.tokenizer,
                "unet": lambda: parts.model(diffusers.UNet2DConditionModel),
            }
        ),
    ),
    (r"StableCascadeCombined", Recipe(config={"prior_prior": {"in_channels": 4, "out_channels": 4}})),
    (r"VQDiffusion", Recipe(parts={"learned_classifier_free_sampling_embeddings": parts.learned})),
    (
        r"StableUnCLIP",
        Recipe(
            leave=EMBEDS,
            config={"unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}},
        ),
    ),
    (
        r"StableCascadeDecoder",
        Recipe(
            call={
                "image_embeddings": embeds(16, 4, 4),
                "prompt_embeds_pooled": embeds(1, WIDTH),
                "negative_prompt_embeds_pooled": embeds(1, WIDTH),
            }
        ),
    ),
    (r"WuerstchenDecoder", Recipe(call={"image_embeddings": embeds(16, 3, 3)})),
    (r"UnCLIP", Recipe(config={"super_res_first": {"in_channels": 6}, "super_res_last": {"in_channels": 6}})),
    (r"PRX.*", Recipe(leave=("prompt_attention_mask", "negative_prompt_attention_mask"))),
    (r"ZImageControlNetInpaint", Recipe(config={"controlnet": {"control_in_dim": 9}})),
    (r"HunyuanDiTControlNet", Recipe(config={"controlnet": {"transformer_num_layers": 2}})),
    (r"StableDiffusionLDM3D", Recipe(output="np")),
    (r"StableDiffusionParadigms", Recipe(parts={"scheduler": lambda: diffusers.DDIMParallelScheduler(clip_sample=False)})),
    (
        r"StableDiffusionAttendAndExcite",
        Recipe(call={"token_indices": lambda n: [[2]] * n}, leave=("prompt_embeds", "negative_prompt_embeds")),
    ),
    (
        r"StableDiffusionGLIGEN",
        Recipe(
            config={"unet": {"attention_type": "gated"}},
            call={"gligen_phrases": lambda n: ["a"], "gligen_boxes": lambda n: [[0.1, 0.1, 0.5, 0.5]]},
        ),
    ),
]
