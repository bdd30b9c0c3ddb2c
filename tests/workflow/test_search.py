"""A search from end to end on the embedded models, with tiny numbers."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lissom.core.artifact import read_plan
from lissom.core.candidate import SamplingPlan, Seeds
from lissom.core.errors import UserError
from lissom.core.sampling import SamplingError
from lissom.tests.workflow import small
from lissom.workflow import _report
from lissom.workflow._evaluator import Evaluator
from lissom.workflow.context import Options
from lissom.workflow.run import rebuild
from PIL import Image

TRIALS = small.STAGE["trials"]


def test_exactly_the_asked_number_of_candidates_beside_the_fixed_schedules(finished: Path) -> None:
    found, kept = small.report(finished), small.studies(finished)
    origins = [t["origin"] for t in found["candidates"]]
    fixed = [o for o in origins if o.startswith("fixed: ")]
    assert sorted(fixed) == ["fixed: leading", "fixed: linspace", "fixed: quadratic", "fixed: trailing"]
    assert len(origins) - len(fixed) == TRIALS
    assert sorted(b["name"] for b in found["baselines"]) == ["leading", "linspace", "quadratic", "trailing"]
    assert len(kept["rescore"]) == small.STAGE["rescore"] + 1  # and the best fixed schedule


def test_the_seeds_of_the_roles_never_meet(finished: Path) -> None:
    seen: dict[str, set[int]] = {}
    for name, trials in small.studies(finished).items():
        blocks = {json.dumps(json.loads(t.user_attrs["request"])["seeds"], sort_keys=True) for t in trials}
        (block,) = blocks  # the same images for every candidate
        seen[name] = set(Seeds.model_validate_json(block).values())
    assert [len(seen[n]) for n in ("search", "rescore", "report")] == [4, 4, 8]
    assert len(set.union(*seen.values())) == 16


def test_the_report_shows_a_metric_that_was_not_optimised_and_compares_with_the_best_fixed_schedule(finished: Path) -> None:
    found = small.report(finished)
    values = {m["metric"]: m for m in found["winner"]["measurements"]}
    assert set(values) == {"fid", "accuracy"} and found["objective"] == "fid"
    by_name = {b["name"]: next(m["value"] for m in b["measurements"] if m["metric"] == "fid") for b in found["baselines"]}
    assert by_name[found["best_fixed"]] == min(by_name.values())
    assert found["ratio"]["value"] == pytest.approx(min(by_name.values()) / values["fid"]["value"])
    assert values["fid"]["reference"] != found["winner"]["rescored"]["reference"]  # test images against training images
    assert len(values["fid"]["replicates"]) == 40


def test_the_winner_is_the_best_of_the_elites_on_fresh_seeds(finished: Path) -> None:
    found = small.report(finished)
    again = [row for row in found["candidates"] if row.get("rescored") is not None]
    best = min(again, key=lambda row: row["rescored"])
    assert read_plan(finished) == SamplingPlan.model_validate(best["plan"])
    assert found["winner"]["rescored"]["value"] == best["rescored"]


def test_what_it_cost_is_counted(finished: Path) -> None:
    spent, kept = small.report(finished)["spent"], small.studies(finished)
    results = [json.loads(t.user_attrs["result"]) for trials in kept.values() for t in trials]
    assert spent["evaluations"] == len(results) == sum(small.evaluated(finished).values())
    assert spent["plain_calls"] == len(results) * small.STAGE["steps"]  # every evaluation is one chunk here
    assert spent["calls"] == sum(r["calls"] for r in results) < spent["plain_calls"]


def test_shared_prefixes_change_no_value(finished: Path, tmp_path: Path) -> None:
    small.search(tmp_path / "cold", options=Options(device="cpu", memo_mib=0))
    cold, warm = small.report(tmp_path / "cold"), small.report(finished)
    assert [row.get("value") for row in cold["candidates"]] == [row.get("value") for row in warm["candidates"]]
    assert cold["winner"]["measurements"] == warm["winner"]["measurements"]
    assert cold["spent"]["calls"] == cold["spent"]["plain_calls"] == warm["spent"]["plain_calls"]


def test_reports_are_rebuilt_from_the_trials_alone(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / finished.name))
    before = {name: (copy / name).read_bytes() for name in ("report.json", "report.md", "trials.journal")}
    for name in ("report.json", "report.md", "report.html", "lissom.json", "plan.json"):
        (copy / name).unlink()
    assert rebuild(copy) == [copy / "report.html"]
    assert before == {name: (copy / name).read_bytes() for name in before}


def test_reproduce_draws_the_same_images_and_needs_no_lissom(finished: Path, tmp_path: Path) -> None:
    """The script is run where lissom cannot be imported."""
    run = (
        "import runpy, sys; sys.modules['lissom'] = None; sys.argv = ['reproduce.py', '--save', 'pixels.npy', '--out', 'sheet.png'];"
        f"runpy.run_path({str(finished / 'reproduce.py')!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True, capture_output=True)
    drawn = np.load(tmp_path / "pixels.npy").astype(np.float64)
    scale = 255 if drawn.max() > 1 else 1
    sheet = np.asarray(Image.open(finished / "samples" / "searched.png").convert("RGB"), dtype=np.float64)
    for i, image in enumerate(drawn):  # one row of eight pictures of 32 pixels and a gap of 1
        shown = sheet[:32, 33 * i : 33 * i + 32] / 255
        assert np.abs(image.reshape(shown.shape) / scale - shown).max() <= 0.5 / 255 + 1e-4


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "score", small.pretended)


def test_a_budget_gives_a_plan_within_it_with_skips(tmp_path: Path) -> None:
    """On the transformer, whose blocks all cost the same."""
    small.search(tmp_path / "run", small.text("zoo:fashion-dit", budget={"macs": 0.9}))
    found = small.report(tmp_path / "run")
    assert found["winner"]["macs_ratio"] <= 0.9 + 1e-9
    assert sum(len(step.skip) for step in read_plan(tmp_path / "run").steps) >= 2  # a tenth of two steps of twelve blocks
    assert all(b["macs_ratio"] == 1 for b in found["baselines"])


def test_an_impossible_budget_names_the_cheapest_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"budget macs=0\.01: cannot be met with 2 steps; the cheapest candidate, which .* costs 0\.\d+"
    ):
        small.search(tmp_path / "run", small.text(budget={"macs": 0.01}))
    assert not (tmp_path / "run").exists()


def failing(every: int, kind: type[Exception] = SamplingError) -> Any:
    """An evaluator that fails now and then."""
    calls = 0

    def score(self: Any, plan: Any, seeds: Seeds, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if seeds.role == "search" and calls % every == 0:
            raise kind("the samples hold NaN\nor infinity")
        return small.pretended(self, plan, seeds, **rest)

    return score


@pytest.mark.parametrize("kind", [SamplingError, RuntimeError, ValueError, IndexError, ZeroDivisionError])
def test_failing_candidates_are_recorded_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(Evaluator, "score", failing(3, kind))
    watched = small.Watched()
    small.search(tmp_path / "run", progress=watched)
    found = small.report(tmp_path / "run")
    failed = [row for row in found["candidates"] if row["state"] == "failed"]
    assert len(failed) == 3 == len(watched.warned) and len(found["candidates"]) == TRIALS + small.FIXED
    assert all(row["error"] == f"{kind.__name__}: the samples hold NaN or infinity" for row in failed)
    assert "3 evaluations failed; the table of candidates names the errors." in found["warnings"]


def test_images_that_are_not_numbers_fail_their_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the denoiser on: the sampler notices."""
    from diffusers import AutoencoderKL

    decode, calls = AutoencoderKL.decode, 0

    def broken(self: Any, latents: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(self, latents * (float("nan") if calls in (6, 8) else 1), *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", broken)
    small.search(tmp_path / "run", small.text(trials=4))
    errors = [row["error"] for row in small.report(tmp_path / "run")["candidates"] if row["state"] == "failed"]
    assert len(errors) == 2 and all(e.startswith("SamplingError: images 0 to 3: the pixels hold NaN") for e in errors)


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("search", r"all candidates failed \(6 of 6\), the first with: SamplingError: broken"),
        ("rescore", r"all candidates failed \(3 of 3\), the first with: SamplingError: broken"),
        ("report", r"the winner failed on the report's seeds: SamplingError: broken"),
    ],
)
def test_where_all_fail_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, says: str) -> None:
    def score(self: Any, plan: Any, seeds: Seeds, **rest: Any) -> Any:
        if seeds.role == role:
            raise SamplingError("broken.")
        return small.pretended(self, plan, seeds, **rest)

    monkeypatch.setattr(Evaluator, "score", score)
    with pytest.raises(UserError, match=says) as e:
        small.search(tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "plan.json").exists()
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    if role == "search":  # the method has gone on from its failures already: they stand
        with pytest.raises(UserError, match=says):
            small.search(tmp_path / "run", resume=True)
    else:  # the device is free again
        small.search(tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "plan.json").is_file() and not small.report(tmp_path / "run")["warnings"]


