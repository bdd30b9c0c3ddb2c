"""What a stage hands to the next one: a model reference with a plan, and the manifest lissom.json that says how it was made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from .candidate import Data, SamplingPlan
from .errors import UserError, one_line
from .files import write_text
from .measurement import Measurement

MANIFEST, PLAN = "lissom.json", "plan.json"


class Manifest(Data):
    """lissom.json. Later kinds of artifacts add cuts and the map of old to new names."""

    schema_version: int = 1
    parent: str  # the model that the plan runs on, as a pinned reference
    model_hash: str
    stage: str  # hash of everything that decides the stage's result; an equal one is not run again
    made_by: dict[str, Any] = Field(default_factory=dict)  # the stage as in the recipe
    measurements: tuple[Measurement, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A model, by reference, and the plan to run it with."""

    ref: str
    plan: SamplingPlan | None = None


def save(folder: Path, manifest: Manifest, plan: SamplingPlan | None) -> None:
    """Write plan.json (canonical: no times, no paths), then the manifest, whose presence says that the stage is complete."""
    if plan is not None:
        write_text(folder / PLAN, plan.pretty())
    write_text(folder / MANIFEST, json.dumps(manifest.plain(), sort_keys=True, indent=2) + "\n")


def manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, or None. A manifest that cannot be read raises UserError."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({one_line(e)}). Remove it to run the stage again.") from e


def finished(folder: Path) -> Path:
    """Where a run keeps its result: the folder itself, or its last finished stage (NN-verb-method/)."""
    stages = sorted(path.parent for path in folder.glob(f"[0-9][0-9]-*/{MANIFEST}"))
    return folder if (folder / MANIFEST).is_file() or not stages else stages[-1]


def read_plan(path: Path | str) -> SamplingPlan:
    """The plan of a plan.json, or of a run folder that holds one. Raises UserError."""
    path = Path(path)
    path = finished(path) / PLAN if path.is_dir() else path
    try:
        return SamplingPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise UserError(f"{path}: cannot read the plan ({reason}). Name a plan.json or a finished run's folder.") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: not a plan ({where + ': ' if where else ''}{first['msg']}).") from e
