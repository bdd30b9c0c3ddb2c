"""Recorded denoiser calls: which noise levels, which images, and that they are what the pipeline really calls with."""

from typing import Any

import pytest
import torch
from lissom.core import calibration
from lissom.core.candidate import image_seed
from lissom.core.conditions import Conditions
from lissom.core.errors import UserError
from lissom.core.sampling import Sampler
from lissom.tests.core import tiny

SHOES = Conditions([{"prompt": "a shoe"}, {"prompt": "a bag"}], "test")


def sampler(name: str, **call: Any) -> Sampler:
    pipe, arguments = tiny.shared(name), tiny.FAMILIES[name][1](1)
    rows = {"prompt": SHOES, "class_labels": Conditions([{"class_labels": 3}], "test")}
    conditions = next((rows[k] for k in rows if k in arguments), Conditions([{}], "none"))
    kept = {k: v for k, v in arguments.items() if k not in (*rows, "batch_size", "output_type")}
    return Sampler(pipe, conditions, chunk=4, call=kept | call)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_call_has_its_own_noise_level_and_images(family: str) -> None:
    calls = calibration.record(sampler(family), count=5, times=3, seed=0)
    assert [call.images for call in calls] == [range(1), range(1, 3), range(3, 5)]  # all images, each once
    levels = [call.timestep for call in calls]
    assert levels == sorted(set(levels), reverse=True)
    denoiser = tiny.denoiser(tiny.shared(family))
    for call in calls:
        assert call.rows % len(call.images) == 0 and len(call.kwargs[call.sample]) == call.rows
        out = call(denoiser)
        assert out.shape == call.kwargs[call.sample].shape and not out.requires_grad  # the noise alone, no variance
    assert not any("_lissom" in vars(m) for m in (tiny.shared(family).scheduler, denoiser))


def test_noise_levels_are_the_middles_of_equal_parts() -> None:
    calls = calibration.record(sampler("dit", num_inference_steps=50), count=4, times=4, seed=0)
    assert [call.timestep for call in calls] == [980 - 20 * k for k in (6, 18, 31, 43)]


