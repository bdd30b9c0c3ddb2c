"""Weights spread over processes (FSDP), started as users start them, give what one process gives with accumulation.

As a program, this file is what the processes of a launch run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import export, processes
from lissom.core.errors import UserError
from lissom.distill import _loop
from lissom.distill._seen import Site
from lissom.tests.distill import learning
from lissom.tests.workflow.test_distill import PRUNE, distill, lines, text, weights
from lissom.workflow import _teaching

INNER = (Site("blocks.1.line", "blocks.2.line"),)  # inside a part: the losses do not see what the part itself gives
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "torn": {},
    "begun": {},  # by one process
    "nan": {"broken": [100, 101, 102, 103]},  # all of the second process
    "inner": {"terms": [learning.term("features", sites=INNER)], "clip": None, "ema": 0.0},
    "bf16": {"precision": "bf16"},
}


class Stopped(BaseException):
    pass


def trained(folder: Path, case: str, *, spread: bool, stop: int = 0) -> Any:
    """A linear student, with clipping, an average of weights and two forwards per update: four where there is one process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    settings = {"batch": 8, "iterations": 20, "clip": 0.05, **CASES[case]}
    samples, precision = learning.Numbered(settings.pop("broken", ())), settings.pop("precision", "no")
    made = learning.trainer(folder, samples, accumulate=2 if spread else 4, **settings)
    AcceleratorState._reset_state()
    made.accelerator, made.spread = Accelerator(cpu=True, mixed_precision=precision), spread
    made.scales()

    def advance(note: str) -> None:
        if made.outcome.iteration == stop:
            raise Stopped

    made.run(advance=advance)
    return made


def state(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoint.pt", weights_only=True))


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of weights, averages and moments."""
    theirs = dict(_tensors(b))
    return max((one - theirs[name]).abs().max().item() for name, one in _tensors(a))


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All of a state, save the generator's own."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield name, value
    for k, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _tensors(one, f"{name}.{k}")


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes that share the weights."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    return subprocess.run(
        [*start, "--main_process_port", "0", "-m", "lissom.tests.workflow.test_distill_sharded", *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases. The one named torn is ended by kill -9 and continued; "begun" is stopped, and continued by two processes."""
    folder = tmp_path_factory.mktemp("spread")
    killed = launch("trainings", str(folder), "whole", "torn", KILL="torn")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert 0 < state(folder / "torn")["iteration"] < 20
    shutil.copytree(folder / "torn", folder / "alone")
    (folder / "begun").mkdir()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(_loop, "SAVE_SECONDS", 0.0)
        trained(folder / "begun", "begun", spread=False, stop=13)
    assert 0 < state(folder / "begun")["iteration"] < 20
    rest = launch("trainings", str(folder), *list(CASES)[list(CASES).index("torn") :])
    assert rest.returncode == 0, rest.stderr
    return folder


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["whole", "nan", "inner"])
def test_two_processes_with_half_of_the_weights_each_learn_what_one_learns(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loop, "SAVE_SECONDS", 0.0)
    one = trained(tmp_path, case, spread=False)
    assert apart(state(tmp_path), state(folder / case)) < 1e-5
    assert one.outcome.restarts == state(folder / case)["restarts"] == (case == "nan")
    for a, b in zip(lines(tmp_path), lines(folder / case), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_each_process_holds_half_of_everything_that_learns(folder: Path) -> None:
    for found in facts(folder / "whole"):
        assert found["dtensors"] and found["names"]
        assert all(0.4 < found[what] < 0.6 for what in ("weights", "average", "moments")), found
        assert found["student_bytes"] < 100  # a number for each of the parameters
    first, second = facts(folder / "whole")
    assert first["weights"] + second["weights"] == 1.0


def test_half_precision_comes_close(folder: Path) -> None:
    assert 0 < apart(state(folder / "whole"), state(folder / "bf16")) < 0.1


def test_a_killed_run_goes_on_exactly(folder: Path) -> None:
    assert apart(state(folder / "whole"), state(folder / "torn")) == 0.0
    assert (folder / "whole" / "losses.jsonl").read_text() == (folder / "torn" / "losses.jsonl").read_text()


def test_what_several_began_goes_on_in_one_process_and_the_other_way_round(folder: Path) -> None:
    trained(folder / "alone", "torn", spread=False)
    for name in ("alone", "begun"):
        assert apart(state(folder / "whole"), state(folder / name)) < 1e-5
    assert all(found["dtensors"] for found in facts(folder / "begun"))


def test_a_denoiser_is_spread_checked_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DiT, whose first block embeds the time for all others, with gradient checkpointing."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)
    distill(tmp_path / "pruned", text(PRUNE))
    student, settings = str(tmp_path / "pruned" / "model"), {"images": 10, "data_steps": 2, "ema": 0.5}
    words = ["distill", "bk", student, "--iterations", "4", "--batch", "8", "--no-measure", "--check-every", "2"]
    words += ["--save-dtype", "float32", "--device", "cpu", "-q", "--set", "accumulate=2", "--set", "checkpointing=true"]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    two = launch("command", *words, "--out", str(tmp_path / "two"))
    assert two.returncode == 0 and two.stdout.count("report:") == 1, two.stderr
    stage = {"distill": "bk", "iterations": 4, "batch": 8, "measure": False, "check_every": 2, "save_dtype": "float32"}
    distill(tmp_path / "one", text(stage | settings | {"accumulate": 4}, model=student))
    before, a, b = (weights(tmp_path / name) for name in ("pruned", "one", "two"))
    moved = sum((a[k] - before[k].float()).square().sum() for k in a).sqrt()
    missed = sum((a[k] - b[k]).square().sum() for k in a).sqrt()
    assert missed < 1e-3 * moved, (missed, moved)
    for one_line, two_line in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one_line == pytest.approx(two_line, rel=1e-5, abs=1e-6)
    checks = [
        [check["value"] for check in json.loads((tmp_path / n / "report.json").read_text())["checks"]] for n in ("one", "two")
    ]
    assert checks[0] == pytest.approx(checks[1], rel=1e-5)
    for found in facts(tmp_path / "two"):
        assert found["dtensors"] and found["names"] and 0.45 < found["weights"] < 0.55


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "FSDP_VERSION",
            "1",
            "accelerate launch --fsdp_version 1: not supported here. Launch with --use_fsdp --fsdp_version 2",
        ),
        ("FSDP_OFFLOAD_PARAMS", "true", "start more processes"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--set checkpointing=true"),
    ],
)
def test_launches_that_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    for key, word in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(key, word)
    with pytest.raises(UserError) as caught:
        processes.spread.__wrapped__()
    assert said in str(caught.value)


