"""Weights from files to files: what is read, how it is split and named, and what the smaller model then is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import export, surgery, weights
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.files import write_text
from lissom.core.opening import open_cut
from lissom.core.weights import NAME, Reader, Source, files_of, rounded, variant_of, write
from lissom.tests.core import cutting
from lissom.tests.core.cutting import cut_output, keep, output, remove
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)]
EMPTY = [Cut(address="mid_block.attentions.0", what="replace", value="empty")]
CUTS: dict[str, list[Cut]] = {
    "sd": [*KEPT, *EMPTY],
    "pixels": [
        *remove("down_blocks.2.resnets.0"),
        Cut(address="mid_block.resnets.0", what="keep_channels", value=(0, 1, 2, 3, 8, 9, 10, 11)),
    ],
    "sd3": remove("transformer_blocks.2"),
    "sd3.5": remove("transformer_blocks.0", "transformer_blocks.3", "transformer_blocks.1.ff_context"),
    "flux": remove("transformer_blocks.0", "single_transformer_blocks.0"),
    "dit": remove("transformer_blocks.0"),
    "pixart": [
        Cut(address="transformer_blocks.0.ff", what="keep_units", value=(*range(10), 12, *range(90, 96))),
        Cut(address="transformer_blocks.1.attn2", what="keep_heads", value=(0, 2)),
    ],
    "wan": remove("blocks.0"),
}


def sources(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k: Source(k, v.shape) for k, v in tensors.items()}


def rewritten(parent: Path, folder: Path, cuts: Sequence[Cut], denoiser: Any, **options: Any) -> export.Structure:
    """The parent's files, cut, in another folder, with the config that opens them."""
    plan = export.structure(denoiser, cuts)
    folder.mkdir()
    with Reader(parent) as reader:
        write(plan.sources, reader, folder, **options)
    write_text(folder / "config.json", json.dumps({**plan.config, "_class_name": plan.cls}))
    return plan


@pytest.mark.parametrize("kind", CUTS)
def test_the_files_of_the_parent_become_those_of_the_cut_model(kind: str, tmp_path: Path) -> None:
    """Several parent files, several new ones; opened as diffusers does, without a key missing or left over."""
    denoiser = cutting.shared(kind)
    denoiser.save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    plan = rewritten(tmp_path / "parent", tmp_path / "made", CUTS[kind], denoiser, shard="25KB")
    assert len(files_of(tmp_path / "parent")) > 1 and len(files_of(tmp_path / "made")) > 1
    opened, info = open_cut(tmp_path / "made", output_loading_info=True) if plan.code else _stock(plan, tmp_path / "made")
    assert not any(info.values())
    torch.testing.assert_close(output(opened.eval()), cut_output(denoiser, CUTS[kind]), rtol=0, atol=1e-6)
    assert surgery.parameters(opened) == plan.params
    assert {k for f in files_of(tmp_path / "made") for k in load_file(f)} == set(opened.state_dict())


