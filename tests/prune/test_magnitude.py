"""The norm of exactly the weights that a cut takes out."""

import copy
import math
import random
from typing import Any

import pytest
import torch
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import magnitude, random_cuts
from lissom.prune._task import Option, Pruned, Space, Task
from lissom.tests.prune import given


def filled(value: float = 1.0) -> Any:
    unet = copy.deepcopy(given.gauge("sd").denoiser)
    with torch.no_grad():
        for p in unet.parameters():
            p.fill_(value)
    return unet


def run(denoiser: Any, spaces: tuple[Space, ...], need: float, norm: str = "rms") -> Pruned:
    task = Task(denoiser, (), spaces, need, given.added, say=lambda line: None)
    return magnitude.prune(task, magnitude.Config.model_validate({"norm": norm}), random.Random(0))


def weights(*modules: Any) -> torch.Tensor:
    return torch.cat([p.flatten() for module in modules for p in module.parameters()]).detach()


RESNET = Cut(address="down_blocks.1.resnets.0", what="remove")  # 8 -> 16 channels: its shortcut stays
EMPTY = Cut(address="down_blocks.1.attentions.0", what="replace", value="empty")  # its input projection stays
PAIRS = (
    Cut(address="down_blocks.1", what="keep_layers", value=(0,)),
    Cut(address="up_blocks.1", what="keep_layers", value=(0, 2)),
)


@pytest.mark.parametrize("norm", ["rms", "l2", "l1"])
def test_the_size_is_that_of_what_goes_and_not_of_what_stays(norm: str) -> None:
    unet = given.gauge("sd").denoiser
    resnet, attention = unet.down_blocks[1].resnets[0], unet.down_blocks[1].attentions[0]
    down, up = unet.down_blocks[1], unet.up_blocks[1]
    gone = {
        (RESNET,): weights(*(m for name, m in resnet.named_children() if name != "conv_shortcut")),
        (EMPTY,): weights(attention.transformer_blocks, attention.proj_out),
        PAIRS: weights(down.resnets[1], down.attentions[1], up.resnets[1], up.attentions[1]),
    }
    options = [Option(cuts, 1.0) for cuts in gone]
    result = run(unet, (Space(tuple((option,) for option in options)),), 1.0, norm)
    for option, lost in zip(options, gone.values(), strict=True):
        expected = {"rms": lost.square().mean().sqrt(), "l2": lost.norm(), "l1": lost.abs().sum()}[norm]
        assert result.scores[option.name] == pytest.approx(float(expected), rel=1e-5)


def test_small_weights_go_first_and_small_layers_need_not() -> None:
    unet = filled()
    with torch.no_grad():
        for p in unet.mid_block.resnets[1].parameters():
            p.mul_(0.8)  # more of them than in the attention, and smaller ones
        for p in unet.down_blocks[0].attentions[0].parameters():
            p.mul_(0.9)
    sites = tuple(
        (Option((cut,), 1.0),)
        for cut in map(removal, ("down_blocks.0.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.0"))
    )
    assert [c.address for c in run(unet, (Space(sites),), 1.0).cuts] == ["mid_block.resnets.1"]
    assert [c.address for c in run(unet, (Space(sites),), 2.0).cuts] == ["mid_block.resnets.1", "down_blocks.0.attentions.0"]
    assert [c.address for c in run(unet, (Space(sites),), 1.0, "l2").cuts] == ["down_blocks.0.attentions.0"]


def test_a_base_weighs_as_much_as_its_weights() -> None:
    """Spaces are compared by all that they take out; one whose base goes beyond the target only where there is no other."""
    unet = filled()
    small, large = Option((removal("mid_block.resnets.1"),), 2.0), Option(PAIRS, 2.0)
    spaces = (Space((), large), Space((), small))
    for norm in ("l1", "l2"):
        assert run(unet, spaces, 2.0, norm).cuts == small.cuts
    with torch.no_grad():
        for p in (*unet.down_blocks[1].parameters(), *unet.up_blocks[1].parameters()):
            p.mul_(0.1)
    assert run(unet, spaces, 2.0).cuts == PAIRS
    beyond = (Space((), Option(PAIRS, 9.0)), Space((), small))
    assert run(unet, beyond, 2.0).cuts == small.cuts
    assert (
        random_cuts.prune(Task(unet, (), beyond, 2.0, given.added), random_cuts.Config(), random.Random(0)).cuts == small.cuts
    )
    assert run(unet, beyond[:1], 2.0).cuts == PAIRS


def test_the_norm_of_equal_weights_is_their_value() -> None:
    result = run(filled(-3.0), (Space(((Option((RESNET,), 1.0),),)),), 1.0)
    assert result.scores == {RESNET.address: pytest.approx(3.0)} and not math.isnan(result.scores[RESNET.address])


def test_a_structure_has_no_norms() -> None:
    job = given.job("config:sd15", "magnitude", keep=0.9)
    with pytest.raises(UserError, match="the weights are not there"):
        magnitude.prune(given.ask(job), magnitude.Config(), random.Random(0))


def removal(address: str) -> Cut:
    return Cut(address=address, what="remove")
