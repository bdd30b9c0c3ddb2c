"""What was measured once is read again, as long as it is what is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.candidate import canonical
from ..core.files import write_text


def kept(path: Path, identity: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives (JSON), from the file where it was made before under the same identity."""
    wanted = json.loads(canonical(identity))
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            record = {}
        if isinstance(record, dict) and record.get("identity") == wanted:
            return record["value"]
    value = make()
    write_text(path, json.dumps({"identity": wanted, "value": value}, indent=1) + "\n")
    return value
