"""Where a cut model goes, what it replaces, and what its check in a fresh process says."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lissom.core import artifact, export, models, opening, reload_check
from lissom.core.errors import UserError
from lissom.core.models import Model
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import keep, output, remove

PAIR = [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)]
ALONE = remove("down_blocks.0.resnets.0")
CARD = {"parent": "here", "model_hash": "0", "stage": "0"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A pipeline whose files all carry a variant. Read only."""
    folder = tmp_path_factory.mktemp("models") / "parent"
    pipe = tiny.sd()
    pipe.register_modules(unet=cutting.sd())
    pipe.save_pretrained(folder, variant="fp16")
    return models.load(str(folder), device="cpu")


def save(model: Model, folder: Path, **options: Any) -> export.Saved:
    return export.save(model, PAIR, folder, cutting.inputs(model.denoiser), manifest=CARD, **options)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_verify", lambda *args: 0.0)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(("dtype", "own"), [(None, "fp16"), ("float16", None)])
def test_the_variant_that_a_reader_has_to_name_is_told(
    parent: Model, tmp_path: Path, dtype: str | None, own: str | None
) -> None:
    """That of the other components, too, where the denoiser's files have none."""
    saved = save(parent, tmp_path / "made", dtype=dtype)
    assert export.weights.variant_of(tmp_path / "made" / "unet") == own and saved.variant == "fp16"


@pytest.mark.usefixtures("unverified")
def test_where_no_file_has_a_variant_none_is_told(tmp_path: Path) -> None:
    tiny.ddim().save_pretrained(tmp_path / "parent")
    model = models.load(str(tmp_path / "parent"), device="cpu")
    cuts = remove("mid_block.resnets.0")
    saved = export.save(model, cuts, tmp_path / "made", cutting.inputs(model.denoiser), manifest=CARD)
    assert saved.variant is None


