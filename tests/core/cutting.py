"""Denoisers deep enough to be cut, and ways to look at what a cut one computes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from lissom.core import surgery
from lissom.core.blueprints import example_inputs
from lissom.core.candidate import Cut
from lissom.core.stock import Stock
from lissom.tests.core import tiny
from torch import Tensor

LATENT = (4, tiny.SIDE, tiny.SIDE)


def sd(**changes: Any) -> Any:
    """Stable Diffusion's shape: two pairs a stage, the innermost without attention."""
    torch.manual_seed(0)
    return tiny.unet(**(SD | changes))


def sdxl(**changes: Any) -> Any:
    """SDXL's shape: the outermost stage without attention, and several transformer blocks in each of the others."""
    torch.manual_seed(0)
    return tiny.unet(**(SDXL | changes))


SD: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": tiny.WIDTH + 6 * 8,
}
PIXELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESAMPLING: dict[str, Any] = {  # samplers that are ResNet blocks, attention without a transformer around it
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (8, 16),
}


def pixels(**changes: Any) -> Any:
    """A U-Net of images: attention without text, the same number of pairs in all stages."""
    small = tiny.pixel_unet(4)
    torch.manual_seed(0)
    return tiny._trained(type(small).from_config(small.config, **(PIXELS | changes)))


def deeper(family: str, **changes: Any) -> Any:
    """A transformer of a tiny family with other settings."""
    small = tiny.denoiser(tiny.shared(family))
    torch.manual_seed(0)
    return tiny._trained(type(small)(**({k: v for k, v in small.config.items() if not k.startswith("_")} | changes)))


def pixart() -> Any:
    torch.manual_seed(0)
    settings = {
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
        "out_channels": 8,
    }
    return tiny._trained(diffusers.PixArtTransformer2DModel(sample_size=8, caption_channels=tiny.WIDTH, **settings))


def sana() -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    settings = {"num_layers": 3, "cross_attention_dim": 16, "in_channels": 4, "out_channels": 4, "sample_size": 8}
    return tiny._trained(diffusers.SanaTransformer2DModel(caption_channels=tiny.WIDTH, patch_size=1, **heads, **settings))


def wan() -> Any:
    torch.manual_seed(0)
    settings = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    widths = {"text_dim": tiny.WIDTH, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    return tiny._trained(diffusers.WanTransformer3DModel(**settings, **widths))


def same_embedders(dit: Any) -> Any:
    """As in DiTs that were converted from the original, which holds one embedder for all blocks."""
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    return dit


KINDS: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "resampling": lambda: sd(**RESAMPLING),
    "pixels": pixels,
    "sd3": lambda: deeper("sd3", num_layers=3),
    "sd3.5": lambda: deeper("sd3", num_layers=4, dual_attention_layers=(0, 2), qk_norm="rms_norm"),
    "flux": lambda: deeper("flux", num_layers=3),
    "dit": lambda: deeper("dit", num_layers=3),
    "pixart": pixart,
    "sana": sana,
    "wan": wan,
}


@functools.cache
def shared(kind: str) -> Any:
    """One of KINDS, built once: for tests that leave it as it was."""
    return KINDS[kind]()


def family(name: str) -> Any:
    """The denoiser of a tiny pipeline that all tests share."""
    return tiny.denoiser(tiny.shared(name))


def inputs(denoiser: Any) -> dict[str, Any]:
    """Arguments of one forward of two images."""
    name = type(denoiser).__name__.removeprefix("Pruned")
    if name in ("SanaTransformer2DModel", "WanTransformer3DModel"):
        generator = torch.Generator().manual_seed(0)
        shape = LATENT if name.startswith("Sana") else (4, 1, *LATENT[1:])
        return {
            "hidden_states": torch.randn(2, *shape, generator=generator),
            "encoder_hidden_states": torch.randn(2, 5, tiny.WIDTH, generator=generator),
            "timestep": torch.tensor([7, 700]),
        }
    latent = (1 if name.startswith("Flux") else denoiser.config.in_channels, *LATENT[1:])
    return example_inputs(denoiser, batch=2, latent=latent, text_tokens=5, device="cpu", dtype=torch.float32)


@torch.no_grad()
def output(denoiser: Any) -> Tensor:
    out: Tensor = denoiser(**inputs(denoiser), return_dict=False)[0]
    return out


def cut_output(denoiser: Any, cuts: Sequence[Cut]) -> Tensor:
    with surgery.applied(denoiser, cuts):
        return output(denoiser)


def remove(*addresses: str) -> list[Cut]:
    return [Cut(address=a, what="remove") for a in addresses]


def keep(address: str, *stay: int) -> Cut:
    return Cut(address=address, what="keep_layers", value=stay)


def stock_model(denoiser: Any, stock: Stock) -> Any:
    """The model of a stock config with the weights that `parts` names, taken from a denoiser that holds the cuts."""
    model: Any = stock.cls
    model = model.from_config(stock.config).eval()
    held, wanted = denoiser.state_dict(), model.state_dict()
    filled = {}
    for key, part in stock.parts.items():
        whole = torch.zeros_like(wanted[key]) if part.key is None else held[part.key]
        filled[key] = torch.cat([whole[a:b] for a, b in part.rows]) if part.rows else whole
    model.load_state_dict(filled, strict=True)
    return model
