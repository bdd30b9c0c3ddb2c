"""One head, unit, group or modulation channel off: the bits of the model without it. And masks under torch.compile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.masking import Masks, masked
from lissom.core.surgery import applied
from lissom.core.widths import Width, widths
from lissom.tests.core import cutting
from lissom.tests.core.test_masking import KINDS, UNETS, cut_output, masked_output, of_all
from lissom.tests.core.tiny_families import WIDE, arguments, output, wide
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


def off(width: Width, k: int) -> tuple[Masks, Cut]:
    """The k-th group of a width masked, and cut."""
    gone = width.groups[k]
    stay = tuple(i for i in range(width.count) if i not in gone)
    factors = torch.ones(width.count).index_fill(0, torch.tensor(gone), 0.0)
    cut = Cut.model_validate({"address": width.address, "what": width.what, "value": stay})
    return {width.address: (width.what, factors)}, cut


def single(denoiser: Any) -> Iterator[tuple[Masks, Cut]]:
    """The first, a middle and the last group of every width, each of them alone; of heads every one."""
    for width in widths(denoiser):
        last = len(width.groups) - 1
        few = range(last + 1) if width.what == "keep_heads" else sorted({0, last // 2, last})
        yield from (off(width, k) for k in few)


@contextmanager
def summed_in_order(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products add up one column after the other, and activations take all numbers alike.

    As they are, both depend on how many numbers there are (tiles of a product, what does not fill a vector register): a column
    less is then another rounding. Here a zero more or less is none.
    """
    convolved = F.conv2d

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = x[..., :1] * weight[:, 0]
        for k in range(1, weight.shape[1]):
            out = out + x[..., k : k + 1] * weight[:, k]
        return out if bias is None else out + bias

    def conv2d(x: Tensor, weight: Tensor, bias: Any = None, *rest: Any, **named: Any) -> Tensor:
        if weight.shape[2:] == (1, 1):
            return linear(x.movedim(1, -1), weight[:, :, 0, 0], bias).movedim(-1, 1)
        if len(weight) != x.shape[1] or weight.shape[1] != 1:
            return convolved(x, weight, bias, *rest, **named)
        padded, (height, breadth) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
        out = bias[:, None, None].expand_as(x)
        for i, j in ((i, j) for i in range(3) for j in range(3)):
            out = out + padded[:, :, i : i + height, j : j + breadth] * weight[:, 0, i, j][:, None, None]
        return out

    def filled(activation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest, **named: activation(F.pad(x.flatten(), (0, -x.numel() % 64)), *rest, **named)[: x.numel()].view(
            x.shape
        )

    with patch.context() as inside:
        for name, function in {"linear": linear, "conv2d": conv2d, "gelu": filled(F.gelu), "silu": filled(F.silu)}.items():
            inside.setattr(F, name, function)
        yield


@pytest.mark.parametrize("kind", WIDE)
def test_one_head_or_unit_off_is_exactly_the_model_without_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.5, item 3, of transformers: no bit differs once rounding does not depend on how many numbers a product sums."""
    denoiser = wide(kind)
    with summed_in_order(monkeypatch):
        whole = output(denoiser)
        for masks, cut in single(denoiser):
            found = masked_output(denoiser, masks)
            assert torch.equal(found, cut_output(denoiser, [cut])), cut.address
            assert not torch.equal(found, whole), cut.address
        assert torch.equal(masked_output(denoiser, of_all(denoiser, 1.0)), whole)
    assert output(denoiser).sub(whole).abs().max() <= 1e-5  # and it is the model


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_unit_or_group_off_is_the_model_without_it_as_it_is_computed(kind: str) -> None:
    """5.5, item 3: with products as they are, U-Nets within 1e-6; a group of a ResNet's norm too."""
    denoiser = KINDS[kind]()
    whole = output(denoiser)
    limit = 1e-6 if kind in UNETS else 1e-6 * float(whole.abs().max())
    pairs = list(single(denoiser))
    for masks, cut in pairs[:: 1 + len(pairs) // 60]:
        found = masked_output(denoiser, masks)
        assert (found - cut_output(denoiser, [cut])).abs().max() <= limit, cut.address
        assert not torch.equal(found, whole), cut.address


def drawn(denoiser: Any) -> dict[str, tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {w.address: (w.what, torch.rand(w.count, generator=generator).requires_grad_()) for w in widths(denoiser)}


def slopes(model: Any, given: dict[str, Any], factors: list[Tensor]) -> list[Tensor]:
    out = model(**given, return_dict=False)[0]
    return [out.detach(), *torch.autograd.grad(out.square().mean(), factors)]


@pytest.mark.parametrize("kind", ["sd3", "flux", "unet"])
def test_a_denoiser_that_is_compiled_inside_runs_and_learns_masked(kind: str) -> None:
    """5.5, item 12: output and gradients as without the compiler, factors may be exchanged, and afterwards they are gone."""
    torch._dynamo.reset()
    denoiser = cutting.family("sd") if kind == "unet" else wide(kind)
    given, whole, masks = arguments(denoiser), output(denoiser), drawn(denoiser)
    factors = [one for _, one in masks.values()]
    with masked(denoiser, masks):
        compiled: Any = torch.compile(denoiser, backend="aot_eager", fullgraph=kind != "unet")
        for _ in range(2):
            found, wanted = slopes(compiled, given, factors), slopes(denoiser, given, factors)
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))
            assert (found[0] - whole).abs().max() > 1e-2 and all(bool(slope.any()) for slope in found[1:])
            with torch.no_grad():
                for one in factors:
                    one.mul_(0.5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given, return_dict=False)[0], whole, rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_a_denoiser_that_is_compiled_block_by_block_inside_is_masked() -> None:
    """As `compile_repeated_blocks` does: one version of the class, each block with its own factors."""
    torch._dynamo.reset()
    denoiser = WIDE["flux"]()
    masks = drawn(denoiser)
    with masked(denoiser, masks):
        wanted = output(denoiser)
        denoiser.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(output(denoiser), wanted, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="compiled already"), masked(denoiser, masks):
        raise AssertionError
    torch._dynamo.reset()


def test_what_is_compiled_already_is_refused_however_it_was() -> None:
    """What the refusal is for: torch.compile does not look for hooks that come after the first call."""
    torch._dynamo.reset()
    parent: Any = nn.ModuleDict({"ff": FeedForward(6, inner_dim=10)})
    x, masks = torch.randn(3, 6), {"ff": ("keep_units", torch.zeros(10))}
    compiled: Any = torch.compile(parent, backend="eager")
    with pytest.raises(UserError, match="compiled already.*Compile it with the masks in place"), masked(compiled, masks):
        raise AssertionError
    with masked(parent, masks):
        assert torch.equal(parent["ff"](x), parent["ff"].net[2].bias.expand(3, 6))
    layer: Any = torch.compile(parent["ff"], backend="eager")
    before = layer(x)
    with masked(parent, masks):
        assert torch.equal(layer(x), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux", "sana", "unet"])
def test_a_compiled_denoiser_is_cut_inside_also_after_it_has_run(kind: str) -> None:
    """5.5, item 5: what was compiled and called whole computes what the cut model does, and whole again afterwards."""
    torch._dynamo.reset()
    denoiser = cutting.family("sd") if kind == "unet" else wide(kind)
    cuts = [off(width, 0)[1] for width in widths(denoiser)]
    compiled: Any = torch.compile(denoiser, backend="eager")
    whole, wanted = output(denoiser), cut_output(denoiser, cuts)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**arguments(denoiser), return_dict=False)[0], whole, rtol=0, atol=1e-6)
            with applied(compiled, cuts):
                torch.testing.assert_close(compiled(**arguments(denoiser), return_dict=False)[0], wanted, rtol=0, atol=1e-6)
    assert (whole - wanted).abs().max() > 1e-3
    torch._dynamo.reset()
