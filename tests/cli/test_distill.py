"""`lissom distill` as users type it: help, refusals in one sentence, and what it would cost."""

import json
from pathlib import Path

import pytest
from lissom.tests.cli.commands import lissom, refused


def test_help_shows_what_a_preset_sums() -> None:
    shown = lissom("distill", "laptop", "--help")
    assert shown.exit_code == 0 and "LAPTOP-Diff" in shown.output
    assert "normalized_features" in shown.output and "weight 1" in shown.output
    assert "weight 1" not in lissom("distill", "--help").output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("lapto", "zoo:fashion"),
            "no preset 'lapto' of losses; there are bk, laptop, koala, tinyfusion. Did you mean 'laptop'?",
        ),
        (
            ("bk", "zoo:fashion"),
            "nothing says what it was pruned from, so that its teacher is not known. Give --teacher MODEL.",
        ),
        (("bk", "zoo:fashion", "--set", "losses={output: 1, featurs: 1}"), "losses.featurs: no method 'featurs' in distill/"),
        (("bk", "zoo:fashion", "--set", "losses={features: {weight: 1, at: places}}"), "losses.features: features: at:"),
        (("bk", "zoo:fashion", "--set", "losses={output: 0}"), "losses: output: its weight must be a number above 0, got 0"),
        (("bk", "zoo:fashion", "--set", "iteration=5"), "iteration: unknown key"),
        (("bk", "zoo:fashion", "--patience", "2"), "patience: without check_every there is nothing that could improve"),
        (("bk", "zoo:fashion", "--learning-rate", "0"), "learning_rate:"),
        (("bk", "zoo:nothing"), "zoo:nothing: no such embedded model"),
    ],
)
def test_mistakes_are_one_sentence(words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused("distill", *words, "--device", "cpu", "--out", "run")
    assert says in said and not (tmp_path / "run").exists(), said


def test_several_processes_have_to_be_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out: name a folder" in refused("distill", "bk", "zoo:fashion", "--teacher", "zoo:fashion")
    said = refused("prune", "magnitude", "zoo:fashion", "--out", "x")
    assert "2 processes: only a distill stage is shared by several" in said


def test_a_dry_run_says_what_it_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("distill", "bk", "zoo:fashion-dit", "--teacher", "zoo:fashion-dit", "--iterations", "7", "--device", "cpu")
    found = json.loads(lissom(*words, "--dry-run", "--json").stdout)["stages"][0]
    assert found["samples"] == 7 * 64 and found["teacher"] == "zoo:fashion-dit" and found["teacher_images"] == 1024
    assert not (tmp_path / "runs").exists()
