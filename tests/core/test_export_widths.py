"""Narrower layers in files: written from the parent's rows and columns, opened without lissom, cut again. What they cost."""

import copy
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxTransformer2DModel
from lissom.core import artifact, blueprints, cost, export, models, standins, stock, surgery, weights
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.masking import masked
from lissom.core.models import Model
from lissom.core.surgery import applied
from lissom.core.weights import Source, files_of
from lissom.core.widths import Width, widths
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import cut_output, inputs, keep, output, remove
from lissom.tests.core.test_export import opened_elsewhere, save, written
from lissom.tests.core.test_widths import BLOCK, cut, some
from lissom.tests.core.tiny_families import FLUX, WIDE, _transformer, arguments, wide
from lissom.tests.core.tiny_families import output as wide_output
from lissom.workflow._gauge import Gauge
from lissom.workflow._prune_job import time_inside
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A pipeline in a folder, its weights in several files. Read only."""
    folder = tmp_path_factory.mktemp("models") / "parent"
    pipe = tiny.sd()
    pipe.register_modules(unet=cutting.sd(resnet_time_scale_shift="scale_shift"))
    pipe.save_pretrained(folder, max_shard_size="60KB")
    return models.load(str(folder), device="cpu")


def test_a_narrow_model_is_saved_opens_everywhere_and_is_cut_again(parent: Model, tmp_path: Path) -> None:
    """The second cuts count what the first ones left; in a class of plain files, and of what a fresh process finds."""
    unet, last = parent.denoiser, BLOCK.replace("attentions.0", "attentions.2")
    first = [
        cut(f"{last}.attn1", "heads", 0, 2, 3), cut(f"{last}.ff", "units", *range(1, 64, 2)),
        cut("up_blocks.0.resnets.1", "channels", *range(4), *range(8, 16)), cut("mid_block.resnets.0", "channels", 0, 6, 8, 15),
    ]  # fmt: skip
    saved = save(parent, first, tmp_path / "first")
    assert saved.difference < 1e-6 and saved.structure.opens == "remote_code"
    assert saved.structure.reason == "up_blocks.0.resnets.1: no stock config gives one layer a width of its own"
    once = models.load(str(tmp_path / "first"), device="cpu")
    moved = last.replace("attentions.2", "attentions.1")
    pair = [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)]
    second = [  # of one layer again, of another one, with a layer that moves on the way
        cut(f"{last}.attn1", "heads", 0, 2), cut(f"{last}.ff", "units", 0, 1, 31), cut("up_blocks.0.resnets.1", "channels", *range(4, 8)),
        cut("down_blocks.0.attentions.1.transformer_blocks.0.attn2", "heads", 1), *remove("mid_block.resnets.1"), *pair,
    ]  # fmt: skip
    twice = written(once, second, tmp_path / "second", shard=60_000)
    both = [
        cut(f"{last}.attn1", "heads", 0, 3), cut(f"{last}.ff", "units", 1, 3, 63), cut("up_blocks.0.resnets.1", "channels", *range(8, 12)),
        first[-1], *second[3:],
    ]  # fmt: skip
    assert len(files_of(tmp_path / "second" / "unet")) > 1
    assert twice.denoiser.get_submodule(f"{moved}.attn1").heads == 2
    assert torch.equal(output(twice.denoiser), cut_output(once.denoiser, second))
    torch.testing.assert_close(output(twice.denoiser), cut_output(unet, both), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "second" / "unet" / "config.json").read_text())
    assert config["cuts"] == [[c.plain() for c in cuts] for cuts in (first, second)]
    trust = {"trust_remote_code": True}
    found = opened_elsewhere({n: (tmp_path / n, trust) for n in ("first", "second")}, inputs(unet), tmp_path)
    for name, cuts in (("first", first), ("second", both)):
        cls, params, numbers = found[name]
        torch.testing.assert_close(torch.tensor(numbers), cut_output(unet, cuts).flatten(), rtol=0, atol=1e-6)
        with applied(unet, cuts):
            assert (cls, params) == ("PrunedUNet2DConditionModel", surgery.parameters(unet))


def test_names_keep_what_has_the_parents_weights(parent: Model, tmp_path: Path) -> None:
    """A LoRA of the parent stays where it fits: not on an operator that lost rows or columns."""
    last = BLOCK.replace("attentions.0", "attentions.2")
    cuts = [
        cut(f"{last}.attn1", "heads", 1),
        cut(f"{last}.ff", "units", 3),
        keep("up_blocks.1", 0, 2),
        keep("down_blocks.1", 0),
    ]
    made = written(parent, cuts, tmp_path / "made")
    manifest = artifact.manifest(tmp_path / "made")
    assert manifest is not None
    narrow = {
        f"{last}.{part}" for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }
    assert {old for old, new in manifest.names.items() if new is None and old.startswith(last)} == narrow
    assert renamed(f"{last}.attn1", manifest.names) == last.replace("attentions.2", "attentions.1") + ".attn1"
    before, now = parent.denoiser.state_dict(), made.denoiser.state_dict()
    there = {old: new for old in before if (new := renamed(old, manifest.names)) is not None}
    assert all(torch.equal(now[new], before[old]) for old, new in there.items())
    assert {key.rpartition(".")[0] for key in now.keys() - set(there.values())} == {
        a.replace("attentions.2", "attentions.1") for a in narrow
    }


def test_no_more_than_the_rows_and_columns_that_stay_is_written() -> None:
    plan = export.structure(cutting.shared("sd"), [cut(f"{BLOCK}.ff", "units", 0, 1, 9)])
    at = f"{BLOCK}.ff.net"
    assert plan.sources[f"{at}.0.proj.bias"] == Source(
        f"{at}.0.proj.bias", torch.Size([6]), ((0, 2), (9, 10), (64, 66), (73, 74))
    )
    assert plan.sources[f"{at}.2.weight"] == Source(f"{at}.2.weight", torch.Size([16, 3]), (), ((0, 2), (9, 10)))
    assert plan.sources[f"{at}.2.bias"] == Source(f"{at}.2.bias", torch.Size([16]))


@pytest.mark.parametrize("kind", WIDE)
def test_every_family_is_written_and_loaded_strictly_and_cut_again(kind: str, tmp_path: Path) -> None:
    """5.5, item 5: half of a width, one, none or all, in turns; by the code that goes into the folder; in bfloat16 too."""
    denoiser = wide(kind)
    first = in_turns(widths(denoiser), 0)
    once = reloaded(denoiser, first, tmp_path / "once")
    with applied(denoiser, first):
        same(once, denoiser)
        wanted = {key: tensor.bfloat16() for key, tensor in denoiser.state_dict().items()}
    short = reloaded(denoiser, first, tmp_path / "short", dtype=torch.bfloat16, carried=True)
    assert all(torch.equal(tensor, wanted[key].float()) for key, tensor in short.state_dict().items())
    second = in_turns(widths(once), 1)
    twice = reloaded(once, second, tmp_path / "twice", carried=True)
    with applied(once, second):
        same(twice, once)
        wanted_output = wide_output(once)
    assert second and len(twice.config["cuts"]) == 2
    # of what was cut twice the masks of the parent say the same
    there = {w.address: w for w in widths(denoiser)}
    both = dict.fromkeys(there) | {c.address: c.value for c in first}
    for each in second:
        left = both[each.address] or tuple(range(there[each.address].count))
        both[each.address] = tuple(left[i] for i in each.value or ())
    masks = {a: zero_but(there[a], stay) for a, stay in both.items() if stay is not None}
    with masked(denoiser, masks):
        torch.testing.assert_close(wide_output(denoiser), wanted_output, rtol=0, atol=3e-6)


def same(one: Any, other: Any) -> None:
    """Of two models: the same names, the same numbers, and the same output but for rounding."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    torch.testing.assert_close(wide_output(one), wide_output(other), rtol=0, atol=1e-6)


