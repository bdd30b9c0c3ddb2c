"""The output loss against the plain way, and how much of the work is saved."""

import functools
from typing import Any

import pytest
import torch
from lissom.core import anatomy, blueprints, calibration, surgery
from lissom.core.calibration import Inputs
from lissom.core.candidate import Cut
from lissom.core.driving.steering import denoisers
from lissom.core.output_loss import OutputLoss
from lissom.core.widths import widths
from lissom.tests.core import tiny
from lissom.tests.core.test_calibration import sampler
from torch.utils.flop_counter import FlopCounterMode


def single(denoiser: Any) -> list[list[Cut]]:
    return [[Cut(address=layer.address, what="remove")] for layer in anatomy.layers(denoiser)]


@functools.cache
def recorded(family: str) -> list[Inputs]:
    return calibration.record(sampler(family), count=3, times=2, seed=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_to_the_plain_way_bit_for_bit(family: str) -> None:
    pipe = tiny.shared(family)
    denoiser, calls = tiny.denoiser(pipe), recorded(family)
    options = single(denoiser)
    options.append(options[0] + options[-1])
    for width in widths(denoiser)[::3]:
        options.append([Cut(address=width.address, what=width.what, value=width.groups[0])])  # type: ignore[arg-type]
    found = OutputLoss(denoisers(pipe), calls).each(options)
    squares, count = [0.0] * len(options), 0
    for call in calls:  # by hand
        whole = call(denoiser)
        count += whole.numel()
        for i, cuts in enumerate(options):
            with surgery.applied(denoiser, cuts):
                squares[i] += float((call(denoiser) - whole).double().square().sum())
    assert found == [s / count for s in squares]
    assert min(found) > 0


def test_cuts_of_stages_pairs_and_middles() -> None:
    """Every way to change a U-Net: whole pairs, an emptied attention, the middle."""
    pipe = tiny.sd()
    pipe.unet = tiny.unet(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    s = sampler("sd")
    s.pipe = pipe
    calls = calibration.record(s, count=2, times=1, seed=0)
    options: list[list[Cut]] = [list(two) for two in surgery.pairs(pipe.unet)]
    assert len(options) > 3
    options += [
        [Cut(address="mid_block", what="remove")],
        [Cut(address="down_blocks.0.attentions.1", what="replace", value="empty")],
        options[0] + [Cut(address="mid_block", what="remove")],
    ]
    fast, plain = OutputLoss(denoisers(pipe), calls), OutputLoss(denoisers(pipe), calls, reuse=False)
    assert fast.each(options) == plain.each(options)


def test_nothing_is_left_behind() -> None:
    pipe = tiny.shared("sd")
    before = {a: type(m) for a, m in pipe.unet.named_modules()}
    whole = recorded("sd")[0](pipe.unet)
    OutputLoss(denoisers(pipe), recorded("sd")).each(single(pipe.unet))
    assert {a: type(m) for a, m in pipe.unet.named_modules()} == before
    assert not any("_lissom" in vars(m) for m in pipe.unet.modules())
    assert torch.equal(recorded("sd")[0](pipe.unet), whole)


def test_a_layer_that_writes_into_what_it_was_given() -> None:
    """Then copies are kept: the first part's output would be spoilt for the next cut."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            hidden_states += self.linear(hidden_states)
            return hidden_states

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = torch.nn.Linear(4, 4), torch.nn.ModuleList(Block() for _ in range(3))

        def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
            hidden_states = self.embed(hidden_states)
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return (hidden_states,)

    torch.manual_seed(0)
    net, call = Net().eval(), Inputs("net", {"hidden_states": torch.randn(2, 3, 4)}, 2, range(2), 500.0)
    options = [[Cut(address=f"blocks.{i}", what="remove", value="hidden_states")] for i in range(3)]
    found = OutputLoss({"net": net}, [call]).each(options)
    assert found == OutputLoss({"net": net}, [call], reuse=False).each(options)
    assert len(set(found)) == 3


def test_not_finite_is_infinite() -> None:
    pipe = tiny.dit()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].weight.fill_(float("nan"))
    calls = recorded("dit")
    found = OutputLoss(denoisers(pipe), calls).each([[Cut(address="transformer_blocks.0", what="remove")]])
    assert found == [float("inf")]


@pytest.mark.parametrize(("name", "units"), [("sd15", ("resnet", "attention")), ("dit-xl", ("transformer_block",))])
def test_scoring_a_layer_takes_less_than_two_thirds_of_a_forward(name: str, units: tuple[str, ...]) -> None:
    """By the count of operations, at full size, on the meta device."""
    blueprint = blueprints.load(name)
    call = Inputs(blueprint.component, blueprint.example(), 1, range(1), 500.0)
    options = [[Cut(address=x.address, what="remove")] for x in anatomy.layers(blueprint.denoiser) if x.kind in units]

    def flops(reuse: bool, given: list[list[Cut]]) -> int:
        with FlopCounterMode(display=False) as counter:
            outputs = list(OutputLoss({blueprint.component: blueprint.denoiser}, [call], reuse=reuse).outputs(call, given))
        assert len(outputs) == 1 + len(given)
        return counter.get_total_flops()

    whole = flops(False, [])
    fixed = flops(True, [])
    assert fixed == whole  # keeping the parts' outputs costs nothing more
    assert 0.2 * whole < (flops(True, options) - fixed) / len(options) <= 0.65 * whole
