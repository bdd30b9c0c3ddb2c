"""What all stages share: the hash that says whether one must run again."""

import hashlib
from pathlib import Path

from ..core import models
from ..core.artifact import Artifact
from ..core.candidate import canonical
from ..core.conditions import read as read_conditions
from ..core.recipe import Stage
from .context import Context


def stage_hash(stage: Stage, artifact_in: Artifact, context: Context) -> str:
    """Everything that decides a stage's result: an equal hash means that it need not run again."""
    r = context.recipe
    prompts = read_conditions(Path(context.file(r.prompts))) if r.prompts else None
    parts = [
        stage.plain(),
        models.identity(context.path(artifact_in.ref)),
        artifact_in.plan and artifact_in.plan.plain(),
        r.seed,
        r.evaluate.plain(),
        r.call,
    ]
    if r.models:
        parts.append({name: models.identity(context.path(ref)) for name, ref in r.models.items()})
    return hashlib.sha256(canonical([*parts, prompts and prompts.hash, r.model_hash]).encode()).hexdigest()
