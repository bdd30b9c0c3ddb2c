"""report.md of a pruned model, as GitHub-flavoured Markdown: the verdict in its first line."""

from . import prune_layers
from . import prune_words as words
from ._gfm import bullets, facts, fence, line, pictures, table
from ._words import short
from .prune_schema import LayerScore, PruneReport

TOP = 20  # layers listed; the HTML page has all of them


def render(report: PruneReport) -> str:
    """The whole report as GFM text."""
    sections = [
        line(words.verdict(report).sentence),
        *([] if report.opens_plain else [f"> [!WARNING]\n> **{line(words.not_plain(report))}**"]),
        *bullets("Warnings", words.warnings(report)),
        "## Size",
        table(words.SIZES, words.sizes(report)),
        *_latency(report),
        *_quality(report),
        *_samples(report),
        "## How it opens",
        *map(line, words.opening(report)),
        fence("python", report.open_with),
        *_cuts(report),
        *_layers(report),
        *_additivity(report),
        *facts("Conditions", words.conditions(report)),
        *(facts("What it cost", words.spent(report)) if report.spent else []),
        "## Run it again",
        fence("sh", report.command),
    ]
    return "\n\n".join(sections) + "\n"


def _latency(report: PruneReport) -> list[str]:
    if not report.latency:
        return ["## Latency", "Not measured."]
    note = "One call of the denoiser, medians, before and after in turns on this machine. Ratios are after / before."
    return ["## Latency", table(words.TIMES, words.times(report)), note]


def _quality(report: PruneReport) -> list[str]:
    rows = words.quality_rows(report)
    if not rows:
        return ["## Quality", "Not measured."]
    note = (
        f"Values with 95 % intervals on {report.samples:,} images of seeds that nothing else used. Ratio is after / before, "
        "difference after - before, both paired by image where the seeds are the same."
    )
    return ["## Quality", table(words.QUALITY, rows), note]


def _samples(report: PruneReport) -> list[str]:
    if not any(scored.sheet for scored in report.scored):
        return ["## Samples", "No sheet of samples was written."]
    return ["## Samples", "The same seeds in both.", pictures([(s.name, s.sheet) for s in report.scored])]


def _cuts(report: PruneReport) -> list[str]:
    if not report.cuts:
        return ["## What was cut", "Nothing."]
    head = ["address", "kind", "change", "parameters freed", prune_layers.scores_are(report)]
    loss = words.losses(report)
    return ["## What was cut", table(head, prune_layers.cut_rows(report)), *([line(loss)] if loss else [])]


def _layers(report: PruneReport) -> list[str]:
    ranked = prune_layers.cheapest(report)
    if not ranked:
        return ["## Scores of the layers", f"{report.method} gave single layers no scores."]
    shown, partly = ranked[:TOP], prune_layers.reduced(report)
    title = f"## The {len(shown)} cheapest of {len(ranked):,} scored layers" if len(shown) > 1 else "## The scored layer"
    head = ["layer", "kind", prune_layers.scores_are(report), "parameters freed", "MACs saved", "cut"]
    return [title, table(head, [_layer(layer, prune_layers.fate(layer, partly)) for layer in shown])]


def _layer(layer: LayerScore, fate: str) -> list[str]:
    macs = "–" if layer.macs is None else words.scaled(layer.macs)
    return [layer.address, prune_layers.kind(layer), short(layer.score), f"{layer.params:,}", macs, fate]


def _additivity(report: PruneReport) -> list[str]:
    return ["## Do the scores add up?", words.additive(report.additivity)] if report.additivity else []