def test_what_is_not_ours_is_neither_replaced_nor_cut(parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    refused = {
        parent.folder: "is the model that is cut, or holds it",
        parent.folder.parent: "is the model that is cut, or holds it",
        tmp_path / "full": r"full: holds files but no lissom\.json, so that it is not replaced",
        tmp_path / "file": "is a file",
    }
    for folder, says in refused.items():
        for attempt in (export.check, save):
            with pytest.raises(UserError, match=says) as e:
                attempt(parent, folder)
            assert "\n" not in str(e.value)
    assert (tmp_path / "full" / "thesis.txt").is_file() and parent.folder.is_dir()
    export.check(parent, tmp_path / "empty")
    export.check(parent, tmp_path / "new" / "made")
    assert not (tmp_path / "new").exists()
    foreign: Any = SimpleNamespace(folder=parent.folder, denoiser=torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="Linear: the denoiser's class is not one of diffusers"):
        export.check(foreign, tmp_path / "empty")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("tidy", [True, False])
def test_whenever_a_replacement_is_cut_short_a_whole_model_is_there(
    parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tidy: bool
) -> None:
    """tidy: whether the process still gets to clear up behind it. If not, the next one does."""
    made, right, clear = tmp_path / "made", os.replace, export._restore
    save(parent, made)
    (made / "mark").touch()

    def cut_short(source: Any, target: Any) -> None:
        if Path(target) == made and Path(source).name.endswith(".partial"):
            monkeypatch.setattr(os, "replace", right)
            if not tidy:
                monkeypatch.setattr(export, "_restore", lambda *args: None)
            raise Killed
        right(source, target)

    monkeypatch.setattr(os, "replace", cut_short)
    with pytest.raises(Killed):
        save(parent, made)
    whole = made if tidy else tmp_path / ".made.before"
    assert [p.name for p in tmp_path.iterdir()] == [whole.name] and (whole / "mark").is_file()
    monkeypatch.setattr(export, "_restore", clear)
    if not tidy:  # what comes next and fails leaves the earlier model, too
        monkeypatch.setattr(export, "_write", lambda *args: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            save(parent, made)
        assert [p.name for p in tmp_path.iterdir()] == ["made"] and (made / "mark").is_file()
        monkeypatch.undo()
        monkeypatch.setattr(export, "_verify", lambda *args: 0.0)
    save(parent, made)
    assert [p.name for p in tmp_path.iterdir()] == ["made"] and not (made / "mark").exists()


FOUND = {"wrong": {}, "difference": 0.0, "device": "cpu", "parameters": 0, "lissom": []}


@pytest.mark.parametrize(
    ("code", "found", "says"),
    [
        (-9, {}, r"was killed, most likely because the memory was full\. Close other programs, or .* --dtype float16"),
        (137, {}, "was killed"),
        (1, {}, r"does not open in a fresh process \(RuntimeError: x\)"),
        (0, {"lissom": ["lissom.core"]}, r"opens only where lissom is installed \(it loads lissom\.core\)"),
        (0, {"difference": 2e-5}, r"something else .* at most 1e-05 is rounding"),
        (0, {"difference": float("nan")}, "something else"),
        (0, {"wrong": {"missing_keys": ["a"]}}, "does not match its config"),
    ],
)
def test_what_a_fresh_process_finds_is_said_in_one_sentence(
    parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, found: dict[str, Any], says: str
) -> None:
    params = export.structure(parent.denoiser, PAIR).params
    told = json.dumps({**FOUND, "parameters": params, **found}) if code == 0 else ""

    def ran(*args: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess([], code, told, "Traceback\nRuntimeError: x\n")

    monkeypatch.setattr(subprocess, "run", ran)
    with pytest.raises(UserError, match=says) as e:
        save(parent, tmp_path / "made")
    assert not list(tmp_path.iterdir()) and "\n" not in str(e.value)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("before", [True, False])
def test_outputs_are_compared_without_tf32_and_the_setting_comes_back(
    parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    usual = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = before
    seen: list[bool] = []
    here, there = parent.denoiser, torch.nn.Identity()
    hooks = [m.register_forward_hook(lambda *args: seen.extend(p.allow_tf32 for p in places)) for m in (here, there)]
    save(parent, tmp_path / "made")
    x = torch.ones(1)
    monkeypatch.setattr(there, "forward", lambda x, return_dict: (x,))
    assert reload_check.compared(there, {"dict": {"x": {"tensor": "0"}}}, {"0": x, "out": x}, "cpu") == (0.0, "cpu")
    after = [place.allow_tf32 for place in places]
    for hook in hooks:
        hook.remove()
    for place, value in zip(places, usual, strict=True):
        place.allow_tf32 = value
    assert seen == [False] * 4 and after == [before] * 2


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_single_precision_is_held_to_a_tight_bound_on_a_card_too(device: str) -> None:
    model: Any = SimpleNamespace(device=device, dtype="float32")
    assert export._limit(model, None, device) == export.SAME["float32"]
    assert export._limit(model, None, "cpu") == export.ELSEWHERE


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("links", ["symbolic", "hard", "none"])
def test_a_model_that_brings_its_class_along_opens_where_links_are_not_allowed(
    parent: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    """Its code is not run: the file is spoilt."""
    made = export.save(parent, ALONE, tmp_path / "made", cutting.inputs(parent.denoiser), manifest=CARD)
    assert made.structure.opens == "remote_code" and artifact.manifest(made.folder) is not None
    (code,) = made.folder.rglob("*.py")
    code.write_text("raise SystemExit")

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    if links != "symbolic":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    if links == "none":
        monkeypatch.setattr(opening.os, "link", refuse)
    again = models.load(str(made.folder), device="cpu")
    assert torch.equal(output(again.denoiser), cutting.cut_output(parent.denoiser, ALONE))
    assert {k: type(v) for k, v in again.pipe.components.items() if k != "unet"} == {
        k: type(v) for k, v in parent.pipe.components.items() if k != "unet"
    }
    assert torch.equal(again.pipe.vae.decoder.conv_in.weight, parent.pipe.vae.decoder.conv_in.weight)
