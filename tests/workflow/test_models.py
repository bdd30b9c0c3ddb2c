"""Other models in a plan, from a recipe to what can be evaluated, pruned and reproduced afterwards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lissom.core import artifact, models
from lissom.core.artifact import read_plan
from lissom.core.candidate import SamplingPlan, Scheduler, Seeds, Step
from lissom.core.driving import CannotFollow, follow
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.search._space import Price, Space
from lissom.tests.workflow import small
from lissom.workflow import _identity, _opening
from lissom.workflow._evaluation import Asked, evaluate
from lissom.workflow._evaluator import Evaluator
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options
from lissom.workflow.evaluate import lone
from lissom.workflow.run import run

SPACE = ["timesteps", "models"]
CPU = Options(device="cpu")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller sister of zoo:fashion, untrained."""
    folder = tmp_path_factory.mktemp("small") / "small"
    stage = {"prune": "slim_unet", "layers_per_block": [1, 1, 1, 1], "measure": False, "latency_batches": []}
    text = json.dumps({"lissom": 1, "model": "zoo:fashion", "stages": [stage]})
    run(parse(text, "r"), text, folder, Context(parse(text, "r"), folder.parent, CPU), resume=False, single=True)
    return folder


def recipe(small_one: Path | str, **stage: Any) -> str:
    stages = [{**small.STAGE, "search": "t_stitch", "steps": 3, "space": SPACE, "population": None, **stage}]
    stages = [{key: value for key, value in stages[0].items() if value is not None}]
    made = {
        "lissom": 1,
        "model": "zoo:fashion",
        "models": {"small": str(small_one)},
        "evaluate": small.EVALUATE,
        "stages": stages,
    }
    return json.dumps(made, indent=1)


def context(folder: Path, options: Options = CPU, **fields: Any) -> Context:
    return Context(lone("zoo:fashion", evaluate={"metrics": ["fid"], "samples": 8}, **fields), folder, options)


