"""Narrower layers in files: written from the parent's rows and columns, opened without lissom, and cut again."""

import json
from pathlib import Path

import pytest
import torch
from lissom.core import artifact, export, models, surgery
from lissom.core.artifact import renamed
from lissom.core.models import Model
from lissom.core.surgery import applied
from lissom.core.weights import Source, files_of
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import cut_output, inputs, keep, output, remove
from lissom.tests.core.test_export import opened_elsewhere, save, written
from lissom.tests.core.test_widths import BLOCK, cut


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
