"""Shared prefixes in files: the same bits as a cold run, across processes, and never anything from a damaged file."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from lissom.core.candidate import Seeds
from lissom.core.conditions import UNCONDITIONAL
from lissom.core.driving import Memo
from lissom.core.driving.memo_files import Files
from lissom.core.sampling import Sampler
from lissom.tests.core import tiny
from lissom.tests.core.test_driving_memo import FIRST, SECOND, SKIPS, plan, run

NAME = "ab" * 32
CPU = torch.device("cpu")

CHILD = """
import json, sys
from pathlib import Path
from lissom.core.driving import Memo
from lissom.core.driving.memo_files import Files
from lissom.tests.core import tiny
from lissom.tests.core.test_driving_memo import FIRST, SECOND, plan, run
import torch
torch.set_num_threads(1)
times = {"first": FIRST, "second": SECOND}[sys.argv[2]]
state = run("sd", plan(tiny.shared("sd").scheduler, times), Memo(files=Files(Path(sys.argv[1]))))
print(json.dumps([state.calls, state.served, state.last.double().sum().item().hex()]))
"""


def memo(folder: Path, **options: Any) -> Memo:
    return Memo(files=Files(folder, **options))


def results(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_warm_equals_cold(family: str, tmp_path: Path) -> None:
    scheduler = tiny.shared(family).scheduler
    cold = run(family, plan(scheduler, SECOND))
    run(family, plan(scheduler, FIRST), memo(tmp_path))
    warm = run(family, plan(scheduler, SECOND), memo(tmp_path))
    assert (warm.calls, warm.served) == (2, 3) and torch.equal(warm.last, cold.last)
    again = run(family, plan(scheduler, SECOND), memo(tmp_path))
    assert (again.calls, again.served) == (0, 5) and torch.equal(again.last, cold.last)


def test_two_processes_share(tmp_path: Path) -> None:
    found = []
    for folder, times in ((tmp_path / "cold", "second"), (tmp_path / "shared", "first"), (tmp_path / "shared", "second")):
        made = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), times], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        found.append(json.loads(made.stdout.splitlines()[-1]))
    (cold_calls, _, cold), (calls, served, _), (warm_calls, warm_served, warm) = found
    assert (cold_calls, calls, served) == (5, 5, 0)
    assert (warm_calls, warm_served) == (2, 3) and warm == cold


def test_skips_and_length_are_part_of_the_name(tmp_path: Path) -> None:
    scheduler, layer = tiny.shared("sd").scheduler, SKIPS["sd"]
    run("sd", plan(scheduler, FIRST, {1: layer}), memo(tmp_path))
    assert run("sd", plan(scheduler, FIRST), memo(tmp_path)).served == 1
    ahead = DPMSolverMultistepScheduler(solver_order=3)
    run("sd", plan(ahead, FIRST), memo(tmp_path))
    assert run("sd", plan(ahead, (*FIRST, 9.0, 4.0)), memo(tmp_path)).served == 0


def test_other_inputs_or_context_are_a_miss(tmp_path: Path) -> None:
    scheduler = tiny.shared("sd").scheduler
    run("sd", plan(scheduler, FIRST), memo(tmp_path))
    for changes in ({"first_seed": 7}, {"prompt": ["a bag", "a shoe"]}, {"guidance_scale": 2.0}):
        cold = run("sd", plan(scheduler, FIRST), **changes)
        warm = run("sd", plan(scheduler, FIRST), memo(tmp_path), **changes)
        assert torch.equal(warm.last, cold.last) and warm.served <= 1
    files, inputs, module = Files(tmp_path), ((torch.zeros(2),), {"scale": 1.0}), torch.nn.Identity()
    assert files.name(["a"], inputs, module) == files.name(["a"], inputs, module) != files.name(["b"], inputs, module)
    for other in (
        ((torch.zeros(2),), {"scale": 1}),
        ((-torch.zeros(2),), {"scale": 1.0}),
        ((torch.zeros(1, 2),), {"scale": 1.0}),
    ):
        assert files.name(["a"], inputs, module) != files.name(["a"], other, module)
    assert files.name(["a"], ((object(),), {}), module) is None


def _truncated(content: bytes) -> bytes:
    return content[:-7]


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _zeroed(content: bytes) -> bytes:
    return content[:-64] + bytes(64)


def _foreign(content: bytes) -> bytes:
    return content.replace(b"diffusers.models", b"somewhere.models")


@pytest.mark.parametrize("damage", [_truncated, _flipped, _zeroed, _foreign, lambda _: b"", lambda _: b"no such thing"])
def test_damaged_files_are_misses_and_go(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    files, output = Files(tmp_path), UNet2DConditionOutput(sample=torch.randn(2, 4, 8, 8))
    files.put(NAME, output)
    assert torch.equal(files.get(NAME, CPU).sample, output.sample)
    (path,) = results(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert files.get(NAME, CPU) is None and not results(tmp_path)


def test_a_file_under_another_name_is_a_miss(tmp_path: Path) -> None:
    files, other = Files(tmp_path), "ac" * 32
    files.put(NAME, torch.zeros(3))
    (path,) = results(tmp_path)
    (tmp_path / "ac").mkdir()
    path.rename(tmp_path / "ac" / f"{other}.safetensors")
    assert files.get(other, CPU) is None


def test_structures_come_back_as_they_were(tmp_path: Path) -> None:
    files, wide = Files(tmp_path), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    output = {
        "a": (wide, None, 3),
        "b": [torch.zeros(0), torch.tensor(1.5, dtype=torch.bfloat16)],
        "c": (wide[:, :1], "x", 0.5),
    }
    files.put(NAME, output)
    back = files.get(NAME, CPU)
    assert back["a"][1:] == (None, 3) and back["c"][1:] == ("x", 0.5) and type(back["b"]) is list
    assert torch.equal(back["a"][0], wide) and back["a"][0].stride() == wide.stride()
    assert torch.equal(back["c"][0], wide[:, :1]) and back["b"][1].dtype == torch.bfloat16 and back["b"][0].shape == (0,)


@pytest.mark.parametrize("odd", [object(), {1: torch.zeros(1)}, (torch.zeros(1), float("nan")), torch.zeros(1).expand(3)])
def test_what_has_no_plain_form_is_not_stored(odd: Any, tmp_path: Path) -> None:
    Files(tmp_path).put(NAME, odd)
    assert not results(tmp_path)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    files, names = Files(tmp_path, limit=100_000), [f"{i:02x}" * 32 for i in range(40)]
    for i, name in enumerate(names):
        files.put(name, torch.full((1000,), float(i)))
        os.utime(files._path(name), (i, i))
        if i > 3:
            assert files.get(names[0], CPU) is not None  # a hit makes it new
            os.utime(files._path(names[0]), (i + 0.5, i + 0.5))
    assert sum(path.stat().st_size for path in results(tmp_path)) <= 100_000
    assert files.get(names[-1], CPU) is not None and files.get(names[1], CPU) is None
    before = len(results(tmp_path))
    files.put(NAME, torch.zeros(20_000))  # would push out most others
    assert len(results(tmp_path)) == before


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    own, torn, fresh = tmp_path / "unet" / "model.safetensors", tmp_path / "00" / f".{'0' * 16}.lissom", tmp_path / "00" / "x"
    for path in (own, torn, fresh):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(200_000))
        os.utime(path, (1, 1))
    files = Files(tmp_path, limit=100_000)
    for i in range(30):
        files.put(f"{i:02x}" * 32, torch.zeros(1000))
    assert own.exists() and fresh.exists() and not torn.exists()  # what a killed process was writing is removed


def test_a_folder_that_cannot_be_used_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    scheduler = tiny.shared("dit").scheduler
    cold = run("dit", plan(scheduler, FIRST))
    began = time.monotonic()
    state = run("dit", plan(scheduler, FIRST), memo(tmp_path / "file"))
    assert state.calls == 5 and torch.equal(state.last, cold.last) and time.monotonic() - began < 60


def test_a_sampler_names_its_weights(tmp_path: Path) -> None:
    pipe = tiny.shared("ddim")
    with pytest.raises(ValueError, match="fingerprint"):
        Sampler(pipe, UNCONDITIONAL, memo=memo(tmp_path))
    seeds = Seeds(role="search", base=0, count=2)
    made = []
    for fingerprint in ("one", "one", "two"):
        drawn = Sampler(pipe, UNCONDITIONAL, memo=memo(tmp_path), fingerprint=fingerprint)
        list(drawn.images(plan(pipe.scheduler, FIRST), seeds))
        made.append((drawn.calls, drawn.served))
    assert made == [(5, 0), (0, 5), (5, 0)]
