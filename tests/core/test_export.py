"""Saved models: opened without lissom, cut again, verified before they take their place, and gone if that fails."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lissom.core import artifact, export, models, stock, surgery
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.errors import DiskError, UserError
from lissom.core.files import write_text
from lissom.core.models import Model
from lissom.core.reload_check import compared, joined
from lissom.core.weights import NAME, files_of
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import cut_output, keep, output, remove
from safetensors.torch import load_file, save_file

PAIR = [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)]
ALONE = remove("down_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0.ff")
EMPTY = [Cut(address="up_blocks.2.attentions.0", what="replace", value="empty")]
CARD = {"parent": "here", "model_hash": "0", "stage": "0"}


def record(cuts: Sequence[Cut]) -> dict[str, Any]:
    return {**CARD, "cuts": [cut.plain() for cut in cuts]}


def save(model: Model, cuts: Sequence[Cut], folder: Path, **options: Any) -> export.Saved:
    return export.save(model, cuts, folder, cutting.inputs(model.denoiser), manifest=record(cuts), **options)


def written(model: Model, cuts: Sequence[Cut], folder: Path, **options: Any) -> Model:
    """As `save`, without the fresh process; opened again."""
    given = {"dtype": None, "variant": None, "shard": "5GB", **options}
    plan = export.structure(model.denoiser, cuts)
    export._write(model, plan, folder, **given)
    names = {"opens": plan.opens, "component": model.denoiser_name, "names": plan.names}
    write_text(folder / artifact.MANIFEST, json.dumps({**record(cuts), **names}))
    return models.load(str(folder), device="cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A pipeline in a folder. Read only."""
    folder = tmp_path_factory.mktemp("models") / "parent"
    pipe = tiny.sd()
    pipe.register_modules(unet=cutting.sd())
    pipe.save_pretrained(folder)
    (folder / "conditions.jsonl").write_text('{"prompt": "a shoe"}\n')
    return models.load(str(folder), device="cpu")


OPENER = """
import json, sys
import torch, diffusers
from safetensors.torch import load_file
job = json.load(sys.stdin)
held, found = load_file(job["inputs"]), {}
for name, (folder, options) in job["folders"].items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    with torch.no_grad():
        out = pipe.unet(**held).sample
    found[name] = type(pipe.unet).__name__, sum(p.numel() for p in pipe.unet.parameters()), out.flatten().tolist()
print(json.dumps({"found": found, "lissom": [m for m in sys.modules if m.split(".")[0] == "lissom"]}))
"""


