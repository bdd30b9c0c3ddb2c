"""Solvers that call the denoiser twice in a step or draw noise, through whole pipelines: calls, skips, costs, noise per image."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from lissom.core import cost
from lissom.core.candidate import SamplingPlan, Scheduler, Seeds, Step
from lissom.core.conditions import UNCONDITIONAL, Conditions
from lissom.core.cost import measure, plan_macs
from lissom.core.driving import CannotFollow, Run, evaluations, follow, watch
from lissom.core.driving.drive import drive
from lissom.core.driving.schedulers import KINDS, entries
from lissom.core.driving.skip import skip
from lissom.core.driving.steering import Call, Next
from lissom.core.sampling import Sampler
from lissom.tests.core import tiny
from lissom.tests.core.test_driving import TIMES, Oracle

PLMS = PNDMScheduler(**tiny.SD_BETAS, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)
HEUN = HeunDiscreteScheduler(**tiny.SD_BETAS)
TWO_CALLS = {"sd plms": ("sd", PLMS), "sd heun": ("sd", HEUN), "sd3 heun": ("sd3", FlowMatchHeunDiscreteScheduler())}
LAYERS = {"sd": "mid_block.attentions.0", "sd3": "transformer_blocks.1"}


def plan_of(scheduler: Any, times: tuple[float, ...] = TIMES, skips: dict[int, tuple[str, ...]] | None = None) -> SamplingPlan:
    steps = tuple(Step(timestep=t, skip=(skips or {}).get(i, ())) for i, t in enumerate(times))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def call(family: str, n: int = 2) -> dict[str, Any]:
    return tiny.FAMILIES[family][1](n) | {"generator": tiny.generators(n)}


def test_evaluations_of_each_step() -> None:
    def counted(name: str, steps: int) -> tuple[int, ...]:
        times = tuple(float(t) for t in range(steps, 0, -1))
        return evaluations(plan_of(PLMS, times).model_copy(update={"scheduler": Scheduler(name=name)}))

    for name in KINDS:
        heun, plms = "Heun" in name, name == "PNDMScheduler"
        assert counted(name, 1) == (1,)
        assert counted(name, 4) == ((2, 2, 2, 1) if heun else (2, 1, 1, 1) if plms else (1, 1, 1, 1))


@pytest.mark.parametrize("times", [TIMES[:1], TIMES[:2], TIMES])
@pytest.mark.parametrize("case", TWO_CALLS)
def test_every_call_belongs_to_the_step_it_works_out(case: str, times: tuple[float, ...]) -> None:
    family, scheduler = TWO_CALLS[case]
    pipe, seen = tiny.shared(family), []

    def log(call: Call, following: Next) -> Any:
        seen.append((call.run.index, call.run.times[call.run.evals], call.run.steps))
        return following(call)

    plan = plan_of(scheduler, times)
    state = Run(plan)
    with drive(pipe, state, [log]):
        pipe(**call(family))
    state.verify()
    indices, shown, completed = zip(*seen, strict=True)
    assert tuple(Counter(indices)[i] for i in range(len(times))) == evaluations(plan)
    assert shown == tuple(times[i] for i in entries(plan.scheduler.name, len(times)))
    assert completed == indices and state.steps == len(times)  # a step counts once all of its calls are made
    assert (
        state.evals
        == sum(evaluations(plan))
        == {"PNDMScheduler": len(times) + (len(times) > 1)}.get(plan.scheduler.name, 2 * len(times) - 1)
    )


@pytest.mark.parametrize("case", TWO_CALLS)
def test_a_skip_holds_for_all_calls_of_its_step_and_is_counted_so(case: str) -> None:
    family, scheduler = TWO_CALLS[case]
    pipe, layer, executed = tiny.shared(family), LAYERS[family], []
    arguments = {k: v for k, v in tiny.FAMILIES[family][1](1).items() if k != "output_type"}
    costs = measure(pipe, arguments)
    module = tiny.denoiser(pipe).get_submodule(layer)
    for skipped in range(len(TIMES)):
        plan, counter = plan_of(scheduler, skips={skipped: (layer,)}), cost._Counter()
        executed.clear()
        hook = module.register_forward_hook(lambda *_: executed.append(1))
        with follow(pipe, plan) as state:
            pipe(**arguments)
        hook.remove()
        assert state.calls == sum(evaluations(plan))
        assert len(executed) == sum(evaluations(plan)) - evaluations(plan)[skipped]
        with drive(pipe, Run(plan), [counter, skip]):
            pipe(**arguments)
        assert counter.flops // 2 == plan_macs(costs, plan)


def test_a_measurement_is_of_one_evaluation_whatever_the_solver() -> None:
    arguments = {k: v for k, v in tiny.FAMILIES["sd"][1](1).items() if k != "output_type"}
    totals = {measure(tiny.sd(scheduler=s), arguments).total for s in (PLMS, HEUN, LCMScheduler(), PNDMScheduler())}
    assert totals == {measure(tiny.shared("sd"), arguments).total}


STOCK = {
    "plms": ("sd", PLMS),
    "heun": ("sd", HEUN),
    "heun leading": ("sdxl", HeunDiscreteScheduler(**tiny.SD_BETAS, timestep_spacing="leading", steps_offset=1)),
    "unipc": ("sd", UniPCMultistepScheduler(**tiny.SD_BETAS)),
    "lms": ("sd", LMSDiscreteScheduler(**tiny.SD_BETAS)),
    "euler ancestral": ("sd", EulerAncestralDiscreteScheduler(**tiny.SD_BETAS)),
    "lcm": ("sd", LCMScheduler(**tiny.SD_BETAS)),
    "dit plms": ("dit", PNDMScheduler(skip_prk_steps=True)),
    "flow heun": ("sd3", FlowMatchHeunDiscreteScheduler(shift=3.0)),
}


@pytest.mark.parametrize("case", STOCK)
def test_the_stock_schedule_equals_the_stock_run(case: str) -> None:
    family, scheduler = STOCK[case]
    pipe = tiny.FAMILIES[family][0]()
    pipe.scheduler = scheduler
    with watch(pipe) as stock:
        pipe(**call(family), num_inference_steps=5)
        times, sigmas = scheduler.timesteps.tolist(), getattr(scheduler, "sigmas", [None] * 10)
    order = entries(type(scheduler).__name__, 5)
    flow = "Flow" in type(scheduler).__name__
    firsts = [order.index(i) for i in range(5)]
    steps = tuple(Step(timestep=times[i], sigma=float(sigmas[i]) if flow else None) for i in firsts)
    plan = SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)
    with follow(pipe, plan) as followed:
        pipe(**call(family), num_inference_steps=50)
    assert stock.calls == followed.calls == sum(evaluations(plan))
    assert stock.last is not None and torch.equal(followed.last, stock.last)


@pytest.mark.parametrize("scheduler", [PLMS, HEUN, LMSDiscreteScheduler(**tiny.SD_BETAS)], ids=["plms", "heun", "lms"])
def test_image_to_image_begins_at_the_first_timestep(scheduler: Any) -> None:
    pipe, plan, results = tiny.sd(StableDiffusionImg2ImgPipeline), plan_of(scheduler, (600.0, 333.0, 17.0)), []
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for strength, asked in ((0.2, 3), (0.9, 50)):
        state, oracle = Run(plan), Oracle()
        arguments = {"prompt": ["a shoe", "a bag"], "image": picture, "strength": strength, "output_type": "latent"}
        with drive(pipe, state, [oracle]):
            pipe(**arguments, num_inference_steps=asked, generator=tiny.generators(2))
        state.verify()
        assert oracle.drift < 3e-5 and state.evals == sum(evaluations(plan))
        results.append(state.last)
    assert torch.equal(results[0], results[1])


def test_a_run_that_ends_inside_a_step_is_short_of_it() -> None:
    pipe = tiny.shared("sdxl")
    with pytest.raises(CannotFollow, match="ran 3 of 5 planned steps"), follow(pipe, plan_of(HEUN)) as state:
        pipe.scheduler.set_timesteps(5)
        x = torch.randn(1, 4, 8, 8)
        for t in pipe.scheduler.timesteps[:7]:  # six calls are three steps; the corrector of the fourth is missing
            x = pipe.scheduler.step(x, t, x).prev_sample
        assert state.evals == 7


def consistency() -> Any:
    pipe = tiny.sd(LatentConsistencyModelPipeline, scheduler=LCMScheduler(**tiny.SD_BETAS))
    torch.manual_seed(0)
    pipe.unet = tiny.unet(time_cond_proj_dim=8)
    return pipe


ANCESTRAL = EulerAncestralDiscreteScheduler(**tiny.SD_BETAS)
NOISY: dict[str, tuple[Any, Any, str]] = {  # pipeline, scheduler, what it is asked for
    "sd euler ancestral": (lambda: tiny.shared("sd"), ANCESTRAL, "prompt"),
    "sdxl euler ancestral": (lambda: tiny.shared("sdxl"), ANCESTRAL, "prompt"),
    "sd lcm": (lambda: tiny.shared("sd"), LCMScheduler(**tiny.SD_BETAS), "prompt"),
    "consistency model": (consistency, LCMScheduler(**tiny.SD_BETAS), "prompt"),
    "sd ddpm": (lambda: tiny.shared("sd"), DDPMScheduler(**tiny.SD_BETAS, clip_sample=False), "prompt"),
    "dit lcm": (lambda: tiny.shared("dit"), LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02), "class"),
    "dit ddpm": (lambda: tiny.shared("dit"), DDPMScheduler(clip_sample=False), "class"),
    "ddpm lcm": (lambda: tiny.shared("ddpm"), LCMScheduler(), "nothing"),
    "ddim ddpm": (lambda: tiny.shared("ddim"), DDPMScheduler(clip_sample=False), "nothing"),
}
ASKED = {
    "prompt": Conditions([{"prompt": text} for text in ("a shoe", "a bag", "coat")], "prompts"),
    "class": Conditions([{"class_labels": i} for i in (1, 5, 7)], "classes"),
    "nothing": UNCONDITIONAL,
}


@pytest.mark.parametrize("case", NOISY)
def test_noise_comes_from_each_images_own_generator(case: str) -> None:
    """Also where the pipeline hands none to `step`: three at once equal three alone, whatever the global generator holds."""
    make, scheduler, what = NOISY[case]
    pipe, plan, seeds = make(), plan_of(scheduler, (901.0, 500.0, 120.0)), Seeds(role="search", base=4, count=3)
    made = []
    for chunk, state in ((3, 1), (1, 2)):
        torch.manual_seed(state)
        size = tiny.size() if what == "prompt" else {}
        sampler = Sampler(pipe, ASKED[what], chunk=chunk, call=size)
        batches = sampler.images(plan, seeds, output="latents" if what == "prompt" else "pixels")
        made.append(torch.cat([b.latents for b in batches if b.latents is not None]))
    together, alone = made
    assert len(together) == 3 and (together[0] - together[1]).abs().max() > 0.1
    assert (together - alone).abs().max() <= 2e-5 * alone.abs().max()
