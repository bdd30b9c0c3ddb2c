"""The state of a training, written whole or not at all: what an exact resume needs, and nothing that runs code when it is read."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError, one_line
from ..core.files import disk_errors, write_text
from . import _spread


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


def read(path: Path, identity: str, *, mapped: bool = False) -> dict[str, Any] | None:
    """The state at `path`, or None where there is none. UserError for a damaged one, and for that of another run.

    mapped: tensors stay in the file until they are looked at: of several processes each needs its shares alone.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        found = state["identity"]
    except Exception as e:  # torch's unpickler raises whatever a damaged file makes of it
        raise UserError(
            f"{path}: not a checkpoint of lissom, or damaged ({type(e).__name__}: {one_line(e)}). Remove it to begin anew."
        ) from e
    if found != identity:
        raise UserError(
            f"{path}: is of another run (other model, data, losses or settings). Go on as the run was started, "
            "choose another --out, or remove the file to begin anew."
        )
    return state


def learned(learner: nn.Module, average: Any, optimizer: Any, keep: bool) -> dict[str, Any]:
    """What was learned so far: full tensors also of weights that are spread, so that any number of processes can go on.

    average: an EMAModel or None. keep: whether this process wants it; where weights are spread, all have to ask.
    """
    state = {
        "student": learner.state_dict(),
        "average": average.state_dict() if average is not None else None,
        "optimizer": optimizer.state_dict(),
    }
    return dict(_spread.whole(state, keep))


def learn(state: dict[str, Any], learner: nn.Module, average: Any, optimizer: Any, device: torch.device) -> None:
    """Put back what `learned` gave, of weights that are spread the shares."""
    share, parameters, now = _spread.share, list(learner.parameters()), learner.state_dict()
    learner.load_state_dict({name: share(full, now[name]) for name, full in state["student"].items()})
    if average is not None:
        shares = [share(full, like) for full, like in zip(state["average"]["shadow_params"], parameters, strict=True)]
        average.load_state_dict(state["average"] | {"shadow_params": shares})
        average.to(device)
    learning = [p for p in parameters if p.requires_grad]
    moments = {  # beside each parameter's moments stands how often it was updated, a number
        k: {name: share(full, learning[k]) if full.dim() else full for name, full in found.items()}
        for k, found in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def rewind(log: Path, iteration: int) -> None:
    """Leave out lines after this iteration: they are written again."""
    if log.is_file():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _iteration(line) <= iteration]
        write_text(log, "".join(line + "\n" for line in lines))


def _iteration(line: str) -> float:
    """Infinite for a torn line."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf
