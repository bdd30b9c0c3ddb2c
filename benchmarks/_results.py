"""docs/results.md is made of sections that the scripts here write; each replaces its own and leaves the others."""

import math
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.intervals import t_95
from ..core.measurement import Measurement

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


def values(runs: list[dict[str, Any]], which: str, metric: str) -> list[float]:
    """A metric of every run. which: before, after, teacher."""
    return [next(Measurement.model_validate(m).value for m in run["scored"][which] if m["metric"] == metric) for run in runs]


def mean(numbers: list[float], back: Callable[[float], float] = lambda x: x) -> str:
    """Mean [interval]; back: from the scale that is averaged on."""
    if not numbers:
        return "–"
    middle = statistics.fmean(numbers)
    half = t_95(len(numbers)) * statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    if half < 1e-3 * abs(middle):
        return f"{back(middle):.3g}"
    return f"{back(middle):.3g} [{back(middle - half):.3g}, {back(middle + half):.3g}]"
