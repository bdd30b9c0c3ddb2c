"""What a worker elsewhere needs to know of a search, kept with its study, and made ready again there."""

import contextlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.artifact import Artifact
from ..core.errors import UserError, one_line
from ..core.recipe import Recipe
from ..core.stages import SearchStage
from ..core.storages import bare, without_password
from ..core.store import TrialStore
from ._judges import Judge, judges
from ._subject import Subject
from .context import Context, Options, Progress

ENVIRONMENT = "environment.json"  # in a run's folder: its id, among other things
VARIABLE = "LISSOM_STORAGE"  # the storage URL, for those who do not want to write it in a command


@dataclass(frozen=True)
class Job:
    """A search as a worker sees it."""

    stage: SearchStage
    subject: Subject
    judges: dict[str, Judge]  # by study


def describe(stage: SearchStage, artifact_in: Artifact, subject: Subject, folder: Path) -> dict[str, Any]:
    """Plain data from which `restore` makes the search's judges on another machine."""
    context = subject.context
    return {
        "lissom": __version__,
        "recipe": context.recipe.plain(),
        "stage": context.recipe.stages.index(stage),
        "model": subject.model.ref if artifact_in.ref == context.recipe.model else context.path(artifact_in.ref),
        "hash": subject.model.fingerprint,
        "base": str(context.base.resolve()),
        "folder": str(folder.resolve()),
        "run": context.run_id,
        "device": subject.model.device.partition(":")[0],
        "dtype": subject.model.dtype,
        "chunk": context.options.chunk,
        "offload": context.options.offload,
    }


def offer(store: TrialStore, work: Mapping[str, Any], progress: Progress) -> None:
    """Let workers take part from now on, and say how. store: the search's own study."""
    store.remember(work={**work, "finished": False})
    progress.say(f"more machines can help: {invitation(store)}")


def close(store: TrialStore) -> None:
    """Tell the workers that nothing more will come."""
    if (work := store.recall("work")) is not None:
        store.remember(work={**work, "finished": True})


def invitation(store: TrialStore) -> str:
    """The command that adds a worker, without the storage's password."""
    where, name = store.storage.where, store.study.study_name.removesuffix("search").rstrip("/")
    words = ["lissom", "worker", "--storage", bare(where), *(["--study", name] if name else [])]
    hidden = isinstance(where, str) and bare(where) != without_password(where)
    return shlex.join(words) + (f" (its password from {VARIABLE} or ~/.pgpass)" if hidden else "")


def check_version(work: Mapping[str, Any], place: str) -> None:
    """Raises UserError for a search that another lissom drives."""
    if work["lissom"] != __version__:
        raise UserError(
            f"{place}: the search is driven by lissom {work['lissom']}, this worker is lissom {__version__}. "
            "Install one version on all machines."
        )


def restore(
    work: Mapping[str, Any],
    place: str,
    options: Options,
    progress: Progress,
    *,
    device: str | None = None,
    dtype: str | None = None,
    model: str | None = None,
    base: Path | None = None,
    models: Mapping[str, str] | None = None,
) -> Job:
    """Load the model and what scores it. Raises UserError for whatever differs from the search's, both values named.

    options: how to run on this machine. model, base, models: where the model, the recipe's files and other models of plans are
        here, if elsewhere.
    """
    check_version(work, place)
    kind = (device or work["device"]).partition(":")[0]
    for name, given, known in (("device", kind, work["device"]), ("dtype", dtype or work["dtype"], work["dtype"])):
        if given not in (known, "auto"):
            raise UserError(
                f"--{name} {given}: the search measures with {known}. Leave --{name} out, or give {known}; "
                "results would not be comparable."
            )
    recipe = Recipe.model_validate(work["recipe"])
    recipe = recipe.model_copy(update={"models": {**recipe.models, **(models or {})}})
    stage = recipe.stages[work["stage"]]
    assert isinstance(stage, SearchStage)
    options = replace(
        options,
        device=work["device"] if device in (None, "auto") else device,
        dtype=work["dtype"],
        chunk=work["chunk"],
        offload=work["offload"] if options.offload == Options().offload else options.offload,
    )
    context = Context(recipe, base or Path(work["base"]), options, progress, run_id=work["run"])
    ref = model or work["model"]
    try:
        subject = Subject.load(ref, context, stage.scheduler)
    except UserError as e:
        if model is None and base is None and not Path(work["base"]).is_dir():
            raise type(e)(f"{e} The search was started in {work['base']}, which is not here: give --model or --base.") from e
        raise
    if subject.model.fingerprint != work["hash"]:
        raise UserError(
            f"{ref}: its weights have the hash {subject.model.fingerprint[:16]}…, those of the search {work['hash'][:16]}…. "
            "Name the same model with --model."
        )
    with _cache(work, progress) as cache:
        return Job(stage, subject, judges(stage, subject, cache))


@contextlib.contextmanager
def _cache(work: Mapping[str, Any], progress: Progress) -> Any:
    """Where reference statistics are kept, locked: the run's folder if it is this machine's too, else one of the worker's own."""
    from filelock import FileLock

    folder = Path(work["folder"])
    if not (_is_run(folder, work["run"]) and os.access(folder, os.W_OK)):
        folder = Path("runs") / f"worker-{work['run'] or 'search'}-{folder.name}"
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".references.lock")
    try:
        lock.acquire(timeout=0.1)
    except TimeoutError:
        progress.say(f"{folder}: another worker makes the reference statistics; waiting for it")
        lock.acquire()
    except OSError as e:  # a disk without locks: workers make the same statistics, each for itself
        progress.warn(f"{folder}: cannot be locked ({one_line(e)})")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder / ".references.lock").unlink(missing_ok=True)
            lock.release()
            if folder.name.startswith("worker-"):
                folder.rmdir()  # unless something is kept in it


def _is_run(folder: Path, run: str) -> bool:
    """Whether a folder here is the run's: another machine may have something else under the same name."""
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((place / ENVIRONMENT).read_text(encoding="utf-8"))
            return bool(isinstance(record, dict) and record.get("id") == run)
    return False
