"""What cannot be driven is refused by name, before any work, with what to do instead."""

from typing import Any

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline, KDPM2DiscreteScheduler, StableDiffusion3Img2ImgPipeline
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import CannotFollow, check, follow, watch
from lissom.core.errors import USAGE
from lissom.tests.core import tiny

DDIM = Scheduler(name="DDIMScheduler")
DPM = Scheduler(name="DPMSolverMultistepScheduler")
FLOW = Scheduler(name="FlowMatchEulerDiscreteScheduler")
EULER = Scheduler(name="EulerDiscreteScheduler")
PLMS = Scheduler(name="PNDMScheduler", config={"skip_prk_steps": True})
FLOW_HEUN = Scheduler(name="FlowMatchHeunDiscreteScheduler")
FLOW_UNIPC = Scheduler(name="UniPCMultistepScheduler", config={"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
WHOLE = (PLMS, *(Scheduler(name=name) for name in ("UniPCMultistepScheduler", "DEISMultistepScheduler", "LCMScheduler")))


def plan(scheduler: Scheduler, *steps: Any) -> SamplingPlan:
    made = [step if isinstance(step, Step) else Step(timestep=step) for step in steps]
    return SamplingPlan(scheduler=scheduler, steps=tuple(made))


REFUSED = [
    ("sd", plan(Scheduler(name="KDPM2DiscreteScheduler"), 5), r"KDPM2DiscreteScheduler: it inserts mid-points.*from_config"),
    ("sd", plan(Scheduler(name="DPMSolverSinglestepScheduler"), 5), "SinglestepScheduler: it is not among the tested ones"),
    ("sd", plan(Scheduler(name="PNDMScheduler"), 5), "skip_prk_steps=False it begins with Runge-Kutta.*; True can be followed"),
    ("sd", plan(Scheduler(name="UniPCMultistepScheduler", config={"solver_p": "x"}), 5), "leaves its steps to another"),
    (
        "sd",
        plan(Scheduler(name="UniPCMultistepScheduler", config={"solver_type": "bh1"}), 5),
        "add final_sigmas_type='sigma_min'",
    ),
    ("sd3", plan(Scheduler(name="DEISMultistepScheduler", config={"use_flow_sigmas": True}), 5), "leaves the noise in"),
    ("sd", plan(Scheduler(name="DDIMSheduler"), 5), "has no such class.*Did you mean 'DDIMScheduler'"),
    ("sd", plan(Scheduler(name="DPMSolverMultistepInverseScheduler"), 5), "not among the tested ones"),
    ("sd3", plan(Scheduler(name="FlowMatchLCMScheduler"), 5), r"FlowMatchEulerDiscreteScheduler\.from_config"),
    ("sd", plan(Scheduler(name="EulerDiscreteScheduler", config={"timestep_type": "continuous"}), 5), "log-sigmas"),
    ("sd", plan(FLOW, 5), "does not fit the pipeline"),
    ("flux", plan(DDIM, 5), "does not fit the pipeline.*flow matching"),
    ("dit", plan(EULER, 5), "does not scale noise and input as EulerDiscreteScheduler needs"),
    ("dit", plan(Scheduler(name="EulerAncestralDiscreteScheduler"), 5), "does not scale noise and input"),
    ("dit", plan(Scheduler(name="HeunDiscreteScheduler"), 5), "does not scale noise and input"),
    ("dit", plan(Scheduler(name="LMSDiscreteScheduler"), 5), "does not scale noise and input"),
    ("sd3", plan(Scheduler(name="LCMScheduler"), 5), "does not fit the pipeline"),
    ("sd", plan(FLOW_HEUN, 5), "does not fit the pipeline"),
    *(("sd", plan(whole, 10, 5.5), "takes whole timesteps, got 5.5") for whole in WHOLE),
    ("sd", plan(PLMS, Step(timestep=10, sigma=2.0)), "has no noise levels of its own"),
    ("sd", plan(Scheduler(name="LCMScheduler"), Step(timestep=10, sigma=2.0)), "has no noise levels of its own"),
    ("sd3", plan(FLOW_UNIPC, Step(timestep=1000), Step(timestep=999, sigma=0.9999995)), "must strictly descend"),
    ("sd3", plan(FLOW_HEUN, 10, 0), "above 0 and up to 1000"),
    ("sd", plan(DDIM, 1000, 5), "from 0 to 999, got 1000 to 5"),
    ("sd", plan(DDIM, 10, -1), "from 0 to 999"),
    ("sd", plan(DDIM, 10, 5.5), "DDIMScheduler takes whole timesteps, got 5.5"),
    ("sd", plan(DPM, 5.5), "takes whole timesteps"),
    ("sd3", plan(FLOW, 10, 0), "above 0 and up to 1000"),
    ("sd3", plan(FLOW, 1000.5), "above 0 and up to 1000"),
    ("sd3", plan(FLOW, 500.00000001, 500), "equal in single precision"),
    ("sd", plan(DDIM, Step(timestep=10, sigma=2.0)), "has no noise levels of its own"),
    ("sd", plan(EULER, Step(timestep=10, sigma=2.0), Step(timestep=5, sigma=3.0)), "must strictly descend"),
    ("sd3", plan(FLOW, Step(timestep=10, sigma=1.5)), "start at 1 or below"),
    (
        "sd",
        plan(DDIM, Step(timestep=9, skip=("mid_block.resnet.0",))),
        "no layer 'mid_block.resnet.0'. Did you mean 'mid_block.resnets",
    ),
    ("sd", plan(DDIM, Step(timestep=9, skip=("conv_in",))), "the layer 'conv_in' of unet cannot be skipped"),
    ("sd3", plan(FLOW, Step(timestep=9, skip=("transformer_blocks.0.attn",))), "cannot be skipped"),
    ("sd", plan(DDIM, Step(timestep=9, skip=("",))), "cannot be skipped"),
]


@pytest.mark.parametrize(("family", "wrong", "message"), REFUSED)
def test_refused(family: str, wrong: SamplingPlan, message: str) -> None:
    with pytest.raises(CannotFollow, match=message) as caught:
        check(tiny.shared(family), wrong)
    assert caught.value.exit_code == USAGE


def test_a_plan_may_replace_a_scheduler_that_cannot_follow() -> None:
    pipe = tiny.sd(scheduler=KDPM2DiscreteScheduler(**tiny.SD_BETAS))
    check(pipe, plan(DDIM, 5))


def test_nested_follow_is_refused() -> None:
    pipe = tiny.shared("dit")
    with follow(pipe, plan(DDIM, 5)), pytest.raises(CannotFollow, match="already following"), follow(pipe, plan(DDIM, 9)):
        pass


def test_pipelines_without_denoiser_or_with_inner_pipelines() -> None:
    class Bare(DiffusionPipeline):
        def __init__(self, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

    bare = Bare(DDIMScheduler())
    with pytest.raises(CannotFollow, match="cannot drive a Bare: it has not a scheduler and one of unet"):
        check(bare, plan(DDIM, 5))
    bare.__dict__["decoder_pipe"] = tiny.shared("dit")
    with pytest.raises(CannotFollow, match=r"inner pipeline \(decoder_pipe\)"):
        check(bare, plan(DDIM, 5))


def test_options_of_another_scheduler_are_refused_unless_off() -> None:
    pipe = tiny.shared("ddim")
    with follow(pipe, plan(DPM, 500, 100)):
        pipe()  # passes eta=0 to a solver that has none
    with pytest.raises(CannotFollow, match=r"eta=0\.5, which DPMSolverMultistepScheduler"), follow(pipe, plan(DPM, 500, 100)):
        pipe(eta=0.5)


def test_null_in_a_saved_config_means_the_default() -> None:
    saved = Scheduler(name="DPMSolverMultistepScheduler", config={"lambda_min_clipped": None, "solver_order": 2})
    check(tiny.shared("sd"), plan(saved, 500, 100))


def test_what_follows_no_plan_can_still_be_watched() -> None:
    pipe = tiny.sd()

    class LEditsPPPipelineStableDiffusion(type(pipe)):  # type: ignore[misc]  named like one that is refused
        pass

    pipe.__class__ = LEditsPPPipelineStableDiffusion
    with pytest.raises(CannotFollow, match="cannot drive a LEditsPPPipelineStableDiffusion: it computes its own stride"):
        check(pipe, plan(DDIM, 5))
    with watch(pipe) as run:
        pipe(prompt="a shoe", num_inference_steps=2, **tiny.size())
    assert run.calls == 2


def test_image_to_image_of_flow_matching_needs_a_solver_that_scales_noise() -> None:
    pipe = tiny.sd3(StableDiffusion3Img2ImgPipeline)
    solver = Scheduler(
        name="DPMSolverMultistepScheduler", config={"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    )
    with pytest.raises(
        CannotFollow, match="noises its images with scale_noise, which DPMSolverMultistepScheduler does not have"
    ):
        check(pipe, plan(solver, 500, 100))
    check(pipe, plan(FLOW, 500, 100))