def test_a_stitched_plan_is_searched_measured_reproduced_and_carried_on(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small.search(out, recipe(pruned, budget={"macs": 0.95}))
    found, plan = small.report(out), read_plan(out)
    assert plan.models == ("small",) and plan.steps[0].model == "small" and found["winner"]["macs_ratio"] <= 0.95
    assert [one["part"] for one in found["gained"]] == ["fixed", "timesteps", "models"]
    assert {row["origin"] for row in found["candidates"]} == {*(f"fixed: {n}" for n in names(found)), "stitched"}
    assert "model small" in found["conditions"] and "other models' steps" in (out / "report.md").read_text()
    made = artifact.manifest(out)
    assert made is not None and made.models["small"].model_hash == models.fingerprint(pruned / "model")
    # The run knows its plan's model; the script does without lissom.
    subject = Subject.load(str(out), context(tmp_path))
    seeds = Seeds(role="report", base=0, count=4)
    (images,) = subject.sampler.images(plan, seeds)
    (cold,) = Subject.load(str(out), context(tmp_path, replace(CPU, memo_mib=0))).sampler.images(plan, seeds)
    assert images.pixels is not None and cold.pixels is not None and bool((images.pixels == cold.pixels).all())
    script = (out / "reproduce.py").read_text()
    assert str(pruned / "model") in script and "lissom" not in "".join(x for x in script.splitlines() if "import" in x)
    # A smaller model made from the run keeps the plan, and who makes its steps.
    stage = {"prune": "magnitude", "keep": 0.9, "measure": False, "latency_batches": []}
    text = json.dumps({"lissom": 1, "model": str(out), "stages": [stage]})
    run(parse(text, "r"), text, tmp_path / "cut", Context(parse(text, "r"), tmp_path, CPU), resume=False, single=True)
    kept = artifact.manifest(tmp_path / "cut")
    with follow(opened := models.load(str(out), device="cpu").pipe, plan) as state:  # from Python, as the docs say
        opened(["a photo of a bag"], guidance_scale=1.0, output_type="latent")
    assert state.steps == 3
    assert kept is not None and kept.models == made.models and read_plan(tmp_path / "cut").models == ("small",)


def names(found: dict[str, Any]) -> list[str]:
    return [one["name"] for one in found["baselines"]]


@pytest.mark.parametrize("method", ["random_search", "autodiffusion"])
def test_models_are_searched_beside_skips_within_a_measured_budget(method: str, pruned: Path, tmp_path: Path) -> None:
    stage = {"search": method, "space": ["timesteps", "skips", "models"], "budget": {"macs": 0.8}, "trials": 8}
    given = {**stage, "population": 4} if method == "autodiffusion" else stage
    small.search(tmp_path / "run", recipe(pruned, **given))
    found = small.report(tmp_path / "run")
    assert found["winner"]["macs_ratio"] <= 0.8 + 1e-9


def test_latency_knows_every_model(pruned: Path, tmp_path: Path) -> None:
    small.search(tmp_path / "run", recipe(pruned, objective=["fid", "latency"]))
    (table,) = (tmp_path / "run").glob("latency-table-*.json")
    assert 0 < json.loads(table.read_text())["value"]["models"]["small"]
    assert len(small.report(tmp_path / "run")["latency"]["measured"]) == 6


def test_an_evaluation_counts_both_models_and_is_told_apart(pruned: Path, tmp_path: Path) -> None:
    steps = (Step(timestep=800, model="small"), Step(timestep=300))
    scheduler = Scheduler.of(Subject.load("zoo:fashion", context(tmp_path)).model.pipe.scheduler)
    plan = SamplingPlan(scheduler=scheduler, steps=steps)
    where = lone("zoo:fashion", evaluate={"metrics": ["fid", "params", "macs"], "samples": 8}, models={"small": str(pruned)})
    asked = Asked(ref="zoo:fashion", plan=plan, out=tmp_path / "e.json", pictures=0)
    found = evaluate(asked, Context(where, tmp_path, CPU), tmp_path)
    values = {m.metric: m.value for m in found.measurements}
    own, its = (Subject.load(ref, context(tmp_path)).model.parameters for ref in ("zoo:fashion", str(pruned)))
    assert values["params"] == own + its and found.identity["models"]["small"] and "1 of them made by small" in found.what
    whole = plan.without("model")
    plainly = evaluate(replace(asked, plan=whole, out=None), Context(where, tmp_path, CPU), tmp_path)
    assert {m.metric: m.value for m in plainly.measurements}["macs"] > values["macs"] and "models" not in plainly.identity


def test_what_cannot_make_steps_says_why(pruned: Path, tmp_path: Path) -> None:
    def refused(words: str, *, options: Options = CPU, text: str | None = None) -> None:
        with pytest.raises(UserError, match=words):
            small.search(tmp_path / "run", text or recipe(pruned), options=options)

    refused(
        "small: zoo:fashion-dit cannot make steps of zoo:fashion: it has a transformer beside", text=recipe("zoo:fashion-dit")
    )
    refused(r"models: small: \./nowhere: no such folder", text=recipe("./nowhere"))
    refused("--offload model: the plan's model small stays on the device", options=replace(CPU, offload="model"))
    refused("there is no other model that could make steps.*--models small=MODEL", text=small.text(space=SPACE))
    refused(r"t_stitch varies models: give --space timesteps,models", text=recipe(pruned, space=["timesteps"]))
    refused("t_stitch does not vary skips", text=recipe(pruned, space=["timesteps", "skips", "models"]))
    refused("which lets small make every step, still costs", text=recipe(pruned, budget={"macs": 0.1}))


def test_another_model_in_its_place_is_noticed(pruned: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(pruned, theirs)
    out = tmp_path / "run"
    small.search(out, recipe(theirs, budget={"macs": 0.9}))
    shutil.rmtree(theirs / "model")
    shutil.copytree(models.resolve("zoo:fashion")[0], theirs / "model")
    subject = Subject.load(str(out), context(tmp_path))
    with pytest.raises(UserError, match=r"the plan was found with [0-9a-f]{16}…\. Give the model of then"):
        list(subject.sampler.images(read_plan(out), Seeds(role="report", base=0, count=4)))
    known = replace(context(tmp_path), others=artifact.models_of(out))  # as --plan RUN hands them on
    with pytest.raises(UserError, match="the plan was found with"):
        list(Subject.load("zoo:fashion", known).sampler.images(read_plan(out), Seeds(role="report", base=0, count=4)))
    shutil.rmtree(theirs)
    with pytest.raises(UserError, match=r"models: small: .*no such folder.* Say where it is: --models small=MODEL"):
        list(Subject.load(str(out), context(tmp_path)).sampler.images(read_plan(out), Seeds(role="report", base=0, count=4)))
    lone_plan = Subject.load("zoo:fashion", context(tmp_path))
    with pytest.raises(CannotFollow, match="--models small=MODEL"):
        list(lone_plan.sampler.images(read_plan(out), Seeds(role="report", base=0, count=4)))


def test_a_warm_start_takes_models_over_where_the_space_has_them() -> None:
    scheduler = Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000})
    steps = (Step(timestep=900, model="small"), Step(timestep=500, model="tiny"), Step(timestep=100))
    given = SamplingPlan(scheduler=scheduler, steps=steps)
    price = Price(100.0, models={"small": 20.0})
    space = Space(scheduler, 3, 0.0, 999.0, True, {"macs": price}, models=("small",))
    assert [s.model for s in _opening.fitted(given, space).steps] == ["small", None, None]


