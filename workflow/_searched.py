"""What a search leaves behind: the plan, the cut model where the model was cut, reports, a script, and the manifest last."""

import os
import shutil
from pathlib import Path

from .. import __version__
from ..core import artifact, export
from ..core.artifact import Artifact, Manifest
from ..core.candidate import Candidate, SamplingPlan, Seeds
from ..core.errors import UserError
from ..core.files import write_text
from ..core.stages import SearchStage
from ..core.store import TrialStore
from ..report import model_card, reproduce
from ..report.schema import SearchReport
from . import _report
from ._plans import Plans
from ._prune_report import opens_with
from ._pruned_model import CARD, license_of, moved_plan
from ._pruned_model import save as save_model
from ._stage import stage_hash
from ._subject import Subject


def check(stage: SearchStage, subject: Subject, folder: Path) -> None:
    """UserError for models and folders that a cut model could not be saved from or to. Asked before any work."""
    if stage.cutting:
        export.check(subject.model, folder / artifact.MODEL)


def reopen(folder: Path) -> None:
    """The stage is not finished any more: what is there may be of another pick than what comes now."""
    (folder / artifact.MANIFEST).unlink(missing_ok=True)


def finish(
    stage: SearchStage,
    artifact_in: Artifact,
    subject: Subject,
    plans: Plans,
    stores: dict[str, TrialStore],
    winner: Candidate,
    unseen: Seeds,
    stopped: int | None,
    folder: Path,
) -> Artifact:
    """Write everything. unseen: seeds of the report's images. stopped: how many candidates --max-time left time for."""
    assert winner.plan is not None
    plan, saved = winner.plan, None
    if winner.cuts:
        subject.context.progress.say(f"{len(winner.cuts)} cuts; saving, and opening the result in a fresh process")
        made_by = {**stage.plain(), "seed": subject.context.recipe.seed}
        saved = save_model(subject.model, winner.cuts, plans.weigh.gauge.probe(), folder, made_by)
        plan = moved_plan(plan, saved.structure.names)
    else:
        _remove_model(folder)
    how = {}
    if saved:
        how = {"opens": saved.structure.opens, "not_plain_because": saved.structure.reason}
        how["open_with"] = opens_with(saved.structure.opens, saved.variant, saved.folder)
    stores["search"].remember(opens=how)
    report = _report.write(folder, stores)
    complete = stage_hash(stage, artifact_in, subject.context)
    manifest = Manifest(
        parent=subject.model.ref,
        model_hash=subject.model.fingerprint,
        stage=complete if stopped is None else f"stopped after {stopped} candidates",
        made_by=stage.plain(),
        measurements=report.winner.measurements,
        versions={"lissom": __version__},
        models=subject.model.others,
    )
    classes = reproduce.layer_classes(subject.model.denoiser, winner.plan)
    if saved:
        renamed = {old: artifact.renamed(old, saved.structure.names) for old in classes}
        classes = {new: classes[old] for old, new in renamed.items() if new is not None}
        manifest = _with_model(saved.folder, manifest, report, subject, plan)
    _report.write_reproduce(folder, plan, subject, unseen, classes, saved.folder if saved else None)
    artifact.save(folder, manifest, plan)
    return Artifact(ref=str(folder), plan=plan)


def _with_model(model: Path, of_stage: Manifest, report: SearchReport, subject: Subject, plan: SamplingPlan) -> Manifest:
    """Complete the cut model's folder; the stage's manifest says the same."""
    written = artifact.manifest(model)
    assert written is not None  # by `save_model`
    made = written.model_copy(
        update={"measurements": of_stage.measurements, "stage": of_stage.stage, "models": of_stage.models}
    )
    card = model_card.searched(report, license_of(subject.model.folder), origin=subject.model.origin)
    write_text(model / CARD, card)
    artifact.save(model, made, plan)
    return made


def _remove_model(folder: Path) -> None:
    """The cut model of another pick, which an earlier session left."""
    model, gone = folder / artifact.MODEL, folder / f".{artifact.MODEL}.gone"
    shutil.rmtree(gone, ignore_errors=True)  # half of one, which a killed process left
    if not model.is_dir():
        return
    if artifact.manifest(model) is None:
        raise UserError(f"{model}: is no model that lissom made, so that it is not removed. Move it, or choose another --out.")
    os.replace(model, gone)  # whole or not at all: half a model would stand in the way of the next
    shutil.rmtree(gone)
