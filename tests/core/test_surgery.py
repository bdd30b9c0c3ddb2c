"""Cuts in memory: exact, undone exactly, in any order, and refused where they do not fit."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from lissom.core import anatomy, blueprints, surgery
from lissom.core.candidate import Cut
from lissom.core.driving.skip import absent
from lissom.core.surgery import CannotCut, applied, apply
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import cut_output, keep, output, remove

EVERY: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(cutting.shared, name) for name in cutting.KINDS if name not in ("sd", "sdxl")},
    **{f"tiny {name}": functools.partial(cutting.family, name) for name in tiny.FAMILIES},
}
PAIR = (keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2))


def state(denoiser: Any) -> tuple[list[tuple[str, int]], list[tuple[str, int]], Any]:
    """Which modules and tensors there are, by identity and in order, and what else surgery may touch."""
    modules = [(a, id(m)) for a, m in denoiser.named_modules()]
    tensors = [(k, t.data_ptr()) for k, t in denoiser.state_dict().items()]
    return modules, tensors, getattr(denoiser, "num_upsamplers", None)


@pytest.mark.parametrize("kind", cutting.KINDS)
def test_nothing_cut_is_nothing_changed(kind: str) -> None:
    denoiser = cutting.shared(kind)
    before, whole = state(denoiser), output(denoiser)
    with applied(denoiser, []):
        assert state(denoiser) == before and torch.equal(output(denoiser), whole)


@pytest.mark.parametrize("kind", EVERY)
def test_cutting_equals_skipping_for_every_layer_and_is_undone_exactly(kind: str) -> None:
    denoiser = EVERY[kind]()
    before, whole = state(denoiser), output(denoiser)
    size = surgery.parameters(denoiser)
    for layer in anatomy.layers(denoiser):
        with absent(denoiser, (layer.address,)):
            skipped = output(denoiser)
        with applied(denoiser, remove(layer.address)):
            assert torch.equal(output(denoiser), skipped), layer.address
            assert set(state(denoiser)[1]) <= set(before[1]), layer.address  # no weight is another one or a copy
            assert size - surgery.parameters(denoiser) == layer.freed, layer.address
        assert not torch.equal(skipped, whole), layer.address
        assert state(denoiser) == before, layer.address
    assert torch.equal(output(denoiser), whole)


def test_an_exception_inside_undoes_the_cuts() -> None:
    unet = cutting.shared("sd")
    before = state(unet)
    with pytest.raises(ZeroDivisionError), applied(unet, [*PAIR, *remove("mid_block")]):
        assert state(unet) != before
        raise ZeroDivisionError
    assert state(unet) == before


CROWD = [
    *PAIR,
    *remove("mid_block.attentions.0", "down_blocks.1.attentions.0.transformer_blocks.0.ff", "up_blocks.1.resnets.2"),
    *remove("down_blocks.0.attentions.1", "down_blocks.0.attentions.1.transformer_blocks.0.attn1"),
    Cut(address="up_blocks.2.attentions.0", what="replace", value="empty"),
    Cut(address="up_blocks.0.resnets.1", what="keep_channels", value=(0, 1, 2, 3)),
    Cut(address="down_blocks.1.resnets.1", what="keep_channels", value=(4, 5, 6, 7)),  # goes with its pair
    Cut(address="up_blocks.1.attentions.2.transformer_blocks.0.attn2", what="keep_heads", value=(1, 3)),  # its pair moves
    Cut(address="down_blocks.0.attentions.1.transformer_blocks.0.ff", what="keep_units", value=(5,)),  # inside a removed one
]


def test_the_order_of_cuts_and_their_number_of_contexts_do_not_matter() -> None:
    """Addresses are those of the denoiser as it was given. Inner, outer, lists and single layers together."""
    unet = cutting.shared("sd")
    wanted = cut_output(unet, CROWD)
    for seed in range(6):
        order = torch.randperm(len(CROWD), generator=torch.Generator().manual_seed(seed)).tolist()
        assert torch.equal(cut_output(unet, [CROWD[i] for i in order]), wanted)
    assert torch.equal(cut_output(unet, [*CROWD, *CROWD]), wanted)  # said twice
    with applied(unet, [c for c in CROWD if c.what != "keep_layers"]), applied(unet, PAIR):
        assert torch.equal(output(unet), wanted)


@pytest.mark.parametrize("kind", ["sd", "dit", "flux", "sd3.5"])
def test_cutting_inside_what_is_cut_changes_nothing(kind: str) -> None:
    denoiser = cutting.shared(kind)
    addresses = [layer.address for layer in anatomy.layers(denoiser)]
    inner = next(b for a, b in itertools.pairwise(addresses) if b.startswith(a + "."))
    outer = addresses[addresses.index(inner) - 1]
    both = remove(inner, outer)
    assert torch.equal(cut_output(denoiser, both), cut_output(denoiser, remove(outer)))
    assert surgery.outermost(both) == remove(outer)


def test_what_is_left_of_a_unet_without_its_branches() -> None:
    """Without ResNet branches, attentions and middle only resampling, shortcuts and skip connections are left: linear in x."""
    unet = cutting.shared("sd")
    addresses = [layer.address for layer in anatomy.layers(unet) if layer.kind in ("resnet", "attention", "middle")]
    inputs = cutting.inputs(unet)
    seen: list[torch.Tensor] = []
    hook = unet.conv_norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with applied(unet, remove(*addresses)), torch.no_grad():
        for factor in (0.0, 1.0, 3.0):
            unet(**(inputs | {"sample": factor * inputs["sample"]}))
    hook.remove()
    zero, one, three = seen
    torch.testing.assert_close(three - zero, 3 * (one - zero))


REFUSED: dict[str, tuple[str, list[Cut], str]] = {
    "no such layer": ("sd", remove("down_blocks.7.resnets.0"), r"down_blocks\.7\.resnets\.0: the denoiser has no such layer"),
    "no address": ("sd", remove(""), "no such layer"),
    "an operator": ("sd", remove("conv_in"), "conv_in: what stands in for Conv2d here is not known"),
    "a list": ("dit", remove("transformer_blocks"), "transformer_blocks: what stands in for ModuleList"),
    "known class, foreign place": ("sd3", remove("transformer_blocks.0.attn"), r"blocks\.0\.attn: what stands in for Attention here"),
    "no such argument": (
        "dit",
        [Cut(address="transformer_blocks.0.norm3", what="remove", value="x")],
        r"norm3: LayerNorm has no argument 'x' to pass on",
    ),
    "what has no width": (
        "sd",
        [Cut(address="mid_block.attentions.0", what="keep_heads", value=(0,))],
        r"mid_block\.attentions\.0: heads cannot be cut here, because a Transformer2DModel has no heads",
    ),
    "a layer that goes and stays": (
        "sd",
        [*remove("mid_block.resnets.0"), Cut(address="mid_block.resnets.0", what="keep_channels", value=(0, 1, 2, 3))],
        r"mid_block\.resnets\.0: two cuts of one layer",
    ),
    "replaced by what": (
        "sd",
        [Cut(address="mid_block.attentions.0", what="replace", value="air")],
        r"mid_block\.attentions\.0: replace air cannot be applied",
    ),
    "nothing to empty": (
        "sd",
        [Cut(address="mid_block.resnets.0", what="replace", value="empty")],
        r"mid_block\.resnets\.0: replace empty cannot be applied",
    ),
    "two of one": (
        "sd",
        [*remove("mid_block.attentions.0"), Cut(address="mid_block.attentions.0", what="replace", value="empty")],
        r"mid_block\.attentions\.0: two cuts of one layer",
    ),
    "pair alone, down": ("sd", [PAIR[0]], "fit together: the way down makes 8 skip connections and the way up takes 9; a pair"),
    "pair alone, up": ("sd", [PAIR[1]], "fit together: the way down makes 9 skip connections and the way up takes 8; a pair"),
    "pairs of other stages": (
        "sd",
        [keep("down_blocks.2", 0), keep("up_blocks.2", 0, 2)],
        r"up_blocks\.0\.resnets\.2 works at 1/4 of the size and would get a skip connection of 1/2 .*down_blocks\.1\.resnets\.1",
    ),
    "last pair of an up stage": (
        "sd",
        [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 1)],
        r"up_blocks\.1\.resnets\.1 takes 32 channels and would get 16 \+ 8 \(the skip connection of down_blocks\.0\.downsamplers",
    ),
    "pairs of the middle": ("sd", [keep("mid_block", 0)], "mid_block: is no stage of a U-Net"),
    "layers of a transformer": ("dit", [keep("transformer_blocks.0", 0)], r"transformer_blocks\.0: is no stage"),
    "none kept": ("sd", [keep("down_blocks.0"), keep("up_blocks.2", 0)], r"down_blocks\.0: cannot keep layers \[\] of 2"),
    "kept twice": ("sd", [keep("up_blocks.2", 0, 0), keep("down_blocks.0", 0)], r"up_blocks\.2: cannot keep layers .*0, 0.* of 3"),
    "out of order": ("sd", [keep("up_blocks.2", 2, 0), keep("down_blocks.0", 0)], r"up_blocks\.2: cannot keep"),
    "beyond the end": ("sd", [keep("up_blocks.2", 0, 3), keep("down_blocks.0", 0)], r"up_blocks\.2: cannot keep layers .*3"),
    "sampler down alone": ("sd", remove("down_blocks.1.downsamplers.0"), "makes 8 skip connections .* takes 9; a pair or a sampler"),
    "sampler up alone": ("sd", remove("up_blocks.1.upsamplers.0"), r"up_blocks\.2\.resnets\.0 works at 1/2 of the size .* full size"),
    "an outer stage": ("sd", remove("down_blocks.0", "up_blocks.2"), r"down_blocks\.0: the stages of a U-Net go from the innermost"),
    "stage down alone": ("sd", remove("down_blocks.2", "mid_block"), "the way down makes 7 skip connections and the way up takes 9"),
    "stage, wrong width": (
        "sd",
        remove("down_blocks.2", "down_blocks.1", "down_blocks.0.downsamplers.0", "up_blocks.0", "up_blocks.1"),
        "fit together: mid_block takes 16 channels and would get 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(name: str) -> None:
    kind, cuts, says = REFUSED[name]
    denoiser = cutting.shared(kind)
    before = state(denoiser)
    with pytest.raises(CannotCut, match=says) as e:
        apply(denoiser, cuts)
    assert state(denoiser) == before
    assert "\n" not in str(e.value)


def test_a_cut_layer_is_not_there_any_more() -> None:
    dit = cutting.shared("dit")
    with applied(dit, remove("transformer_blocks.1")):
        assert not [a for a in (layer.address for layer in anatomy.layers(dit)) if a.startswith("transformer_blocks.1")]
        with pytest.raises(CannotCut, match="transformer_blocks.1: what stands in for Absent"):
            apply(dit, remove("transformer_blocks.1"))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixels", "resampling"])
def test_skip_connections_are_judged_as_the_forward_does(kind: str) -> None:
    """Every way to keep all but one layer of one down stage and of one up stage: refused where a forward fails, else not."""
    unet = cutting.shared(kind)
    tried = {True: 0, False: 0}
    for (k, down), (n, up) in itertools.product(enumerate(unet.down_blocks), enumerate(unet.up_blocks)):
        for i, j in itertools.product(range(len(down.resnets)), range(len(up.resnets))):
            two = [
                keep(f"down_blocks.{k}", *(x for x in range(len(down.resnets)) if x != i)),
                keep(f"up_blocks.{n}", *(x for x in range(len(up.resnets)) if x != j)),
            ]
            undo = surgery.standins.cut(unet, [cut.plain() for cut in two])
            fits = surgery.skip_connections_misfit(unet) is None
            try:
                works = runs(unet)
            finally:
                undo()
            assert fits == works, (k, i, n, j)
            tried[fits] += 1
    assert tried[True] and tried[False]


def runs(unet: Any) -> bool:
    try:
        return bool(output(unet).isfinite().all())
    except RuntimeError:  # of shapes
        return False


def test_pairs_are_all_ways_that_run() -> None:
    unet = cutting.shared("sd")
    found = surgery.pairs(unet)
    for two in found:
        with applied(unet, two):
            assert output(unet).isfinite().all()
    every = itertools.product(range(3), range(2), range(2))  # stage, which goes down, which of the first two goes up
    tried = [
        (keep(f"down_blocks.{k}", 1 - i), keep(f"up_blocks.{2 - k}", *(x for x in range(3) if x != j))) for k, i, j in every
    ]
    for two in tried:
        undo = surgery.standins.cut(unet, [cut.plain() for cut in two])
        assert runs(unet) == (two in found)
        undo()
    assert len(found) == len(set(found)) < len(tried)
    assert surgery.pairs(cutting.shared("dit")) == []


def test_pairs_of_stable_diffusion() -> None:
    """By the widths of its ResNets: one that widens has to stay, down; the last of a stage, up."""
    ways: dict[str, list[tuple[Any, Any]]] = {}
    for down, up in surgery.pairs(blueprints.load("sd15").denoiser):
        assert int(down.address[-1]) + int(up.address[-1]) == 3
        ways.setdefault(down.address, []).append((down.value, up.value))
    assert {k: set(v) for k, v in ways.items()} == {
        "down_blocks.0": {((0,), (0, 2)), ((1,), (0, 2))},
        "down_blocks.1": {((0,), (0, 2))},
        "down_blocks.2": {((0,), (0, 2)), ((0,), (1, 2))},
        "down_blocks.3": {((0,), (0, 2)), ((0,), (1, 2)), ((1,), (0, 2)), ((1,), (1, 2))},
    }
    # What is pushed last is popped first: all other skip connections stay where they were.
    assert [v[0] for v in ways.values()] == [((1,), (0, 2)), ((0,), (0, 2)), ((0,), (1, 2)), ((0,), (1, 2))]


def test_what_comes_back_follows_a_denoiser_that_was_offloaded() -> None:
    """accelerate moves all that it sees at the first forward. Its device here is one that every machine has: meta."""
    unet = cutting.sd()
    accelerate.cpu_offload_with_hook(unet, execution_device="meta")
    inputs = cutting.inputs(unet)
    for _ in range(2):
        with applied(unet, [*PAIR, *remove("mid_block")]), torch.no_grad():
            unet(**inputs)
        assert {p.device.type for p in unet.parameters()} == {"meta"}
        assert unet(**inputs).sample.is_meta


def test_without_offload_nothing_is_moved() -> None:
    """Some parts of a denoiser may be elsewhere on purpose."""
    unet = cutting.sd()
    unet.mid_block.to("meta")
    with applied(unet, remove("mid_block")):
        output(unet)
    assert {p.device.type for p in unet.mid_block.parameters()} == {"meta"} and not unet.conv_in.weight.is_meta


def test_a_compiled_denoiser_is_cut_inside() -> None:
    dit = cutting.KINDS["dit"]()
    compiled = torch.compile(dit, backend="eager")
    wanted = cut_output(dit, remove("transformer_blocks.1"))
    with applied(compiled, remove("transformer_blocks.1")):
        assert torch.equal(output(dit), wanted)


def test_patterns_choose_addresses() -> None:
    known = ["up.0.attn", "up.1.attn", "down.0"]
    assert surgery.matching(["up.*.attn", "down.?"], known) == set(known)
    with pytest.raises(
        surgery.UserError, match=r"pattern 'mid\*' matches no layer that can be cut \(3 there are, such as up\.0"
    ):
        surgery.matching(["up*", "mid*"], known)
