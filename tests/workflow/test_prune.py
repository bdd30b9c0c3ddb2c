"""The prune stage end to end: on the embedded models, small. Most tests skip the fresh process, which has tests of its own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lissom.core import anatomy, artifact, export, models, surgery
from lissom.core.artifact import Artifact
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import UserError
from lissom.core.output_loss import OutputLoss
from lissom.core.recipe import parse
from lissom.report.prune_schema import PruneReport
from lissom.tests.core import tiny
from lissom.tests.workflow import small
from lissom.workflow import _pruned_model
from lissom.workflow._evaluator import Evaluator
from lissom.workflow.context import Context, Options, Silent
from lissom.workflow.run import rebuild, run

STAGE: dict[str, Any] = {"prune": "laptop", "keep": 0.75, "calibration": 4, "times": 2, "steps": 2, "latency_batches": [1]}
QUICK: dict[str, Any] = {"prune": "magnitude", "keep": 0.75, "steps": 2, "latency_batches": []}


def text(*stages: dict[str, Any], model: str = "zoo:fashion-dit", **more: Any) -> str:
    evaluate = {"metrics": ["fid", "accuracy"], "samples": 8}
    return json.dumps({"lissom": 1, "model": model, "evaluate": evaluate, "stages": list(stages or [STAGE]), **more}, indent=1)


def prune(
    out: Path, recipe: str, *, resume: bool = False, single: bool = True, options: Options | None = None, progress: Any = None
) -> Artifact:
    context = Context(parse(recipe, "r.yaml"), out.parent, options or Options(device="cpu"), progress or Silent())
    return run(context.recipe, recipe, out, context, resume=resume, single=single)


def report(folder: Path) -> PruneReport:
    return PruneReport.model_validate_json((folder / "report.json").read_text())


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process: it takes eight seconds."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A laptop run, as users have it. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "dit"
    prune(folder, text(STAGE | {"additivity": 12}))
    return folder


def test_what_a_run_leaves(pruned: Path) -> None:
    found = report(pruned)
    assert found.after.params <= 0.75 * found.before.params and found.after.macs < found.before.macs
    assert found.after.disk < found.before.disk and found.opens_plain and found.reload_difference <= 1e-5
    assert [s.name for s in found.scored] == ["before", "after"] and found.samples == 8 and found.steps == 2
    before, after = (next(m for m in s.measurements if m.metric == "fid") for s in found.scored)
    assert before.seeds == after.seeds and before.reference == after.reference and before.value != after.value
    assert found.additivity is not None and len(found.additivity.sums) == 12
    assert sum(layer.cut for layer in found.layers) == len(found.cuts) and len(found.layers) == 12
    assert found.predicted_loss == pytest.approx(sum(x.score or 0 for x in found.layers if x.cut))
    assert found.loss and found.latency[0].batch == 1 and found.latency[0].before > found.latency[0].after * 0.5
    assert (pruned / "report.md").read_text().partition("\n")[0].startswith(("Faster", "Slower", "Not measurably"))
    assert all((pruned / "samples" / f"{name}.png").is_file() for name in ("before", "after"))
    assert not list(pruned.rglob(".*.partial")) and not list(pruned.rglob("*.tmp"))


def test_the_model_and_its_manifest(pruned: Path) -> None:
    made = artifact.manifest(pruned / "model")
    assert made is not None and made == artifact.manifest(pruned)
    parent, child = models.load("zoo:fashion-dit", device="cpu"), models.load(str(pruned), device="cpu")
    assert (made.parent, made.model_hash, made.opens) == ("zoo:fashion-dit", parent.fingerprint, "stock")
    assert made.license == "apache-2.0" and len(made.measurements) == 2 and made.made_by["keep"] == 0.75
    assert child.origin == "zoo:fashion-dit" and child.conditions is not None
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 900]), "class_labels": torch.tensor([1, 3])
    }  # fmt: skip
    with torch.no_grad(), surgery.applied(parent.denoiser, made.cuts):  # parent + cuts is the artifact
        wanted = parent.denoiser(**inputs).sample
    torch.testing.assert_close(child.denoiser(**inputs).sample, wanted, atol=1e-5, rtol=1e-5)
    kept = child.denoiser.get_submodule("transformer_blocks.1.ff")
    old = next((a for a, new in made.names.items() if new == "transformer_blocks.1"), "transformer_blocks.1")
    assert torch.equal(kept.net[2].weight, parent.denoiser.get_submodule(old).ff.net[2].weight)


def test_the_card(pruned: Path) -> None:
    card = (pruned / "model" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nlibrary_name: diffusers\n')
    assert "base_model" not in card.partition("\n---\n")[0]  # an embedded model is no hub's
    assert "DiffusionPipeline.from_pretrained(" in card and "trust_remote_code" not in card.partition("## Size")[0]
    assert "FD[zoo:judge]" in card and '"prune": "laptop"' in card


def test_a_finished_run_is_not_run_again(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    assert prune(pruned, (pruned / "recipe.yaml").read_text(), resume=True).ref == str(pruned)


def test_reports_are_rebuilt_without_measuring(pruned: Path) -> None:
    pages = [(pruned / name).read_text() for name in ("report.md", "report.html")]
    (pruned / "report.md").write_text("gone")
    assert rebuild(pruned) == [pruned / "report.html"]
    assert [(pruned / name).read_text() for name in ("report.md", "report.html")] == pages


@pytest.mark.usefixtures("unverified")
def test_killed_at_any_point_nothing_complete_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    losses, images = [0], [0]
    each, score = OutputLoss.each, Evaluator.score

    def counted_losses(self: OutputLoss, options: Any) -> list[float]:
        losses[0] += len(options)
        if losses[0] > limit[0]:
            raise Killed
        return each(self, options)

    def counted_images(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        images[0] += 1
        if images[0] > limit[1]:
            raise Killed
        return score(self, *args, **kwargs)

    monkeypatch.setattr(OutputLoss, "each", counted_losses)
    monkeypatch.setattr(Evaluator, "score", counted_images)
    recipe = text(STAGE | {"additivity": 3})
    whole, out = tmp_path / "whole", tmp_path / "run"
    limit = [10**6, 10**6]
    prune(whole, recipe)
    wanted, losses[0], images[0] = losses[0], 0, 0
    for stop in ([20, 9], [wanted - 1, 9], [wanted, 0], [wanted, 1]):
        limit[:] = stop
        with pytest.raises(Killed):
            prune(out, recipe, resume=True)
        losses[0], images[0] = min(losses[0], _scored(out)), min(images[0], len(list(out.glob("quality-*.json"))))
        with (out / "scores.jsonl").open("a") as file:
            file.write('[0, "torn')
    limit[:] = [wanted, 2]
    prune(out, recipe, resume=True)
    assert (losses[0], images[0]) == (wanted, 2)
    first, second = report(whole), report(out)
    assert first.scored == second.scored and first.cuts == second.cuts and first.loss == second.loss
    tensors = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (whole / tensors).read_bytes() == (out / tensors).read_bytes()
    assert (whole / "lissom.json").read_bytes() == (out / "lissom.json").read_bytes()


def _scored(out: Path) -> int:
    lines = (out / "scores.jsonl").read_text().splitlines()[1:]
    return sum(line.endswith("]") for line in lines)


@pytest.mark.usefixtures("unverified")
def test_stages_hand_on_model_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prune, prune again, search on the result, prune with the plan: the chain of manifests, and the plan's moved layers."""
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    search = {**small.STAGE, "samples": 4, "space": ["timesteps", "skips"], "budget": {"macs": 0.95}}
    recipe = text(QUICK, QUICK | {"prune": "random_cuts"}, search, QUICK | {"keep": 0.8})
    out = tmp_path / "chain"
    last = prune(out, recipe, single=False)
    folders = sorted(p.name for p in out.glob("[0-9]*"))
    assert folders == ["01-prune-magnitude", "02-prune-random_cuts", "03-search-autodiffusion", "04-prune-magnitude"]
    made = [artifact.manifest(out / name) for name in folders]
    first, second, found, fourth = made
    assert first and second and found and fourth
    assert first.chain == () and [a.parent for a in second.chain] == ["zoo:fashion-dit"] and second.chain[0].cuts == first.cuts
    assert found.parent == str(out / folders[1]) and len(fourth.chain) == 2
    loaded = [models.load(str(out / name), device="cpu") for name in folders]
    sizes = [model.parameters for model in loaded]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert last.plan is not None and loaded[3].plan == last.plan and loaded[1].plan is None
    before = artifact.read_plan(out / folders[2])
    assert last.plan.timesteps == before.timesteps
    there = {layer.address for layer in anatomy.layers(loaded[3].denoiser)}
    assert {a for step in last.plan.steps for a in step.skip} <= there
    assert any(step.skip for step in before.steps)
    again = prune(out, recipe, resume=True, single=False, progress=small.Watched())
    assert again == last