def in_turns(found: list[Width], turn: int) -> list[Cut]:
    """Cuts of half of a width, of all but one, of all, and none."""
    stays: list[tuple[int, ...] | None] = []
    for k, width in enumerate(found):
        choices = (tuple(range(k % 2, width.count, 2)), (width.count // 2,), (), None)
        stays.append(choices[(k + turn) % 4])
    pairs = zip(found, stays, strict=True)
    return [Cut.model_validate({"address": w.address, "what": w.what, "value": v}) for w, v in pairs if v is not None]


def zero_but(width: Width, stay: tuple[int, ...]) -> tuple[str, torch.Tensor]:
    return width.what, torch.zeros(width.count).index_fill(0, torch.tensor(stay, dtype=torch.long), 1.0)


def reloaded(denoiser: Any, cuts: list[Cut], folder: Path, *, carried: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The cut denoiser from its files. carried: by a class of the text that a folder brings along, instead of ours."""
    folder.mkdir()
    plan = export.structure(denoiser, cuts)
    weights.write(plan.sources, weights.Held(denoiser.state_dict()), folder, dtype=dtype)
    cls = standins.pruned(stock.base_class(denoiser))
    if carried:
        assert plan.code is not None and "lissom" not in plan.code.partition('"""\n')[2]
        (folder / "carried.py").write_text(plan.code)
        spec = spec_from_file_location("carried", folder / "carried.py")
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(module := module_from_spec(spec))
        cls = getattr(module, plan.cls)
    model = cls.from_config(json.loads(json.dumps(plan.config))).eval()
    held = load_file(files_of(folder)[0])
    assert all(tensor.numel() for tensor in held.values())
    model.load_state_dict(held, strict=True)
    return model


def test_a_fresh_process_opens_what_has_lost_all_heads_and_units(tmp_path: Path) -> None:
    """Of Flux: of a double block, and of single blocks one without heads, one without units, one without both."""
    pipe = tiny.flux()
    pipe.register_modules(transformer=_transformer(FluxTransformer2DModel, **FLUX | {"num_single_layers": 3}))
    pipe.save_pretrained(tmp_path / "parent")
    parent = models.load(str(tmp_path / "parent"), device="cpu")
    cuts = [
        cut("transformer_blocks.0.attn", "heads"), cut("transformer_blocks.0.ff_context", "units"),
        cut("transformer_blocks.1.attn", "heads", 0, 3),
        cut("single_transformer_blocks.0.attn", "heads"), cut("single_transformer_blocks.1.proj_mlp", "units"),
        cut("single_transformer_blocks.2.attn", "heads"), cut("single_transformer_blocks.2.proj_mlp", "units"),
    ]  # fmt: skip
    saved = save(parent, cuts, tmp_path / "made")
    assert saved.difference < 1e-6 and saved.structure.opens == "remote_code"
    made = models.load(str(tmp_path / "made"), device="cpu")
    assert torch.equal(output(made.denoiser), cut_output(parent.denoiser, cuts))
    names, single = saved.structure.names, "single_transformer_blocks"
    gone = [f"{single}.0.attn.to_q", f"{single}.0.proj_out", f"{single}.1.proj_mlp", "transformer_blocks.0.attn.to_add_out"]
    assert [renamed(a, names) for a in gone] == [None] * 4
    stays = [f"{single}.0.proj_mlp", f"{single}.1.attn.to_q", f"{single}.2.norm.linear", "transformer_blocks.0.ff.net.2"]
    assert [renamed(a, names) for a in stays] == stays
    for block, left in {"0": {"proj_mlp": 2, "proj_out": 2, "attn": 0}, "2": {"proj_mlp": 0, "proj_out": 1, "attn": 0}}.items():
        layer = made.denoiser.get_submodule(f"{single}.{block}")
        assert {name: len(list(layer.get_submodule(name).parameters())) for name in left} == left


def test_an_adapter_is_put_on_what_has_lost_all_heads_and_units_too(tmp_path: Path) -> None:
    """By the names of all layers, as is usual: it does nothing on those, and is put on the others."""
    peft = pytest.importorskip("peft")
    off = {
        "transformer_blocks.0.attn": "heads",
        "transformer_blocks.1.attn": "heads",
        "transformer_blocks.0.ff_context": "units",
    }
    denoiser = reloaded(wide("sd3"), [cut(address, what) for address, what in off.items()], tmp_path / "made")
    before = wide_output(denoiser)
    places = ["to_q", "to_k", "to_v", "to_out.0", "to_add_out", "net.0.proj", "net.2"]
    there = {
        a for a, m in denoiser.named_modules() if a.endswith(tuple(places)) and not a.startswith(tuple(f"{o}." for o in off))
    }
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=places, init_lora_weights=False))
    denoiser(**arguments(denoiser)).sample.square().mean().backward()
    assert {n.partition(".lora")[0] for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()} == there
    denoiser.delete_adapters("default")
    assert torch.equal(wide_output(denoiser), before)


@pytest.mark.parametrize("kind", ["flux", "sana-1.5"])
def test_what_is_offloaded_is_cut_to_the_same_files(kind: str) -> None:
    """Layers without heads or units too, and norms over all heads, whose weights are elsewhere."""
    denoiser = WIDE[kind]()
    cuts = in_turns(widths(denoiser), 0)
    plan, whole = export.structure(denoiser, cuts), wide_output(denoiser)
    with applied(denoiser, cuts):
        wanted = wide_output(denoiser)
    accelerate.cpu_offload(denoiser, execution_device="cpu")
    with applied(denoiser, cuts):
        assert torch.equal(wide_output(denoiser), wanted) and torch.equal(wide_output(denoiser), wanted)
    assert export.structure(denoiser, cuts).sources == plan.sources and torch.equal(wide_output(denoiser), whole)


@pytest.mark.parametrize("kind", [*WIDE, "unet"])
def test_what_was_read_back_computes_the_same_compiled_and_in_a_short_type(kind: str, tmp_path: Path) -> None:
    """5.5, item 5: of layers without any heads or units too; the same bits as the cut model in bfloat16."""
    torch._dynamo.reset()
    denoiser = cutting.family("sd") if kind == "unet" else wide(kind)
    cuts = in_turns(widths(denoiser), 0) if kind != "unet" else [some(width, 0) for width in widths(denoiser)]
    made, whole = reloaded(denoiser, cuts, tmp_path / "made", carried=True), copy.deepcopy(denoiser)
    compiled: Any = torch.compile(made, backend="aot_eager" if kind == "dit" else "eager", fullgraph=kind != "unet")
    with torch.no_grad():
        found = compiled(**arguments(made), return_dict=False)[0]
    torch.testing.assert_close(found, wide_output(made), rtol=0, atol=1e-6)
    short = reloaded(denoiser, cuts, tmp_path / "short", carried=True, dtype=torch.bfloat16).bfloat16()
    with applied(whole.bfloat16(), cuts):
        wanted = in_bfloat16(whole)
    assert torch.equal(in_bfloat16(short), wanted) and wanted.dtype == torch.bfloat16
    assert not torch.equal(wanted, in_bfloat16(whole)) and bool(wanted.isfinite().all())
    torch._dynamo.reset()


@torch.no_grad()
def in_bfloat16(denoiser: Any) -> torch.Tensor:
    short = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments(denoiser).items()
    }
    out: torch.Tensor = denoiser(**short, return_dict=False)[0]
    return out


