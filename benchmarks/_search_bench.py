"""What the benchmarks of searches share: a search without re-scoring and reports, its trials in a file, its best so far on unseen seeds."""

import argparse
import json
import math
import random
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from ..core import methods
from ..core.candidate import Candidate, Request, Seeds
from ..core.measurement import Trial
from ..core.recipe import build
from ..core.stages import SearchStage
from ..search._space import Genome
from ..search._task import Task
from ..workflow._plans import plans_of
from ..workflow._subject import Subject
from ..workflow.context import Context, Options
from . import _results

SAMPLES, CHUNK, UNSEEN = 256, 64, 1024  # images a candidate, in a call, and behind a point of a curve


def once(kind: str, name: str, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a job found, from its file where it is done. run: takes the file of the job's trials, where it may go on."""
    done = _results.RUNS / f"{kind}-{name.replace('/', '-').replace(':', '-')}.json"
    if not done.is_file():
        print(name, flush=True)
        done.write_text(json.dumps(run(done.with_suffix(".jsonl"))))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def only(doc: str | None, job: Callable[[str], Any], example: str) -> bool:
    """Run the jobs that the command line names, and say whether it named any."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="JOB", help=f"run these and write nothing, e.g. {example}")
    options = parser.parse_args()
    _results.RUNS.mkdir(parents=True, exist_ok=True)
    for name in options.only or ():
        job(name)
    return bool(options.only)


class Bench:
    """The model, and what was scored so far: a file of one line a candidate for each search."""

    def __init__(self, model: str, steps: int, space: tuple[str, ...], objective: tuple[str, ...] = ("fid",)) -> None:
        stage = {
            "search": "random_search",
            "steps": steps,
            "space": list(space),
            "objective": list(objective),
            "samples": SAMPLES,
        }
        evaluate = {"reference": "zoo:fashion", "metrics": ["fid", "accuracy"], "samples": UNSEEN}
        recipe = build({"lissom": 1, "model": model, "evaluate": evaluate, "stages": [stage]}, "bench")
        context = Context(recipe, Path.cwd(), Options(device="cpu", chunk=CHUNK))
        self.stage = SearchStage.model_validate(recipe.stages[0])
        self.subject = Subject.load(model, context)
        self.plans = plans_of(self.subject, self.stage)
        self.search = self.subject.evaluator("search", _results.RUNS)
        self.last = self.subject.evaluator("report", _results.RUNS)

    def scored(self, file: Path, requests: list[Request], number: int) -> list[Trial]:
        """Trials of requests, from the file where they are in it."""
        known = _read(file)
        found = []
        for i, request in enumerate(requests, number):
            key = request.key("search")
            if key not in known:
                score = self.search.score(request.candidate.plan, request.seeds)
                trial = Trial(
                    number=i, request=request, measurements=score.measurements, calls=score.calls, plain_calls=score.plain_calls,
                    seconds=round(score.seconds, 3),
                )  # fmt: skip
                with file.open("a", encoding="utf-8") as f:
                    f.write(json.dumps([key, trial.plain()]) + "\n")
                known[key] = trial
            found.append(known[key])
        return found

    def unseen(self, candidate: Candidate) -> float:
        """FD on the report's seeds, kept by candidate."""
        file = _results.RUNS / "methods-unseen.jsonl"
        key = f"{self.subject.model.ref}/{UNSEEN}/{candidate.digest()}"
        known = {k: v for k, v in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
        if key not in known:
            seeds = Seeds(role="report", base=0, count=UNSEEN)
            score = self.last.score(candidate.plan, seeds)
            known[key] = next(m.value for m in score.measurements if m.metric == "fid")
            with file.open("a", encoding="utf-8") as f:
                f.write(json.dumps([key, known[key]]) + "\n")
        return float(known[key])


def _read(file: Path) -> dict[str, Trial]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text and not text.endswith("\n"):  # a killed process left half a line, to which the next one would be glued
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, encoding="utf-8")
    lines = text.split("\n")[:-1]
    return {key: Trial.model_validate(trial) for key, trial in map(json.loads, lines)}


def searched(
    bench: Bench, method: str, seed: int, count: int, file: Path, start: Sequence[tuple[str, Genome]] = ()
) -> list[Trial]:
    """The trials of a search in the order of their calls: the fixed schedules, then `count` candidates."""
    seeds = Seeds(role="search", base=seed, count=SAMPLES)
    space, stage = bench.plans.space, bench.stage
    fixed = [
        Request(candidate=Candidate(plan=p), seeds=seeds, origin=f"fixed: {n}", costs=bench.plans.shares(Candidate(plan=p)))
        for n, p in bench.plans.fixed.items()
    ]
    known = bench.scored(file, fixed, 0)
    module = methods.load("search", method)
    task = Task(space, count, seeds, stage.objective, tuple(known), tuple(start))
    proposals: Generator[list[Request], list[Trial], None] = module.search(task, module.Config(), random.Random(seed))
    trials = list(known)
    answers: list[Trial] | None = None
    while True:
        try:
            batch = proposals.send(answers)  # type: ignore[arg-type]
        except StopIteration:
            return trials
        answers = bench.scored(file, batch, len(trials))
        trials += answers


def curve(bench: Bench, trials: list[Trial], marks: list[int]) -> list[tuple[int, float, int]]:
    """(calls spent, FD on unseen seeds of the best so far, candidates so far) at each mark, and where the calls end."""
    points, spent, best, at = [], 0, None, 0
    total = sum(t.calls for t in trials)
    wanted = sorted({min(m, total) for m in marks} | {total})
    for number, trial in enumerate(trials, 1):
        if trial.value("fid") < (best.value("fid") if best else math.inf):
            best = trial
        spent += trial.calls
        while at < len(wanted) and spent >= wanted[at] and best is not None:
            points.append((spent, bench.unseen(best.request.candidate), number))
            at += 1
    return points
