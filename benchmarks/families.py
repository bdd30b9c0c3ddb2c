"""docs/families.md: what lissom can do with every pipeline of the installed diffusers, tried on tiny random models.

python -m lissom.benchmarks.families [PATTERN]      with a pattern of names: prints their rows and writes nothing
"""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import torch
import transformers

from . import _results
from ._families_found import TASKS, pipelines
from ._families_trial import Row, tried

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = ["pipeline", "denoiser", "own scheduler", "searched", "skipped", "cut", "saved", "notes"]

INTRO = """# Families

What lissom can do with each pipeline class that diffusers {version} exports, found by running it. `python -m
lissom.benchmarks.families` writes this page: it builds every pipeline it can from tiny random models of the real classes,
with embeddings in place of most text encoders, and tries. It says nothing of pictures, only of what works.
{machine}

- **searched**: three runs asked for 3, 50 and 2 inference steps walked the three planned timesteps and gave the same samples bit
  for bit; the pipeline's own schedule, written as a plan, gave the bits of its own run (if not, the notes say so). A scheduler in
  brackets took the place of one that follows no plan.
- **skipped**: how many layers can be left out step by step. Of every kind one was: it was not executed in that step, and left
  out of all steps it gave the bits of a model that it was cut from.
- **cut**: one layer was cut and the pipeline ran on the plan. *Traced blocks* are of classes that lissom does not know: they can
  be cut for good, not skipped.
- **saved**: whether a config of the stock class can express that cut, so that the model opens without code of its own. *Opened
  again*: it was saved, and a fresh process computed the same; done once for each denoiser class and way of saving.
- **no**: cannot be driven; the reason is what lissom answers. **not tried**: no tiny model was made here. It may well work.

A video is scored by its middle frame: motion is not measured. Modular pipelines are another interface and are not in the list.
"""


def main(pattern: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    chosen = [found for found in pipelines() if not pattern or re.fullmatch(pattern, found.name)]
    rows, saved_before = [], set[str]()
    for i, found in enumerate(chosen, 1):
        rows.append(tried(found, saved_before))
        print(f"{i}/{len(chosen)} {' | '.join(_cells(rows[-1]))}", file=sys.stderr, flush=True)
    if not pattern:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(PAGE)


def page(rows: list[Row]) -> str:
    counts = {task: Counter(_outcome(row) for row in rows if row.found.task == task) for task in TASKS}
    total = sum(counts.values(), Counter())
    summary = [
        [name, *(str(n) for n in (c.total(), c.total() - c["not tried"], c["searched"], c["no"], c["not tried"]))]
        for name, c in [*counts.items(), ("all", total)]
    ]
    text = INTRO.format(version=diffusers.__version__, machine=f"({_results.machine()})")
    text += "\n" + _results.table(["makes", "pipelines", "tried or refused", "searched", "no", "not tried"], summary) + "\n"
    for task in TASKS:
        mine = sorted((row for row in rows if row.found.task == task), key=lambda row: (row.denoiser or "~", row.found.name))
        text += f"\n## {task.capitalize()}\n\n{_results.table(HEAD, [_cells(row) for row in mine])}\n"
    return text


def names(page: str) -> set[str]:
    """The pipeline classes that a page has a row for."""
    return set(re.findall(r"^\| (\w+Pipeline) \|", page, re.MULTILINE))


def version(page: str) -> str:
    """The version of diffusers that a page was made with."""
    found = re.search(r"that diffusers (\S+) exports", page)
    assert found is not None
    return found[1]


def _outcome(row: Row) -> str:
    return "searched" if row.searched.startswith("yes") else "no" if row.searched.startswith("no:") else "not tried"


def _cells(row: Row) -> list[str]:
    notes = "; ".join(row.notes)
    return [row.found.name, row.denoiser, row.scheduler, row.searched, row.skipped, row.cut, row.saved, notes]


if __name__ == "__main__":
    main(*sys.argv[1:2])
