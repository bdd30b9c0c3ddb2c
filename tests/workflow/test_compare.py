"""`lissom compare` below its command line: rows, pairs, sources, and what CI systems are told."""

import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lissom.core.errors import UserError
from lissom.core.gates import Gate
from lissom.report.compare_schema import CompareReport
from lissom.report.evaluation import Evaluation
from lissom.tests.workflow.evaluations import counted, evaluation, measured, write
from lissom.workflow import compare as work
from lissom.workflow._source import Source

GATES = {"fid": Gate(max_increase=0.5), "params": Gate(max_ratio=0.8)}


def compared(base: Path, candidate: Path, gates: dict[str, Gate] | None = None, allow: bool = False) -> CompareReport:
    return work.compare(
        Source(str(base)), Source(str(candidate)), gates, "gates.yaml", allow_inconclusive=allow, command="lissom compare"
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(
        tmp_path / "base.json", evaluation(measured("fid"), measured("clip_score"), counted("params", 100)), pictures=3
    )


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    found = evaluation(measured("fid", 0.2, noise=1), measured("clip_score", 0.1, noise=1), counted("params", 75), steps=3)
    return write(tmp_path / "candidate.json", found, pictures=3, brightness=20)


def test_gated_rows_come_first_and_every_number_has_one(base: Path, candidate: Path) -> None:
    report = compared(base, candidate, GATES)
    assert [row.metric for row in report.rows] == ["fid", "params", "clip_score"]
    assert [[c.verdict for c in row.checks] for row in report.rows] == [["PASS"], ["PASS"], []]
    assert (report.verdict, report.exit_code, len(report.checks)) == ("PASS", 0, 2)
    fid = report.rows[0]
    assert fid.paired and fid.difference is not None and fid.difference.value == pytest.approx(0.2, abs=0.02)
    assert fid.difference.low is not None and fid.difference.low > 0 and fid.ratio is not None and fid.ratio.value > 1
    params = report.rows[1]
    assert params.ratio is not None and (params.ratio.value, params.ratio.low, params.ratio.high) == (0.75, 0.75, 0.75)


def test_without_gates_any_change_for_the_worse_counts(base: Path, candidate: Path) -> None:
    report = compared(base, candidate)
    assert report.gates == {"fid": Gate(max_increase=0), "clip_score": Gate(max_decrease=0), "params": Gate(max_increase=0)}
    assert [c.verdict for c in report.checks] == ["REGRESSION", "REGRESSION", "PASS"]
    assert (report.verdict, report.exit_code) == ("REGRESSION", 3)
    assert compared(base, base).verdict == "PASS"


def test_other_seeds_are_unpaired_and_other_suites_incomparable(base: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", evaluation(measured("fid", 0.05, base=1)), pictures=3)
    report = compared(base, other, {"fid": Gate(max_increase=0)})
    assert not report.rows[0].paired and (report.verdict, report.exit_code) == ("INCONCLUSIVE", 4)
    assert compared(base, other, {"fid": Gate(max_increase=0)}, allow=True).exit_code == 0
    fewer = write(tmp_path / "fewer.json", evaluation(measured("fid", n=32)))
    report = compared(base, fewer, {"fid": Gate(max_increase=9)}, allow=True)
    assert (report.verdict, report.exit_code) == ("INCOMPARABLE", 4)
    assert "images (64 against 32)" in report.rows[0].incomparable and report.rows[0].difference is None
    bare = write(tmp_path / "bare.json", evaluation(counted("macs", 5)))
    with pytest.raises(UserError, match="no metric in common: measure both with the same --metrics"):
        compared(base, bare)
    assert compared(base, bare, {"macs": Gate(max_ratio=1)}).verdict == "INCOMPARABLE"
    assert compared(base, bare, {"macs": Gate(max=6)}).verdict == "PASS"


def test_pairs_have_the_largest_change_first(base: Path, candidate: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    report = work.write(compared(base, candidate), Source(str(base)), Source(str(candidate)), out)
    assert [(pair.index, pair.caption) for pair in report.pairs] == [(2, "picture 2"), (1, "picture 1"), (0, "picture 0")]
    assert report.pairs[0].change == pytest.approx(40 / 255) and report.pairs[-1].change == 0
    assert sorted(p.name for p in out.iterdir()) == ["junit.xml", "pairs", "report.html", "report.json", "report.md"]
    assert (out / report.pairs[0].base).is_file() and len(list((out / "pairs").iterdir())) == 6
    assert CompareReport.model_validate_json((out / "report.json").read_text()) == report
    suite = ElementTree.parse(out / "junit.xml").getroot()
    assert len(list(suite.iter("testcase"))) == 3 and len(list(suite.iter("failure"))) == 2
    # an earlier comparison is written over, anything else is not
    work.write(compared(base, base), Source(str(base)), Source(str(base)), out)
    (out / "report.json").write_text("{}")
    with pytest.raises(
        UserError, match="report: is not empty, and holds something else than a comparison. Choose another --out"
    ):
        work.write(compared(base, base), Source(str(base)), Source(str(base)), out)


def test_one_more_is_more_and_a_missing_picture_is_left_out(base: Path, candidate: Path, tmp_path: Path) -> None:
    more = write(
        tmp_path / "more.json", evaluation(measured("fid"), measured("clip_score"), counted("params", 101)), pictures=3
    )
    report = compared(base, more)
    assert report.verdict == "REGRESSION" and work.headline(report).startswith(
        "REGRESSION: params rose by 1, no rise is allowed"
    )
    (tmp_path / "more.images" / "000001.png").unlink()
    written = work.write(report, Source(str(base)), Source(str(more)), tmp_path / "report")
    assert sorted(pair.index for pair in written.pairs) == [0, 2]


def test_why_there_are_no_pairs(base: Path, tmp_path: Path) -> None:
    def why(candidate: Path) -> str:
        name = candidate.stem
        report = work.write(
            compared(base, candidate, GATES), Source(str(base)), Source(str(candidate)), tmp_path / f"report-{name}"
        )
        assert report.pairs == ()
        return report.pairs_missing

    assert "other seeds or prompts" in why(write(tmp_path / "a.json", evaluation(measured("fid", base=1)), pictures=3))
    assert "other seeds or prompts" in why(write(tmp_path / "b.json", evaluation(measured("fid", prompts="q")), pictures=3))
    assert "no pictures beside it" in why(write(tmp_path / "c.json", evaluation(measured("fid"))))
    assert "no metric looked at images" in why(write(tmp_path / "d.json", evaluation(counted("params", 1))))
    torn = write(tmp_path / "e.json", evaluation(measured("fid")), pictures=3)
    (tmp_path / "e.images" / "000001.png").write_bytes(b"not a picture")
    assert "image 1 cannot be read" in why(torn)


def test_a_baseline_of_another_revision(base: Path, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "base.json", "base.images")
    git("commit", "-m", "baseline")
    expected = Evaluation.parse(base.read_text(), "x")
    base.unlink()
    monkeypatch.chdir(tmp_path)
    source = Source.git("main:base.json")
    assert source.evaluation() == expected and source.name == "main:base.json"
    assert (
        source.picture("000001.png") is not None
        and source.picture("000009.png") is None
        and source.captions()[2] == "picture 2"
    )
    report = work.write(
        work.compare(source, Source("candidate.json"), None, "", allow_inconclusive=False, command=""),
        source,
        Source("candidate.json"),
        Path("out"),
    )
    assert len(report.pairs) == 3 and report.base.source == "main:base.json"
    below = tmp_path / "below"  # paths start from where the command is given
    below.mkdir()
    monkeypatch.chdir(below)
    assert Source.git("HEAD:../base.json").evaluation() == expected
    with pytest.raises(UserError, match=r"revision 'main' has no file base.json. Paths start from this folder"):
        Source.git("main:base.json").evaluation()
    with pytest.raises(UserError, match=r"git knows no revision 'v9' here.*a checkout of depth 1"):
        Source.git("v9:base.json").evaluation()
    with pytest.raises(UserError, match=r"--base-git main: write REV:PATH"):
        Source.git("main")
    with pytest.raises(UserError, match=r"no revision begins with a dash"):
        Source.git("--output=x:base.json")


def test_a_metric_that_the_candidate_dropped_is_not_kept(base: Path, tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer.json", evaluation(measured("fid")))
    report = compared(base, fewer)
    assert (report.verdict, report.exit_code) == ("INCOMPARABLE", 4)
    assert [c.metric for c in report.checks if c.verdict == "INCOMPARABLE"] == ["clip_score", "params"]
    timed = evaluation(measured("latency", seeds=None, prompts=None))
    clocks = [write(tmp_path / f"{name}.json", timed) for name in ("one", "two")]
    with pytest.raises(UserError, match="only times and memory were measured, which vary: say with --gates FILE"):
        compared(*clocks)
    assert compared(*clocks, {"latency": Gate(max_ratio=1.5)}).verdict == "PASS"


def test_pictures_are_found_after_a_renaming_and_never_elsewhere(base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "renamed.json")
    (tmp_path / "base.images").rename(tmp_path / "renamed.images")
    assert Source(str(tmp_path / "renamed.json")).picture("000000.png") is not None
    raw = json.loads((tmp_path / "renamed.json").read_text())
    for elsewhere in ("../elsewhere", "/etc"):
        (tmp_path / "x.json").write_text(json.dumps(raw | {"images": elsewhere}))
        with pytest.raises(UserError, match="is no folder beside it"):
            Source(str(tmp_path / "x.json")).evaluation()


def test_github_is_told_where_it_listens(base: Path, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compared(base, candidate)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert work.announce(report) == []
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    lines = work.announce(report)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary.md"))
    assert work.announce(report)[-1].startswith("::warning::the job summary ")  # the verdict stands all the same
    assert sum(line.startswith("::error ") for line in lines) == 2
    assert summary.read_text().startswith("before\n# REGRESSION: ") and "pairs/" not in summary.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"), ("[1]", "is a list, not an evaluation"), ("{}", "is no report of lissom, not an evaluation"),
        ('{"kind": "search"}', "is search, not an evaluation"),
        (json.dumps({"kind": "evaluation", "schema_version": 9, "lissom": "3.0"}), r"schema 9 by lissom 3.0, this one reads 1. Update lissom here"),
        (json.dumps({"kind": "evaluation", "schema_version": 0}), r"schema 0 .* Measure the model again"),
        (json.dumps({"kind": "evaluation", "schema_version": 1}), r"Field required. Measure the model again"),
        (json.dumps({"kind": "evaluation", "schema_version": 1, "measurements": [3]}), r"Measure the model again"),
        ("[" * 200_000, "not JSON"), ('{"kind": "\\ud800"}', "not JSON"),
        (evaluation(measured("fid", replicates=(1e308, 1e308, -1e308), value=1e308)).text(), "too large to be true"),
    ],
)  # fmt: skip
def test_files_that_are_no_evaluation(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json: .*" + said):
        Source(str(tmp_path / "x.json")).evaluation()


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: cannot be read \(No such file"):
        Source(str(tmp_path / "none.json")).evaluation()
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="x.json: not a text file"):
        Source(str(tmp_path / "x.json")).evaluation()
