"""What all stages of a run share: the recipe, where relative paths start, the machine's options, and who watches."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..core.artifact import Other
from ..core.candidate import Seeds
from ..core.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """How to run on this machine; none of these changes what a recipe means."""

    device: str = "auto"
    dtype: str = "float32"
    offload: str = "none"
    trust_remote_code: bool = False
    chunk: int = 64  # images per pipeline call
    memo_mib: int = 512  # memory for shared prefixes
    memo_dir: str | None = None  # folder for shared prefixes, for workers that see the same disk
    storage: str | None = None  # Optuna storage URL instead of the journal file
    max_time: float | None = None  # seconds after which no further candidate is started
    push_to_hub: str | None = None  # repository that a pruned model is uploaded to, once it is complete


class Progress(Protocol):
    """Where a run tells how far it is. The command line draws bars, tests and libraries may ignore it."""

    def phase(self, name: str, total: int) -> None:
        """A new phase of `total` evaluations begins."""

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        """One evaluation is there; fresh is False when the store had it."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def warn(self, text: str) -> None:
        """A line that must not be missed."""


class Silent:
    """A Progress that nobody watches."""

    def phase(self, name: str, total: int) -> None: ...
    def advance(self, note: str = "", *, fresh: bool = True) -> None: ...
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


def remaining(progress: Progress, what: str, seeds: Seeds, done: int, chunk: int) -> Seeds | None:
    """Begin a phase of images that come in chunks, `done` of them being there: the seeds that are left, or None."""
    progress.phase(f"{what}, in batches", -(-seeds.count // chunk))
    for _ in range(done // chunk):
        progress.advance(fresh=False)
    if done >= seeds.count:
        return None
    return seeds.model_copy(update={"start": seeds.start + done, "count": seeds.count - done})


@dataclass(frozen=True)
class Context:
    recipe: Recipe
    base: Path  # folder that the recipe's relative paths start from
    options: Options = Options()
    progress: Progress = field(default_factory=Silent)
    run_id: str = ""  # names the run's studies in a shared database
    others: Mapping[str, Other] = field(default_factory=dict)  # models that a plan from elsewhere names
    began: float = field(default_factory=time.monotonic)  # --max-time counts from here, loading included, over all stages

    def path(self, text: str) -> str:
        """A path of the recipe, absolute where there is a file or folder; zoo:NAME, teacher and hub ids stay as they are."""
        scheme, colon, rest = text.partition(":")
        if text == "teacher" or scheme in ("zoo", "config"):
            return text
        if scheme in ("local-dir", "inception", "torchscript") and colon:
            return f"{scheme}:{self.path(rest)}"
        if scheme in ("clip", "dinov2") and colon:  # ARCHITECTURE/TAG, or ARCHITECTURE/FILE
            name, slash, file = rest.partition("/")
            return f"{scheme}:{name}{slash}{self.path(file) if file else ''}"
        there = self.base / Path(text).expanduser()
        return str(there) if there.exists() else text

    def file(self, text: str) -> str:
        """A file of the recipe: always seen from the recipe's folder, so that a missing one is missed."""
        return str(self.base / Path(text).expanduser())
