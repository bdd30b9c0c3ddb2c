"""Structures without weights: `config:sd15` is the denoiser of Stable Diffusion 1.5, built from its configuration alone.

On torch's meta device a tensor has a shape and no numbers, so that the layers of a model of any size can be listed, weighed and
counted in a second, offline. What a structure's forward takes is written here once per class of denoiser, for real models too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .anatomy import uncompiled
from .errors import UserError
from .methods import suggest
from .models import ZOO

FOLDER = ZOO / "configs"
TRAIN_STEPS = 1000  # timesteps are drawn below this number, as in the training of all these models

Latent = tuple[int, int, int]  # channels, height, width of what the VAE made; of the image itself for a pixel model


@dataclass(frozen=True)
class Blueprint:
    """A well-known model without weights."""

    name: str  # as in config:NAME
    source: str  # where the structure is from
    pipeline: str  # diffusers class of the whole, e.g. StableDiffusionPipeline
    component: str  # of that pipeline: unet or transformer
    denoiser: nn.Module  # on the meta device, in evaluation mode
    latent: Latent  # at the resolution the model was trained for
    text_tokens: int  # that the pipeline feeds by default; 0 for a model without text

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of one forward of the denoiser at its own resolution, on the meta device.

        >>> shapes = {k: tuple(v.shape) for k, v in load("sd15").example(batch=2).items()}
        >>> shapes["sample"], shapes["encoder_hidden_states"]
        ((2, 4, 64, 64), (2, 77, 768))
        """
        return example_inputs(
            self.denoiser,
            batch=batch,
            latent=self.latent,
            text_tokens=self.text_tokens,
            device="meta",
            dtype=next(self.denoiser.parameters()).dtype,
        )


def names() -> list[str]:
    """The structures that there are, for config:NAME."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def load(name: str) -> Blueprint:
    """The structure of a well-known model, a fresh one at every call. UserError if there is none of that name."""
    if name not in names():
        raise UserError(f"config:{name}: no such structure; there are {', '.join(names())}.{suggest(name, names())}")
    entry = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        denoiser = getattr(diffusers, entry["denoiser"]).from_config(entry["config"])
    channels, height, width = entry["latent"]
    return Blueprint(
        name=name,
        source=entry["source"],
        pipeline=entry["pipeline"],
        component=entry["component"],
        denoiser=denoiser.eval(),
        latent=(channels, height, width),
        text_tokens=entry["text_tokens"],
    )


def example_inputs(
    denoiser: nn.Module, *, batch: int, latent: Latent, text_tokens: int, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of one forward of a denoiser, made up: noise, a random text and random timesteps.

    batch: images, guidance's second half not included. latent: (C, H, W). text_tokens: tokens of the prompt, T.
    Image k has the same numbers whatever the batch, device and dtype (but for its rounding), so that two models can be compared
    on them; on the meta device there are none. UserError for a class without a recipe.
    """
    denoiser = uncompiled(denoiser)
    lineage = [cls.__name__ for cls in type(denoiser).__mro__]  # a steered denoiser is a subclass of its own class
    recipe = next((RECIPES[name] for name in lineage if name in RECIPES), None)
    if recipe is None:
        raise UserError(
            f"{lineage[0]}: what its forward takes is not known, so that no input for it can be made up; "
            f"it is for {', '.join(RECIPES)}."
        )
    return recipe(denoiser, _Numbers(batch, device, dtype), latent, text_tokens)


