"""Modulation channels: shifts, scales and gates that adaptive norms are told. Masked, cut, cut twice, saved, refused."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from lissom.core import artifact, blueprints, export, models, narrowing, slicing, standins, surgery
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.masking import Masks, masked
from lissom.core.slicing import Spread, Zeros
from lissom.core.surgery import CannotCut, applied
from lissom.core.weights import Source
from lissom.core.widths import Width, shares, widths
from lissom.tests.core import tiny
from lissom.tests.core.test_export import save
from lissom.tests.core.test_export_widths import in_turns, reloaded, same
from lissom.tests.core.test_surgery import state
from lissom.tests.core.tiny_families import WIDE, arguments, output, wide
from lissom.workflow._gauge import Gauge
from torch import Tensor, nn

WITH, WITHOUT = ("dit", "sd3", "flux"), ("pixart", "chroma", "sana", "wan")
WHAT = "keep_modulation"


pytestmark = pytest.mark.usefixtures("one_thread")


def modulations(denoiser: Any) -> list[Width]:
    return [width for width in widths(denoiser) if width.what == WHAT]


def keeping(address: str, stay: Sequence[int]) -> Cut:
    return Cut(address=address, what="keep_modulation", value=tuple(stay))


def drawn(width: Width, share: float, seed: int) -> list[int]:
    order = torch.randperm(width.count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: round(share * width.count)])


def both(found: Sequence[Width], stays: Sequence[Sequence[int]]) -> tuple[Masks, list[Cut]]:
    """Masks at zero and one, and the cuts that they stand for."""
    masks, cuts = {}, []
    for width, stay in zip(found, stays, strict=True):
        index = torch.tensor(stay, dtype=torch.long)
        masks[width.address] = (WHAT, torch.zeros(width.count).index_fill(0, index, 1.0))
        cuts.append(keeping(width.address, stay))
    return masks, cuts


def masked_output(denoiser: Any, masks: Masks) -> Tensor:
    with masked(denoiser, masks):
        return output(denoiser)


def cut_output(denoiser: Any, cuts: Sequence[Cut]) -> Tensor:
    with applied(denoiser, cuts):
        return output(denoiser)


def test_all_that_adaptive_norms_are_told_is_listed_and_nothing_else() -> None:
    """SD3's first block has two attentions to the picture, and its last one drops the text; d = 32."""
    d, block = 32, "transformer_blocks"
    wanted: dict[str, dict[str, int]] = {
        "dit": {f"{block}.0.norm1": 6, f"{block}.1.norm1": 6},
        "sd3": {
            f"{block}.0.norm1": 9, f"{block}.0.norm1_context": 6, f"{block}.1.norm1": 6, f"{block}.1.norm1_context": 2,
            "norm_out": 2,
        },
        "flux": {
            **{f"{block}.{i}.{norm}": 6 for i in (0, 1) for norm in ("norm1", "norm1_context")},
            **{f"single_{block}.{i}.norm": 3 for i in (0, 1)}, "norm_out": 2,
        },
        **{kind: {} for kind in WITHOUT},
    }  # fmt: skip
    for kind, found in wanted.items():
        assert modulations(wide(kind)) == [Width(address, WHAT, n * d, 1) for address, n in found.items()]


def test_how_much_of_large_models_it_is() -> None:
    """As counted beforehand; of DiT without the embedder that each of its norms owns: a tenth of all parameters, and stays."""
    for name, share in {"dit-xl": 0.298, "flux": 0.273, "sd3": 0.333, "sd15": 0.0}.items():
        denoiser: Any = blueprints.load(name).denoiser
        rows = sum(w.count * (denoiser.get_submodule(w.address).linear.in_features + 1) for w in modulations(denoiser))
        assert rows / surgery.parameters(denoiser) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("kind", WITH)
