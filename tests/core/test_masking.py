"""Heads, units and channels masked by factors: nothing at one, the cut model at zero, the gradients that the weights imply.

Also what a cut leaves of attentions with two streams, of blocks that compute side by side, and under norms over all heads.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.masking import Masks, masked
from lissom.core.widths import Width, shares, widths
from lissom.tests.core import cutting
from lissom.tests.core.test_surgery import state
from lissom.tests.core.tiny_families import WIDE, arguments, output, wide
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

UNETS = ("sd", "pixels")
KINDS: dict[str, Callable[[], Any]] = {
    **{kind: functools.partial(cutting.shared, kind) for kind in UNETS},
    **{kind: functools.partial(wide, kind) for kind in WIDE},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def of_all(denoiser: Any, value: float, **options: Any) -> dict[str, tuple[str, Tensor]]:
    return {w.address: (w.what, torch.full((w.count,), value, **options)) for w in widths(denoiser)}


def halves(found: list[Width], seed: int, share: float = 0.5) -> tuple[Masks, list[Cut]]:
    """Masks at zero and one, and cuts, of a random share of every width."""
    masks, cuts = {}, []
    for i, width in enumerate(found):
        order = torch.randperm(len(width.groups), generator=torch.Generator().manual_seed(100 * seed + i)).tolist()
        stay = sorted(i for k in order[: max(1, round(share * len(order)))] for i in width.groups[k])
        masks[width.address] = (width.what, torch.zeros(width.count).index_fill(0, torch.tensor(stay), 1.0))
        cuts.append(Cut.model_validate({"address": width.address, "what": width.what, "value": stay}))
    return masks, cuts


def cut_output(denoiser: Any, cuts: list[Cut]) -> Tensor:
    with surgery.applied(denoiser, cuts):
        return output(denoiser)


def masked_output(denoiser: Any, masks: Masks) -> Tensor:
    with masked(denoiser, masks):
        return output(denoiser)


@pytest.mark.parametrize("kind", KINDS)
def test_at_one_nothing_changes(kind: str) -> None:
    """Bit for bit, in a short type too: the streams of SD3 lie apart in memory, and products round by how numbers lie."""
    denoiser = KINDS[kind]()
    before, whole = state(denoiser), output(denoiser)
    assert torch.equal(masked_output(denoiser, of_all(denoiser, 1.0)), whole)
    assert torch.equal(output(denoiser), whole) and state(denoiser) == before
    if kind not in (*UNETS, "sd3", "flux", "sana"):
        return
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_output(denoiser, of_all(denoiser, 1.0)), short := output(denoiser))
    assert not torch.equal(short, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_at_zero_what_is_masked_is_cut(kind: str) -> None:
    """5.5, items 3 and 6: half of everything, all of them at once. In a transformer the same bits."""
    denoiser = KINDS[kind]()
    for seed in range(3):
        masks, cuts = halves(widths(denoiser), seed)
        difference = (masked_output(denoiser, masks) - cut_output(denoiser, cuts)).abs().max()
        assert difference <= (1e-6 if kind in UNETS else 0)
    for share in (0.3, 0.0):  # odd numbers, which products add up in another order; one of each
        masks, cuts = halves(widths(denoiser), 9, share)
        difference = (masked_output(denoiser, masks) - cut_output(denoiser, cuts)).abs().max()
        assert difference <= 1e-6 * output(denoiser).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_at_zero_the_biases_are_left(kind: str) -> None:
    """5.5, item 4: never the input, never nothing, and no modulation.

    Each layer alone, and all of them: masked, cut, and what the weights say.
    """
    denoiser = KINDS[kind]()
    off = {a: (what, factors) for a, (what, factors) in of_all(denoiser, 0.0).items() if what != "keep_channels"}
    cuts = {a: Cut.model_validate({"address": a, "what": what, "value": ()}) for a, (what, _) in off.items()}
    for address, cut in cuts.items():
        with biases_alone(denoiser, address) as left:
            wanted = output(denoiser)
        assert left and not torch.equal(wanted, output(denoiser))
        assert torch.equal(cut_output(denoiser, [cut]), wanted), address
        assert torch.equal(masked_output(denoiser, {address: off[address]}), wanted), address
    assert torch.equal(masked_output(denoiser, off), cut_output(denoiser, list(cuts.values())))


@contextmanager
def biases_alone(denoiser: Any, address: str) -> Iterator[list[str]]:
    """Inside, what sums over the heads or units of a layer has weights of zero for them, and what makes modulations is zero.

    Without the code that masks.
    """
    (count,) = (w.count for w in widths(denoiser) if w.address == address)
    what = next(w.what for w in widths(denoiser) if w.address == address)
    before, left = [], []
    for name, (_, columns) in shares(denoiser, address, what, range(count)).items():
        if what == "keep_modulation":
            before += [(p, p.detach().clone()) for p in denoiser.get_submodule(name).parameters()]
            for p in denoiser.get_submodule(name).parameters():
                p.data.zero_()
            left.append(name)
        elif columns:
            weight = denoiser.get_submodule(name).weight
            before.append((weight, weight.detach().clone()))
            left.append(name)
            for start, stop in columns:
                weight.data[:, start:stop] = 0
    try:
        yield left
    finally:
        for weight, values in before:
            weight.data.copy_(values)


def test_what_reads_a_width_is_told_of_it() -> None:
    """5.5, item 6: processors split by `heads`; the tanh of activations, biases and norms of single heads stay as they are."""
    whole = dict(wide("sd3").transformer_blocks[0].named_modules())
    stay = {"attn": (1, 2, 3), "attn2": (0,)}
    cuts = [cut_of(f"transformer_blocks.0.{name}", "keep_heads", *heads) for name, heads in stay.items()]
    with surgery.applied(wide("sd3"), [*cuts, cut_of("transformer_blocks.0.ff", "keep_units", 7)]):
        block = wide("sd3").transformer_blocks[0]
        for name, heads in stay.items():
            attn, before, n = getattr(block, name), whole[name], len(heads)
            assert (attn.heads, attn.sliceable_head_dim, attn.inner_dim, attn.inner_kv_dim) == (n, n, 8 * n, 8 * n)
            assert all(
                getattr(attn, a) == getattr(before, a)
                for a in ("query_dim", "out_dim", "added_kv_proj_dim", "scale", "is_cross_attention")
            )
            assert attn.norm_q is before.norm_q and attn.to_out[0].bias is before.to_out[0].bias
        assert block.attn.to_add_out.in_features == block.attn.add_v_proj.out_features == 24
        assert (
            block.attn.to_add_out.bias is whole["attn.to_add_out"].bias
            and block.attn.norm_added_k is whole["attn.norm_added_k"]
        )
        one = block.ff.net[0]
        assert (one.approximate, one.proj.out_features, block.ff.net[2].in_features) == ("tanh", 1, 1)
        assert torch.equal(one.proj.bias, whole["ff.net.0.proj"].bias[7:8]) and block.ff.net[2].bias is whole["ff.net.2"].bias
    with surgery.applied(wide("wan"), [cut_of("blocks.0.attn1", "keep_heads", 0, 2)]):
        attn = wide("wan").blocks[0].attn1
        assert (attn.heads, attn.inner_dim, attn.kv_inner_dim, attn.to_v.out_features, attn.to_q.out_features) == (
            2,
            16,
            16,
            16,
            32,
        )


def cut_of(address: str, what: str, *stay: int) -> Cut:
    return Cut.model_validate({"address": address, "what": what, "value": stay})


def test_the_output_of_a_single_block_reads_heads_then_units() -> None:
    """5.5, item 6: the columns of Flux's proj_out, whichever of the two goes, with what several devices share told of it."""
    flux, single = wide("flux"), "single_transformer_blocks.0"
    whole = flux.get_submodule(f"{single}.proj_out").weight
    heads, units = cut_of(f"{single}.attn", "keep_heads", 1, 3), cut_of(f"{single}.proj_mlp", "keep_units", 0, 127)
    of_heads, of_units = [*range(8, 16), *range(24, 32)], [32, 32 + 127]
    for cuts, columns in {
        (heads,): [*of_heads, *range(32, 160)], (units,): [*range(32), *of_units], (heads, units): of_heads + of_units,
        (heads, cut_of(units.address, units.what)): of_heads, (units, cut_of(heads.address, heads.what)): of_units,
    }.items():  # fmt: skip
        for order in (cuts, cuts[::-1]):
            with surgery.applied(flux, order):
                block = flux.get_submodule(single)
                assert torch.equal(block.proj_out.weight, whole[:, columns])
                read = sum(c < 32 for c in columns)
                assert block.mlp_hidden_dim == len(columns) - read
                assert block.proj_out._tp_packed_row_blocks == [read, len(columns) - read]
                assert getattr(block.attn, "heads", 0) == read // 8 and block.act_mlp.approximate == "tanh"
    block = flux.get_submodule(single)
    assert (block.mlp_hidden_dim, block.proj_out._tp_packed_row_blocks, block.attn.heads) == (128, [32, 128], 4)


