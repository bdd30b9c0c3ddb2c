"""Masks along solvers that draw noise as they step: replayed from the images' generators, or refused before any learning."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lissom.core import export
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.core.stages import PruneStage
from lissom.core.widths import widths
from lissom.prune import masks
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.tests.workflow.test_masks import STAGE
from lissom.workflow._subject import Subject
from lissom.workflow._trajectories import Trajectories
from lissom.workflow.context import Context, Options
from lissom.workflow.run import run
from safetensors.torch import load_file

SDE = {"algorithm_type": "sde-dpmsolver++"}
# Pipelines that hand their generators to each step, and two that do not (DiT, whose batch guidance doubles).
NOISY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddpm": ("sd", "DDPMScheduler", {}),
    "euler ancestral": ("sd", "EulerAncestralDiscreteScheduler", {}),
    "lcm": ("sd", "LCMScheduler", {}),
    "sde": ("sd", "DPMSolverMultistepScheduler", SDE),
    "ddpm, no generators": ("dit", "DDPMScheduler", {}),
    "sde, no generators": ("dit", "DPMSolverMultistepScheduler", SDE),
    "ddpm of pixels": ("ddpm", "DDPMScheduler", {}),
    "flow": ("flux", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}
CALLS: dict[str, dict[str, Any]] = {
    "sd": tiny.size() | {"guidance_scale": 3.0},
    "dit": {"guidance_scale": 3.0},
    "flux": tiny.flux_size(),
}


def recipe(folder: Path, family: str, scheduler: str, config: dict[str, Any], **stage: Any) -> str:
    """Of a tiny pipeline with this scheduler, saved in the folder."""
    pipe = tiny.FAMILIES[family][0]()
    pipe.scheduler = getattr(diffusers, scheduler).from_config({**pipe.scheduler.config, **config})
    pipe.save_pretrained(folder / "model")
    data: dict[str, Any] = {"lissom": 1, "model": str(folder / "model"), "call": CALLS.get(family, {})}
    if family != "ddpm":
        (folder / "given.txt").write_text("a shoe\na bag\n")
        (folder / "given.jsonl").write_text('{"class_labels": 3}\n{"class_labels": 5}\n')
        data["prompts"] = str(folder / ("given.jsonl" if family == "dit" else "given.txt"))
    what = {"what": ["channels"]} if family == "ddpm" else {}
    return json.dumps(data | {"stages": [STAGE | what | stage]})


def trajectories(folder: Path, text: str, **config: Any) -> Trajectories:
    context = Context(parse(text, "r"), folder, Options(device="cpu"))
    stage = context.recipe.stages[0]
    assert isinstance(stage, PruneStage)
    subject = Subject.load(str(folder / "model"), context)
    return Trajectories(stage, subject, masks.Config(**{"batch": 2, "images": 4, "solver_steps": 3, **config}), folder, "same")


def half(denoiser: Any) -> dict[str, tuple[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    return {w.address: (w.what, torch.rand(w.count, generator=drawn).requires_grad_()) for w in widths(denoiser)}


def learn(found: Trajectories, images: list[int]) -> list[torch.Tensor]:
    factors = half(found.denoiser)
    value = found.distance(images, factors)
    value.backward()
    gradients = [factor.grad for _, factor in factors.values()]
    return [value.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", NOISY)
def test_noise_of_the_steps_belongs_to_the_images(name: str, tmp_path: Path) -> None:
    """With nothing masked the distance is zero, whichever images are asked for together; each value can be had again."""
    family, scheduler, config = NOISY[name]
    found = trajectories(tmp_path, recipe(tmp_path, family, scheduler, config))
    denoiser = found.denoiser
    ones = {w.address: (w.what, torch.ones(w.count)) for w in widths(denoiser)}
    assert all(found.distance(some, ones).item() < 1e-12 for some in ([0, 1, 2, 3], [0, 2], [3]))
    torch.manual_seed(1)
    once = learn(found, [0, 2])
    torch.manual_seed(2)
    again = learn(found, [2, 0])
    assert len(once) > 3 and all(map(torch.equal, once, again)) and once[0] > 1e-9
    assert any(bool(g.any()) for g in once[1:]) and not torch.equal(learn(found, [1, 3])[0], once[0])
    found._whole = None
    (tmp_path / "whole-latents.safetensors").unlink()
    torch.manual_seed(3)
    assert torch.equal(found.whole, found._sampled(found.seeds)) and all(map(torch.equal, learn(found, [0, 2]), once))


def test_the_noise_is_there(tmp_path: Path) -> None:
    """What the test above is worth: without the noise the same solver ends elsewhere."""
    noisy = trajectories(tmp_path, recipe(tmp_path, "dit", "DDPMScheduler", {}))
    (tmp_path / "still").mkdir()
    still = trajectories(tmp_path / "still", recipe(tmp_path / "still", "dit", "DDIMScheduler", {}))
    assert not torch.allclose(noisy.whole, still.whole, rtol=0.1)


REFUSED = {
    "TCDScheduler": ("sd", {}, "TCDScheduler: it is not among the tested ones. Use --scheduler"),
    "KDPM2AncestralDiscreteScheduler": ("sd", {}, "it inserts mid-points between the planned timesteps. Use --scheduler"),
    "EulerAncestralDiscreteScheduler": ("dit", {}, "does not scale noise and input as EulerAncestralDiscreteScheduler needs"),
    "PNDMScheduler": ("sd", {"skip_prk_steps": False}, "begins with Runge-Kutta steps .* True can be followed"),
}


@pytest.mark.parametrize("scheduler", REFUSED)
def test_what_cannot_be_followed_is_refused_before_anything(scheduler: str, tmp_path: Path) -> None:
    family, config, words = REFUSED[scheduler]
    text = recipe(tmp_path, family, scheduler, config, solver_steps=6)
    context = Context(parse(text, "r"), tmp_path, Options(device="cpu"), small.Watched())
    with pytest.raises(UserError, match=words) as e:
        run(context.recipe, text, tmp_path / "run", context, resume=False, single=True)
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "learning.pt").exists()


@pytest.mark.parametrize("name", ["ddpm, no generators", "lcm"])
def test_learning_with_such_a_solver_can_be_had_again_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, from other states of torch's own generator, and killed half-way: the same gates, the same cuts."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)  # a fresh process takes eight seconds
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    family, scheduler, config = NOISY[name]
    text = recipe(tmp_path, family, scheduler, config, keep=0.97)
    gates, cuts = [], []
    for seed, way in enumerate(("once", "again", "killed")):
        torch.manual_seed(seed)
        out, progress = tmp_path / way, small.Dying() if way == "killed" else small.Watched()
        context = Context(parse(text, "r"), tmp_path, Options(device="cpu"), progress)
        if way == "killed":
            with pytest.raises(small.Killed):
                run(context.recipe, text, out, context, resume=False, single=True)
            assert (out / "learning.pt").is_file() and not (out / "gates.safetensors").exists()
            context = Context(parse(text, "r"), tmp_path, Options(device="cpu"), small.Watched())
        run(context.recipe, text, out, context, resume=way == "killed", single=True)
        gates.append(load_file(out / "gates.safetensors"))
        cuts.append(json.loads((out / "report.json").read_text())["cuts"])
    assert cuts[0] and cuts == [cuts[0]] * 3
    assert all(one.keys() == gates[0].keys() and all(torch.equal(one[k], gates[0][k]) for k in one) for one in gates)
    assert any(values.unique().numel() > 1 for values in gates[0].values())
