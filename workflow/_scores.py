"""Numbers on disk as they are measured, a JSON line each: kill -9 loses the line that was being written."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..core.candidate import canonical
from ..core.errors import UserError
from ..core.files import disk_errors, write_text


class Scores:
    """Numbers by key, all measured under the same conditions. Asked twice, answered from the file."""

    def __init__(self, path: Path, identity: str) -> None:
        """identity: of everything that the numbers depend on beside their key. UserError where the file has another."""
        self.path = path
        self.known: dict[tuple[str, ...], float] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        first, *lines = text.split("\n")
        head = canonical({"identity": identity})
        if text and first != head:
            raise UserError(
                f"{path}: holds losses that were measured under other conditions (device, dtype, chunk, prompts, data, or "
                "another lissom). Go on as the run was started, or choose another --out."
            )
        for line in lines[:-1]:  # the last one is empty, or torn
            *key, value = json.loads(line)
            self.known[tuple(key)] = value
        if not text.endswith("\n"):
            write_text(path, "\n".join([head, *lines[:-1]]) + "\n")

    def add(self, keys: Sequence[tuple[str, ...]], values: Sequence[float]) -> None:
        """Keep numbers, in one write."""
        lines = []
        for key, value in zip(keys, values, strict=True):
            self.known[key] = value
            lines.append(json.dumps([*key, value]) + "\n")
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
