"""Local structures of depth blocks, the baselines that keep N of M of them, and the gates that are learned."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.recipe import settings
from lissom.prune import _depth, hand_map, median_loss, min_loss, sensitivity, shortgpt
from lissom.prune._depth import Group, Structured
from lissom.prune._depth_gates import Gates, decoded, staying
from lissom.prune._learning import updated
from lissom.prune._task import Option, Space, Task
from lissom.tests.core import tiny
from lissom.tests.prune.given import DENOISERS

RNG = random.Random(0)


class Block:
    """What a method reads of a layer."""

    def __init__(self, address: str) -> None:
        self.address = address


def task(count: int = 12, need: float = 0.0, losses: Any = None, lists: tuple[str, ...] = ("transformer_blocks",)) -> Task:
    """Blocks that cost 1 each."""
    addresses = [f"{name}.{i}" for name in lists for i in range(count)]
    sites = tuple((Option((Cut(address=a, what="remove"),), 1.0),) for a in addresses)
    blocks: Any = tuple(map(Block, addresses))
    return Task(torch.nn.Linear(1, 1), blocks, (Space(sites),), need, losses or (lambda options: [0.0] * len(options)))


def gone(pruned: Any) -> list[int]:
    return sorted(int(cut.address.rpartition(".")[2]) for cut in pruned.cuts)


def sizes(found: list[Group]) -> list[tuple[int, int]]:
    return [(group.stay, len(group.blocks)) for group in found]


@pytest.mark.parametrize(
    ("structure", "want"),
    [
        ("1:2", [(1, 2)] * 6),
        ("2:4", [(2, 4)] * 3),
        ("6:12", [(6, 12)]),
        (["3:4", "2:4", "4:4"], [(3, 4), (2, 4), (4, 4)]),
        (["0:3", "3:9"], [(0, 3), (3, 9)]),
    ],
)
def test_structures_divide_the_blocks(structure: Any, want: list[tuple[int, int]]) -> None:
    found = _depth.groups(task(), Structured(structure=structure), "m")
    assert sizes(found) == want
    assert [block for group in found for block in group.blocks] == [f"transformer_blocks.{i}" for i in range(12)]


def test_groups_never_span_two_lists() -> None:
    found = _depth.groups(task(6, lists=("transformer_blocks", "single_transformer_blocks")), Structured(structure="1:3"), "m")
    assert all(len({block.rpartition(".")[0] for block in group.blocks}) == 1 for group in found) and len(found) == 4
    with pytest.raises(UserError, match=r"structure 2:4: does not divide the 12 blocks \(6 \+ 6\)"):
        _depth.groups(task(6, lists=("transformer_blocks", "single_transformer_blocks")), Structured(structure="2:4"), "m")


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        ("1:5", "does not divide the 12 blocks"),
        (["1:4", "1:4"], "does not divide the 12 blocks"),
        (["1:6", "1:6", "1:6"], "speaks of more than the 12 blocks"),
    ],
)
def test_structures_that_do_not_divide_the_blocks(structure: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _depth.groups(task(), Structured(structure=structure), "m")


def test_too_many_ways_are_refused() -> None:
    with pytest.raises(UserError, match="there are 2,704,156 ways to keep 12 of 24 blocks"):
        _depth.groups(task(24), Structured(structure="12:24"), "m")


@pytest.mark.parametrize("text", ["3:2", "1-2", "x", "1:0"])
def test_a_pattern_is_n_of_m(text: str) -> None:
    with pytest.raises(UserError, match="write N:M"):
        settings("prune", "tinyfusion", {"structure": text})


def test_yaml_reads_a_pattern_as_a_time_of_day() -> None:
    assert settings("prune", "hand_map", {"structure": 434}).structure == "7:14"
    assert settings("prune", "hand_map", {"structure": [62, "2:4"]}).structure == ["1:2", "2:4"]


@pytest.mark.parametrize("need", [0.5, 1, 3, 5.5, 6, 11])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 12])
def test_a_target_is_met_with_as_few_blocks_less_as_it_takes(need: float, size: int) -> None:
    found = _depth.groups(task(need=need), Structured(group=size), "m")
    fewer = [len(group.blocks) - group.stay for group in found]
    assert sum(fewer) == math.ceil(need) and max(fewer) - min(fewer) <= 1 or 12 % size
    assert all(len(group.blocks) <= size for group in found)


def test_a_target_that_takes_every_block_is_refused() -> None:
    with pytest.raises(UserError, match="the target takes all 12 blocks"):
        _depth.groups(task(need=12), Structured(), "m")


def test_the_blocks_of_a_unet_are_one_sequence_in_the_order_in_which_they_run() -> None:
    addresses = [
        f"{where}.attentions.0.transformer_blocks.{i}"
        for where in ("up_blocks.0", "down_blocks.1", "mid_block")
        for i in (0, 1)
    ]
    (found,) = _depth.sequences(addresses)
    assert [a.partition(".")[0] for a in found] == ["down_blocks"] * 2 + ["mid_block"] * 2 + ["up_blocks"] * 2


def test_the_hand_made_map_is_that_of_the_paper() -> None:
    """0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27 stay of DiT-XL's 28 blocks."""
    found = hand_map.prune(task(28), hand_map.Config(structure="1:2"), RNG)
    stay = sorted(set(range(28)) - set(gone(found)))
    assert stay == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]


