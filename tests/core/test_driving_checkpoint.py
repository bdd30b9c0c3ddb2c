"""Gradients through a sampling trajectory: the same bits however little of it is kept, and what keeping it costs."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.driving import CannotFollow, follow
from lissom.core.driving.checkpoint import checkpoint_blocks, checkpoint_steps
from lissom.core.driving.run import Run
from lissom.core.driving.steering import denoisers
from lissom.core.driving.switch import lend
from lissom.core.saved_bytes import Live, saved
from lissom.core.trajectory import differentiable
from lissom.tests.core import tiny

TIMES = (901, 640, 333, 120)
GATED = ("to_out.0", "ff.net.2", "proj_out")  # linear layers whose inputs are multiplied, as pruning by learned gates does
FULL = {"by_step": False}
WAYS: dict[str, dict[str, bool]] = {
    "steps": {},
    "blocks": {"by_step": False, "by_block": True},
    "nested": {"by_block": True},
    "offload": {"offload": True},
}


def plan(scheduler: Any, times: Any = TIMES, skips: Any = None) -> SamplingPlan:
    left_out = skips or [()] * len(times)
    steps = tuple(Step(timestep=t, skip=skip) for t, skip in zip(times, left_out, strict=True))
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=steps)


def evenly(count: int) -> tuple[int, ...]:
    return tuple(int(t) for t in torch.linspace(950, 50, count))


@contextmanager
def gates(model: Any) -> Iterator[list[torch.Tensor]]:
    """A learnable factor for every input of the gated layers; all weights are frozen."""
    asking = [p for p in model.parameters() if p.requires_grad]
    hooks, made = [], []
    for name, layer in model.named_modules():
        if name.endswith(GATED) and isinstance(layer, torch.nn.Linear):
            gate = torch.ones(layer.in_features, requires_grad=True)
            made.append(gate)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate, *args[1:])))
    try:
        model.requires_grad_(False)
        yield made
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()


def arguments(family: str, n: int = 1) -> dict[str, Any]:
    return tiny.FAMILIES[family][1](n) | {"generator": tiny.generators(n)}


def gradients(pipe: Any, family: str, one: SamplingPlan, held: list[torch.Tensor], **how: Any) -> list[torch.Tensor]:
    """The last latent, and the gradient of each of `held`."""
    torch.manual_seed(3)
    last = differentiable(pipe, one, arguments(family), **how)
    return [last.detach(), *torch.autograd.grad(last.square().mean(), held)]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ddim": ("sd", lambda own: own),
    "euler": ("sd", lambda own: EulerDiscreteScheduler(**tiny.SD_BETAS)),
    "dpm++ 2m": ("sd", lambda own: DPMSolverMultistepScheduler(**tiny.SD_BETAS)),
    "sdxl": ("sdxl", lambda own: own),
    "sd3": ("sd3", lambda own: own),
    "flux": ("flux", lambda own: own),
    "dit": ("dit", lambda own: own),
    "pixels": ("ddim", lambda own: own),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_bits_of_the_full_graph(case: str) -> None:
    family, scheduler = CASES[case]
    pipe = tiny.shared(family)
    model, one = tiny.denoiser(pipe), plan(scheduler(pipe.scheduler))
    with gates(model) as held:
        held = held or [model.conv_in.weight.requires_grad_()]  # a U-Net of pixels has no such layers
        full = gradients(pipe, family, one, held, **FULL)
        for way in WAYS.values():
            assert same(gradients(pipe, family, one, held, **way), full)
    assert all(g.abs().max() > 0 for g in full[1:])
    with follow(pipe, one) as run:
        pipe(**arguments(family))
    assert torch.equal(run.last, full[0])


def test_weights_get_the_same_gradients_as_gates() -> None:
    """A layer's weight is used in every step: the sums of T gradients are made in one order."""
    pipe = tiny.shared("sd")
    held = [pipe.unet.mid_block.resnets[0].conv1.weight, pipe.unet.conv_in.bias]
    full = gradients(pipe, "sd", plan(pipe.scheduler), held, **FULL)
    assert all(same(gradients(pipe, "sd", plan(pipe.scheduler), held, **way), full) for way in WAYS.values())


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}Scheduler": ("sd", {}) for name in ("DDPM", "EulerAncestralDiscrete", "HeunDiscrete", "LCM", "LMSDiscrete")},
    **{f"{name}MultistepScheduler": ("sd", {}) for name in ("DEIS", "UniPC")},
    "DPMSolverMultistepScheduler": ("sd", {"algorithm_type": "sde-dpmsolver++"}),
    "PNDMScheduler": ("sd", {"skip_prk_steps": True}),
    "FlowMatchHeunDiscreteScheduler": ("sd3", {}),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_with_noise_of_their_own_history_or_two_evaluations(name: str) -> None:
    """`scheduler.step` is never computed again: what it drew or remembered is in the graph."""
    family, config = SOLVERS[name]
    pipe = tiny.shared(family)
    one = plan(getattr(diffusers, name)(**config, **(tiny.SD_BETAS if family == "sd" else {})))
    with gates(tiny.denoiser(pipe)) as held:
        assert same(gradients(pipe, family, one, held), gradients(pipe, family, one, held, **FULL))