class _Numbers:
    """Draws tensors for a batch, one after the other."""

    def __init__(self, batch: int, device: str | torch.device, dtype: torch.dtype) -> None:
        self.batch, self.device, self.dtype = batch, torch.device(device), dtype
        # On the CPU and one per image: other devices and other batches would draw other numbers.
        self.generators = [torch.Generator().manual_seed(k) for k in range(batch)]

    def noise(self, *shape: int) -> Tensor:
        """Normal numbers. (B, *shape)."""
        return self._stack(lambda generator: torch.randn(shape, generator=generator), shape).to(self.dtype)

    def whole(self, below: int) -> Tensor:
        """Whole numbers from 0. int64 (B,)."""
        return self._stack(lambda generator: torch.randint(below, (), generator=generator), ()).long()

    def same(self, *numbers: float) -> Tensor:
        """These numbers for every image. (B, len(numbers))."""
        return torch.tensor([numbers] * self.batch, dtype=self.dtype, device=self.device)

    def _stack(self, draw: Callable[[torch.Generator], Tensor], shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "meta":
            return torch.empty((self.batch, *shape), device=self.device)
        return torch.stack([draw(generator) for generator in self.generators]).to(self.device)


def _conditional_unet(unet: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    config = unet.config
    odd = {
        "addition_embed_type": config.addition_embed_type if config.addition_embed_type != "text_time" else None,
        "class_embed_type": config.class_embed_type,
        "encoder_hid_dim_type": config.encoder_hid_dim_type if config.encoder_hid_dim_type != "text_proj" else None,
    }
    if unknown := {key: value for key, value in odd.items() if value is not None}:
        said = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise UserError(f"{type(unet).__name__}: no input can be made up for {said}.")
    width = config.encoder_hid_dim or config.cross_attention_dim
    made: dict[str, Any] = {
        "sample": numbers.noise(*latent),
        "timestep": numbers.whole(TRAIN_STEPS),
        "encoder_hidden_states": numbers.noise(text_tokens, width if isinstance(width, int) else width[0]),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text, and original size, crop, target size in pixels
        height, width = 8 * latent[1], 8 * latent[2]
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = numbers.same(height, width, 0, 0, height, width)
        made["added_cond_kwargs"] = {"text_embeds": numbers.noise(pooled), "time_ids": sizes}
    if config.num_class_embeds is not None:
        made["class_labels"] = numbers.whole(config.num_class_embeds)
    return made


def _pixel_unet(unet: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    made = {"sample": numbers.noise(*latent), "timestep": numbers.whole(TRAIN_STEPS)}
    if unet.config.class_embed_type is not None:
        raise UserError(
            f"{type(unet).__name__}: no input can be made up for class_embed_type={unet.config.class_embed_type!r}."
        )
    if unet.config.num_class_embeds is not None:
        made["class_labels"] = numbers.whole(unet.config.num_class_embeds)
    return made


def _sd3(transformer: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": numbers.noise(*latent),
        "encoder_hidden_states": numbers.noise(text_tokens, transformer.config.joint_attention_dim),
        "pooled_projections": numbers.noise(transformer.config.pooled_projection_dim),
        "timestep": numbers.whole(TRAIN_STEPS),
    }


def _flux(transformer: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    # (B, C, H, W) -> (B, H/2 * W/2, 4C): the pipeline packs squares of 2 x 2 into one token
    _, height, width = latent
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)  # (H/2 * W/2, 3)
    made = {
        "hidden_states": numbers.noise(len(places), 4 * latent[0]),
        "encoder_hidden_states": numbers.noise(text_tokens, transformer.config.joint_attention_dim),
        "pooled_projections": numbers.noise(transformer.config.pooled_projection_dim),
        "timestep": (numbers.whole(TRAIN_STEPS) / TRAIN_STEPS).to(numbers.dtype),  # the model multiplies by 1000 itself
        "img_ids": places.to(numbers.device, numbers.dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=numbers.device, dtype=numbers.dtype),
    }
    if transformer.config.guidance_embeds:
        made["guidance"] = torch.full((numbers.batch,), 3.5, device=numbers.device)  # the pipeline's default
    return made


def _pixart(transformer: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    config, height, width = transformer.config, 8 * latent[1], 8 * latent[2]
    sized = transformer.use_additional_conditions  # resolution in pixels, height / width
    return {
        "hidden_states": numbers.noise(*latent),
        "encoder_hidden_states": numbers.noise(text_tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": numbers.whole(TRAIN_STEPS),
        "added_cond_kwargs": {
            "resolution": numbers.same(height, width) if sized else None,
            "aspect_ratio": numbers.same(height / width) if sized else None,
        },
    }


def _dit(transformer: Any, numbers: _Numbers, latent: Latent, text_tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": numbers.noise(*latent),
        "timestep": numbers.whole(TRAIN_STEPS),
        "class_labels": numbers.whole(transformer.config.num_embeds_ada_norm),
    }


# class of the denoiser -> what one forward of it takes; T text tokens are ignored by models without text
RECIPES: dict[str, Callable[[Any, _Numbers, Latent, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _pixel_unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
}
