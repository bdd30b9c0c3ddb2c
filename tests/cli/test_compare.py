"""`lissom evaluate` and `lissom compare` as commands: what they print, write and end with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lissom.core.candidate import Seeds
from lissom.report.evaluation import Evaluation
from lissom.tests.cli.commands import lissom, nothing_left, refused
from lissom.tests.workflow.evaluations import counted, evaluation, measured, write

FEW = ("--samples", 8, "--chunk", 4, "--device", "cpu")


@pytest.fixture
def pair(here: Path) -> tuple[Path, Path]:
    base = write(here / "base.json", evaluation(measured("fid"), measured("clip_score"), counted("params", 100)), pictures=2)
    worse = evaluation(measured("fid", 0.3, noise=1), measured("clip_score", noise=1), counted("params", 75))
    return base, write(here / "cand.json", worse, pictures=2, brightness=9)


def gates(text: str) -> Path:
    Path("gates.yaml").write_text(text)
    return Path("gates.yaml")


# ---- compare -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "more", "code", "verdict"),
    [
        ("fid: {max_increase: 1}", [], 0, "PASS: 1 limit kept"),
        ("fid: {max_increase: 0.1}\nparams: {max_ratio: 0.8}", [], 3, "REGRESSION: FD[zoo:judge] rose by"),
        ("clip_score: {max_decrease: 0.0}", [], 4, "INCONCLUSIVE: clip_score[zoo:judge]"),
        ("clip_score: {max_decrease: 0.0}", ["--allow-inconclusive"], 0, "INCONCLUSIVE: clip_score[zoo:judge]"),
        ("kid: {max_increase: 1}", [], 4, "INCOMPARABLE: kid"),
        ("kid: {max_increase: 1}", ["--allow-inconclusive"], 4, "INCOMPARABLE: kid"),
    ],
)
def test_the_verdict_is_the_exit_code(here: Path, pair: Any, text: str, more: list[str], code: int, verdict: str) -> None:
    ended = lissom("compare", "base.json", "cand.json", "--gates", gates(text), "--out", "report", *more)
    assert ended.exit_code == code and ended.stdout.startswith(verdict), ended.output
    assert ended.stdout.splitlines()[-1] == "report: report/report.html" and ended.stderr == ""
    found = json.loads((here / "report" / "report.json").read_text())
    assert found["verdict"] == verdict.partition(":")[0] and found["gates_source"] == "gates.yaml" and len(found["pairs"]) == 2


def test_compare_speaks_json_and_has_a_folder_of_its_own(here: Path, pair: Any) -> None:
    ended = lissom("compare", "base.json", "cand.json", "--json")
    assert ended.exit_code == 3 and ended.stderr == ""
    assert json.loads(ended.stdout) == json.loads((here / "runs" / "compare" / "report.json").read_text())
    again = json.loads(lissom("compare", "base.json", "base.json", "--json").stdout)
    assert (
        again["verdict"] == "PASS" and again["gates_source"].startswith("none given") and (here / "runs" / "compare-2").is_dir()
    )
    assert again["command"] == "lissom compare base.json base.json --out runs/compare-2"


def test_github_lines_stay_out_of_json(here: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    plain = lissom("compare", "base.json", "cand.json", "--out", "report")
    assert plain.exit_code == 3 and any(line.startswith("::error ") for line in plain.stdout.splitlines())
    spoken = lissom("compare", "base.json", "cand.json", "--out", "report", "--json")
    assert json.loads(spoken.stdout)["verdict"] == "REGRESSION" and spoken.stderr.startswith("::error ")
    assert (here / "summary.md").read_text().count("# REGRESSION") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.json", "cand.json"], "none.json: cannot be read (No such file or directory). Make it with `lissom evaluate"),
        (["base.json", "torn.json"], "torn.json: not JSON"),
        (["base.json", "search.json"], "search.json: is search, not an evaluation"),
        (["base.json", "newer.json"], "newer.json: written in schema 9 by lissom 2.0, this one reads 1. Update lissom here."),
        (["base.json", "cand.json", "--gates", "wrong.yaml"], "wrong.yaml:1: no metric 'fdi'; there are"),
        (["base.json", "cand.json", "--gates", "absent.yaml"], "absent.yaml: cannot read the gates"),
        (["cand.json", "--base-git", "base.json"], "--base-git base.json: write REV:PATH"),
        (["cand.json", "--base-git", "HEAD:base.json"], "--base-git HEAD:base.json: git knows no revision 'HEAD' here"),
        (["base.json", "cand.json", "--out", "full"], "full: is not empty"),
        (["base.json", "cand.json", "--out", "cand.json"], "cand.json: is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(here: Path, pair: Any, words: list[str], says: str) -> None:
    (here / "torn.json").write_text((here / "base.json").read_text()[:-40])
    (here / "search.json").write_text('{"kind": "search"}')
    (here / "newer.json").write_text(json.dumps({"kind": "evaluation", "schema_version": 9, "lissom": "2.0"}))
    (here / "wrong.yaml").write_text("fdi: {max: 1}")
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("kept")
    before = sorted(p.name for p in here.rglob("*"))
    said = refused("compare", *words)
    assert says in said and len(said.splitlines()) == 1, said
    assert sorted(p.name for p in here.rglob("*")) == before


@pytest.mark.parametrize(
    "words", [[], ["base.json"], ["a", "b", "c"], ["base.json", "cand.json", "--base-git", "HEAD:base.json"]]
)
def test_the_number_of_files_is_checked(here: Path, pair: Any, words: list[str]) -> None:
    ended = lissom("compare", *words)
    assert ended.exit_code == 2 and ended.stdout == "" and "Traceback" not in ended.output


# ---- evaluate --------------------------------------------------------------------------------------------------------------


def test_evaluate_then_compare(here: Path) -> None:
    common = ("--metrics", "fid,clip_score,params", *FEW)
    made = lissom("evaluate", "zoo:fashion", "--steps", 2, *common, "--power", "fid=0.5", "--out", "base.json", "--pictures", 3)
    assert made.exit_code == 0 and "a difference of 0.5 in FD[zoo:judge] takes" in made.stdout, made.output
    assert "8 images for 64 features: the value is biased upward" in made.stderr
    assert len(list((here / "base.images").glob("*.png"))) == 3
    assert lissom("evaluate", "zoo:fashion", "--steps", 1, *common, "--out", "cand.json", "-q").exit_code == 0
    ended = lissom("compare", "base.json", "cand.json", "--out", "report")
    assert ended.exit_code in (3, 4) and "FD[zoo:judge]" in ended.stdout
    finished = lissom(
        "evaluate", "zoo:fashion", "--steps", 2, *common, "--power", "fid=0.5", "--out", "base.json", "--resume", "--json"
    )
    assert json.loads(finished.stdout) == json.loads((here / "base.json").read_text()) and "finished already" in finished.stderr
    assert "base.json: is there already" in refused(
        "evaluate", "zoo:fashion", "--steps", 2, *common, "--out", "base.json", "-q"
    )


def test_settings_and_features_of_single_metrics(here: Path) -> None:
    words = (
        "--metrics",
        "latency,fid",
        "--set",
        "latency.batches=[1, 2]",
        "--set",
        "latency.repeats=4",
        "--features",
        "fid=zoo:judge",
    )
    ended = lissom("evaluate", "zoo:fashion", "--steps", 1, *words, *FEW, "--json", "-q")
    assert ended.exit_code == 0, ended.stderr
    found = Evaluation.parse(ended.stdout, "stdout")
    assert [m.metric for m in found.measurements] == ["latency", "latency_p90", "latency@2", "latency_p90@2", "fid"]
    assert found.seeds == Seeds(role="report", base=0, count=8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--metrics", "fdi"], "no method 'fdi' in evaluate/"),
        (["--features", "kid=zoo:judge"], "features.kid: neither default nor one of the metrics (fid, clip_score)"),
        (["--features", "zoo:juge"], "Did you mean 'zoo:judge'"),
        (["--set", "fid.wings=2"], "settings of fid: wings"),
        (["--set", "kid.x=2"], "settings for 'kid', which is not among the metrics"),
        (["--metrics", "fidelity"], "zoo:fashion is the uncut model itself. Say with --base MODEL"),
        (["--base", "zoo:fashion"], "add fidelity to --metrics"),
        (["--reference", "empty"], "empty: 0 images in it, a reference needs at least 2"),
        (["--reference", "one"], "one: 1 image in it, a reference needs at least 2"),
        (["--reference", "broken"], "broken: 0 of its 3 images can be read"),
        (["--power", "kid=1"], "--power kid: kid is not measured here, only fid, clip_score. Add it to --metrics."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_evaluation_that_cannot_be_is_refused(here: Path, words: list[str], says: str) -> None:
    from PIL import Image

    for name in ("empty", "one", "broken"):
        (here / name).mkdir()
    Image.new("RGB", (8, 8)).save(here / "one" / "a.png")
    for i in range(3):
        (here / "broken" / f"{i}.png").write_bytes(b"" if i else b"\x89PNG")
    said = refused("evaluate", "zoo:fashion", "--steps", 1, *FEW, "-q", *words, "--out", "e.json")
    assert says in said.splitlines()[-1], said
    assert nothing_left(here, "empty", "one", "broken")


@pytest.mark.parametrize(
    "words",
    [
        ["--power", "fid"],
        ["--power", "fid=-1"],
        ["--power", "fid=much"],
        ["--out", "e.txt"],
        ["--samples", "1"],
        ["--samples", "0"],
    ],
)
def test_options_that_make_no_sense(here: Path, words: list[str]) -> None:
    ended = lissom("evaluate", "zoo:fashion", *words)
    assert ended.exit_code == 2 and ended.stdout == "" and nothing_left(here)


def test_ctrl_c_says_how_to_go_on(here: Path) -> None:
    command = [sys.executable, "-m", "lissom", "evaluate", "zoo:fashion", "--steps", "50", "--samples", "4096", "--chunk", "4"]
    process = subprocess.Popen(
        [*command, "--out", "e.json"], stdout=-1, stderr=-1, text=True, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not list((here / "e.images" / ".work").glob("images-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and not (here / "e.json").exists()
    assert "Go on with: lissom evaluate zoo:fashion --steps 50 --samples 4096 --chunk 4 --out e.json --resume" in err
