"""`lissom run` with gates in the recipe: measured once, compared, and the verdict is the exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
from lissom.core import sampling
from lissom.tests.cli.commands import lissom, refused

EVALUATE: dict[str, Any] = {"metrics": ["fid", "accuracy"], "samples": 8}
SHORT: dict[str, Any] = {"trials": 2, "rescore": 1, "samples": 4, "rescore_samples": 4}


def recipe(gates: dict[str, Any], **stage: Any) -> Path:
    stages = [{"search": "random_search", "steps": 2, **SHORT, **stage}]
    text = {"lissom": 1, "name": "gated", "model": "zoo:fashion", "evaluate": EVALUATE, "stages": stages, "gates": gates}
    Path("r.yaml").write_text(json.dumps(text))
    return Path("r.yaml")


def test_a_recipe_that_keeps_its_gates_ends_with_0_and_is_measured_once(
    here: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = {"fid": {"max_increase": 1000}, "macs": {"max_ratio": 1.0}, "fidelity": {"max": 2.0}}
    ended = lissom("run", recipe(gates), "--out", "run", "--device", "cpu")
    assert ended.exit_code == 0, ended.output
    lines = ended.stdout.splitlines()
    assert lines[2].startswith("gates: PASS: 3 limits kept") and lines[3] == "report: run/gates/report/report.html"
    found = json.loads((here / "run" / "gates" / "report" / "report.json").read_text())
    assert found["gates_source"] == "the recipe gated" and found["command"] == "lissom run run"
    assert (found["base"]["what"], found["candidate"]["what"][:14]) == ("stock schedule of 2 steps", "a plan of 2 st")
    fidelity = next(row for row in found["rows"] if row["metric"] == "fidelity")
    assert fidelity["base"] is None and fidelity["candidate"]["value"] >= 0  # the baseline is what it is measured against
    assert [row["metric"] for row in found["rows"]][:3] == ["fid", "macs", "fidelity"]
    monkeypatch.setattr(sampling.Sampler, "images", lambda *_, **__: pytest.fail("an image was made"))
    again = lissom("run", "run")
    assert again.exit_code == 0 and again.stdout == ended.stdout


@pytest.mark.parametrize(
    ("gates", "code", "verdict"),
    [
        ({"accuracy": {"min": 1.5}}, 3, "REGRESSION"),
        ({"fid": {"max_increase": 0.0}}, None, None),  # whatever these few images say, the code belongs to the verdict
        ({"kid": {"max_ratio": 0.001}}, None, None),
    ],
)
def test_the_verdict_is_the_exit_code(here: Path, pretended: None, gates: Any, code: int | None, verdict: str | None) -> None:
    ended = lissom("run", recipe(gates), "--out", "run", "--device", "cpu", "--json")
    said = next(line for line in ended.stderr.splitlines() if line.startswith("gates: "))
    found = json.loads((here / "run" / "gates" / "report" / "report.json").read_text())
    assert said.startswith(f"gates: {found['verdict']}: ") and found["verdict"] == (verdict or found["verdict"])
    codes = {"PASS": 0, "REGRESSION": 3, "INCONCLUSIVE": 4, "INCOMPARABLE": 4}
    assert ended.exit_code == codes[found["verdict"]] == (code if code is not None else ended.exit_code)
    assert json.loads(ended.stdout)["kind"] == "search"  # one object, the last stage's


def test_a_gate_may_name_a_batch_size(here: Path, pretended: None) -> None:
    ended = lissom(
        "run", recipe({"latency@3": {"max_ratio": 1000}, "latency": {"max_ratio": 1000}}), "--out", "run", "--device", "cpu"
    )
    assert ended.exit_code == 0, ended.output
    found = json.loads((here / "run" / "gates" / "report" / "report.json").read_text())
    assert [row["metric"] for row in found["rows"][:2]] == ["latency@3", "latency"]
    assert found["rows"][0]["candidate"]["conditions"]["batch"] == "3"


def test_gates_are_checked_before_anything_runs(here: Path) -> None:
    for gate in ("latency@x", "latency@1", "fid@8"):
        assert "only latency and latency_p90 have a batch size" in refused("run", recipe({gate: {"max": 1}}), "--out", "run")
    text = json.loads(recipe({"fidelity": {"max": 1}}).read_text())
    text |= {"model": "./model", "evaluate": EVALUATE | {"features": {"fid": "zoo:judge", "accuracy": "zoo:judge"}}}
    Path("own.yaml").write_text(json.dumps(text))
    assert "fidelity, which a gate names, has none: add an entry for it, or a default" in refused(
        "run", "own.yaml", "--out", "run"
    )
    text["evaluate"]["features"] |= {"fidelity": "zoo:judge"}
    Path("own.yaml").write_text(json.dumps(text))
    assert "./model: no such folder" in refused("run", "own.yaml", "--out", "run")
    said = refused("run", recipe({"fdi": {"max": 1}}), "--out", "run")
    assert "gates.fdi: no metric 'fdi'; there are" in said and not (here / "run").exists()
    dry = lissom("run", recipe({"macs": {"max_ratio": 1}}), "--dry-run", "--device", "cpu")
    assert dry.exit_code == 0 and "gates on macs: 16 more images" in dry.stdout