def test_a_norm_over_all_heads_goes_on_looking_at_them() -> None:
    """5.5, item 7: cut like other attentions it is another model; queries and keys stay whole, and it is the masked one."""
    torch.manual_seed(0)
    attn = WanAttention(8, heads=4, dim_head=4, added_kv_proj_dim=8, cross_attention_dim_head=4, processor=WanAttnProcessor())
    for p in attn.parameters():
        nn.init.normal_(p, std=0.5)
    parent, x, text = nn.ModuleDict({"attn": attn}), torch.randn(2, 5, 8), torch.randn(2, 512 + 3, 8)
    masks, cuts = halves(widths(parent), 0)
    with masked(parent, masks):
        wanted = attn(x, text)
    with surgery.applied(parent, cuts):
        narrow: Any = parent["attn"]
        torch.testing.assert_close(narrow(x, text), wanted, rtol=0, atol=1e-6)
        kept = [narrow.to_q, narrow.to_k, narrow.add_k_proj, narrow.norm_q.weight, narrow.norm_added_k.weight]
        assert kept == [attn.to_q, attn.to_k, attn.add_k_proj, attn.norm_q.weight, attn.norm_added_k.weight]
        assert narrow.add_v_proj.out_features == narrow.to_v.out_features == narrow.to_out[0].in_features == 8
    naive = copy.deepcopy(attn)
    stay = [i for head in cuts[0].value or () for i in range(4 * int(head), 4 * int(head) + 4)]
    for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "norm_q", "norm_k", "norm_added_k"):
        for p in getattr(naive, name).parameters():
            p.data = p.data[stay]
    naive.to_out[0].weight.data, naive.heads = naive.to_out[0].weight.data[:, stay], 2
    for norm in (naive.norm_q, naive.norm_k, naive.norm_added_k):
        norm.normalized_shape = (8,)
    assert (naive(x, text) - wanted).abs().max() > 1e-2
    assert torch.equal(attn(x, text), masked_with_ones(parent, x, text))


