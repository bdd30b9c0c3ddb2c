"""report.md of a distilled model, as GitHub-flavoured Markdown: the verdict in its first line."""

from . import distill_words as words
from ._gfm import bullets, facts, fence, line, listing, pictures, table
from ._words import short
from .distill_schema import DistillReport
from .prune_words import not_plain, spent

SITES = 8  # layers named for each loss; the HTML page has all of them


def render(report: DistillReport) -> str:
    """The whole report as GFM text."""
    sections = [
        line(words.verdict(report).sentence),
        *([] if report.opens_plain else [f"> [!WARNING]\n> **{line(not_plain(report))}**"]),
        *bullets("Warnings", words.warnings(report)),
        *_quality(report),
        *_samples(report),
        *_losses(report),
        *_checks(report),
        "## How it opens",
        *map(line, words.opening(report)),
        fence("python", report.open_with),
        *facts("Conditions", words.conditions(report)),
        *(facts("What this session cost", spent(report)) if report.spent else []),
        "## Run it again",
        fence("sh", report.command),
    ]
    return "\n\n".join(sections) + "\n"


def _quality(report: DistillReport) -> list[str]:
    rows = words.quality_rows(report)
    if not rows:
        return ["## Quality", "Not measured."]
    note = (
        f"Values with 95 % intervals on {report.samples:,} images of seeds that nothing else used. Ratio is after / before, "
        "difference after - before, both paired by image where the seeds are the same."
    )
    back = words.recoveries(report)
    return ["## Quality", table(words.QUALITY, rows), note, *([listing(back)] if back else [])]


def _samples(report: DistillReport) -> list[str]:
    if not any(scored.sheet for scored in report.scored):
        return ["## Samples", "No sheet of samples was written."]
    return ["## Samples", "The same seeds in all.", pictures([(s.name, s.sheet) for s in report.scored])]


def _losses(report: DistillReport) -> list[str]:
    rows = words.loss_rows(report)
    compared = [_sites(name, layers) for name, layers in report.sites.items()]
    return [
        "## Losses",
        *([table(words.LOSSES, rows)] if rows else ["None are listed."]),
        *([line(said)] if (said := words.averaged(report)) else []),
        *(["Layers whose features are compared, named as in the student:", listing(compared)] if compared else []),
    ]


def _sites(name: str, layers: tuple[str, ...]) -> str:
    more = [f"{len(layers) - SITES:,} more"] if len(layers) > SITES else []
    return f"{name} ({len(layers):,}): {words.listed([*layers[:SITES], *more]) or 'none'}"


def _checks(report: DistillReport) -> list[str]:
    if not report.checks:
        return ["## Checks along the way", "None were made."]
    head = ("iteration", report.check_label or words.CHECKS[1])
    shown = words.pictured(report)
    return [
        "## Checks along the way",
        table(head, words.check_rows(report.checks, words.MOST)),
        line(words.course(report)),
        *([pictures([(f"{c.iteration:,}: {short(c.value)}", c.sheet) for c in shown])] if shown else []),
    ]