def _stock(plan: export.Structure, folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, plan.cls).from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_files_are_split_and_named_as_diffusers_does(variant: str | None, tmp_path: Path) -> None:
    unet = cutting.shared("sd")
    unet.save_pretrained(tmp_path / "theirs", max_shard_size="100KB", variant=variant)
    with Reader(tmp_path / "theirs") as reader:
        (tmp_path / "ours").mkdir()
        size = write(sources(unet.state_dict()), reader, tmp_path / "ours", variant=variant, shard="100KB")
    theirs, ours = ({p.name: p for p in (tmp_path / n).iterdir() if p.name != "config.json"} for n in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and variant_of(tmp_path / "ours") == variant
    assert size == sum(p.stat().st_size for p in files_of(tmp_path / "ours"))
    for name, path in ours.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(theirs[name].read_text())
            continue
        have, want = load_file(path), load_file(theirs[name])
        assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want)
        with safe_open(path, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_one_shard_at_a_time_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is on the disk before a tensor of the next one is read."""
    tensors = {f"t{i}": torch.full((256,), float(i)) for i in range(10)}
    (tmp_path / "parent").mkdir()
    save_file(tensors, tmp_path / "parent" / f"{NAME}.safetensors")
    seen: list[tuple[str, int]] = []
    read = Reader.get

    def get(self: Reader, key: str, rows: Any = (), columns: Any = ()) -> Tensor:
        seen.append((key, len(list(tmp_path.glob("made/*.safetensors")))))
        return read(self, key, rows, columns)

    monkeypatch.setattr(Reader, "get", get)
    (tmp_path / "made").mkdir()
    with Reader(tmp_path / "parent") as reader:
        write(sources(tensors), reader, tmp_path / "made", shard=3 * 1024)  # three tensors in each
    assert sorted(written for _, written in seen) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("dtype", weights.DTYPES.values())
def test_precision_is_the_parents_or_the_one_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whole numbers stay whole numbers; zeros that are made up are of the parent's type."""
    tensors = {"a": torch.randn(5, 3).half(), "b": torch.randn(4), "step": torch.tensor(7)}
    made_up = {"zeros": Source(None, torch.Size((2, 2))), "rows": Source("a", torch.Size((3, 3)), ((3, 5), (0, 1)))}
    wanted = {**sources(tensors), **made_up, "columns": Source("a", torch.Size((2, 2)), ((1, 3),), ((2, 3), (0, 1)))}
    (tmp_path / "parent").mkdir()
    save_file(tensors, tmp_path / "parent" / f"{NAME}.safetensors")
    for name, asked in (("kept", None), ("asked", dtype)):
        (tmp_path / name).mkdir()
        with Reader(tmp_path / "parent") as reader:
            write(wanted, reader, tmp_path / name, dtype=asked)
        made = load_file(tmp_path / name / f"{NAME}.safetensors")
        types = {"b": torch.float32, **dict.fromkeys(("a", "zeros", "rows", "columns"), torch.float16)}
        assert {k: v.dtype for k, v in made.items()} == {
            **(types if asked is None else dict.fromkeys(types, dtype)),
            "step": torch.int64,
        }
        assert torch.equal(made["a"], tensors["a"].to(made["a"].dtype)) and torch.equal(made["step"], tensors["step"])
        assert torch.equal(made["rows"], tensors["a"][[3, 4, 0]].to(made["rows"].dtype))
        assert torch.equal(made["columns"], tensors["a"][1:3][:, [2, 0]].to(made["columns"].dtype))
        assert not made["zeros"].any()


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        ([NAME], None),
        ([f"{NAME}.fp16"], "fp16"),
        ([f"{NAME}.fp16", NAME], None),
        ([f"{NAME}-00001-of-00002", f"{NAME}-00002-of-00002"], None),
        ([f"{NAME}.bf16-00001-of-00002", f"{NAME}.bf16-00002-of-00002"], "bf16"),
        (["model.fp16"], "fp16"),
        ([], None),
    ],
)
def test_a_variant_counts_where_no_plain_files_are_beside_it(names: list[str], variant: str | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    assert variant_of(tmp_path) == variant


def test_broken_files_of_the_parent_are_named(tmp_path: Path) -> None:
    unet = cutting.shared("sd")
    unet.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    first, *_ = files = files_of(tmp_path / "whole")
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(UserError, match=rf"{first.name}: broken or half-downloaded .* Fetch it again"),
        Reader(tmp_path / "whole"),
    ):
        raise AssertionError("opened")
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name}: missing, although {NAME}\.safetensors\.index\.json names it"):
        files_of(tmp_path / "whole")
    (tmp_path / "whole" / f"{NAME}.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json: not an index of weight files"):
        files_of(tmp_path / "whole")
    for file in tmp_path.glob("whole/*"):
        file.unlink()
    with pytest.raises(UserError, match=rf"whole: holds no {NAME}\.safetensors"):
        files_of(tmp_path / "whole")
    save_file({"other": torch.zeros(1)}, tmp_path / "whole" / f"{NAME}.safetensors")
    with (
        pytest.raises(UserError, match=r"safetensors: holds no conv_in.weight, which the model has"),
        Reader(tmp_path / "whole") as reader,
    ):
        write(sources(unet.state_dict()), reader, tmp_path)
    assert len(files) > 1 and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["sd", "sd3", "pixart"])
def test_rounded_weights_are_those_of_a_model_that_was_saved_in_that_type(kind: str) -> None:
    denoiser, alone = cutting.shared(kind), cutting.KINDS[kind]()
    whole = output(denoiser)
    alone.load_state_dict({k: v.to(torch.bfloat16).to(v.dtype) for k, v in denoiser.state_dict().items()})
    with rounded(denoiser, torch.bfloat16):
        assert torch.equal(output(denoiser), output(alone))
    assert not torch.equal(output(alone), whole) and torch.equal(output(denoiser), whole)
    with pytest.raises((TypeError, AttributeError)), rounded(denoiser, torch.bfloat16):
        denoiser(**(cutting.inputs(denoiser) | {"timestep": object()}))
    assert torch.equal(output(denoiser), whole)
