"""The state of a training, written whole or not at all: what an exact resume needs, and nothing that runs code when it is read."""

import os
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError, one_line
from ..core.files import disk_errors


def write(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`. DiskError, and the earlier one stays, when the disk is full."""
    beside = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with beside.open("wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as e:  # torch wraps what the file says of a full disk
                    if isinstance(e.__context__, OSError):
                        raise e.__context__ from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def read(path: Path, identity: str) -> dict[str, Any] | None:
    """The state at `path`, or None where there is none. UserError for a damaged one, and for another training's."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as e:  # torch's unpickler raises whatever a damaged file makes of it
        raise UserError(
            f"{path}: not a checkpoint of lissom, or damaged ({type(e).__name__}: {one_line(e)}). Remove it to train from the start."
        ) from e
    if found != identity:
        raise UserError(
            f"{path}: is of another training (other student, teacher, data, losses or settings). Go on as the run was started, "
            "choose another --out, or remove the file to train from the start."
        )
    return state
