"""The images of one evaluation, kept batch by batch as what was observed of them: kill -9 loses the batch in flight.

Shapes: B images of a batch, H x W pixels.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import files
from ..core.errors import UserError
from ..core.files import disk_errors, write_bytes, write_text

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = ".images"  # FILE.images/ stands beside FILE.json
WORK, IDENTITY = ".work", "identity.json"
PER_IMAGE = "per-image.jsonl"


class Gallery:
    """A folder beside the result: pictures of the first images, and, until the evaluation is whole, all that was observed."""

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool) -> None:
        """identity: everything that decides the images, and how they are seen.

        Raises UserError where the folder holds another evaluation's work, or an unfinished one that is not to go on.
        """
        self.folder, self.work = folder, folder / WORK
        kept = self.work / IDENTITY
        check_work(folder, identity, resume)
        if kept.is_file():
            for part in ("images", "base"):
                self._tidy(part)
            return
        for old in (*folder.glob("[0-9]" * 6 + ".png"), folder / PER_IMAGE):  # of an earlier evaluation
            old.unlink(missing_ok=True)
        write_text(kept, json.dumps(identity, indent=1) + "\n")

    def _tidy(self, part: str) -> None:
        """Keep the images from the first one on, each once: somebody may have removed a damaged file."""
        at = 0
        for start, stop, path in self._files(part):
            if start == at:
                at = stop
            else:
                path.unlink()

    def done(self, part: str = "images") -> int:
        """Images 0 to done - 1 of a part ("images", "base") are there."""
        return max((stop for _, stop, _ in self._files(part)), default=0)  # without gaps, see `_tidy`

    def add(
        self, indices: range, seen: "dict[str, Tensor]", part: str = "images", calls: int = 0, seconds: float = 0.0
    ) -> None:
        """Keep what was observed of some images, and what that took, whole or not at all. Raises DiskError."""
        from safetensors.torch import save

        name = f"{part}-{indices.start:08}-{indices.stop:08}.safetensors"
        spent = {"calls": str(calls), "seconds": f"{seconds:.3f}"}
        write_bytes(self.work / name, save({key: value.detach().cpu().contiguous() for key, value in seen.items()}, spent))

    def spent(self, part: str = "images") -> tuple[int, float]:
        """Denoiser calls and seconds that the kept batches took, over all sessions."""
        from safetensors import safe_open

        calls, seconds = 0, 0.0
        for _, _, path in self._files(part):
            with safe_open(path, framework="pt") as f:  # `read` was here before, and found it whole
                record = f.metadata()
            calls, seconds = calls + int(record["calls"]), seconds + float(record["seconds"])
        return calls, seconds

    def read(self, part: str = "images") -> "Iterator[tuple[range, dict[str, Tensor]]]":
        """What was kept, in order."""
        for start, stop, path in self._files(part):
            yield range(start, stop), _tensors(path)

    def slice(self, indices: range, part: str) -> "dict[str, Tensor]":
        """What was kept of these images, however they were batched."""
        import torch

        parts: list[dict[str, Any]] = []
        for start, stop, path in self._files(part):
            if start < indices.stop and stop > indices.start:
                rows = slice(max(indices.start - start, 0), indices.stop - start)
                parts.append({key: value[rows] for key, value in _tensors(path).items()})
        return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}

    def show(self, index: int, pixels: "Tensor") -> None:
        """Keep the picture of one image: pixels (H, W, 3) uint8."""
        import io

        from PIL import Image

        packed = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(packed, format="PNG")
        write_bytes(self.folder / picture(index), packed.getvalue())

    def tell(self, rows: list[dict[str, Any]]) -> None:
        """Write per-image.jsonl: one object an image."""
        write_text(self.folder / PER_IMAGE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def finish(self) -> None:
        """The result is written: what was only kept for going on can go."""
        discard(self.folder)

    def _files(self, part: str) -> list[tuple[int, int, Path]]:
        found = []
        for path in self.work.glob(f"{part}-*.safetensors"):
            if match := re.fullmatch(rf"{part}-(\d+)-(\d+)", path.stem):
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)


def _tensors(path: Path) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}). Remove it: its images are then made again.") from e


def differing(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first entry in which two identities differ, or None. Either may have been through JSON."""
    one, two = (json.loads(json.dumps(identity)) for identity in (before, now))
    return next((key for key in (*two, *one) if one.get(key) != two.get(key)), None)


def discard(folder: Path) -> None:
    """Take away what was only kept for going on."""
    with disk_errors(folder):
        shutil.rmtree(folder / WORK, ignore_errors=True)


def picture(index: int) -> str:
    """The file name of an image's picture."""
    return f"{index:06}.png"


@contextmanager
def locked(out: Path, folder: Path) -> Iterator[None]:
    """One process per evaluation, finished or not. Its folder is taken back if it stays empty."""
    with files.locked(out.with_name(f".{out.name}.lock"), out):
        try:
            yield
        finally:
            for place in (folder / WORK, folder):
                with suppress(OSError):  # not empty: pictures, or work to go on with; or never made
                    place.rmdir()


def check_work(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """UserError where the folder holds interrupted work that is not to go on, or that is of another evaluation.

    identity: all of it, or what is known so far.
    """
    kept = folder / WORK / IDENTITY
    if not kept.is_file():
        return
    if not resume:
        raise UserError(f"{folder}: holds an evaluation that was interrupted. Add --resume to go on with it, or remove it.")
    before = _json(kept)
    if (other := differing(before, {**before, **identity})) is not None:
        raise UserError(
            f"{folder}: holds an interrupted evaluation with another {other}. Go on as it was started, remove it, or choose another --out."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
