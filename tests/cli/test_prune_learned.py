"""`lissom prune masks` and `tinyfusion`: bad input in one sentence; learning that fails keeps its last good state."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import export
from lissom.tests.cli.commands import lissom, nothing_left, refused
from lissom.tests.core import tiny
from lissom.workflow._lesson import Lessons
from lissom.workflow._trajectories import Trajectories
from safetensors.torch import load_file

COMMON = ("--device", "cpu", "--no-measure", "-q", "--set", "latency_batches=[]")
SIZE = ("--call", "height=8", "--call", "width=8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines: of text, of classes, of nothing; two of them broken; a scheduler that masks cannot follow."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "prompts.txt").write_text("a shoe\na bag\n")
    (folder / "classes.jsonl").write_text('{"class_labels": 3}\n{"class_labels": 5}\n')
    for name in ("sd", "dit", "ddpm"):
        tiny.FAMILIES[name][0]().save_pretrained(folder / name)
    for name in ("sd", "dit"):
        pipe = tiny.FAMILIES[name][0]()
        with torch.no_grad():
            next(tiny.denoiser(pipe).parameters()).view(-1)[0] = torch.nan
        pipe.save_pretrained(folder / f"broken-{name}")
    from diffusers import PNDMScheduler

    tiny.sd(scheduler=PNDMScheduler(**tiny.SD_BETAS)).save_pretrained(folder / "pndm")
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process, which takes eight seconds; a state after every step."""
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)


def words(home: Path, method: str, model: str, *more: str, **settings: Any) -> list[str]:
    """A command that learns four steps."""
    small = {"iterations": 4, "batch": 2, "images": 3} | (
        {"solver_steps": 2} if method == "masks" else {"data_steps": 2, "rank": 2}
    )
    given = [f"--set={key}={value}" for key, value in {**small, **settings}.items()]
    rows = "classes.jsonl" if "dit" in model else "prompts.txt"
    asked = ["--prompts", str(home / rows), *(SIZE if rows == "prompts.txt" else ())] if model != "ddpm" else []
    keep = () if method == "tinyfusion" or "--keep" in more else ("--keep", "0.95")
    return ["prune", method, str(home / model), *keep, *more, *asked, *given, *COMMON]


