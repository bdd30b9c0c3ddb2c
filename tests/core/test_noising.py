"""Training inputs: the schedulers' own formulas, and what each kind of model answers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from lissom.core.errors import UserError
from lissom.core.noising import Noising

CLEAN, NOISE = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
TIMES = torch.tensor([0, 333, 999])


def test_variance_preserving_as_diffusers_noises() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    shown, target = Noising.of(scheduler)(CLEAN, NOISE, TIMES)
    torch.testing.assert_close(shown, scheduler.add_noise(CLEAN, NOISE, TIMES))
    assert target is NOISE


def test_a_sigma_scheduler_shows_the_same_samples() -> None:
    same = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    shown, _ = Noising.of(EulerDiscreteScheduler(**same))(CLEAN, NOISE, TIMES)
    torch.testing.assert_close(shown, Noising.of(DDIMScheduler(**same))(CLEAN, NOISE, TIMES)[0])


def test_velocity_is_what_the_scheduler_calls_it() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    _, target = Noising.of(scheduler)(CLEAN, NOISE, TIMES)
    torch.testing.assert_close(target, scheduler.get_velocity(CLEAN, NOISE, TIMES))


def test_sample_prediction_answers_the_clean_sample() -> None:
    assert Noising.of(DDPMScheduler(prediction_type="sample"))(CLEAN, NOISE, TIMES)[1] is CLEAN


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_as_diffusers_noises(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    noising = Noising.of(scheduler)
    times = scheduler.timesteps[[0, 500, 998]]  # after its shift
    shown, target = noising(CLEAN, NOISE, times)
    torch.testing.assert_close(shown, scheduler.scale_noise(CLEAN, times, NOISE), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target, NOISE - CLEAN)
    u = torch.linspace(0, 0.999, 1000)
    torch.testing.assert_close(noising.times(u), scheduler.timesteps, atol=1e-2, rtol=0)


def test_flow_sigmas_of_other_schedulers() -> None:
    noising = Noising.of(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))
    assert noising.kind == "flow" and noising.shift == 3.0


def test_times_are_whole_and_cover_the_schedule() -> None:
    times = Noising.of(DDPMScheduler(num_train_timesteps=50)).times(torch.linspace(0, 0.9999, 500))
    assert times.dtype == torch.long and sorted(set(times.tolist())) == list(range(50))


def test_other_schedules_are_refused() -> None:
    with pytest.raises(UserError, match="EDMEulerScheduler .* how its models are trained is not known here"):
        Noising.of(EDMEulerScheduler())
