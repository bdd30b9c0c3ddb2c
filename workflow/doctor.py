"""What is installed, what is missing, and what is known not to work together."""

import os
import platform
from importlib import metadata
from typing import Any

from .. import __version__
from ..core import models
from ..core.errors import UserError

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "optuna", "deap", "torch-pruning", "clean-fid",
    "open_clip_torch", "scipy", "numpy", "typer", "pydantic",
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
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "downloads when a hub id is given"
    for name in models.zoo():
        try:
            models.check_folder(models.ZOO / name)
            found[f"zoo:{name}"] = "ok"
        except UserError as e:
            problems.append(str(e))
    return {"found": found, "problems": problems}
