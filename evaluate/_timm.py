"""Image models by timm: DINOv2 as FD-DINOv2 uses it (Stein et al., 2306.04675), or any that a folder describes.

Shapes: B images, S x S pixels, D features.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import UserError, one_line
from ..core.methods import suggest
from ._download import hub_file
from ._extractor import LARGE, Normalised, local_weights, sha256, weights_in

SIZE = 224  # S of DINOv2, as in the paper's own code
WEIGHTS = ("model.safetensors",)
ELSEWHERE = (
    "checkpoint_path",
    "cache_dir",
    "pretrained",
)  # of a folder's model arguments: weights from anywhere but the folder
SHORT = {f"vit{size[0]}14": f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant")}


class Timm(Normalised):
    """What timm's model gives with its classifier off, in float32: for DINOv2 the class token after the last norm (its CLS token).

    timm resamples the position embedding of the weights to S x S pixels (bicubic, antialiased).
    """

    batch = LARGE

    def __init__(
        self, name: str, arch: str, weights: Path, device: str, size: int | None = None, classes: int = 0, **settings: Any
    ) -> None:
        """size: S, where timm's own is not wanted. classes: how many the weights' own classifier tells apart.

        Raises the errors of timm, torch and safetensors.
        """
        import timm

        self.name, self.hash = name, sha256(weights)
        if not timm.is_model(arch):
            raise ValueError(f"timm has no {arch!r}")
        # The one place to load from. With the classifier's own size timm demands every weight; else it only logs what is missing.
        place = {
            "file": str(weights),
            "source": "",
            "url": None,
            "hf_hub_id": None,
            "custom_load": False,
            "num_classes": classes,
        }
        if size:
            settings["img_size"] = size
        model: Any = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=place, num_classes=classes, **settings)
        if classes:
            model.reset_classifier(0)
        self._model = model.eval().requires_grad_(False).to(device)
        told = model.pretrained_cfg
        self.size = size or _side(told["input_size"])
        self.dim = int(getattr(model, "head_hidden_size", model.num_features))
        self._place(device, tuple(told["mean"]), tuple(told["std"]))

    def _see(self, images: Tensor) -> Tensor:
        return self._model(images)


def named(where: str, device: str) -> Timm:
    """NAME: DINOv2's weights from the model hub. NAME/FILE.safetensors: weights on this machine. NAME: vitl14, or timm's own.

    Raises UserError for a name that timm does not know, MissingOffline for a file that is neither here nor to be had.
    """
    import timm

    given, _, file = where.partition("/")
    known = timm.list_models("*dinov2*", pretrained=True)
    full = SHORT.get(given) or next((k for k in known if given in (k, k.partition(".")[0])), "")
    if not full:
        names = [*SHORT, *known]
        raise UserError(
            f"features 'dinov2:{where}': no {given!r} in timm; there are {', '.join(names)}.{suggest(given, names)}"
        )
    short = next((s for s, name in SHORT.items() if name == full), full)  # one model, one name
    asked = f"features 'dinov2:{where}'"
    if file:
        weights, name = local_weights(f"dinov2:{where}", file), f"dinov2:{short}/{Path(file).name}"
    else:
        instead = f"or give dinov2:{short}/FILE.safetensors with a file of yours"
        weights, name = hub_file(asked, f"timm/{full}", WEIGHTS[0], instead), f"dinov2:{short}"
    return _make(asked, name, full, weights, device, SIZE)


def from_folder(folder: Path, config: dict[str, Any], device: str, weights: Path | None = None) -> Timm:
    """A folder as timm writes it, with its config: features at the size that the config names; DINOv2 at 224 as above."""
    weights = weights or weights_in(folder, WEIGHTS)
    arch, trained = config["architecture"], config.get("pretrained_cfg") or {}
    if "dinov2" in arch:
        short = next((s for s, name in SHORT.items() if name == f"{arch}.{trained.get('tag')}"), arch)
        return _make(str(folder), f"dinov2:{short}/{weights.name}", arch, weights, device, SIZE)
    settings = {k: v for k, v in (config.get("model_args") or {}).items() if k not in ELSEWHERE}
    if pool := config.get("global_pool"):
        settings["global_pool"] = pool
    classes = config.get("num_classes", trained.get("num_classes", 0))
    return _make(
        str(folder), f"timm:{arch}/{weights.name}", arch, weights, device, None, classes, pretrained_cfg=trained, **settings
    )


def _make(
    asked: str,
    name: str,
    arch: str,
    weights: Path,
    device: str,
    size: int | None = None,
    classes: int = 0,
    **settings: Any,
) -> Timm:
    try:
        return Timm(name, arch, weights, device, size, classes, **settings)
    except Exception as e:  # timm, torch and safetensors each raise their own
        raise UserError(f"{asked}: timm cannot build it from {weights} ({type(e).__name__}: {one_line(e)}).") from e


def _side(size: list[int]) -> int:
    channels, height, width = size
    if (channels, height) != (3, width):
        raise ValueError(f"images must be square and RGB, this model wants {size}")
    return height