def masked_with_ones(parent: Any, *args: Tensor) -> Tensor:
    with masked(parent, of_all(parent, 1.0)):
        out: Tensor = parent["attn"](*args)
    return out


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "sana-1.5"])
def test_factors_learn_what_the_weights_imply(kind: str) -> None:
    """At one, dL/df of a head is the sum of w dL/dw over the columns that read it: of both streams of a joint attention.

    Of a modulation channel, which nothing sums over, the sum over the row that makes it.
    """
    denoiser = KINDS[kind]()
    masks = of_all(denoiser, 1.0, requires_grad=True)
    with masked(denoiser, masks):
        denoiser(**arguments(denoiser), return_dict=False)[0].square().mean().backward()
    for width in widths(denoiser):
        wanted = torch.zeros(width.count)
        for k in range(width.count):
            for name, (_, columns) in shares(denoiser, width.address, width.what, [k]).items():
                weight: Any = denoiser.get_submodule(name).weight
                if width.what == "keep_modulation":
                    made = denoiser.get_submodule(name).parameters()
                    wanted[k] = torch.stack([(p.detach()[k] * p.grad[k]).sum() for p in made]).sum()
                for start, stop in columns:
                    wanted[k] += (weight.detach() * weight.grad)[:, start:stop].sum()
        found = masks[width.address][1].grad
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6 + 1e-4 * float(wanted.abs().max()))
    denoiser.zero_grad(set_to_none=True)


