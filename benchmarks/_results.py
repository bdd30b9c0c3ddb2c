"""docs/results.md is made of sections that the scripts here write; each replaces its own and leaves the others."""

import platform
import re
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
RUNS = Path("runs") / "benchmarks"  # where the scripts keep their work; git-ignored, resumable


def write(name: str, text: str) -> None:
    """Put a section between its markers in docs/results.md, and print it."""
    block = f"<!-- {name} -->\n{text.strip()}\n<!-- /{name} -->"
    page = RESULTS.read_text(encoding="utf-8")
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{RESULTS}: has no section {name}; add the two lines <!-- {name} --> and <!-- /{name} -->.")
    RESULTS.write_text(pattern.sub(lambda _: block, page), encoding="utf-8")
    print(text)


def machine() -> str:
    """The conditions of a measurement, in one line."""
    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
