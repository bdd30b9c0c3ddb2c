"""What is fetched is whole, right, and fetched once."""

import hashlib
import io
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from lissom.core.errors import DiskError, MissingOffline, UserError
from lissom.evaluate import _download
from lissom.workflow.doctor import examine

CONTENT = bytes(range(256)) * 20_000  # 5 MB, several blocks
FILE = _download.Remote("weights.pt", "https://example.org/weights.pt", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Server:
    """Stands in for urlopen."""

    def __init__(self, content: bytes = CONTENT, breaks_at: int | None = None, pause: float = 0.0) -> None:
        self.content, self.breaks_at, self.pause, self.calls = content, breaks_at, pause, 0

    @contextmanager
    def __call__(self, url: str, timeout: float) -> Iterator["Server"]:
        assert url == FILE.url and 0 < timeout <= 60
        self.calls += 1
        self._stream = io.BytesIO(self.content)
        yield self

    def read(self, size: int) -> bytes:
        time.sleep(self.pause)
        if self.breaks_at is not None and self._stream.tell() >= self.breaks_at:
            raise ConnectionResetError("connection reset by peer")
        return self._stream.read(size)


def serve(monkeypatch: pytest.MonkeyPatch, server: object) -> None:
    monkeypatch.setattr(_download.urllib.request, "urlopen", server)


def left_over(caches: Path) -> set[str]:
    return {p.name for p in (caches / "lissom").iterdir()}


def test_downloaded_once_with_one_line(
    caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    serve(monkeypatch, server)
    path = _download.fetch(FILE)
    assert path == caches / "lissom" / "weights.pt" and path.read_bytes() == CONTENT
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"downloading weights.pt (5 MiB) to {path.parent}\n"
    assert _download.fetch(FILE) == path and server.calls == 1 and capsys.readouterr().err == ""
    assert left_over(caches) == {"weights.pt", ".weights.pt.lock"}


def refused(match: str) -> None:
    with pytest.raises(MissingOffline, match=match) as e:
        _download.fetch(FILE)
    assert e.value.exit_code == 5 and FILE.url in str(e.value)


def test_cut_short(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Server(CONTENT[:3_000_000]))
    refused("broke off after 3000000 of 5120000 bytes")
    assert left_over(caches) == {".weights.pt.lock"}
    serve(monkeypatch, Server(breaks_at=2_000_000))
    refused("connection reset by peer")
    assert left_over(caches) == {".weights.pt.lock"}
    serve(monkeypatch, Server())  # and the next try succeeds
    assert _download.fetch(FILE).read_bytes() == CONTENT


def test_another_file(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Server(CONTENT[::-1]))
    refused("the server sent another file, with sha256 [0-9a-f]{16}…")
    assert left_over(caches) == {".weights.pt.lock"}
    path = caches / "lissom" / "weights.pt"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not weights.pt .* Delete it") as e:
        _download.fetch(FILE)
    assert e.value.exit_code == 2 and path.read_bytes() == b"something else"  # it may be the user's


def test_no_such_file_on_the_server(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise urllib.error.HTTPError(FILE.url, 404, "Not Found", None, None)  # type: ignore[arg-type]

    serve(monkeypatch, gone)
    refused("HTTP Error 404: Not Found")


def test_two_at_once(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(pause=0.05)
    serve(monkeypatch, server)
    found: list[Path] = []
    both = [threading.Thread(target=lambda: found.append(_download.fetch(FILE))) for _ in range(3)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(found) == 3 and found[0].read_bytes() == CONTENT and server.calls == 1


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _download.cache() == tmp_path / "own"
    monkeypatch.delenv("LISSOM_CACHE")
    assert _download.cache() == tmp_path / "shared" / "lissom"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/does/not/count")
    assert _download.cache() == tmp_path / "home" / ".cache" / "lissom"


def test_a_cache_that_cannot_be_written(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (caches / "file").touch()
    monkeypatch.setenv("LISSOM_CACHE", str(caches / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be written .*set LISSOM_CACHE"):
        _download.fetch(FILE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LISSOM_CACHE", str(caches / "lissom"))
    serve(monkeypatch, Server())
    monkeypatch.setattr(_download.os, "fsync", full)
    with pytest.raises(DiskError, match="No space left on device.*Make room"):
        _download.fetch(FILE)
    assert left_over(caches) == {".weights.pt.lock"}


class Hub:
    """Stands in for the hub's client: one repository with some files, in no cache at first."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files, self.here, self.calls = folder, files, False, 0

    def model_info(self, repo: str, timeout: float) -> None:
        if repo != "some/model":
            raise RepositoryNotFoundError("404 Client Error: Repository Not Found", response=Mock())

    def hf_hub_download(self, repo: str, filename: str, local_files_only: bool = False) -> str:
        if local_files_only and not (self.folder / filename).is_file():
            raise LocalEntryNotFoundError("not here")
        if filename not in self.files:
            raise RemoteEntryNotFoundError("404 Client Error: Entry Not Found", response=Mock())
        return str(self._put([filename], local_files_only) / filename)

    def snapshot_download(self, repo: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        return str(self._put(sorted(set(allow_patterns) & self.files.keys()), local_files_only))

    def _put(self, names: list[str], local: bool) -> Path:
        if not local:
            self.calls += 1
            for name in names:
                (self.folder / name).write_text(self.files[name])
        return self.folder


@pytest.fixture
def hub(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (caches / "hub").mkdir()
    hub = Hub(caches / "hub", {"model.safetensors": "weights", "tokenizer.json": "{}", "tokenizer_config.json": "{}"})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, *a, **k: hub.model_info(*a, **k))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_from_the_hub_once(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = _download.hub_file("features 'x'", "some/model", "model.safetensors", "or else")
    assert path.read_text() == "weights"
    assert capsys.readouterr().err == "downloading model.safetensors of some/model to the hub's cache\n"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what is here is used
    assert _download.hub_file("features 'x'", "some/model", "model.safetensors", "or else") == path and hub.calls == 1
    assert capsys.readouterr().err == ""


def test_a_tokenizer_from_the_hub(hub: Hub) -> None:
    (hub.folder / "config.json").write_text("{}")  # another file of the repository was fetched before
    folder = _download.hub_tokenizer("features 'x'", "some/model")
    assert _download.has_tokenizer(folder) and not (folder / "model.safetensors").exists()
    assert _download.hub_tokenizer("features 'x'", "some/model") == folder and hub.calls == 1


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(
        UserError, match="some/model has no open_clip_model.safetensors, and pickles are never read.*, or else"
    ) as e:
        _download.hub_file("features 'x'", "some/model", "open_clip_model.safetensors", "or else")
    assert e.value.exit_code == 2
    with pytest.raises(UserError, match="the hub shows no other/model .*if it is private, or else") as e:
        _download.hub_file("features 'x'", "other/model", "model.safetensors", "or else")
    assert e.value.exit_code == 2
    del hub.files["tokenizer.json"]
    with pytest.raises(UserError, match="some/model has no tokenizer"):
        _download.hub_tokenizer("features 'x'", "some/model")


def test_a_hub_that_breaks_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise LocalEntryNotFoundError("not here") if local_files_only else ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    for ask in (
        lambda: _download.hub_file("f", "some/model", "model.safetensors", "or"),
        lambda: _download.hub_tokenizer("f", "some/model"),
    ):
        with pytest.raises(MissingOffline, match="was not downloaded .connection reset by peer") as e:
            ask()
        assert e.value.exit_code == 5


def test_what_doctor_says_of_it(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine()["found"]
    place = caches / "lissom" / "inception-2015-12-05.pt"
    assert found["features:inception"] == f"not in the cache, downloaded to {place} when asked for"
    assert found["hub"] == "downloads when a hub id is given"
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    found = examine()["found"]
    assert found["features:inception"] == f"missing: offline, so put it at {place}"
    assert found["hub"] == "offline (TRANSFORMERS_OFFLINE)"
    place.parent.mkdir()
    place.write_bytes(b"x" * 100)
    told = examine()
    assert "features:inception" not in told["found"] and any("is not inception-2015-12-05.pt" in p for p in told["problems"])
