"""Final latents of whole trajectories: the pipeline's own, measured once, never mixed with those of other conditions."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut, Seeds, image_seed
from lissom.core.errors import SamplingError, UserError
from lissom.core.sampling import Sampler
from lissom.prune.ld_pruner import measure
from lissom.tests.core.test_calibration import sampler
from lissom.workflow._latents import Latents
from lissom.workflow.context import Silent

FIRST, SECOND = (Cut(address=f"transformer_blocks.{i}", what="remove") for i in range(2))
OPTIONS = [(FIRST,), (SECOND,)]
STEPS = 3


def latents(folder: Path, identity: str = "same", family: str = "dit", count: int = 6) -> Latents:
    seeds = Seeds(role="calibrate", base=0, count=count)
    return Latents(sampler(family), seeds, STEPS, measure, folder, identity, Silent())


def by_hand(family: str, count: int) -> torch.Tensor:
    """What the untouched pipeline's scheduler gives last, image by image."""
    s = sampler(family)
    pipe, made = s.pipe, []
    for i in range(count):
        rows = s.conditions.arguments(range(i, i + 1))
        extra = {"generator": [torch.Generator().manual_seed(image_seed("calibrate", 0, i))]}
        if not rows:
            extra["batch_size"] = 1
        own_step = pipe.scheduler.step
        last: list[torch.Tensor] = []

        def step(*args: Any, own_step: Any = own_step, last: list[torch.Tensor] = last, **kwargs: Any) -> Any:
            out = own_step(*args, **kwargs)
            last[:] = [out[0] if isinstance(out, tuple) else out.prev_sample]
            return out

        step.__signature__ = inspect.signature(own_step)  # type: ignore[attr-defined]
        pipe.scheduler.step = step
        try:
            pipe(**rows, **s.call, **extra, num_inference_steps=STEPS, output_type="pt")
        finally:
            del pipe.scheduler.step
        made.append(last[0][:1])
    return torch.cat(made).float()


@pytest.mark.parametrize("family", ["sd", "flux", "dit", "ddpm"])
def test_they_are_those_of_the_pipelines_own_loop(family: str, tmp_path: Path) -> None:
    """Text to image, packed, class conditional with guidance, unconditional pixels: batches against one image at a time."""
    found = latents(tmp_path, family=family, count=5)
    torch.testing.assert_close(found.whole, by_hand(family, 5), atol=2e-5, rtol=1e-4)
    assert found.whole.dtype == torch.float32 and len(found.whole) == 5 and found.calls >= 2 * STEPS


def test_the_score_of_a_cut_is_measured_with_the_cut_made(tmp_path: Path) -> None:
    scores = latents(tmp_path)
    pipe = scores.sampler.pipe
    before = [id(m) for m in pipe.transformer.modules()]
    found = scores([*OPTIONS, (), (FIRST, SECOND)])
    assert [id(m) for m in pipe.transformer.modules()] == before
    with surgery.applied(pipe.transformer, [FIRST]):
        cut = by_hand("dit", 6)
    assert found[0] == pytest.approx(measure(by_hand("dit", 6), cut), rel=1e-4)
    assert found[2] == 0.0 and min(found[0], found[1], found[3]) > 0 and scores.cuts_scored == 3
    assert scores([(SECOND, FIRST)]) == [found[3]] and scores.cuts_scored == 3  # in another order
    assert scores.spent()["denoiser_forwards"] == 4 * 2 * STEPS  # two batches, the whole model and three choices of cuts
    assert scores.facts() == {"images": 6, "solver steps": STEPS, "latents": "4 x 8 x 8"}


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = latents(tmp_path)(OPTIONS)
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('["[{\\"address\\"')  # torn by kill -9
    monkeypatch.setattr(Sampler, "images", lambda *args, **kwargs: pytest.fail("sampled again"))
    again = latents(tmp_path)
    assert again(OPTIONS) == found and again([OPTIONS[1], ()]) == [found[1], 0.0]
    assert again.spent() == {} and (tmp_path / "scores.jsonl").read_text().endswith("]\n")


def test_a_resumed_run_compares_with_the_same_bits(tmp_path: Path) -> None:
    first = latents(tmp_path)
    first(OPTIONS[:1])
    kept = (tmp_path / "latents.safetensors").read_bytes()
    resumed = latents(tmp_path)
    assert torch.equal(resumed.whole, first.whole) and resumed.calls == 0
    assert resumed(OPTIONS) == latents(tmp_path / "whole")(OPTIONS)
    (tmp_path / "latents.safetensors").write_bytes(b"harmed")
    assert torch.equal(latents(tmp_path).whole, first.whole)
    assert (tmp_path / "latents.safetensors").read_bytes() == kept


def test_other_conditions_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    latents(tmp_path)(OPTIONS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="measured under other conditions.*choose another --out"):
        latents(tmp_path, "other")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_samples_that_are_not_finite_score_infinity(tmp_path: Path) -> None:
    scores = latents(tmp_path)
    scale = scores.denoiser.transformer_blocks[1].ff.net[2].weight
    whole = scale.detach().clone()
    with torch.no_grad():
        scale.fill_(math.nan)  # the whole model was sampled before
    try:
        assert scores([(FIRST,)]) == [math.inf]
        assert scores([(SECOND,)])[0] < math.inf  # without the broken block
        assert latents(tmp_path)([(FIRST,)]) == [math.inf]
        with pytest.raises(SamplingError, match="NaN or infinity"):  # a model that is broken from the beginning
            latents(tmp_path / "broken")
    finally:
        with torch.no_grad():
            scale.copy_(whole)


def test_a_measure_that_is_not_finite_is_infinity_too(tmp_path: Path) -> None:
    scores = latents(tmp_path)
    scores.measure = lambda original, modified: math.nan
    assert scores(OPTIONS) == [math.inf, math.inf]


def test_out_of_memory_halves_the_batch_and_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = latents(tmp_path / "a")(OPTIONS)
    draw, most = Sampler._draw, [2]

    def small(self: Sampler, plan: Any, seeds: Any, indices: range, *rest: Any) -> Any:
        if len(indices) > most[0]:
            raise torch.OutOfMemoryError("no")
        return draw(self, plan, seeds, indices, *rest)

    monkeypatch.setattr(Sampler, "_draw", small)
    fewer = latents(tmp_path / "b")
    assert fewer(OPTIONS) == pytest.approx(wanted, rel=1e-4) and fewer.sampler.chunk == 2
    most[0] = 0
    with pytest.raises(SamplingError, match="out of memory with a single image"):
        fewer([(FIRST, SECOND)])
    assert len((tmp_path / "b" / "scores.jsonl").read_text().splitlines()) == 3  # the head and two scores
