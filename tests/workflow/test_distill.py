"""The distill stage end to end, on the embedded models, small: what a run leaves, how it goes on, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lissom.core import artifact, export, models, processes
from lissom.core.artifact import Ancestor, Artifact, Manifest
from lissom.core.errors import UserError
from lissom.core.recipe import parse
from lissom.report.distill_schema import DistillReport
from lissom.tests.workflow import small
from lissom.workflow import _teaching, _training_data
from lissom.workflow.context import Context, Options, Silent
from lissom.workflow.describe import estimate, say
from lissom.workflow.run import rebuild, run
from PIL import Image
from safetensors.torch import load_file

PRUNE: dict[str, Any] = {"prune": "magnitude", "keep": 0.75, "measure": False, "latency_batches": []}
STAGE: dict[str, Any] = {
    "distill": "laptop", "iterations": 4, "batch": 4, "images": 6, "data_steps": 2, "learning_rate": 1e-3, "steps": 2,
}  # fmt: skip


def text(*stages: dict[str, Any], model: str = "zoo:fashion-dit", **more: Any) -> str:
    evaluate = {"metrics": ["fid", "accuracy"], "samples": 8}
    return json.dumps({"lissom": 1, "model": model, "evaluate": evaluate, "stages": list(stages), **more}, indent=1)


def distill(out: Path, recipe: str, *, resume: bool = False, progress: Any = None, options: Options | None = None) -> Artifact:
    parsed = parse(recipe, "r.yaml")
    context = Context(parsed, out.parent, options or Options(device="cpu"), progress or Silent())
    return run(context.recipe, recipe, out, context, resume=resume, single=len(parsed.stages) == 1)


def report(folder: Path) -> DistillReport:
    return DistillReport.model_validate_json((folder / "report.json").read_text())


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process: it takes eight seconds."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prune, then distill, as users have it. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    distill(folder, text(PRUNE, STAGE | {"check_every": 2, "check_samples": 4}))
    return folder


@pytest.fixture(scope="module")
def student(chain: Path) -> str:
    return str(chain / "01-prune-magnitude" / "model")


def test_what_a_run_leaves(chain: Path) -> None:
    folder = chain / "02-distill-laptop"
    found = report(folder)
    assert [scored.name for scored in found.scored] == ["teacher", "before", "after"]
    assert {m.metric for m in found.scored[2].measurements} == {"fid", "accuracy"}
    assert found.teacher == "zoo:fashion-dit" and found.params <= 0.75 * found.teacher_params
    assert found.losses == {"task": 1.0, "output": 1.0, "normalized_features": 1.0} and set(found.scales) == set(found.losses)
    assert len(found.sites["normalized_features"]) >= 6 and found.iterations == found.asked == 4
    assert [check.iteration for check in found.checks] == [2, 4] and found.check_label == "FD[zoo:judge] on 4 images"
    assert all((folder / str(check.sheet)).is_file() for check in found.checks)
    assert [line.iteration for line in found.curve] == [4] and found.data["images"] == 6
    assert not (folder / "checkpoint.pt").exists() and (folder / "losses.jsonl").is_file()
    assert (
        "FD[zoo:judge]" in (folder / "report.md").read_text().partition("\n")[0]
        and "<svg" in (folder / "report.html").read_text()
    )


def test_the_model_has_learned_and_is_saved_like_any_other(chain: Path) -> None:
    before, after = weights(chain / "01-prune-magnitude"), weights(chain / "02-distill-laptop")
    assert before.keys() == after.keys() and {t.dtype for t in before.values()} == {t.dtype for t in after.values()}
    assert any(not before[k].equal(after[k]) for k in before)
    made = artifact.manifest(chain / "02-distill-laptop" / "model")
    pruned = artifact.manifest(chain / "01-prune-magnitude" / "model")
    assert made is not None and pruned is not None
    assert made.cuts == () and made.opens == pruned.opens and made.made_by["distill"] == "laptop"
    assert made.chain[-1] == Ancestor(parent=pruned.parent, model_hash=pruned.model_hash, cuts=pruned.cuts, names=pruned.names)
    assert models.load(str(chain / "02-distill-laptop"), device="cpu").origin == "zoo:fashion-dit"
    card = (chain / "02-distill-laptop" / "model" / "README.md").read_text()
    assert "zoo:fashion-dit" in card and "distilled" in card


def test_a_finished_stage_is_not_run_again_and_its_pages_can_be(chain: Path) -> None:
    told = small.Watched()
    distill(chain, text(PRUNE, STAGE | {"check_every": 2, "check_samples": 4}), resume=True, progress=told)
    assert told.said == ["01-prune-magnitude: finished already", "02-distill-laptop: finished already"]
    page = chain / "02-distill-laptop" / "report.html"
    before = page.read_text()
    page.unlink()
    assert page in rebuild(chain) and page.read_text() == before


def test_a_second_pruning_finds_its_first_teacher(chain: Path, tmp_path: Path, unverified: None) -> None:
    """Names go through both prunings and the training between them."""
    model = str(chain / "02-distill-laptop")
    distill(tmp_path / "again", text(PRUNE | {"keep": 0.7}, model=model))
    folder, context = tmp_path / "again", Context(parse(text(STAGE, model=model), "r"), tmp_path, Options(device="cpu"))
    twice = _teaching.student_of(Artifact(ref=str(folder)), context)
    stage = context.recipe.stages[0]
    teacher = _teaching.teacher_of(stage, twice)  # type: ignore[arg-type]
    assert teacher.model.ref == "zoo:fashion-dit"
    pair = _teaching.pairing_of(twice, teacher)
    once = artifact.manifest(chain / "01-prune-magnitude" / "model")
    second = artifact.manifest(folder / "model")
    assert once is not None and second is not None
    gone = [a for a, new in once.names.items() if new is None]
    assert gone and not set(gone) & set(pair.origin.values())
    last = max(int(a.split(".")[1]) for a in pair.origin if a.startswith("transformer_blocks.") and a.count(".") == 1)
    assert pair.origin[f"transformer_blocks.{last}.ff"] == "transformer_blocks.11.ff" or last < 11
    previous = stage.model_copy(update={"teacher": "previous"})
    assert _teaching.teacher_ref(previous, twice) == second.parent  # type: ignore[arg-type]


def test_names_of_several_prunings_are_followed_from_the_teacher_on() -> None:
    chain = (
        Ancestor(parent="a", model_hash="A", cuts=(), names={"x": "y"}),
        Ancestor(parent="b", model_hash="B", cuts=(), names={"y": "z"}),
    )
    made = Manifest(parent="c", model_hash="C", stage="", names={"z": None}, chain=chain)
    assert _teaching._names(made, "A") == [{"x": "y"}, {"y": "z"}, {"z": None}]
    assert _teaching._names(made, "C") == [{"z": None}] and _teaching._names(made, "else") == []


class Killed(BaseException):
    pass


class Killer(Silent):
    """Ends the run while an iteration is reported."""

    def __init__(self, at: int) -> None:
        self.left = at

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        self.left -= note.startswith("loss")
        if not self.left:
            raise Killed


def test_a_killed_run_ends_where_the_other_did(
    student: str, tmp_path: Path, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lissom.distill._loop.SAVE_SECONDS", 0.0)
    recipe = text(STAGE | {"measure": False, "save_dtype": "float32"}, model=student)
    distill(tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        distill(tmp_path / "torn", recipe, progress=Killer(3))
    assert (tmp_path / "torn" / "checkpoint.pt").is_file()
    distill(tmp_path / "torn", recipe, resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "torn")
    assert all(a[k].equal(b[k]) for k in a)
    assert (tmp_path / "whole" / "losses.jsonl").read_text() == (tmp_path / "torn" / "losses.jsonl").read_text()


def test_the_teachers_images_are_made_once(
    student: str, tmp_path: Path, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text(STAGE | {"measure": False, "iterations": 1}, model=student)
    with pytest.raises(Killed):
        distill(tmp_path / "run", recipe, progress=Killer(1))
    made = sorted((tmp_path / "run" / "data").iterdir())
    stamps = [path.stat().st_mtime_ns for path in made]
    assert len(made) == 1 and len(load_file(made[0])["latents"]) == 6
    distill(tmp_path / "run", recipe, resume=True)
    assert [path.stat().st_mtime_ns for path in made] == stamps


def images(folder: Path, count: int = 4, captions: str = "label") -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", captions: i if captions == "label" else f"a photo of {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_of_images_with_their_labels(student: str, tmp_path: Path, unverified: None) -> None:
    source, told = images(tmp_path / "images"), small.Watched()
    (source / "2.png").write_bytes((source / "2.png").read_bytes()[:60])
    Image.new("RGB", (32, 32)).save(source / "unnamed.png")
    stage = STAGE | {"measure": False, "data": str(source), "flip": True, "check_every": 4}
    distill(tmp_path / "run", text(stage, model=student), progress=told)
    found = report(tmp_path / "run")
    assert found.data == {"data": str(source), "images": 4, "shown mirrored too": True}
    assert found.check_label == "weighted loss under other noise" and found.checks[0].value > 0
    assert any("1 images are not in metadata.jsonl" in text for text in told.warned)
    assert sum("2.png cannot be read; the next image takes its place" in text for text in told.warned) == 1


def refusal(tmp_path: Path, student: str, options: Options | None = None, **changes: Any) -> str:
    """The one sentence, and nothing is left behind."""
    with pytest.raises(UserError) as caught:
        distill(tmp_path / "refused", text(STAGE | {"measure": False} | changes, model=student), options=options)
    assert not (tmp_path / "refused" / "model").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_data_that_cannot_be_trained_on(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "cache"))
    plain = images(tmp_path / "plain")
    (plain / "metadata.jsonl").unlink()
    assert "DiTPipeline needs a class_labels for each. Put a metadata.jsonl" in refusal(tmp_path, student, data=str(plain))
    wrong = images(tmp_path / "wrong", captions="text")
    assert "0.png: its line in metadata.jsonl has no label or class_labels" in refusal(tmp_path, student, data=str(wrong))
    torn = images(tmp_path / "torn")
    (torn / "metadata.jsonl").write_text('{"file": 1}\n')
    assert "metadata.jsonl:1: expected" in refusal(tmp_path, student, data=str(torn))
    broken = images(tmp_path / "broken")
    for path in broken.glob("*.png"):
        path.write_bytes(b"no image")
    assert "none of its 4 images can be read" in refusal(tmp_path, student, data=str(broken))
    assert "python -m lissom.zoo.train --data-only" in refusal(tmp_path, student, data="zoo:fashion")
    assert "no such folder or file" in refusal(tmp_path, student, data=str(tmp_path / "nowhere"))


def test_teachers_that_do_not_fit(student: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, student, teacher="zoo:fashion")
    assert "has a transformer, zoo:fashion a unet" in said
    assert "nothing says what it was pruned from" in refusal(tmp_path, "zoo:fashion-dit")


def test_settings_that_make_no_sense_here(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "weights that learn are kept in float32" in refusal(tmp_path, student, Options(device="cpu", dtype="float16"))
    assert "trackers: wandb is not installed here" in refusal(tmp_path, student, trackers=["wandb"])
    assert "cannot be split evenly over 1 processes x accumulate 3" in refusal(tmp_path, student, accumulate=3)
    monkeypatch.setattr(processes, "count", lambda: 8)
    monkeypatch.setattr(processes, "team", lambda device: SimpleNamespace(device=device, tell=lambda words: None))
    assert "8 processes for 6 images" in refusal(tmp_path, student, batch=8)


def test_a_device_without_room_for_both_says_what_would_help() -> None:
    with pytest.raises(
        UserError, match=r"has 12.0 GiB; the student needs 9.3 GiB .*, the teacher 4.7 GiB.*--offload model would"
    ):
        _teaching.check_room(500_000_000, 2_500_000_000, "float16", 12 * 2**30, "cuda")
    with pytest.raises(UserError, match=r"the student needs 48.4 GiB.*several devices: `accelerate launch --use_fsdp"):
        _teaching.check_room(2_600_000_000, 2_600_000_000, "float16", 24 * 2**30, "cuda")
    _teaching.check_room(500_000_000, 800_000_000, "float16", 12 * 2**30, "cuda")


def test_gradient_checkpointing_and_another_teacher(student: str, tmp_path: Path, unverified: None) -> None:
    stage = STAGE | {"measure": False, "save_dtype": "float32", "iterations": 2}
    for name, more in (("plain", {}), ("again", {"checkpointing": True})):
        distill(tmp_path / name, text(stage | more, model=student))
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "again")
    assert all(a[k].equal(b[k]) for k in a)
    distill(tmp_path / "told", text(stage | {"teacher": student, "losses": {"output": 2.0}}, model=student))
    assert report(tmp_path / "told").scales == {"output": pytest.approx(0.0, abs=1e-10)}


def test_half_precision_trains_and_saves_full_weights(student: str, tmp_path: Path, unverified: None) -> None:
    stage = STAGE | {"measure": False, "save_dtype": "float32", "iterations": 2, "precision": "bf16"}
    distill(tmp_path / "run", text(stage, model=student))
    before, after = load_file(Path(student) / "transformer" / "diffusion_pytorch_model.safetensors"), weights(tmp_path / "run")
    moved = [(after[k] - before[k].float()).abs().max().item() for k in after]
    assert max(moved) > 1e-4 and all(np.isfinite(moved)) and {str(w.dtype) for w in after.values()} == {"torch.float32"}


def test_the_name_of_the_zoos_images_is_one() -> None:
    from lissom.zoo._data import ARCHIVE

    assert _training_data.FASHION == ARCHIVE


def test_an_estimate_trains_nothing(student: str, tmp_path: Path) -> None:
    context = Context(parse(text(STAGE, model=student), "r"), tmp_path, Options(device="cpu"))
    found = estimate(context.recipe, context)
    (stage,) = found["stages"]
    assert stage["samples"] == 16 and stage["teacher_images"] == 6 and stage["images"] == 24 and stage["weights_bytes"] > 1e6
    assert "taught by zoo:fashion-dit: 6 images of zoo:fashion-dit and 16 noised samples" in say(found)
