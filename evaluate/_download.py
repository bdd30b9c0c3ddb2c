"""Files that features need from elsewhere: where they are kept, how they are fetched, and what to do where nothing can be fetched."""

import errno
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..core.errors import DiskError, MissingOffline, UserError, one_line
from ..core.models import HUB_TIMEOUT

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 30.0  # seconds without an answer
VOCABULARIES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")
BESIDE_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "config.json")


@dataclass(frozen=True)
class Remote:
    """A file of fixed content on a server."""

    name: str
    url: str
    size: int  # bytes
    sha256: str
    instead: str = ""  # what the user may give in its place: the error's last words


INCEPTION = Remote(
    name="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    size=95_607_719,
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    instead=", or give inception:FILE",
)


def cache() -> Path:
    """Where lissom keeps what it downloaded: $LISSOM_CACHE, else $XDG_CACHE_HOME/lissom, else ~/.cache/lissom."""
    if own := os.environ.get("LISSOM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "lissom"


def offline() -> str:
    """The variable that forbids downloads, or nothing."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((n for n in names if os.environ.get(n, "").upper() in ("1", "TRUE", "YES", "ON")), "")


def fetch(file: Remote) -> Path:
    """The file in the cache, downloaded if it is not there; its checksum is verified at every call.

    Raises MissingOffline if it is neither there nor to be had, UserError if another file has its place.
    """
    path = cache() / file.name
    if not path.is_file():
        if forbidden := offline():
            raise MissingOffline(_absent(file, path, f"{forbidden} is set"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):  # another process may be at it: then wait for its file
                if not path.is_file():
                    _download(file, path)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
            raise (DiskError if full else UserError)(
                f"{path}: cannot be written ({e.strerror or one_line(e)}). Make room, or set LISSOM_CACHE to another folder."
            ) from e
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != file.sha256:
        raise UserError(
            f"{path}: is not {file.name} (sha256 {found[:16]}…, expected {file.sha256[:16]}…). "
            "Delete it to have it downloaded again, or put the right file there."
        )
    return path


def _download(file: Remote, path: Path) -> None:
    """Stream beside, verify, rename. Raises OSError of the disk as it is."""
    print(f"downloading {file.name} ({file.size / 2**20:.0f} MiB) to {path.parent}", file=sys.stderr, flush=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with beside.open("wb") as f:
            for block in _blocks(file, path):
                f.write(block)
                digest.update(block)
                size += len(block)
            f.flush()
            os.fsync(f.fileno())
        if size < file.size:
            raise MissingOffline(_absent(file, path, f"the connection broke off after {size} of {file.size} bytes"))
        if digest.hexdigest() != file.sha256:
            raise MissingOffline(_absent(file, path, f"the server sent another file, with sha256 {digest.hexdigest()[:16]}…"))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _blocks(file: Remote, path: Path) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer:
            while block := answer.read(BLOCK):
                yield block
    except (OSError, http.client.HTTPException) as e:
        why = e.reason if isinstance(e, urllib.error.URLError) and isinstance(e.reason, Exception) else e  # the cause in it
        raise MissingOffline(_absent(file, path, one_line(why))) from e


def _absent(file: Remote, path: Path, why: str) -> str:
    return (
        f"{file.name} is needed, is not in the cache, and was not downloaded ({why}). "
        f"Put {file.url} at {path} (sha256 {file.sha256[:16]}…){file.instead}."
    )


@dataclass(frozen=True)
class Wanted:
    """Files of a repository of the model hub, and the words for a refusal."""

    asked: str  # the features that need it
    repo: str
    what: str
    arguments: str  # of `hf download` after the repository
    instead: str  # what the user may give in its place: the error's last words

    def refuse(self, why: str) -> MissingOffline:
        from huggingface_hub.constants import HF_HUB_CACHE

        return MissingOffline(
            f"{self.asked}: needs {self.what} of the hub's {self.repo}, which is not in {HF_HUB_CACHE} and was not downloaded "
            f"({why}). Run `hf download {self.repo} {self.arguments}` where there is a connection and copy it there, {self.instead}."
        )

    def reach(self) -> None:
        """Make sure that the hub answers for it: a download alone would try for half a minute, or for ever."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        if forbidden := offline():
            raise self.refuse(f"{forbidden} is set")
        try:
            HfApi().model_info(self.repo, timeout=HUB_TIMEOUT)
        except RepositoryNotFoundError as e:
            raise UserError(
                f"{self.asked}: the hub shows no {self.repo} ({one_line(e)}); log in with `hf auth login` if it is private, "
                f"{self.instead}."
            ) from e
        except Exception as e:  # whatever HTTP library the hub's client uses
            raise self.refuse(one_line(e)) from e
        print(f"downloading {self.what} of {self.repo} to the hub's cache", file=sys.stderr, flush=True)


def hub_file(asked: str, repo: str, filename: str, instead: str) -> Path:
    """A file of a repository of the model hub, from the hub's cache on this machine or else downloaded into it.

    asked and instead: as in `Wanted`. Raises MissingOffline if it is neither here nor to be had, UserError if the hub has no such
    repository or file.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    wanted = Wanted(asked, repo, filename, filename, instead)
    try:
        return Path(hub.hf_hub_download(repo, filename, local_files_only=True))
    except (EntryNotFoundError, OSError):
        wanted.reach()
    try:
        return Path(hub.hf_hub_download(repo, filename))
    except Exception as e:  # hub, HTTP and connection errors share no base class
        if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
            raise UserError(
                f"{asked}: the hub's {repo} has no {filename}, and pickles are never read: convert its weights, {instead}."
            ) from e
        raise wanted.refuse(one_line(e)) from e


def hub_tokenizer(asked: str, repo: str) -> Path:
    """The folder with a tokenizer of the model hub: from the hub's cache, or downloaded into it. Raises as `hub_file`."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    patterns = [*VOCABULARIES, *BESIDE_VOCABULARY]
    arguments = '--include "*token*" --include "*.model" --include "vocab*"'
    instead = "or choose features whose tokenizer comes with open_clip, such as clip:ViT-B-32/openai"
    wanted = Wanted(asked, repo, "the tokenizer", arguments, instead)
    try:
        folder = Path(hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        # The folder may hold but weights so far, and transformers would make an empty tokenizer of that.
        if has_tokenizer(folder) and (folder / "tokenizer_config.json").is_file():
            return folder
    except (EntryNotFoundError, OSError):
        pass
    wanted.reach()
    try:
        folder = Path(hub.snapshot_download(repo, allow_patterns=patterns))
    except Exception as e:  # hub, HTTP and connection errors share no base class
        raise wanted.refuse(one_line(e)) from e
    if not has_tokenizer(folder):
        raise UserError(f"{asked}: the hub's {repo} has no tokenizer of a kind known here, {instead}.")
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a vocabulary is in the folder."""
    return any((folder / name).is_file() for name in VOCABULARIES)