def test_widths_of_large_models_are_those_of_an_inventory() -> None:
    """Layers, heads and units, counted beforehand and independently of this code."""
    for name, wanted in {"sdxl": [140, 2600, 70, 332_800], "flux": [57, 1368, 76, 933_888]}.items():
        found = widths(blueprints.load(name).denoiser)
        heads, units = ([w.count for w in found if w.what == what] for what in ("keep_heads", "keep_units"))
        assert [len(heads), sum(heads), len(units), sum(units)] == wanted


def test_prices_hold_the_products_of_attention() -> None:
    """Stable Diffusion 1.5 without weights: half of the heads of 4096 tokens, a quarter of a feed-forward, half of a ResNet."""
    gauge = Gauge(blueprints.load("sd15").denoiser)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    tokens, text, c = 4096, 77, 320
    prices = {
        cut(f"{block}.attn1", "heads", 0, 2, 4, 6): (4 * c * c // 2, (4 * tokens * c * c + 2 * tokens * tokens * c) // 2),
        cut(f"{block}.attn2", "heads", *range(6)): (
            2 * (c * c + 768 * c) // 4, (2 * tokens * c * c + 2 * text * 768 * c + 2 * tokens * text * c) // 4,
        ),
        cut(f"{block}.ff", "units", *range(960)): (320 * (2 * (c + 1) + c), tokens * 320 * 3 * c),
        cut("down_blocks.0.resnets.1", "channels", *range(160)): (160 * (2 * 9 * c + 1 + 1281 + 2), 160 * (tokens * 2 * 9 * c + 1280)),
    }  # fmt: skip
    for each, (params, macs) in prices.items():
        assert gauge.params_saved([each]) == params, each
        assert gauge.after([each]) == (gauge.params - params, gauge.macs - macs), each
    together = [sum(p) for p in zip(*prices.values(), strict=True)]
    assert gauge.after(list(prices)) == (gauge.params - together[0], gauge.macs - together[1])
    with applied(gauge.counted, [cut(f"{block}.attn1", "heads", 0, 2, 4, 6)]):  # and of skipping what is narrow already
        table = cost.count(gauge.counted, **gauge.example(1, "meta", torch.float32)).layers
    assert table[f"{block}.attn1"] * 2 == gauge.table.layers[f"{block}.attn1"]


def test_a_narrower_layer_takes_its_time() -> None:
    """The table of times says nothing of half a layer: it counts in full, with the operators in it that got narrower."""
    gauge = Gauge(cutting.shared("sd"))
    resnet, ff = "mid_block.resnets.0", f"{BLOCK}.ff"
    table = {resnet: 5.0, f"{resnet}.conv1": 2.0, f"{resnet}.norm1": 0.5, ff: 1.0, f"{BLOCK}.attn2": 1.5}
    narrow = (cut(resnet, "channels", *range(4)), cut(ff, "units", 1, 2))
    assert time_inside(gauge, table, narrow) == 0
    norm = Cut(address=f"{resnet}.norm1", what="remove", value="input")
    assert time_inside(gauge, table, (*narrow, norm, *remove(f"{BLOCK}.attn2"))) == 2.0
    assert time_inside(gauge, table, (*narrow, *remove("mid_block"))) == 5.0
