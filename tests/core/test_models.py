"""Model folders: what is opened, and what is refused by name before anything is loaded."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from lissom.core import artifact, models
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.errors import MissingOffline, UserError
from lissom.tests.core import tiny
from safetensors.torch import load_file, save_file

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny.ddim().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def flat_pickle(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.ckpt").write_bytes(b"x")


def lacking(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


def misshapen(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"conv_in.bias": torch.zeros(1)}, folder / WEIGHTS)


def own_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))


def own_code(folder: Path, opens: str, file: str, component: str = "unet", cls: str = "PrunedUNet2DModel") -> None:
    """A folder that passes for a pruned model, with code in a file."""
    made = {"parent": "here", "model_hash": "0", "stage": "0", "component": component, "opens": opens}
    (folder / artifact.MANIFEST).write_text(json.dumps(made))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {component: ["own", cls]}))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": cls}))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("raise SystemExit")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing in it": (lambda f: [shutil.rmtree(f), f.mkdir()], r"not a diffusers pipeline.*\(found: nothing\)"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"no model_index\.json \(found: scheduler, unet\)"),
    "index torn": (lambda f: (f / "model_index.json").write_text('{"unet": ['), r"model_index\.json: not valid JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json: not a pipeline's index"),
    "part missing": (lambda f: shutil.rmtree(f / "unet"), r"unet: missing, although .* partial"),
    "part empty": (emptied, r"unet: missing, although .* partial"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "diffusers cannot open it"),
    "weights truncated": (truncate, r"diffusion_pytorch_model\.safetensors: broken or half-downloaded .* Fetch it again"),
    "weights lack one": (lacking, r"unet: the weights lack conv_in\.bias"),
    "weights misshapen": (misshapen, r"cannot open it .*conv_in\.bias"),
    "config torn": (lambda f: (f / "unet" / "config.json").write_text("{"), "diffusers cannot open it"),
    "pickle in a part": (pickle_only, r"diffusion_pytorch_model\.bin: pickled weights are never read"),
    "a single pickle": (flat_pickle, r"holds only pickled weights \(model\.ckpt\)"),
    "code in a folder of a part": (lambda f: own_code(f, "", "unet/deep/evil.py"), r"evil\.py: .*--trust-remote-code"),
    "code of a stock model": (lambda f: own_code(f, "stock", "unet/own.py"), r"own\.py: .*--trust-remote-code"),
    "code beside what lissom brings": (lambda f: own_code(f, "remote_code", "unet/evil.py"), r"evil\.py: .*--trust-remote"),
    "code of another part": (lambda f: own_code(f, "remote_code", "scheduler/own.py"), r"own\.py: .*--trust-remote-code"),
    "code of what is no denoiser": (
        lambda f: own_code(f, "remote_code", "scheduler/own.py", component="scheduler"),
        r"own\.py: .*--trust-remote-code",
    ),
    "a class that is no model": (
        lambda f: own_code(f, "remote_code", "unet/own.py", cls="PrunedDDIMPipeline"),
        r"config\.json: 'DDIMPipeline' is not a model class of diffusers",
    ),
    "a denoiser that is none": (
        lambda f: own_code(f, "remote_code", "notes.txt", component="scheduler"),
        r"lissom\.json: 'scheduler' is no denoiser",
    ),
    "code in a part": (lambda f: (f / "unet" / "own.py").write_text("raise SystemExit"), r"own\.py: .*--trust-remote-code"),
    "code of the pipeline": (own_pipeline, r"\['pipeline', 'Mine'\] is the model's own code.*--trust-remote-code"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_unfit_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    spoil, says = BAD[name]
    spoil(folder)
    with pytest.raises(UserError, match=says) as e:
        models.load(str(folder))
    assert e.value.exit_code == 2 and "\n" not in str(e.value) and str(folder) in str(e.value)


def test_a_whole_folder_is_opened_and_identified_by_its_weights(whole: Path, folder: Path) -> None:
    model = models.load(str(folder), device="cpu")
    assert model.denoiser_name == "unet" and model.parameters == sum(p.numel() for p in tiny.pixel_unet().parameters())
    assert model.fingerprint == models.fingerprint(whole)
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.02", "0.03"))  # plans hold the scheduler themselves
    assert models.fingerprint(folder) == model.fingerprint
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, folder / WEIGHTS)
    assert models.fingerprint(folder) != model.fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu7"}, "--device tpu7: cannot be used here"),
        ({"dtype": "float61"}, "--dtype float61: unknown; .* Did you mean 'float16'"),
        ({"offload": "disk"}, "--offload disk: unknown; there are none, model, sequential"),
    ],
)
def test_options_that_do_not_exist_are_named(whole: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        models.load(str(whole), **options)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("zoo:fashon", "no such embedded model; .* Did you mean 'zoo:fashion'"),
        ("config:sd15", "cannot be run"),
        ("./absent", "no such folder"),
        ("absent", "no such folder"),
        ("a/b/c", "no such folder"),
        (__file__, "is a file"),
    ],
)
def test_a_model_that_is_nowhere_is_refused_without_asking_a_hub(monkeypatch: pytest.MonkeyPatch, ref: str, says: str) -> None:
    monkeypatch.setattr(models, "_hub", lambda ref: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=says) as e:
        models.load(ref)
    assert e.value.exit_code == 2


def test_offline_nothing_is_asked_and_the_exit_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the hub's library reads the variable once, when imported
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up a host"))
    with pytest.raises(MissingOffline, match="owner/name: not a folder here, not in the cache, .*HF_HUB_OFFLINE") as e:
        models.load("owner/name")
    assert e.value.exit_code == 5 and "\n" not in str(e.value)


def test_what_lies_beside_a_hub_model_comes_from_the_same_revision(
    monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path
) -> None:
    """`DiffusionPipeline.download` leaves the card, the licence, the line of descent and the plan out."""
    import diffusers
    import huggingface_hub

    snapshot = Path(shutil.copytree(whole, tmp_path / "snapshots" / "0123abc"))
    asked: list[tuple[str, str, list[str]]] = []

    def fetch(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        files = ("README.md", "LICENSE.txt", "unet/README.md", "plan.json", "lissom.json", "conditions.jsonl", "call.json")
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).write_text("{}")
        return str(snapshot)

    def fail(*args: object, **options: object) -> None:
        asked.append(("", "", []))
        raise ConnectionError("gone")

    before = {p.name for p in snapshot.iterdir()}
    monkeypatch.setattr(models, "_unreachable", lambda *args: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *args, **options: str(snapshot))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert models.resolve("owner/name") == (snapshot, "owner/name@0123abc") and len(asked) == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert models.resolve("owner/name@v1") == (snapshot, "owner/name@0123abc")
    assert asked[1][:2] == ("owner/name", "0123abc")
    came = {"README.md", "LICENSE.txt", "plan.json", "lissom.json", "conditions.jsonl", "call.json"}
    assert {p.name for p in snapshot.iterdir()} == before | came and not (snapshot / "unet" / "README.md").exists()
    monkeypatch.setattr(models, "_unreachable", lambda *args: ConnectionError("offline"))
    assert models.resolve("owner/name") == (snapshot, "owner/name@0123abc") and len(asked) == 2


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"])
def test_a_network_that_is_silent_or_busy_costs_seconds_not_minutes(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(models, "HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        held = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(MissingOffline, match="the model hub gave nothing"):
            models.load("owner/name")
        assert time.monotonic() - began < 20
    for connection in held:
        connection.close()


def test_a_run_in_stages_stands_for_its_last_finished_stage(tmp_path):
    """`--plan RUN` and MODEL take the folder of `lissom run`, whose results are in NN-verb-method/."""
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=(Step(timestep=7),))
    for name, last in (("01-search-a", plan.model_copy(update={"steps": (Step(timestep=9),)})), ("02-search-b", plan)):
        artifact.save(tmp_path / name, artifact.Manifest(parent="zoo:fashion", model_hash="0", stage="0"), last)
    (tmp_path / "03-search-c").mkdir()  # not finished
    assert artifact.read_plan(tmp_path) == plan
    assert models.identity(str(tmp_path)) == models.identity("zoo:fashion")
    assert models.identity("owner/name@0123") == "owner/name@0123"
