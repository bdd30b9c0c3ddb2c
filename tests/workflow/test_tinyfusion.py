"""Learned depth from a recipe to a smaller model: on the embedded transformer and on tiny ones, killed and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from lissom.core import artifact
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.report.prune_schema import PruneReport
from lissom.tests.workflow import small
from lissom.workflow.context import Context, Options
from lissom.workflow.describe import estimate, say
from lissom.workflow.run import run
from safetensors import safe_open

STAGE: dict[str, Any] = {
    "prune": "tinyfusion", "structure": "1:2", "iterations": 4, "batch": 4, "images": 6, "data_steps": 2, "rank": 2,
    "measure": False, "latency_batches": [],
}  # fmt: skip


def text(model: str = "zoo:fashion-dit", **stage: Any) -> str:
    stages = [{key: value for key, value in {**STAGE, **stage}.items() if value is not None}]
    return json.dumps({"lissom": 1, "model": model, "stages": stages})


def prune(out: Path, recipe: str, progress: Any = None, options: Options | None = None, *, resume: bool = False) -> PruneReport:
    context = Context(parse(recipe, "r"), out.parent, options or Options(device="cpu"), progress or small.Watched())
    run(context.recipe, recipe, out, context, resume=resume, single=True)
    return PruneReport.model_validate_json((out / "report.json").read_text())


def test_half_of_the_blocks_go_and_the_report_says_how_sure_that_is(tmp_path: Path) -> None:
    found = prune(tmp_path / "run", text())
    gone = sorted(int(cut.address.rpartition(".")[2]) for cut in found.cuts)
    assert len(gone) == 6 and all(i // 2 == k for k, i in enumerate(gone)) and found.opens_plain and found.keep is None
    chances = {layer.address: layer.score for layer in found.layers}
    assert found.score_label == "learned chance to stay" and sum(score or 0.0 for score in chances.values()) == pytest.approx(
        6.0
    )
    assert found.calibration["images"] == 6 and found.spent["learning_steps"] == 4 and found.loss is not None and found.loss > 0
    made = artifact.manifest(tmp_path / "run")
    assert made is not None and made.cuts == found.cuts and not (tmp_path / "run" / "learning.pt").exists()
    with safe_open(tmp_path / "run" / "gates.safetensors", framework="pt") as file:
        assert len(json.loads(file.metadata()["groups"])) == 6 and file.get_tensor("group 5").shape == (2,)


def test_a_target_says_how_many_go(tmp_path: Path) -> None:
    found = prune(tmp_path / "run", text(structure=None, keep=0.8, iterations=1))
    assert found.after.params <= 0.8 * found.before.params and found.after.params > 0.7 * found.before.params


def test_a_killed_run_decides_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    straight = prune(tmp_path / "straight", text())

    with pytest.raises(small.Killed):
        prune(tmp_path / "killed", text(), small.Dying())
    assert (tmp_path / "killed" / "learning.pt").is_file()
    again = prune(tmp_path / "killed", text(), resume=True)
    assert again.cuts == straight.cuts and again.spent["learning_steps"] < 4
    assert [layer.score for layer in again.layers] == [layer.score for layer in straight.layers]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"structure": "1:5"}, "structure 1:5: does not divide the 12 blocks"),
        ({"structure": "3:2"}, "write N:M, N blocks of M that stay"),
        ({"keep": 0.5}, "structure says how many blocks stay"),
        ({"structure": None, "keep": 0.01}, "cannot be reached; the cuts hold"),
        ({"times": 4}, "learns from samples of its own"),
        ({"calibration": 4}, "learns from samples of its own"),
    ],
)
def test_what_cannot_be_learned(stage: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        prune(tmp_path / "run", text(**stage))


def test_models_without_blocks_and_machines_that_cannot_learn(tmp_path: Path) -> None:
    from lissom.tests.core import tiny

    tiny.ddpm().save_pretrained(tmp_path / "pixels")
    with pytest.raises(UserError, match="has no transformer blocks, of which some could stay"):
        prune(tmp_path / "run", text(str(tmp_path / "pixels")))
    for options, words in (
        (Options(device="cpu", dtype="float16"), "--dtype float16"),
        (Options(device="cpu", offload="model"), "--offload model"),
    ):
        with pytest.raises(UserError, match=words):
            prune(tmp_path / "run", text(), options=options)


def test_an_estimate_learns_nothing(tmp_path: Path) -> None:
    context = Context(parse(text(), "r"), tmp_path, Options(device="cpu"))
    (stage,) = estimate(context.recipe, context)["stages"]
    assert stage["denoiser_forwards"] == 6 * 2 + 16 and stage["denoiser_backwards"] == 16
    assert "4 steps of 4 samples learn which of 12 layers stay" in say({"stages": [stage], "recipe": "r"})
