"""Gates on depth blocks: off is the identity, N of M whatever is drawn, and what is decoded is what was masked."""

import math
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.driving.checkpoint import recomputed
from lissom.core.saved_bytes import saved
from lissom.prune import _depth
from lissom.prune._depth import Group, Structured
from lissom.prune._depth_gates import Gates, decoded, staying
from lissom.tests.prune.test_depth import SHAPES, inputs, task
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_that_is_off_hands_on_what_it_was_given(name: str) -> None:
    """5.5, item 4: bit for bit, of both streams where there are two, whatever it computes; on, what it computes."""
    denoiser, kwargs, addresses = inputs(name, 2)
    groups = [Group(tuple(run), len(run) - 1) for run in _depth.sequences(addresses)]
    gates = Gates(groups, "cpu")
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def look(address: str) -> Any:
        def hook(block: Any, args: Any, given: Any, output: Any) -> None:
            streams = ("hidden_states", "encoder_hidden_states")
            found = [x for x in (*args, *(given[name] for name in streams if name in given)) if isinstance(x, Tensor)]
            seen[address] = found, tensors(output)

        return hook

    off = addresses[1::2]
    gates.masks = {address: torch.zeros(2) if address in off else torch.ones(2) for address in addresses}
    with torch.no_grad(), gates.on(denoiser):
        hooks = [denoiser.get_submodule(a).register_forward_hook(look(a), with_kwargs=True) for a in addresses]
        denoiser(**kwargs)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == set(addresses) and off
    for address, (given, made) in seen.items():
        same = [any(torch.equal(out, x) for x in given) for out in made]
        assert made and all(same) == (address in off), address


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_decoded_is_what_the_likeliest_masks_compute(name: str) -> None:
    """5.5, item 9: cut by `decoded`, the model is the one that ran under the one-hot choices, forced or drawn without noise."""
    denoiser, kwargs, addresses = inputs(name, 2)
    run = max(_depth.sequences(addresses), key=len)
    groups = [Group(tuple(run[:2]), 1), Group(tuple(run[2:]), len(run) - 2 - (len(run) > 3))]
    gates = Gates(groups, "cpu")
    for seed in range(3):
        with torch.no_grad():
            for logits in gates.logits:
                logits.copy_(0.02 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
        chances = gates.probabilities(100.0)
        gone, sure = decoded(groups, chances)
        assert len(gone) == sum(len(g.blocks) - g.stay for g in groups) and all(0 < p <= 1 for p in sure)
        forced: dict[str, Tensor] = {}
        for group, p in zip(groups, chances, strict=True):
            row = torch.zeros(len(group.blocks)).index_fill(0, torch.tensor(group.ways[int(p.argmax())]), 1.0)
            forced |= {block: row[i].expand(2) for i, block in enumerate(group.blocks)}
        with torch.no_grad(), gates.on(denoiser):
            gates.masks = forced
            masked = denoiser(**kwargs, return_dict=False)[0]
            gates.draw(2, 100.0, 0.7, None)
            assert torch.equal(denoiser(**kwargs, return_dict=False)[0], masked)
        with torch.no_grad(), surgery.applied(denoiser, [Cut(address=a, what="remove") for a in gone]):
            assert torch.equal(denoiser(**kwargs, return_dict=False)[0], masked)


@pytest.mark.parametrize("structure", ["1:2", "2:4", "6:12", ["3:4", "1:4", "0:2", "2:2"]], ids=str)
@pytest.mark.parametrize("temperature", [4.0, 0.1, 1e-4])
def test_exactly_n_of_m_of_every_group_for_every_sample(structure: Any, temperature: float) -> None:
    """5.5, item 9: whole numbers, not nearly; every sample draws for itself; in groups of all and of none too."""
    groups = _depth.groups(task(), Structured(structure=structure), "m")
    gates = Gates(groups, "cpu")
    with torch.no_grad():
        for logits in gates.logits:
            logits.copy_(0.01 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)))
    for seed in range(5):
        gates.draw(64, 100.0, temperature, torch.Generator().manual_seed(seed))
        assert len(gates.masks) == 12
        for group in groups:
            rows = torch.stack([gates.masks[block] for block in group.blocks], 1).detach()
            assert bool(((rows == 0) | (rows == 1)).all()) and torch.equal(rows.sum(1), torch.full((64,), float(group.stay)))
            assert (len({tuple(row) for row in rows.tolist()}) > 1) == (len(group.ways) > 1)