def losing(weights: dict[int, float]) -> Any:
    """Losses that add up over blocks."""

    def losses(options: Any) -> list[float]:
        return [sum(weights.get(int(cut.address.rpartition(".")[2]), 0.0) for cut in cuts) for cuts in options]

    return losses


def test_sensitivity_takes_what_loses_least_wherever_it_is() -> None:
    found = sensitivity.prune(task(6, need=3, losses=losing({0: 9, 1: 1, 2: 2, 3: 0.5, 4: 7, 5: 8})), sensitivity.Config(), RNG)
    assert gone(found) == [1, 2, 3] and found.scores["transformer_blocks.3"] == 0.5


def test_least_and_median_loss_of_all_structures() -> None:
    made = task(4, losses=losing({0: 1, 1: 2, 2: 4, 3: 8}))
    assert gone(min_loss.prune(made, min_loss.Config(structure="1:2"), RNG)) == [0, 2]
    assert gone(median_loss.prune(made, median_loss.Config(structure="1:2"), RNG)) == [1, 2]  # losses 5, 6, 9, 10
    assert len(list(_depth.distinct(_depth.groups(made, Structured(structure="1:2"), "m"), 99, RNG))) == 4


def test_random_structures_differ_and_keep_n_of_m() -> None:
    found = _depth.groups(task(), Structured(structure="2:4"), "m")
    drawn = list(_depth.distinct(found, 50, random.Random(1)))
    assert len(set(drawn)) == 50
    for one in drawn:
        left = Counter(int(a.rpartition(".")[2]) // 4 for a in one)
        assert left == {0: 2, 1: 2, 2: 2}


def test_structures_that_break_the_output_are_left_out() -> None:
    made = task(4, losses=lambda options: [math.inf if i % 2 else float(i) for i in range(len(options))])
    assert min_loss.prune(made, min_loss.Config(structure="1:2"), RNG).predicted == 0.0
    with pytest.raises(UserError, match="all 4 structures make the output infinite"):
        min_loss.prune(task(4, losses=lambda options: [math.nan] * len(options)), min_loss.Config(structure="1:2"), RNG)


def inputs(name: str, samples: int) -> Any:
    from lissom.workflow._gauge import Gauge

    denoiser = DENOISERS[name]()
    gauge = Gauge(denoiser, latent=(4, tiny.SIDE, tiny.SIDE) if name.startswith("sd3") else None)
    torch.manual_seed(1)
    return (
        denoiser,
        gauge.example(samples, "cpu", torch.float32),
        [layer.address for layer in gauge.known if layer.kind == "transformer_block"],
    )


SHAPES = ["dit, trained", "sd3", "sd3, dual attention", "flux", "xl"]


@pytest.mark.parametrize("name", SHAPES)
def test_masked_blocks_compute_what_cut_ones_do(name: str) -> None:
    """A mask of one is the whole model bit for bit, a mask of zero the model without the block; each sample has its own."""
    denoiser, kwargs, addresses = inputs(name, 2)
    (sequence, *_) = _depth.sequences(addresses)
    group = Group(tuple(sequence), len(sequence) - 1)
    gates = Gates([group], "cpu")
    cut = Cut(address=sequence[-1], what="remove")
    with torch.no_grad():
        whole = denoiser(**kwargs, return_dict=False)[0]
        with surgery.applied(denoiser, [cut]):
            without = denoiser(**kwargs, return_dict=False)[0]
        with gates.on(denoiser):
            gates.masks = {address: torch.ones(2) for address in sequence}
            assert torch.equal(denoiser(**kwargs, return_dict=False)[0], whole)
            gates.masks = {**gates.masks, sequence[-1]: torch.tensor([0.0, 1.0])}
            mixed = denoiser(**kwargs, return_dict=False)[0]
        assert torch.equal(denoiser(**kwargs, return_dict=False)[0], whole)  # the hooks are gone
    assert torch.allclose(mixed[0], without[0], atol=1e-6) and torch.allclose(mixed[1], whole[1], atol=1e-6)
    assert not torch.allclose(without, whole, atol=1e-4)


@pytest.mark.parametrize("temperature", [4.0, 0.1])
def test_every_sample_keeps_exactly_n_of_every_group(temperature: float) -> None:
    groups = _depth.groups(task(), Structured(structure=["2:4", "3:4", "1:4"]), "m")
    gates = Gates(groups, "cpu")
    gates.draw(200, 100.0, temperature, torch.Generator().manual_seed(0))
    for group in groups:
        masks = torch.stack([gates.masks[block] for block in group.blocks], 1)
        assert set(masks.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
        assert torch.allclose(masks.sum(1), torch.full((200,), float(group.stay)), atol=1e-5)
        assert len({tuple(row) for row in masks.round().int().tolist()}) == len(group.ways)  # drawn per sample
    ((gates.masks["transformer_blocks.0"] * torch.arange(200)).sum()).backward()
    assert gates.logits[0].grad is not None and gates.logits[0].grad.abs().sum() > 0 and gates.logits[1].grad is None


def test_draws_follow_the_probabilities_and_without_noise_the_likeliest_is_taken() -> None:
    group = Group(("a", "b", "c"), 1)
    gates = Gates([group], "cpu")
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.0, 0.01, 0.02]))
    gates.draw(20_000, 100.0, 1.0, torch.Generator().manual_seed(0))
    seen = torch.stack([gates.masks[b] for b in "abc"]).mean(1)
    assert torch.allclose(seen, gates.probabilities(100.0)[0], atol=0.02)
    gates.draw(5, 100.0, 0.01, None)
    assert [gates.masks[b].tolist() for b in "abc"] == [[0.0] * 5, [0.0] * 5, [1.0] * 5]
    assert decoded([group], gates.probabilities(100.0)) == (("a", "b"), [pytest.approx(0.665, abs=1e-3)])


