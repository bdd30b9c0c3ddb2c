"""The door to feature extractors: from a name to what turns images into numbers that a metric can compare."""

from pathlib import Path

from ..core.errors import UserError
from ..core.methods import suggest
from . import _open_clip, _timm, _torchscript
from ._extractor import Features, read_json

ZOO = Path(__file__).parents[1] / "zoo"
PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy")  # .pt and .pth are opened: they may be TorchScript
SCRIPTS = (".pt", ".pth", ".ts")
THERE = {
    "inception": "FID's own, or inception:FILE",
    "clip:ARCH/TAG": "open_clip's, such as clip:ViT-B-32/openai, or clip:ARCH/FILE.safetensors",
    "dinov2:NAME": "such as dinov2:vitl14, or dinov2:NAME/FILE.safetensors",
    "torchscript:FILE@SIZE": "a module of your own",
    "local-dir:FOLDER": "an open_clip model",
}


def load(name: str, device: str = "cpu") -> Features:
    """The extractor of this name: one of THERE, zoo:NAME, or the path of a file or folder that says what it is.

    Raises UserError with what there is, and MissingOffline for weights that are not on this machine and cannot be fetched.
    """
    kind, colon, where = name.partition(":")
    if kind == "zoo" and where in _embedded():
        return _open_clip.from_folder(name, ZOO / where, device)
    if kind == "local-dir":
        folder = Path(where).expanduser()
        if not where or not folder.is_dir():
            raise UserError(f"features {name!r}: no such folder. Give local-dir:FOLDER with an open_clip model in it.")
        return _open_clip.from_folder(f"local-dir:{folder.resolve().name}", folder, device)
    if kind == "inception" and (where or not colon):
        return _torchscript.inception(where, device)
    named = {"clip": _open_clip.named, "dinov2": _timm.named, "torchscript": _torchscript.named}
    if kind in named:
        return named[kind](where, device)
    path = Path(name).expanduser()
    if _torchscript.split(name)[0].suffix in SCRIPTS:
        return _torchscript.named(name, device)
    if name and path.is_dir() or path.suffix == ".safetensors" and path.is_file():
        return _beside(path, device)
    if path.suffix in PICKLES:
        raise UserError(f"features {name!r}: lissom reads weights as safetensors or TorchScript, never as {path.suffix} files.")
    if path.suffix == ".safetensors" or "/" in name and not colon:
        raise UserError(f"features {name!r}: no such file or folder here.")
    known = [f"zoo:{n}" for n in _embedded()]
    there = ", ".join([*known, *(f"{n} ({what})" for n, what in THERE.items())])
    raise UserError(f"no features {name!r}; there are {there}.{suggest(name, [*known, 'inception'])}")


def _beside(path: Path, device: str) -> Features:
    """Weights without the name of an architecture: the config beside them tells."""
    folder, weights = (path, None) if path.is_dir() else (path.parent, path)
    if (folder / "open_clip_config.json").is_file():
        return _open_clip.from_folder(f"local-dir:{folder.resolve().name}", folder, device, weights)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        return _timm.from_folder(folder, config, device, weights)
    file = "FILE" if weights is None else path
    raise UserError(
        f'features {path}: neither an open_clip_config.json nor timm\'s config.json (with "architecture") is beside the weights. '
        f"Say what they are: clip:ARCH/{file} or dinov2:NAME/{file}."
    )


def _embedded() -> list[str]:
    return sorted(path.parent.name for path in ZOO.glob("*/open_clip_config.json"))
