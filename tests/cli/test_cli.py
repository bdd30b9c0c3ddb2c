"""The command line: what it takes, prints and ends with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lissom.core import methods
from lissom.tests.cli.commands import TINY, lissom, nothing_left, refused
from lissom.workflow import describe

COMMANDS = ["search", "evaluate", "sample", "run", "report", "inspect", "recipes", "doctor"]


# ---- help --------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_every_command_has_its_own() -> None:
    assert lissom().exit_code in (0, 2)
    whole = lissom("--help")
    assert whole.exit_code == 0
    for command in COMMANDS:
        assert command in whole.stdout
        own = lissom(command, "--help")
        assert own.exit_code == 0 and "--help" in own.stdout, command


def test_the_common_flags_are_where_they_are_promised() -> None:
    common = ["--device", "--dtype", "--offload", "--trust-remote-code", "--json", "--verbose"]
    images = [*common, "--seed", "--prompts", "--out", "--dry-run"]
    runs = ["--resume", "--set", "--max-time", "--storage", "--quiet", "--out", "--dry-run"]
    expected = {
        "inspect": common,
        "sample": [*images, "--quiet"],
        "evaluate": [*images, "--quiet"],
        "search": [*images, *runs],
        "run": [*images, *runs],
    }
    for command, flags in expected.items():
        text = lissom(command, "--help").stdout
        assert [f for f in flags if f not in text] == [], command


@pytest.mark.parametrize("method", methods.names("search"))
def test_the_help_of_a_method_shows_its_settings(method: str) -> None:
    text = lissom("search", method, "--help").stdout
    module = methods.load("search", method)
    assert module.Config.paper in text
    for name, comment in methods.comments(module).items():
        assert f"{name} = " in text and comment in text
    assert "Did you mean 'autodiffusion'" in lissom("search", "autodifusion", "--help").stderr


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    check = (
        "import sys; from typer.testing import CliRunner; from lissom.cli.app import app\n"
        "for words in (['--help'], ['search', '--help'], ['search', 'autodiffusion', '--help'], ['prune', 'laptop', '--help'], ['recipes', 'list']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'optuna', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_python_m_lissom_is_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "lissom", "--version"], capture_output=True, text=True, check=False)
    from lissom import __version__

    assert ended.returncode == 0 and ended.stdout.strip() == __version__
    wrong = subprocess.run([sys.executable, "-m", "lissom", "serach"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and "serach" in wrong.stderr


@pytest.mark.parametrize(
    "words",
    [["search"], ["search", "autodiffusion"], ["nope"], ["search", "autodiffusion", "zoo:fashion", "--stepz", "4"],
     ["evaluate", "zoo:fashion", "--steps", "0"], ["evaluate", "zoo:fashion", "--steps", "2", "--plan", "p"],
     ["sample", "zoo:fashion", "--images", "0"], ["search", "autodiffusion", "zoo:fashion", "--seed", "-1"],
     ["sample", "zoo:fashion", "--prompt", "a", "--prompts", "p"], ["search", "autodiffusion", "zoo:fashion", "--chunk", "0"],
     ["search", "autodiffusion", "zoo:fashion", "--max-time", "soon"], ["evaluate", "zoo:fashion", "--samples", "1"],
     ["search", "autodiffusion", "zoo:fashion", "--budget", "macs=cheap"]],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_leaves_nothing(here: Path, words: list[str]) -> None:
    ended = lissom(*words)
    assert ended.exit_code == 2 and ended.stdout == "" and "Traceback" not in ended.output
    assert nothing_left(here)


# ---- one JSON object on stdout, and nothing left by --dry-run ---------------------------------------------------------------


def test_search_report_and_run_speak_json(here: Path, pretended: None) -> None:
    made = lissom("search", "random_search", "zoo:fashion", *TINY, "--out", "run", "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)["kind"] == "search"
    assert "random_search: 3 to do" in made.stderr
    assert made.stdout == (here / "run" / "report.json").read_text()
    for again in (lissom("report", "run", "--json"), lissom("run", "run", "--json")):
        assert again.exit_code == 0 and again.stdout == made.stdout
    said = lissom("report", "run")
    assert said.stdout == "report: run/report.html\n" and said.stderr == ""
    quiet = lissom("run", "run", "-q")
    assert quiet.stderr == "" and quiet.stdout.splitlines()[1] == "report: run/report.html"


def test_the_written_recipe_makes_the_same_run(here: Path, pretended: None) -> None:
    assert lissom("search", "random_search", "zoo:fashion", *TINY, "--seed", 5, "--out", "run").exit_code == 0
    assert lissom("run", "run/recipe.yaml", "--out", "again", "--device", "cpu").exit_code == 0
    again = here / "again" / "01-search-random_search"
    assert (again / "plan.json").read_bytes() == (here / "run" / "plan.json").read_bytes()
    assert "model_hash" in (here / "run" / "recipe.yaml").read_text()


def test_a_run_goes_on_with_the_options_it_was_started_with(here: Path, pretended: None) -> None:
    url = f"sqlite:///{here}/trials.db"
    start = ("search", "random_search", "zoo:fashion", *TINY, "--chunk", 4, "--storage", url, "--out", "run")
    assert lissom(*start, "--max-time", "0").exit_code == 2
    ended = lissom("run", "run")
    assert ended.exit_code == 0, ended.stderr
    assert not (here / "run" / "trials.journal").exists() and lissom("report", "run").exit_code == 0
    assert json.loads((here / "run" / "environment.json").read_text())["chunk"] == 4
    for more in (("--set", "seed=3"), ("--seed", 3), ("--prompts", "p.txt")):
        assert "--seed and --prompts belong to a new run" in refused("run", "run", *more)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_says_the_cost_and_leaves_nothing(here: Path, as_json: bool) -> None:
    commands = [
        ("search", "random_search", "zoo:fashion", *TINY, "--chunk", 4, "--dry-run"),
        ("evaluate", "zoo:fashion", "--steps", 3, "--out", "e.json", "--dry-run"),
        ("sample", "zoo:fashion", "--images", 3, "--dry-run"),
    ]
    for command in commands:
        ended = lissom(*command, *(["--json"] if as_json else []))
        assert ended.exit_code == 0 and ended.stdout and nothing_left(here), ended.output
        if as_json:
            found = json.loads(ended.stdout)
    if as_json:
        (stage,) = json.loads(lissom(*commands[0], "--json").stdout)["stages"]
        # 4 fixed + 3 candidates, then 1 elite and the best fixed schedule, then these two, the winner's parts (its timesteps, its
        # skips) and 4 fixed: 4 images each
        assert stage["images"] == 4 * (7 + 2 + 8) and stage["denoiser_calls"] == 2 * (7 + 2 + 8)
        scored = json.loads(lissom(*commands[1], "--json").stdout)
        assert scored["images"] == 1024 and scored["denoiser_calls"] == 1024 // 64 * 3 and scored["seconds"] > 0
        assert found["with"] == "the pipeline's default schedule" and found["denoiser_calls"] == 50
        assert (found["model"], found["images"], found["file"]) == ("zoo:fashion", 3, "samples.png")


def test_evaluate_writes_what_it_prints_and_takes_a_plan(here: Path, finished: Path) -> None:
    common = ("evaluate", "zoo:fashion", "--samples", 4, "--metrics", "fid,accuracy", "--device", "cpu")
    made = lissom(*common, "--plan", finished, "--json", "--out", "deep/e.json", "-q")
    assert made.exit_code == 0 and len(made.stderr.splitlines()) == 1, (
        made.stderr
    )  # -q keeps warnings: of the bias of few images
    assert "warning: FD[zoo:judge]: 4 images for 64 features" in made.stderr
    found = json.loads(made.stdout)
    assert found == json.loads((here / "deep" / "e.json").read_text())
    assert found["plan"] == json.loads((finished / "plan.json").read_text())
    assert [m["metric"] for m in found["measurements"]] == ["fid", "accuracy"] and found["steps"] == 2
    own = lissom("evaluate", finished, "--samples", 4, "--metrics", "fid,accuracy", "--device", "cpu", "--json", "-q")
    assert json.loads(own.stdout)["measurements"] == found["measurements"]  # a run's folder is a model with a plan
    table = lissom(*common, "--steps", 1)
    assert table.exit_code == 0 and table.stdout.startswith("FD[zoo:judge]")


def test_sample_paints_prompts(here: Path) -> None:
    from PIL import Image

    prompts = ("--prompt", "a photo of a bag", "--prompt", "a photo of a coat")
    made = lissom("sample", "zoo:fashion", *prompts, "--steps", 1, "--device", "cpu", "--json")
    assert made.exit_code == 0 and json.loads(made.stdout) == {"images": 2, "file": "samples.png"}
    assert Image.open(here / "samples.png").size == (65, 32)  # two pictures of 32 pixels, and a gap


def test_inspect_needs_no_prompts_and_no_features(here: Path) -> None:
    from lissom.tests.core import tiny

    tiny.sd().save_pretrained(here / "model")
    ended = lissom("inspect", "model", "--json", "--device", "cpu")
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["parameters"] == sum(p.numel() for p in tiny.unet().parameters())
    listed = lissom("inspect", "model", "--layers", "--device", "cpu").stdout
    assert all(layer["address"] in listed for layer in found["layers"])
    assert "needs a prompt for every image. Give --prompts FILE" in refused("sample", "model")
    made = lissom("sample", "model", "--prompt", "a shoe", "--steps", 1, "--device", "cpu")
    assert made.exit_code == 0, made.stderr  # painting scores nothing: no --features
    assert (
        "say with --features" in refused("evaluate", "model", "--prompts", "p.txt")
        if (here / "p.txt").write_text("a")
        else None
    )


def test_doctor_finds_what_is_installed() -> None:
    ended = lissom("doctor", "--json")
    found = json.loads(ended.stdout)
    assert ended.exit_code == (1 if found["problems"] else 0)
    assert found["found"]["zoo:fashion"] == "ok" and {"torch", "optuna", "python"} <= set(found["found"])
    assert "optuna" in lissom("doctor").stdout


# ---- recipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "shipped"
    (folder / "zoo").mkdir(parents=True)
    text = "# Shows how.\nlissom: 1\nmodel: zoo:fashion\nstages:\n  - {search: random_search, trials: 2}\n"
    (folder / "zoo" / "small.yaml").write_text(text)
    monkeypatch.setattr(describe, "RECIPES", folder)
    return folder / "zoo" / "small.yaml"


def test_recipes_are_listed_shown_and_copied(here: Path, shipped: Path) -> None:
    assert lissom("recipes", "list").stdout.split() == ["zoo/small", "Shows", "how."]
    assert lissom("recipes", "show", "zoo/small").stdout == shipped.read_text()
    assert lissom("recipes", "copy", "zoo/small").stdout == "small.yaml\n"
    assert (here / "small.yaml").read_text() == shipped.read_text()
    assert "small.yaml: exists already" in refused("recipes", "copy", "zoo/small")
    assert lissom("recipes", "copy", "zoo/small", "mine.yaml").exit_code == 0
    assert "Did you mean 'zoo/small'" in refused("recipes", "show", "zoo/smal")
    assert "no such recipe" in refused("recipes", "show", "../../pyproject")
    assert lissom("recipes", "check", "small.yaml", "mine.yaml").stdout == "small.yaml: ok\nmine.yaml: ok\n"


def test_check_shows_the_mistakes_of_all_files(here: Path) -> None:
    for name in "ab":
        (here / f"{name}.yaml").write_text("lissom: 1\nmodle: x\nstages:\n  - {search: random_serch}\n")
    said = refused("recipes", "check", "a.yaml", "b.yaml", "c.yaml")
    for name in "ab":
        assert f"{name}.yaml:2: modle: unknown key." in said and "Did you mean 'model'" in said
        assert f"{name}.yaml:4: stages.0.search: no method 'random_serch'" in said
    assert "c.yaml: cannot read the recipe" in said


def test_the_schema_is_json() -> None:
    assert json.loads(lissom("recipes", "schema").stdout)["title"] == "lissom recipe"