def test_the_chance_to_stay_adds_up_to_n() -> None:
    groups = [Group(("a", "b", "c", "d"), 2), Group(("e", "f"), 1)]
    chances = staying(groups, [torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]), torch.tensor([0.25, 0.75])])
    assert chances["a"] == pytest.approx(0.7) and sum(chances[b] for b in "abcd") == pytest.approx(2.0)
    assert chances["e"] == 0.25


@pytest.mark.parametrize("how", ["lora", "full", "none"])
def test_the_update_is_thrown_away(how: str) -> None:
    denoiser, kwargs, _ = inputs("dit, trained", 2)
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    with torch.no_grad():
        whole = denoiser(**kwargs, return_dict=False)[0]
    with updated(denoiser, how, 2) as weights:
        with torch.no_grad():
            assert torch.equal(denoiser(**kwargs, return_dict=False)[0], whole)  # B of LoRA starts at zero
        if how == "none":
            assert not weights
        else:
            with torch.enable_grad():
                denoiser(**kwargs, return_dict=False)[0].square().mean().backward()
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())
            with torch.no_grad():
                for p in weights.values():
                    p.add_(0.1)
                assert not torch.allclose(denoiser(**kwargs, return_dict=False)[0], whole)
            learned = sum(p.numel() for p in weights.values())
            assert (learned < 0.6 * sum(p.numel() for p in before.values())) == (how == "lora")
    after = dict(denoiser.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert all(p.grad is None for p in after.values())


def test_shortgpt_takes_the_blocks_that_turn_the_hidden_state_least() -> None:
    denoiser, kwargs, addresses = inputs("dit, trained", 2)
    with torch.no_grad():
        for parameter in denoiser.transformer_blocks[2].parameters():
            parameter.zero_()  # adds nothing
    made = task(4, need=1)
    blocks: Any = tuple(map(Block, addresses))
    run = lambda: denoiser(**kwargs)
    found = shortgpt.prune(Task(denoiser, blocks, made.spaces, 1.0, made.losses, run=run), shortgpt.Config(), RNG)
    assert gone(found) == [2] and found.scores["transformer_blocks.2"] == pytest.approx(0.0, abs=1e-6)
    assert all(0 < found.scores[f"transformer_blocks.{i}"] < 2 for i in (0, 1, 3))


@pytest.mark.parametrize("name", ["sd3", "flux", "xl"])
def test_shortgpt_looks_at_the_picture_of_every_kind_of_block(name: str) -> None:
    denoiser, kwargs, addresses = inputs(name, 1)
    made: Any = task()
    blocks: Any = tuple(map(Block, addresses))
    found = shortgpt.influences(Task(denoiser, blocks, made.spaces, 1.0, made.losses, run=lambda: denoiser(**kwargs)))
    assert found.keys() == set(addresses) and all(0 < value < 2 for value in found.values())
