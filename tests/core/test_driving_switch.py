"""Steps made by another model: against two runs that hand latents over, costs, the memo, refusals and what has to fit."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from lissom.core import cost
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import CannotFollow, Memo, check, follow
from lissom.core.driving.refusals import check_reuse
from lissom.core.driving.steering import denoisers
from lissom.core.driving.switch import lend
from lissom.core.fit import misfit
from lissom.tests.core import tiny

TIMES = (901, 640, 333, 120)


def plan(scheduler: Any, models: Any, times: Any = TIMES) -> SamplingPlan:
    steps = tuple(Step(timestep=t, model=m) for t, m in zip(times, models, strict=True))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def other(family: str) -> Any:
    """A model of the same family with other weights."""
    pipe = tiny.FAMILIES[family][0]()
    with torch.no_grad():
        for module in denoisers(pipe).values():
            for parameter in module.parameters():
                parameter.mul_(0.7).add_(0.01)
    return pipe


def lent(family: str, name: str = "small") -> tuple[Any, Any]:
    pipe, small = tiny.FAMILIES[family][0](), other(family)
    lend(pipe, name, lambda: denoisers(small))
    return pipe, small


def last(pipe: Any, family: str, plan: SamplingPlan, memo: Memo | None = None, **changes: Any) -> torch.Tensor:
    with follow(pipe, plan, memo=memo, context="test") as run:
        pipe(**(tiny.FAMILIES[family][1](2) | changes), generator=tiny.generators(2))
    assert run.last is not None
    return run.last


@pytest.mark.parametrize("family", ["sd", "sdxl", "dit", "sd3", "flux", "ddpm"])
def test_each_model_makes_its_steps(family: str) -> None:
    """Executed by hand: the denoiser's weights are exchanged before each step of a plain plan."""
    pipe, small = lent(family)
    scheduler = pipe.scheduler if family != "ddpm" else DDIMScheduler()
    makers = ("small", None, "small", None)
    found = last(pipe, family, plan(scheduler, makers))
    (own,), (its,) = denoisers(pipe).values(), denoisers(small).values()
    weights = {None: {k: v.clone() for k, v in own.state_dict().items()}, "small": its.state_dict()}
    step, calls = scheduler_steps(pipe, makers, own, weights)
    with follow(pipe, plan(scheduler, (None,) * 4)) as run:
        original = type(pipe.scheduler).step
        step(pipe.scheduler, original, run)
        pipe(**tiny.FAMILIES[family][1](2), generator=tiny.generators(2))
    own.load_state_dict(weights[None])
    assert calls == [0, 1, 2, 3] and torch.equal(found, run.last)
    assert not torch.equal(found, last(pipe, family, plan(scheduler, (None,) * 4)))
    assert not torch.equal(found, last(pipe, family, plan(scheduler, ("small",) * 4)))


def scheduler_steps(pipe: Any, makers: Any, own: Any, weights: Any) -> Any:
    """Loads the weights of the next step's model after each step."""
    calls: list[int] = []

    def install(scheduler: Any, original: Any, run: Any) -> None:
        own.load_state_dict(weights[makers[0]])

        def step(*args: Any, **kwargs: Any) -> Any:
            out = original(scheduler, *args, **kwargs)
            calls.append(len(calls))
            if len(calls) < len(makers):
                own.load_state_dict(weights[makers[len(calls)]])
            return out

        scheduler.__dict__["step"] = step

    return install, calls


def test_a_step_of_two_evaluations_is_made_by_one_model() -> None:
    pipe, _ = lent("sd")
    scheduler = HeunDiscreteScheduler(**tiny.SD_BETAS)
    seen: list[str] = []
    lend(pipe, "small", lambda: {"unet": Counted(pipe.unet, seen)})
    last(pipe, "sd", plan(scheduler, (None, "small", None, "small")))
    assert len(seen) == 2 + 1  # Heun's last step has one evaluation


class Counted(torch.nn.Module):
    def __init__(self, module: Any, seen: list[str]) -> None:
        super().__init__()
        self.__dict__["module"], self.__dict__["seen"] = module, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["seen"].append("call")
        return type(self.__dict__["module"]).__mro__[1].forward(self.__dict__["module"], *args, **kwargs)


def test_the_memo_tells_models_apart_and_changes_nothing() -> None:
    pipe, _ = lent("sd")
    memo = Memo()
    for makers in (("small", "small", None, None), ("small", None, None, None), (None,) * 4, ("small", "small", None, "small")):
        one = plan(pipe.scheduler, makers)
        assert torch.equal(last(pipe, "sd", one, memo), last(pipe, "sd", one))


