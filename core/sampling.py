"""Images or latents from a pipeline, a plan, conditions and seeds: one seed per image, whatever the batch size."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from . import memory
from .candidate import SamplingPlan, Seeds, canonical, image_seed
from .conditions import IMAGES, Conditions, digest
from .driving import Memo, Run, check, follow, watch
from .errors import NotFinite, SamplingError

Output = Literal["pixels", "latents"]


@dataclass(frozen=True)
class Batch:
    """Some of the images of a seed block, in order."""

    indices: range  # of the images in their role's block: Seeds.indices()
    pixels: Tensor | None = None  # (B, H, W, 3) uint8, on the CPU; of a video the middle frame
    # As the pipeline holds them after the last step: (B, C, h, w), or packed (Flux). Beside pixels too, where it was seen.
    latents: Tensor | None = None


class Sampler:
    """Draws the images of seed blocks with one pipeline, chunk by chunk.

    The image of index i depends on its seed and condition only; its bits depend on the chunk too, by rounding (about 1e-6).
    Chunks therefore have fixed boundaries, multiples of the chunk size counted from image 0 of the role, and the calls of
    different plans meet in the memo.
    """

    def __init__(
        self,
        pipe: Any,
        conditions: Conditions,
        *,
        chunk: int = 64,
        call: dict[str, Any] | None = None,
        memo: Memo | None = None,
        fingerprint: str = "",
    ) -> None:
        """pipe: a diffusers pipeline.
        conditions: what each image is made from. Without any, the pipeline is asked for a batch of unconditional images.
        chunk: images per call of the pipeline; halved for good when memory runs out.
        call: further arguments of `pipe.__call__` (guidance_scale, height, ...). A text such as negative_prompt holds for every
            image, a PIL image such as ControlNet's too. Tensors are passed unchanged: `prompt_embeds` or `image_embeds` of
            one row serve any chunk, others must have a row for each image of every chunk.
        memo: shared denoiser results; `fingerprint` names the weights (and adapters) that they were made with.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if memo is not None and memo.files is not None and not fingerprint:
            raise ValueError("results in files are shared between processes: a fingerprint has to name the weights")
        self.pipe, self.conditions, self.chunk = pipe, conditions, chunk
        self.call, self.memo, self.fingerprint = dict(call or {}), memo, fingerprint
        self.calls = 0  # denoiser forwards executed
        self.served = 0  # denoiser forwards answered from the memo
        self._takes = set(inspect.signature(pipe.__call__).parameters)

    def images(
        self, plan: SamplingPlan | None, seeds: Seeds, *, steps: int | None = None, output: Output = "pixels"
    ) -> Iterator[Batch]:
        """The images of a seed block along `plan`, in order of their index.

        Without a plan the pipeline runs as it is, with `steps` inference steps or its own default.
        Raises CannotFollow at once if the plan does not fit the pipeline, SamplingError when images fail.
        """
        if plan is not None:
            check(self.pipe, plan)
            steps = len(plan.steps)
        return self._batches(plan, seeds, steps, output)

    def _batches(self, plan: SamplingPlan | None, seeds: Seeds, steps: int | None, output: Output) -> Iterator[Batch]:
        start, stop = seeds.start, seeds.start + seeds.count
        while start < stop:
            indices = range(start, min(stop, (start // self.chunk + 1) * self.chunk))
            batch = self._attempt(plan, seeds, indices, steps, output)
            if batch is None:
                self._shrink(len(indices))
            else:
                yield batch
                start = indices.stop

    def _attempt(
        self, plan: SamplingPlan | None, seeds: Seeds, indices: range, steps: int | None, output: Output
    ) -> Batch | None:
        """One call of the pipeline; None if memory ran out."""
        try:
            return self._draw(plan, seeds, indices, steps, output)
        except RuntimeError as e:
            if not memory.ran_out(e):
                raise
            return None  # shrink only after this frame, whose traceback holds the tensors, is gone

    def _shrink(self, size: int) -> None:
        if size == 1:
            raise SamplingError("out of memory with a single image. Use a smaller model or image, half precision or --offload.")
        self.chunk = size // 2
        if self.memo is not None:
            self.memo.clear()
        memory.give_back()

    def _draw(self, plan: SamplingPlan | None, seeds: Seeds, indices: range, steps: int | None, output: Output) -> Batch:
        arguments = self.arguments(seeds, indices, steps)
        native = output == "latents" and _offers_latents(self.pipe)
        arguments["output_type"] = "latent" if native else "pt"
        drawn, generators = [image_seed(seeds.role, seeds.base, i) for i in indices], arguments["generator"]

        following = follow(self.pipe, plan, memo=self.memo, context=self._context(drawn)) if plan else watch(self.pipe)
        with silent(self.pipe), following as run:
            run.generators = generators
            try:
                made = self.pipe(**arguments)[0]
            finally:
                self.calls += run.calls
                self.served += run.served
        return self._checked(made, run, indices, output, native)

    def arguments(self, seeds: Seeds, indices: range, steps: int | None) -> dict[str, Any]:
        """Arguments of `pipe.__call__` for some images of a seed block, each with a generator of its own.

        Generators carry state: every call needs new ones. On the CPU, so that the noise is the same on any device.
        """
        drawn = (image_seed(seeds.role, seeds.base, i) for i in indices)
        return self._arguments(indices, steps) | {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in drawn]}

    def _arguments(self, indices: range, steps: int | None) -> dict[str, Any]:
        size, rows = len(indices), self.conditions.arguments(indices)
        every = {key: [value] * size if rows and _is_one(key, value) else value for key, value in self.call.items()}
        if steps is not None:
            every["num_inference_steps"] = steps
        if not rows:
            every |= self._count(size)
        return every | rows

    def _count(self, size: int) -> dict[str, int]:
        """The argument that asks for `size` images where no list of conditions says so."""
        if "batch_size" in self._takes:
            return {"batch_size": size}
        given = [len(value) for key, value in self.call.items() if isinstance(value, Tensor) and key.endswith("embeds")]
        per_prompt, remainder = divmod(size, given[0] if given else 1)
        names = [name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in self._takes]
        if not names or remainder or not per_prompt:
            raise SamplingError(
                f"{type(self.pipe).__name__} cannot make {size} images from what it is given"
                + (f" ({given[0]} rows of embeddings)." if given else ": it needs conditions (--prompts FILE).")
            )
        return {names[0]: per_prompt}

    def _context(self, drawn: list[int]) -> str:
        """What the memoised results depend on besides the plan: weights, seeds of the chunk, conditions, call."""
        values = {key: _digest(value) for key, value in self.call.items()}
        return canonical([self.fingerprint, drawn, self.conditions.hash, values])

    def _checked(self, made: Any, run: Run, indices: range, output: Output, native: bool) -> Batch:
        size = len(indices)
        where = f"images {indices.start} to {indices.stop - 1}"
        if run.last is not None and not bool(torch.isfinite(run.last).all()):
            raise NotFinite(f"{where}: the samples hold NaN or infinity. Half precision, or a model broken by its cuts?")
        if output == "latents":
            # Guidance may have doubled the batch that the scheduler steps (DiT): the images come first.
            latents = made if native else run.last
            if latents is None:
                raise SamplingError(f"{type(self.pipe).__name__} never stepped its scheduler: it shows no latents.")
            return Batch(indices, latents=latents[:size])
        return Batch(indices, pixels=_pixels(made, size, where), latents=None if run.last is None else run.last[:size])


def _pixels(made: Any, size: int, where: str) -> Tensor:
    """Pipeline output -> (B, H, W, 3) uint8. Takes tensors (B, C, H, W), arrays (B, H, W, C) in 0..1, and lists of PIL images.

    Of a video, with a dimension F of frames after B or as a list of lists, the middle frame is taken: motion is not measured.
    """
    if isinstance(made, list) and made and isinstance(made[0], list):
        made = [frames[len(frames) // 2] for frames in made]
    if isinstance(made, list) and made and isinstance(made[0], Tensor | np.ndarray):
        made = torch.stack(made) if isinstance(made[0], Tensor) else np.stack(made)
    if isinstance(made, Tensor | np.ndarray) and made.ndim == 5:
        made = made[:, made.shape[1] // 2]
    if isinstance(made, Tensor):
        x = made.detach().float().cpu()
        x = x.movedim(1, -1) if x.ndim == 4 else x
    elif isinstance(made, np.ndarray):
        x = torch.from_numpy(made).float()
    else:
        x = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in made])).float() / 255
    if x.ndim != 4 or len(x) != size or x.shape[-1] not in (1, 3):
        raise SamplingError(f"{where}: expected {size} pictures with 1 or 3 channels, the pipeline made {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise SamplingError(f"{where}: the pixels hold NaN or infinity. Half precision (try another VAE), or a broken model?")
    x = (x.clamp(0, 1) * 255).round().to(torch.uint8)  # as diffusers' numpy_to_pil rounds
    return x.expand(*x.shape[:-1], 3).contiguous()


@contextlib.contextmanager
def silent(pipe: Any) -> Iterator[None]:
    """Without the pipeline's progress bar."""
    before = getattr(pipe, "_progress_bar_config", None) or {}
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _offers_latents(pipe: Any) -> bool:
    """Whether the pipeline's code knows output_type="latent"; those that do not would silently decode."""
    try:
        return '"latent"' in inspect.getsource(inspect.unwrap(type(pipe).__call__))
    except OSError:  # no source, as in a frozen application
        return False


def _is_one(key: str, value: Any) -> bool:
    """Pipelines want a list for every text and picture when `prompt` is a list."""
    return ("prompt" in key and isinstance(value, str)) or (key in IMAGES and isinstance(value, Image))


def _digest(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_digest(each) for each in value]
    found = digest(value)
    return repr(value) if found is value else found
