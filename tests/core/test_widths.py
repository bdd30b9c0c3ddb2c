"""Fewer heads, units and channels: equal to masking those that go, undone exactly, saved from the parent's files, or refused."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from lissom.core import export, narrowing, surgery
from lissom.core.candidate import Candidate, Cut
from lissom.core.driving.skip import absent
from lissom.core.surgery import CannotCut, applied
from lissom.core.widths import Width, alike, by_class, limited, rounded, variety, widths
from lissom.tests.core import cutting
from lissom.tests.core.cutting import cut_output, inputs, keep, output, remove
from lissom.tests.core.test_surgery import state
from lissom.tests.core.tiny_families import ltx, wide
from torch import nn

KINDS: dict[str, Callable[[], Any]] = {
    **{
        name: functools.partial(cutting.shared, name)
        for name in ("sd", "pixels", "dit", "pixart", "sana", "wan", "flux", "sd3", "sd3.5")
    },
    "sana-1.5": functools.partial(wide, "sana-1.5"),
    "scale_shift": functools.cache(lambda: cutting.sd(resnet_time_scale_shift="scale_shift")),
    "resampling": functools.partial(cutting.shared, "resampling"),
}
LTX = functools.cache(lambda: ltx().transformer)
# what sums over heads, units, channels (nothing does over modulation channels: test_modulation is for those)
READS = {"keep_heads": ("to_out.0", "to_add_out"), "keep_units": ("net.2", "conv_point"), "keep_channels": ("conv2",)}
BLOCK = "up_blocks.1.attentions.0.transformer_blocks.0"


def cut(address: str, what: str, *stay: int) -> Cut:
    return Cut(address=address, what=f"keep_{what}", value=stay)  # type: ignore[arg-type]


def some(width: Width, seed: int) -> Cut:
    """A random half of the groups of a width, at least one, not all."""
    order = torch.randperm(len(width.groups), generator=torch.Generator().manual_seed(seed)).tolist()
    stay = sorted(i for k in order[: max(1, len(order) // 2)] for i in width.groups[k])
    return Cut(address=width.address, what=width.what, value=tuple(stay))  # type: ignore[arg-type]


@contextmanager
def masked(denoiser: Any, cuts: Sequence[Cut], counts: dict[str, int]) -> Iterator[None]:
    """Inside, nothing reads the heads, units and channels that go. Written without the code that cuts."""
    before = []
    found = [(cut, *read) for cut in cuts for read in reads(denoiser, cut, counts[cut.address])]
    for each, weight, first, size in found:
        assert isinstance(each.value, tuple)
        before.append((weight, weight.detach().clone()))
        for gone in set(range(counts[each.address])) - set(each.value):
            weight.data[:, first + gone * size : first + (gone + 1) * size] = 0
    try:
        yield
    finally:
        for weight, values in reversed(before):
            weight.data.copy_(values)


def reads(denoiser: Any, cut: Cut, count: int) -> list[tuple[Any, int, int]]:
    """The weights that sum over heads, units or channels, from which column on, and how many columns each has."""
    block, _, name = cut.address.rpartition(".")
    if block.startswith("single"):  # the heads first, then the units
        weight, units = (
            denoiser.get_submodule(f"{block}.proj_out").weight,
            denoiser.get_submodule(f"{block}.proj_mlp").out_features,
        )
        heads = weight.shape[1] - units
        return [(weight, heads, 1) if name == "proj_mlp" else (weight, 0, heads // count)]
    layer = denoiser.get_submodule(cut.address)
    there = dict(layer.named_modules())
    weights = [there[part].weight for part in READS[cut.what] if part in there]
    return [(weight, 0, weight.shape[1] // count) for weight in weights]


def freed(denoiser: Any, address: str, what: str, gone: int) -> int:
    """Parameters of so many heads, units or channels, by the shapes of the formulas."""
    layer, kind = denoiser.get_submodule(address), type(denoiser.get_submodule(address)).__name__
    if what == "keep_heads":
        size = layer.to_v.out_features // layer.heads
        whole = type(layer.norm_q).__name__ == "RMSNorm" and layer.norm_q.weight.numel() > size  # over all heads: q and k stay
        own = [layer.to_v] if whole else [layer.to_q, layer.to_k, layer.to_v]
        text = [layer.add_q_proj, layer.add_k_proj, layer.add_v_proj] if getattr(layer, "add_q_proj", None) is not None else []
        made = sum(p.in_features + (p.bias is not None) for p in (*own, *text))
        out = [p for p in ((getattr(layer, "to_out", None) or [None])[0], getattr(layer, "to_add_out", None)) if p is not None]
        read = sum(p.out_features for p in out) or layer.query_dim  # by the block
        return gone * size * (made + read)
    if kind == "Linear":  # proj_mlp
        return gone * (layer.in_features + 1 + layer.in_features)
    if kind == "GLUMBConv":
        return gone * (2 * (layer.conv_inverted.in_channels + 1) + 2 * (9 + 1) + layer.conv_point.out_channels)
    if what == "keep_units":
        made = 1 + (type(layer.net[0]).__name__ in ("GEGLU", "SwiGLU"))
        return gone * (made * (layer.net[0].proj.in_features + 1) + layer.net[2].out_features)
    speaks = 0 if layer.time_emb_proj is None else layer.time_emb_proj.in_features + 1
    twice = 1 + (layer.time_embedding_norm == "scale_shift")
    return gone * (9 * layer.in_channels + 1 + twice * speaks + 2 + 9 * layer.out_channels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_layer_is_the_masked_one_and_is_undone_exactly(kind: str) -> None:
    """Every width of every family, one by one and all at once; parameters as the formulas say.

    Also that what surrounds it is untouched (6.5, item 2: samplers check their channels), and that heads are not cut up anew
    (item 3), which would be another output.
    """
    denoiser = KINDS[kind]()
    before, whole, size = state(denoiser), output(denoiser), surgery.parameters(denoiser)
    found = [width for width in widths(denoiser) if width.what in READS]
    counts = {width.address: width.count for width in found}
    cuts = [some(width, seed) for seed, width in enumerate(found)]
    chosen = [[each] for each in cuts[:: 1 + len(cuts) // 25]] + [cuts]
    for each in chosen:
        with masked(denoiser, each, counts):
            wanted = output(denoiser)
        lost = sum(freed(denoiser, c.address, c.what, counts[c.address] - len(c.value or ())) for c in each)
        with applied(denoiser, each):
            torch.testing.assert_close(output(denoiser), wanted, rtol=0, atol=1e-6 * float(whole.abs().max()))
            assert size - surgery.parameters(denoiser) == lost
        assert not torch.equal(wanted, whole)
        assert state(denoiser) == before
    assert torch.equal(output(denoiser), whole)


@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gate_of_a_unit_go_together(activation: str, bias: bool) -> None:
    """6.5, item 4: of a fused projection the row of the value and the row of its gate go, for every activation there is."""
    torch.manual_seed(0)
    parent = nn.ModuleDict({"ff": FeedForward(6, inner_dim=10, activation_fn=activation, bias=bias)})
    x, stay, layer = torch.randn(3, 6), (0, 3, 4, 9), parent["ff"]
    with masked(parent, [cut("ff", "units", *stay)], {"ff": 10}):
        wanted = layer(x)
    narrow = narrowing.narrowed(layer, "ff", "keep_units", stay)
    torch.testing.assert_close(narrow(x), wanted)
    assert narrow.net[2].in_features == 4 and narrow.net[0].proj.out_features in (4, 8)
    assert layer.net[2].weight.shape == (6, 10) and layer.net[2].bias is narrow.net[2].bias


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_heads_keep_their_size_for_every_processor(processor: Any) -> None:
    """6.5, item 3: heads, inner_dim and the rest follow; a mask of tokens is made for the heads that are left."""
    torch.manual_seed(0)
    parent = nn.ModuleDict({"attn": Attention(6, cross_attention_dim=5, heads=4, dim_head=3, bias=True, qk_norm="layer_norm")})
    x, text, mask, layer = torch.randn(2, 7, 6), torch.randn(2, 5, 5), torch.randn(2, 1, 5), parent["attn"]
    with masked(parent, [cut("attn", "heads", 1, 2, 3)], {"attn": 4}):
        wanted = layer(x, text, attention_mask=mask)
    narrow = narrowing.narrowed(layer, "attn", "keep_heads", (1, 2, 3))
    assert (narrow.heads, narrow.inner_dim, narrow.inner_kv_dim, narrow.sliceable_head_dim) == (3, 9, 9, 3)
    assert (layer.heads, layer.inner_dim, layer.inner_kv_dim, layer.sliceable_head_dim) == (4, 12, 12, 4)
    assert narrow.scale == layer.scale and narrow.norm_q is layer.norm_q
    torch.testing.assert_close(narrow(x, text, attention_mask=mask), wanted)
    narrow.set_processor(processor)
    layer.norm_q = layer.norm_k = narrow.norm_q = narrow.norm_k = None  # which these two leave out
    with masked(parent, [cut("attn", "heads", 1, 2, 3)], {"attn": 4}):
        torch.testing.assert_close(narrow(x, text, attention_mask=mask), layer(x, text, attention_mask=mask))


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_whole_groups_of_a_norm_go_or_equally_many_channels_of_each(shift: str) -> None:
    """6.5, item 6: groups keep their borders. Fewer channels in a group have other statistics, by plain arithmetic on them."""
    torch.manual_seed(0)
    layer = ResnetBlock2D(in_channels=4, out_channels=8, temb_channels=5, groups=2, groups_out=4, time_embedding_norm=shift)
    nn.init.normal_(layer.norm2.weight)
    x, temb = torch.randn(2, 4, 3, 3), torch.randn(2, 5)
    found: dict[tuple[int, ...], Any] = {}
    for stay, groups in {(2, 3, 6, 7): 2, (0, 3, 5, 6): 4, (0, 6): 2}.items():
        with masked(nn.ModuleDict({"r": layer}), [cut("r", "channels", *stay)], {"r": 8}):
            wanted = layer(x, temb)
        narrow = narrowing.narrowed(layer, "r", "keep_channels", stay)
        assert (narrow.norm2.num_groups, narrow.norm2.num_channels) == (groups, len(stay)) and layer.norm2.num_groups == 4
        assert (narrow.conv1.out_channels, narrow.conv2.in_channels) == (len(stay), len(stay))
        assert (narrow.in_channels, narrow.out_channels) == (4, 8) and narrow.conv_shortcut is layer.conv_shortcut
        found[stay] = torch.allclose(narrow(x, temb), wanted, atol=1e-6)
    assert found == {(2, 3, 6, 7): True, (0, 3, 5, 6): False, (0, 6): False}


@pytest.mark.parametrize(
    "whole", [cut(f"{BLOCK}.attn1", "heads", 0, 1, 2, 3), cut("mid_block.resnets.0", "channels", *range(16))]
)
def test_a_cut_that_keeps_all_changes_nothing(whole: Cut) -> None:
    unet = cutting.shared("sd")
    before = state(unet)
    with applied(unet, [whole]):
        assert state(unet) == before
    assert export.structure(unet, [whole]).opens == "stock"


def test_widths_are_listed_in_order_and_in_what_is_left() -> None:
    unet = cutting.shared("sd")
    found = {width.address: width for width in widths(unet)}
    assert found["mid_block.resnets.0"] == Width("mid_block.resnets.0", "keep_channels", 16, 4)
    assert found[f"{BLOCK}.attn2"] == Width(f"{BLOCK}.attn2", "keep_heads", 4, 1)
    assert found[f"{BLOCK}.ff"] == Width(f"{BLOCK}.ff", "keep_units", 64, 1)
    order = [address for address, _ in unet.named_modules()]
    assert all(order.index(a) < order.index(b) for a, b in pairwise(found))
    with applied(
        unet,
        [
            cut("mid_block.resnets.0", "channels", *range(4, 16)),
            cut(f"{BLOCK}.ff", "units", 7),
            *remove("mid_block.attentions.0"),
        ],
    ):
        left = {width.address: width.count for width in widths(unet)}
    gone = {a for a in found if a.startswith("mid_block.attentions.0.")} | {f"{BLOCK}.ff"}
    assert left == {a: w.count for a, w in found.items() if a not in gone} | {"mid_block.resnets.0": 12}


def test_widths_of_blocks_with_two_streams_or_side_by_side() -> None:
    """Joint attention is one width; what a single block computes side by side are two, by addresses of their own."""
    inside = {
        "attn": ("keep_heads", 4),
        "attn2": ("keep_heads", 4),
        "ff": ("keep_units", 128),
        "ff_context": ("keep_units", 128),
    }
    for kind, blocks in {
        "sd3": {"transformer_blocks.0": tuple(inside), "transformer_blocks.1": ("attn", "ff")},
        "flux": {
            **dict.fromkeys(("transformer_blocks.0", "transformer_blocks.1"), ("attn", "ff", "ff_context")),
            **dict.fromkeys(("single_transformer_blocks.0", "single_transformer_blocks.1"), ("proj_mlp", "attn")),
        },
    }.items():
        told = inside | {"proj_mlp": ("keep_units", 128)}
        wanted = [Width(f"{block}.{name}", *told[name], 1) for block, names in blocks.items() for name in names]
        assert [width for width in widths(wide(kind)) if width.what in READS] == wanted


def test_few_shapes_are_left_of_each_class_of_blocks() -> None:
    """Counts are only ever raised, by no more than it takes; blocks of other sizes, and those of other classes, count apart."""
    unet = cutting.shared("sd")
    of_blocks = {w: (k * 7) % w.count + 1 for k, w in enumerate(widths(unet)) if ".transformer_blocks." in w.address}
    kept = {**of_blocks, Width("mid_block.resnets.0", "keep_channels", 16, 4): 4}
    for most in (8, 3, 2):
        found = limited(by_class(unet), kept, most)
        assert found.keys() == kept.keys() and all(kept[w] <= stays <= w.count for w, stays in found.items())
        assert found[list(found)[-1]] == (4 if most > 2 else 16)  # ResNets of 8 and of 16 channels there are besides
        shapes: dict[str, list[int]] = {}
        for width, stays in found.items():
            if width.what != "keep_channels":
                shapes.setdefault(width.address.rpartition(".")[0], []).append(stays)
        assert len(set(map(tuple, shapes.values()))) <= max(most, 2)  # there are blocks of 32 and of 64 units
    assert limited(by_class(unet), kept, 99) == kept and variety(by_class(unet), kept) != variety(by_class(unet), found)
    assert alike([((5,), (9,)), ((1,), (9,)), ((6,), (9,)), ((9,), (99,))], 2) == [(6,), (6,), (6,), (9,)]


def test_rounding_never_gives_nothing_nor_more_than_there_is() -> None:
    for kept, multiple, most in ((k, m, n) for n in (1, 5, 64, 100) for m in (1, 8, 64) for k in range(1, n + 1)):
        assert 1 <= (found := rounded(kept, multiple, most)) <= most
        assert found == most or found % multiple == 0 and (abs(found - kept) <= multiple / 2 or found == multiple)


REFUSED: dict[str, tuple[str, Cut, str]] = {
    "none": ("sd", cut("mid_block.resnets.0", "channels"), r"cannot keep channels none of 16 \(they ascend, each once, from"),
    "twice": ("sd", cut(f"{BLOCK}.ff", "units", 0, 0), r"ff: cannot keep units 0, 0 of 64"),
    "out of order": ("sd", cut("mid_block.resnets.0", "channels", 4, 5, 6, 7, 0, 1, 2, 3), r"cannot keep channels 4, 5, 6, 7, 0, 1, 2, 3 of"),
    "beyond the end": ("sd", cut(f"{BLOCK}.ff", "units", *range(60, 70)), r"cannot keep units 60, 61, 62, 63, …, 69 \(10 of them\) of 64"),
    "negative": ("dit", cut("transformer_blocks.0.attn1", "heads", -1, 0), r"cannot keep heads -1, 0 of 2"),
    "by name": ("sd", Cut(address=f"{BLOCK}.ff", what="keep_units", value="all"), "cannot keep units all of 64"),
    "uneven groups": (
        "sd", cut("mid_block.resnets.0", "channels", 0, 1, 2, 3, 8, 9, 10),
        r"mid_block\.resnets\.0: cannot keep 3 of the 4 channels of group 2 and 4 of group 0: each group of norm2 stays with equal",
    ),
    "another kind": ("sd", cut(f"{BLOCK}.ff", "heads", 0), "ff: heads cannot be cut here, because a FeedForward has no heads"),
    "an operator": ("sd", cut("conv_in", "channels", 0), "conv_in: channels cannot be cut here, because a Conv2d has no"),
    "added keys": ("resampling", cut("mid_block.attentions.0", "heads", 0), "what its AttnAddedKVProcessor2_0 does with"),
    "a block": ("flux", cut("single_transformer_blocks.0", "units", 0), "because its units are those of its proj_mlp"),
    "any operator": ("flux", cut("transformer_blocks.0.ff.net.2", "units", 0), "because a Linear has no units"),
    "turned before parted": ("ltx", cut("transformer_blocks.0.attn1", "heads", 0), "its norm_q looks at all heads together"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_where_and_why(name: str) -> None:
    kind, each, says = REFUSED[name]
    denoiser = LTX() if kind == "ltx" else KINDS[kind]()
    before = state(denoiser)
    deepest = max((w for w in widths(denoiser) if w.address != each.address), key=lambda w: w.address.count("."))
    with pytest.raises(CannotCut, match=says) as e:
        surgery.apply(denoiser, [some(deepest, 0), each])  # what went well before is undone
    assert state(denoiser) == before and "\n" not in str(e.value)
    assert each.address not in {w.address for w in widths(denoiser) if w.what == each.what} or "cannot keep" in says


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "shared keys": (lambda: Attention(8, heads=4, kv_heads=2, dim_head=2), "its heads share keys and values in groups"),
    "norm of all": (
        lambda: Attention(8, heads=4, kv_heads=4, dim_head=2, qk_norm="layer_norm_across_heads"),
        "its norm_q looks at all heads together",
    ),
    "unknown norm": (lambda: Attention(8, heads=4, dim_head=2, qk_norm="l2"), "its norm_q looks at all"),
    "fused": (lambda: fused(Attention(8, heads=4, dim_head=2)), "its projections are fused"),
    "unknown processor": (lambda: Attention(8, heads=4, dim_head=2, processor=Mixing()), "nothing is known of what its Mixing does"),
    "no output": (lambda: Attention(8, heads=4, dim_head=2, pre_only=True), "it lacks keys, values or an output of its own"),
    "adapter": (lambda: with_part(Attention(8, heads=4, dim_head=2), to_v=nn.Identity()), "its to_v is no plain Linear"),
    "quantized": (lambda: with_part(ResnetBlock2D(in_channels=32), conv1=rounded_weights()), "its conv1 is no plain Conv2d"),
    "odd heads": (lambda: with_part(Attention(8, heads=4, dim_head=2), heads=3), "its projections are not 3 heads of one size"),
}  # fmt: skip


class Mixing:
    pass


def fused(layer: Any) -> Any:
    layer.fuse_projections()
    return layer


def with_part(layer: Any, **parts: Any) -> Any:
    for name, part in parts.items():
        setattr(layer, name, part)
    return layer


def rounded_weights() -> nn.Conv2d:
    conv = nn.Conv2d(32, 32, 3)
    conv.weight = nn.Parameter(conv.weight.detach().to(torch.int8), requires_grad=False)
    return conv


@pytest.mark.parametrize("name", ODD)
def test_a_layer_that_cannot_be_cut_exactly_is_named_with_the_reason(name: str) -> None:
    make, says = ODD[name]
    layer = make()
    what = "keep_heads" if isinstance(layer, Attention) else "keep_channels"
    with pytest.raises(ValueError, match=f"^a.b: (heads|channels) cannot be cut here, because {says}"):
        narrowing.narrowed(layer, "a.b", what, (0,))
    assert widths(nn.ModuleList([layer])) == []


def test_several_in_one_block_and_inside_what_goes() -> None:
    """Of one candidate there is one text; a layer that is skipped is still there; what is cut inside a removed layer is not."""
    unet = cutting.shared("sd")
    both = [cut(f"{BLOCK}.attn1", "heads", 0, 2), cut(f"{BLOCK}.ff", "units", *range(0, 64, 5)), *remove(f"{BLOCK}.attn2")]
    one, other = Candidate(cuts=tuple(both)), Candidate(cuts=tuple(reversed([*both, both[0]])))
    assert one == other and one.canonical() == Candidate.model_validate_json(other.canonical()).canonical()
    moved = [keep("up_blocks.1", 0, 2), keep("down_blocks.1", 0)]
    last = BLOCK.replace("attentions.0", "attentions.2")
    with applied(
        unet, [cut(f"{last}.attn1", "heads", 3), *moved], following=[f"{last}.attn1", f"{last}.ff", "mid_block"]
    ) as now:
        there = BLOCK.replace("attentions.0", "attentions.1")
        assert now == {f"{last}.attn1": f"{there}.attn1", f"{last}.ff": f"{there}.ff", "mid_block": "mid_block"}
        with applied(unet, [cut(f"{BLOCK}.attn1", "heads", 0)], following=[f"{there}.ff", f"{there}.attn1"]) as then:
            assert then == {f"{there}.ff": f"{there}.ff", f"{there}.attn1": f"{there}.attn1"}
    inside = [*both, *remove(BLOCK)]
    assert torch.equal(cut_output(unet, inside), cut_output(unet, remove(BLOCK)))
    assert surgery.outermost(inside) == remove(BLOCK)
    with applied(unet, both[:1]):
        narrow = output(unet)
        with absent(unet, (f"{BLOCK}.attn1",)):
            skipped = output(unet)
    assert torch.equal(skipped, cut_output(unet, remove(f"{BLOCK}.attn1"))) and not torch.equal(skipped, narrow)


def test_what_is_left_learns() -> None:
    unet = cutting.KINDS["sd"]()
    with applied(unet, [cut(f"{BLOCK}.ff", "units", 1, 2), cut("mid_block.resnets.1", "channels", *range(8))]):
        unet(**inputs(unet)).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


@pytest.mark.parametrize("hook", ["sequential", "model", "none of weights"])
def test_a_model_that_is_offloaded_is_cut_as_any_other(hook: str, tmp_path: Path) -> None:
    """accelerate sets the forward on the instance, and sequential offload keeps the weights elsewhere: they stay there."""
    unet = cutting.sd()
    cuts = [some(width, 0) for width in widths(unet)]
    wanted, whole, plan = cut_output(unet, cuts), output(unet), export.structure(unet, cuts)
    if hook == "sequential":
        accelerate.cpu_offload(unet, execution_device="cpu")
    elif hook == "model":
        accelerate.cpu_offload_with_hook(unet, execution_device="cpu")
    else:
        for width in widths(unet):
            add_hook_to_module(unet.get_submodule(width.address), ModelHook())
    before = state(unet)[0]
    with applied(unet, cuts):
        assert torch.equal(output(unet), wanted) and torch.equal(output(unet), wanted)
        assert unet.get_submodule(f"{BLOCK}.attn1.to_q").weight.is_meta == (hook == "sequential")
    assert torch.equal(output(unet), whole) and state(unet)[0] == before
    assert export.structure(unet, cuts).sources == plan.sources
