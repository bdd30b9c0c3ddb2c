import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from lissom.evaluate import _extractor, _features
from lissom.tests.evaluate.inception import save_inception
from lissom.tests.evaluate.judge import save_judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("zoo") / "tiny-judge")


@pytest.fixture(scope="session")
def judge(judge_folder: Path) -> _extractor.Features:
    return _features.load(f"local-dir:{judge_folder}")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the name that clean-fid looks for. Read only."""
    return save_inception(tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a connection that nobody told so."""

    def blocked(*_: object, **__: object) -> None:
        raise OSError("no connection in tests")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def caches(tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches: lissom's in caches/lissom, the model hub's in caches/hub."""
    from huggingface_hub import constants

    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "lissom"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def cached(caches: Path) -> Callable[..., Path]:
    """Put files into the model hub's cache, as a download would: cached("owner/name", file, ...)."""

    def put(repo: str, *files: Path) -> Path:
        folder = caches / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("0123abc")
        for file in files:
            shutil.copy(file, snapshot / file.name)
        return snapshot

    return put
