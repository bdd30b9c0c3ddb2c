"""A picture of the network, one cell per layer in the order in which layers run, coloured by score, what is cut crossed out.

A U-Net is drawn as a U: down stages on the left, the middle at the bottom, up stages on the right, each beside the down stage
of its resolution. Anything else is drawn as rows of its blocks. What lies inside another listed part (transformer blocks of an
attention, attention and feed-forward of a block) is stacked in one column. Sizes are in SVG units: 360 across is a phone.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from . import prune_layers
from ._words import short
from .prune_schema import LayerScore, PruneReport

WIDTH = 360.0
MARGIN = 1.0  # around the picture: the outline of what is cut is drawn half outside its cell
LEVELS = 7  # classes of the colour scale; their colours are variables of the page, light and dark
FALLBACK = ("#eff4fb", "#d3e3f3", "#a9cbe8", "#74add8", "#3478b0", "#1f64a6", "#0b3f78")
LETTERS = {
    "resnet": "R", "attention": "A", "transformer_block": "T", "middle": "M", "block": "B", "self_attention": "S",
    "cross_attention": "X", "feed_forward": "F",
}  # fmt: skip
STACK = 12  # cells of one column before the next one is begun
GAP = 2.0
STEP = 24.0  # width of a class in the colour bar
LINE = 72  # letters of small print that fit side by side
BOLD = 0.72  # width of a bold letter or digit in font sizes, generously
STAGES = re.compile(r"(down_blocks|up_blocks)\.(\d+)(?:\.|$)|(mid_block)(?:\.|$)")

Place = tuple[int, int, str]  # of a column within its stage: index, resnets before attentions, name


class Cell(NamedTuple):
    layer: LayerScore
    x: float
    y: float
    width: float
    height: float
    text: str


class Scale(NamedTuple):
    """Classes of equal width between the smallest and the largest score: on a log scale of those above zero, unless they are signed."""

    low: float
    high: float
    linear: bool

    def level(self, score: float) -> int:
        if score <= self.low:
            return 0
        if score >= self.high:
            return LEVELS - 1
        if self.linear:
            return int(LEVELS * (score - self.low) / (self.high - self.low))
        return int(LEVELS * math.log(score / self.low) / math.log(self.high / self.low))

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2 if self.linear else math.sqrt(self.low * self.high)


class Pen(NamedTuple):
    """What decides how a layer looks."""

    scale: Scale | None
    partly: frozenset[str]  # layers in which something is cut


def network(report: PruneReport) -> str | None:
    """The picture as an <svg> element; None when no layers are listed."""
    if not report.layers:
        return None
    pen = Pen(_scale(report.layers), prune_layers.reduced(report))
    body, bottom = _unet(report.layers, pen) if _is_unet(report.layers) else _rows(report.layers, pen, 0.0)
    key, bottom = _key(report, pen, "".join(body), bottom + 14)
    name = f"{len(report.layers)} layers, {sum(layer.cut for layer in report.layers)} of them cut"
    box = f"{-MARGIN:g} {-MARGIN:g} {WIDTH + 2 * MARGIN:g} {bottom + 2 * MARGIN:.1f}"
    head = f'<svg class="plot network" data-plot="network" role="img" aria-label="{name}" viewBox="{box}">'
    return head + "".join(body) + "".join(key) + "</svg>"


def _scale(layers: Sequence[LayerScore]) -> Scale | None:
    known = [score for score, _ in prune_layers.scored(layers)]
    if not known:
        return None
    linear = prune_layers.signed(layers)
    shown = known if linear else [score for score in known if score > 0]
    return Scale(min(shown), max(shown), linear)


def _unet(layers: Sequence[LayerScore], pen: Pen) -> tuple[list[str], float]:
    """The U, with the stages' names above their cells, and whatever belongs to no stage below it."""
    stages: dict[tuple[str, int], list[LayerScore]] = {}
    others = []
    for layer in layers:
        found = STAGES.match(layer.address)
        if found:
            stages.setdefault((found[1] or found[3], int(found[2] or 0)), []).append(layer)
        else:
            others.append(layer)
    numbers = [number for name, number in stages if name != "mid_block"]
    deepest = max(numbers, default=-1)
    columns = {key: _columns(found) for key, found in stages.items()}
    pairs = [(columns.get(("down_blocks", k), []), columns.get(("up_blocks", deepest - k), [])) for k in range(deepest + 1)]
    middle = columns.get(("mid_block", 0), [])
    most = max([len(left) for left, _ in pairs] + [1]), max([len(right) for _, right in pairs] + [1])
    indent = 9.0  # a level: the two arms lean towards the middle, which makes the U
    between = 26.0
    lean = indent * max(0, deepest)
    width = min(32.0, (WIDTH - between - 2 * lean) / sum(most) if sum(most) > 6 else 32.0, (WIDTH - 20) / max(1, len(middle)))
    whole = sum(most) * width + between + 2 * lean
    start, end = (WIDTH - whole) / 2, (WIDTH + whole) / 2
    out: list[str] = []
    y = 0.0
    for level, (left, right) in enumerate(pairs):
        x_left, x_right = start + indent * level, end - indent * level - len(right) * width
        tallest = max([_height(column, width) for column in (*left, *right)] + [0.0])
        if left and right:  # what the down stage hands across
            line = f"M{x_left + len(left) * width + 1:.1f} {y + 13 + width * 0.4:.1f}H{x_right - 3:.1f}"
            out.append(f'<path d="{line}" stroke="var(--dot,#8a94a0)" stroke-dasharray="2 3" fill="none"/>')
        for x, stage, name in ((x_left, left, f"down {level} ↓"), (x_right, right, f"up {deepest - level} ↑")):
            if stage:
                out += [_text(x, y + 8, name), *_stage(stage, x, y + 13, width, pen)]
        y += tallest + 25
    if middle:
        x = (WIDTH - len(middle) * width) / 2
        out += [_text(x, y + 8, "middle →"), *_stage(middle, x, y + 13, width, pen)]
        y += max(_height(column, width) for column in middle) + 25
    if others:
        rest, y = _rows(others, pen, y)
        out += rest
    return out, y - 13


