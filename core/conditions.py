"""What each image is made from: prompts, class labels or input images, read from a file or shipped with the model."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from .candidate import canonical
from .errors import UserError

IMAGES = ("image", "mask_image", "control_image", "ip_adapter_image")  # keys whose values are image files, read when needed
NOTES = ("label", "caption")  # keys for the metrics, not for the pipeline: the class index and a text to compare with


class Conditions:
    """Rows of `__call__` arguments; image i uses row i mod len(rows), so that a balanced file gives balanced images."""

    def __init__(self, rows: list[dict[str, Any]], source: str, folder: Path = Path()) -> None:
        """rows: plain data as read from a file; in Python also PIL images, and tensors (1, ...), one row of a batch each.
        folder: where the relative paths of input images start from.
        """
        self.rows, self.source, self.folder = rows, source, folder

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index % len(self.rows)]

    def arguments(self, indices: range) -> dict[str, Any]:
        """Lists for one batched pipeline call: {"prompt": [...]}, tensors joined to one; empty for unconditional pipelines."""
        rows = [self.row(i) for i in indices]
        return {key: _joined([self._argument(key, row[key]) for row in rows]) for key in rows[0] if key not in NOTES}

    def caption(self, index: int) -> str | None:
        """The text that image `index` should show, for CLIP scores."""
        row = self.row(index)
        return row.get("caption", row.get("prompt"))

    def label(self, index: int) -> int | None:
        """The class that image `index` should show, for accuracy."""
        row = self.row(index)
        return row.get("label", row.get("class_labels"))

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the rows and of the contents of the images that they name."""
        files = sorted({row[key] for row in self.rows for key in IMAGES if isinstance(row.get(key), str)})
        contents = [hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in files]
        rows = [{key: digest(value) for key, value in row.items()} for row in self.rows]
        return hashlib.sha256(canonical([rows, contents] if files else rows).encode()).hexdigest()

    def _argument(self, key: str, value: Any) -> Any:
        if key not in IMAGES or not isinstance(value, str):
            return value
        from PIL import Image

        with Image.open(self.folder / value) as image:
            return image.convert("RGB")

    def __len__(self) -> int:
        return len(self.rows)


UNCONDITIONAL = Conditions([{}], "none")


def read(path: Path) -> Conditions:
    """A .txt file with one prompt a line, or a .jsonl file whose keys are `__call__` arguments.

    Raises UserError with the file and line of everything that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark first
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the prompts ({e}). Give a .txt file, or a .jsonl file of call arguments.") from e
    if path.suffix not in (".jsonl", ".json"):
        rows: list[dict[str, Any]] = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    else:
        rows, wrong = [], []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_refuse)
            except ValueError as e:
                wrong.append(f"{path}:{number}: not JSON ({e})")
                continue
            if not isinstance(row, dict):
                wrong.append(f'{path}:{number}: expected an object such as {{"prompt": "a photo"}}, got {line.strip()[:60]}')
            elif rows and set(row) != set(rows[0]):
                wrong.append(f"{path}:{number}: keys {sorted(row)} differ from those of the first line, {sorted(rows[0])}")
            else:
                wrong += [f"{path}:{number}: {fault}" for key in IMAGES if (fault := _unreadable(row.get(key), path.parent))]
                rows.append(row)
        if wrong:
            raise UserError("\n".join(wrong))
    if not rows:
        raise UserError(f"{path}: no prompts in it. Write one prompt a line.")
    return Conditions(rows, str(path), path.parent)


def digest(value: Any) -> Any:
    """sha256 of the contents of a tensor or a PIL image; any other value as it is."""
    if hasattr(value, "detach"):
        import torch

        plain = value.detach().cpu().contiguous()
        return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes() if plain.ndim else repr(plain).encode()).hexdigest()
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return hashlib.sha256(repr((value.mode, value.size)).encode() + value.tobytes()).hexdigest()
    return value


def _joined(values: list[Any]) -> Any:
    """Pipelines want one tensor for a batch, and lists of anything else."""
    if not all(hasattr(value, "detach") for value in values):
        return values
    import torch

    return torch.cat(values)


def _unreadable(name: Any, folder: Path) -> str | None:
    """What is wrong with the input image of a row, found before any work is done with it."""
    if not isinstance(name, str):
        return None
    from PIL import Image

    try:
        with Image.open(folder / name) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as e:
        return f"{name}: cannot be read as an image ({type(e).__name__}). Paths start from the file's own folder."
    return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
