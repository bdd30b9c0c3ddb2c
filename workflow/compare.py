"""Two evaluations held against each other: verdict, reports, and what a CI system reads."""

import json
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..core.errors import UserError
from ..core.files import disk_errors, prepare, write_bytes, write_text
from ..core.gates import Check, Gate, check, incomparable, overall, zero_tolerance
from ..core.measurement import Measurement, difference, paired, ratio
from ..report import compare_github, compare_html, compare_junit, compare_markdown, compare_words
from ..report._words import seed_block
from ..report.compare_schema import CompareReport, Pair, Row, Side
from ..report.evaluation import Evaluation
from ..report.schema import Ratio
from ._gallery import picture
from ._source import Source

if TYPE_CHECKING:
    import numpy as np

GAP = 64  # pictures that may be missing before the rest is not looked for
PAIRS = "pairs"  # folder of the pictures that the report shows
NO_GATES = "none given: zero tolerance for all that does not depend on the machine"


def compare(
    base: Source,
    candidate: Source,
    gates: Mapping[str, Gate] | None,
    gates_source: str,
    *,
    allow_inconclusive: bool,
    command: str,
) -> CompareReport:
    """The verdict of a candidate against a baseline. gates None: any change for the worse counts. Nothing is written."""
    one, two = base.evaluation(), candidate.evaluation()
    applied = dict(gates) if gates is not None else _default_gates(one, two)
    rows = _rows(one, two, applied)
    return CompareReport(
        lissom=__version__,
        verdict=overall([c for row in rows for c in row.checks]),
        gates=applied,
        gates_source=gates_source if gates is not None else NO_GATES,
        allow_inconclusive=allow_inconclusive,
        base=_side(base, one),
        candidate=_side(candidate, two),
        rows=tuple(rows),
        command=command,
    )


