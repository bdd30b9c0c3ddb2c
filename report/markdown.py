"""report.md: the report as GitHub-flavoured Markdown, the verdict in its first line."""

from collections.abc import Sequence

from . import _words, search_front, search_parts, search_verdict
from ._gfm import bullets, facts, fence, line, pictures, table
from .schema import Row, Scored, SearchReport

TOP = 10  # candidates listed, and layers with their times; the HTML page has all of them


def render(report: SearchReport) -> str:
    """The whole report as GFM text. Raises ValueError when `best_fixed` names none of the baselines."""
    loud = search_verdict.not_plain(report)
    sections = [
        line(search_verdict.verdict(report).sentence),
        *([f"> [!WARNING]\n> **{line(loud)}**"] if loud else []),
        *bullets("Warnings", _words.warnings(report)),
        *_results(report),
        *_front(report),
        *_gained(report),
        *_samples(report),
        *_plan(report),
        *_cuts(report),
        *_latency(report),
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
    head = ["schedule", *map(_words.heading, columns), *_cost_heads(report), "timesteps"]
    lines = [_result(scored, report, [m.metric for m in columns]) for scored in (report.winner, *report.baselines)]
    note = (
        f"Values with 95 % intervals, on {report.report_samples:,} images of seeds and a reference that the search never saw. "
        f"It optimised {_words.optimised(report)} only. MACs ratio: multiply-accumulates of the denoiser against {_words.uncut(report)} "
        f"of {report.steps} steps; it counts work and says nothing about seconds."
    )
    return ["## Results", table(head, lines), note]


def _result(scored: Scored, report: SearchReport, names: Sequence[str]) -> list[str]:
    values = [_words.quoted(_words.find(scored, name)) for name in names]
    return [scored.name, *values, *_costs(scored, report), _words.timesteps(scored.plan)]


def _front(report: SearchReport) -> list[str]:
    notes = [" ".join(map(line, search_front.notes(report)))]
    if not report.front:
        return ["## The front", *notes] if search_front.several(report) else []
    found = search_front.members(report)
    rows = [
        [f"{one.number} (picked)" if one.picked else str(one.number), *one.cells, str(len(one.cuts) or "–")] for one in found
    ]
    cuts = [f"- cuts of {one.number}: {line('; '.join(one.cuts))}" for one in found if one.cuts]
    listed = ["\n".join(cuts)] if cuts else []
    return [f"## {line(search_front.title(report))}", table([*search_front.head(report), "cuts"], rows), *listed, *notes]


def _gained(report: SearchReport) -> list[str]:
    if not report.gained:
        return []
    rows = [part.cells for part in search_parts.gained_rows(report)]
    texts = [text for text in (search_parts.gained_words(report), search_parts.gained_note(report)) if text]
    return ["## Which part gained what", table(search_parts.gained_head(report), rows), *map(line, texts)]


def _samples(report: SearchReport) -> list[str]:
    shown = [s for s in (_words.best_fixed(report), report.winner) if s.sheet]
    if not shown:
        return []
    return ["## Samples", "The same seeds in both.", pictures([(s.name, s.sheet) for s in shown])]


def _plan(report: SearchReport) -> list[str]:
    reusing = any(step.reuse for step in report.winner.plan.steps)
    rows = [
        [
            str(i),
            f"{step.timestep:g}",
            *([f"{step.sigma:.5g}"] if step.sigma is not None else []),
            ", ".join(step.skip) or "none",
            *([", ".join(step.reuse) or "none"] if reusing else []),
            *([step.model or "the pipeline's own"] if report.winner.plan.models else []),
        ]
        for i, step in enumerate(report.winner.plan.steps)
    ]
    sigma = ["sigma"] if any(step.sigma is not None for step in report.winner.plan.steps) else []
    layers = ["layers skipped", "layers reused"] if reusing else ["layers not executed"]
    models = ["made by"] if report.winner.plan.models else []
    return ["## The plan", table(["step", "timestep", *sigma, *layers, *models], rows)]


def _cuts(report: SearchReport) -> list[str]:
    rows = search_parts.cut_rows(report)
    if not rows:
        return []
    texts = [text for text in (search_parts.left(report), search_parts.opening(report)) if text]
    code = [fence("python", report.open_with)] if report.open_with else []
    return ["## The cuts", table(search_parts.CUTS, rows), *map(line, texts), *code]


def _latency(report: SearchReport) -> list[str]:
    found = report.latency
    if found is None:
        return []
    rows = search_parts.layer_rows(found)
    layers = [table(search_parts.LAYERS, rows[:TOP])] if rows else []
    more = [f"The slowest {TOP} of {len(rows):,} layers."] if len(rows) > TOP else []
    return [*facts("Predicted latency", search_parts.timed(found)), line(search_parts.off(found)), *layers, *more]


def _candidates(report: SearchReport) -> list[str]:
    best = _words.ranked(report)[:TOP]
    if not best:
        return ["## Candidates", "No candidate was scored."]
    others = [name for name in report.objectives[1:] if name not in _words.COSTS]
    cutting = any(row.cuts for row in best)
    names = [_words.objective_name(report, name) for name in others]
    head = [
        "number",
        "origin",
        report.objective_label,
        "re-scored",
        *names,
        *_cost_heads(report),
        "timesteps",
        _words.left_out_head(report),
    ]
    title = f"## The best {len(best)} of {len(_words.candidates(report)):,} candidates"
    note = "On the search's own seeds, hence optimistic: the table above is the one to quote."
    if any(_words.dropped(row, report) for row in report.candidates):
        note += f" Candidates that were {_words.DROPPED} are left out: their values do not compare with these."
    rows = [_candidate(row, report, others) + ([str(len(row.cuts) or "–")] if cutting else []) for row in best]
    return [title, note, table([*head, *(["cuts"] if cutting else [])], rows)]


def _candidate(row: Row, report: SearchReport, others: Sequence[str]) -> list[str]:
    values = [_words.short(row.value), _words.short(row.rescored), *(_words.short(row.others.get(name)) for name in others)]
    return [str(row.number), row.origin, *values, *_costs(row, report), _words.timesteps(row.plan), _words.left_out(row.plan)]


def _cost_heads(report: SearchReport) -> list[str]:
    return [_words.RATIOS[name] for name in ("macs", *_words.priced(report))]


def _costs(one: Scored | Row, report: SearchReport) -> list[str]:
    return [_words.share(one, name) for name in ("macs", *_words.priced(report))]