def test_room_is_counted_in_shares() -> None:
    _teaching.check_room(2_600_000_000, 2_600_000_000, "float16", 48 * 2**30, "cuda", 2)  # 24.2 + 9.7 + 4.8 GiB
    with pytest.raises(UserError, match=r"the student needs 33.9 GiB.*over more devices.*--use_fsdp --fsdp_version 2"):
        _teaching.check_room(2_600_000_000, 2_600_000_000, "float16", 24 * 2**30, "cuda", 2)


def program(kind: str, *words: str) -> None:
    """In each process of a launch. KILL: the training that ends with the first line of its log."""
    _loop.SAVE_SECONDS = 0.0
    run, log = _loop.Trainer.run, _loop.Trainer._log

    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = run(self, *args, **kwargs)
        (self.folder / f"facts-{processes.rank()}.json").write_text(json.dumps(measured(self)))
        return outcome

    def dying(self: Any, values: dict[str, float], at: int) -> None:
        log(self, values, at)
        if at == 13 and self.folder.name == os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)

    _loop.Trainer.run, _loop.Trainer._log = telling, dying  # type: ignore[method-assign]
    if kind == "command":
        from lissom.cli.app import app

        export._verify = lambda *args, **kwargs: 0.0
        sys.argv = ["lissom", *words]
        app()
        return
    assert processes.spread()
    for case in words[1:]:
        (Path(words[0]) / case).mkdir(exist_ok=True)
        trained(Path(words[0]) / case, case, spread=True)


def measured(made: Any) -> dict[str, Any]:
    """What this process holds, as shares of the whole."""
    from torch.distributed.tensor import DTensor

    def part(tensors: list[Any]) -> float:
        return sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)

    parameters, student = list(made.learner.parameters()), made.pairing.student
    moments = [one["exp_avg"] for one in made.optimizer.state_dict()["state"].values()]
    return {
        "dtensors": all(isinstance(p, DTensor) for p in parameters),
        "weights": part(parameters),
        "moments": part(moments),
        "average": part(made.average.shadow_params) if made.average is not None else None,
        "names": [type(m).__name__ for m in made.learner.modules()] == [type(m).__name__ for m in student.modules()],
        "student_bytes": sum(p.untyped_storage().nbytes() for p in student.parameters()),
    }


if __name__ == "__main__":
    program(*sys.argv[1:])
    processes.end()