Case = tuple[str, str, Sequence[str], dict[str, Any], str]
REFUSED: list[Case] = [
    ("masks", "sd", ("--keep", "0.5"), {}, "keep=0.5: cannot be reached; all heads, units but one of each layer hold 17."),
    ("masks", "sd", ("--keep", "0.5"), {"what": "[channels]"}, "all channels but one of each layer hold 48."),
    ("masks", "sd", (), {"what": "[modulation]"}, "UNet2DConditionModel has no modulation that can be cut exactly"),
    ("masks", "sd", (), {"what": "[]"}, "what: tuple should have at least 1 item"),
    ("masks", "sd", (), {"least": "0.99"}, "least=0.99 and round_to=1 only 0% of what has to go can go. Allow more of them"),
    ("masks", "sd", (), {"rate": "-1"}, "rate: input should be greater than 0, got -1"),
    ("masks", "sd", (), {"settle": "1"}, "settle: input should be less than 1, got 1"),
    ("masks", "sd", (), {"objective": "step"}, "objective: input should be 'final' or 'steps', got 'step'"),
    ("masks", "sd", (), {"gates": "nowhere"}, "nowhere: cannot be read (No such file or directory"),
    ("masks", "sd", (), {"solver_steps": "1001"}, "solver_steps 1001: DDIMScheduler was trained with 1000 timesteps"),
    ("masks", "sd", ("--dtype", "bfloat16"), {}, "--dtype bfloat16: gates are learned in float32"),
    ("masks", "pndm", (), {"solver_steps": "6"}, "cannot follow a plan with PNDMScheduler: with skip_prk_steps=False"),
    ("tinyfusion", "dit", (), {"structure": "1:3"}, "structure 1:3: does not divide the 2 blocks (2). Let the groups add up"),
    ("tinyfusion", "dit", (), {"structure": "[1:2,1:2]"}, "structure 1:2, 1:2: speaks of more than the 2 blocks"),
    ("tinyfusion", "dit", ("--keep", "0.1"), {}, "keep=0.1: cannot be reached; the cuts hold 9"),
    ("tinyfusion", "dit", ("--keep", "0.7"), {"structure": "1:2"}, "structure says how many blocks stay, so that there is no"),
    ("tinyfusion", "dit", (), {"structure": "1:2", "group": "0"}, "group: input should be greater than or equal to 1, got 0"),
    ("tinyfusion", "ddpm", (), {"structure": "1:2"}, "has no transformer blocks, of which some could stay. laptop cuts"),
    ("tinyfusion", "dit", (), {"structure": "1:2", "update": "adapter"}, "update: input should be 'lora', 'full' or 'none'"),
    ("tinyfusion", "dit", (), {"structure": "3:2"}, "'3:2': write N:M"),
    ("tinyfusion", "dit", (), {"structure": "half"}, "'half': write N:M"),
    ("tinyfusion", "dit", (), {"structure": "0:2"}, "structure 0:2"),
    ("tinyfusion", "dit", (), {"structure": "2:2"}, "structure 2:2"),
    ("tinyfusion", "dit", (), {"structure": "1:2", "temperature": "[0,0]"}, "temperature"),
    ("tinyfusion", "dit", (), {"structure": "1:2", "temperature": "[4,-1]"}, "temperature"),
    ("tinyfusion", "dit", (), {"structure": "1:2", "scale": "inf"}, "scale: input should be a finite"),
    ("masks", "sd", (), {"ema": "nan"}, "ema: input should be a finite number"),
    ("masks", "sd", (), {"rate": "inf"}, "rate: input should be a finite number"),
    ("masks", "pndm", (), {"solver_steps": "2"}, "cannot follow a plan with PNDMScheduler"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    REFUSED,
    ids=lambda case: " ".join([case[0], case[1], *case[2], *(f"{k}={v}" for k, v in case[3].items())]),
)
def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(case: Case, here: Path, home: Path) -> None:
    method, model, more, settings, says = case
    said = refused(*words(home, method, model, *more, **settings), "--out", "run")
    assert says in said and len(said.splitlines()) == 1, said
    assert nothing_left(here)


@pytest.mark.parametrize(
    ("method", "model", "what"),
    [
        ("masks", "sd", {}),
        ("masks", "sd", {"what": "[channels]"}),
        ("tinyfusion", "dit", {}),
    ],
)
def test_the_smallest_keep_that_is_named_can_be_reached(method: str, model: str, what: dict[str, str], home: Path) -> None:
    said = refused(*words(home, method, model, "--keep", "0.05", **what), "--out", "run")
    keep = said.rpartition("the smallest keep is ")[2].strip().rstrip(".")
    less = str(round(float(keep) - 0.0005, 4))
    assert "cannot be reached" in refused(*words(home, method, model, "--keep", less, **what), "--out", "run")
    ended = lissom(*words(home, method, model, "--keep", keep, iterations=1, **what), "--out", "run")
    assert ended.exit_code == 0, ended.output


def test_an_estimate_refuses_a_structure_that_does_not_divide_the_blocks(home: Path) -> None:
    assert "does not divide the 2 blocks" in refused(*words(home, "tinyfusion", "dit", structure="1:3"), "--dry-run")


@pytest.mark.parametrize(("method", "model"), [("masks", "broken-sd"), ("tinyfusion", "broken-dit")])
def test_a_broken_model_is_said_before_anything_is_learned(method: str, model: str, home: Path) -> None:
    settings = {"structure": "1:2"} if method == "tinyfusion" else {}
    said = refused(*words(home, method, model, **settings), "--out", "run")
    assert "the samples hold NaN or infinity" in said and len(said.splitlines()) == 1


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "learning.pt", weights_only=True)["state"]
    assert all(bool(one.isfinite().all()) for which in ("named", "average") for one in found[which].values())
    return found


