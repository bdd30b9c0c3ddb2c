"""Reused layers do what they did in the latest step that executed them: against a shim that stores outputs."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from lissom.core import anatomy
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import CannotFollow, Memo, Run, check, follow
from lissom.tests.core import tiny

TIMES = (901, 640, 333, 120)
WHOLE: tuple[tuple[str, ...], ...] = ((), (), (), ())
SEARCHED = ("resnet", "attention", "transformer_block")


def plan(scheduler: Any, reuses: Any, skips: Any = WHOLE) -> SamplingPlan:
    steps = tuple(Step(timestep=t, skip=s, reuse=r) for t, s, r in zip(TIMES, skips, reuses, strict=True))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def run(family: str, plan: SamplingPlan, n: int = 1, memo: Memo | None = None, **changes: Any) -> Run:
    pipe = tiny.shared(family)
    with follow(pipe, plan, memo=memo, context="test") as state:
        pipe(**(tiny.FAMILIES[family][1](n) | changes), generator=tiny.generators(n))
    assert state.last is not None
    return state


def reused(family: str, reuses: Any, scheduler: Any = None, **changes: Any) -> torch.Tensor:
    last = run(family, plan(scheduler or tiny.shared(family).scheduler, reuses), **changes).last
    assert last is not None
    return last


class Shim(torch.nn.Module):
    """Stands in a layer's place; `evals` says for each of its calls whether it is executed. Knows each class by its formula."""

    def __init__(self, layer: Any, executed: list[bool]) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, executed=executed, calls=0, kept=None)
        for name in ("attn1", "attn2", "ff", "norm1", "resnets", "has_cross_attention", "resolution_idx"):
            if hasattr(layer, name):
                self.__dict__[name] = getattr(layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, name = self.__dict__["layer"], type(self.__dict__["layer"]).__name__
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        inputs = self.inputs(layer, name, next(iter(given.values())), given)
        execute = self.__dict__["executed"][self.__dict__["calls"]]
        self.__dict__["calls"] += 1
        if execute:
            out = layer(*args, **kwargs)
            outs = [out] if isinstance(out, torch.Tensor) else [*out] if inputs != ["stage"] else [out]
            self.__dict__["kept"] = [
                o if i == "stage" or o is None else o - i for o, i in zip(outs, inputs * len(outs), strict=False)
            ]
            return out
        kept = self.__dict__["kept"]
        outs = [k if i == "stage" or k is None else i + k for k, i in zip(kept, inputs * len(kept), strict=False)]
        return outs[0] if inputs == ["stage"] or (len(outs) == 1 and name != "Transformer2DModel") else tuple(outs)

    @staticmethod
    def inputs(layer: Any, name: str, x: Any, given: dict[str, Any]) -> list[Any]:
        if "Down" in name or "Up" in name:
            return ["stage"]
        if name == "FeedForward" or (name == "Attention" and not layer.residual_connection):
            return [torch.zeros_like(x)]
        if name == "ResnetBlock2D":
            return [layer.conv_shortcut(x) if layer.conv_shortcut is not None else x]
        if name in ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"):
            return [given["encoder_hidden_states"], x]
        return [x]


def shimmed(family: str, addresses: dict[str, list[bool]], scheduler: Any = None) -> torch.Tensor:
    """A run of the whole plan with shims in place of layers. addresses: for each whether its calls are executed."""
    denoiser, before = tiny.denoiser(tiny.shared(family)), {}
    for address in addresses:
        parent, _, name = address.rpartition(".")
        place = denoiser.get_submodule(parent)._modules
        before[address] = place, name, place[name]
    try:
        for address, (place, name, layer) in before.items():
            place[name] = Shim(layer, addresses[address])
        return reused(family, WHOLE, scheduler)
    finally:
        for place, name, layer in before.values():
            place[name] = layer


def cases() -> list[tuple[str, str]]:
    """The last layer of each class and removal, and U-Nets' blocks."""
    found = {}
    for family in ("sd", "sdxl", "sd3", "flux", "dit", "ddpm", "ddim"):
        denoiser = tiny.denoiser(tiny.shared(family))
        for layer in anatomy.layers(denoiser):
            cls = type(denoiser.get_submodule(layer.address)).__name__
            if cls != "UNetMidBlock2DCrossAttn":  # the U-Net asks it what it is
                found[family, cls, layer.kind, layer.removal] = (family, layer.address)
        for address in anatomy.stages(denoiser):
            found[family, address] = (family, address)
    return list(found.values())


@pytest.mark.parametrize(("family", "address"), cases())
def test_every_class_of_layer_against_the_shim(family: str, address: str) -> None:
    got = reused(family, ((), (address,), (), (address,)))
    want = shimmed(family, {address: [True, False, True, False]})
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert not torch.equal(got, reused(family, WHOLE))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "dit", "ddpm"])
def test_everything_but_one_layer_is_reused(family: str) -> None:
    found = [layer for layer in anatomy.layers(tiny.denoiser(tiny.shared(family))) if layer.kind in SEARCHED]
    outermost = [a.address for a in found if not any(a.address.startswith(b.address + ".") for b in found)]
    but = tuple(outermost[1:])
    got = reused(family, ((), but, but, ()))
    want = shimmed(family, {a: [True, False, False, True] for a in but})
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_loop_written_by_hand() -> None:
    """DDIM's own formula, and one attention that is not executed in the third step; of the pipeline's loop nothing is used."""
    pipe = tiny.ddim()
    unet, scheduler, block = pipe.unet, pipe.scheduler, "mid_block.attentions.0"
    alphas = [*(scheduler.alphas_cumprod[t] for t in TIMES), scheduler.final_alpha_cumprod]
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layer, kept = unet.get_submodule(block), []
    run = layer.forward
    for i, t in enumerate(TIMES):

        def forward(hidden: torch.Tensor, *args: Any, execute: bool = i != 2, **kwargs: Any) -> torch.Tensor:
            out = run(hidden, *args, **kwargs) if execute else hidden / layer.rescale_output_factor + kept[-1]
            kept.append(out - hidden / layer.rescale_output_factor)
            return out

        layer.forward = forward
        with torch.no_grad():
            eps = unet(x, t).sample
        x0 = (x - (1 - alphas[i]) ** 0.5 * eps) / alphas[i] ** 0.5
        x = alphas[i + 1] ** 0.5 * x0 + (1 - alphas[i + 1]) ** 0.5 * eps
    got = reused("ddim", ((), (), (block,), ()))
    assert torch.allclose(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_keeping_changes_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a plan without reuse: the last step alone differs."""
    samples: list[torch.Tensor] = []
    stepped = Run.stepped

    def record(self: Run, sample: torch.Tensor) -> None:
        samples.append(sample.clone())
        stepped(self, sample)

    monkeypatch.setattr(Run, "stepped", record)
    layer = anatomy.layers(tiny.denoiser(tiny.shared(family)))[-1].address
    reused(family, WHOLE)
    reused(family, ((), (), (), (layer,)))
    assert [torch.equal(a, b) for a, b in zip(samples[:4], samples[4:], strict=True)] == [True, True, True, False]


def test_a_reused_layer_and_what_lies_in_it_is_not_executed() -> None:
    denoiser = tiny.denoiser(tiny.shared("sd"))
    executed: list[int] = []
    hook = denoiser.get_submodule("up_blocks.1.attentions.0.proj_out").register_forward_hook(lambda *_: executed.append(1))
    for address in ("up_blocks.1", "up_blocks.1.attentions.0"):
        executed.clear()
        reused("sd", ((), (address,), (address,), ()))
        assert len(executed) == 2
    hook.remove()


def test_a_step_that_left_the_layer_out_is_no_source() -> None:
    """The latest step that executed it counts, also where an outer layer was left out in between."""
    block, inner = "transformer_blocks.1", "transformer_blocks.1.ff"
    scheduler = tiny.shared("dit").scheduler
    for between in ((block,), (inner,)):
        got = run("dit", plan(scheduler, ((), (), (), (inner,)), ((), (), between, ()))).last
        kept: list[Any] = []
        layer = tiny.denoiser(tiny.shared("dit")).get_submodule(inner)
        hook = layer.register_forward_hook(lambda *args, kept=kept: kept.append(args[-1].clone()) if len(kept) < 2 else kept[1])
        want = run("dit", plan(scheduler, WHOLE, ((), (), between, ()))).last
        hook.remove()
        assert got is not None and want is not None and len(kept) == 2
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


SOLVERS: dict[str, tuple[Any, list[bool]]] = {  # whether each call of the denoiser is executed where step 1 reuses
    "dpm++ 2M": (DPMSolverMultistepScheduler(**tiny.SD_BETAS), [True, False, True, True]),
    "unipc": (UniPCMultistepScheduler(**tiny.SD_BETAS), [True, False, True, True]),
    "euler": (EulerDiscreteScheduler(**tiny.SD_BETAS), [True, False, True, True]),
    "heun": (HeunDiscreteScheduler(**tiny.SD_BETAS), [True, True, False, False, True, True, True]),
    "plms": (PNDMScheduler(**tiny.SD_BETAS, skip_prk_steps=True, steps_offset=1), [True, True, False, True, True]),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_higher_order_and_of_several_calls(solver: str) -> None:
    scheduler, executed = SOLVERS[solver]
    layer = "up_blocks.1.attentions.1"
    got, want = reused("sd", ((), (layer,), (), ()), scheduler), shimmed("sd", {layer: executed}, scheduler)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_guidance_that_calls_twice_reuses_its_own() -> None:
    """Flux's true guidance: the second call of a step is that of the negative prompt."""
    layer = "transformer_blocks.0"
    inputs = {"negative_prompt": ["a bag"], "true_cfg_scale": 4.0}
    got = reused("flux", ((), (layer,), (), ()), **inputs)
    pipe, kept = tiny.shared("flux"), {}
    block = pipe.transformer.transformer_blocks[0]
    run, calls = block.forward, [0]

    def forward(hidden_states: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        step, which = divmod(calls[0], 2)
        calls[0] += 1
        if step == 1:
            text, image = kept[which]
            return encoder_hidden_states + text, hidden_states + image
        text, image = run(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        kept[which] = text - encoder_hidden_states, image - hidden_states
        return text, image

    block.forward = forward
    try:
        want = reused("flux", WHOLE, **inputs)
    finally:
        del block.forward
    assert calls == [8] and torch.allclose(got, want, rtol=1e-4, atol=1e-4)


MEMORY = {
    "sd": "mid_block.attentions.0",
    "sdxl": "up_blocks.0",
    "sd3": "transformer_blocks.1",
    "flux": "single_transformer_blocks.0",
    "dit": "transformer_blocks.1.ff",
    "ddim": "mid_block.resnets.0",
}


@pytest.mark.parametrize("family", MEMORY)
def test_the_memo_gives_the_same_bits(family: str) -> None:
    """Calls that a later step reuses layers of are executed again; a plan that reuses is none that does not."""
    layer, scheduler, memo = MEMORY[family], tiny.shared(family).scheduler, Memo()
    plans = [plan(scheduler, r) for r in (WHOLE, ((), (layer,), (), ()), ((), (layer,), (layer,), ()), ((), (), (), (layer,)))]
    cold = [run(family, p) for p in plans]
    warm = [run(family, p, memo=memo) for p in plans]
    for a, b in zip(cold, warm, strict=True):
        assert torch.equal(a.last, b.last)
    assert [w.served for w in warm] == [0, 0, 1, 2] and [w.calls for w in warm] == [4, 4, 3, 2]
    again = [run(family, p, memo=memo) for p in plans]
    assert [w.calls for w in again] == [0, 1, 1, 1] and all(
        torch.equal(a.last, b.last) for a, b in zip(cold, again, strict=True)
    )


def test_nothing_is_handed_on_from_one_trajectory_to_the_next() -> None:
    layer, scheduler = "up_blocks.1", tiny.shared("sd").scheduler
    chosen, pipe = plan(scheduler, ((), (layer,), (layer,), ())), tiny.shared("sd")
    with follow(pipe, chosen) as state:
        for seed in (7, 0):  # two calls in one context, as for two chunks of images
            pipe(**tiny.FAMILIES["sd"][1](1), generator=tiny.generators(1, seed))
        assert state.features
        second = state.last
    alone = run("sd", chosen)
    assert torch.equal(second, alone.last) and not state.features and not alone.features


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    layer = "down_blocks.1"
    three, one = (reused("sd", ((), (layer,), (layer,), ()), n=n) for n in (3, 1))
    assert torch.allclose(three[:1], one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_everything_is_put_back_after_an_exception() -> None:
    pipe = tiny.shared("sd")
    kinds = {name: type(module) for name, module in pipe.unet.named_modules()}
    chosen = plan(pipe.scheduler, ((), ("mid_block.resnets.0", "up_blocks.1"), (), ()))

    def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("stop")
        return {}

    whole = reused("sd", WHOLE)
    with pytest.raises(RuntimeError, match="stop"), follow(pipe, chosen) as state:
        pipe(**tiny.FAMILIES["sd"][1](1), generator=tiny.generators(1), callback_on_step_end=fail)
    assert not state.features and {name: type(module) for name, module in pipe.unet.named_modules()} == kinds
    assert not any("_lissom_features" in vars(module) for module in pipe.unet.modules())
    assert torch.equal(reused("sd", WHOLE), whole)


def test_guidance_that_begins_on_the_way_is_refused() -> None:
    """What was kept for another number of rows is not for these."""
    pipe = tiny.shared("sd")

    def change(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0  # from here on there is no second half of the batch
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}

    for layer in ("mid_block.resnets.0", "up_blocks.1"):
        with (
            pytest.raises(CannotFollow, match="for inputs of another shape"),
            follow(pipe, plan(pipe.scheduler, ((), (layer,), (), ()))),
        ):
            pipe(
                **tiny.FAMILIES["sd"][1](1),
                generator=tiny.generators(1),
                callback_on_step_end=change,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )


@pytest.mark.parametrize(
    ("reuses", "skips", "words"),
    [
        ((("mid_block",), (), (), ()), WHOLE, "step 1 of the plan reuses 'mid_block', but the first step has nothing to reuse"),
        (((), ("mid_block",), (), ()), (("mid_block",), (), (), ()), "step 2 .* no earlier step executes it. Take it out"),
        (((), ("mid_block.resnets.0",), (), ()), (("mid_block",), (), (), ()), "step 2 .* no earlier step executes it"),
        (((), ("down_blocks.9",), (), ()), WHOLE, "unet has no layer 'down_blocks.9'"),
        (((), ("conv_in",), (), ()), WHOLE, "the layer 'conv_in' of unet cannot be reused"),
        (WHOLE, ((), ("up_blocks.1",), (), ()), "the layer 'up_blocks.1' of unet cannot be skipped"),
    ],
)
def test_refusals(reuses: Any, skips: Any, words: str) -> None:
    pipe = tiny.shared("sd")
    with pytest.raises(CannotFollow, match=words):
        check(pipe, plan(pipe.scheduler, reuses, skips))


def test_a_layer_is_skipped_or_reused() -> None:
    with pytest.raises(ValueError, match="skipped or reused in a step, not both: a"):
        Step(timestep=5, skip=("a", "b"), reuse=("a",))
    assert Step(timestep=5, reuse=("b", "a", "b")).canonical() == '{"reuse":["a","b"],"timestep":5}'
    assert Step(timestep=5).canonical() == '{"timestep":5}'  # so that old records keep their hash


def test_stages_are_the_blocks_of_u_nets() -> None:
    assert anatomy.stages(tiny.denoiser(tiny.shared("sd"))) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert anatomy.stages(tiny.denoiser(tiny.shared("flux"))) == []
