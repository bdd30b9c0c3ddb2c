"""LD-Pruner end to end: text to image, class conditional, unconditional; killed and resumed; single operators; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import artifact, export, models, surgery
from lissom.core.candidate import Seeds
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.core.sampling import Sampler
from lissom.prune import ld_pruner
from lissom.tests.core import tiny
from lissom.tests.workflow.test_prune import prune, report
from lissom.workflow._latents import Latents
from lissom.workflow._prune_estimate import estimate, say
from lissom.workflow._subject import conditions_of
from lissom.workflow.context import Context, Options, Silent

STAGE: dict[str, Any] = {
    "prune": "ld_pruner", "keep": 0.8, "calibration": 4, "solver_steps": 2, "measure": False, "latency_batches": [],
}  # fmt: skip
PROMPTS = {"sd": ("prompts.txt", "a shoe\na bag\n"), "dit": ("classes.jsonl", '{"class_labels": 3}\n{"class_labels": 5}\n')}
CALL: dict[str, dict[str, Any]] = {"sd": tiny.size() | {"guidance_scale": 3.0}, "dit": {"guidance_scale": 3.0}}


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process: it takes eight seconds. What it would open is compared here."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)


def recipe(folder: Path, family: str, **stage: Any) -> str:
    """Of a tiny pipeline that is saved in the folder."""
    if not (folder / family).exists():
        tiny.FAMILIES[family][0]().save_pretrained(folder / family)
    data: dict[str, Any] = {"lissom": 1, "model": str(folder / family), "call": CALL.get(family, {}), "stages": [STAGE | stage]}
    if family in PROMPTS:
        name, text = PROMPTS[family]
        (folder / name).write_text(text)
        data["prompts"] = name
    return json.dumps(data)


@pytest.mark.parametrize("family", ["sd", "dit", "ddpm"])
def test_any_task(family: str, tmp_path: Path) -> None:
    text = recipe(tmp_path, family, keep=0.6)
    out = tmp_path / "run"
    prune(out, text)
    found = report(out)
    assert found.score_label == "latent mean and spread" and found.after.params <= 0.6 * found.before.params
    scored = {layer.address: layer.score for layer in found.layers}
    order = sorted(scored, key=lambda a: scored[a] or 0)
    assert all(score is not None and score > 0 for score in scored.values()) and scored[order[0]] != scored[order[-1]]
    cut = [c.address for c in found.cuts]
    assert cut == [a for a in order if a in cut]  # in order; those before the last that stay are not needed
    assert found.calibration["images"] == 4 and found.calibration["solver steps"] == 2
    assert found.calibration["latents"] == ("3 x 8 x 8" if family == "ddpm" else "4 x 8 x 8")
    choices = len(scored) + (len(cut) > 1)  # all cuts together too
    assert found.spent["choices_scored"] == choices and found.spent["denoiser_forwards"] == 2 * (choices + 1)
    assert found.loss == pytest.approx(scored[cut[0]]) if len(cut) == 1 else found.loss is not None and found.loss > 0
    assert found.predicted_loss is None and found.additivity is None
    page = (out / "report.md").read_text()
    assert "all cuts together, mean and spread of the final latents, of the pruned model against those of its parent: " in page
    assert "denoiser forwards" in page and "latent mean and spread" in page and "eps(pruned)" not in page
    parent, child = models.load(str(tmp_path / family), device="cpu"), models.load(str(out), device="cpu")
    before = sampled(parent, tmp_path / "a", family)
    with surgery.applied(parent.denoiser, found.cuts):
        wanted = sampled(parent, tmp_path / "b", family)
    assert torch.equal(sampled(child, tmp_path / "c", family), wanted) and not torch.equal(before, wanted)
    assert ld_pruner.measure(before, wanted) == pytest.approx(found.loss or 0, rel=1e-3)


def sampled(model: Any, folder: Path, family: str) -> torch.Tensor:
    """The latents that the stage should have seen."""
    prompts = str(folder.parent / PROMPTS[family][0]) if family in PROMPTS else None
    own = Sampler(model.pipe, conditions_of(model, prompts), call=CALL.get(family, {}))
    return Latents(own, Seeds(role="calibrate", base=0, count=4), 2, ld_pruner.measure, folder, "", Silent()).whole


def test_killed_at_any_point_nothing_complete_is_sampled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    drawn, images = [0], Sampler.images
    limit = [10**6]

    def counted(self: Sampler, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output") == "latents" and kwargs.get("steps") == 2:
            drawn[0] += 1
            if drawn[0] > limit[0]:
                raise Killed
        return images(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "images", counted)
    text = recipe(tmp_path, "sd", keep=0.7, rescore=2)
    whole, out = tmp_path / "whole", tmp_path / "run"
    prune(whole, text)
    wanted = drawn[0]
    assert wanted > 20 and wanted == len(
        (whole / "scores.jsonl").read_text().splitlines()
    )  # a head there, the whole model here
    drawn[0] = 0
    for stop in (1, 5, wanted - 1):
        limit[0] = stop
        with pytest.raises(Killed):
            prune(out, text, resume=True)
        assert drawn[0] == stop + 1
        drawn[0] = stop  # the last one was not there yet
        with (out / "scores.jsonl").open("a") as file:
            file.write('["torn')
    limit[0] = 10**6
    prune(out, text, resume=True)
    assert drawn[0] == wanted
    for name in ("scores.jsonl", "latents.safetensors", "model/unet/diffusion_pytorch_model.safetensors", "lissom.json"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert report(whole).cuts == report(out).cuts and report(whole).loss == report(out).loss


def test_other_conditions_are_refused(tmp_path: Path) -> None:
    text = recipe(tmp_path, "dit")
    prune(tmp_path / "run", text)
    (tmp_path / "run" / "lissom.json").unlink()
    with pytest.raises(UserError, match="measured under other conditions"):
        prune(tmp_path / "run", text, resume=True, options=Options(device="cpu", chunk=3))
    prune(tmp_path / "run", text, resume=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": "pictures"}, r"ld_pruner: scores the latents .*, so that data \(pictures\) has no effect. Leave data out"),
        ({"times": 4}, "over all noise levels, so that times chooses none. Leave it out"),
        ({"solver_steps": 2000}, "solver_steps 2000: DDIMScheduler was trained with 1000 timesteps"),
        ({"units": ["operators"]}, "units: 'operators': .* has none; there are .*operator, .* Did you mean 'operator'"),
        ({"units": ["operator"], "require_plain_load": True}, "the cuts that a stock config can express hold 0.0%"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused_in_a_sentence(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=says) as e:
        prune(tmp_path / "run", recipe(tmp_path, "sd", **settings))
    assert "\n" not in str(e.value)


def test_the_teachers_data_is_the_default_by_name(tmp_path: Path) -> None:
    prune(tmp_path / "run", recipe(tmp_path, "dit", data="teacher"))
    assert report(tmp_path / "run").calibration["from"] == "the model's own trajectories"


def test_a_method_of_ones_own_without_a_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe(tmp_path, "dit")
    monkeypatch.delattr(ld_pruner, "measure")
    with pytest.raises(UserError, match="has no function measure"):
        prune(tmp_path / "run", text)


@pytest.mark.parametrize("family", ["sd", "ddpm"])
def test_single_operators_are_cut_where_they_are_asked_for(family: str, tmp_path: Path) -> None:
    text = recipe(tmp_path, family, units=["operator"], keep=0.93)
    prune(tmp_path / "run", text)
    found = report(tmp_path / "run")
    assert {layer.kind for layer in found.layers} == {"operator"} and found.cuts and not found.opens_plain
    free = [layer for layer in found.layers if not layer.params]
    assert free and all(layer.score is None and not layer.cut for layer in free)  # activations: nothing is saved
    made = artifact.manifest(tmp_path / "run")
    parent, child = models.load(str(tmp_path / family), device="cpu"), models.load(str(tmp_path / "run"), device="cpu")
    assert made is not None and child.parameters == found.after.params <= 0.93 * found.before.params
    with surgery.applied(parent.denoiser, made.cuts):
        wanted = sampled(parent, tmp_path / "a", family)
    assert torch.equal(sampled(child, tmp_path / "b", family), wanted)


def test_operators_inside_other_units_go_with_them_and_latency_counts_them(tmp_path: Path) -> None:
    text = recipe(tmp_path, "sd", units=["operator", "attention"], of="latency", keep=0.97)
    prune(tmp_path / "run", text)
    found = report(tmp_path / "run")
    addresses = [layer.address for layer in found.layers]
    assert {layer.kind for layer in found.layers} == {"operator", "attention"}
    assert not any(a != b and a.startswith(b + ".") for a in addresses for b in addresses)
    table = json.loads((tmp_path / "run" / "latency.json").read_text())["value"]["layers"]
    assert set(addresses) <= set(table) and min(table.values()) > 0


def test_a_dry_run_counts_whole_trajectories(tmp_path: Path) -> None:
    text = recipe(tmp_path, "dit", calibration=5)
    read = parse(text, "r.yaml")
    found = estimate(read.stages[0], read.model, Context(read, tmp_path, Options(device="cpu")))  # type: ignore[arg-type]
    assert (found["scored"], found["solver_steps"], found["denoiser_forwards"]) == (2, 2, 5 * 2 * (2 + 1))
    assert "each of 2 cuts decide what goes: 30 denoiser forwards of one image, at 2 solver steps" in say(found)
    read = parse(recipe(tmp_path, "dit", solver_steps=None), "r.yaml")
    context = Context(read, tmp_path, Options(device="cpu"))
    structure = estimate(read.stages[0], "config:sd15", context)  # type: ignore[arg-type]
    assert structure["denoiser_forwards"] == 4 * 50 * (38 + 1)  # the pipeline's own 50 steps
