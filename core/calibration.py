"""Denoiser calls to measure losses on: taken from the model's own trajectories, or made from images.

Every call belongs to other images and to another noise level, so that few calls cover both: a call in the middle of each of
`times` equal parts of the schedule. Calls are kept as they were made, guidance's second half included.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import uncompiled
from .candidate import Seeds, image_seed
from .driving.run import Run
from .driving.steering import denoisers
from .errors import SamplingError, UserError
from .sampling import Sampler

SAMPLE = ("sample", "hidden_states")  # what diffusers' denoisers call their first argument


@dataclass(frozen=True)
class Inputs:
    """One recorded call of a denoiser."""

    name: str  # of the pipeline's component, e.g. unet
    kwargs: dict[str, Any]  # all arguments of its forward, by name
    rows: int  # of the batch; guidance doubles the images
    images: range  # indices within the calibration seeds
    timestep: float  # as the scheduler holds it

    def part(self, start: int, stop: int) -> "Inputs":
        """Some rows of the call, which are as good as a call of their own: nothing in a denoiser mixes images."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[start:stop] if value.ndim and len(value) == self.rows else value
            if isinstance(value, dict):
                return {k: cut(v) for k, v in value.items()}
            return [cut(v) for v in value] if isinstance(value, list) else value

        return replace(self, kwargs=cut(self.kwargs), rows=stop - start)

    @property
    def sample(self) -> str:
        """The name of the argument that holds the noised samples."""
        return _sample(self.kwargs)

    def __call__(self, denoiser: nn.Module) -> Tensor:
        """What the denoiser predicts, without gradients: the noise only, where it also predicts a variance. (rows, C, …)."""
        with torch.no_grad():
            out = denoiser(**{**self.kwargs, "return_dict": False})[0]
        channels = self.kwargs[self.sample].shape[1]
        if out.ndim == 4 and out.shape[1] == 2 * channels:  # DiT, PixArt: noise, then variance
            out = out[:, :channels]
        noise: Tensor = out
        return noise


class _Enough(Exception):
    """Ends a pipeline's loop once its call is recorded."""


def record(sampler: Sampler, count: int, times: int, seed: int) -> list[Inputs]:
    """The calls of `count` images, spread over `times` noise levels of the pipeline's own default schedule.

    Seeds are those of the role `calibrate`. A trajectory ends with the call that is wanted. Raises SamplingError when one
    cannot be made.
    """
    calls = []
    for part, block in _parts(count, times):
        for start in range(block.start, block.stop, sampler.chunk):
            calls += _record(sampler, range(start, min(start + sampler.chunk, block.stop)), part, seed)
    return calls


def first(sampler: Sampler, seed: int, count: int = 1) -> Inputs:
    """The first call of `count` images: the arguments that the pipeline gives its denoiser, before the denoiser ever ran."""
    return _record(sampler, range(count), 0.0, seed)[0]