def test_a_recorded_call_is_the_pipelines_own() -> None:
    """Against the calls that the untouched pipeline makes, seen by a hook."""
    s = sampler("sd", num_inference_steps=4)
    (call,) = calibration.record(s, count=2, times=1, seed=7)
    seen: list[tuple[Any, Any]] = []
    hook = s.pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    generators = [torch.Generator().manual_seed(image_seed("calibrate", 7, i)) for i in range(2)]
    s.pipe(["a shoe", "a bag"], generator=generators, output_type="latent", **s.call)
    hook.remove()
    args, kwargs = seen[2]  # the middle of the schedule
    assert call.rows == 4  # guidance
    assert torch.equal(call.kwargs["sample"], args[0])
    assert torch.equal(call.kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states"])


def test_other_seeds_other_calls_and_equal_ones_equal() -> None:
    one, again, other = (calibration.record(sampler("dit"), 2, 2, seed)[0].kwargs["hidden_states"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_out_of_memory_halves_the_images_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler("dit")
    draw = Sampler._draw

    def small(self: Sampler, plan: Any, seeds: Any, indices: range, *rest: Any) -> Any:
        if len(indices) > 2:
            raise torch.OutOfMemoryError("no")
        return draw(self, plan, seeds, indices, *rest)

    monkeypatch.setattr(Sampler, "_draw", small)
    calls = calibration.record(s, count=8, times=2, seed=0)
    assert [call.images for call in calls] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert len({call.timestep for call in calls}) == 2 and s.chunk <= 2


def test_a_call_is_never_larger_than_a_chunk() -> None:
    s = sampler("dit")
    s.chunk = 2
    calls = calibration.record(s, count=6, times=2, seed=0)
    assert [call.images for call in calls] == [range(2), range(2, 3), range(3, 5), range(5, 6)] and s.chunk == 2


def pictures(count: int) -> list[torch.Tensor]:
    return [
        torch.randint(0, 255, (12, 10, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in range(count)
    ]


def test_from_images_is_the_forward_process() -> None:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, solved for x_0: the VAE's latents of the resized image."""
    s = sampler("sd", num_inference_steps=10)
    own = pictures(3)
    calls = calibration.from_images(s, own, count=4, times=2, seed=0)
    abar = s.pipe.scheduler.alphas_cumprod
    for call in calls:
        x_t = call.kwargs["sample"]
        assert torch.equal(*x_t.chunk(2))  # guidance: the same samples with and without the text
        for k, i in enumerate(call.images):
            eps = torch.randn(x_t.shape[1:], generator=torch.Generator().manual_seed(image_seed("calibrate", 0, i)))
            a = abar[int(call.timestep)]
            x_0 = (x_t[k] - (1 - a).sqrt() * eps) / a.sqrt()
            pixels = own[i % 3].movedim(-1, 0)[None].float() / 127.5 - 1
            square = torch.nn.functional.interpolate(pixels[:, :, 1:11], (8, 8), mode="bilinear", antialias=True)
            with torch.no_grad():
                wanted = s.pipe.vae.encode(square).latent_dist.mean[0] * s.pipe.vae.config.scaling_factor
            torch.testing.assert_close(x_0, wanted, atol=2e-3, rtol=1e-3)


def test_from_images_under_flow_matching_and_euler_scaling() -> None:
    s = sampler("sd3", num_inference_steps=10)
    (call,) = calibration.from_images(s, pictures(2), count=2, times=1, seed=0)
    sigma = call.timestep / 1000
    eps = torch.randn(
        call.kwargs["hidden_states"].shape[1:], generator=torch.Generator().manual_seed(image_seed("calibrate", 0, 1))
    )
    clean = (call.kwargs["hidden_states"][1] - sigma * eps) / (1 - sigma)
    (later,) = calibration.from_images(s, pictures(2), count=2, times=1, seed=5)  # other noise, the same images
    eps = torch.randn(eps.shape, generator=torch.Generator().manual_seed(image_seed("calibrate", 5, 1)))
    torch.testing.assert_close(clean, (later.kwargs["hidden_states"][1] - sigma * eps) / (1 - sigma), atol=1e-4, rtol=1e-4)
    s = sampler("sdxl", num_inference_steps=10)  # Euler: shown x / sqrt(sigma^2 + 1)
    (call,) = calibration.from_images(s, pictures(2), count=2, times=1, seed=0)
    step = s.pipe.scheduler.index_for_timestep(torch.tensor(call.timestep))
    sigma = float(s.pipe.scheduler.sigmas[step])
    eps = torch.randn(call.kwargs["sample"].shape[1:], generator=torch.Generator().manual_seed(image_seed("calibrate", 0, 0)))
    clean = call.kwargs["sample"][0] * (sigma**2 + 1) ** 0.5 - sigma * eps
    assert clean.abs().max() < 3 < eps.abs().max() * sigma  # latents of the tiny VAE are small; the noise is not


def test_pixel_models_take_the_image_itself() -> None:
    s = sampler("ddim", num_inference_steps=10)
    (call,) = calibration.from_images(s, [torch.full((16, 16, 3), 255, dtype=torch.uint8)], count=1, times=1, seed=0)
    a = s.pipe.scheduler.alphas_cumprod[int(call.timestep)]
    eps = torch.randn(call.kwargs["sample"].shape[1:], generator=torch.Generator().manual_seed(image_seed("calibrate", 0, 0)))
    torch.testing.assert_close(
        (call.kwargs["sample"][0] - (1 - a).sqrt() * eps) / a.sqrt(), torch.ones(3, 8, 8), atol=1e-4, rtol=0
    )


def test_packed_latents_are_refused() -> None:
    with pytest.raises(UserError, match="packs its latents.*Leave data out"):
        calibration.from_images(sampler("flux"), pictures(1), count=1, times=1, seed=0)


def test_the_first_call_runs_no_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler("sdxl")
    monkeypatch.setattr(type(s.pipe.unet), "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    call = calibration.first(s, seed=0)
    assert call.rows == 2 and call.timestep == float(s.pipe.scheduler.timesteps[0])
