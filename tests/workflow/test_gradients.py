"""Gradients of the training loss over noise levels: those of plain autograd, summed once and kept; the model is left alone."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.candidate import Cut, image_seed
from lissom.core.errors import SamplingError, UserError
from lissom.core.recipe import build
from lissom.core.stages import PruneStage
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.workflow import _gradients
from lissom.workflow._gradients import FILE, Gradients
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options, Silent
from safetensors.torch import load_file

CLASSES = '{"class_labels": 3}\n{"class_labels": 5}\n'
PROMPTS = {"sd": ("prompts.txt", "a shoe\na bag\n"), "flux": ("prompts.txt", "a shoe\n"), "dit": ("classes.jsonl", CLASSES)}
CALL: dict[str, dict[str, Any]] = {
    "sd": tiny.size() | {"guidance_scale": 3.0}, "dit": {"guidance_scale": 3.0}, "flux": tiny.flux_size(), "ddpm": {},
}  # fmt: skip
STRIDE = 300  # t = 0, 300, 600, 900


def subject(folder: Path, family: str = "dit", progress: Any = None, **options: Any) -> Subject:
    """A tiny pipeline that is saved beside the folder."""
    home = folder.parent
    if not (home / family).exists():
        tiny.FAMILIES[family][0]().save_pretrained(home / family)
    data: dict[str, Any] = {
        "lissom": 1,
        "model": str(home / family),
        "call": CALL[family],
        "stages": [{"prune": "diff_pruning"}],
    }
    if family in PROMPTS:
        name, text = PROMPTS[family]
        (home / name).write_text(text)
        data["prompts"] = name
    context = Context(build(data, "r.yaml"), home, Options(device="cpu", **options), progress or Silent())
    return Subject.load(str(home / family), context)


def gradients(
    folder: Path, family: str = "dit", count: int = 3, layers: Sequence[str] = (), identity: str = "same",
    progress: Any = None, stage: dict[str, Any] | None = None, **options: Any,
) -> Gradients:  # fmt: skip
    asked = PruneStage(prune="diff_pruning", calibration=count, **(stage or {}))
    return Gradients(asked, subject(folder, family, progress, **options), layers, 2, folder, identity)


def all_count(losses: Sequence[float]) -> bool:
    return True


def until(number: int) -> Callable[[Sequence[float]], bool]:
    return lambda losses: len(losses) < number


def taken(
    found: Gradients, counts: Callable[[Sequence[float]], bool] = all_count, stride: int = STRIDE
) -> dict[str, torch.Tensor]:
    with found.gradients(stride, counts):
        return {name: p.grad.clone() for name, p in found.parameters.items() if p.grad is not None}


def by_hand(found: Gradients, times: Sequence[float]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain autograd on the whole batch, by the formulas of Ho et al. and of flow matching."""
    pipe, denoiser = found.subject.model.pipe, found.denoiser
    clean = found.data(range(found.count))
    generators = [torch.Generator().manual_seed(image_seed("calibrate, noise", 0, i)) for i in range(found.count)]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators])
    denoiser.requires_grad_(True)
    losses = []
    total = torch.zeros(())
    for t in times:
        if "FlowMatch" in type(pipe.scheduler).__name__:
            shown, target = (1 - t / 1000) * clean + t / 1000 * noise, noise - clean
        else:
            a = pipe.scheduler.alphas_cumprod[int(t)]
            shown, target = a.sqrt() * clean + (1 - a).sqrt() * noise, noise
        rows = [i % found.calls.rows for i in range(found.count)]
        kwargs = found.calls([found.data.conditions[i] for i in range(found.count)], rows, shown, torch.full((found.count,), t))
        out = denoiser(**kwargs, return_dict=False)[0][:, : target.shape[1]]
        loss = torch.nn.functional.mse_loss(out, target)
        losses.append(loss.item())
        total = total + loss
    names, parameters = zip(*found.parameters.items(), strict=True)
    made = torch.autograd.grad(total, parameters, allow_unused=True)
    denoiser.requires_grad_(True)
    zero = [g if g is not None else torch.zeros_like(p) for g, p in zip(made, parameters, strict=True)]
    return dict(zip(names, zero, strict=True)), losses


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in other.values())
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", ["sd", "dit", "ddpm", "flux"])
@pytest.mark.parametrize("chunk", [64, 2])
def test_they_are_those_of_plain_autograd(family: str, chunk: int, tmp_path: Path) -> None:
    """Text, classes with guidance and a variance, pixels, packed latents of a flow; whole, and a part at a time."""
    found = gradients(tmp_path / "run", family, chunk=chunk)
    times = [t + (family == "flux") for t in (0.0, 300.0, 600.0, 900.0)]
    with found.gradients(STRIDE, all_count) as losses:
        got = {name: p.grad.clone() for name, p in found.parameters.items() if p.grad is not None}
    wanted, by_time = by_hand(found, times)
    close(got, wanted)
    assert list(losses) == times and list(losses.values()) == pytest.approx(by_time, rel=1e-4)
    passes = 4 * 3
    assert found.backwards == passes and found.forwards == passes * (2 if chunk == 2 else 1)
    assert found.spent()["backwards_of_one_image"] == passes


