"""`lissom evaluate` below its command line: what is kept, what goes on, what is compared with what."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import sampling
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import UserError
from lissom.core.recipe import build
from lissom.report.evaluation import Evaluation
from lissom.tests.evaluate.judge import save_judge
from lissom.tests.workflow.small import Watched
from lissom.workflow._evaluation import Asked, evaluate
from lissom.workflow._gallery import Gallery
from lissom.workflow.context import Context, Options

SAMPLES, CHUNK = 12, 4


def context(chunk: int = CHUNK, model: str = "zoo:fashion", progress: Watched | None = None, **changes: Any) -> Context:
    settings = {"metrics": ["fid", "clip_score", "accuracy"], "samples": SAMPLES} | changes
    recipe = build({"lissom": 1, "model": model, "evaluate": settings, "stages": [{"search": "random_search"}]}, "test")
    return Context(recipe, Path.cwd(), Options(device="cpu", chunk=chunk), progress or Watched())


def measure(tmp: Path, asked: Asked | None = None, **changes: Any) -> Evaluation:
    return evaluate(asked or Asked("zoo:fashion", steps=2), context(**changes), tmp)


def values(found: Evaluation) -> dict[str, float]:
    return {m.metric: m.value for m in found.measurements}


def skipping() -> SamplingPlan:
    import diffusers
    from lissom.core import models

    scheduler = diffusers.DDIMScheduler.from_pretrained(models.ZOO / "fashion" / "scheduler")
    skip = ("down_blocks.0.resnets.0",)
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=(Step(timestep=999, skip=skip), Step(timestep=400)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    tmp = tmp_path_factory.mktemp("whole")
    return tmp, measure(tmp, Asked("zoo:fashion", steps=2, out=tmp / "base.json", pictures=5, power={"fid": 0.5}))


def test_what_is_left_behind(whole: tuple[Path, Evaluation]) -> None:
    tmp, found = whole
    assert Evaluation.parse((tmp / "base.json").read_text(), "x") == found
    assert sorted(p.name for p in (tmp / "base.images").iterdir()) == [*(f"{i:06}.png" for i in range(5)), "per-image.jsonl"]
    rows = [json.loads(line) for line in (tmp / "base.images" / "per-image.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(SAMPLES)) and rows[3]["caption"] == "a photo of a dress"
    clip = found.measured("clip_score")
    assert clip is not None and sum(row["clip_score"] for row in rows) / SAMPLES == pytest.approx(clip.value, abs=1e-6)
    assert (found.samples, found.what, found.denoiser_calls) == (SAMPLES, "stock schedule of 2 steps", 6)
    assert found.power[0].images > SAMPLES and found.images == "base.images"
    assert any("12 images for 64 features" in text and "biased upward" in text for text in found.warnings)
    assert '"label": "FD[zoo:judge]"' in (tmp / "base.json").read_text()


def test_the_batch_does_not_matter(whole: tuple[Path, Evaluation], tmp_path: Path) -> None:
    assert values(measure(tmp_path, chunk=7)) == pytest.approx(values(whole[1]), rel=1e-3)


def test_finished_work_is_not_done_again(whole: tuple[Path, Evaluation], monkeypatch: pytest.MonkeyPatch) -> None:
    tmp, found = whole
    monkeypatch.setattr(sampling.Sampler, "images", lambda *_, **__: pytest.fail("an image was made"))
    again = Asked("zoo:fashion", steps=2, out=tmp / "base.json", resume=True, power={"fid": 0.5})
    assert measure(tmp, again) == found
    with pytest.raises(UserError, match=r"base.json: is there already. Remove it, choose another --out, or add --resume"):
        measure(tmp, Asked("zoo:fashion", steps=2, out=tmp / "base.json"))
    with pytest.raises(UserError, match=r"base.json: holds an evaluation with another steps \(zoo:fashion, stock"):
        measure(tmp, Asked("zoo:fashion", steps=3, out=tmp / "base.json", resume=True))
    with pytest.raises(UserError, match="with another chunk"):  # which moves the last digits
        measure(tmp, Asked("zoo:fashion", steps=2, out=tmp / "base.json", resume=True), chunk=6)


def test_a_finished_evaluation_answers_more_questions_and_is_tidied(
    whole: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = tmp_path / "base.json"
    shutil.copy(whole[0] / "base.json", out)
    shutil.copytree(whole[0] / "base.images", tmp_path / "base.images")
    left = tmp_path / "base.images" / ".work"  # as a kill between the result and its end leaves it
    left.mkdir()
    (left / "identity.json").write_text("{}")
    monkeypatch.setattr(sampling.Sampler, "images", lambda *_, **__: pytest.fail("an image was made"))
    found = measure(tmp_path, Asked("zoo:fashion", steps=2, out=out, resume=True, power={"clip_score": 0.01}))
    assert [p.metric for p in found.power] == ["clip_score"] and Evaluation.parse(out.read_text(), "x") == found
    assert not left.exists() and (tmp_path / "base.images" / "000000.png").is_file()
    out.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="base.json: not a text file"):
        measure(tmp_path, Asked("zoo:fashion", steps=2, out=out, resume=True))


def test_pictures_of_an_earlier_evaluation_do_not_stay(tmp_path: Path) -> None:
    out, images = tmp_path / "p.json", tmp_path / "p.images"
    measure(tmp_path, Asked("zoo:fashion", steps=1, out=out, pictures=8))
    assert len(list(images.glob("*.png"))) == 8
    out.unlink()
    measure(tmp_path, Asked("zoo:fashion", steps=2, out=out, pictures=2))
    assert sorted(p.name for p in images.glob("*.png")) == ["000000.png", "000001.png"]


def test_kill_9_loses_the_batch_in_flight_and_nothing_else(whole: tuple[Path, Evaluation], tmp_path: Path) -> None:
    out = tmp_path / "killed.json"
    code = (
        "import sys, time; from pathlib import Path; from lissom.core import sampling; from lissom.tests.workflow import test_evaluation as t\n"
        "draw = sampling.Sampler._draw\n"
        "def slowly(self, plan, seeds, indices, *rest):\n"
        "    made = draw(self, plan, seeds, indices, *rest)\n"
        "    if indices.start == 8: time.sleep(600)\n"
        "    return made\n"
        "sampling.Sampler._draw = slowly\n"
        "t.measure(Path(sys.argv[1]).parent, t.Asked('zoo:fashion', steps=2, out=Path(sys.argv[1]), pictures=5, power={'fid': 0.5}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    work = tmp_path / "killed.images" / ".work"
    try:
        deadline = time.monotonic() + 120
        while len(list(work.glob("images-*.safetensors"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    with pytest.raises(UserError, match=r"killed.images: holds an evaluation that was interrupted. Add --resume"):
        measure(tmp_path, Asked("zoo:fashion", steps=2, out=out))
    with pytest.raises(UserError, match=r"holds an interrupted evaluation with another steps"):
        measure(tmp_path, Asked("zoo:fashion", steps=3, out=out, resume=True, power={"fid": 0.5}))
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("images-*")}
    watched = Watched()
    found = evaluate(
        Asked("zoo:fashion", steps=2, out=out, resume=True, pictures=5, power={"fid": 0.5}), context(progress=watched), tmp_path
    )
    assert len(before) == 2 and found.denoiser_calls == 6  # over both sessions
    assert [m.replicates for m in found.measurements] == [m.replicates for m in whole[1].measurements]
    assert not work.exists() and (tmp_path / "killed.images" / "000004.png").is_file()


def test_out_of_memory_halves_the_batch(
    whole: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, sizes = sampling.Sampler._draw, []

    def small(self: Any, plan: Any, seeds: Any, indices: range, *rest: Any) -> Any:
        sizes.append(len(indices))
        if len(indices) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, plan, seeds, indices, *rest)

    monkeypatch.setattr(sampling.Sampler, "_draw", small)
    assert values(measure(tmp_path, chunk=12)) == pytest.approx(values(whole[1]), rel=1e-3)
    assert sizes == [12, 6, 3, 3, 3, 3]


def test_nan_is_one_sentence_and_what_was_whole_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, out = sampling._pixels, tmp_path / "nan.json"

    def broken(made: Any, size: int, where: str) -> Any:
        return pixels(made * float("nan") if where == "images 8 to 11" else made, size, where)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="images 8 to 11: the pixels hold NaN"):
        patch.setattr(sampling, "_pixels", broken)
        measure(tmp_path, Asked("zoo:fashion", steps=2, out=out))
    assert len(list((tmp_path / "nan.images" / ".work").glob("images-*"))) == 2 and not out.exists()
    assert measure(tmp_path, Asked("zoo:fashion", steps=2, out=out, resume=True)).samples == SAMPLES


def test_fidelity_to_the_same_plan_without_skips(tmp_path: Path) -> None:
    found = measure(tmp_path, Asked("zoo:fashion", plan=skipping()), metrics=["fidelity", "macs"])
    assert set(values(found)) == {"fidelity", "ssim", "psnr", "latent_mse", "macs"}
    assert 0 < values(found)["fidelity"] < 2 and -1 < values(found)["ssim"] < 1 and values(found)["latent_mse"] > 0
    assert found.base == "zoo:fashion, a plan of 2 steps (999, 400)"
    labels = [m.label for m in found.measurements]
    assert labels == ["fidelity[zoo:judge]", "ssim", "psnr", "latent_mse", "macs"]  # only one of them looks through features
    assert all(m.seeds is not None and m.interval() is not None for m in found.measurements if not m.exact)


def test_a_model_is_wholly_faithful_to_itself(tmp_path: Path) -> None:
    found = measure(tmp_path, Asked("zoo:fashion", steps=2, base="zoo:fashion", out=tmp_path / "a.json"), metrics=["fidelity"])
    assert values(found) == pytest.approx({"fidelity": 0, "ssim": 1, "psnr": 100, "latent_mse": 0}, abs=1e-9)
    assert not list(tmp_path.glob("a.images/.work/*"))
    with pytest.raises(UserError, match=r"fidelity: zoo:fashion is the uncut model itself. Say with --base MODEL"):
        measure(tmp_path, metrics=["fidelity"])
    with pytest.raises(UserError, match="--base: no metric that was asked for compares with it; add fidelity"):
        measure(tmp_path, Asked("zoo:fashion", steps=2, base="zoo:fashion"))
    with pytest.raises(UserError, match="zoo:fashion-dit: has other prompts of its own"):
        measure(tmp_path, Asked("zoo:fashion", steps=2, base="zoo:fashion-dit"), metrics=["fidelity"])


def test_a_pruned_model_is_compared_with_its_parent(tmp_path: Path) -> None:
    from lissom.core.recipe import parse
    from lissom.workflow.run import run

    stage = {"prune": "magnitude", "keep": 0.8, "measure": False, "latency_batches": []}
    text = json.dumps({"lissom": 1, "model": "zoo:fashion-dit", "stages": [stage]})
    pruned = tmp_path / "pruned"
    run(parse(text, "r"), text, pruned, Context(parse(text, "r"), tmp_path, Options(device="cpu")), resume=False, single=True)
    asked = Asked(str(pruned), steps=2)
    metrics = ["fidelity", "fid", "params"]
    cache = tmp_path / "cache"
    found = evaluate(asked, context(model=str(pruned), metrics=metrics, reference="teacher", teacher_steps=3), cache)
    assert found.base.startswith("zoo:fashion-dit, stock schedule of 2 steps") and values(found)["fidelity"] > 0
    (statistics,) = cache.glob("teacher-report-*.safetensors")
    from lissom.evaluate._statistics import Statistics

    assert Statistics.load(statistics).provenance.source.startswith("teacher: zoo:fashion-dit, 3 steps")
    whole = evaluate(
        Asked("zoo:fashion-dit", steps=2), context(model="zoo:fashion-dit", metrics=["fid", "params"], reference="teacher", teacher_steps=3), cache
    )  # fmt: skip
    a, b = whole.measured("fid"), found.measured("fid")
    assert a is not None and b is not None and a.reference == b.reference and a.seeds == b.seeds
    assert values(found)["params"] < values(whole)["params"]


def test_numbers_of_the_machine_need_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gallery, "show", lambda *_: pytest.fail("a picture was made"))
    asked = Asked("zoo:fashion", steps=2, out=tmp_path / "m.json", settings={"latency": {"batches": [1, 3], "repeats": 4}})
    found = measure(tmp_path, asked, metrics=["params", "macs", "latency", "memory"])
    assert (found.samples, found.seeds, found.images, found.denoiser_calls) == (0, None, None, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json"]
    assert list(values(found)) == ["params", "macs", "latency", "latency_p90", "latency@3", "latency_p90@3", "memory"]
    latency = found.measured("latency@3")
    assert latency is not None and latency.n == 4 and latency.seeds is None and latency.conditions["batch"] == "3"
    assert {"device", "dtype", "threads", "compiled"} <= set(latency.conditions) and latency.settings == {
        "batches": [1, 3],
        "repeats": 4,
    }
    assert values(found)["latency@3"] > 0 and values(found)["memory"] > 10
    params = found.measured("params")
    assert params is not None and params.interval() == (params.value, params.value)


def test_each_metric_may_look_through_features_of_its_own(tmp_path: Path) -> None:
    judge = save_judge(tmp_path / "tiny-judge")
    pictures = tmp_path / "reference"
    pictures.mkdir()
    from PIL import Image

    for i in range(40):
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(pictures / f"{i}.png")
    features = {"default": f"local-dir:{judge}", "clip_score": "zoo:judge"}
    found = measure(tmp_path, features=features, reference=str(pictures), metrics=["fid", "clip_score"])
    assert [m.label for m in found.measurements] == ["FD[local-dir:tiny-judge]", "clip_score[zoo:judge]"]


def test_a_teacher_is_known_by_what_its_images_are_a_function_of(tmp_path: Path) -> None:
    """Other batches move single pixels, which is no other reference; other call arguments are."""

    def reference(chunk: int, **call: Any) -> str | None:
        given = context(chunk=chunk, metrics=["fid", "kid"], reference="teacher", teacher_steps=2)
        recipe = given.recipe.model_copy(update={"call": call})
        asked = Asked("zoo:fashion", steps=1)
        cache = tmp_path / f"{chunk}"  # kept statistics of other arguments are not taken
        found = evaluate(asked, Context(recipe, given.base, given.options, given.progress), cache)
        fid, kid = found.measurements
        assert fid.reference != kid.reference  # which depends on the kept images too
        return fid.reference

    assert reference(4) == reference(5) != reference(5, guidance_scale=3.0)


def test_the_base_says_what_fidelity_is_comparable_with_and_touches_nothing_else(tmp_path: Path) -> None:
    from lissom.core.gates import incomparable

    metrics = ["fid", "fidelity"]
    one = measure(tmp_path, Asked("zoo:fashion", steps=2, base="zoo:fashion"), metrics=metrics)
    two = measure(tmp_path, Asked("zoo:fashion", steps=1, base="zoo:fashion"), metrics=metrics)  # the base took one step too
    alone = measure(tmp_path, Asked("zoo:fashion", steps=2), metrics=["fid"])

    def both(metric: str, a: Evaluation, b: Evaluation) -> str | None:
        x, y = a.measured(metric), b.measured(metric)
        assert x is not None and y is not None
        return incomparable(x, y)

    assert both("fid", one, alone) is None and both("fid", one, two) is None
    assert "base (" in (both("psnr", one, two) or "") and both("psnr", one, one) is None


def test_what_is_not_to_go_on_is_refused_before_a_reference_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "e.json"
    measure(tmp_path, Asked("zoo:fashion", steps=1, out=out))
    teacher: dict[str, Any] = {"reference": "teacher", "teacher_steps": 2}
    monkeypatch.setattr("lissom.workflow._subject.Subject.views", lambda *_: pytest.fail("a reference was made"))
    with pytest.raises(UserError, match="is there already"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, out=out), **teacher)
    with pytest.raises(UserError, match="with another steps"):
        measure(tmp_path, Asked("zoo:fashion", steps=2, out=out, resume=True), **teacher)
    work = tmp_path / "w.images" / ".work"
    work.mkdir(parents=True)
    (work / "identity.json").write_text('{"steps": 7}')
    for resume, said in ((False, "Add --resume to go on with it"), (True, "interrupted evaluation with another")):
        with pytest.raises(UserError, match=said):
            measure(tmp_path, Asked("zoo:fashion", steps=1, out=tmp_path / "w.json", resume=resume))


def test_numbers_of_another_machine_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("zoo:fashion", steps=1, out=tmp_path / "m.json", settings={"latency": {"repeats": 4}}, resume=True)
    found = measure(tmp_path, asked, metrics=["latency"])
    assert measure(tmp_path, asked, metrics=["latency"]) == found
    monkeypatch.setattr("lissom.workflow._rig._processor", lambda: "another processor")
    with pytest.raises(UserError, match="holds an evaluation with another machine"):
        measure(tmp_path, asked, metrics=["latency"])


def test_images_are_kept_once_each(tmp_path: Path) -> None:
    """After a session whose batches were halved, and a damaged file that somebody removed."""
    gallery = Gallery(tmp_path, {"a": 1}, resume=False)
    for start, stop in ((0, 64), (64, 96), (96, 128)):
        gallery.add(range(start, stop), {"x": torch.arange(start, stop)})
    next(tmp_path.glob(".work/images-00000000-*")).unlink()
    again = Gallery(tmp_path, {"a": 1}, resume=True)
    assert again.done() == 0
    for start in (0, 64):
        again.add(range(start, start + 64), {"x": torch.arange(start, start + 64)})
    assert torch.cat([seen["x"] for _, seen in again.read()]).tolist() == list(range(128))
    assert again.slice(range(60, 70), "images")["x"].tolist() == list(range(60, 70))


def test_damaged_work_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "d.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gallery, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        measure(tmp_path, Asked("zoo:fashion", steps=1, out=out))
    out.unlink()
    batch = sorted((tmp_path / "d.images" / ".work").glob("images-*"))[1]
    batch.write_bytes(batch.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"{batch.name}: damaged .*Remove it: its images are then made again"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, out=out, resume=True))
    batch.unlink()
    assert measure(tmp_path, Asked("zoo:fashion", steps=1, out=out, resume=True)).samples == SAMPLES


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--power kid: kid is not measured here, only fid"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, power={"kid": 1.0}))
    with pytest.raises(UserError, match="no number of images makes params more certain"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, power={"params": 1.0}), metrics=["params"])
    with pytest.raises(UserError, match="settings for 'kid', which is not among the metrics"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, settings={"kid": {"x": 1}}))
    with pytest.raises(UserError, match="settings for fid: 3 belongs to none of them. Write fid.KEY=VALUE"):
        measure(tmp_path, Asked("zoo:fashion", steps=1, settings={"fid": 3}))  # type: ignore[dict-item]


def test_a_teacher_is_kept_image_by_image_and_paints_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of its own reference, it goes on; two extractors see the same pass."""
    judge = save_judge(tmp_path / "tiny-judge")
    out = tmp_path / "t.json"
    features = {"default": "zoo:judge", "kid": f"local-dir:{judge}"}
    settings: dict[str, Any] = {
        "metrics": ["fid", "kid"],
        "reference": "teacher",
        "teacher_steps": 2,
        "features": features,
        "samples": 128,
    }
    draw, drawn = sampling.Sampler._draw, []

    def counted(self: Any, plan: Any, seeds: Any, indices: range, *rest: Any) -> Any:
        if len(drawn) == 1 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        drawn.append((seeds.role, indices))
        return draw(self, plan, seeds, indices, *rest)

    monkeypatch.setattr(sampling.Sampler, "_draw", counted)
    cache = tmp_path / "t.images"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Asked("zoo:fashion", steps=1, out=out), context(chunk=64, **settings), cache)
    assert len(list(cache.glob("teacher-report-*.part"))) == 2
    (tmp_path / "go").touch()
    found = evaluate(Asked("zoo:fashion", steps=1, out=out, resume=True), context(chunk=64, **settings), cache)
    assert [role for role, _ in drawn] == ["calibrate"] * 2 + ["report"] * 2
    assert [m.label for m in found.measurements] == ["FD[zoo:judge]", "KD[local-dir:tiny-judge]"]
    drawn.clear()
    assert evaluate(Asked("zoo:fashion", steps=1, out=out, resume=True), context(chunk=64, **settings), cache) == found
    assert drawn == [] and not list(cache.glob("*.part")) and len(list(cache.glob("teacher-*.safetensors"))) == 2
    (tmp_path / "go").unlink()
    (tmp_path / "whole").mkdir()
    (tmp_path / "go").touch()
    whole = evaluate(Asked("zoo:fashion", steps=1), context(chunk=64, **settings), tmp_path / "whole")
    assert [m.reference for m in whole.measurements] == [m.reference for m in found.measurements]
    assert [m.value for m in whole.measurements] == pytest.approx([m.value for m in found.measurements])
