"""Workers whose model is a stand-in: values depend on plan and seeds alone, each takes a moment, and all is written down.

`python -m lissom.tests.workflow.crew URL LOG SECONDS [stuck] [elsewhere] -- lissom's own arguments` is such a worker. stuck: it
never gets to the end of its second candidate. elsewhere: its leases look like those of another machine.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lissom.cli import app
from lissom.core import leases
from lissom.core.recipe import Recipe
from lissom.core.storages import Storage
from lissom.tests.workflow import small
from lissom.workflow import _settle, _work, worker
from lissom.workflow._judges import Judge

HELD = 3.0  # seconds of an evaluation while it is held up


class Sampler:
    calls = served = 0


class Model:
    device = "cpu"


class Subject:
    model = Model()


class Log:
    """One line for each evaluation that begins or ends, whoever makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def hold(self) -> Path:
        """While this file is there, evaluations take seconds, so that others come to their turn."""
        return self.path.with_name("hold")

    def write(self, what: str, plan: Any, seeds: Any) -> None:
        line = json.dumps({"pid": os.getpid(), "what": what, "of": (plan.canonical() if plan else "") + seeds.canonical()})
        with self.path.open("a") as f:
            f.write(line + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def count(self, what: str, pid: int | None = None) -> int:
        return sum(line["what"] == what and pid in (None, line["pid"]) for line in self.lines())

    def ended(self) -> Counter[str]:
        """How often each request was evaluated to its end."""
        return Counter(line["of"] for line in self.lines() if line["what"] == "end")


def slowly(log: Log, seconds: float, stuck: int = 0) -> Any:
    """In place of Evaluator.score: small.pretended, after a while. stuck: the number of the evaluation that never ends."""

    def score(self: Any, plan: Any, seeds: Any, **more: Any) -> Any:
        log.write("begin", plan, seeds)
        time.sleep(600 if log.count("begin", os.getpid()) == stuck else seconds)
        until = time.monotonic() + HELD
        while log.hold.exists() and time.monotonic() < until:
            time.sleep(0.02)
        made = small.pretended(self, plan, seeds, **more)
        log.write("end", plan, seeds)
        return made

    return score


def main() -> None:
    own, words = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    where, log, seconds = own[0], Log(Path(own[1])), float(own[2])
    score = slowly(log, seconds, stuck=2 if "stuck" in own else 0)
    if "elsewhere" in own:
        leases._machine = lambda: {"machine": f"that of {os.getpid()}", "space": ""}  # type: ignore[assignment]

    def restore(work: Any, *_: Any, **__: Any) -> Any:
        stage = Recipe.model_validate(work["recipe"]).stages[work["stage"]]
        storage = Storage(where if "://" in where else Path(where))
        made = {n.rpartition("/")[2]: f["identity"]["evaluator"] for n, f in storage.studies.items() if "identity" in f}
        judges = {n: Judge(i, Sampler(), lambda *a, **k: score(None, *a, **k)) for n, i in made.items()}  # type: ignore[arg-type]
        return _work.Job(stage, Subject(), judges)  # type: ignore[arg-type]

    def scored(store: Any, claim: Any, judge: Any, progress: Any) -> dict[str, Any]:
        made = judge.score(claim.request.candidate.plan, claim.request.seeds)
        return {
            "measurements": made.measurements,
            "calls": made.calls,
            "plain_calls": made.plain_calls,
            "seconds": made.seconds,
        }

    _settle._scored = scored  # without torch, whose import takes longer than a test should
    _work.restore = restore  # type: ignore[assignment]
    worker.identity = lambda *_: {}  # type: ignore[assignment]
    sys.argv = ["lissom", "worker", "--storage", where, *words]
    app.main()


if __name__ == "__main__":
    main()
