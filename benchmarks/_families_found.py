"""The pipelines of the installed diffusers, and what each of them makes, read from its signature."""

import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TASKS = (
    "text to image", "class to image", "unconditional", "embeddings to image", "text to embeddings", "image to image", "video",
    "audio", "other",
)  # fmt: skip
PICTURES = {"image", "images", "mask_image", "control_image", "example_image", "reference_image", "input_images", "depth_map"}
VIDEO = {"num_frames", "video", "video_length", "num_videos_per_prompt", "pose_video"}


@dataclass(frozen=True)
class Found:
    """One pipeline class."""

    name: str
    cls: Any  # the class; a stand-in without methods where packages are missing
    task: str  # one of TASKS
    missing: tuple[str, ...] = ()  # packages that it needs and that are not installed

    @functools.cached_property
    def components(self) -> dict[str, inspect.Parameter]:
        """Arguments of `__init__`."""
        return _parameters(self.cls.__init__)

    @functools.cached_property
    def call(self) -> dict[str, inspect.Parameter]:
        """Arguments of `__call__`."""
        return _parameters(self.cls.__call__)


@functools.cache
def pipelines() -> tuple[Found, ...]:
    """Every class that diffusers exports under a name that ends in Pipeline, but for modular pipelines and the base."""
    import diffusers

    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tuple(_every(diffusers))
    finally:
        diffusers.logging.set_verbosity(before)


def _every(diffusers: Any) -> Iterator[Found]:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    from_text = {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    for name in sorted(n for n in dir(diffusers) if n.endswith("Pipeline") and not n.endswith("ModularPipeline")):
        cls = getattr(diffusers, name)
        if backends := getattr(cls, "_backends", None):
            here = diffusers.utils.import_utils.BACKENDS_MAPPING
            missing = tuple(b for b in backends if not here[b][0]())
            yield Found(name, cls, _by_name(name), missing)
        elif inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline) and cls is not diffusers.DiffusionPipeline:
            yield Found(name, cls, _task(_parameters(cls.__call__), name, name in from_text))


def _task(call: dict[str, inspect.Parameter], name: str, from_text: bool) -> str:
    """What a pipeline makes of what, by the names of its arguments. from_text: diffusers maps it to text to image itself."""
    names = set(call)
    if "Audio" in name or any(word in k for k in names for word in ("audio_length", "audio_duration", "audio_end", "lyrics")):
        return "audio"
    if "Prior" in name and "Redux" not in name:
        return "text to embeddings"
    if names & {"frame_size", "gen_length", "padding_mask"}:  # 3D shapes, text, proteins
        return "other"
    if names & VIDEO:
        return "video"
    if "class_labels" in names and call["class_labels"].default is inspect.Parameter.empty:
        return "class to image"
    pictures = names & PICTURES
    controlled = "ControlNet" in name and not any(word in name for word in ("Img2Img", "Inpaint"))
    if from_text or ("prompt" in names and (not pictures or pictures == {"control_image"} or controlled)):
        return "text to image"
    if pictures:
        return "image to image"
    if names & {"image_embeds", "image_embeddings"}:
        return "embeddings to image"
    return "unconditional" if "batch_size" in names else "other"


def _by_name(name: str) -> str:
    """For a class that cannot be looked into here."""
    if "Audio" in name or "Spectrogram" in name:
        return "audio"
    if any(word in name for word in ("Img2Img", "Inpaint", "Upscale")):
        return "image to image"
    return "video" if "ConsisID" in name else "text to image"


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in list(inspect.signature(function).parameters.items())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}
