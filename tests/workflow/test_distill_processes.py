"""Several processes that train together, started as users start them, give what one gives with accumulation."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lissom.tests.workflow.test_distill import PRUNE, distill, lines, text, weights


def command(*words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "lissom.cli.app"]
    if processes > 1:
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
        ]
        start = [sys.executable, *launch, "-m", "lissom.cli.app"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *words], capture_output=True, text=True, env=environment, timeout=400, check=False)


def test_two_processes_learn_what_one_learns_in_two_parts(tmp_path: Path) -> None:
    distill(tmp_path / "pruned", text(PRUNE))
    student = str(tmp_path / "pruned" / "model")
    words = [
        "distill",
        "bk",
        student,
        "--iterations",
        "4",
        "--batch",
        "8",
        "--no-measure",
        "--save-dtype",
        "float32",
        "--device",
        "cpu",
    ]
    words += ["--set", "images=10", "--set", "data_steps=2", "--check-every", "2", "-q"]
    one = command(*words, "--set", "accumulate=2", "--out", str(tmp_path / "one"))
    two = command(*words, "--out", str(tmp_path / "two"), processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert two.stdout.count("report:") == 1  # the first says what there is to say
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    before = weights(tmp_path / "pruned")
    moved = max((a[k] - before[k].float()).abs().max().item() for k in a)
    apart = max((a[k] - b[k]).abs().max().item() for k in a)
    assert apart < 0.02 * moved, (apart, moved)  # AdamW makes steps of the same size of the smallest gradients too
    for one_line, two_line in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        torch.testing.assert_close(_numbers(one_line), _numbers(two_line), rtol=1e-5, atol=1e-6)
    refused = command(*words, "--set", "batch=5", "--out", str(tmp_path / "three"), processes=2)
    assert refused.returncode != 0 and "batch 5: cannot be split evenly over 2 processes" in refused.stderr


def _numbers(line: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([float(v) for v in line.values()], dtype=torch.float64)
