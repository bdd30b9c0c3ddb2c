"""Where an evaluation is read from: a file with its pictures beside it, or the same of an earlier revision of a git repository."""

import functools
import json
import subprocess
from pathlib import Path, PurePosixPath

from ..core.errors import UserError
from ..report.evaluation import Evaluation
from ._gallery import IMAGES, PER_IMAGE


class Source:
    """One of the two sides of a comparison."""

    def __init__(self, path: str, revision: str | None = None) -> None:
        """revision: of the repository that holds `path`, as git names it (main, HEAD~1, a tag); path is then seen from here."""
        self.path, self.revision = path, revision

    @classmethod
    def git(cls, text: str) -> "Source":
        """REV:PATH as git reads it. Raises UserError for a text without both."""
        revision, colon, path = text.partition(":")
        if not (revision and colon and path):
            raise UserError(f"--base-git {text}: write REV:PATH, e.g. main:baselines/model.json.")
        if revision.startswith("-"):  # git would take it for an option
            raise UserError(f"--base-git {text}: no revision begins with a dash.")
        return cls(path, revision)

    @property
    def name(self) -> str:
        return f"{self.revision}:{self.path}" if self.revision else self.path

    @functools.cache  # noqa: B019  # two sources live as long as the command
    def evaluation(self) -> Evaluation:
        """Raises UserError for what is missing or no evaluation."""
        if self.revision is None:
            try:
                text = Path(self.path).read_bytes()
            except OSError as e:
                raise UserError(
                    f"{self.path}: cannot be read ({e.strerror}). Make it with `lissom evaluate … --out {self.path}`."
                ) from e
        else:
            text = self._show(self.path)
        try:
            return Evaluation.parse(text.decode("utf-8"), self.name)
        except UnicodeDecodeError as e:
            raise UserError(f"{self.name}: not a text file. Give the file that `lissom evaluate --out FILE.json` wrote.") from e

    def picture(self, name: str) -> bytes | None:
        """The content of a picture beside the evaluation, or None."""
        return self._beside(name)

    def captions(self) -> dict[int, str]:
        """What each image shows, by index, as far as it is known."""
        content = self._beside(PER_IMAGE)
        found = {}
        for line in (content or b"").decode("utf-8", "replace").splitlines():
            try:
                row = json.loads(line)
                found[int(row["index"])] = str(row.get("caption", ""))
            except (ValueError, KeyError, TypeError):
                continue  # a torn or foreign line takes a caption from the report, nothing else
        return found

    def _beside(self, name: str) -> bytes | None:
        """Content of a file in the folder that the evaluation names, or in one that was renamed with it."""
        path = PurePosixPath(Path(self.path).as_posix())
        if self.evaluation().images is None:
            return None
        for folder in dict.fromkeys((str(self.evaluation().images), f"{path.stem}{IMAGES}")):
            place = path.parent / folder / name
            content = self._blob(str(place)) if self.revision else _content(Path(place))
            if content is not None:
                return content
        return None

    def _show(self, path: str) -> bytes:
        content = self._blob(path)
        if content is None:
            ended = self._git("rev-parse", "--verify", "--quiet", f"{self.revision}^{{commit}}")
            if ended.returncode:
                said = " ".join(ended.stderr.decode(errors="replace").split())
                raise UserError(
                    f"--base-git {self.name}: git knows no revision {self.revision!r} here{f' ({said})' if said else ''}. "
                    "In CI, fetch it first: a checkout of depth 1 has no other revisions."
                )
            raise UserError(
                f"--base-git {self.name}: revision {self.revision!r} has no file {path}. Paths start from this folder."
            )
        return content

    def _blob(self, path: str) -> bytes | None:
        ended = self._git("show", f"{self.revision}:./{path}")
        return ended.stdout if ended.returncode == 0 else None

    def _git(self, *words: str) -> "subprocess.CompletedProcess[bytes]":
        try:
            return subprocess.run(["git", *words], capture_output=True, check=False)
        except FileNotFoundError as e:
            raise UserError(f"--base-git {self.name}: there is no git here. Give the baseline as a file.") from e


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
