"""Masks learned through whole trajectories of real pipelines: gradients, the target, cutting again, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import export, masking, surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.core.stages import PruneStage
from lissom.prune import masks
from lissom.report.prune_schema import PruneReport
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.tests.workflow.test_ld_pruner import recipe as of_tiny
from lissom.workflow._subject import Subject
from lissom.workflow._trajectories import Trajectories
from lissom.workflow.context import Context, Options
from lissom.workflow.describe import estimate, say
from lissom.workflow.run import run
from safetensors.torch import load_file

STAGE: dict[str, Any] = {
    "prune": "masks", "keep": 0.93, "iterations": 4, "batch": 2, "images": 3, "solver_steps": 2, "measure": False,
    "latency_batches": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny latent diffusion model with attention, and its prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.sd().save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a shoe\na bag\n")
    return folder


def text(home: Path, **stage: Any) -> str:
    stages = [{key: value for key, value in {**STAGE, **stage}.items() if value is not None}]
    call = {**tiny.size(), "guidance_scale": 3.0}
    return json.dumps(
        {"lissom": 1, "model": str(home / "sd"), "prompts": str(home / "prompts.txt"), "call": call, "stages": stages}
    )


def prune(out: Path, recipe: str, options: Options | None = None, progress: Any = None, *, resume: bool = False) -> PruneReport:
    context = Context(parse(recipe, "r"), out.parent, options or Options(device="cpu"), progress or small.Watched())
    run(context.recipe, recipe, out, context, resume=resume, single=True)
    return PruneReport.model_validate_json((out / "report.json").read_text())


def test_a_model_is_cut_to_its_target_and_again_at_another_ratio_without_learning(model: Path, tmp_path: Path) -> None:
    found = prune(tmp_path / "run", text(model))
    assert found.after.params <= 0.93 * found.before.params and found.cuts and found.spent["learning_steps"] == 4
    assert found.loss is not None and 0 < found.loss < 10 and found.loss_is.startswith("E |z(pruned) - z|^2")
    assert found.calibration["solver steps"] == 2 and "of the parameters could have gone" in str(found.calibration["maskable"])
    assert not (tmp_path / "run" / "learning.pt").exists() and not (tmp_path / "run" / "whole-latents.safetensors").exists()
    again = prune(tmp_path / "again", text(model, keep=0.96, gates=str(tmp_path / "run")))
    assert 0.93 * again.before.params < again.after.params <= 0.96 * again.before.params and "learning_steps" not in again.spent
    assert {c.address for c in again.cuts} <= {c.address for c in found.cuts}


def test_gates_of_modulations_are_learned_and_cut_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class-conditional transformer; by default its heads and units alone are looked at."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)  # a fresh process takes eight seconds
    recipe = json.loads(of_tiny(tmp_path, "dit"))
    stage = {**STAGE, "what": ["modulation"], "keep": 0.97, "rate": 1.0}
    found = prune(tmp_path / "run", json.dumps(recipe | {"stages": [stage]}))
    assert found.after.params <= 0.97 * found.before.params and {cut.what for cut in found.cuts} == {"keep_modulation"}
    assert {layer.kind for layer in found.layers if layer.address.endswith("norm1")} == {"norm"}
    (gates,) = (tmp_path / "run").rglob("gates.safetensors")
    learned = load_file(gates)
    assert all(name.endswith(" keep_modulation") and values.unique().numel() > 1 for name, values in learned.items())
    usual = prune(tmp_path / "usual", json.dumps(recipe | {"stages": [{**STAGE, "keep": 0.99}]}))
    assert {cut.what for cut in usual.cuts} <= {"keep_heads", "keep_units"}
    assert not any(layer.kind == "norm" for layer in usual.layers)


@pytest.mark.parametrize("objective", ["final", "steps"])
def test_the_gradient_of_the_distance_is_that_of_finite_differences(objective: str, model: Path, tmp_path: Path) -> None:
    recipe = text(model)
    context = Context(parse(recipe, "r"), tmp_path, Options(device="cpu"))
    subject = Subject.load(str(model / "sd"), context)
    stage = context.recipe.stages[0]
    assert isinstance(stage, PruneStage)
    found = Trajectories(
        stage,
        subject,
        masks.Config.model_validate({"batch": 2, "images": 3, "solver_steps": 2, "objective": objective}),
        tmp_path,
        "same",
    )
    place = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    count = subject.model.denoiser.get_submodule(place).net[2].in_features
    factors = torch.full((count,), 0.7, requires_grad=True)
    value = found.distance([0, 2], {place: ("keep_units", factors)})
    value.backward()
    assert factors.grad is not None  # (the first call samples the whole model, without these factors)
    step, near = 0.02, []
    for sign in (1, -1):
        moved = torch.full((count,), 0.7 + sign * step)
        near.append(found.distance([0, 2], {place: ("keep_units", moved)}).item())
    assert float(factors.grad.sum()) == pytest.approx((near[0] - near[1]) / (2 * step), rel=0.05)
    assert value.item() == pytest.approx(found.distance([2, 0, 5], {place: ("keep_units", torch.full((count,), 0.7))}).item())
    whole = found.distance([0, 1, 2], {place: ("keep_units", torch.ones(count))})
    assert whole.item() == pytest.approx(0.0, abs=1e-12) and value.item() > 1e-9


def test_single_steps_are_compared_on_what_the_whole_model_comes_to(model: Path, tmp_path: Path) -> None:
    """Without guidance, a distance of steps is the mean over calls of what the masks change in the answer to the same input."""
    context = Context(parse(text(model).replace("3.0", "1.0"), "r"), tmp_path, Options(device="cpu"))
    subject = Subject.load(str(model / "sd"), context)
    stage = context.recipe.stages[0]
    assert isinstance(stage, PruneStage)
    config = masks.Config(batch=1, images=1, solver_steps=3, objective="steps")
    found = Trajectories(stage, subject, config, tmp_path, "same")
    place, denoiser = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", subject.model.denoiser
    calls: list[tuple[Any, Any, Any]] = []
    hook = denoiser.register_forward_hook(lambda m, a, k, o: calls.append((a, k, o[0].detach())), with_kwargs=True)
    list(subject.sampler.images(found.plan, found.seeds, output="latents"))
    hook.remove()
    factors = torch.zeros(denoiser.get_submodule(place).heads)
    with masking.masked(denoiser, {place: ("keep_heads", factors)}), torch.no_grad():
        gaps = [(denoiser(*a, **k)[0] - o).square().mean() / o.var() for a, k, o in calls]
    assert len(gaps) == 3
    factors.requires_grad_()
    assert found.distance([0], {place: ("keep_heads", factors)}).item() == pytest.approx(float(sum(gaps)) / 3, rel=1e-4)


def test_what_is_reported_is_of_seeds_that_were_not_learned_from(model: Path, tmp_path: Path) -> None:
    context = Context(parse(text(model), "r"), tmp_path, Options(device="cpu"), small.Watched())
    subject = Subject.load(str(model / "sd"), context)
    stage = context.recipe.stages[0]
    assert isinstance(stage, PruneStage)
    found = Trajectories(stage, subject, masks.Config(images=3, solver_steps=2), tmp_path, "same")
    cut = Cut(address="down_blocks.0.attentions.0.transformer_blocks.0.ff", what="keep_units", value=(0,))
    subject.sampler.memo = None  # it knows nothing of cuts
    sampled = {}
    for cuts in ((), (cut,)):
        with surgery.applied(subject.model.denoiser, cuts):
            seeds = found.seeds.model_copy(update={"start": 3})
            (batch,) = subject.sampler.images(found.plan, seeds, output="latents")
            assert batch.latents is not None
            sampled[cuts] = batch.latents
    assert not set(seeds.values()) & set(found.seeds.values())
    want = float((sampled[(cut,)] - sampled[()]).square().mean() / sampled[()].var())
    assert found([(), (cut,)]) == pytest.approx([0.0, want], rel=1e-3) and want > 1e-8
    assert not (tmp_path / "whole-latents.safetensors").exists()  # gates of an earlier run need no more than this


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"keep": 0.2}, r"keep=0\.2: cannot be reached; all heads, units but one of each layer hold [\d.]+% of the params"),
        ({"what": ["heads"], "keep": 0.9}, "all heads but one of each layer hold"),
        ({"least": 0.9, "keep": 0.9}, "masks: with what=heads, units, least=0.9"),
        ({"data": "images"}, "learns from the model's own trajectories"),
        ({"times": 3}, "times has no effect"),
        ({"require_plain_load": True}, "which no stock config expresses"),
        ({"objective": "steps", "by_block": True}, "with objective=steps nothing is computed again"),
        ({"gates": "nowhere"}, "gates: .*nowhere.* cannot be read"),
        ({"solver_steps": 5000}, "solver_steps 5000: DDIMScheduler was trained with 1000 timesteps"),
    ],
)
def test_what_cannot_be_learned(stage: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        prune(tmp_path / "run", text(model, **stage))


def test_half_precision_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gates are learned in float32"):
        prune(tmp_path / "run", text(model), Options(device="cpu", dtype="bfloat16"))


def test_an_estimate_learns_nothing(model: Path, tmp_path: Path) -> None:
    context = Context(parse(text(model), "r"), tmp_path, Options(device="cpu"))
    (stage,) = estimate(context.recipe, context)["stages"]
    assert stage["denoiser_forwards"] == 3 * 2 + 2 * 4 * 2 * 2 and stage["denoiser_backwards"] == 4 * 2 * 2
    assert "4 steps of 2 trajectories" in say({"stages": [stage], "recipe": "r"})