def test_what_a_step_of_another_model_did_is_not_reused() -> None:
    steps = (Step(timestep=900), Step(timestep=600, model="small"), Step(timestep=300, reuse=("a",)))
    check_reuse(steps)
    with pytest.raises(CannotFollow, match="step 2 of the plan reuses 'a', but no earlier step executes it"):
        check_reuse((Step(timestep=900, model="small"), Step(timestep=300, reuse=("a",))))


@pytest.mark.parametrize("way", ["skip", "reuse"])
def test_a_step_of_another_model_leaves_nothing_out(way: str) -> None:
    with pytest.raises(ValueError, match="executes all of it"):
        Step.model_validate({"timestep": 9, "model": "small", way: ["a"]})


def test_plans_without_models_are_written_as_before() -> None:
    assert Step(timestep=9).canonical() == '{"timestep":9}'
    assert plan(DDIMScheduler(), (None, "b", "a", "b")).models == ("a", "b")
    assert plan(DDIMScheduler(), (None, "b", "a", "b")).without("model") == plan(DDIMScheduler(), (None,) * 4)


def test_costs_count_each_model() -> None:
    pipe = tiny.shared("sd")
    small = tiny.unet(block_out_channels=(4, 8), norm_num_groups=4)
    try:
        lend(pipe, "small", lambda: {"unet": small})
        arguments = tiny.FAMILIES["sd"][1](1)
        costs = cost.measure(pipe, arguments, ["small"])
        alone = tiny.sd()
        alone.unet = small
        assert costs.models == {"small": cost.measure(alone, arguments).total} and costs.models["small"] < costs.total
        assert cost.measure(pipe, arguments).models == {}
        found = cost.plan_macs(costs, plan(pipe.scheduler, ("small", None, None, "small")))
        assert found == 2 * costs.total + 2 * costs.models["small"]
    finally:
        pipe.__dict__.pop("_lissom_lent")


def test_a_model_is_loaded_once_and_only_when_a_plan_needs_it() -> None:
    pipe, loaded = tiny.sd(), []
    small = {"unet": tiny.unet()}
    lend(pipe, "small", lambda: loaded.append(1) or small)  # type: ignore[func-returns-value]
    last(pipe, "sd", plan(pipe.scheduler, (None,) * 4))
    assert not loaded
    for _ in range(2):
        last(pipe, "sd", plan(pipe.scheduler, (None, "small", None, None)))
    assert loaded == [1]


def test_a_model_that_was_not_given_is_named() -> None:
    pipe, _ = lent("sd")
    with pytest.raises(
        CannotFollow, match=r"step 2 of the plan is made by another model, 'smal', .*--models smal=MODEL.*small"
    ):
        check(pipe, plan(pipe.scheduler, (None, "smal", None, None)))
    lend(pipe, "small", dict)
    with pytest.raises(CannotFollow, match="the plan's model 'small' has no unet"):
        check(pipe, plan(pipe.scheduler, (None, "small", None, None)))


def test_what_two_models_must_share() -> None:
    def changed(**parts: Any) -> Any:
        pipe = tiny.sd()
        for name, part in parts.items():
            setattr(pipe, name, part)
        return pipe

    own = tiny.sd()
    assert misfit(own, changed(unet=tiny.unet(block_out_channels=(4, 8), norm_num_groups=4))) is None
    assert misfit(own, changed(scheduler=EulerDiscreteScheduler(**tiny.SD_BETAS))) is None
    assert misfit(own, tiny.dit()) == "it has a transformer beside, which would never be called"
    assert (
        misfit(own, changed(transformer=tiny.dit().transformer)) == "it has a transformer beside, which would never be called"
    )
    assert misfit(own, changed(unet=None)) == "it has no unet"
    assert misfit(own, changed(unet=tiny.unet(cross_attention_dim=8))) == "its unet has cross_attention_dim 8, not 32"
    v = DDIMScheduler(**tiny.SD_BETAS, prediction_type="v_prediction")
    assert misfit(own, changed(scheduler=v)) == "its scheduler has prediction_type v_prediction, not epsilon"
    assert misfit(own, changed(scheduler=DDIMScheduler())) == "its noise schedule (betas) is another one"
    flow = misfit(own, changed(scheduler=FlowMatchEulerDiscreteScheduler()))
    assert flow == "it was trained with flow matching, not with a schedule of variances"
    vae = tiny.vae(scaling_factor=0.5)
    assert misfit(own, changed(vae=vae)) == f"its VAE has scaling_factor 0.5, not {own.vae.config.scaling_factor}"