def write(report: CompareReport, base: Source, candidate: Source, out: Path) -> CompareReport:
    """Write report.json, report.md, report.html, junit.xml and the pictures of pairs into `out`."""
    _make_room(out)
    pairs, why = _pairs(base, candidate, out)
    report = report.model_copy(update={"pairs": pairs, "pairs_missing": why})
    write_text(out / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(out / "report.md", compare_markdown.render(report))
    write_text(out / "report.html", compare_html.render(report, out))
    write_text(out / "junit.xml", compare_junit.render(report))
    return report


def _make_room(out: Path) -> None:
    """An earlier comparison may be written over; anything else in the folder is not ours."""
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise UserError(f"{out}: is not empty, and holds something else than a comparison. Choose another --out folder.")
    prepare(out, resume=True)
    with disk_errors(out):
        shutil.rmtree(out / PAIRS, ignore_errors=True)


def _is_ours(out: Path) -> bool:
    try:
        return bool(json.loads((out / "report.json").read_text(encoding="utf-8"))["kind"] == "comparison")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def headline(report: CompareReport) -> str:
    """The verdict in one sentence."""
    return compare_words.headline(report)


def say(report: CompareReport) -> str:
    """The verdict for a terminal: what was decided, and each limit, the worst first."""
    every = compare_words.asked(compare_words.readable(report))
    lines = [headline(report), *(f"  {compare_words.status(one.check):15} {compare_words.explained(one)}" for one in every)]
    note = compare_words.unpaired_note(report)
    return "\n".join([*lines, *([f"  {note}"] if note else [])])


def announce(report: CompareReport) -> list[str]:
    """Tell the CI system that this runs on, where it is GitHub's; returns the lines that it reads off the output."""
    lines = compare_github.annotations(report) if os.environ.get("GITHUB_ACTIONS") == "true" else []
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(compare_markdown.render(report, pictures=False) + "\n")  # they are not where the summary is shown
        except OSError as e:  # the verdict stands all the same
            lines.append(f"::warning::the job summary {summary} cannot be written ({e.strerror}).")
    return lines


def _default_gates(one: Evaluation, two: Evaluation) -> dict[str, Gate]:
    """Of everything that the baseline has: what the candidate does not have is not kept either."""
    if not any(two.measured(m.metric) is not None for m in one.measurements):
        raise UserError("the two evaluations have no metric in common: measure both with the same --metrics.")
    # A clock never shows the same time twice, and memory moves by bytes: of what depends on the machine nothing is asked unless
    # someone says how much it may vary.
    found = {m.metric: zero_tolerance(m) for m in one.measurements if m.seeds is not None or (m.exact and not m.conditions)}
    if not found:
        raise UserError(
            "only times and memory were measured, which vary: say with --gates FILE how much they may, e.g. `latency: {max_ratio: 1.1}`."
        )
    return found


def _rows(one: Evaluation, two: Evaluation, gates: Mapping[str, Gate]) -> list[Row]:
    """Every number of either side; those that a gate asks about first."""
    names = list(dict.fromkeys([*gates, *(m.metric for e in (one, two) for m in e.measurements)]))
    rows = []
    for name in names:
        a, b = one.measured(name), two.measured(name)
        checks = tuple(check(name, rule, limit, a, b) for rule, limit in gates[name].rules()) if name in gates else ()
        rows.append(_row(name, a, b, checks))
    return rows


def _row(name: str, a: Measurement | None, b: Measurement | None, checks: tuple[Check, ...]) -> Row:
    known = b or a
    why = incomparable(a, b) if a is not None and b is not None else None
    gap = quotient = None
    if a is not None and b is not None and why is None:
        gap = _interval(*difference(b, a))
        quotient = _interval(*ratio(b, a)) if a.value > 0 and b.value > 0 else None
    return Row(
        metric=name,
        label=known.label if known else name,
        unit=known.unit if known else "",
        direction=known.direction if known else "lower",
        base=a,
        candidate=b,
        difference=gap,
        ratio=quotient,
        paired=a is not None and b is not None and paired(a, b),
        incomparable=why or "",
        checks=checks,
    )


def _interval(value: float, interval: tuple[float, float] | None) -> Ratio:
    low, high = interval if interval is not None else (None, None)
    return Ratio(value=value, low=low, high=high)


def _side(source: Source, found: Evaluation) -> Side:
    return Side(
        source=source.name,
        model=found.model,
        model_hash=found.model_hash,
        pipeline=found.pipeline,
        what=found.what,
        seeds=seed_block(next((m for m in found.measurements if m.seeds is not None), None)),
        samples=found.samples,
        denoiser_calls=found.denoiser_calls,
        seconds=found.seconds,
        environment=found.environment,
    )


def _pairs(base: Source, candidate: Source, out: Path) -> tuple[tuple[Pair, ...], str]:
    """Pictures of the same seed from both, the largest change first, and why there are none."""
    import numpy as np

    one, two = base.evaluation(), candidate.evaluation()
    if one.seeds is None or two.seeds is None:
        return (), "no metric looked at images."
    firsts = {next((m.prompts for m in e.measurements if m.seeds is not None), None) for e in (one, two)}
    if (one.seeds.role, one.seeds.base) != (two.seeds.role, two.seeds.base) or len(firsts) > 1:
        return (), "the two were made with other seeds or prompts, so that no two images belong together."
    captions, missing = base.captions(), 0
    found: list[Pair] = []
    for index in range(min(one.samples, two.samples)):
        pictures = [source.picture(picture(index)) for source in (base, candidate)]
        if pictures[0] is None or pictures[1] is None:
            missing += 1
            if missing > GAP:
                break
            continue
        a, b = (_pixels(content) for content in pictures if content is not None)
        if a is None or b is None or a.shape != b.shape:
            return (), f"the pictures of image {index} cannot be read, or differ in size."
        names = [f"{PAIRS}/{index:06}-{side}.png" for side in ("base", "candidate")]
        for name, content in zip(names, pictures, strict=True):
            if content is not None:
                write_bytes(out / name, content)
        change = math.sqrt(float(np.mean((a - b) ** 2))) / 255
        found.append(Pair(index=index, caption=captions.get(index, ""), base=names[0], candidate=names[1], change=change))
    if not found:
        return (), "one of them has no pictures beside it (FILE.images/, written by `lissom evaluate --out FILE.json`)."
    return tuple(sorted(found, key=lambda pair: (-pair.change, pair.index))), ""


def _pixels(content: bytes) -> "np.ndarray | None":
    """(H, W, 3) float64 in 0..255, or None for what is no picture."""
    import io

    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:  # what was written, and no other decoder
            return np.asarray(image.convert("RGB"), dtype=np.float64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def command_of(base: Source, candidate: Source, gates: Path | None, allow_inconclusive: bool, out: Path) -> str:
    """What makes this report again."""
    words = ["lissom", "compare", *([candidate.name] if base.revision else [base.name, candidate.name])]
    if base.revision:
        words += ["--base-git", base.name]
    if gates is not None:
        words += ["--gates", str(gates)]
    return shlex.join([*words, *(["--allow-inconclusive"] if allow_inconclusive else []), "--out", str(out)])
