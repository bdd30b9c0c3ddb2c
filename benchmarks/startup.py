"""How long the command line takes to answer: `python -m lissom.benchmarks.startup` (half a minute).

Whole processes that take turns: `python -c "import typer, rich"`, which no typer command can undercut, and lissom's help.
"""

import statistics
import subprocess
import sys
import time

from . import _results

TURNS = 15
LEAST = [sys.executable, "-c", "import typer, rich"]
COMMANDS = {
    "lissom --help": (["--help"], 2),
    "lissom search autodiffusion --help": (["search", "autodiffusion", "--help"], 4),
    "lissom recipes list": (["recipes", "list"], None),
}


def main() -> None:
    commands = {name: [sys.executable, "-m", "lissom", *words] for name, (words, _) in COMMANDS.items()}
    ratios: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(TURNS + 1):
        least = _seconds(LEAST)
        for name, command in commands.items():
            ratio = _seconds(command) / least
            if turn:  # the first turn warms the file cache
                ratios[name].append(ratio)
    rows = []
    for name, (_, limit) in COMMANDS.items():
        found = sorted(ratios[name])
        rows.append(
            [f"`{name}`", f"{statistics.median(found):.2f}", f"{found[0]:.2f} to {found[-1]:.2f}", str(limit) if limit else ""]
        )
    _results.write(
        "startup",
        f'{TURNS} turns, whole processes against `python -c "import typer, rich"`; Python {sys.version.split()[0]}.\n\n'
        + _results.table(["command", "median time ratio", "range", "aim, at most"], rows),
    )


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
