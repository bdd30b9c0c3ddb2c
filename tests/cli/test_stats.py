"""`lissom stats`: what it prints and where, and what it ends with."""

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
from lissom.evaluate import _features
from lissom.evaluate._statistics import Statistics, of
from lissom.tests.cli.commands import lissom, nothing_left, refused
from lissom.tests.evaluate.judge import Means, images, save_judge
from lissom.tests.evaluate.test_images import fill, zipped

BUILD = ("stats", "build", "images", "--features", "means", "--device", "cpu")


@pytest.fixture
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "load", lambda name, device="cpu": Means())


@pytest.fixture
def folder(here: Path) -> Path:
    made = fill(here / "images", n=12)
    (made / "torn.png").write_bytes(b"")
    return made


def printed(*arguments: Any, code: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout."""
    ended = lissom(*arguments, "--json")
    assert ended.exit_code == code, ended.output
    return json.loads(ended.stdout)


def test_build_show_and_verify_for_people(means: None, folder: Path) -> None:
    ended = lissom(*BUILD, "--out", "s.safetensors")
    assert ended.exit_code == 0 and "12 of images" in ended.stdout and "features of 12 single images" in ended.stdout
    assert "warning: 1 of 13 files cannot be read as images and were left out: torn.png" in ended.stderr
    shown = lissom("stats", "show", "s.safetensors")
    assert shown.exit_code == 0 and shown.stdout == ended.stdout and shown.stderr == ""
    good = lissom("stats", "verify", "s.safetensors", "images", "--features", "means", "--device", "cpu", "-q")
    assert good.exit_code == 0 and good.stderr == ""
    assert good.stdout.startswith("s.safetensors: good (checksum, ") and "features extracted again" in good.stdout


def test_json_is_one_object_and_nothing_else(means: None, folder: Path) -> None:
    made = printed(*BUILD, "--out", "s.safetensors", "--keep-features", 5)
    assert made["n"] == 12 and made["kept"] == 5 and made["skipped"] == ["torn.png"] and not made["finished_already"]
    shown = printed("stats", "show", "s.safetensors")
    assert {**shown, "seconds": made["seconds"], "finished_already": False} == made
    assert printed("stats", "verify", "s.safetensors", "images") | {"checked": []} == {
        "schema_version": 1, "kind": "verification", "file": "s.safetensors", "ok": True, "checked": [], "problems": [],
    }  # fmt: skip
    again = printed(*BUILD, "--out", "s.safetensors", "--keep-features", 5, "--resume")
    assert again["finished_already"] and again["checksum"] == made["checksum"]


def test_quiet_says_only_what_must_be_known(means: None, folder: Path) -> None:
    ended = lissom(*BUILD, "--out", "s.safetensors", "-q")
    assert ended.stderr.splitlines() == ["warning: 1 of 13 files cannot be read as images and were left out: torn.png"]


def test_shards_are_merged(means: None, folder: Path) -> None:
    lissom(*BUILD, "--out", "whole.safetensors")
    for i in (1, 2):
        assert printed(*BUILD, "--out", f"{i}.safetensors", "--shard", f"{i}/2")["shards"] == [f"{i}/2"]
    merged = printed("stats", "build", "1.safetensors", "2.safetensors", "--out", "all.safetensors")
    assert merged["hash"] == printed("stats", "show", "whole.safetensors")["hash"] and merged["shards"] == []
    ended = lissom("stats", "build", "1.safetensors", "2.safetensors", "--out", "all.safetensors", "--resume")
    assert ended.exit_code == 0 and ended.stdout == "all.safetensors: finished already\n"


def test_a_real_extractor_from_a_zip(folder: Path) -> None:
    judge = save_judge(folder.parent / "judge")
    packed = zipped(folder, [p.name for p in folder.iterdir()])
    with_judge = ("--features", f"local-dir:{judge}", "--device", "cpu")
    made = printed("stats", "build", packed.name, *with_judge, "--out", "s.safetensors")
    assert made["dim"] == 16 and made["features"] == "local-dir:judge" and made["singular"]
    expected = of(_features.load(f"local-dir:{judge}"), images(12).split(5), "")
    found = Statistics.load(Path("s.safetensors"))
    assert found.hash == expected.hash and torch.allclose(found.m2, expected.m2, rtol=1e-4, atol=1e-6)
    assert printed("stats", "verify", "s.safetensors", packed.name, *with_judge)["ok"]
    said = refused("stats", "verify", "s.safetensors", packed.name, "--features", "zoo:judge", "--device", "cpu", "-q")
    assert "made by local-dir:judge" in said and "cannot be compared with zoo:judge" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("stats", "build", "images", "--out", "s.safetensors"), "say with --features what to see the images by"),
        ((*BUILD, "--out", "s.npz"), "s.npz: a statistics file ends in .safetensors"),
        ((*BUILD, "--out", "there.safetensors"), "there.safetensors: exists already. Name another --out, or add --resume"),
        ((*BUILD, "--out", "images"), "images: is a folder"),
        ((*BUILD, "--out", "images/000.png/s.safetensors"), "000.png is a file. Name another file"),
        ((*BUILD, "--out", "s.safetensors", "--device", "tpu7"), "--device tpu7: cannot be used here"),
        (("stats", "build", "absent", *BUILD[3:], "--out", "s.safetensors"), "absent: no such folder or file"),
        (("stats", "build", "absent.safetensors", "--out", "s.safetensors"), "absent.safetensors: no such statistics file"),
        (
            ("stats", "build", "images", "there.safetensors", *BUILD[3:], "--out", "s.safetensors"),
            "statistics file among images",
        ),
        (("stats", "show", "absent.safetensors"), "absent.safetensors: no such statistics file"),
        (("stats", "show", "images/000.png"), "000.png: cannot be read as a statistics file"),
        (("stats", "verify", "absent.safetensors"), "absent.safetensors: no such statistics file"),
        (("stats", "verify", "there.safetensors", "--features", "means"), "extracting again needs the images too"),
        (("stats", "verify", "there.safetensors", "absent"), "absent: no such folder or file"),
        (("stats", "verify", "there.safetensors", "images", "-q"), "of 5 images, images has 12 (1 more cannot be read)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    means: None, folder: Path, here: Path, words: tuple[str, ...], says: str
) -> None:
    of(Means(), [images(5)], "here").save(here / "there.safetensors")
    said = refused(*words)
    assert says in said and len(said.splitlines()) == 1, said
    assert nothing_left(here, "images", "there.safetensors")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_a_shard_is_a_part_of_a_whole(folder: Path, shard: str) -> None:
    assert "write which part of how many" in refused(*BUILD, "--out", "s.safetensors", "--shard", shard)


@pytest.mark.parametrize("words", [("--keep-features", -1), ("--workers", 0), ("--limit", 1)])
def test_numbers_out_of_range_are_refused(folder: Path, words: tuple[str, int]) -> None:
    assert words[0] in refused(*BUILD, "--out", "s.safetensors", *words)


def test_what_verify_finds_ends_with_2(means: None, folder: Path) -> None:
    lissom(*BUILD, "--out", "s.safetensors", "-q")
    statistics = Statistics.load(Path("s.safetensors"))
    statistics.mean += 100
    statistics.save(Path("moved.safetensors"))
    content = bytearray(Path("s.safetensors").read_bytes())
    content[-1] ^= 1
    Path("torn.safetensors").write_bytes(content)
    for name, says in (("moved", "the mean of all its kept features is 100 away from its mean"), ("torn", "damaged")):
        said = refused("stats", "verify", f"{name}.safetensors", "-q")
        assert said.startswith(f"lissom: {name}.safetensors: ") and says in said and len(said.splitlines()) == 1
        found = printed("stats", "verify", f"{name}.safetensors", "-q", code=2)
        assert not found["ok"] and says in found["problems"][0]


def test_a_full_disk_ends_with_1_and_can_be_resumed(means: None, folder: Path, here: Path) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(*BUILD, "--out", "s.safetensors", "-q", code=1)
    assert "s.safetensors: cannot be written (No space left on device). Free space and go on with --resume." in said
    assert nothing_left(here, "images")
    assert printed(*BUILD, "--out", "s.safetensors", "--resume")["n"] == 12


# The command line with an extractor that takes its time, in a process of its own.
SCRIPT = """
import sys
from lissom.evaluate import _extraction, _features
from lissom.tests.workflow import slow
if __name__ == "__main__":
    _features.load, _extraction.CHECKPOINT = slow.load, 10
    from lissom.cli.app import main
    main()
"""


@pytest.mark.parametrize(("workers", "key"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_an_interrupted_build_says_how_it_goes_on(means: None, here: Path, workers: int, key: signal.Signals) -> None:
    """SIGINT as a terminal sends it: to the workers as well."""
    fill(here / "images", n=100)
    (here / "script.py").write_text(SCRIPT)
    words = [
        "stats",
        "build",
        "images",
        "--features",
        "slow",
        "--out",
        "s.safetensors",
        "--device",
        "cpu",
        "--workers",
        f"{workers}",
    ]
    process = subprocess.Popen(
        [sys.executable, "script.py", *words], cwd=here, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    for _ in range(600):
        if len(list(here.glob("s.safetensors.partial*"))) == workers or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, key) if key == signal.SIGINT else process.send_signal(key)
    out, said = process.communicate(timeout=60)  # ends when nobody has its stderr any more: no worker is left
    assert process.returncode == 130 and out == "", said
    assert "interrupted; everything that was complete is kept. Go on with: lissom stats build images" in said
    assert said.rstrip().endswith(f"--workers {workers} --resume") and "Traceback" not in said
    states = [f"s.safetensors.partial-{i}-of-2" for i in (1, 2)] if workers == 2 else ["s.safetensors.partial"]
    assert nothing_left(here, "images", "script.py", *states)
    if workers == 1:
        assert printed(*words, "--resume", "-q")["n"] == 100 and nothing_left(here, "images", "script.py", "s.safetensors")
