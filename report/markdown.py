"""report.md: the report as GitHub-flavoured Markdown, the verdict in its first line."""

from collections.abc import Sequence

from . import _words
from ._gfm import bullets, facts, fence, pictures, table
from .schema import Row, Scored, SearchReport

TOP = 10  # candidates listed; the HTML page has all of them


def render(report: SearchReport) -> str:
    """The whole report as GFM text. Raises ValueError when `best_fixed` names none of the baselines."""
    sections = [
        _words.verdict(report).sentence,
        *bullets("Warnings", _words.warnings(report)),
        *_results(report),
        *_samples(report),
        *_plan(report),
        *facts("Conditions", _words.conditions(report)),
        *facts("What it cost", _words.spent(report)),
        *_candidates(report),
        "## Run it again",
        fence("sh", report.command),
    ]
    if report.stock_call:
        sections += ["The same images with plain diffusers:", fence("python", report.stock_call)]
    return "\n\n".join(sections) + "\n"


def _results(report: SearchReport) -> list[str]:
    columns = _words.metrics(report)
    head = ["schedule", *map(_words.heading, columns), "MACs ratio", "timesteps"]
    lines = [_result(scored, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)]
    note = (
        f"Values with 95 % intervals, on {report.report_samples:,} images of seeds and a reference that the search never saw. "
        f"It optimised {report.objective_label} only. MACs ratio: multiply-accumulates of the denoiser against the uncut run "
        f"of {report.steps} steps; it counts work and says nothing about seconds."
    )
    return ["## Results", table(head, lines), note]


def _result(scored: Scored, names: Sequence[str]) -> list[str]:
    values = [_words.quoted(_words.find(scored, name)) for name in names]
    return [scored.name, *values, f"{scored.macs_ratio:.3f}", _words.timesteps(scored.plan)]


def _samples(report: SearchReport) -> list[str]:
    shown = [s for s in (_words.best_fixed(report), report.winner) if s.sheet]
    if not shown:
        return []
    return ["## Samples", "The same seeds in both.", pictures([(s.name, s.sheet) for s in shown])]


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
    return ["## The plan", table(["step", "timestep", *sigma, "layers not executed"], rows)]


def _candidates(report: SearchReport) -> list[str]:
    best = _words.ranked(report)[:TOP]
    if not best:
        return ["## Candidates", "No candidate was scored."]
    head = ["number", "origin", report.objective_label, "re-scored", "MACs ratio", "timesteps", "skipped per step"]
    title = f"## The best {len(best)} of {len(_words.candidates(report)):,} candidates"
    note = "On the search's own seeds, hence optimistic: the table above is the one to quote."
    return [title, note, table(head, map(_candidate, best))]


def _candidate(row: Row) -> list[str]:
    values = [_words.short(row.value), _words.short(row.rescored), f"{row.macs_ratio:.3f}"]
    return [str(row.number), row.origin, *values, _words.timesteps(row.plan), _words.skips(row.plan)]
