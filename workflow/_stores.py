"""The studies of a search: where they are, what they are called, and what must agree for two processes to share them."""

from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..core.errors import UserError
from ..core.stages import SearchStage
from ..core.storages import Storage
from ..core.store import TrialStore, identity_of
from ._subject import Subject

SHOWN = ("search", "rescore", "report")  # the studies that a report is made of
SCREEN = "screen"  # and one more, where candidates were screened


def open_stores(stage: SearchStage, subject: Subject, evaluators: Mapping[str, str], folder: Path) -> dict[str, TrialStore]:
    """The run's studies, in its journal or in --storage. evaluators: the id of each study's evaluator."""
    place, prefix = _place(folder, subject.context.options.storage, subject.context.run_id)
    storage, same = Storage(place, warn=subject.context.progress.warn), identity(stage, subject)
    return {
        name: TrialStore.open(storage, prefix + name, {**same, "evaluator": one}, one, stage.objective)
        for name, one in evaluators.items()
    }


def identity(stage: SearchStage, subject: Subject) -> dict[str, str]:
    """What two processes must agree in to share a search; its studies' evaluators come on top."""
    return identity_of(
        lissom=__version__,
        model=subject.model.fingerprint,
        stage={key: value for key, value in stage.plain().items() if key != "pick"},  # what is scored does not depend on it
        seed=subject.context.recipe.seed,
        evaluation=subject.context.recipe.evaluate.plain(),
        call=subject.call,
        prompts=subject.conditions.hash,
        device=subject.model.device.partition(":")[0],
        dtype=subject.model.dtype,
        chunk=subject.context.options.chunk,
    )


def read_stores(folder: Path, storage: str | None, run_id: str) -> dict[str, TrialStore]:
    """The studies of a run as they are, for a report: nothing is checked against a recipe, nothing can be added."""
    place, prefix = _place(folder, storage, run_id)
    if isinstance(place, Path) and not place.is_file():
        raise UserError(f"{place}: not there; the search in {folder} has not started. Go on with `lissom run {folder}`.")
    there = Storage(place, mend=False)
    facts = TrialStore.read(there, prefix + "search", ("",)).recall("facts")
    if facts is None:
        raise UserError(f"{folder}: the search has not started yet. Go on with `lissom run {folder}`.")
    names = [name for name in (*SHOWN, SCREEN) if name in SHOWN or prefix + name in there.studies]
    return {name: TrialStore.read(there, prefix + name, (facts["objective"],)) for name in names}


def _place(folder: Path, storage: str | None, run_id: str) -> tuple[str | Path, str]:
    """Where a run's studies are, and what their names begin with there: many runs share one database."""
    return (storage, f"{run_id}/{folder.resolve().name}/") if storage else (folder / "trials.journal", "")
