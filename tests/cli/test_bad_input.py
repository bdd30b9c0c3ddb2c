"""Bad input: one sentence that names the file, the value and what to do, no traceback, nothing left behind."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lissom.tests.cli.commands import TINY, lissom, nothing_left, refused
from lissom.tests.workflow import small


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "steps: input should be greater than or equal to 1, got 0"),
        (["--steps", "-3"], "steps: input should be greater than or equal to 1, got -3"),
        (["--steps", "1001"], "--steps 1001: DDIMScheduler was trained with 1000 timesteps; give at most that many"),
        (["--set", "popultion=4"], "unknown key. Known here: search, steps"),
        (["--set", "population=2"], "population: input should be greater than or equal to 4, got 2"),
        (["--set", "population=many"], "population: input should be a valid integer"),
        (["--set", "population"], "write it as key=value"),
        (["--metrics", "fid,acuracy"], "no method 'acuracy' in evaluate/"),
        (["--metrics", "fid"], "fid alone is what the search optimises"),
        (["--features", "zoo:juge"], "Did you mean 'zoo:judge'"),
        (["--reference", "nowhere"], "nowhere: no such folder or file"),
        (["--reference", "one"], "one: 1 image in it, a reference needs at least 2"),
        (["--scheduler", "PNDMScheduler"], "cannot follow a plan with PNDMScheduler"),
        (["--scheduler", "DDIM"], "scheduler DDIM: diffusers has no such class"),
        (["--budget", "macs=1.5"], "budget macs=1.5: must be above 0 and at most 1"),
        (["--budget", "flops=0.5"], "input should be 'macs', 'latency' or 'params', got 'flops'"),
        (["--budget", "params=0.5"], "params: nothing in the space removes parameters. Add cuts to it"),
        (
            ["--budget", "macs=0.001"],
            "the cheapest candidate, which skips all 38 layers that can be skipped in every step, still costs",
        ),
        (["--space", "skips"], "space must contain timesteps"),
        (["--objective", "energy"], "objective 'energy' is not among what is measured, fid, clip_score, nor a cost"),
        (["--objective", "fid", "--objective", "latency:cuda"], "Costs are those of the machine that searches"),
        (["--objective", "macs"], "a cost alone is least for a model that does nothing. Name a metric first"),
        (["--warm-start", "nowhere"], "no report of a finished search there"),
        (["--prompts", "absent.txt"], "absent.txt: cannot read the prompts"),
        (["--call", "guidance=3"], "call.guidance: StableDiffusionPipeline takes no such argument"),
        (["--call", "guidance_scale=high"], "StableDiffusionPipeline refuses what it is given (TypeError"),
        (["--device", "tpu7"], "--device tpu7: cannot be used here"),
        (["--dtype", "int8"], "--dtype int8: unknown"),
        (["--storage", "trials.db"], "--storage trials.db: not a storage URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_search_that_cannot_be_is_refused_and_leaves_nothing(here: Path, words: list[str], says: str) -> None:
    from PIL import Image

    (here / "one").mkdir()
    Image.new("RGB", (8, 8)).save(here / "one" / "a.png")
    said = refused("search", "autodiffusion", "zoo:fashion", "--device", "cpu", "--out", "run", *words)
    assert says in said and len(said.splitlines()) == 1, said
    assert nothing_left(here, "one")


@pytest.mark.parametrize(
    ("method", "model", "says", "code"),
    [
        (
            "evolution",
            "zoo:fashion",
            "no method 'evolution' in search/; there are autodiffusion, bayes, cmaes, nsga2, random_search, t_stitch",
            2,
        ),
        ("os.path", "zoo:fashion", "the module has no Config", 2),
        ("random_search", "zoo:fashin", "there are zoo:fashion, zoo:fashion-dit. Did you mean 'zoo:fashion'", 2),
        ("random_search", "./nowhere", "./nowhere: no such folder", 2),
        ("random_search", "owner/unknown-model", "owner/unknown-model: not a folder here, not in the cache", 5),
    ],
)
def test_an_unknown_method_or_model_is_refused_before_anything(
    here: Path, method: str, model: str, says: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused("search", method, model, "--out", "run", code=code)
    assert says in said and len(said.splitlines()) == 1 and nothing_left(here)


def test_a_folder_that_cannot_be_written_is_named(here: Path) -> None:
    (here / "file").write_text("kept")
    for out in ("file", "file/run"):
        said = refused("search", "random_search", "zoo:fashion", *TINY, "--out", out)
        assert f"{out}" in said and "Choose another --out folder" in said
    for command in (("evaluate", "zoo:fashion"), ("sample", "zoo:fashion")):
        assert "file/x.json: cannot be written" in refused(*command, "--out", "file/x.json")
        assert "is a folder" in refused(*command, "--out", here)
    assert nothing_left(here, "file") and (here / "file").read_text() == "kept"


def test_a_folder_that_is_not_empty_needs_resume(here: Path, pretended: None) -> None:
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("mine")
    start = ("search", "random_search", "zoo:fashion", *TINY, "--out", "run")
    assert "run: is not empty. Add --resume" in refused(*start)
    assert nothing_left(here / "run", "notes.txt")
    assert lissom(*start, "--resume").exit_code == 0 and (here / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [b"garbage\n", b'{"op_code": 77}\n{"op_code": 77}\n'])
def test_a_journal_that_is_none_is_named_and_kept(here: Path, finished: Path, content: bytes) -> None:
    run = Path(shutil.copytree(finished, here / "run"))
    (run / "lissom.json").unlink()
    (run / "trials.journal").write_bytes(content)
    for command in (("run", "run"), ("report", "run")):
        assert "run/trials.journal: " in refused(*command)
    assert (run / "trials.journal").read_bytes() == content


def test_a_torn_journal_is_mended(here: Path, finished: Path) -> None:
    run = Path(shutil.copytree(finished, here / "whole"))
    (run / "lissom.json").unlink()
    with (run / "trials.journal").open("ab") as f:
        f.write(b'{"op_code":5,"wor')
    ended = lissom("run", "whole", "-q")
    assert ended.exit_code == 0 and (run / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


@pytest.mark.parametrize("command", ["report", "run"])
def test_a_folder_that_is_no_run_is_named(here: Path, command: str) -> None:
    (here / "empty").mkdir()
    assert "empty/recipe.yaml: cannot read the recipe" in refused(command, "empty")
    (here / "empty" / "recipe.yaml").write_text("lissom: 1\nmodel: zoo:fashion\nstages: [{search: random_search}]\n")
    assert "environment.json: cannot be read" in refused(command, "empty")
    assert "no such" in refused("run", "absent") and "absent" in refused("report", "absent")


PLAN = {"scheduler": {"name": "DDIMScheduler"}, "steps": [{"timestep": 900}, {"timestep": 100}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the plan"),
        (b"\xff\xfe\x00", "cannot read the plan (it is not text)"),
        (b"{", "not a plan"),
        (json.dumps(PLAN | {"stepz": 1}).encode(), "stepz: Extra inputs"),
        (json.dumps(PLAN | {"steps": [{"timestep": 1}, {"timestep": 9}]}).encode(), "must strictly descend"),
        (json.dumps(PLAN | {"steps": [{"timestep": 1200}]}).encode(), "timesteps from 0 to 999"),
        (json.dumps(PLAN | {"scheduler": {"name": "PNDMScheduler"}}).encode(), "PNDMScheduler"),
        (
            json.dumps(PLAN | {"steps": [{"timestep": 9, "skip": ["transformer_blocks.3"]}]}).encode(),
            "unet has no layer 'transformer_blocks.3'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_a_plan_that_does_not_fit_is_refused_before_any_image(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str, content: bytes | None, says: str
) -> None:
    monkeypatch.setattr("lissom.workflow._subject.Subject.views", lambda *a: pytest.fail("made a reference"))
    if content is not None:
        (here / "p.json").write_bytes(content)
    said = refused(command, "zoo:fashion", "--plan", "p.json", "--device", "cpu", "--out", "made.json")
    assert says in said and len(said.splitlines()) == 1, said
    assert nothing_left(here, *(["p.json"] if content is not None else []))


def test_sequential_offload_needs_an_accelerator(here: Path) -> None:
    said = refused("evaluate", "zoo:fashion", "--steps", 1, "--device", "cpu", "--offload", "sequential", "-q")
    assert "--offload sequential: there is no accelerator here" in said and nothing_left(here)


def test_more_steps_than_the_scheduler_has(here: Path) -> None:
    for command in ("evaluate", "sample"):
        assert "--steps 1001: DDIMScheduler was trained with 1000" in refused(command, "zoo:fashion", "--steps", 1001)
    assert nothing_left(here)


def test_prompts_for_a_model_that_takes_classes(here: Path) -> None:
    said = refused("sample", "zoo:fashion-dit", "--prompt", "a bag", "--device", "cpu")
    assert "DiTPipeline takes no 'prompt'; it is told what to paint by class_labels" in said
    (here / "p.jsonl").write_text('{"class_labels": 99999}\n')
    said = refused("sample", "zoo:fashion-dit", "--prompts", "p.jsonl", "--steps", 1, "--device", "cpu")
    assert "DiTPipeline refuses what it is given (IndexError" in said


def test_a_full_disk_ends_with_1_and_can_be_resumed(here: Path, pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    start = ("search", "random_search", "zoo:fashion", *TINY, "--out", "run")
    real, calls = os.fsync, 0

    def sometimes(fd: int) -> None:
        nonlocal calls
        calls += 1
        return real(fd) if calls < 60 else full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sometimes)
        said = refused(*start, "-q", code=1)
    assert "run/trials.journal: cannot be written (No space left on device). Free space and go on with --resume." in said
    assert lissom(*start, "--resume").exit_code == 0
    assert set(small.evaluated(here / "run").values()) == {1}


def test_an_internal_error_says_where_and_shows_a_traceback_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("lissom.workflow.inspection.inspect", broken)
    brief, long = lissom("inspect", "zoo:fashion"), lissom("inspect", "zoo:fashion", "-v")
    for ended in (brief, long):
        assert ended.exit_code == 1 and "internal error: ZeroDivisionError: by zero (at " in ended.stderr
    assert "Traceback" not in brief.stderr and "Traceback" in long.stderr
