"""Single operators: which are listed, that cutting one is passing its input on, and that no stock config claims to do that."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import blueprints, cost, stock, surgery
from lissom.core.anatomy import Layer
from lissom.core.candidate import Cut
from lissom.core.opening import open_cut
from lissom.core.operators import operators
from lissom.core.standins import pruned
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import output
from torch import nn

KINDS = [name for name in cutting.KINDS if name != "wan"]  # five dimensions: tested by the blocks' own tests


def listed(denoiser: Any) -> list[Layer]:
    return operators(denoiser, lambda: output(denoiser))


def remove(layer: Layer) -> Cut:
    return Cut(address=layer.address, what="remove", value=layer.returns)


@functools.cache
def twin(kind: str) -> Any:
    """The same denoiser once more, seeded: the shared one is cut at the moment."""
    return cutting.KINDS[kind]()


def passing_on(denoiser: Any, address: str) -> torch.Tensor:
    """What the denoiser gives where an operator's output is replaced by its input, without any surgery."""
    hook = denoiser.get_submodule(address).register_forward_hook(lambda module, args, out: args[0])
    try:
        return output(denoiser)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_an_operator_is_passing_its_input_on(kind: str) -> None:
    denoiser = cutting.shared(kind)
    whole, size = output(denoiser), surgery.parameters(denoiser)
    found = listed(denoiser)
    classes = {type(denoiser.get_submodule(layer.address)).__name__ for layer in found}
    assert {"Linear", "SiLU"} < classes
    for layer in found[:: max(1, len(found) // 40)]:
        with surgery.applied(denoiser, [remove(layer)]):
            assert torch.equal(output(denoiser), passing_on(twin(kind), layer.address)), layer.address
            assert size - surgery.parameters(denoiser) == layer.freed, layer.address
            assert isinstance(stock.express(denoiser), str), layer.address
    assert torch.equal(output(denoiser), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_inside_an_attention_and_nothing_that_changes_the_shape(kind: str) -> None:
    denoiser = cutting.shared(kind)
    addresses = {layer.address for layer in listed(denoiser)}
    for address, module in denoiser.named_modules():
        above = [address.rsplit(".", n)[0] for n in range(1, address.count(".") + 1)]
        if any("Attention" in type(denoiser.get_submodule(a)).__name__ for a in above):
            assert address not in addresses, address
        if isinstance(module, nn.Conv2d) and (module.in_channels != module.out_channels or module.stride != (1, 1)):
            assert address not in addresses, address
        if any(True for _ in module.children()):
            assert address not in addresses, address


def test_a_stride_is_seen_where_the_map_is_too_small_to_show_it() -> None:
    """A convolution of stride 2 leaves a feature map of 1x1 as it is; on a larger image it does not."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
            self.valid = nn.Conv2d(4, 4, 1, padding=1)
            self.same = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
            self.wide = nn.Linear(4, 5)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(self.same(self.down(x)).mean((2, 3)))

    small = Small()
    found = operators(small, lambda: small(torch.zeros(1, 4, 1, 1)))
    assert [layer.address for layer in found] == ["same"]  # valid and unused never ran
    assert (found[0].params, found[0].macs) == (4 * 4 * 9 + 4, 4 * 4 * 9)


def test_an_operator_whose_weights_its_parent_reads_is_left_alone() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.called(self.read(x.to(self.read.weight.dtype)))

    reading = Reading()
    assert [layer.address for layer in operators(reading, lambda: reading(torch.zeros(1, 4)))] == ["called"]


def test_macs_are_those_that_are_counted() -> None:
    structure = blueprints.load("sd15")
    found = operators(structure.denoiser, lambda: structure.denoiser(**structure.example()))
    assert len(found) == 211 and not any(".attn" in layer.address for layer in found)
    total = cost.count(structure.denoiser, **structure.example()).total
    weighty = [layer for layer in found if layer.macs]
    some = [layer for layer in (weighty[0], weighty[len(weighty) // 2], weighty[-1])]
    with surgery.applied(structure.denoiser, [remove(layer) for layer in some]):
        left = cost.count(structure.denoiser, **structure.example()).total
    assert total - left == sum(layer.macs or 0 for layer in some)
    assert {layer.macs for layer in found if layer.address.endswith(("norm1", "nonlinearity"))} == {0}


@pytest.mark.parametrize("kind", ["sd", "pixels", "dit"])
def test_a_model_without_operators_is_saved_and_opened_like_any_other(kind: str, tmp_path: Path) -> None:
    denoiser = cutting.shared(kind)
    cuts = [remove(layer) for layer in listed(denoiser)[::3]]
    plain = [cut.plain() for cut in cuts]
    made = pruned(type(denoiser)).from_config(denoiser.config, cuts=[plain]).eval()
    with surgery.applied(denoiser, cuts):
        made.load_state_dict(denoiser.state_dict(), strict=True)
        wanted = output(denoiser)
    assert torch.equal(output(made), wanted)
    made.save_pretrained(tmp_path)
    opened = open_cut(tmp_path)
    assert torch.equal(output(opened), wanted) and opened.config["cuts"] == [plain]
    again = {layer.address for layer in listed(opened)}  # what is cut is not there any more
    assert not again & {cut.address for cut in cuts} and again


def test_layers_and_skips_know_nothing_of_them() -> None:
    from lissom.core import anatomy

    unet = tiny.shared("sd").unet
    assert "operator" not in {layer.kind for layer in anatomy.layers(unet)}
