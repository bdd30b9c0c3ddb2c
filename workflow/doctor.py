"""What is installed, what is missing, and what is known not to work together."""

import platform
from importlib import metadata
from typing import Any

from .. import __version__
from ..core import models
from ..core.errors import UserError
from ..evaluate import _download

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "optuna", "deap", "torch-pruning", "clean-fid",
    "open_clip_torch", "timm", "scipy", "numpy", "typer", "pydantic",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Versions and device under `found`, one sentence each under `problems`."""
    found, problems = {"lissom": __version__, "python": platform.python_version()}, []
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(f"{name} is not installed. Run: pip install {name}")
    try:
        import torch

        devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        found["devices"] = ", ".join([*devices, "mps"] if torch.backends.mps.is_available() else devices) or "cpu only"
        found["cpu threads"] = str(torch.get_num_threads())
    except ImportError as e:
        problems.append(f"torch cannot be imported ({e}). Install it again for this Python.")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as e:
        problems.append(f"torchvision does not fit torch ({' '.join(str(e).split())[:120]}). Install the pair of one release.")
    forbidden = _download.offline()
    found["hub"] = f"offline ({forbidden})" if forbidden else "downloads when a hub id is given"
    place = _download.cache() / _download.INCEPTION.name
    try:
        if place.is_file():
            found["features:inception"] = f"ok ({_download.fetch(_download.INCEPTION)})"
        elif forbidden:
            found["features:inception"] = f"missing: offline, so put it at {place}"
        else:
            found["features:inception"] = f"not in the cache, downloaded to {place} when asked for"
    except UserError as e:
        problems.append(str(e))
    for name in models.zoo():
        try:
            models.check_folder(models.ZOO / name)
            found[f"zoo:{name}"] = "ok"
        except UserError as e:
            problems.append(str(e))
    return {"found": found, "problems": problems}
