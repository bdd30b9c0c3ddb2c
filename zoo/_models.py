"""The architectures of the embedded models: real diffusers, transformers and open_clip classes, small enough for a laptop."""

import json
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ._data import CLASSES, TEMPLATES, caption

CONTEXT = 16  # tokens: the longest caption has 9; SD's 77 would spend the cross-attention on padding
TEXT_WIDTH = 64  # width of the text encoder, hence cross_attention_dim

# Stable Diffusion's noise schedule and DDIM settings, so that plans and baselines mean what they mean there.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}

# The judge: open_clip's ModifiedResNet on 32x32 pixels. The attention pool sees 1x1, as in CLIP's RN50 at 32 px.
JUDGE: dict[str, Any] = {
    "embed_dim": 64,  # features for the Frechet distance: 64 numbers an image, so 1,024 images give a full-rank covariance
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 20, "head_width": 32, "patch_size": None},
    "text_cfg": {"context_length": CONTEXT, "width": 64, "heads": 4, "layers": 2, "hf_tokenizer_name": "local"},
}
PREPROCESS = {
    "size": 32, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
}  # fmt: skip


def vae() -> AutoencoderKL:
    """32x32x3 pixels <-> 8x8x4 latents; its decoder costs about half a denoiser forward."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 32),  # narrow at 32x32, where the time goes
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    )


def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's block map in small: the same four levels, block types and two layers per block."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48, 64, 64),  # at 8x8, 4x4, 2x2 and 1x1; SD has 320, 640, 1280, 1280
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers' old name for the NUMBER of heads, kept for SD's configs
        norm_num_groups=8,
    )


def dit() -> DiTTransformer2DModel:
    """DiT's 12 blocks over 16 tokens. Every block has its own label table (1,001 x 96), as DiT-XL/2 in diffusers."""
    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        num_attention_heads=4,
        attention_head_dim=24,
        num_embeds_ada_norm=1000,  # DiTPipeline writes its null class as 1000, so the table must reach it
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER)


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned on our captions: every text has tokens, ours have whole words."""
    corpus = [caption(label, t) for label in range(len(CLASSES)) for t in range(len(TEMPLATES))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]  # end-of-text last: CLIP pools at the largest id
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=CONTEXT)


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def judge(vocabulary: int) -> Any:
    """An untrained judge; open_clip's CLIP class with a ResNet image tower and a two-layer text tower."""
    from open_clip.model import CLIP

    return CLIP(JUDGE["embed_dim"], JUDGE["vision_cfg"], {**JUDGE["text_cfg"], "vocab_size": vocabulary})
