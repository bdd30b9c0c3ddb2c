"""report.md: the report as GitHub-flavoured Markdown, the verdict in its first line."""

from collections.abc import Iterable, Sequence

from . import _words
from .schema import Row, Scored, SearchReport

TOP = 10  # candidates listed; the HTML page has all of them


def render(report: SearchReport) -> str:
    """The whole report as GFM text. Raises ValueError when `best_fixed` names none of the baselines."""
    sections = [
        _words.verdict(report).sentence,
        *_warnings(report),
        *_results(report),
        *_samples(report),
        *_plan(report),
        *_pairs("Conditions", _words.conditions(report)),
        *_pairs("What it cost", _words.spent(report)),
        *_candidates(report),
        "## Run it again",
        _fence("sh", report.command),
    ]
    if report.stock_call:
        sections += ["The same images with plain diffusers:", _fence("python", report.stock_call)]
    return "\n\n".join(sections) + "\n"


def _results(report: SearchReport) -> list[str]:
    columns = _words.metrics(report)
    head = ["schedule", *map(_words.heading, columns), "MACs ratio", "timesteps"]
    table = [_result(scored, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)]
    note = (
        f"Values with 95 % intervals, on {report.report_samples:,} images of seeds and a reference that the search never saw. "
        f"It optimised {report.objective_label} only. MACs ratio: multiply-accumulates of the denoiser against the uncut run "
        f"of {report.steps} steps; it counts work and says nothing about seconds."
    )
    return ["## Results", _table(head, table), note]


def _result(scored: Scored, names: Sequence[str]) -> list[str]:
    values = [_words.quoted(_words.find(scored, name)) for name in names]
    return [scored.name, *values, f"{scored.macs_ratio:.3f}", _words.timesteps(scored.plan)]


def _samples(report: SearchReport) -> list[str]:
    shown = [s for s in (_words.best_fixed(report), report.winner) if s.sheet]
    if not shown:
        return []
    images = " | ".join(f"![samples of {_cell(s.name)}]({s.sheet})" for s in shown)
    head = " | ".join(_cell(s.name) for s in shown)
    return ["## Samples", "The same seeds in both.", f"| {head} |\n|{'---|' * len(shown)}\n| {images} |"]


def _plan(report: SearchReport) -> list[str]:
    rows = [
        [
            str(i),
            f"{step.timestep:g}",
            *([f"{step.sigma:.5g}"] if step.sigma is not None else []),
            ", ".join(step.skip) or "none",
        ]
        for i, step in enumerate(report.winner.plan.steps)
    ]
    sigma = ["sigma"] if any(step.sigma is not None for step in report.winner.plan.steps) else []
    return ["## The plan", _table(["step", "timestep", *sigma, "layers not executed"], rows)]


def _candidates(report: SearchReport) -> list[str]:
    best = _words.ranked(report)[:TOP]
    if not best:
        return ["## Candidates", "No candidate was scored."]
    head = ["number", "origin", report.objective_label, "re-scored", "MACs ratio", "timesteps", "skipped per step"]
    title = f"## The best {len(best)} of {len(_words.candidates(report)):,} candidates"
    note = "On the search's own seeds, hence optimistic: the table above is the one to quote."
    return [title, note, _table(head, map(_candidate, best))]


def _candidate(row: Row) -> list[str]:
    values = [_words.short(row.value), _words.short(row.rescored), f"{row.macs_ratio:.3f}"]
    return [str(row.number), row.origin, *values, _words.timesteps(row.plan), _words.skips(row.plan)]


def _warnings(report: SearchReport) -> list[str]:
    found = _words.warnings(report)
    return ["## Warnings", "\n".join(f"- {_cell(text)}" for text in found)] if found else []


def _pairs(title: str, pairs: list[tuple[str, str]]) -> list[str]:
    return [f"## {title}", _table(["", ""], pairs)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """A pipe would end the cell, a newline the row, and < would start HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _fence(language: str, code: str) -> str:
    mark = "```" if "```" not in code else "````"
    return f"{mark}{language}\n{code.rstrip()}\n{mark}"