@pytest.mark.usefixtures("unverified")
def test_a_finished_search_brings_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "score", small.pretended)
    small.search(tmp_path / "searched", small.text("zoo:fashion-dit", samples=4))
    wanted = artifact.read_plan(tmp_path / "searched")
    stage = {k: v for k, v in QUICK.items() if k != "steps"}
    prune(tmp_path / "run", text(stage, model=str(tmp_path / "searched")))
    found = models.load(str(tmp_path / "run"), device="cpu").plan
    assert found is not None and found.timesteps == wanted.timesteps and report(tmp_path / "run").steps == len(wanted.steps)
    prune(tmp_path / "stock", text(QUICK, model=str(tmp_path / "searched")))  # steps ask for the stock schedule
    assert models.load(str(tmp_path / "stock"), device="cpu").plan is None


def test_moved_plan() -> None:
    steps = (Step(timestep=9, skip=("b.0", "b.2", "b.2.attn", "b.10")), Step(timestep=3))
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=steps)
    moved = _pruned_model.moved_plan(plan, {"b.2": None, "b.10": "b.9"})
    assert [step.skip for step in moved.steps] == [("b.0", "b.9"), ()]


@pytest.mark.usefixtures("unverified")
def test_uploads_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            sent.append((repository, options["private"]))

        def upload_folder(self, *, folder_path: Path, repo_id: str, ignore_patterns: list[str]) -> None:
            sent.append((repo_id, sorted(p.name for p in folder_path.iterdir() if p.name not in ignore_patterns)))

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
            sent.append((path_in_repo, path_or_fileobj.decode()))

        def repo_info(self, repository: str) -> Any:
            return SimpleNamespace(private=False)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    recipe = text(QUICK | {"measure": False})
    prune(tmp_path / "kept", recipe)
    assert sent == []
    watched, asked = small.Watched(), Options(device="cpu", push_to_hub="me/smaller")
    prune(tmp_path / "kept", recipe, resume=True, options=asked, progress=watched)  # finished before: uploaded all the same
    assert sent[0] == ("me/smaller", True) and {"plan.json", "README.md", "lissom.json"} & set(sent[1][1]) == set()
    files = dict(sent[2:])
    assert '"me/smaller"' in files["README.md"] and str(tmp_path) not in files["README.md"] + files["lissom.json"]
    assert "me/smaller: uploaded (PUBLIC, as it was before)" in watched.said
    monkeypatch.setattr(Hub, "create_repo", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match="did not take it .no route.*The model is complete in .*failed/model"):
        prune(tmp_path / "failed", recipe, options=Options(device="cpu", push_to_hub="me/smaller"))


