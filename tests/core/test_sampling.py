"""One seed per image at any batch size, for every family; what fails, fails with a sentence."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from lissom.core.candidate import SamplingPlan, Scheduler, Seeds, Step, image_seed
from lissom.core.conditions import UNCONDITIONAL, Conditions
from lissom.core.driving import CannotFollow, Memo
from lissom.core.sampling import Sampler, SamplingError
from lissom.tests.core import tiny

PROMPTS = Conditions([{"prompt": text, "label": i} for i, text in enumerate(("a shoe", "a bag", "coat"))], "prompts")
CLASSES = Conditions([{"class_labels": i} for i in (1, 5, 7)], "classes")
CONDITIONS = {"dit": CLASSES, "ddpm": UNCONDITIONAL, "ddim": UNCONDITIONAL}
TIMES = (901, 500, 120)
SEEDS = Seeds(role="search", base=4, count=3)


def plan(scheduler: Any, times: tuple[float, ...] = TIMES) -> SamplingPlan:
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=tuple(Step(timestep=t) for t in times))


def sampler(family: str, pipe: Any = None, **options: Any) -> Sampler:
    skipped = ("prompt", "class_labels", "batch_size", "output_type")
    call = {k: v for k, v in tiny.FAMILIES[family][1](1).items() if k not in skipped}
    return Sampler(pipe or tiny.shared(family), CONDITIONS.get(family, PROMPTS), **({"call": call} | options))


def latents(sampler: Sampler, plan: SamplingPlan | None, seeds: Seeds = SEEDS, **options: Any) -> torch.Tensor:
    return torch.cat([b.latents for b in sampler.images(plan, seeds, output="latents", **options) if b.latents is not None])


def pixels(sampler: Sampler, plan: SamplingPlan | None, seeds: Seeds = SEEDS, **options: Any) -> torch.Tensor:
    return torch.cat([b.pixels for b in sampler.images(plan, seeds, **options) if b.pixels is not None])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batches_equal_singles(family: str) -> None:
    steps = plan(tiny.shared(family).scheduler)
    together, alone = (latents(sampler(family, chunk=chunk), steps) for chunk in (3, 1))
    assert len(together) == 3
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pixels_are_those_of_the_pipeline(family: str) -> None:
    pipe = tiny.shared(family)
    made = pixels(sampler(family), None, steps=4)
    generators = [torch.Generator("cpu").manual_seed(image_seed("search", 4, i)) for i in range(3)]
    arguments = tiny.FAMILIES[family][1](3) | {"output_type": "np", "num_inference_steps": 4, "generator": generators}
    stock = (pipe(**arguments)[0] * 255).round().astype("uint8")  # as numpy_to_pil does
    assert made.dtype == torch.uint8 and made.shape == (3, 8, 8, 3)
    assert np.array_equal(made.numpy(), stock)


def test_dit_with_a_stochastic_solver_depends_on_the_seeds_only() -> None:
    """DiTPipeline hands no generator to the scheduler: left alone, the global state would decide."""
    pipe = tiny.shared("dit")
    for noisy in (
        DDPMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ):
        results = []
        for chunk, state in ((3, 1), (3, 2), (1, 3)):
            torch.manual_seed(state)
            results.append(latents(sampler("dit", pipe, chunk=chunk), plan(noisy)))
        assert torch.equal(results[0], results[1])
        assert (results[0] - results[2]).abs().max() <= 1e-5 * results[0].abs().max()


def test_chunks_have_fixed_boundaries() -> None:
    parts = sampler("ddim", chunk=4).images(plan(tiny.shared("ddim").scheduler), Seeds(role="search", base=0, start=2, count=9))
    assert [(b.indices.start, b.indices.stop) for b in parts] == [(2, 4), (4, 8), (8, 11)]


def test_plans_share_their_leading_steps() -> None:
    pipe, memo = tiny.shared("sd"), Memo()
    warm, cold = sampler("sd", memo=memo, chunk=2, fingerprint="w"), sampler("sd", chunk=2)
    pixels(warm, plan(pipe.scheduler))
    second = plan(pipe.scheduler, (901, 500, 60))
    assert torch.equal(pixels(warm, second), pixels(cold, second))
    assert (warm.calls, warm.served) == (8, 4)
    assert (cold.calls, cold.served) == (6, 0)
    pixels(sampler("sd", memo=memo, chunk=2, fingerprint="other weights"), second)
    fresh = sampler("sd", memo=memo, chunk=2, fingerprint="w")
    pixels(fresh, second)
    assert (fresh.calls, fresh.served) == (0, 6)


def test_embeddings_in_the_call() -> None:
    pipe = tiny.shared("sd")
    embeds, none = pipe.encode_prompt("a shoe", "cpu", 1, True)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": none, "guidance_scale": 3.0, **tiny.size()}
    by_text = Sampler(pipe, Conditions([{"prompt": "a shoe"}], "one"), call={"guidance_scale": 3.0, **tiny.size()})
    one_row = latents(Sampler(pipe, UNCONDITIONAL, call=call), plan(pipe.scheduler))
    torch.testing.assert_close(one_row, latents(by_text, plan(pipe.scheduler)), rtol=1e-5, atol=1e-5)
    call |= {key: call[key].repeat(3, 1, 1) for key in ("prompt_embeds", "negative_prompt_embeds")}
    full = latents(Sampler(pipe, UNCONDITIONAL, call=call), plan(pipe.scheduler))
    torch.testing.assert_close(full, one_row, rtol=1e-5, atol=1e-5)
    with pytest.raises(SamplingError, match="3 rows of embeddings"):
        latents(Sampler(pipe, UNCONDITIONAL, call=call, chunk=2), plan(pipe.scheduler))


def test_texts_in_the_call_hold_for_every_image() -> None:
    pipe = tiny.shared("sd")
    call = {"guidance_scale": 3.0, **tiny.size()}
    plain, negative = (latents(sampler("sd", call=call | c), plan(pipe.scheduler)) for c in ({}, {"negative_prompt": "bad"}))
    assert plain.shape == negative.shape and not torch.equal(plain, negative)
    whole = latents(Sampler(pipe, UNCONDITIONAL, call=call | {"prompt": "coat"}), plan(pipe.scheduler))
    assert len(whole) == 3


def test_conditions_are_needed_by_pipelines_that_have_any() -> None:
    with pytest.raises(SamplingError, match="needs conditions"):
        pixels(Sampler(tiny.shared("dit"), UNCONDITIONAL), None, steps=2)


def test_gray_pictures_get_three_channels() -> None:
    pipe = tiny.ddim(channels=1)
    made = pixels(sampler("ddim", pipe), plan(pipe.scheduler))
    assert made.shape == (3, 8, 8, 3) and torch.equal(made[..., 0], made[..., 2])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)
def test_running_out_of_memory_halves_the_chunk(error: Exception) -> None:
    pipe = tiny.ddim()

    def full(module: Any, args: Any) -> None:
        if len(args[0]) > limit:
            raise error

    pipe.unet.register_forward_pre_hook(full)
    limit, small = 2, sampler("ddim", pipe, chunk=8)
    batches = list(small.images(plan(pipe.scheduler), Seeds(role="search", base=4, count=5)))
    assert [len(b.indices) for b in batches] == [2, 2, 1] and small.chunk == 2
    limit = 0
    with pytest.raises(SamplingError, match="out of memory with a single image"):
        pixels(small, plan(pipe.scheduler))
    assert small.chunk == 1 and type(pipe.unet).__call__ is torch.nn.Module.__call__


def test_other_errors_pass() -> None:
    pipe = tiny.ddim()

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pixels(sampler("ddim", pipe), None, steps=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_images_are_an_error(value: float) -> None:
    for family, make in (("ddim", tiny.ddim), ("sd", tiny.sd)):
        pipe = make()
        denoiser = tiny.denoiser(pipe)
        torch.nn.init.constant_(denoiser.conv_out.bias, value)
        with pytest.raises(SamplingError, match="images 0 to 2: the samples hold NaN or infinity"):
            pixels(sampler(family, pipe), plan(pipe.scheduler))
    pipe = tiny.sd()
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(SamplingError, match="the pixels hold NaN"):
        pixels(sampler("sd", pipe), plan(pipe.scheduler))


def test_an_unfit_plan_is_refused_before_the_first_batch() -> None:
    with pytest.raises(CannotFollow):
        sampler("ddim").images(plan(tiny.shared("ddim").scheduler, (5000,)), SEEDS)


def test_no_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.ddim()
    pipe.set_progress_bar_config(desc="mine")
    pixels(sampler("ddim", pipe), plan(pipe.scheduler))
    assert capfd.readouterr().err == "" and pipe._progress_bar_config == {"desc": "mine"}