@pytest.mark.parametrize(("method", "model"), [("masks", "sd"), ("tinyfusion", "dit")])
def test_a_loss_that_becomes_nan_leaves_the_last_good_state_and_learning_goes_on(
    method: str, model: str, here: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the second step, of finite numbers; once what broke it is gone, the same command finishes."""
    given = words(home, method, model, **({"structure": "1:2"} if method == "tinyfusion" else {}))
    with monkeypatch.context() as patch:
        broken(patch, after=2)
        said = refused(*given, "--out", "run")
    assert said.startswith("lissom: the loss or the gates became NaN or infinite in step 3, for the second time.")
    assert "kept in run. Lower the learning rates" in said and len(said.splitlines()) == 1
    assert (state(here / "run")["at"], state(here / "run")["restarts"]) == (2, 1)
    assert not (here / "run" / "gates.safetensors").exists() and not (here / "run" / "model").exists()
    ended = lissom(*given, "--out", "run", "--resume")
    assert ended.exit_code == 0, ended.output
    report = json.loads((here / "run" / "report.json").read_text())
    assert report["spent"]["learning_steps"] == 2 and report["cuts"] and not (here / "run" / "learning.pt").exists()
    assert all(bool(one.isfinite().all()) for one in load_file(here / "run" / "gates.safetensors").values())


def broken(patch: pytest.MonkeyPatch, after: int) -> None:
    """What is learned from becomes NaN after so many steps."""
    real, asked, distance = Lessons.samples, list[Sequence[int]](), Trajectories.distance

    def worse(positions: Sequence[int], value: Any) -> Any:
        asked.append(positions)
        return value * torch.nan if len(asked) > after else value

    def samples(self: Any, positions: Sequence[int], salt: int) -> Any:
        kwargs, target = real(self, positions, salt)
        return kwargs, worse(positions, target)

    patch.setattr(Lessons, "samples", samples)
    patch.setattr(Trajectories, "distance", lambda self, at, given: worse(at, distance(self, at, given)))


@pytest.mark.parametrize("settings", [{"update_rate": "1e30"}, {"update": "full", "update_rate": "1e30"}], ids=str)
def test_an_update_that_explodes_leaves_the_model_and_the_last_good_state(
    settings: dict[str, str], here: Path, home: Path
) -> None:
    """For real, by its learning rate: at the end of the first step gates are still numbers, in the next no loss is."""
    weights = next((home / "dit" / "transformer").glob("*.safetensors"))
    before = weights.read_bytes()
    said = refused(*words(home, "tinyfusion", "dit", structure="1:2", **settings), "--out", "run")
    assert "NaN or infinite in step" in said and "for the second time" in said and len(said.splitlines()) == 1
    assert state(here / "run")["restarts"] == 1 and weights.read_bytes() == before


drawn: list[dict[str, torch.Tensor]] = []


def closing(self: Trajectories, positions: Sequence[int], given: Any) -> torch.Tensor:
    """A distance that every open gate makes larger: without a target all of them would close."""
    drawn.append({address: factors.detach() for address, (_, factors) in given.items()})
    return 1e3 * torch.stack([factors.sum() for _, factors in given.values()]).sum()


def test_gates_cannot_collapse_whatever_the_distance_pulls_to(here: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trajectories, "distance", closing)
    ended = lissom(*words(home, "masks", "sd", "--keep", "0.95", iterations=30, rate=1.0), "--out", "run")
    gates = load_file(here / "run" / "gates.safetensors")
    open_ones = [float(torch.cat(list(one.values())).gt(0).double().mean()) for one in drawn]
    assert len(open_ones) == 30 and min(open_ones) > 0.4 and gates  # five of at most seventeen per cent go
    assert ended.exit_code == 0, ended.output
    report = json.loads((here / "run" / "report.json").read_text())
    assert report["cuts"] and 0.9 * report["before"]["params"] < report["after"]["params"] <= 0.95 * report["before"]["params"]


@pytest.mark.parametrize("keep", ["0.97", "0.95"])
def test_gates_that_stay_half_open_are_warned_of_and_kept(keep: str, here: Path, home: Path) -> None:
    ended = lissom(*words(home, "masks", "sd", "--keep", keep, rate="1e-9"), "--out", "run")
    assert "gates are half open: learn for longer" in ended.stderr
    gates = load_file(here / "run" / "gates.safetensors")
    every = torch.cat(list(gates.values()))
    assert float(every.max() - every.min()) < 1e-3 and float(every.abs().max()) < 1.34
    assert ended.exit_code == 0, ended.output