@pytest.mark.usefixtures("unverified")
def test_a_model_of_ones_own_without_prompts_or_features(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: openrail++\nlicense_link: LICENSE.md\n---\nMine.")
    (tmp_path / "mine" / "LICENSE.md").write_text("All of it.")
    own = text(QUICK | {"keep": 0.9}, model=str(tmp_path / "mine"))
    prune(tmp_path / "run", own)
    found = report(tmp_path / "run")
    assert found.scored == () and found.samples == 0  # nothing says what to paint
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'license: "openrail++"' in card and "That of the parent: openrail++, LICENSE.md." in card
    assert (tmp_path / "run" / "model" / "LICENSE.md").read_text() == "All of it."
    (tmp_path / "prompts.txt").write_text("a shoe\na bag\n")
    prune(tmp_path / "painted", text(QUICK | {"keep": 0.9}, model=str(tmp_path / "mine"), prompts="prompts.txt"))
    found = report(tmp_path / "painted")
    assert [s.measurements for s in found.scored] == [(), ()] and found.scored[0].sheet == "samples/before.png"
    with pytest.raises(UserError, match="needs a prompt for every image"):
        prune(tmp_path / "laptop", text(STAGE, model=str(tmp_path / "mine")))
    assert not (tmp_path / "laptop").exists()


@pytest.mark.usefixtures("unverified")
def test_the_reference_of_both_is_the_parents(tmp_path: Path) -> None:
    """Compared with the model's own images, the pruned model is compared with its parent's, not with its own."""
    recipe = json.loads(text(QUICK))
    recipe["evaluate"] |= {"reference": "teacher", "teacher_steps": 2, "metrics": ["fid"]}
    prune(tmp_path / "run", json.dumps(recipe))
    before, after = (s.measurements[0] for s in report(tmp_path / "run").scored)
    assert before.reference == after.reference


@pytest.mark.usefixtures("unverified")
def test_latency_is_a_target_and_its_table_is_measured_once(tmp_path: Path) -> None:
    recipe = text(QUICK | {"of": "latency", "keep": 0.8, "measure": False})
    prune(tmp_path / "run", recipe)
    table = json.loads((tmp_path / "run" / "latency.json").read_text())["value"]
    gone = [cut.address for cut in report(tmp_path / "run").cuts]
    assert sum(table["layers"][a] for a in gone) >= 0.2 * table["whole"] * (1 - 1e-9)
    (tmp_path / "run" / "lissom.json").unlink()
    prune(tmp_path / "run", recipe, resume=True)
    assert json.loads((tmp_path / "run" / "latency.json").read_text())["value"] == table
