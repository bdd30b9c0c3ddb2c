"""Searches that are over in seconds, and what can be read off their folders."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from lissom.core.artifact import Artifact
from lissom.core.candidate import SamplingPlan, Seeds
from lissom.core.measurement import Measurement
from lissom.core.recipe import parse
from lissom.report.sheets import sheet as write_sheet
from lissom.workflow._evaluator import Score
from lissom.workflow.context import Context, Options, Silent
from lissom.workflow.run import run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

FIXED = 4  # leading, trailing, linspace, quadratic
RESULT = '"result"'  # a journal has one line with this for every evaluation that is complete
STAGE: dict[str, Any] = {
    "search": "autodiffusion", "steps": 2, "trials": 6, "samples": 4, "rescore": 2, "rescore_samples": 4, "population": 4,
}  # fmt: skip
EVALUATE: dict[str, Any] = {"metrics": ["fid", "accuracy"], "samples": 8}


class Watched(Silent):
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


class Killed(Exception):
    """Stands for kill -9: nothing of ours catches it."""


class Dying(Watched):
    """Ends a run that learns gates after its second step."""

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        self.said.append(note)
        if sum(one.startswith("loss ") for one in self.said) == 2:
            raise Killed


def text(model: str = "zoo:fashion", evaluate: dict[str, Any] | None = None, **stage: Any) -> str:
    """A recipe; JSON is YAML."""
    return json.dumps(
        {"lissom": 1, "model": model, "evaluate": EVALUATE | (evaluate or {}), "stages": [STAGE | stage]}, indent=1
    )


def search(
    out: Path, recipe: str | None = None, *, resume: bool = False, progress: Any = None, options: Options | None = None
) -> Artifact:
    recipe = recipe or text()
    context = Context(parse(recipe, "r.yaml"), out.parent, options or Options(device="cpu"), progress or Silent())
    return run(context.recipe, recipe, out, context, resume=resume, single=True)


def pretended(self: Any, plan: SamplingPlan | None, seeds: Seeds, *, sheet: Path | None = None, **_: Any) -> Score:
    """In place of Evaluator.score: values that depend on plan and seeds alone, and no image is made."""
    digest = hashlib.sha256(((plan.canonical() if plan else "stock") + seeds.canonical()).encode()).hexdigest()
    drawn = random.Random(digest)
    halves = tuple(drawn.uniform(1, 2) for _ in range(40))
    shared = {"n": seeds.count, "seeds": seeds, "replicates": halves, "features": "zoo:judge"}
    found = Measurement(metric="fid", value=drawn.uniform(1, 2), direction="lower", **shared)
    other = Measurement(metric="accuracy", value=drawn.random(), direction="higher", **shared)
    if sheet is not None:
        write_sheet(np.zeros((4, 8, 8, 3), np.uint8), sheet)
    calls = len(plan.steps) if plan else 2
    return Score((found, other), calls=calls, plain_calls=calls, seconds=0.0)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def studies(folder: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    storage = JournalStorage(JournalFileBackend(str(folder / "trials.journal")))
    return {n: optuna.load_study(study_name=n, storage=storage).get_trials() for n in optuna.get_all_study_names(storage)}


def evaluated(folder: Path) -> Counter[tuple[str, str]]:
    """How often each (study, key) was evaluated to its end."""
    return Counter((name, t.user_attrs["key"]) for name, ts in studies(folder).items() for t in ts if "result" in t.user_attrs)


def results(folder: Path) -> int:
    """Complete evaluations so far, read off a journal that may be growing."""
    journal = folder / "trials.journal"
    return journal.read_text(errors="replace").count(RESULT) if journal.is_file() else 0
