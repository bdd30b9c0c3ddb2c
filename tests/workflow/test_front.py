"""Searches of several objectives and of cuts, end to end: the front, what is picked of it, and the model that is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from lissom.core import artifact, models
from lissom.core.candidate import Candidate, SamplingPlan, Seeds
from lissom.core.errors import UserError
from lissom.core.measurement import Measurement
from lissom.tests.workflow import small
from lissom.workflow import _searched
from lissom.workflow._elites import parts
from lissom.workflow._evaluator import Evaluator, Score

NSGA2: dict[str, Any] = {"search": "nsga2", "objective": ["fid", "macs"], "trials": 12, "rescore": 5, "population": 4}


def trading(self: Any, plan: Any, seeds: Seeds, **extra: Any) -> Score:
    """As `small.pretended`, but every skipped layer costs quality: there is something to trade."""
    score = small.pretended(self, plan, seeds, **extra)
    fid, *others = score.measurements
    worse: Measurement = fid.model_copy(update={"value": fid.value + 0.3 * sum(len(step.skip) for step in plan.steps)})
    return Score((worse, *others), score.calls, score.plain_calls, score.seconds)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "score", trading)


def front_text(model: str = "zoo:fashion-dit", **stage: Any) -> str:
    return small.text(model, **{k: v for k, v in (NSGA2 | stage).items()})


def test_a_front_is_reported_and_another_member_is_picked_without_scoring_anything(tmp_path: Path, pretended: None) -> None:
    run = tmp_path / "run"
    small.search(run, front_text())
    found, done = small.report(run), small.results(run)
    members = found["front"]
    assert found["objectives"] == ["fid", "macs"] and 2 <= len(members) <= 6
    assert [m["name"] for m in members] == [str(n) for n in range(1, len(members) + 1)]
    values = [(m["rescored"]["value"], m["macs_ratio"]) for m in members]
    assert values == sorted(values) and [macs for _, macs in values] == sorted((macs for _, macs in values), reverse=True)
    assert found["winner"]["plan"] == members[found["picked"] - 1]["plan"]
    for number in range(1, len(members) + 1):
        small.search(run, front_text(pick=number), resume=True)
        again = small.report(run)
        assert (again["picked"], again["winner"]["plan"]) == (number, members[number - 1]["plan"])
        assert artifact.read_plan(run) == SamplingPlan.model_validate(members[number - 1]["plan"])
        assert [m["plan"] for m in again["front"]] == [m["plan"] for m in members]
        new = {c.digest() for c in parts(Candidate(plan=artifact.read_plan(run))).values()}
        assert small.results(run) - done <= len(new)  # at most the parts of the one that is picked now
        done = small.results(run)
    with pytest.raises(UserError, match=rf"pick: 99: there are {len(members)} members of the front, counted from 1"):
        small.search(run, front_text(pick=99), resume=True)
    with pytest.raises(UserError, match="holds the run of another recipe"):
        small.search(run, front_text(trials=13), resume=True)


def test_killed_while_another_member_is_exported_the_run_is_what_its_recipe_says(
    tmp_path: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, text = tmp_path / "run", front_text(pick=1)
    small.search(run, text)
    before = {name: (run / name).read_bytes() for name in ("plan.json", "recipe.yaml")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_searched.artifact, "save", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        small.search(run, front_text(pick=2), resume=True)
    small.search(run, text, resume=True)  # not "finished already": the reports were the other one's
    assert {name: (run / name).read_bytes() for name in before} == before and small.report(run)["picked"] == 1
    with pytest.raises(UserError, match="pick: 99"):
        small.search(run, front_text(pick=99), resume=True)
    assert (run / "recipe.yaml").read_bytes() == before["recipe.yaml"]


def test_a_budget_that_the_fixed_schedules_break_does_not_hide_them_from_the_choice(tmp_path: Path, pretended: None) -> None:
    small.search(tmp_path / "run", front_text(budget={"macs": 0.97}, trials=16, rescore=8))
    found = small.report(tmp_path / "run")
    assert all(m["macs_ratio"] <= 0.97 for m in found["front"])
    again = small.studies(tmp_path / "run")["rescore"]
    assert any(json.loads(t.user_attrs["request"])["costs"]["macs"] == 1 for t in again)  # it was scored again, to compare with


def test_a_later_stage_keeps_an_earlier_one_from_picking_anew(tmp_path: Path, pretended: None) -> None:
    recipe = json.loads(front_text())
    recipe["stages"].append(recipe["stages"][0])
    picked = json.loads(json.dumps(recipe))
    picked["stages"][0]["pick"] = 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="stage 1 picks another member, but the stages after it were made from the earlier one"):
        small.search(tmp_path / "run", json.dumps(picked), resume=True)


def test_of_one_objective_the_elites_can_be_picked(tmp_path: Path, pretended: None) -> None:
    small.search(tmp_path / "run", small.text("zoo:fashion-dit", pick=2))
    found = small.report(tmp_path / "run")
    values = [m["rescored"]["value"] for m in found["front"]]
    assert found["picked"] == 2 and values == sorted(values) and found["winner"]["plan"] == found["front"][1]["plan"]


def liking_cuts(self: Any, plan: Any, seeds: Seeds, *, cuts: Any = (), **extra: Any) -> Score:
    """As `small.pretended`, but every cut makes a candidate better, so that one with cuts wins."""
    score = small.pretended(self, plan, seeds, **{k: v for k, v in extra.items() if k != "replicates"})
    fid, *others = score.measurements
    better: Measurement = fid.model_copy(update={"value": fid.value - 0.5 * len(cuts) + 10})
    return Score((better, *others), score.calls, score.plain_calls, score.seconds)


@pytest.mark.parametrize("model", ["zoo:fashion", "zoo:fashion-dit"])
def test_the_winner_of_a_search_of_cuts_is_a_model_and_a_plan(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "score", liking_cuts)
    space = ["timesteps", "skips", "slim"] if model == "zoo:fashion" else ["timesteps", "skips", "cuts"]
    stage = {"space": space, "budget": {"macs": 0.9}, "calibration": 2, "trials": 14, "rescore": 3, "population": 6}
    run = tmp_path / "run"
    made = small.search(run, small.text(model, **stage))
    found = small.report(run)
    winner = found["winner"]
    assert winner["cuts"] and winner["macs_ratio"] <= 0.9 + 1e-9 and winner["costs"]["params"] < 1
    assert found["opens"] in ("stock", "remote_code")
    assert found["gained"][0]["part"] == "fixed" and found["gained"][-1]["part"] == "cuts"
    assert any(row["origin"].startswith("laptop") for row in found["candidates"])
    # The folder opens by itself, holds as many parameters as were counted, and the plan names its layers.
    pipe = DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=found["opens"] == "remote_code")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    whole = models.load(model, device="cpu")
    assert sum(p.numel() for p in denoiser.parameters()) == round(winner["costs"]["params"] * whole.parameters)
    plan = artifact.read_plan(run)
    assert all(denoiser.get_submodule(a) is not None for step in plan.steps for a in step.skip)
    assert artifact.read_plan(run / "model") == plan == made.plan
    # A later stage, or `lissom sample`, takes model and plan together.
    again = models.load(str(run), device="cpu")
    assert again.plan == plan and again.folder == (run / "model").resolve() and again.origin == model
    card = (run / "model" / "README.md").read_text()
    assert "cut by a search" in card and "plan.json" in card


def test_the_cut_model_paints_what_was_scored(tmp_path: Path) -> None:
    """Nothing pretended: images of the saved model along the moved plan are those of the model that was cut in memory."""
    import numpy as np
    from lissom.core.conditions import Conditions
    from lissom.core.sampling import Sampler
    from lissom.workflow._evaluator import trimmed

    stage = {"space": ["timesteps", "skips", "cuts"], "budget": {"macs": 0.8}, "calibration": 2, "trials": 8, "rescore": 2}
    run = tmp_path / "run"
    small.search(run, small.text("zoo:fashion-dit", population=4, stage_one=0.3, **stage))
    found = small.report(run)
    winner, seeds = (
        Candidate.model_validate({k: found["winner"][k] for k in ("plan", "cuts")}),
        Seeds(role="report", base=0, count=4),
    )

    def drawn(model: Any, plan: Any, cuts: Any = ()) -> Any:
        assert isinstance(model.conditions, Conditions)
        sampler = Sampler(model.pipe, model.conditions, call=json.loads((model.folder / "call.json").read_text()))
        with trimmed(model, sampler, plan, cuts) as moved, torch.no_grad():
            return np.concatenate([b.pixels.numpy() for b in sampler.images(moved, seeds) if b.pixels is not None]).astype(int)

    whole, cut = models.load("zoo:fashion-dit", device="cpu"), models.load(str(run), device="cpu", trust_remote_code=True)
    assert winner.cuts
    assert np.abs(drawn(whole, winner.plan, winner.cuts) - drawn(cut, cut.plan)).max() <= 1
    shutil.rmtree(run / "model")