def test_masked_is_cut_and_one_is_nothing(kind: str) -> None:
    """Each norm alone and all together; parameters as the formula says, and undone exactly."""
    denoiser = WIDE[kind]()
    found, before, whole, size = modulations(denoiser), state(denoiser), output(denoiser), surgery.parameters(denoiser)
    ones, nothing = both(found, [range(width.count) for width in found])
    assert torch.equal(masked_output(denoiser, ones), whole)
    with applied(denoiser, nothing):
        assert state(denoiser) == before
    masks, cuts = both(found, [drawn(width, 0.5, i) for i, width in enumerate(found)])
    for each in [[cut] for cut in cuts] + [cuts]:
        lost = sum(
            (next(w.count for w in found if w.address == cut.address) - len(cut.value or ()))
            * (denoiser.get_submodule(cut.address).linear.in_features + 1)
            for cut in each
        )
        wanted = masked_output(denoiser, {cut.address: masks[cut.address] for cut in each})
        with applied(denoiser, each):
            assert torch.equal(output(denoiser), wanted) and surgery.parameters(denoiser) == size - lost
        assert not torch.equal(wanted, whole) and state(denoiser) == before
    none, off = both(found, [()] * len(found))
    assert torch.equal(masked_output(denoiser, none), cut_output(denoiser, off))
    for stays in ([[width.count - 1] for width in found], [drawn(width, 0.3, 9) for width in found]):
        masks, cuts = both(found, stays)  # products with a few rows add up in another order
        torch.testing.assert_close(cut_output(denoiser, cuts), masked_output(denoiser, masks), rtol=0, atol=1e-6)
    short = copy.deepcopy(denoiser).bfloat16()
    given = {k: v.bfloat16() if v.is_floating_point() and "timestep" not in k else v for k, v in arguments(denoiser).items()}
    masks, cuts = both(found, [drawn(width, 0.5, i) for i, width in enumerate(found)])
    with torch.no_grad():
        with masked(short, masks):
            wanted = short(**given).sample
        with applied(short, cuts):
            assert torch.equal(short(**given).sample, wanted) and wanted.dtype == torch.bfloat16


