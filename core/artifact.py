"""What a stage hands to the next one: a model reference with a plan, and the manifest lissom.json that says how it was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import Field, ValidationError

from .candidate import Cut, Data, SamplingPlan
from .errors import UserError, one_line
from .files import write_text
from .measurement import Measurement

MANIFEST, PLAN = "lissom.json", "plan.json"
MODEL = "model"  # where a stage that makes a smaller model leaves it, in its own folder


class Ancestor(Data):
    """A model in the line of a pruned one, and what was cut from it."""

    parent: str  # pinned reference
    model_hash: str
    cuts: tuple[Cut, ...]  # addresses in that parent
    names: dict[str, str | None] = Field(default_factory=dict)  # module in that parent -> in the model after it, None: cut


class Other(Data):
    """A model that makes steps of another one's plan."""

    model: str  # pinned reference
    model_hash: str


class Manifest(Data):
    """lissom.json: of a stage's folder, and of a pruned model's."""

    schema_version: int = 1
    parent: str  # the model that the plan runs on or that was cut, as a pinned reference
    model_hash: str  # of the parent
    stage: str  # hash of everything that decides the stage's result; an equal one is not run again
    made_by: dict[str, Any] = Field(default_factory=dict)  # the stage as in the recipe
    measurements: tuple[Measurement, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    component: str = ""  # of the pipeline, e.g. unet; the rest is there for pruned models
    cuts: tuple[Cut, ...] = ()  # addresses in the parent
    names: dict[str, str | None] = Field(default_factory=dict)  # module in the parent -> here, None: cut; others kept theirs
    opens: Literal["", "stock", "remote_code"] = ""  # a stock config, or a class that the folder brings along
    license: str = ""
    models: dict[str, Other] = Field(default_factory=dict)  # that the plan names, by that name
    chain: tuple[Ancestor, ...] = ()  # from the first model to this one's parent, each with its cuts


@overload
def renamed(key: str, names: Mapping[str, str]) -> str: ...
@overload
def renamed(key: str, names: Mapping[str, str | None]) -> str | None: ...
def renamed(key: str, names: Mapping[str, str | None]) -> str | None:
    """A name of a module or weight after modules moved: the longest address in `names` that it lies under counts.

    None for what was cut. So the keys of a LoRA of the parent become those of the pruned model, and some go.

    >>> renamed("blocks.10.ff.weight", {"blocks.1": "blocks.0", "blocks.10": "blocks.4"})
    'blocks.4.ff.weight'
    >>> renamed("blocks.2.ff.weight", {"blocks.2": None}) is None
    True
    """
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        above = ".".join(parts[:n])
        if above in names:
            new = names[above]
            return None if new is None else ".".join([new, *parts[n:]])
    return key


@dataclass(frozen=True)
class Artifact:
    """A model, by reference, and the plan to run it with."""

    ref: str
    plan: SamplingPlan | None = None


def save(folder: Path, manifest: Manifest, plan: SamplingPlan | None) -> None:
    """Write plan.json (canonical: no times, no paths), then the manifest, whose presence says that the stage is complete.

    Of the manifest's other models only those that the plan names are kept.
    """
    named = {name: other for name, other in manifest.models.items() if plan is not None and name in plan.models}
    manifest = manifest.model_copy(update={"models": named})
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


def made_model(folder: Path) -> Path | None:
    """The folder of the model that a run (or its last finished stage) made, or None."""
    path = finished(folder) / MODEL
    return path if (path / "model_index.json").is_file() else None


def models_of(path: Path | None) -> dict[str, Other]:
    """The other models that a run's plan names; none for a lone plan.json, which knows names only."""
    made = manifest(finished(path)) if path is not None and path.is_dir() else None
    return dict(made.models) if made else {}


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
