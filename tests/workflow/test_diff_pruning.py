"""Diff-Pruning end to end: class conditional, text to image, pixels; in a fresh process; killed and resumed; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import artifact, export, models, surgery
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.core.stages import SearchStage
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.tests.workflow.test_gradients import Killed
from lissom.tests.workflow.test_ld_pruner import recipe as of_tiny
from lissom.tests.workflow.test_prune import prune, report, text
from lissom.workflow import _gradients, _opening
from lissom.workflow._gradients import FILE, Gradients
from lissom.workflow._plans import plans_of
from lissom.workflow._prune_estimate import estimate, say
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options

OWN: dict[str, Any] = {"prune": "diff_pruning", "keep": 0.8, "calibration": 4, "stride": 250, "solver_steps": 2}
STAGE = OWN | {"measure": False, "latency_batches": []}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process: it takes eight seconds."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)


def recipe(folder: Path, family: str, **stage: Any) -> str:
    """Of a tiny pipeline that is saved in the folder; ld_pruner's, with another method."""
    return of_tiny(folder, family, **(STAGE | {"keep": 0.95 if family == "dit" else 0.8} | stage))


def test_the_embedded_transformer_in_a_fresh_process(tmp_path: Path) -> None:
    """With everything that users have: images before and after, latency, and the result opened without lissom."""
    prune(tmp_path / "run", text(OWN | {"steps": 2, "latency_batches": [1], "round_to": 8}))
    found, page = report(tmp_path / "run"), (tmp_path / "run" / "report.md").read_text()
    assert found.after.params <= 0.8 * found.before.params and found.after.macs < found.before.macs
    assert found.reload_difference <= 1e-5 and not found.opens_plain and "trust_remote_code=True" in found.open_with
    assert {cut.what for cut in found.cuts} == {"keep_heads", "keep_units"} and len(found.layers) == 24
    assert all(layer.score and layer.score > 0 and layer.width and not layer.cut for layer in found.layers)
    assert all(len(cut.value or ()) % 8 == 0 for cut in found.cuts if cut.what == "keep_units")
    assert found.score_label == "mean importance" and found.loss and found.predicted_loss is None
    assert found.calibration["timesteps that counted"] == "3 of 4 visited, t = 0 to 500"
    assert found.calibration["images"] == 4 and found.calibration["largest loss"] and found.calibration["steps of each"] == 2
    assert (found.spent["forwards_of_one_image"], found.spent["backwards_of_one_image"]) == (4 * 4, 3 * 4)
    assert "of 384 stay)" in page and "mean importance" in page and "in part" in page
    assert "https://arxiv.org/abs/2305.10924" in page and not (tmp_path / "run" / FILE).exists()
    made, child = artifact.manifest(tmp_path / "run"), models.load(str(tmp_path / "run"), device="cpu")
    assert made is not None and made.cuts == found.cuts and made.opens == "remote_code"
    assert child.parameters == found.after.params


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("family", ["sd", "ddpm", "dit"])
@pytest.mark.parametrize("settings", [{}, {"scope": "global", "of": "macs", "keep": 0.9}], ids=["local", "global"])
def test_any_task(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    keep = settings.get("keep", 0.95 if family == "dit" else 0.8)  # tables of classes are most of the tiny transformer
    prune(tmp_path / "run", recipe(tmp_path, family, **settings))
    found = report(tmp_path / "run")
    weight = "macs" if settings else "params"
    assert getattr(found.after, weight) <= keep * getattr(found.before, weight)
    assert found.cuts and all(cut.what.startswith("keep_") for cut in found.cuts)
    parent, child = models.load(str(tmp_path / family), device="cpu"), models.load(str(tmp_path / "run"), device="cpu")
    _, arguments = tiny.FAMILIES[family]
    with surgery.applied(parent.denoiser, found.cuts):
        wanted = sampled(parent.pipe, arguments(2))
    assert child.parameters == found.after.params and torch.allclose(sampled(child.pipe, arguments(2)), wanted, atol=1e-5)


def sampled(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(**arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    return torch.as_tensor(out)


@pytest.mark.usefixtures("unverified")
def test_killed_a_run_goes_on_and_decides_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gradients, "SAVE_SECONDS", -1.0)
    source = recipe(tmp_path, "sd")
    prune(tmp_path / "whole", source)
    visit, seen, stop = Gradients._visit, list[float](), [0]

    def watched(self: Gradients, t: float, counts: Any) -> None:
        if len(seen) == stop[0]:
            raise Killed
        visit(self, t, counts)
        seen.append(t)

    monkeypatch.setattr(Gradients, "_visit", watched)
    for number in (1, 3):
        stop[0] = number
        with pytest.raises(Killed):
            prune(tmp_path / "run", source, resume=True)
    stop[0] = 99
    prune(tmp_path / "run", source, resume=True)
    assert seen == sorted(set(seen))  # none twice
    for name in ("model/unet/diffusion_pytorch_model.safetensors", "lissom.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    whole, run = report(tmp_path / "whole"), report(tmp_path / "run")
    assert (whole.cuts, whole.loss, whole.layers) == (run.cuts, run.loss, run.layers)


@pytest.mark.usefixtures("unverified")
def test_other_conditions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    source = recipe(tmp_path, "dit")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Gradients, "__call__", fails)  # behind the gradients
        prune(tmp_path / "run", source)
    assert (tmp_path / "run" / FILE).is_file()
    with pytest.raises(UserError, match="gradients that were summed under other conditions"):
        prune(tmp_path / "run", source, resume=True, options=Options(device="cpu", chunk=3))
    prune(tmp_path / "run", source, resume=True)
    assert not report(tmp_path / "run").spent and not (tmp_path / "run" / FILE).exists()


@pytest.mark.usefixtures("unverified")
def test_one_step_alone_is_warned_of(tmp_path: Path) -> None:
    watched = small.Watched()
    prune(tmp_path / "run", recipe(tmp_path, "dit", threshold=1.0), progress=watched)
    found = report(tmp_path / "run")
    assert found.warnings and found.warnings[0].startswith("one timestep alone passed the threshold")
    assert watched.warned == [f"diff_pruning: {found.warnings[0]}"]
    assert "one timestep alone" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("method", ["magnitude_widths", "random_widths"])
def test_baselines_need_no_data(method: str, tmp_path: Path) -> None:
    plain = {"prune": method, "keep": 0.8, "stride": None, "solver_steps": None}
    source = json.loads(recipe(tmp_path, "sd", **plain))
    source["stages"][0] = {k: v for k, v in source["stages"][0].items() if v is not None and k != "calibration"}
    del source["prompts"]
    prune(tmp_path / "run", json.dumps(source))
    found = report(tmp_path / "run")
    assert found.after.params <= 0.8 * found.before.params and found.loss is None and [*found.calibration] == ["maskable"]
    assert all((layer.score is None) == (method == "random_widths") for layer in found.layers)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"require_plain_load": True}, "makes layers narrower, which no stock config expresses. Leave require_plain_load out"),
        ({"units": ["resnet"]}, "units choose nothing. Leave them out; see its setting `what`"),
        ({"shortcuts": False}, "shortcuts=false spares nothing"),
        ({"of": "latency"}, "is not in the table of layer times. Use of: params or macs"),
        ({"times": 4}, "times chooses none. Leave it out"),
        ({"solver_steps": 2000}, "solver_steps 2000: DDIMScheduler was trained with 1000 timesteps"),
        (
            {"keep": 0.01},
            r"keep=0\.01: cannot be reached; all heads, units, channels but one of each layer hold \d+\.\d% of the params",
        ),
        ({"keep": 0.7, "what": ["heads"]}, "all heads but one of each layer hold"),
        ({"include": ["no.such.layer"]}, "matches no layer that can be cut"),
        ({"include": ["mid_block.*"], "exclude": ["mid_block"]}, "include and exclude leave none of the"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_exclude_each_other_are_refused_in_a_sentence(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as e:
        prune(tmp_path / "run", recipe(tmp_path, "sd", **settings))
    assert "\n" not in str(e.value)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype bfloat16: gradients are summed in float32"):
        prune(tmp_path / "run", recipe(tmp_path, "dit"), options=Options(device="cpu", dtype="bfloat16"))


@pytest.mark.usefixtures("unverified")
def test_patterns_choose_which_layers_get_narrower(tmp_path: Path) -> None:
    prune(tmp_path / "run", recipe(tmp_path, "sd", keep=0.95, include=["up_blocks.*"], exclude=["*.ff"]))
    cut = report(tmp_path / "run").cuts
    assert cut and all(c.address.startswith("up_blocks.") and not c.address.endswith(".ff") for c in cut)


def test_a_dry_run_counts_forwards_and_backwards(tmp_path: Path) -> None:
    read = parse(recipe(tmp_path, "dit", calibration=5), "r.yaml")
    found = estimate(read.stages[0], read.model, Context(read, tmp_path, Options(device="cpu")))  # type: ignore[arg-type]
    assert (found["visited"], found["denoiser_backwards"]) == (4, 20)
    assert found["denoiser_forwards"] == 20 + 5 * 2 and found["after"]["at_most"]
    assert "Gradients at no more than 4 noise levels decide what goes from 4 layers: up to 30 forwards and 20 back" in say(
        found
    )
    read = parse(recipe(tmp_path, "sd", solver_steps=None, stride=10, keep=0.7), "r.yaml")
    context = Context(read, tmp_path, Options(device="cpu"))
    structure = estimate(read.stages[0], "config:sd15", context)  # type: ignore[arg-type]
    assert structure["denoiser_forwards"] == 4 * (100 + 50) and structure["denoiser_backwards"] == 400


def test_narrower_layers_open_no_search_of_cuts(tmp_path: Path) -> None:
    stage = SearchStage(
        search="random_search", steps=2, space=("timesteps", "cuts"), budget={"macs": 0.8}, seeded_by="diff_pruning"
    )
    read = parse(json.dumps({"lissom": 1, "model": "zoo:fashion-dit", "stages": [stage.plain()]}), "r")
    subject = Subject.load("zoo:fashion-dit", Context(read, tmp_path, Options(device="cpu")))
    plans = plans_of(subject, stage)
    with pytest.raises(UserError, match="seeded_by: diff_pruning makes layers narrower"):
        _opening.pruned(stage, subject, plans, next(iter(plans.fixed.values())), tmp_path)