LAYERS: dict[str, tuple[Any, int]] = {
    "zero": (lambda: AdaLayerNormZero(8), 6),
    "zero, without bias": (lambda: AdaLayerNormZero(8, bias=False), 6),
    "single": (lambda: AdaLayerNormZeroSingle(8), 3),
    "sd3.5": (lambda: SD35AdaLayerNormZeroX(8), 9),
    "continuous": (lambda: AdaLayerNormContinuous(8, 8, elementwise_affine=False), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_channel_that_goes_is_one_row_of_zeros(name: str) -> None:
    """Written without the code that masks or cuts: in what order shift, scale and gate come does not matter to it."""
    torch.manual_seed(0)
    made, times = LAYERS[name]
    layer = made()
    nn.init.normal_(layer.linear.weight)
    x, emb, stay = torch.randn(2, 5, 8), torch.randn(2, 8), [0, 3, 8, 9, 8 * times - 1]
    zeroed = copy.deepcopy(layer)
    for p in zeroed.linear.parameters():
        p.data[[i for i in range(8 * times) if i not in stay]] = 0
    call = {"emb": emb} if name != "continuous" else {"conditioning_embedding": emb}
    wanted, narrow = zeroed(x, **call), narrowing.narrowed(layer, "norm", WHAT, stay)
    found = narrow(x, **call)
    assert all(torch.allclose(*pair) for pair in zip(found, wanted, strict=True))
    linear = narrow.linear
    assert (linear.in_features, linear.out_features, len(linear.weight)) == (8, 8 * times, 5)
    assert type(narrow) is type(layer) and narrow.norm is layer.norm and layer.linear.weight.shape == (8 * times, 8)
    assert dict(narrow.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert narrowing.picked(layer, WHAT, stay) == {"linear": (((0, 1), (3, 4), (8, 10), (8 * times - 1, 8 * times)), ())}


def test_a_second_cut_counts_what_the_first_one_left() -> None:
    flux = WIDE["flux"]()
    found = modulations(flux)
    first = [drawn(width, 0.75, i) for i, width in enumerate(found)]
    masks, cuts = both(found, first)
    with applied(flux, cuts):
        left = modulations(flux)
        assert [(w.address, w.count) for w in left] == [(w.address, len(stay)) for w, stay in zip(found, first, strict=True)]
        once = output(flux)
        assert torch.equal(masked_output(flux, both(left, [range(w.count) for w in left])[0]), once)
        second = [drawn(width, 2 / 3, 50 + i) for i, width in enumerate(left)]
        masks, again = both(left, second)
        wanted = masked_output(flux, masks)
        names = {name for width in left for name in shares(flux, width.address, WHAT, [0])}
        assert names == {f"{width.address}.linear" for width in left}
        with applied(flux, again):
            twice = output(flux)
            assert torch.equal(twice, wanted) and not torch.equal(twice, once)
            kept = [slicing.flat(flux.get_submodule(w.address).linear.kept) for w in left]
        assert torch.equal(output(flux), once)
        with applied(flux, [keeping(left[0].address, ())]):
            assert isinstance(flux.get_submodule(left[0].address).linear, Zeros) and left[0] not in widths(flux)
            with pytest.raises(CannotCut, match="its linear is no plain Linear .*a cut or a quantization is in the way"):
                surgery.apply(flux, [keeping(left[0].address, ())])
    composed = [[stay[i] for i in then] for stay, then in zip(first, second, strict=True)]
    assert kept == composed
    assert torch.equal(cut_output(flux, both(found, composed)[1]), twice)


def test_what_is_left_learns_as_it_did_and_so_do_factors_of_what_was_cut() -> None:
    """Gradients of rows that stay are those under masks. Of channels that were cut before there are no factors."""
    dit = WIDE["dit"]()
    found = modulations(dit)
    stays = [drawn(width, 0.5, i) for i, width in enumerate(found)]
    masks, cuts = both(found, stays)
    with masked(dit, masks):
        dit(**arguments(dit)).sample.square().mean().backward()
    linears = [dit.get_submodule(width.address).linear for width in found]
    wanted = {w.address: linear.weight.grad[stay] for w, linear, stay in zip(found, linears, stays, strict=True)}
    dit.zero_grad(set_to_none=True)
    with applied(dit, cuts):
        factors = {w.address: (WHAT, torch.ones(w.count, requires_grad=True)) for w in modulations(dit)}
        with masked(dit, factors):
            for _ in range(2):  # a second graph through the same hooks
                dit(**arguments(dit)).sample.square().mean().backward()
        for address, rows in wanted.items():
            linear = dit.get_submodule(address).linear
            torch.testing.assert_close(linear.weight.grad / 2, rows, rtol=1e-4, atol=1e-7)
            by_row = (linear.weight.detach() * linear.weight.grad).sum(1) + linear.bias.detach() * linear.bias.grad
            found_grad = factors[address][1].grad
            assert found_grad is not None
            torch.testing.assert_close(found_grad, by_row, rtol=1e-3, atol=1e-6)


def test_places_survive_what_happens_to_modules() -> None:
    """Copies, types, a model that is built without weights and filled, or emptied and filled: no file holds the places."""
    torch.manual_seed(0)
    x, rows = torch.randn(2, 4), ((1, 3), (6, 7))
    linear = slicing.spread(nn.Linear(4, 8), rows)
    wanted = linear(x)
    assert (
        linear.state_dict().keys() == {"weight", "bias"} and not wanted[:, [0, 3, 4, 5, 7]].any() and wanted[:, [1, 2, 6]].all()
    )
    assert torch.equal(copy.deepcopy(linear)(x), wanted)
    short = copy.deepcopy(linear).to(torch.bfloat16)
    assert short(x.bfloat16()).dtype == torch.bfloat16 and short.places.dtype == torch.int64
    with torch.device("meta"):
        empty = slicing.spread(nn.Linear(4, 8), rows)
    assert empty(x.to("meta")).shape == (2, 8) and empty.weight.is_meta and not empty.places.is_meta
    filled = copy.deepcopy(empty)
    filled.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(filled(x), wanted)
    emptied = copy.deepcopy(linear).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(linear.state_dict())
    assert torch.equal(emptied(x), wanted)
    again = slicing.spread(linear, ((0, 1), (2, 3)))
    assert again.kept == ((1, 2), (6, 7)) and torch.equal(again(x), wanted * torch.tensor([0, 1, 0, 0, 0, 0, 1, 0]))
    assert linear.places.tolist() == [1, 2, 6] and not slicing.spread(again, slicing.NONE)(x).any()


def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 4)
    for linear in (slicing.spread(nn.Linear(4, 8), ((1, 3),)), slicing.spread(nn.Linear(4, 8), slicing.NONE)):
        compiled: Any = torch.compile(linear, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), linear(x))
    flux = wide("flux")
    found = modulations(flux)
    with applied(flux, both(found, [drawn(w, 0.5, i) if i % 3 else () for i, w in enumerate(found)])[1]):
        wanted = output(flux)
        whole: Any = torch.compile(flux, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(whole(**arguments(flux)).sample, wanted, rtol=0, atol=1e-6)
    torch._dynamo.reset()


def rounded_weights(layer: Any) -> Any:
    layer.linear.weight = nn.Parameter(layer.linear.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def adapted(layer: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["linear"]), layer)


def test_what_is_refused_says_why() -> None:
    says = "^a: modulation channels cannot be cut here, because its linear is no plain Linear"
    for layer in (rounded_weights(AdaLayerNormZero(8)), adapted(AdaLayerNormZero(8))):
        with pytest.raises(ValueError, match=says):
            narrowing.narrowed(layer, "a", WHAT, (0,))
        parent = nn.ModuleDict({"a": layer})
        with pytest.raises(ValueError, match=says.replace("cut", "masked")), masked(parent, {"a": (WHAT, torch.ones(48))}):
            raise AssertionError
        assert widths(parent) == []
    with pytest.raises(ValueError, match="because a AdaLayerNormSingle has no modulation channels that can be cut"):
        narrowing.narrowed(AdaLayerNormSingle(8), "a", WHAT, (0,))  # PixArt's: each block adds a table of its own
    for stay in ((3, 1), (1, 1), (48,), "all", None):
        with pytest.raises(ValueError, match="^a: cannot keep modulation channels .* of 48"):
            narrowing.narrowed(AdaLayerNormZero(8), "a", WHAT, stay)
    with (
        pytest.raises(ValueError, match=r"has 192 modulation channels and was given \(32,\) factors"),
        masked(wide("dit"), {"transformer_blocks.0.norm1": (WHAT, torch.ones(32))}),
    ):
        raise AssertionError


@pytest.mark.parametrize("kind", WITH)
def test_they_are_written_and_loaded_strictly_and_cut_again(kind: str, tmp_path: Path) -> None:
    """With heads and units of the same blocks, by the code that the folder brings along; then only the rows that stay."""
    denoiser = wide(kind)
    first = in_turns(widths(denoiser), 1)
    once = reloaded(denoiser, first, tmp_path / "once")
    with applied(denoiser, first):
        same(once, denoiser)
    found = modulations(once)
    _, second = both(found, [drawn(width, 0.5, i) for i, width in enumerate(found)])
    twice = reloaded(once, second, tmp_path / "twice", carried=True)
    with applied(once, second):
        same(twice, once)
    plan = export.structure(denoiser, [keeping("transformer_blocks.0.norm1", (0, 1, 7))])
    for name, shape in (("weight", (3, 32)), ("bias", (3,))):
        at = f"transformer_blocks.0.norm1.linear.{name}"
        assert plan.sources[at] == Source(at, torch.Size(shape), ((0, 2), (7, 8)))
    assert plan.names == {"transformer_blocks.0.norm1.linear": None}


def test_a_model_without_weights_is_built_with_its_places() -> None:
    """As diffusers builds one that is loaded: on meta, before there is a file."""
    flux = wide("flux")
    found = modulations(flux)
    _, cuts = both(found, [drawn(width, 0.5, i) for i, width in enumerate(found)])
    cls = standins.pruned(type(flux))
    config = {**flux.config, "cuts": [surgery.spelled(flux, cuts)]}
    with torch.device("meta"):
        made: Any = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    with applied(flux, cuts):
        held, wanted = flux.state_dict(), output(flux)
    made.load_state_dict(held, strict=True, assign=True)
    for name, buffer in made.named_buffers():
        if buffer.is_meta:  # those of the embedding of positions, which are none of ours
            above, _, last = name.rpartition(".")
            setattr(made.get_submodule(above), last, flux.get_buffer(name))
    assert torch.equal(output(made), wanted)


def test_a_fresh_process_opens_them_in_a_short_type_too(tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "parent")
    parent = models.load(str(tmp_path / "parent"), device="cpu")
    found = modulations(parent.denoiser)
    _, cuts = both(found, [drawn(w, 0.5, i) if i % 3 else () for i, w in enumerate(found)])
    saved = save(parent, cuts, tmp_path / "made", dtype="bfloat16")
    assert saved.structure.opens == "remote_code" and saved.difference < 2e-2
    assert saved.structure.reason == f"{found[0].address}: no stock config gives one layer a width of its own"
    made = models.load(str(tmp_path / "made"), device="cpu")
    wanted = copy.deepcopy(parent.denoiser).bfloat16().float()
    assert torch.equal(output(made.denoiser), cut_output(wanted, cuts))
    config = json.loads((tmp_path / "made" / made.denoiser_name / "config.json").read_text())
    assert config["cuts"] == [[cut.plain() for cut in cuts]]
    manifest = artifact.manifest(tmp_path / "made")
    assert manifest is not None
    assert {renamed(f"{w.address}.linear", manifest.names) for w in found} == {None}
    assert {old for old, new in manifest.names.items() if new is None} == {f"{w.address}.linear" for w in found}


def test_an_adapter_is_put_on_them_and_adds_to_all_channels(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = modulations(wide("flux"))
    _, cuts = both(found, [drawn(w, 0.5, i) if i % 3 == 0 else () for i, w in enumerate(found)])
    denoiser = reloaded(wide("flux"), cuts, tmp_path / "made")
    assert isinstance(denoiser.transformer_blocks[0].norm1.linear, Spread)
    before = output(denoiser)
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=[f"{w.address}.linear" for w in found], init_lora_weights=False))
    assert not torch.equal(output(denoiser), before)
    denoiser(**arguments(denoiser)).sample.square().mean().backward()
    learned = {n.partition(".lora")[0] for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {f"{w.address}.linear" for w in found}
    denoiser.delete_adapters("default")
    assert torch.equal(output(denoiser), before)


def test_what_a_cut_saves_is_exact() -> None:
    """DiT-XL/2 without weights: a third of one norm is a third of a product with the one embedding of an image."""
    gauge, d = Gauge(blueprints.load("dit-xl").denoiser), 1152
    cut = keeping("transformer_blocks.3.norm1", range(4 * d))
    assert gauge.params_saved([cut]) == 2 * d * (d + 1)
    assert gauge.after([cut]) == (gauge.params - 2 * d * (d + 1), gauge.macs - 2 * d * d)
    assert gauge.params_saved([keeping("transformer_blocks.3.norm1", ())]) == 6 * d * (d + 1)