def test_noise_of_dit_comes_from_the_images_generators() -> None:
    pipe = tiny.shared("dit")
    one = plan(diffusers.DDPMScheduler(clip_sample=False))
    with gates(pipe.transformer):
        lasts = [differentiable(pipe, one, arguments("dit")).detach() for _ in range(2)]
    assert torch.equal(*lasts)


@pytest.mark.parametrize("solver", ["ddim", "dpm++ 2m", "euler"])
def test_gradients_are_those_of_finite_differences(solver: str) -> None:
    family, scheduler = CASES[solver]
    pipe = tiny.shared(family)
    one = plan(scheduler(pipe.scheduler))
    torch.manual_seed(0)
    with gates(pipe.unet) as held:
        along = [torch.randn_like(gate) for gate in held]
        found = gradients(pipe, family, one, held)[1:]
        slope = sum(float((g * d).sum()) for g, d in zip(found, along, strict=True))
        losses = []
        for size in (0.01, -0.02):
            with torch.no_grad():
                for gate, d in zip(held, along, strict=True):
                    gate += size * d
            losses.append(float(differentiable(pipe, one, arguments(family)).detach().square().mean()))
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(slope, rel=0.02)


SKIPS = [
    ("down_blocks.0.attentions.0",),
    (),
    ("mid_block.attentions.0.transformer_blocks.0.ff", "up_blocks.0.resnets.0"),  # the first lies within a checkpointed block
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn2",),
]


@pytest.mark.parametrize("solver", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_every_step_is_computed_again_with_its_own_skips(solver: Any) -> None:
    pipe = tiny.shared("sd")
    held = [pipe.unet.conv_in.weight, pipe.unet.mid_block.resnets[0].conv1.weight]
    one = plan(solver(**tiny.SD_BETAS), skips=SKIPS)
    full = gradients(pipe, "sd", one, held, **FULL)
    assert not torch.equal(full[1], gradients(pipe, "sd", plan(solver(**tiny.SD_BETAS)), held, **FULL)[1])
    assert all(same(gradients(pipe, "sd", one, held, **way), full) for way in WAYS.values())


def test_without_the_remembered_step_a_recomputation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is worth: by the time of the backward pass the run has moved on."""
    pipe = tiny.shared("sd")
    monkeypatch.setattr(Run, "still", lambda self: self)
    with pytest.raises(IndexError):
        gradients(pipe, "sd", plan(pipe.scheduler, skips=SKIPS), [pipe.unet.conv_in.weight])


def test_steps_of_another_model_are_computed_again_with_it() -> None:
    pipe, other = tiny.sd(), tiny.sd()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(0.7).add_(0.01)
    lend(pipe, "small", lambda: denoisers(other))
    steps = tuple(Step(timestep=t, model="small" if i % 2 else None) for i, t in enumerate(TIMES))
    one = SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)
    held = [pipe.unet.conv_in.weight, other.unet.conv_in.weight]
    full = gradients(pipe, "sd", one, held, **FULL)
    assert not torch.equal(full[1], full[2]) and full[2].abs().max() > 0
    assert all(same(gradients(pipe, "sd", one, held, **way), full) for way in WAYS.values())


def noisy(where: str, mask: torch.Tensor, source: torch.Generator) -> Callable[..., Any]:
    """A hook that multiplies by noisy gates: drawn before the trajectory, or at every call."""

    def hook(_: Any, args: Any) -> Any:
        drawn = {
            "outside": lambda: 1.0,
            "global": lambda: torch.rand(mask.shape),
            "generator": lambda: torch.rand(mask.shape, generator=source),
        }
        return args[0] * mask * drawn[where](), *args[1:]

    return hook


@pytest.mark.parametrize("where", ["outside", "global", "generator"])
def test_noise_is_the_same_in_the_recomputation_unless_a_generator_is_drawn_from_in_it(where: str) -> None:
    """The trap: torch puts its own random state back, not a generator's, and raises nothing. Draw outside."""
    pipe = tiny.shared("sd")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    logits, found = torch.full((layer.in_features,), 0.5, requires_grad=True), []
    for way in (FULL, {}):
        source = torch.Generator().manual_seed(5)
        mask = torch.sigmoid(logits + torch.rand(logits.shape, generator=source))
        hook = layer.register_forward_pre_hook(noisy(where, mask, source))
        try:
            found.append(gradients(pipe, "sd", plan(pipe.scheduler), [logits], **way))
        finally:
            hook.remove()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1]) == (where != "generator")