def test_heads_cost_no_memory_and_units_one_tensor_a_layer() -> None:
    """With frozen weights: an attention keeps its output anyway; a feed-forward that of its activation besides."""
    dit = WIDE["dit"]().requires_grad_(False)
    alive = {p.untyped_storage().data_ptr() for p in dit.parameters()}

    def kept(masks: Masks) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage()).data_ptr() not in alive:
                found[place.data_ptr()] = place.nbytes()
                held.append(tensor)  # so that no address is used twice
            return tensor

        held: list[Tensor] = []
        given = arguments(dit)
        given["hidden_states"] = given["hidden_states"].requires_grad_()
        with saved_tensors_hooks(pack, lambda tensor: tensor), masked(dit, masks):
            dit(**given)
        return sum(found.values())

    none, masks = kept({}), of_all(dit, 1.0, requires_grad=True)
    heads = {a: mask for a, mask in masks.items() if mask[0] == "keep_heads"}
    units = {a: mask for a, mask in masks.items() if mask[0] == "keep_units"}
    batch, tokens, count, size = 2, 16, 128, 4
    assert kept(heads) - none == len(heads) * 4 * size
    assert kept(units) - none == len(units) * (batch * tokens + 1) * count * size


def test_factors_belong_to_names_not_to_calls() -> None:
    """Checkpoints run blocks again, backwards; a processor that is set later reads the same modules."""
    unet = cutting.sd()
    masks, _ = halves(widths(unet), 0)
    masks = {a: (what, (0.25 + 0.5 * factors).requires_grad_()) for a, (what, factors) in masks.items()}

    def gradients() -> tuple[Tensor, list[Tensor]]:
        out = unet(**arguments(unet)).sample
        return out.detach(), list(torch.autograd.grad(out.square().mean(), [factors for _, factors in masks.values()]))

    with masked(unet, masks):
        out, plain = gradients()
        unet.enable_gradient_checkpointing()
        again, checkpointed = gradients()
        unet.disable_gradient_checkpointing()
        assert torch.equal(out, again) and all(map(torch.equal, plain, checkpointed))
        unet.set_attn_processor(AttnProcessor())
        other, _ = gradients()
    assert not torch.equal(out, output(unet))
    torch.testing.assert_close(other, out, rtol=0, atol=1e-6)


def test_a_mask_may_be_exchanged_between_calls_and_goes_when_something_fails() -> None:
    dit = wide("dit")
    whole, masks = output(dit), of_all(dit, 1.0)
    with pytest.raises(RuntimeError, match="stop"), masked(dit, masks):
        assert torch.equal(output(dit), whole)
        for _, factors in masks.values():
            factors.mul_(0.5)
        assert not torch.equal(output(dit), whole)
        raise RuntimeError("stop")
    assert torch.equal(output(dit), whole)


@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu", "swiglu", "linear-silu"])
def test_units_are_masked_behind_their_activation(activation: str) -> None:
    torch.manual_seed(0)
    parent = nn.ModuleDict({"ff": FeedForward(6, inner_dim=10, activation_fn=activation)})
    x, factors, ff = torch.randn(3, 6), torch.rand(10), parent["ff"]
    with masked(parent, {"ff": ("keep_units", factors)}):
        found = ff(x)
    torch.testing.assert_close(found, ff.net[2](ff.net[0](x) * factors))


def test_what_cannot_be_masked_is_refused_before_anything_is() -> None:
    parent = nn.ModuleDict({"ff": FeedForward(6, inner_dim=10), "shares": Attention(8, heads=4, kv_heads=2, dim_head=2)})
    good = {"ff": ("keep_units", torch.zeros(10))}
    cases = {
        r"^ff: has 10 units and was given \(9,\) factors$": {"ff": ("keep_units", torch.ones(9))},
        "^shares: heads cannot be masked here, because its heads share keys": {"shares": ("keep_heads", torch.ones(4))},
        "^ff: heads cannot be masked here, because a FeedForward has no heads": {"ff": ("keep_heads", torch.ones(4))},
    }
    for says, masks in cases.items():
        with pytest.raises(ValueError, match=says), masked(parent, good | masks):
            raise AssertionError
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in parent.modules())
    parent["ff"].compile(backend="eager")
    with pytest.raises(UserError, match="compiled already"), masked(parent, good):
        raise AssertionError


def test_what_is_compiled_inside_has_the_masks_in_it() -> None:
    torch._dynamo.reset()
    parent = nn.ModuleDict({"ff": FeedForward(6, inner_dim=10)})
    x, factors = torch.randn(3, 6), torch.rand(10)
    with masked(parent, {"ff": ("keep_units", factors)}):
        compiled: Any = torch.compile(parent["ff"], backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), parent["ff"](x))
    torch._dynamo.reset()