def test_guidance_shows_with_and_without_the_condition(tmp_path: Path) -> None:
    assert gradients(tmp_path / "run", "dit").calls.rows == 2 and gradients(tmp_path / "two", "ddpm").calls.rows == 1


def test_the_level_that_ends_the_visits_is_not_added(tmp_path: Path) -> None:
    found = gradients(tmp_path / "run")
    got = taken(found, until(3))
    assert list(found.losses) == [0.0, 300.0, 600.0] and found.ended
    close(got, by_hand(found, [0.0, 300.0])[0])
    assert found.facts()["timesteps that counted"] == "2 of 3 visited, t = 0 to 300"
    assert found.facts()["largest loss"] == f"{max(found.losses.values()):.4g}" and found.facts()["images"] == 3


def test_what_no_loss_reaches_has_a_gradient_of_zero(tmp_path: Path) -> None:
    """6.5, item 10: Torch-Pruning reads the gradient of every layer. Here one that the forward never runs."""
    found = gradients(tmp_path / "run")
    found.denoiser.register_module("unused", torch.nn.Linear(2, 2))
    found.parameters |= {f"unused.{n}": p for n, p in found.denoiser.unused.named_parameters()}
    got = taken(found, until(2))
    assert not got["unused.weight"].any() and got["transformer_blocks.0.ff.net.2.weight"].any()


def test_only_the_layers_that_are_asked_for(tmp_path: Path) -> None:
    found = gradients(tmp_path / "run", layers=["transformer_blocks.1.ff"])
    got = taken(found)
    assert set(got) and all(name.startswith("transformer_blocks.1.ff.") for name in got)
    whole = taken(gradients(tmp_path / "all"))
    close(got, {name: whole[name] for name in got})


@pytest.mark.parametrize("ends", ["well", "badly", "in the middle"])
def test_the_denoiser_is_left_as_it_was(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(tmp_path / "run")
    kept = next(iter(found.parameters.values()))
    kept.requires_grad_(False)
    state = [(id(p), p._version, p.requires_grad, p.grad) for p in found.denoiser.parameters()]
    training, hooks = found.denoiser.training, len(found.denoiser._forward_hooks)

    def fails(*args: Any) -> Any:
        raise ValueError("broken")

    if ends == "in the middle":
        monkeypatch.setattr(found, "_visit", fails)
    try:
        with torch.no_grad(), found.gradients(STRIDE, all_count):  # 6.5, item 1: whoever calls, autograd is on
            assert kept.grad is not None and kept.grad.any()
            if ends == "badly":
                raise ValueError("broken")
    except ValueError:
        assert ends != "well"
    assert [(id(p), p._version, p.requires_grad, p.grad) for p in found.denoiser.parameters()] == state
    assert (found.denoiser.training, len(found.denoiser._forward_hooks)) == (training, hooks)


class Killed(BaseException):
    pass


def test_killed_at_any_level_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gradients, "SAVE_SECONDS", -1.0)  # after every level
    visit, seen, stop = Gradients._visit, list[float](), [99]

    def watched(self: Gradients, t: float, counts: Any) -> None:
        if len(seen) == stop[0]:
            raise Killed
        visit(self, t, counts)
        seen.append(t)

    monkeypatch.setattr(Gradients, "_visit", watched)
    whole = taken(gradients(tmp_path / "whole"), until(4))
    assert seen == [0.0, 300.0, 600.0, 900.0]
    seen.clear()
    for number in range(4):
        stop[0] = number
        with pytest.raises(Killed):
            taken(gradients(tmp_path / "run"), until(4))
        (tmp_path / "run" / "gradients.tmp").write_bytes(b"torn")
    stop[0] = 99
    resumed = gradients(tmp_path / "run")
    got = taken(resumed, until(4))
    assert seen == [0.0, 300.0, 600.0, 900.0] and resumed.ended  # each once
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    again = gradients(tmp_path / "run")
    assert all(torch.equal(g, whole[name]) for name, g in taken(again, until(4)).items())
    assert len(seen) == 4 and again.spent() == {} and again.facts() == resumed.facts()


