"""Pipelines of every family along a plan: the golden oracle, and that nothing is left behind."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import CannotFollow, Run, follow, watch
from lissom.core.driving.drive import drive
from lissom.core.driving.steering import Call, Next
from lissom.tests.core import tiny

TIMES = (901.0, 640.0, 333.0, 120.0, 17.0)
X0 = 0.3
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CLASS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm flow": "DPMSolverMultistepScheduler",
    "plms": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "unipc flow": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "heun flow": "FlowMatchHeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
}

SOLVERS = [
    *((family, solver) for family in ("sd", "sdxl") for solver in CLASS if "flow" not in solver),
    *((family, solver) for family in ("dit", "ddim", "ddpm") for solver in ("ddim", "dpm", "plms", "unipc", "deis")),
    *((family, solver) for family in ("sd3", "flux") for solver in ("own", "dpm flow", "unipc flow", "heun flow")),
]


def plan_for(pipe: Any, solver: str = "own", times: tuple[float, ...] = TIMES) -> SamplingPlan:
    own = Scheduler.of(pipe.scheduler)
    if solver in ("dpm flow", "unipc flow", "heun flow"):
        own = Scheduler(name=CLASS[solver], config=FLOW)
    elif solver != "own":
        config = own.config if solver == "ddim" and own.name == "DDIMScheduler" else _betas(own)
        own = Scheduler(name=CLASS[solver], config=config)
    return SamplingPlan(scheduler=own, steps=tuple(Step(timestep=t) for t in times))


def _betas(own: Scheduler) -> dict[str, Any]:
    keys = ("beta_schedule", "beta_start", "beta_end")
    return {k: own.config[k] for k in keys} | {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": True}


def run(pipe: Any, plan: SamplingPlan, family: str, n: int = 2, **changes: Any) -> torch.Tensor:
    """The samples after the last step."""
    with follow(pipe, plan) as state:
        pipe(**(tiny.FAMILIES[family][1](n) | {"generator": tiny.generators(n)} | changes))
    assert state.last is not None
    return state.last


class Oracle:
    """Predicts exactly for x0 = X0 everywhere. The noise it sees must then stay the same along the whole plan."""

    def __init__(self) -> None:
        self.noise: torch.Tensor | None = None
        self.drift = 0.0

    def __call__(self, call: Call, following: Next) -> Any:
        out = following(call)
        shown = next(x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor))
        t = call.run.times[call.run.evals]  # of a second call in a step, the timestep at which it ends
        assert call.run.plan is not None
        flow = call.run.plan.scheduler.config.get("use_flow_sigmas") or call.run.plan.scheduler.name.startswith("Flow")
        alpha, sigma = (1 - t / 1000, t / 1000) if flow else _vp(call, t)
        if self.noise is None:
            self.noise = (shown - alpha * X0) / sigma
        self.drift = max(self.drift, float((shown - alpha * X0 - sigma * self.noise).abs().max()))
        answer = self.noise - X0 if flow else self.noise
        if out[0].shape[1] == 2 * answer.shape[1] and answer.ndim == 4:  # learned variance
            answer = torch.cat([answer, torch.zeros_like(answer)], 1)
        return (answer,) if isinstance(out, tuple) else type(out)(sample=answer)


def _vp(call: Call, t: float) -> tuple[float, float]:
    assert call.run.plan is not None
    abar = DDIMScheduler.from_config(call.run.plan.scheduler.config).alphas_cumprod[int(t)]
    return float(abar**0.5), float((1 - abar) ** 0.5)


@pytest.mark.parametrize(("family", "solver"), SOLVERS)
def test_oracle(family: str, solver: str) -> None:
    """If and only if times, input scaling, guidance and prediction type all agree, eps is constant and the end is x0."""
    pipe, oracle = tiny.shared(family), Oracle()
    plan = plan_for(pipe, solver)
    state = Run(plan)
    with drive(pipe, state, [oracle]):
        pipe(**tiny.FAMILIES[family][1](2), generator=tiny.generators(2))
    state.verify()
    assert oracle.drift < 1e-4
    assert oracle.noise is not None and state.last is not None
    abar = DEISMultistepScheduler.from_config(plan.scheduler.config).alphas_cumprod[0] if solver == "deis" else 1.0
    left = (1 - abar) ** 0.5 * oracle.noise[: len(state.last)]  # DEIS ends at the lowest level that the model was trained with
    assert (state.last - abar**0.5 * X0 - left).abs().max() < 1e-4
    assert 0.8 < oracle.noise.std() < 1.2  # the noise came in at the scale of the plan


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_steps_are_the_plans_whatever_the_pipeline_is_asked(family: str) -> None:
    pipe = tiny.shared(family)
    plan, results = plan_for(pipe), []
    for asked in (5, 50, 2):
        shown: list[float] = []

        def log(call: Call, following: Next, shown: list[float] = shown) -> Any:
            shown.append(call.run.step.timestep)
            return following(call)

        state = Run(plan)
        with drive(pipe, state, [log]):
            pipe(**tiny.FAMILIES[family][1](2), generator=tiny.generators(2), num_inference_steps=asked)
        assert tuple(shown) == TIMES and state.evals == state.steps == 5
        results.append(state.last)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_uniform_plan_equals_the_stock_run(family: str) -> None:
    pipe, arguments = tiny.shared(family), tiny.FAMILIES[family][1](2)
    with watch(pipe) as stock:
        pipe(**arguments, generator=tiny.generators(2), num_inference_steps=10)
        times, sigmas = pipe.scheduler.timesteps.tolist(), getattr(pipe.scheduler, "sigmas", [None] * 11)
    flow = "Flow" in type(pipe.scheduler).__name__
    steps = tuple(Step(timestep=t, sigma=float(s) if flow else None) for t, s in zip(times, sigmas, strict=False))
    followed = run(pipe, SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps), family)
    assert stock.evals == 10 and stock.calls == 10
    assert torch.equal(followed, stock.last)


def test_dit_steps_a_doubled_batch() -> None:
    pipe = tiny.shared("dit")
    assert len(run(pipe, plan_for(pipe), "dit")) == 4
    assert len(run(pipe, plan_for(pipe), "dit", guidance_scale=1.0)) == 2


IMAGE_TO_IMAGE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (StableDiffusionImg2ImgPipeline, {}),
    "sdxl": (StableDiffusionXLImg2ImgPipeline, {}),
    "sd3": (StableDiffusion3Img2ImgPipeline, tiny.size()),
    "flux": (FluxImg2ImgPipeline, tiny.flux_size()),
    "inpaint": (StableDiffusionInpaintPipeline, {"mask_image": torch.ones(2, 1, 8, 8), **tiny.size()}),
}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_strength_is_the_plans_first_timestep(name: str) -> None:
    cls, extra = IMAGE_TO_IMAGE[name]
    make = tiny.FAMILIES["sd" if name == "inpaint" else name][0]
    pipe = make(cls)
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    plan, results = plan_for(pipe, times=(600.0, 333.0, 17.0)), []
    for strength, asked in ((0.2, 3), (0.6, 50), (0.9, 2)):
        state, oracle = Run(plan), Oracle()
        arguments = {"prompt": ["a shoe", "a bag"], "image": picture, "strength": strength, "output_type": "latent", **extra}
        with drive(pipe, state, [oracle]):
            pipe(**arguments, num_inference_steps=asked, generator=tiny.generators(2))
        state.verify()
        assert oracle.drift < 3e-5
        results.append(state.last)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert "get_timesteps" not in vars(pipe)


def test_everything_is_put_back_after_an_exception() -> None:
    pipe = tiny.sd()
    scheduler, cls, config = pipe.scheduler, type(pipe.unet), dict(pipe.config)
    plan = plan_for(pipe)
    skipped = plan.steps[0].model_copy(update={"skip": ("mid_block.resnets.0",)})
    plan = SamplingPlan(scheduler=plan.scheduler, steps=(skipped, *plan.steps[1:]))
    layer = pipe.unet.mid_block.resnets[0]
    layers = {name: type(module) for name, module in pipe.unet.named_modules()}

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = pipe.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), follow(pipe, plan):
        assert type(pipe.unet) is not cls and isinstance(pipe.unet, cls) and type(pipe.unet).__name__ == cls.__name__
        assert isinstance(pipe.scheduler, DDIMScheduler) and type(pipe.scheduler).__name__ == "DDIMScheduler"
        assert dict(pipe.config) == config  # the future model_index.json
        pipe(prompt="a shoe", **tiny.size())
    hook.remove()
    assert pipe.scheduler is scheduler and type(pipe.unet) is cls and "_lissom" not in vars(pipe.unet)
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == layers and isinstance(layer, torch.nn.Module)
    with watch(pipe):
        pass
    assert type(scheduler) is DDIMScheduler and "_lissom" not in vars(scheduler)


def test_saving_inside_names_the_stock_classes(tmp_path: Any) -> None:
    pipe = tiny.shared("dit")
    with follow(pipe, plan_for(pipe)):
        pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert type(again.scheduler) is DDIMScheduler and type(again.transformer) is type(pipe.transformer)


def test_the_plans_scheduler_replaces_the_pipelines() -> None:
    pipe = tiny.shared("sd")
    with follow(pipe, plan_for(pipe, "dpm")):
        assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)


def test_several_calls_in_one_follow() -> None:
    pipe = tiny.shared("dit")
    alone = run(pipe, plan_for(pipe), "dit")
    with follow(pipe, plan_for(pipe)) as state:
        for _ in range(3):
            pipe(**tiny.FAMILIES["dit"][1](2), generator=tiny.generators(2))
            assert torch.equal(state.last, alone)
    assert state.calls == 15 and state.evals == state.steps == 5


def test_a_shortened_run_is_an_error() -> None:
    pipe = tiny.shared("sdxl")
    with pytest.raises(CannotFollow, match=r"ran \d of 5 planned steps"), follow(pipe, plan_for(pipe)):
        pipe(**tiny.FAMILIES["sdxl"][1](1), denoising_end=0.5)
    with pytest.raises(CannotFollow, match="of 5 planned steps"), follow(pipe, plan_for(pipe)):
        pipe(**tiny.FAMILIES["sdxl"][1](1), denoising_end=0.5)
        pipe(**tiny.FAMILIES["sdxl"][1](1))  # a complete call does not hide the earlier one
    with follow(pipe, plan_for(pipe)):
        pass  # not run at all: nothing to complain about


def test_a_copied_scheduler_has_its_own_course() -> None:
    pipe = tiny.shared("dit")
    with follow(pipe, plan_for(pipe)) as state:
        pipe.scheduler.set_timesteps(3)
        twin = copy.deepcopy(pipe.scheduler)
        x = torch.randn(1, 4, 8, 8)
        twin.step(x, twin.timesteps[0], x)
        assert twin._lissom.evals == 1 and state.evals == 0
        pipe(**tiny.FAMILIES["dit"][1](1))


def test_a_loop_off_the_plan_is_an_error() -> None:
    pipe = tiny.shared("dit")
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(CannotFollow, match="at timestep 901, but the pipeline steps at 7"), follow(pipe, plan_for(pipe)):
        pipe.scheduler.step(x, 7, x)


def test_gradients_flow_through_a_followed_run() -> None:
    pipe = tiny.shared("sd")
    weight = pipe.unet.conv_in.weight
    call = inspect.unwrap(type(pipe).__call__)
    with follow(pipe, plan_for(pipe, times=(700.0, 300.0))):
        latents = call(pipe, **tiny.FAMILIES["sd"][1](1), generator=tiny.generators(1))[0]
    (gradient,) = torch.autograd.grad(latents.square().mean(), weight)
    assert gradient.abs().max() > 0


def test_offloaded_pipeline_is_driven_every_time() -> None:
    pytest.importorskip("accelerate")
    pipe = tiny.sd()
    plain = run(pipe, plan_for(pipe), "sd")
    pipe.enable_model_cpu_offload(device="cpu")
    with follow(pipe, plan_for(pipe)) as state:
        for count in (5, 10):  # freeing the hooks at the end of a call resets `forward`
            pipe(**tiny.FAMILIES["sd"][1](2), generator=tiny.generators(2))
            assert state.calls == count and torch.equal(state.last, plain)


def test_compiled_denoiser_is_compiled_once_per_set_of_skips() -> None:
    from torch._dynamo.testing import CompileCounter

    pipe, counter = tiny.dit(), CompileCounter()
    plan = plan_for(pipe)
    skips = ((), ("transformer_blocks.1.attn1",))
    steps = tuple(step.model_copy(update={"skip": skips[i % 2]}) for i, step in enumerate(plan.steps))
    plan = SamplingPlan(scheduler=plan.scheduler, steps=steps)
    plain = run(pipe, plan, "dit")
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)  # its own addresses begin with _orig_mod
    graphs = []
    for _ in range(2):
        torch.testing.assert_close(run(pipe, plan, "dit"), plain, rtol=1e-4, atol=1e-4)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] >= 2


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_half_precision(family: str) -> None:
    """Times and noise levels stay exact where samples and shown timesteps are rounded."""
    pipe = tiny.FAMILIES[family][0]().to(torch.bfloat16)
    with watch(pipe) as stock:
        pipe(**tiny.FAMILIES[family][1](2), generator=tiny.generators(2), num_inference_steps=10)
        times = pipe.scheduler.timesteps.tolist()
    sigmas = getattr(pipe.scheduler, "sigmas", [None] * 11)
    steps = tuple(Step(timestep=t, sigma=None if s is None else float(s)) for t, s in zip(times, sigmas, strict=False))
    followed = run(pipe, SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps), family)
    assert followed.dtype == torch.bfloat16 and torch.equal(followed, stock.last)