def test_as_the_temperature_falls_a_draw_becomes_the_likeliest_choice_of_noisy_logits() -> None:
    """5.5, item 9: tau to 0 is the argmax, forward for any tau, and of the softened choice at the end; the gradient runs dry.

    Nothing overflows with logits times 100 at a ten thousandth.
    """
    group = Group(("a", "b", "c", "d"), 2)
    gates, count = Gates([group], "cpu"), 500
    with torch.no_grad():
        gates.logits[0].copy_(torch.linspace(0, 0.02, 6))
    u = torch.rand(count, 6, generator=torch.Generator().manual_seed(7)).clamp(1e-20, 1 - 1e-7)
    noisy = 100 * gates.logits[0].detach() - torch.log(-torch.log(u))
    ways = torch.zeros(6, 4)
    for row, way in zip(ways, group.ways, strict=True):
        row[list(way)] = 1
    gradients = []
    for temperature in (4.0, 1.0, 0.1, 1e-4):
        gates.draw(count, 100.0, temperature, torch.Generator().manual_seed(7))
        masks = torch.stack([gates.masks[block] for block in "abcd"], 1)
        assert torch.equal(masks.detach(), ways[noisy.argmax(1)])
        gates.logits[0].grad = None
        (masks * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum().backward()
        grad = gates.logits[0].grad
        assert grad is not None and bool(grad.isfinite().all())
        soft = ((noisy / temperature).softmax(1) @ ways).sub(masks.detach()).abs().max(1).values
        gradients.append((float(grad.abs().max()), float(soft.median())))
    assert gradients[-1][1] < 1e-6 and sorted(gradients, key=lambda pair: -pair[1]) == gradients
    assert gradients[-1][0] < gradients[1][0]
    gates.draw(3, 100.0, 1e-4, None)
    assert torch.equal(torch.stack([gates.masks[b] for b in "abcd"], 1).detach(), ways[5:].expand(3, -1))
    gone, _ = decoded([group], gates.probabilities(100.0))
    assert gone == group.without(group.ways[5])


def test_straight_through_the_gradient_is_that_of_the_soft_choice() -> None:
    """Against autograd through the softmax, written apart: forward one-hot, backward soft; a block that is off learns too."""
    group, weights = Group(("a", "b", "c"), 1), torch.tensor([1.0, -2.0, 0.5])
    gates = Gates([group], "cpu")
    gates.draw(4, 100.0, 0.7, torch.Generator().manual_seed(1))
    (torch.stack([gates.masks[b] for b in "abc"], 1) * weights).sum().backward()
    logits = torch.full((3,), 0.02, requires_grad=True)
    u = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    (((100 * logits - torch.log(-torch.log(u))) / 0.7).softmax(1) * weights).sum().backward()
    found, wanted = gates.logits[0].grad, logits.grad
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted)
    assert bool(found.any())


def test_the_likeliest_choice_may_be_without_the_likeliest_block() -> None:
    """What stays is a choice of all blocks together: no block's own chance decides."""
    group = Group(("a", "b", "c"), 2)  # ab, ac, bc
    chances = [torch.tensor([0.34, 0.33, 0.33])]
    assert decoded([group], chances) == (("c",), [pytest.approx(0.34)])
    assert staying([group], chances) == {"a": pytest.approx(0.67), "b": pytest.approx(0.67), "c": pytest.approx(0.66)}
    assert math.isclose(sum(staying([group], chances).values()), 2.0, abs_tol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_that_are_computed_again_find_their_masks(name: str) -> None:
    """The same answer and the same gradient of the gates, bit for bit, for fewer bytes that are kept."""
    denoiser, kwargs, addresses = inputs(name, 2)
    denoiser.requires_grad_(False)
    found: dict[bool, tuple[Tensor, list[Tensor], int]] = {}
    for again in (False, True):
        gates = Gates([Group(tuple(run), len(run) - 1) for run in _depth.sequences(addresses)], "cpu")
        gates.draw(2, 100.0, 1.0, torch.Generator().manual_seed(0))
        with gates.on(denoiser), recomputed(denoiser, again), saved(denoiser.parameters()) as bytes_kept:
            answer = denoiser(**kwargs, return_dict=False)[0]
            kept = bytes_kept.held
            answer.square().sum().backward()
        found[again] = answer.detach(), [g.grad for g in gates.logits if g.grad is not None], kept
    (one, whole, all_kept), (other, parts, few_kept) = found[False], found[True]
    assert torch.equal(one, other) and few_kept < all_kept and whole and any(bool(g.any()) for g in whole)
    assert len(whole) == len(parts) and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_sample_has_the_same_mask_whatever_is_computed_with_it() -> None:
    gates = Gates([Group(("a", "b", "c"), 1), Group(("d", "e"), 1)], "cpu")
    gates.draw(6, 100.0, 1.0, torch.Generator().manual_seed(0))
    whole = gates.masks
    for few in (range(2), range(2, 5), range(5, 6)):
        gates.draw(6, 100.0, 1.0, torch.Generator().manual_seed(0), few)
        assert all(torch.equal(mask, whole[a][few.start : few.stop]) for a, mask in gates.masks.items())
