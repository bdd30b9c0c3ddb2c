"""Pieces of the drawings of a comparison: the signs of the verdicts, shapes, texts, an axis. Colours are variables of the page.

Every verdict has its own shape, so that it is told without colour: a round tick, an eight-cornered cross, a triangle, a square.
"""

import math
from html import escape
from typing import NamedTuple

from ..core.gates import Verdict

COLORS: dict[Verdict, str] = {
    "PASS": "var(--good,#15803d)",
    "REGRESSION": "var(--fail,#b91c1c)",
    "INCONCLUSIVE": "var(--bad,#b45309)",
    "INCOMPARABLE": "var(--apart,#6d4bb0)",
}
INK, MUTED, LINE, SOFT = "var(--ink,#1c2530)", "var(--muted,#5b6672)", "var(--line,#dde2e8)", "var(--soft,#eef1f5)"
SURFACE, BASE, CANDIDATE = "var(--surface,#ffffff)", "var(--fixed,#0369a1)", "var(--searched,#c2410c)"
LETTER, BOLD = 0.56, 0.64  # width of a letter in font sizes, about
SIGNS: dict[Verdict, tuple[str, str]] = {  # outline and sign, both in a square of 16
    "PASS": ("M8 .8A7.2 7.2 0 1 1 8 15.2A7.2 7.2 0 1 1 8 .8Z", "M4.6 8.4L7.1 10.9L11.5 5.6"),
    "REGRESSION": ("M5 .8H11L15.2 5V11L11 15.2H5L.8 11V5Z", "M5.2 5.2L10.8 10.8M10.8 5.2L5.2 10.8"),
    "INCONCLUSIVE": ("M8 .6L15.6 14.8H.4Z", "M6.2 8.2Q6.2 6.5 8 6.5T9.8 8.1Q9.8 9.1 8 9.9V10.9M8 12.2V13.6"),
    "INCOMPARABLE": ("M1.2 1.2H14.8V14.8H1.2Z", "M4.4 6.3H11.6M4.4 9.7H11.6M10.2 3.8L5.8 12.2"),
}


class Scale(NamedTuple):
    """From values to places across; `sign` is -1 where larger values lie on the left."""

    value: float
    at: float
    per_unit: float
    sign: int = 1

    def place(self, value: float) -> float:
        return self.at + self.sign * (value - self.value) * self.per_unit


def sign(verdict: Verdict, x: float = 0, y: float = 0, size: float = 16) -> str:
    """The verdict's shape with its sign in it."""
    outline, stroke = SIGNS[verdict]
    return (
        f'<g transform="translate({x:.1f} {y:.1f}) scale({size / 16:.3f})"><path d="{outline}" fill="{COLORS[verdict]}"/>'
        f'<path d="{stroke}" fill="none" stroke="{SURFACE}" stroke-width="1.8"/></g>'
    )


def icon(verdict: Verdict) -> str:
    """The sign as a picture that stands in a line of text, beside the word that says the same."""
    return f'<svg class="icon" viewBox="0 0 16 16" aria-hidden="true">{sign(verdict)}</svg>'


def text(x: float, y: float, words: str, size: float = 10, anchor: str = "start", fill: str = INK, weight: int = 400) -> str:
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"{place}{bold} fill="{fill}">{escape(words)}</text>'


def fitted(words: str, room: float, size: float) -> str:
    """As much of a bold text as fits into so many units."""
    most = max(1, int(room / (BOLD * size)))
    return words if len(words) <= most else words[: most - 1] + "…"


def width(words: str, size: float) -> float:
    return len(words) * LETTER * size


def stroke(path: str, color: str, thick: float = 1, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{thick:g}"{dashed}/>'


def bar(low: float, high: float, y: float, color: str) -> str:
    """An interval, with its ends."""
    return stroke(f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6", color, 1.8)


def dot(x: float, y: float, color: str) -> str:
    return f'<path d="M{x - 3.6:.1f} {y:.1f}a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0Z" fill="{color}" stroke="{SURFACE}"/>'


def diamond(x: float, y: float, color: str) -> str:
    return f'<path d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6Z" fill="{color}" stroke="{SURFACE}"/>'


def drawing(name: str, label: str, body: list[str], across: float, height: float) -> str:
    """The pieces as an <svg> to set into a page."""
    head = f'<svg class="plot rows" data-plot="{name}" role="img" aria-label="{escape(label)}"'
    return f'{head} viewBox="0 0 {across:g} {height:.1f}">{"".join(body)}</svg>'


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers between two values, at most so many.

    >>> ticks(11.8, 14.6), ticks(0.0, 1.0), ticks(3.0, 3.0)
    ([12.0, 13.0, 14.0], [0.0, 0.5, 1.0], [])
    """
    if not high > low:
        return []
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    return []
