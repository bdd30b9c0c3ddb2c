"""Builds a tiny pipeline of any class, and makes up the arguments of one call, from the names that its signatures hold."""

import inspect
import re
import typing
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from . import _families_parts as parts
from ._families_found import Found
from ._families_parts import WIDTH
from ._families_recipes import PICTURES, TEXTS, TOKENS, noise, picture, recipe_for

ABSENT = re.compile(r"safety_checker|feature_extractor|image_encoder|(text_encoder|tokenizer)(_\d)?|.*processor")
DENOISER = re.compile(r"unet|transformer|prior|decoder")


def build(found: Found) -> Any:
    """A tiny random pipeline of the class. Raises what diffusers raises, NotImplementedError for a component without recipe."""
    torch.manual_seed(0)
    recipe, made = recipe_for(found.name), {}
    if recipe.slow:
        raise NotImplementedError(recipe.slow)
    for name, parameter in found.components.items():
        if name in recipe.parts:
            made[name] = recipe.parts[name]()
            continue
        optional = parameter.default is not parameter.empty
        classes = list(_classes(parameter.annotation))
        if any(c.__name__.startswith("CLIPText") for c in classes) and not optional:
            made[name] = parts.clip(any("Projection" in c.__name__ for c in classes))
        elif any(c.__name__ == "CLIPTokenizer" for c in classes) and not optional:
            made[name] = parts.tokenizer()
        elif any(c.__name__ == "CLIPVisionModelWithProjection" for c in classes) and name.startswith("prior"):
            made[name] = parts.vision()
        elif any(c.__name__ == "CLIPImageProcessor" for c in classes) and name.startswith("prior"):
            made[name] = parts.image_processor()
        elif ABSENT.fullmatch(name):
            made[name] = None
        elif not optional or DENOISER.fullmatch(name):
            made[name] = _component(name, classes, recipe.config.get(name, {}))
    pipe = found.cls(**made)
    pipe.set_progress_bar_config(disable=True)
    if recipe.patch is not None:
        recipe.patch(pipe)
    return pipe


def complete(found: Found, pipe: Any) -> None:
    """Put some encoder in each empty place: diffusers opens no folder that lacks a part the pipeline insists on."""
    for name, parameter in found.components.items():
        if parameter.default is parameter.empty and getattr(pipe, name, pipe) is None:
            fill = parts.tokenizer if "tokenizer" in name else parts.image_processor if "process" in name else parts.clip
            pipe.register_modules(**{name: parts.vision() if "image_encoder" in name else fill()})


def arguments(found: Found, n: int) -> dict[str, Any]:
    """Of one call for n images, but for steps and generator."""
    recipe, given = recipe_for(found.name), {}
    for name in found.call:
        if name in recipe.call:
            given[name] = recipe.call[name](n)
        elif name not in recipe.leave and (value := _argument(name, n, recipe.size)) is not None:
            given[name] = value
    if "image" in given and "image_embeds" in found.call and found.call["image_embeds"].default is None:
        given.pop("image_embeds", None)  # one of them is enough
    if any("prompt_embeds" in name for name in given):
        given |= {"negative_prompt": None}
        if recipe.texts:
            given |= {"prompt": TEXTS[:n]}
    else:
        given = {"prompt": TEXTS[:n]} | given
    latent = '"latent"' in inspect.getsource(inspect.unwrap(found.cls.__call__))
    given["output_type"] = recipe.output or ("latent" if latent else "pt")
    return {k: v for k, v in given.items() if k in found.call}


def _argument(name: str, n: int, side: int) -> Any:
    """What any pipeline gets for an argument of this name; None: its default."""
    if "ip_adapter" in name or name.endswith("scale"):
        return None
    if "prompt_embeds" in name or "prompt_attention_mask" in name:
        if "mask" in name:
            return torch.ones(n, TOKENS, dtype=torch.bool)
        seed = 8 if "negative" in name else 7
        return noise(n, WIDTH, seed=seed) if "pooled" in name else noise(n, TOKENS, WIDTH, seed=seed)
    if name in ("image_embeds", "negative_image_embeds"):
        return noise(n, WIDTH, seed=9 + len(name))
    return {
        "height": side,
        "width": side,
        "image": picture(n, side),
        "control_image": picture(n, side),
        "mask_image": torch.ones(n, 1, side, side),
        "control_mask": torch.ones(n, 1, side, side),
        "hint": picture(n, side),
        "video": [PICTURES[0].resize((side, side))] * 5,
        "strength": 0.8,
        "batch_size": n,
        "class_labels": [1, 5, 7][:n],
        "use_resolution_binning": False,
        "clean_caption": False,
        "_auto_resize": False,
        "max_area": side * side,
    }.get(name)


def _classes(annotation: Any) -> typing.Iterator[Any]:
    if isinstance(annotation, str):  # not evaluated in that file
        annotation = getattr(diffusers, annotation, None)
    if isinstance(annotation, type) and annotation is not type(None):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _classes(inner)


def _component(name: str, classes: list[Any], changes: dict[str, Any]) -> Any:
    for cls in classes:
        if cls in (KarrasDiffusionSchedulers, SchedulerMixin):
            return parts.scheduler(diffusers.DDIMScheduler)
        if issubclass(cls, SchedulerMixin):
            return parts.scheduler(cls)
        if cls.__module__.startswith("diffusers.") and issubclass(cls, torch.nn.Module):
            return parts.model(cls, **changes)
    raise NotImplementedError(f"a tiny {' or '.join(c.__name__ for c in classes) or name}")