def from_images(sampler: Sampler, pixels: Sequence[Tensor], count: int, times: int, seed: int) -> list[Inputs]:
    """The calls for noised images: x_t = noise of level t on the VAE's latents (on the image itself without a VAE).

    pixels: uint8 (H, W, 3) each; as many of them as `count`, begun anew where there are fewer. Image k goes with condition k,
    so that captions have to stand in the images' order. The noise of an image has its calibration seed. UserError for
    pipelines whose denoiser does not take latents as its VAE makes them.
    """
    made = []
    for call in record(sampler, count, times, seed):
        name = call.sample
        clean = encoded(sampler.pipe, [pixels[i % len(pixels)] for i in call.images], call.kwargs[name].shape[1:])
        noise = torch.stack([_noise(clean.shape[1:], seed, i) for i in call.images]).to(clean)
        noised = _noised(sampler.pipe.scheduler, clean, noise, call.timestep)
        repeated = noised.repeat(call.rows // len(call.images), *([1] * (noised.ndim - 1)))
        made.append(replace(call, kwargs={**call.kwargs, name: repeated.to(call.kwargs[name])}))
    return made


def _parts(count: int, times: int) -> Iterator[tuple[float, range]]:
    """(position in the schedule from 0 to 1, images) of every call; the images are split as evenly as can be."""
    calls = min(count, times)
    for k in range(calls):
        yield (k + 0.5) / calls, range(count * k // calls, count * (k + 1) // calls)


def _record(sampler: Sampler, block: range, part: float, seed: int) -> list[Inputs]:
    """The call of a block of images; two calls of half of them each where memory runs out, and so on."""
    chunk = sampler.chunk
    sampler.chunk = whole = max(chunk, block.stop)  # the block in one call of the pipeline
    try:
        with _recording(sampler.pipe, part) as found:
            seeds = Seeds(role="calibrate", base=seed, count=len(block), start=block.start)
            with suppress(_Enough):
                list(sampler.images(None, seeds, output="latents"))
        shrunk = sampler.chunk < whole
    finally:
        sampler.chunk = min(chunk, sampler.chunk)
    if not found:
        raise SamplingError(f"{type(sampler.pipe).__name__} ended before the call of its denoiser that was wanted.")
    if shrunk:
        middle = block.start + len(block) // 2
        halves = range(block.start, middle), range(middle, block.stop)
        return [call for half in halves for call in _record(sampler, half, part, seed)]
    name, kwargs, timestep = found[0]
    return [Inputs(name, kwargs, len(kwargs[_sample(kwargs)]), block, timestep)]


@contextmanager
def _recording(pipe: Any, part: float) -> Iterator[list[tuple[str, dict[str, Any], float]]]:
    """Inside, the first denoiser call of the step at `part` of the schedule is kept, and ends the pipeline's loop."""
    found: list[tuple[str, dict[str, Any], float]] = []

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run: Run = pipe.scheduler._lissom
        timesteps = pipe.scheduler.timesteps
        at = min(run.evals, len(timesteps) - 1)
        if at < int(part * len(timesteps)):
            return
        names = list(inspect.signature(type(uncompiled(module)).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found.append((name, {k: _copied(v) for k, v in given.items()}, float(timesteps[at])))
        raise _Enough

    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: keep(name, module, args, kwargs), with_kwargs=True
        )
        for name, module in denoisers(pipe).items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _sample(kwargs: Mapping[str, Any]) -> str:
    return next(name for name in (*SAMPLE, *kwargs) if isinstance(kwargs.get(name), Tensor) and kwargs[name].ndim >= 3)


def _copied(value: Any) -> Any:
    """Pipelines may go on writing into what they passed."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def encoded(pipe: Any, images: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Pixels (H, W, 3) uint8 as the denoiser sees clean data. (B, *shape) float32.

    shape: (C, h, w) of one sample. UserError for pipelines whose denoiser does not take latents as its VAE makes them.
    """
    vae = getattr(pipe, "vae", None)
    scale = 1
    if vae is not None:  # DiT's pipeline does not say it
        scale = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(vae.config.block_out_channels) - 1)
    if len(shape) != 3:
        raise UserError(
            f"data: {type(pipe).__name__} packs its latents, so that images cannot stand for them. Leave data out: the model's "
            "own trajectories serve as well."
        )
    height, width = scale * shape[1], scale * shape[2]
    batch = torch.stack([_sized(image, height, width) for image in images])
    with torch.no_grad():
        if vae is None:
            clean = batch.mean(1, keepdim=True) if shape[0] == 1 else batch
        else:
            grey = vae.config.in_channels == 1
            device = getattr(pipe, "_execution_device", next(vae.parameters()).device)
            given = vae.dtype
            if given == torch.float16 and getattr(vae.config, "force_upcast", False):  # SDXL's overflows, as in its pipelines
                vae.to(torch.float32)
            found = vae.encode((batch.mean(1, keepdim=True) if grey else batch).to(device, vae.dtype))
            if vae.dtype != given:
                vae.to(given)
            mean = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
            clean = (mean - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    if tuple(clean.shape[1:]) != tuple(shape):
        raise UserError(
            f"data: the images give latents of {tuple(clean.shape[1:])}, the denoiser of {type(pipe).__name__} takes "
            f"{tuple(shape)}. Leave data out: the model's own trajectories serve as well."
        )
    return clean.float()


def _sized(image: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, height, width) in -1..1: the middle of the image, resized."""
    x = image.movedim(-1, 0).float() / 127.5 - 1
    ratio = min(x.shape[1] / height, x.shape[2] / width)
    rows, columns = round(height * ratio), round(width * ratio)
    top, left = (x.shape[1] - rows) // 2, (x.shape[2] - columns) // 2
    middle = x[None, :, top : top + rows, left : left + columns]
    resized: Tensor = nn.functional.interpolate(middle, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp(-1, 1)


def _noise(shape: Sequence[int], seed: int, index: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(image_seed("calibrate", seed, index)))


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """x_t as the denoiser is shown it, with the scheduler's own formulas."""
    for counted in ("_step_index", "_begin_index"):  # by the pipeline's loop, which was ended in the middle
        if hasattr(scheduler, counted):
            setattr(scheduler, counted, None)
    t = torch.tensor([timestep] * len(clean), device=clean.device, dtype=scheduler.timesteps.dtype)
    if not hasattr(scheduler, "add_noise"):  # flow matching
        noised: Tensor = scheduler.scale_noise(clean, t, noise)
        return noised
    shown: Tensor = scheduler.scale_model_input(scheduler.add_noise(clean, noise, t), t[0])
    return shown
