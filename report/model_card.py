"""README.md of a model that was pruned, cut or taught: its origin, what was measured, how it opens. Licence carried over."""

import json
import re
from collections.abc import Mapping

from . import _words, distill_words, search_verdict
from . import prune_words as words
from ._gfm import facts, fence, line, listing, table
from .distill_schema import DistillReport
from .prune_schema import PruneReport
from .schema import SearchReport

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def render(report: PruneReport, license_: Mapping[str, str], *, origin: str) -> str:
    """GFM text with the metadata that model hubs read. license_: the lines of the parent's card (license, license_name, …).

    origin: reference of the model that the line of pruned models began with.
    """
    parent = report.model.partition("@")[0]
    name = f"{parent.rstrip('/').rpartition('/')[2]}, pruned by {report.method}"
    sections = [
        _metadata(report, license_, origin),
        f"# {line(name)}",
        line(words.verdict(report).sentence),
        *([] if report.opens_plain else [f"> [!WARNING]\n> **{line(words.not_plain(report))}**"]),
        fence("python", report.open_with),
        _origin(report),
        "## Size",
        table(words.SIZES, words.sizes(report)),
        *_quality(report),
        "## How it was made",
        fence("json", json.dumps(_recipe(report), indent=2)),
        *facts("Conditions", words.conditions(report)),
        "## Licence",
        _licence(report, license_),
    ]
    return "\n\n".join(sections) + "\n"


def searched(report: SearchReport, license_: Mapping[str, str], *, origin: str) -> str:
    """The card of a model that a search has cut; see `render`."""
    parent = report.model.partition("@")[0]
    sections = [
        _metadata(report, license_, origin),
        f"# {line(parent.rstrip('/').rpartition('/')[2])}, cut by a search ({report.method})",
        line(search_verdict.verdict(report).sentence),
        *([f"> [!WARNING]\n> **{line(search_verdict.not_plain(report))}**"] if report.opens == "remote_code" else []),
        fence("python", report.open_with),
        _origin(report),
        "It was searched together with `plan.json`, the sampling plan beside this file: other schedules were not measured with it.",
        *facts("Conditions", _words.conditions(report)),
        "## Licence",
        _licence(report, license_),
    ]
    return "\n\n".join(sections) + "\n"


def distilled(report: DistillReport, license_: Mapping[str, str], *, origin: str) -> str:
    """The card of a model that has learned from a teacher; see `render`."""
    student, rows = report.model.partition("@")[0], distill_words.quality_rows(report)
    back = distill_words.recoveries(report)
    sections = [
        _metadata(report, license_, origin),
        f"# {line(student.rstrip('/').rpartition('/')[2])}, distilled with {line(report.preset)}",
        line(distill_words.verdict(report).sentence),
        *([] if report.opens_plain else [f"> [!WARNING]\n> **{line(words.not_plain(report))}**"]),
        fence("python", report.open_with),
        _origin(report),
        *(["## Quality", table(distill_words.QUALITY, rows), _on(report)] if rows else []),
        *([listing(back)] if back else []),
        "## How it was made",
        fence("json", json.dumps(_recipe(report), indent=2)),
        *facts("Conditions", distill_words.conditions(report)),
        "## Licence",
        _licence(report, license_),
    ]
    return "\n\n".join(sections) + "\n"


def _origin(report: PruneReport | SearchReport | DistillReport) -> str:
    how = "without any training"
    if isinstance(report, DistillReport):
        learned = f"{_words.counted(report.iterations, 'iteration')} in which it learned from `{line(report.teacher)}`"
        how = f"with training: {learned} (weights {report.teacher_hash[:16]})"
    return (
        f"Made from `{line(report.model)}` (weights {report.model_hash[:16]}) by lissom {report.lissom}, {how}. "
        "`lissom.json` holds the cuts, the old and new names of modules (for LoRA and ControlNet), and all measurements."
    )


def _metadata(report: PruneReport | SearchReport | DistillReport, license_: Mapping[str, str], origin: str) -> str:
    """The YAML on top. JSON strings are YAML strings: no text can break out of it."""
    rows = [(key, json.dumps(value)) for key, value in license_.items()]
    base = origin.partition("@")[0]
    made = ("distilled", report.preset) if isinstance(report, DistillReport) else ("pruned", report.method)
    if HUB_ID.fullmatch(origin) and not origin.startswith("zoo:"):
        rows += [("base_model", json.dumps(base))]
    rows += [("library_name", "diffusers"), ("tags", json.dumps(["lissom", *made]))]
    return "\n".join(["---", *(f"{key}: {value}" for key, value in rows), "---"])


def _quality(report: PruneReport) -> list[str]:
    rows = words.quality_rows(report)
    if not rows:
        return []
    return ["## Quality", table(words.QUALITY, rows), _on(report)]


def _on(report: PruneReport | DistillReport) -> str:
    return f"On {report.samples:,} images of seeds that nothing else used, with 95 % intervals."


def _recipe(report: PruneReport | DistillReport) -> dict[str, object]:
    """A recipe that makes the model again."""
    settings = report.settings if isinstance(report, PruneReport) else {}
    return {"lissom": 1, "model": report.model, "seed": report.seed, "stages": [{**report.stage, **settings}]}


def _licence(report: PruneReport | SearchReport | DistillReport, license_: Mapping[str, str]) -> str:
    if not license_:
        return f"No licence was found with the parent. Whatever holds for `{line(report.model)}` holds for this model."
    said = ", ".join(line(value) for value in license_.values())
    return f"That of the parent: {said}."