def _rows(layers: Sequence[LayerScore], pen: Pen, y: float) -> tuple[list[str], float]:
    """Lists of blocks one below the other, each in as few rows as stay legible."""
    lists: dict[str, dict[str, list[LayerScore]]] = {}
    for layer in layers:
        found = re.match(r"(.*?)\.(\d+)(?:\.|$)", layer.address)
        name, block = (found[1], found[2]) if found else ("", layer.address)
        lists.setdefault(name, {}).setdefault(block, []).append(layer)
    out: list[str] = []
    for name, blocks in lists.items():
        order = sorted(blocks, key=int) if name else list(blocks)
        stacked = any(len(inside) > 1 for inside in blocks.values())
        lines = -(-len(blocks) // 19)
        per_line = -(-len(blocks) // lines)
        width = min(32.0, WIDTH / per_line)
        out.append(_text(0, y + 8, f"{name or 'other layers'} ({len(blocks)}) →"))
        y += 13
        for start in range(0, len(order), per_line):
            some = order[start : start + per_line]
            if not stacked:
                for i, block in enumerate(some):
                    (layer,) = blocks[block]
                    out += _single(layer, i * width, y, width, pen, block if name else _letter(layer.kind))
                y += width * 0.8 + 5
                continue
            for i, block in enumerate(some):  # a stack has no room for its number
                out += [
                    _text((i + 0.5) * width - GAP / 2, y + 6, block, "middle"),
                    *_stack(blocks[block], i * width, y + 9, width, pen),
                ]
            y += 9 + max(len(blocks[block]) for block in some) * _stacked(width) + 5
        y += 9
    return out, y - 5


def _columns(layers: Sequence[LayerScore]) -> list[list[LayerScore]]:
    """A stage's layers as columns in the order in which they run: resnet 0, attention 0, resnet 1, ..."""
    found: dict[Place, list[LayerScore]] = {}
    for layer in layers:
        found.setdefault(_place(layer.address), []).append(layer)
    columns = []
    for place in sorted(found):
        column = found[place]
        columns += [column[i : i + STACK] for i in range(0, len(column), STACK)]
    return columns


def _place(address: str) -> Place:
    inside = STAGES.sub("", address, count=1).split(".")
    kinds = ("resnets", "attentions", "motion_modules")
    if len(inside) > 1 and inside[1].isdigit():
        last = inside[0] in ("downsamplers", "upsamplers")
        return (10**6 if last else int(inside[1])), kinds.index(inside[0]) if inside[0] in kinds else 9, inside[0]
    return -1, 0, ""  # the stage itself


def _height(column: Sequence[LayerScore], width: float) -> float:
    return width * 0.8 if len(column) == 1 else len(column) * _stacked(width)


def _stacked(width: float) -> float:
    return min(12.5, width * 0.8)


def _stage(columns: Sequence[Sequence[LayerScore]], x: float, y: float, width: float, pen: Pen) -> list[str]:
    out = []
    for i, column in enumerate(columns):
        if len(column) == 1:
            out += _single(column[0], x + i * width, y, width, pen, _letter(column[0].kind))
        else:
            out += _stack(column, x + i * width, y, width, pen)
    return out


def _single(layer: LayerScore, x: float, y: float, width: float, pen: Pen, text: str) -> list[str]:
    return _cell(Cell(layer, x, y, width - GAP, width * 0.8 - GAP, text), pen)


def _stack(layers: Sequence[LayerScore], x: float, y: float, width: float, pen: Pen) -> list[str]:
    step = _stacked(width)
    cells = [Cell(layer, x, y + i * step, width - GAP, step - GAP / 2, _letter(layer.kind)) for i, layer in enumerate(layers)]
    return [text for cell in cells for text in _cell(cell, pen)]


def _cell(cell: Cell, pen: Pen) -> list[str]:
    """A layer, with what the pointer shows."""
    title = _title(cell.layer, prune_layers.fate(cell.layer, pen.partly))
    return [f"<g><title>{escape(title)}</title>", *_box(cell, pen), "</g>"]


def _box(cell: Cell, pen: Pen) -> list[str]:
    """Square corners for a ResNet, round ones for the rest; what is cut is outlined and crossed out."""
    layer, x, y, width, height, text = cell
    level = None if pen.scale is None or layer.score is None else pen.scale.level(layer.score)
    fate = prune_layers.fate(layer, pen.partly)
    radius = 0 if layer.kind == "resnet" else min(width, height) * 0.36
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}"'
    stroke = 'stroke="var(--searched,#c2410c)" stroke-width="1.8"' if fate else 'stroke="var(--edge,#b6c0cb)" stroke-width=".7"'
    dashes = ' stroke-dasharray="2 1.5"' if level is None and not fate else ""
    out = [f"<rect {box} {_fill(level)} {stroke}{dashes}/>"]
    wide = width >= 20
    if fate:
        out += _strokes(x + width * (0.72 if wide else 0.5), y + height / 2, min(height, width) * 0.27, fate)
    if text and (wide or not fate):  # a narrow one has room for the cross only; the pointer shows its name
        at, room = (x + width * 0.29, width * 0.44) if fate else (x + width / 2, width * 0.9)
        size = min(height * 0.62, 11.0, room / (BOLD * len(text)))
        ink = "var(--muted,#5b6672)" if level is None else f"var(--t{level},{'#1c2530' if level < 4 else '#ffffff'})"
        out.append(
            f'<text x="{at:.1f}" y="{y + height / 2 + size * 0.36:.1f}" font-size="{size:.1f}" text-anchor="middle" '
            f'font-weight="600" fill="{ink}">{escape(text)}</text>'
        )
    return out


def _strokes(x: float, y: float, arm: float, fate: str) -> list[str]:
    """A cross for what is cut, half of one for what is cut in part."""
    ends = [f"M{x - arm:.1f} {y + arm * s:.1f}L{x + arm:.1f} {y - arm * s:.1f}" for s in ((1, -1) if fate == "cut" else (1,))]
    return [  # the halo keeps it legible on dark blue
        f'<path d="{"".join(ends)}" stroke="var({color})" stroke-width="{thick}" fill="none"/>'
        for color, thick in (("--surface,#ffffff", 4.2), ("--searched,#c2410c", 2.2))
    ]


def _title(layer: LayerScore, fate: str) -> str:
    """What the pointer shows."""
    parts = [layer.address, prune_layers.kind(layer), f"score {short(layer.score)}", f"{layer.params:,} parameters"]
    return ", ".join([*parts, {"cut": "cut", "in part": "cut in part"}.get(fate, "kept")])


def _fill(level: int | None) -> str:
    return 'fill="none"' if level is None else f'fill="var(--q{level},{FALLBACK[level]})"'


def _letter(kind: str) -> str:
    return LETTERS.get(kind, kind[:1].upper() or "?")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Small print, as much of it as the picture is wide, moved to the left where it would stand out on the right."""
    text = text if len(text) <= LINE else text[: LINE - 1] + "…"
    x = min(x, WIDTH * (1 - len(text) / LINE)) if anchor == "start" else x
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="8.5" text-anchor="{anchor}" fill="var(--muted,#5b6672)">{escape(text)}</text>'


def _key(report: PruneReport, pen: Pen, drawn: str, y: float) -> tuple[list[str], float]:
    """The colour bar, what marks mean, what shapes and letters mean."""
    out, x = [], 0.0
    if pen.scale is not None:
        out += [
            _text(0, y + 6, f"{prune_layers.scores_are(report)}{'' if pen.scale.linear else ', log scale'}"),
            *_bar(report.layers, pen.scale, y + 11),
        ]
        x, y = LEVELS * STEP + 18, y + 11
    level = pen.scale.low if pen.scale else None
    plain = LayerScore(address="", kind="resnet", params=0, score=level)
    samples = {
        "cut": (any(layer.cut for layer in report.layers), plain.model_copy(update={"cut": True})),
        "cut in part": (bool(pen.partly), plain.model_copy(update={"address": next(iter(pen.partly), "")})),
        "no score": (
            level is not None and any(layer.score is None for layer in report.layers),
            plain.model_copy(update={"score": None}),
        ),
    }
    for name, (needed, layer) in samples.items():
        if needed:
            out += [*_box(Cell(layer, x, y, 12, 10, ""), pen), _text(x + 16, y + 8, name)]
            x += 26 + 4.7 * len(name)
    y += 24 if pen.scale is not None else 14 if x else 0
    lines = textwrap.wrap(_meaning(report.layers, drawn), LINE)
    out += [_text(0, y + 9 + 11 * number, text) for number, text in enumerate(lines)]
    return out, y + 11 * len(lines) + 3


def _bar(layers: Sequence[LayerScore], scale: Scale, y: float) -> list[str]:
    """The colours from the lowest score to the highest; a single one where all are the same."""
    levels = LEVELS if scale.high > scale.low else 1
    out = [
        f'<rect x="{level * STEP:.1f}" y="{y:.1f}" width="{STEP:.1f}" height="9" {_fill(level)} stroke="var(--edge,#b6c0cb)" '
        'stroke-width=".5"/>'
        for level in range(levels)
    ]
    sign = "≤ " if any(score < scale.low for score, _ in prune_layers.scored(layers)) else ""
    out.append(_text(0, y + 19, f"{sign}{scale.low:.2g}"))
    if levels > 1:
        out.append(_text(LEVELS * STEP / 2, y + 19, f"{scale.middle:.2g}", "middle"))
        out.append(_text(LEVELS * STEP, y + 19, f"{scale.high:.2g}", "end"))
    return out


def _meaning(layers: Sequence[LayerScore], drawn: str) -> str:
    """What the letters, numbers and shapes that were drawn stand for."""
    kinds = {layer.kind: prune_layers.kind(layer) for layer in layers}
    letters = ", ".join(
        f"{_letter(kind)} {name}" for kind, name in kinds.items() if f">{escape(_letter(kind))}</text>" in drawn
    )
    numbers = "" if _is_unet(layers) else "Numbers: the block's place in its list"
    text = "; ".join(part for part in (numbers, letters) if part)
    return f"{text}. Square corners: resnet." if "resnet" in kinds else f"{text}."


def _is_unet(layers: Sequence[LayerScore]) -> bool:
    return any(STAGES.match(layer.address) for layer in layers)