def test_dropout_is_the_same_in_the_recomputation() -> None:
    pipe = tiny.sd()
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    pipe.unet.train()
    held = [pipe.unet.conv_in.weight]
    full = gradients(pipe, "sd", plan(pipe.scheduler), held, **FULL)
    assert all(same(gradients(pipe, "sd", plan(pipe.scheduler), held, **way), full) for way in WAYS.values())


def kept(pipe: Any, family: str, length: int, **how: Any) -> int:
    """Bytes saved for the backward pass of a trajectory; none are left after it."""
    with saved(tiny.denoiser(pipe).parameters()) as count:
        last = differentiable(pipe, plan(pipe.scheduler, evenly(length)), arguments(family), **how)
    held = count.held
    last.sum().backward()
    assert count.held == 0 and count.peak >= held > 0
    return held


def one_call(pipe: Any, family: str, held: list[torch.Tensor]) -> tuple[int, int]:
    """Bytes saved by one call of the denoiser for a sample that has a graph, without what all calls share; bytes of the sample."""
    seen: list[int] = []

    def look(call: Any, following: Any) -> Any:
        args, kwargs = call.args, dict(call.kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else "sample"
        x = (args[0] if args else kwargs.pop(name)).detach().requires_grad_()
        shared = [*held, *call.module.parameters(), *call.module.buffers()]
        shared += [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
        with torch.enable_grad(), saved(shared) as count:
            out = call.execute(x, *args[1:], **kwargs)
        seen[:] = [count.held, x.nbytes]
        return out

    with follow(pipe, plan(pipe.scheduler, evenly(1)), inside=[look]):
        pipe(**arguments(family))
    return seen[0], seen[1]


@pytest.mark.parametrize("family", ["sd", "sd3", "dit"])
def test_what_is_kept_grows_with_the_steps_by_a_call_or_by_its_input(family: str) -> None:
    pipe = tiny.shared(family)
    with gates(tiny.denoiser(pipe)) as held:
        call, latent = one_call(pipe, family, held)
        for way, slope in ((FULL, call), ({}, latent), (WAYS["nested"], latent), (WAYS["offload"], 0)):
            two, four, eight = (kept(pipe, family, length, **way) for length in (2, 4, 8))
            assert (eight - four) / 4 == (four - two) / 2
            assert (eight - four) / 4 == pytest.approx(slope, abs=64)  # a few numbers of the scheduler
        blocks = [kept(pipe, family, length, **WAYS["blocks"]) for length in (2, 4)]
        assert latent < (blocks[1] - blocks[0]) / 2 < call


def test_the_peak_of_all_that_lives_grows_likewise() -> None:
    pipe, peaks = tiny.shared("sd"), {}
    with gates(pipe.unet) as held:
        call, latent = one_call(pipe, "sd", held)
        for name, way in {"full": FULL, **WAYS}.items():
            for steps in (4, 8):
                with Live() as live:
                    last = differentiable(pipe, plan(pipe.scheduler, evenly(steps)), arguments("sd"), **way)
                    found = torch.autograd.grad(last.sum(), held)
                peaks[name, steps] = live.peak
                del last, found
    slopes = {name: (peaks[name, 8] - peaks[name, 4]) / 4 for name, _ in peaks}
    assert slopes["full"] == pytest.approx(call, rel=0.05)
    assert slopes["steps"] == pytest.approx(latent, abs=200) and slopes["nested"] == pytest.approx(latent, abs=200)
    assert peaks["nested", 8] < peaks["steps", 8] < peaks["blocks", 8] < peaks["full", 8]


def test_live_counts_what_lives() -> None:
    with Live() as live:
        one = torch.ones(1000)
        seen = one.view(10, 100)
        two = seen * 2
        assert live.held == 8000
        del one
        assert live.held == 8000  # the view keeps it
        del seen, two
    assert live.held == 0 and live.peak == 8000


def test_saved_counts_a_storage_once_and_no_weights() -> None:
    layer, x = torch.nn.Linear(10, 10, bias=False), torch.ones(4, 10, requires_grad=True)
    with saved([layer.weight]) as count:
        y = layer(x)  # keeps x, for the weight
        z = y * y[:, :5].repeat(1, 2)  # keeps y and the repeated half
    assert count.held == 3 * x.nbytes
    z.sum().backward()
    assert (count.held, count.peak) == (0, 3 * x.nbytes)


@pytest.mark.parametrize("way", WAYS)
def test_a_trajectory_that_is_dropped_leaves_nothing(way: str) -> None:
    """Without a backward pass, and at once: the graph does not hold itself, which no garbage collector would find."""
    pipe = tiny.shared("sd")
    for inside in (None, [checkpoint_steps(), checkpoint_blocks(True)]):
        with Live() as live:
            if inside is None:
                last = differentiable(pipe, plan(pipe.scheduler), arguments("sd"), **WAYS[way])
            else:
                with follow(pipe, plan(pipe.scheduler), inside=inside) as run, torch.enable_grad():
                    inspect.unwrap(type(pipe).__call__)(pipe, **arguments("sd"))
                last = run.last
                del run
            assert last.requires_grad and live.held > last.nbytes
            del last
            assert live.held == 0


def test_nothing_is_decoded_counted_twice_or_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd()
    pipe.unet.enable_gradient_checkpointing()
    own = pipe.unet.down_blocks[0]._gradient_checkpointing_func
    before = [p.requires_grad for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()]
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("decoded"))
    scheduler, calls = pipe.scheduler, []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for way in (FULL, {}):
        calls.clear()
        last = differentiable(pipe, plan(pipe.scheduler), arguments("sd") | {"output_type": "np"}, **way)
        assert len(calls) == 4
        last.sum().backward()
        assert len(calls) == (4 if way is FULL else 4 + 4)
    assert [p.requires_grad for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()] == before
    assert all(p.grad is None for m in (pipe.vae, pipe.text_encoder) for p in m.parameters())
    part = pipe.unet.down_blocks[0]
    assert part.gradient_checkpointing and part._gradient_checkpointing_func is own and pipe.scheduler is scheduler
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.shared("dit")
    monkeypatch.setattr("lissom.core.driving.checkpoint.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with follow(pipe, plan(pipe.scheduler), inside=[checkpoint_steps(), checkpoint_blocks(True)]) as run:
        pipe(**arguments("dit"))
    assert run.calls == 4


def test_refusals() -> None:
    pipe = tiny.dit()
    steps = (Step(timestep=900), Step(timestep=300, reuse=("transformer_blocks.0",)))
    kept = SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)
    for way in (FULL, *WAYS.values()):
        with pytest.raises(CannotFollow, match="step 2 of the plan reuses 'transformer_blocks.0'.*Take `reuse` out"):
            differentiable(pipe, kept, arguments("dit"), **way)
    pipe.transformer._supports_gradient_checkpointing = False
    with pytest.raises(CannotFollow, match="DiTTransformer2DModel cannot be checkpointed block by block"):
        differentiable(pipe, plan(pipe.scheduler), arguments("dit"), by_block=True)
    pipe.transformer.requires_grad_(False)
    with pytest.raises(CannotFollow, match="no gradient reaches the last latent of DiTPipeline"):
        differentiable(pipe, plan(pipe.scheduler), arguments("dit"))


def test_a_denoiser_that_keeps_features_is_refused() -> None:
    pipe = tiny.flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CannotFollow, match=r"Call pipe.transformer.disable_cache\(\) first"):
        differentiable(pipe, plan(pipe.scheduler), arguments("flux"))
