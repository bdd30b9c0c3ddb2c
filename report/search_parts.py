"""What the report says about the parts of what was found: which part gained what, the cuts, and how far predicted times were off."""

import itertools
import statistics
from typing import NamedTuple

from . import _words, prune_layers
from .schema import Gained, LatencyTable, SearchReport
from .search_verdict import not_plain, outcome

CUTS = ("address", "change")
LAYERS = ("layer", "ms", "share of the whole")
WORDS = {  # what a ratio to the part before says
    "better": "gained",
    "worse": "lost",
    "unclear": "unclear",
    "unmeasured": "not known",
}


class Part(NamedTuple):
    """One row of the table of parts."""

    part: Gained
    outcome: str  # a key of WORDS; nothing for the fixed schedule
    cells: tuple[str, ...]


def named(part: Gained) -> str:
    """'+ skips', and the fixed schedule by its name."""
    if part.part != "fixed":
        return f"+ {part.part}"
    return "fixed" if part.scored.name == "fixed" else f"fixed ({part.scored.name})"


def gained_head(report: SearchReport) -> list[str]:
    measured = next((m for one in report.gained if (m := _words.find(one.scored, report.objective))), None)
    title = _words.heading(measured) if measured else report.objective_label
    costs = [_words.RATIOS[name] for name in ("macs", *_words.priced(report))]
    return ["part", title, "ratio to the part before", "so it", *costs, "timesteps", _words.left_out_head(report), "cuts"]


def gained_rows(report: SearchReport) -> list[Part]:
    """The fixed schedule, then one part more in every row."""
    found = []
    for one in report.gained:
        scored = one.scored
        how = "" if one.part == "fixed" else outcome(one.ratio)
        ratio = "–" if one.part == "fixed" else _words.ratio_words(one.ratio).removeprefix("ratio ")
        cells = (
            named(one),
            _words.quoted(_words.find(scored, report.objective)),
            ratio,
            WORDS[how] if how else "–",
            *(_words.share(scored, name) for name in ("macs", *_words.priced(report))),
            _words.timesteps(scored.plan),
            _words.left_out(scored.plan),
            str(len(scored.cuts)) if scored.cuts else "–",
        )
        found.append(Part(one, how, cells))
    return found


def gained_words(report: SearchReport) -> str:
    """One sentence for every part: whether it made the objective better, and what it did to the costs."""
    sentences = []
    for before, one in itertools.pairwise(report.gained):
        ratio, what = _words.ratio_words(one.ratio), one.part.capitalize()
        label = report.objective_label
        text = {
            "better": f"{what} made {label} better, {ratio}",
            "worse": f"{what} made {label} worse, {ratio}",
            "unclear": f"{what} made no difference to {label} that can be told, {ratio}",
            "unmeasured": f"What {one.part} did to {label} is not known, {ratio}",
        }[outcome(one.ratio)]
        sentences.append("; ".join([text, *_cheaper(before, one, report)]) + ".")
    return " ".join(sentences)


def gained_note(report: SearchReport) -> str:
    return (
        f"Each row has what the rows above it have, and one part more, on {report.report_samples:,} unseen images, the same seeds in "
        "all. Ratios above 1: this part made it better; unclear where the interval includes 1. Added in another order, the parts would share the gain differently."
    )


def cut_rows(report: SearchReport) -> list[tuple[str, str]]:
    """Rows under CUTS."""
    return [(cut.address, prune_layers.change(cut)) for cut in report.winner.cuts]


def left(report: SearchReport) -> str:
    """What the cuts leave of the model, empty where that is not recorded."""
    share = report.winner.costs.get("params")
    if share is None:
        return ""
    whole = report.denoiser_parameters
    return f"{100 * share:.1f} % of the denoiser's parameters stay: about {round(share * whole):,} of {whole:,}."


def opening(report: SearchReport) -> str:
    """How the cut model opens."""
    if report.opens == "stock":
        return "DiffusionPipeline.from_pretrained opens it without trust_remote_code and without lissom."
    return not_plain(report) or "How the cut model opens is not recorded."


def off(table: LatencyTable) -> str:
    """How far predicted shares were from measured ones, in words."""
    gaps = [100 * abs(a - b) for a, b in pairs(table)]
    if not gaps:
        return "The predicted times were not checked against whole runs."
    ratios = _words.counted(len(gaps), "candidate")
    spread = f"off by {statistics.median(gaps):.1f} points in the median, {max(gaps):.1f} at most"
    if len(gaps) == 1:
        spread = f"off by {gaps[0]:.1f} points"
    mean = statistics.mean(a - b for a, b in pairs(table))
    way = "longer" if mean > 0 else "shorter"
    side = f"; on average it said {abs(100 * mean):.1f} points {way} than was measured" if abs(mean) >= 0.001 else ""
    return f"Checked on {ratios}, whole runs timed in turns with the uncut one: the predicted share is {spread}{side}."


def pairs(table: LatencyTable) -> list[tuple[float, float]]:
    """(predicted, measured) shares."""
    return list(zip(table.predicted, table.measured, strict=False))


def timed(table: LatencyTable) -> list[tuple[str, str]]:
    """Under what the layers were timed."""
    rows = [
        ("batch", _words.counted(table.batch, "image") + " in one call"),
        ("device", table.device),
        ("latent", " x ".join(map(str, table.latent))),
        ("one call of the uncut denoiser", f"{_words.short(table.whole)} ms"),
    ]
    return [(name, text) for name, text in rows if text]


def layer_rows(table: LatencyTable) -> list[tuple[str, str, str]]:
    """Rows under LAYERS, the slowest first."""
    ranked = sorted(table.layers.items(), key=lambda pair: (-pair[1], pair[0]))
    whole = table.whole
    return [(name, _words.short(ms), f"{100 * ms / whole:.1f} %" if whole > 0 else "–") for name, ms in ranked]


def _cheaper(before: Gained, one: Gained, report: SearchReport) -> list[str]:
    """'MACs from 1.000 to 0.850' for every cost that the part changed."""
    found = []
    for name in ("macs", *_words.priced(report)):
        old, new = _words.cost(before.scored, name), _words.cost(one.scored, name)
        if old is not None and new is not None and abs(old - new) > _words.EQUAL:
            found.append(f"{_words.COSTS[name]} from {old:.3f} to {new:.3f}")
    return [", ".join(found)] if found else []
