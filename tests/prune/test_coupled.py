"""Importances of Torch-Pruning on groups built by hand: equal to plain sums over the parameters that a cut takes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from lissom.core.widths import Width, widths
from lissom.prune import _coupled
from lissom.tests.core import cutting
from torch import Tensor, nn

KINDS: dict[str, Callable[[], Any]] = {
    **{
        name: functools.partial(cutting.shared, name)
        for name in ("sd", "pixels", "dit", "pixart", "sd3.5", "flux", "sana", "wan")
    },
    "scale_shift": functools.cache(lambda: cutting.sd(resnet_time_scale_shift="scale_shift")),
}


@pytest.fixture
def graded() -> Iterator[Callable[[Any], Any]]:
    """Gives every parameter of a denoiser a made-up gradient, and takes it away afterwards."""
    seen: list[Any] = []

    def give(denoiser: Any) -> Any:
        drawn = torch.Generator().manual_seed(0)
        for p in denoiser.parameters():
            p.grad = torch.randn(p.shape, generator=drawn)
        seen.append(denoiser)
        return denoiser

    yield give
    for denoiser in seen:
        for p in denoiser.parameters():
            p.grad = None


def by_hand(denoiser: Any, width: Width, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum over all parameters of each group, by the layouts that diffusers' layers have. Written without `picked`."""

    def of(parameter: Tensor | None, dim: int, parts: int) -> Tensor:
        if parameter is None:
            return torch.zeros(parts)
        return product(parameter).movedim(dim, 0).reshape(parts, -1).sum(1)

    def rows(operator: Any, parts: int, times: int = 1) -> Tensor:
        """times: how often each of the parts is there."""
        found = of(operator.weight, 0, times * parts) + of(operator.bias, 0, times * parts)
        return found.reshape(times, parts).sum(0)

    n, (block, _, name) = width.count, width.address.rpartition(".")
    layer = denoiser.get_submodule(width.address)
    beside: Any = denoiser.get_submodule(block) if block.startswith("single") else None  # its output reads heads, then units
    columns = product(beside.proj_out.weight).sum(0) if beside is not None else torch.zeros(0)
    if name == "proj_mlp":
        found = rows(layer, n) + columns[-n:]
    elif width.what == "keep_modulation":
        found = rows(layer.linear, n)
    elif width.what == "keep_heads":
        across = layer.norm_q is not None and layer.norm_q.weight.numel() > layer.to_q.out_features // n  # Wan: q and k stay
        made = [layer.to_v] if across else [layer.to_q, layer.to_k, layer.to_v]
        if getattr(layer, "add_q_proj", None) is not None:
            made += [layer.add_q_proj, layer.add_k_proj, layer.add_v_proj]
        read = [*(getattr(layer, "to_out", None) or ())][:1] + [
            m for m in (getattr(layer, "to_add_out", None),) if m is not None
        ]
        found = sum((rows(m, n) for m in made), torch.zeros(n)) + sum((of(m.weight, 1, n) for m in read), torch.zeros(n))
        found = found + (columns[: layer.to_v.out_features].reshape(n, -1).sum(1) if beside is not None else 0)
    elif type(layer).__name__ == "GLUMBConv":
        found = rows(layer.conv_inverted, n, 2) + rows(layer.conv_depth, n, 2) + of(layer.conv_point.weight, 1, n)
    elif width.what == "keep_units":
        made = layer.net[0].proj
        found = rows(made, n, made.out_features // n) + of(layer.net[2].weight, 1, n)
    else:
        found = rows(layer.conv1, n) + rows(layer.norm2, n) + of(layer.conv2.weight, 1, n)
        if layer.time_emb_proj is not None:
            found = found + rows(layer.time_emb_proj, n, layer.time_emb_proj.out_features // n)
    return found.reshape(len(width.groups), -1).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_taylor_importance_is_the_sum_of_weight_times_gradient(kind: str, graded: Callable[[Any], Any]) -> None:
    """Every width of every family. Also 6.5, items 3 (whole heads), 4 (both halves of a gate), 6 (whole groups), 7 (norms)."""
    denoiser = graded(KINDS[kind]())
    found = widths(denoiser)
    assert found
    for width in found:
        wanted = by_hand(denoiser, width, lambda p: (p.detach() * p.grad).abs())
        got = _coupled.importances(denoiser, width, _coupled.taylor())
        assert got.shape == (len(width.groups),)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_the_magnitude_is_the_sum_of_powers_without_norms(p: int) -> None:
    denoiser = cutting.shared("sd")
    for width in widths(denoiser):
        layer = denoiser.get_submodule(width.address)
        wanted = by_hand(denoiser, width, lambda w: w.detach().abs() ** p)
        if width.what == "keep_channels":
            both = layer.norm2.weight.detach().abs() ** p + layer.norm2.bias.detach().abs() ** p
            wanted = wanted - both.reshape(len(width.groups), -1).sum(1)
        torch.testing.assert_close(_coupled.importances(denoiser, width, _coupled.magnitude(p)), wanted, rtol=1e-4, atol=1e-5)


def test_plain_taylor_adds_before_it_takes_the_absolute_value(graded: Callable[[Any], Any]) -> None:
    """A filter whose products cancel weighs nothing in the baseline, and everything in the paper's sum."""
    layer = FeedForward(2, inner_dim=3, activation_fn="gelu", bias=False)
    parent = graded(nn.ModuleDict({"ff": layer}))
    with torch.no_grad():
        for weight in (layer.net[0].proj.weight, layer.net[2].weight):
            weight.fill_(1.0)
            weight.grad = torch.ones_like(weight)
        layer.net[0].proj.weight.grad[0] = torch.tensor([5.0, -5.0])
        layer.net[2].weight.grad[:, 0] = torch.tensor([2.0, -2.0])
    width = Width("ff", "keep_units", 3, 1)
    assert _coupled.importances(parent, width, _coupled.taylor()).tolist() == [14.0, 4.0, 4.0]
    assert _coupled.importances(parent, width, _coupled.taylor(multivariable=True)).tolist() == [0.0, 4.0, 4.0]


def items(group: Any) -> set[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """What a group holds: operator, side, indices, and the root index of each."""
    found = set()
    for i, (dep, indices) in enumerate(group):
        if isinstance(dep.layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            roots = zip(indices, group[i].root_idxs, strict=True)
            pairs = sorted((int(a), int(b)) for a, b in roots)
            name = next(n for n, m in group.layers.items() if m is dep.layer)
            found.add((name, dep.handler.__name__, tuple(a for a, _ in pairs), tuple(b for _, b in pairs)))
    return found


def test_a_traced_group_of_a_resnet_and_of_a_feed_forward_is_the_one_built_by_hand() -> None:
    """6.5, item 1: tracing needs autograd. Where Torch-Pruning can trace a layer alone, it couples what `picked` names."""
    torch.manual_seed(0)
    resnet = ResnetBlock2D(in_channels=4, out_channels=6, temb_channels=5, groups=2, groups_out=6)
    ff = FeedForward(4, inner_dim=10, activation_fn="gelu")
    examples = {"resnet": (torch.randn(2, 4, 3, 3), torch.randn(2, 5)), "ff": (torch.randn(2, 7, 4),)}
    cases: list[tuple[Any, Any, Width, Any, tuple[Any, ...]]] = [
        (resnet, resnet.conv1, Width("", "keep_channels", 6, 1), tp.prune_conv_out_channels, examples["resnet"]),
        (ff, ff.net[0].proj, Width("", "keep_units", 10, 1), tp.prune_linear_out_channels, examples["ff"]),
    ]
    for layer, root, width, prune, inputs in cases:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(layer, example_inputs=inputs)
        traced, built = graph.get_pruning_group(root, prune, list(range(width.count))), _coupled.group(layer, width)
        traced.layers = built.layers = dict(layer.named_modules())
        assert items(built) and items(traced) == items(built)


def test_traced_whole_a_denoiser_ties_its_residual_stream_together() -> None:
    """6.5, item 5: why groups are not traced. Built by hand, none reaches beyond its layer."""
    unet = cutting.pixels()
    sample = (torch.randn(1, 4, 8, 8), torch.tensor([3]))
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(
            unet, example_inputs=sample, output_transform=lambda out: out.sample.sum()
        )
    stream = graph.get_pruning_group(unet.conv_in, tp.prune_conv_out_channels, list(range(8)))
    assert len({id(dep.layer) for dep, _ in stream if isinstance(dep.layer, nn.Conv2d)}) > 4
    for width in widths(unet):
        inside = {id(m) for m in unet.get_submodule(width.address).modules()}
        assert {id(dep.layer) for dep, _ in _coupled.group(unet, width)} <= inside


def test_groups_share_nothing_and_change_nothing(graded: Callable[[Any], Any]) -> None:
    """6.5, items 2 and 9: no attribute of a layer moves, and what is built first does not show in what is built next."""
    unet = graded(cutting.shared("sd"))
    before = {name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in unet.named_modules()}
    first = {w.address: _coupled.importances(unet, w, _coupled.taylor()).tolist() for w in widths(unet)}
    again = {w.address: _coupled.importances(unet, w, _coupled.taylor()).tolist() for w in reversed(widths(unet))}
    assert first == again
    assert {name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in unet.named_modules()} == before


def test_heads_that_share_keys_are_no_widths() -> None:
    """6.5, item 13."""
    parent = nn.ModuleDict({"shares": Attention(8, heads=4, kv_heads=2, dim_head=2), "own": Attention(8, heads=4, dim_head=2)})
    assert [width.address for width in widths(parent)] == ["own"]
