"""Blocks of more transformers: a skipped one is not executed, and skipped in all steps it is the same as cut."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from lissom.benchmarks import _families_building as building
from lissom.benchmarks import _families_found, _families_parts
from lissom.core import anatomy, surgery
from lissom.core.candidate import Cut, SamplingPlan, Scheduler, Step
from lissom.core.driving import follow
from lissom.core.driving.schedulers import kind_of
from lissom.core.standins import STAND_INS
from lissom.tests.core import tiny, tiny_families

TIMES = (901, 640, 333)
IMAGE, TEXT = ("hidden_states",), ("encoder_hidden_states", "hidden_states")  # what a block hands on, by its arguments' names
BOTH = ("hidden_states", "encoder_hidden_states")
BLOCKS: dict[str, dict[str, tuple[str, ...]]] = {
    "BriaFibo": {"BriaFiboTransformerBlock": TEXT, "BriaFiboSingleTransformerBlock": IMAGE},
    "Chroma": {"ChromaTransformerBlock": TEXT, "ChromaSingleTransformerBlock": IMAGE},
    "CogVideoX": {"CogVideoXBlock": BOTH},
    "CogView3Plus": {"CogView3PlusTransformerBlock": BOTH},
    "CogView4": {"CogView4TransformerBlock": BOTH},
    "ErnieImage": {"ErnieImageSharedAdaLNBlock": ("x",)},
    "Flux2": {"Flux2TransformerBlock": TEXT, "Flux2SingleTransformerBlock": IMAGE},
    "GlmImage": {"GlmImageTransformerBlock": BOTH},
    "HunyuanDiT": {"HunyuanDiTBlock": IMAGE},
    "HunyuanImage": {"HunyuanImageTransformerBlock": BOTH, "HunyuanImageSingleTransformerBlock": BOTH},
    "HunyuanVideo": {"HunyuanVideoTransformerBlock": BOTH, "HunyuanVideoSingleTransformerBlock": BOTH},
    "Ideogram4": {"Ideogram4TransformerBlock": IMAGE},
    "Krea2": {"Krea2TransformerBlock": IMAGE, "Krea2TextFusionBlock": IMAGE},
    "LongCatImage": {"LongCatImageTransformerBlock": TEXT, "LongCatImageSingleTransformerBlock": TEXT},
    "Lumina": {"LuminaNextDiTBlock": IMAGE},
    "Lumina2": {"Lumina2TransformerBlock": IMAGE},
    "NucleusMoEImage": {"NucleusMoEImageTransformerBlock": IMAGE},
    "OvisImage": {"OvisImageTransformerBlock": TEXT, "OvisImageSingleTransformerBlock": TEXT},
    "PRX": {"PRXBlock": IMAGE},
    "QwenImage": {"QwenImageTransformerBlock": TEXT},
    "ZImage": {"ZImageTransformerBlock": ("x",)},
}
CASES = [(name, cls) for name, blocks in BLOCKS.items() for cls in blocks]


@functools.cache
def pipeline(name: str) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """A pipeline and what makes the arguments of a call."""
    if name in tiny_families.FAMILIES:
        return tiny_families.shared(name), lambda: tiny_families.FAMILIES[name][1](1)
    found = next(p for p in _families_found.pipelines() if p.name == f"{name}Pipeline")
    return building.build(found), lambda: building.arguments(found, 1)


def run(name: str, skips: Sequence[tuple[str, ...]] = ((), (), ())) -> torch.Tensor:
    pipe, arguments = pipeline(name)
    own = Scheduler.of(pipe.scheduler)
    if kind_of(own.name, own.config) is None:
        own = Scheduler(name="DDIMScheduler", config=own.config)
    steps = tuple(Step(timestep=t, skip=s) for t, s in zip(TIMES, skips, strict=True))
    with torch.no_grad(), follow(pipe, SamplingPlan(scheduler=own, steps=steps)) as state:
        pipe(**arguments(), num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert state.last is not None
    return state.last


def skipped_everywhere(name: str, address: str) -> torch.Tensor:
    """The sample without a layer. It must not be executed where it is skipped, and be the same as cut."""
    denoiser = tiny.denoiser(pipeline(name)[0])
    layer = denoiser.get_submodule(address)
    kept = [getattr(layer, part, None) for part in ("conv_shortcut", "upsample", "downsample")]
    stays = {id(m) for part in kept if isinstance(part, torch.nn.Module) for m in part.modules()}
    leaves = [m for m in layer.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and id(m) not in stays]
    executed: list[int] = []
    hook = leaves[-1].register_forward_hook(lambda *_: executed.append(1))
    whole = run(name)
    full = len(executed)
    executed.clear()
    once = run(name, [(), (address,), ()])
    assert full and full % 3 == 0 and len(executed) == full * 2 // 3
    executed.clear()
    always = run(name, [(address,)] * 3)
    assert not executed
    hook.remove()
    assert not torch.equal(once, whole) and not torch.equal(always, once)
    with surgery.applied(denoiser, [Cut(address=address, what="remove")]):
        assert torch.equal(run(name), always)
    return always


@pytest.mark.parametrize(("name", "cls"), CASES)
def test_a_skipped_block(name: str, cls: str) -> None:
    denoiser = pipeline(name)[0].transformer
    address = [x.address for x in anatomy.layers(denoiser) if type(denoiser.get_submodule(x.address)).__name__ == cls][-1]
    always = skipped_everywhere(name, address)
    block = denoiser.get_submodule(address)
    hook = block.register_forward_hook(functools.partial(hand_on, BLOCKS[name][cls]), with_kwargs=True)
    try:
        assert torch.equal(run(name), always)  # what the block makes is thrown away
    finally:
        hook.remove()


def layers_of_families() -> list[tuple[str, str]]:
    """The last layer of each class and kind."""
    found = {}
    for family in ("pixart-sigma", "sana", "kandinsky", "controlnet", "wan"):
        denoiser = tiny.denoiser(tiny_families.shared(family))
        for layer in anatomy.layers(denoiser):
            found[family, type(denoiser.get_submodule(layer.address)).__name__, layer.kind] = (family, layer.address)
    return list(found.values())


@pytest.mark.parametrize(("family", "address"), layers_of_families())
def test_a_skipped_layer_of_a_family(family: str, address: str) -> None:
    skipped_everywhere(family, address)


def hand_on(names: tuple[str, ...], block: Any, args: Any, kwargs: Any, output: Any) -> Any:
    given = {**dict(zip(list(inspect.signature(type(block).forward).parameters)[1:], args, strict=False)), **kwargs}
    return tuple(given[n] for n in names) if len(names) > 1 else given[names[0]]


def test_every_stand_in_is_tried_here_or_with_its_family() -> None:
    families = [*map(tiny.shared, tiny.FAMILIES), *map(tiny_families.shared, ("pixart-sigma", "sana", "kandinsky", "wan"))]
    tried = {type(m).__name__ for pipe in families for m in tiny.denoiser(pipe).modules()}
    assert set(STAND_INS) <= tried | {cls for _, cls in CASES}


def test_the_middle_of_a_controlled_unet_is_no_layer_where_it_changes_the_width() -> None:
    """ControlNet-XS joins the channels of two networks before it."""
    unet = _families_parts.model(diffusers.UNet2DConditionModel, layers_per_block=2)
    sizes = {"block_out_channels": [4, 8], "num_attention_heads": [2, 2], "conditioning_embedding_out_channels": [4]}
    joined = diffusers.UNetControlNetXSModel.from_unet(unet, diffusers.ControlNetXSAdapter.from_unet(unet, **sizes))
    assert [x.address for x in anatomy.layers(unet) if x.kind == "middle"] == ["mid_block"]
    assert [x.address for x in anatomy.layers(joined) if x.kind == "middle"] == ["mid_block.base_midblock"]