def test_other_conditions_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    taken(gradients(tmp_path / "run"))
    before = (tmp_path / "run" / FILE).read_bytes()
    with pytest.raises(UserError, match="summed under other conditions .*choose another --out"):
        taken(gradients(tmp_path / "run", identity="other"))
    with pytest.raises(UserError, match="summed under other conditions"):
        taken(gradients(tmp_path / "run", layers=["transformer_blocks.1.ff"]))
    assert (tmp_path / "run" / FILE).read_bytes() == before
    (tmp_path / "run" / FILE).write_bytes(b"harmed")  # not by us: made again
    taken(gradients(tmp_path / "run"))
    assert load_file(tmp_path / "run" / FILE).keys() == gradients(tmp_path / "run").parameters.keys()


def test_out_of_memory_halves_the_batch_and_no_gradient_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = taken(gradients(tmp_path / "whole", count=4))
    answer, most, calls = Gradients._answer, [2], [0]

    def small_memory(self: Gradients, t: float, part: range) -> Any:
        calls[0] += 1
        if len(part) > most[0] and t > 0:  # the first level went well
            raise torch.OutOfMemoryError("no")
        return answer(self, t, part)

    monkeypatch.setattr(Gradients, "_answer", small_memory)
    watched = small.Watched()
    close(taken(gradients(tmp_path / "run", count=4, progress=watched)), wanted)
    assert watched.warned == ["out of memory: gradients go on with 2 images at a time"]
    most[0] = 0
    with pytest.raises(SamplingError, match="out of memory while the gradient of a single image"):
        taken(gradients(tmp_path / "none", count=4))


def test_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    found = gradients(tmp_path / "run")
    found._ready()
    with torch.no_grad():
        found.denoiser.transformer_blocks[1].ff.net[2].weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"the loss at timestep 0 is NaN or infinite: .*dit is broken"):
        taken(found)


def test_how_far_cuts_move_the_answer(tmp_path: Path) -> None:
    """By hand: at the levels that counted, the mean over batch and elements."""
    found = gradients(tmp_path / "run", "ddpm", chunk=2)
    taken(found, until(3))
    cut = Cut(address="mid_block.resnets.0", what="keep_channels", value=tuple(range(4, 16)))
    nothing, got = found([(), (cut,)])
    assert nothing == 0.0 and got > 0
    unet, gaps = found.denoiser, []
    with torch.no_grad():
        answers = [found._answer(t, range(3))[0] for t in (0.0, 300.0)]
        weight = unet.mid_block.resnets[0].conv2.weight
        whole = weight.clone()
        weight[:, :4] = 0
        gaps = [(found._answer(t, range(3))[0] - a).square().mean() for t, a in zip((0.0, 300.0), answers, strict=True)]
        weight.copy_(whole)
    assert got == pytest.approx(float(sum(gaps) / 2), rel=1e-4)


def test_images_of_a_folder_and_their_captions(tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for i in range(5):
        Image.new("RGB", (8, 8), (40 * i, 0, 90)).save(pictures / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"shoe {i}"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    found = gradients(tmp_path / "run", "sd", 4, stage={"data": "pictures"})
    assert found.count == 4 and taken(found, until(2))
    few = gradients(tmp_path / "few", "sd", 64, stage={"data": "pictures"})
    assert few.count == 5
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="says nothing about its images, and StableDiffusionPipeline needs a prompt"):
        gradients(tmp_path / "bare", "sd", 4, stage={"data": "pictures"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "--dtype float16: gradients are summed in float32"),
        ({"offload": "model"}, "--offload model: gradients need the denoiser in one place"),
    ],
)
def test_what_gradients_cannot_be_taken_of_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    whole = subject(tmp_path / "run")
    context = Context(whole.context.recipe, tmp_path, Options(device="cpu", **options))
    changed = replace(whole, context=context)
    with pytest.raises(UserError, match=says):
        Gradients(PruneStage(prune="diff_pruning"), changed, (), 2, tmp_path / "run", "")


def test_structures_and_pairs_of_denoisers_are_refused(tmp_path: Path) -> None:
    found = subject(tmp_path / "run")
    found.model.pipe.transformer_2 = tiny.FAMILIES["dit"][0]().transformer
    with pytest.raises(UserError, match="DiTPipeline shares its noise levels between 2 denoisers"):
        Gradients(PruneStage(prune="diff_pruning"), found, (), 2, tmp_path / "run", "")
    del found.model.pipe.transformer_2
    found.model.pipe.transformer.to("meta")
    with pytest.raises(UserError, match="is a structure without weights"):
        Gradients(PruneStage(prune="diff_pruning"), found, (), 2, tmp_path / "run", "")