def test_what_a_failed_candidate_cost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(self: Any, plan: Any, seeds: Seeds, **rest: Any) -> Any:
        self.sampler.calls += 3
        self.sampler.served += 2
        if seeds.role == "search" and len(calls := self.__dict__.setdefault("seen", [])) < 6:
            calls.append(plan)
        elif seeds.role == "search":
            raise SamplingError("broken.")
        return small.pretended(self, plan, seeds, **rest)

    monkeypatch.setattr(Evaluator, "score", score)
    small.search(tmp_path / "run")
    trials = small.studies(tmp_path / "run")["search"]
    failed = [json.loads(t.user_attrs["result"]) for t in trials if t.state.name == "FAIL"]
    assert failed and all((t["calls"], t["plain_calls"]) == (3, 5) for t in failed)


def test_a_fixed_schedule_may_win_and_is_then_not_called_a_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(self: Any, plan: Any, seeds: Seeds, **rest: Any) -> Any:
        found = small.pretended(self, plan, seeds, **rest)
        if plan.timesteps == (999.0, 0.0):  # linspace
            halves = tuple(0.5 + i / 1000 for i in range(40))
            best = found.measurements[0].model_copy(update={"value": 0.5, "replicates": halves})
            return small.Score((best, found.measurements[1]), 2, 2, 0.0)
        return found

    monkeypatch.setattr(Evaluator, "score", score)
    small.search(tmp_path / "run")
    found = small.report(tmp_path / "run")
    assert found["best_fixed"] == "linspace" and found["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert len(found["baselines"]) == small.FIXED


def test_no_time_at_all_is_said_and_can_be_mended(tmp_path: Path, pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--max-time ended the search after 0 candidates"):
        small.search(tmp_path / "run", options=Options(device="cpu", max_time=0.0))
    small.search(tmp_path / "run", resume=True)
    assert len(small.report(tmp_path / "run")["candidates"]) == TRIALS + small.FIXED


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "train"  # a name that means something to zoo: references only
    folder.mkdir()
    drawn = np.random.default_rng(0).integers(0, 256, (24, 20, 32, 3), dtype=np.uint8)
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the report is really evaluated, which is where a reference shows."""
    real = Evaluator.score

    def score(self: Any, plan: Any, seeds: Seeds, **rest: Any) -> Any:
        return (real if seeds.role == "report" else small.pretended)(self, plan, seeds, **rest)

    monkeypatch.setattr(Evaluator, "score", score)
    yield


def test_reference_images_are_split_between_search_and_report(tmp_path: Path, pictures: Path, few: None) -> None:
    small.search(tmp_path / "folder", small.text(evaluate={"reference": str(pictures)}))
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for picture in pictures.iterdir():
            z.write(picture, picture.name)
    small.search(tmp_path / "zip", small.text(evaluate={"reference": str(archive)}))
    one, two = (small.report(tmp_path / name) for name in ("folder", "zip"))
    assert one["winner"]["measurements"][0]["reference"] == two["winner"]["measurements"][0]["reference"]
    assert not any("same reference images" in w for w in one["warnings"])
    kept = next((tmp_path / "folder").glob("reference-report-*.safetensors"))
    small.search(tmp_path / "file", small.text(evaluate={"reference": str(kept)}))
    three = small.report(tmp_path / "file")
    assert three["winner"]["measurements"][0]["reference"] == one["winner"]["measurements"][0]["reference"]
    assert any("same reference images" in w for w in three["warnings"])  # statistics cannot be split


def test_the_models_own_images_may_be_the_reference(tmp_path: Path, few: None) -> None:
    small.search(tmp_path / "run", small.text(evaluate={"reference": "teacher", "teacher_steps": 3}))
    found = small.report(tmp_path / "run")
    assert found["reference"]["report"].startswith("teacher")
    made = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "run").glob("teacher-*.safetensors"))
    assert made == ["teacher-report", "teacher-search"]


def test_a_reference_too_small_for_the_report_is_refused_before_any_work(tmp_path: Path, pictures: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(pictures / "0.png", one)
    (one / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 of its 2 images can be read, a reference needs at least 2"):
        small.search(tmp_path / "run", small.text(evaluate={"reference": str(one)}))
    assert not list((tmp_path / "run").glob("trials*")) and not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 2000}, "--steps 2000: DDIMScheduler was trained with 1000 timesteps"),
        ({"scheduler": "PNDMScheduler"}, "cannot follow a plan with PNDMScheduler"),
        ({"scheduler": "DDIMSchedulr"}, "diffusers has no such class. Did you mean 'DDIMScheduler'"),
        (
            {"objective": "accurcy"},
            "is not among what is measured, fid, accuracy, nor a cost .*, macs, latency, params. Did you mean 'accuracy'",
        ),
        ({"evaluate": {"metrics": ["fid"]}}, "fid alone is what the search optimises"),
        ({"evaluate": {"metrics": ["fid", "niqe"]}}, "no method 'niqe' in evaluate/"),
        ({"evaluate": {"features": "zoo:jury"}}, "no features 'zoo:jury'; .* Did you mean 'zoo:judge'"),
        ({"evaluate": {"reference": "zoo:shoes"}}, "no reference 'zoo:shoes'"),
        ({"evaluate": {"reference": "nowhere"}}, "nowhere: no such folder or file"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_work_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as e:
        small.search(tmp_path / "run", small.text(**changes))
    assert e.value.exit_code == 2 and "\n" not in str(e.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"class_labels": 3}', "takes no 'class_labels'; it is told what to paint by prompt"),
        ('{"label": 3}', "needs a prompt for every image, the rows hold label"),
    ],
)
def test_prompts_that_do_not_fit_the_pipeline_are_refused(tmp_path: Path, rows: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(rows)
    data = json.loads(small.text()) | {"prompts": "p.jsonl"}
    with pytest.raises(UserError, match=rf"p\.jsonl: StableDiffusionPipeline {says}"):
        small.search(tmp_path / "run", json.dumps(data))


def test_other_weights_than_the_recipes_are_refused(tmp_path: Path) -> None:
    data = json.loads(small.text()) | {"model_hash": "0" * 64}
    with pytest.raises(UserError, match="its weights have the hash .* the recipe is for 0000000000000000"):
        small.search(tmp_path / "run", json.dumps(data))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be written \(No space left on device\)") as e:
        patch.setattr(_report.html, "render", lambda *a: patch.setattr("os.fsync", full) or "")
        small.search(tmp_path / "run")
    assert e.value.exit_code == 1 and not (tmp_path / "run" / "lissom.json").exists()
    small.search(tmp_path / "run", resume=True)
    assert set(small.evaluated(tmp_path / "run").values()) == {1}


def test_two_stages_run_in_their_own_folders_and_only_once(tmp_path: Path, pretended: None) -> None:
    data = json.loads(small.text())
    data["stages"] = [
        data["stages"][0],
        {"search": "random_search", "steps": 3, "trials": 2, "samples": 4, "rescore_samples": 4},
    ]
    from lissom.core.recipe import parse
    from lissom.workflow.context import Context
    from lissom.workflow.run import run

    watched = small.Watched()
    context = Context(parse(json.dumps(data), "r"), tmp_path, Options(device="cpu"), watched)
    made = run(context.recipe, json.dumps(data), tmp_path / "run", context, resume=False)
    folders = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert folders == ["01-search-autodiffusion", "02-search-random_search"] and made.ref.endswith(folders[1])
    run(context.recipe, json.dumps(data), tmp_path / "run", context, resume=True)
    assert watched.said == [f"{name}: finished already" for name in folders]