def test_models_are_said_of_an_evaluation() -> None:
    scheduler = Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000})
    plan = SamplingPlan(scheduler=scheduler, steps=(Step(timestep=900, model="small"), Step(timestep=100)))
    assert _identity.said(plan, None) == "a plan of 2 steps (900, 100), 1 of them made by small"


def test_images_differ_from_those_of_either_model(pruned: Path, tmp_path: Path) -> None:
    subject = Subject.load("zoo:fashion", context(tmp_path, models={"small": str(pruned)}))
    alone = Subject.load(str(pruned), context(tmp_path))
    scheduler, seeds = Scheduler.of(subject.model.pipe.scheduler), Seeds(role="report", base=0, count=4)

    def images(who: Subject, *makers: str | None) -> Any:
        steps = tuple(Step(timestep=t, model=m) for t, m in zip((800, 500, 100), makers, strict=True))
        (batch,) = who.sampler.images(SamplingPlan(scheduler=scheduler, steps=steps), seeds)
        assert batch.pixels is not None
        return batch.pixels.numpy()

    assert np.array_equal(images(subject, *["small"] * 3), images(alone, None, None, None))
    stitched = images(subject, "small", None, None)
    assert not np.array_equal(stitched, images(subject, None, None, None))
    assert not np.array_equal(stitched, images(alone, None, None, None))


def test_what_a_pruned_model_is_measured_by_are_its_own_steps(pruned: Path, tmp_path: Path) -> None:
    """The plan's other model paints the same before and after: nothing would be seen of what was cut."""
    out = tmp_path / "run"
    small.search(out, recipe(pruned, budget={"macs": 0.9}))
    stage = {"prune": "random_cuts", "keep": 0.5, "latency_batches": []}
    made = {
        "lissom": 1,
        "model": str(out),
        "evaluate": {"reference": "zoo:fashion", "metrics": ["fid"], "samples": 8},
        "stages": [stage],
    }
    text = json.dumps(made)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        real = Evaluator.score
        patch.setattr(Evaluator, "score", lambda self, plan, *a, **k: (seen.append(plan), real(self, plan, *a, **k))[1])
        run(parse(text, "r"), text, tmp_path / "cut", Context(parse(text, "r"), tmp_path, CPU), resume=False, single=True)
    assert len(seen) == 2 and all(plan.models == () for plan in seen) and read_plan(tmp_path / "cut").models == ("small",)


def test_the_base_of_an_evaluation_knows_its_models(pruned: Path, tmp_path: Path) -> None:
    steps = (Step(timestep=800, model="small"), Step(timestep=300))
    bases = []
    for ref in (str(pruned), "zoo:fashion"):
        subject = Subject.load("zoo:fashion", context(tmp_path, models={"small": ref}))
        plan = SamplingPlan(scheduler=Scheduler.of(subject.model.pipe.scheduler), steps=steps)
        subject.model.plan = plan
        bases.append(_identity.Base.of(subject, None, None, own=True))
    assert bases[0].plan == bases[1].plan and bases[0].digest != bases[1].digest


def test_experts_that_hand_over_reuse_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lissom.core.driving.steering.denoisers", lambda pipe: {"transformer": pipe.unet, "transformer_2": pipe.unet}
    )
    with pytest.raises(UserError, match="hands over from transformer to transformer_2 on the way"):
        small.search(tmp_path / "run", small.text("zoo:fashion", space=["timesteps", "reuse"], steps=3))