def opened_elsewhere(folders: dict[str, tuple[Path, dict[str, Any]]], inputs: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What plain diffusers makes of folders, in a process without lissom."""
    save_file(inputs, scratch / "inputs.safetensors")
    job = {"inputs": str(scratch / "inputs.safetensors"), "folders": {k: (str(f), o) for k, (f, o) in folders.items()}}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    ran = subprocess.run(
        [sys.executable, "-c", OPENER], input=json.dumps(job), stdout=-1, text=True, env=environment, cwd=scratch, check=True
    )
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert answer["lissom"] == []
    return dict(answer["found"])


def test_saved_models_open_everywhere_and_can_be_cut_again(parent: Model, tmp_path: Path) -> None:
    """A stock one, one that brings its class along, and both again: with both cuts at once they compute the same."""
    (tmp_path / ".remote.partial" / "unet").mkdir(parents=True)  # what a killed process left
    (tmp_path / ".remote.partial" / "unet" / "config.json").write_text("{")
    before, unet = content(parent.folder), parent.denoiser
    saved = save(parent, ALONE, tmp_path / "remote")
    assert saved.structure.opens == "remote_code" and [p.name for p in tmp_path.iterdir()] == ["remote"]
    assert saved.difference < 1e-6 and saved.bytes == export.disk_size(saved.folder / "unet")
    stocked, remote = written(parent, PAIR, tmp_path / "stock"), models.load(str(tmp_path / "remote"), device="cpu")
    shorter = [keep("up_blocks.2", 0, 2), keep("down_blocks.0", 1)]
    steps: dict[str, tuple[Model, list[Cut], list[Cut]]] = {  # after which model, cuts in its addresses and in the parent's
        "stock, stock": (stocked, shorter, [*PAIR, *shorter]),
        "stock, remote": (stocked, remove("up_blocks.1.resnets.1"), [*PAIR, *remove("up_blocks.1.resnets.2")]),
        "remote, remote": (remote, [*PAIR, *EMPTY], [*ALONE, *PAIR, *EMPTY]),
        # the part of a pair that was cut alone goes with its slot, and the block that lost its feed-forward as a whole
        "remote, stock": (remote, [*shorter, *remove("mid_block")], [*ALONE, *shorter, *remove("mid_block")]),
    }
    opens = {name: name.rpartition(" ")[2] for name in ("stock", "remote", *steps)}
    wanted = {"stock": PAIR, "remote": ALONE, **{name: both for name, (_, _, both) in steps.items()}}
    for name, (model, cuts, both) in steps.items():
        again = written(model, cuts, tmp_path / name)
        plan = artifact.manifest(tmp_path / name)
        assert plan is not None and plan.opens == {"stock": "stock", "remote": "remote_code"}[opens[name]]
        assert torch.equal(output(again.denoiser), cut_output(model.denoiser, cuts)), name
        torch.testing.assert_close(output(again.denoiser), cut_output(unet, both), rtol=0, atol=1e-6)
        assert again.parameters - surgery.parameters(again.denoiser) == parent.parameters - surgery.parameters(unet)

    trust = {"stock": {}, "remote": {"trust_remote_code": True}}
    folders = {name: (tmp_path / name, trust[opens[name]]) for name in wanted}
    found = opened_elsewhere(folders, cutting.inputs(unet), tmp_path)
    for name, (cls, params, numbers) in found.items():
        assert cls == ("UNet2DConditionModel" if opens[name] == "stock" else "PrunedUNet2DConditionModel")
        torch.testing.assert_close(torch.tensor(numbers), cut_output(unet, wanted[name]).flatten(), rtol=0, atol=1e-6)
        with surgery.applied(unet, wanted[name]):
            assert params == surgery.parameters(unet)
    assert content(parent.folder) == before


def test_untouched_components_are_the_parents(parent: Model, tmp_path: Path) -> None:
    """Byte by byte. Weights may share the disk's blocks; a file that is edited in place never does."""
    written(parent, ALONE, tmp_path / "made")
    have, want = content(tmp_path / "made"), content(parent.folder)
    own = {f"unet/{NAME}.safetensors", "unet/config.json", "model_index.json"}
    assert {k for k in want if have.get(k) != want[k]} == own
    (code,) = {k for k in have if k not in want and k != artifact.MANIFEST}
    assert code.startswith("unet/pruned_") and code.endswith(".py")
    for name in want.keys() - own:
        shared = os.path.samefile(tmp_path / "made" / name, parent.folder / name)
        assert not shared or name.endswith(".safetensors"), name


@pytest.mark.parametrize("component", ["vae", "unet"])
def test_whoever_saves_over_a_pruned_model_leaves_its_parent_alone(parent: Model, tmp_path: Path, component: str) -> None:
    before = content(parent.folder)
    made = written(parent, PAIR, tmp_path / "made")
    for p in getattr(made.pipe, component).parameters():
        p.zero_()
    made.pipe.save_pretrained(tmp_path / "made")
    assert content(parent.folder) == before


@pytest.mark.parametrize("cuts", [PAIR, ALONE, [*PAIR, *EMPTY], [*PAIR, *remove("mid_block", "up_blocks.1.resnets.2")]])
def test_names_say_where_every_module_of_the_parent_is(parent: Model, tmp_path: Path, cuts: list[Cut]) -> None:
    made = written(parent, cuts, tmp_path / "made")
    manifest = artifact.manifest(tmp_path / "made")
    assert manifest is not None
    before, now = parent.denoiser.state_dict(), made.denoiser.state_dict()
    there = {old: new for old in before if (new := renamed(old, manifest.names)) is not None}
    assert all(torch.equal(now[new], before[old]) for old, new in there.items())
    assert len(set(there.values())) == len(there)
    made_up = now.keys() - there.values()
    assert made_up == ({k for k in now if k.startswith("up_blocks.2.attentions.0.proj_out")} if EMPTY[0] in cuts else set())
    assert not any(now[k].any() for k in made_up)
    for old, module in parent.denoiser.named_modules():  # modules without weights, too
        new = renamed(old, manifest.names)
        assert new is None or type(made.denoiser.get_submodule(new)).__name__.endswith(type(module).__name__), old


def test_names_of_blocks_that_become_others() -> None:
    """SD3's new last block loses the text's way out, and its text modulation is another one."""
    plan = export.structure(cutting.shared("sd3"), remove("transformer_blocks.0", "transformer_blocks.2"))
    lost = ("ff_context", "norm2_context", "attn.to_add_out", "norm1_context.linear")
    assert plan.names == {
        "transformer_blocks.0": None,
        "transformer_blocks.1": "transformer_blocks.0",
        **{f"transformer_blocks.1.{name}": None for name in lost},
        "transformer_blocks.2": None,
    }


def test_names_of_an_emptied_layer_are_those_of_what_it_lost() -> None:
    attention = EMPTY[0].address
    names = export.structure(cutting.shared("sd"), EMPTY).names
    assert names == {f"{attention}.transformer_blocks.0": None, f"{attention}.proj_out": None}


def test_a_stage_that_is_renumbered_takes_its_layers_along() -> None:
    cuts = remove("down_blocks.2", "down_blocks.1.downsamplers.0", "up_blocks.0")
    names = export.structure(cutting.shared("sd"), cuts).names
    assert names == {
        "down_blocks.2": None, "down_blocks.1.downsamplers.0": None, "up_blocks.0": None, "up_blocks.1": "up_blocks.0",
        "up_blocks.2": "up_blocks.1",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cuts", [PAIR, ALONE])
def test_other_precision_variant_and_shards(parent: Model, tmp_path: Path, cuts: list[Cut], dtype: str) -> None:
    short = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    made = written(parent, cuts, tmp_path / "made", dtype=dtype, variant=short, shard=100_000)
    files = files_of(tmp_path / "made" / "unet")
    assert len(files) > 1 and all(f".{short}-0000" in f.name for f in files)
    held = [load_file(f).values() for f in files]
    assert {t.dtype for tensors in held for t in tensors} == {getattr(torch, dtype)}
    assert all(sum(t.nbytes for t in tensors) <= 100_000 for tensors in held)
    with export.weights.rounded(parent.denoiser, getattr(torch, dtype)):
        expected = cut_output(parent.denoiser, cuts)
    torch.testing.assert_close(output(made.denoiser), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_parent_in_half_precision_keeps_it(tmp_path: Path, sharded: bool) -> None:
    """Loaded in single precision, it is not blown up on the disk; its variant goes on, and opens with the other components'."""
    pipe = tiny.sd()
    pipe.register_modules(unet=cutting.sd())
    pipe.to(torch.float16).save_pretrained(tmp_path / "parent", variant="fp16", max_shard_size="100KB" if sharded else "10GB")
    model = models.load(str(tmp_path / "parent"), device="cpu")
    folder = Path("made")  # relative to where we are, which the fresh process is not
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        saved = save(model, PAIR, folder) if sharded else None
        made = models.load("made", device="cpu") if sharded else written(model, PAIR, tmp_path / "made", variant="fp16")
    finally:
        os.chdir(here)
    (file,) = files_of(tmp_path / "made" / "unet")
    assert file.name == f"{NAME}.fp16.safetensors" and {t.dtype for t in load_file(file).values()} == {torch.float16}
    assert torch.equal(output(made.denoiser), cut_output(model.denoiser, PAIR))
    assert saved is None or saved.difference < 1e-6


def test_what_differs_in_a_fresh_process_is_not_saved(parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of one shape, mixed up: names and shapes fit, and the fresh process tells."""
    right = stock.express

    def wrong(denoiser: Any) -> Any:
        found = right(denoiser)
        assert isinstance(found, stock.Stock)
        swap = {"up_blocks.1.attentions.0": "up_blocks.1.attentions.1", "up_blocks.1.attentions.1": "up_blocks.1.attentions.0"}
        found.parts.update({k: found.parts[renamed(k, swap)] for k in found.parts if renamed(k, swap) != k})
        return found

    monkeypatch.setattr(stock, "express", wrong)
    with pytest.raises(UserError, match="a fresh process computes something else than this one") as e:
        save(parent, PAIR, tmp_path / "made")
    assert not list(tmp_path.iterdir()) and "\n" not in str(e.value)


def test_a_failure_leaves_an_earlier_model_as_it_was(parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(parent, PAIR, tmp_path / "made")
    before = content(tmp_path)

    def refuse(*args: Any) -> float:
        assert (tmp_path / ".made.partial" / "model_index.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_verify", refuse)
    with pytest.raises(KeyboardInterrupt):
        save(parent, ALONE, tmp_path / "made")
    assert content(tmp_path) == before
    monkeypatch.setattr(export, "_verify", lambda *args: 0.0)
    save(parent, ALONE, tmp_path / "made")
    assert content(tmp_path)["made/unet/config.json"] != before["made/unet/config.json"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_broken_parent_is_named_and_nothing_is_written(parent: Model, tmp_path: Path, sharded: bool) -> None:
    """Files that broke after the model was loaded; at loading, `check_folder` says the same."""
    folder = Path(shutil.copytree(parent.folder, tmp_path / "parent"))
    if sharded:
        shutil.rmtree(folder / "unet")
        parent.denoiser.save_pretrained(folder / "unet", max_shard_size="100KB")
    model = models.load(str(folder), device="cpu")
    file = files_of(folder / "unet")[-1]
    file.write_bytes(file.read_bytes()[:-5])
    for attempt in (lambda: save(model, PAIR, tmp_path / "out" / "made"), lambda: models.load(str(folder), device="cpu")):
        with pytest.raises(UserError, match=rf"{file.name}: broken or half-downloaded \(.*\)\. Fetch it again\.") as e:
            attempt()
        assert "\n" not in str(e.value)
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_a_model_that_is_no_use_or_not_plain_is_refused_before_anything_is_written(parent: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be saved as a model that plain diffusers opens: down_blocks.0.resnets.0"):
        save(parent, ALONE, tmp_path / "made", plain_only=True)
    with pytest.raises(surgery.CannotCut, match="do not fit together"):
        save(parent, PAIR[:1], tmp_path / "made")
    probe = cutting.inputs(parent.denoiser)
    nothing = {**probe, "sample": torch.full_like(probe["sample"], float("nan"))}
    with pytest.raises(UserError, match="holds NaN or infinity, so it was not saved"):
        export.save(parent, PAIR, tmp_path / "made", nothing, manifest=CARD)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is the model that is cut"):
        save(parent, PAIR, parent.folder)


def test_arguments_cross_to_another_process_whole() -> None:
    tensors = {"out": torch.zeros(1)}
    given = {"x": torch.randn(2), "more": {"pair": (torch.ones(1), None), "list": [1, "a", [torch.zeros(3)]]}, "flag": True}
    back = joined(json.loads(json.dumps(export._parted(given, tensors))), tensors, "cpu")
    assert str(back) == str(given) and torch.equal(back["x"], given["x"])
    with pytest.raises(UserError, match="a device in the denoiser's arguments cannot be handed"):
        export._parted({"x": torch.device("cpu")}, {})


def test_a_full_graphics_card_leaves_the_comparison_to_the_cpu() -> None:
    class Large(torch.nn.Linear):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            if device == "meta":
                raise torch.OutOfMemoryError
            return self

        def forward(self, x: torch.Tensor, return_dict: bool) -> Any:  # type: ignore[override]
            return (super().forward(x),)

    model, x = Large(3, 2), torch.randn(4, 3)
    held = {"0": x, "out": torch.nn.functional.linear(x, model.weight, model.bias).detach()}
    assert compared(model, {"dict": {"x": {"tensor": "0"}}}, held, "meta") == (0.0, "cpu")


def test_only_what_the_pipeline_is_made_of_is_carried_over(parent: Model, tmp_path: Path) -> None:
    """No pickles, no checkpoint of the whole parent for other programs, no folders that the index does not name."""
    folder = Path(shutil.copytree(parent.folder, tmp_path / "parent"))
    for name in (
        "v1.safetensors",
        "v1.ckpt",
        "vae/diffusion_pytorch_model.bin",
        "extra/notes.txt",
        ".cache/x",
        "LICENSE.md",
        "README.md",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "text_encoder" / "deep").mkdir()
    (folder / "text_encoder" / "deep" / "merges.txt").touch()
    before = set(content(parent.folder))
    written(models.load(str(folder), device="cpu"), PAIR, tmp_path / "made")
    assert set(content(tmp_path / "made")) == {*before, "LICENSE.md", "text_encoder/deep/merges.txt", artifact.MANIFEST}


def test_a_full_disk_is_said_in_one_sentence(parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that writes the weights has errors of its own, with the system's in their text."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\)"):
        save(parent, PAIR, tmp_path / "made")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny.dit().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saved", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("loaded", ["float32", "float16", "bfloat16"])
def test_what_counts_as_rounding(classes: Path, tmp_path: Path, loaded: str, saved: str | None) -> None:
    """Where both processes hold the same numbers nothing differs; elsewhere no more than two kinds of rounding can do."""
    model = models.load(str(classes), device="cpu", dtype=loaded)
    kind = getattr(torch, loaded)
    inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in cutting.inputs(model.denoiser).items()}
    cuts = remove("transformer_blocks.1")
    as_saved = export.weights.rounded(model.denoiser, getattr(torch, saved or "float32"))
    with torch.no_grad(), surgery.applied(model.denoiser, cuts), as_saved:
        expected = model.denoiser(**inputs).sample
    made = written(model, cuts, tmp_path / "made", dtype=saved)
    again = models.load(str(made.folder), device="cpu", dtype=loaded)
    with torch.no_grad():
        difference = float((again.denoiser(**inputs).sample - expected).abs().max() / expected.abs().max())
    limit = export._limit(model, saved, "cpu")
    assert difference <= (1e-6 if limit < export.ROUNDED else limit)
    assert (limit == export.ROUNDED) == ({loaded, saved} == {"float16", "bfloat16"})
