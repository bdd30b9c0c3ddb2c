"""The picture of the network: every layer once, in order, in its colour, inside the frame, with what is cut crossed out."""

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from lissom.core.candidate import Cut
from lissom.report import prune_html, prune_network
from lissom.report.prune_schema import LayerScore, PruneReport
from lissom.tests.report import prune_reports
from lissom.tests.report.prune_reports import EVIL, build

BOLD, PLAIN = 0.72, 0.56  # mean widths of letters in font sizes; DejaVu, one of the widest of system fonts


class Cell(NamedTuple):
    address: str
    fate: str
    x: float
    y: float
    width: float
    height: float
    fill: str
    strokes: int  # 2: crossed out
    text: str
    size: float


class Picture:
    """An SVG of `prune_network.network`, read back."""

    def __init__(self, report: PruneReport) -> None:
        svg = prune_network.network(report)
        assert svg is not None
        self.root = ElementTree.fromstring(svg)
        self.frame = [float(number) for number in self.root.attrib["viewBox"].split()]
        self.cells = [self.cell(group) for group in self.root.iter("g")]
        self.print = [text.text or "" for text in self.root.findall("text")]

    def cell(self, group: ElementTree.Element) -> Cell:
        title, rect, text = group.findtext("title") or "", group.find("rect"), group.find("text")
        assert rect is not None
        address, *_, fate = title.split(", ")
        box = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        strokes = max((path.attrib["d"].count("M") for path in group.findall("path")), default=0)
        said = ("", 0.0) if text is None else (text.text or "", float(text.attrib["font-size"]))
        return Cell(address, fate, *box, rect.attrib["fill"], strokes, *said)

    def boxes(self) -> Iterable[tuple[float, float, float, float]]:
        """(left, top, right, bottom) of all that is drawn, outlines and texts included."""
        for rect in self.root.iter("rect"):
            x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            half = float(rect.attrib["stroke-width"]) / 2
            yield x - half, y - half, x + width + half, y + height + half
        for path in self.root.iter("path"):
            ends = re.findall(r"([\d.-]+) ([\d.-]+)", path.attrib["d"])
            for x, y in ends:
                yield float(x), float(y), float(x), float(y)
        for text in self.root.iter("text"):
            x, y, size = (float(text.attrib[name]) for name in ("x", "y", "font-size"))
            wide = len(text.text or "") * size * (BOLD if "font-weight" in text.attrib else PLAIN)
            left = x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
            yield left, y - size * 0.75, left + wide, y + size * 0.2


def fine() -> tuple[LayerScore, ...]:
    """SDXL with attentions and feed-forwards to be cut one by one: 17 resnets and 210 others."""
    parts = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "feed_forward"}
    found: list[LayerScore] = []
    for layer in prune_reports.layers("sdxl"):
        inside = [layer.model_copy(update={"address": f"{layer.address}.{a}", "kind": k}) for a, k in parts.items()]
        found += [layer] if layer.kind == "resnet" else inside
    return tuple(found)


def scored(**scores: float | None) -> PruneReport:
    """Blocks with these scores."""
    found = [LayerScore(address=f"blocks.{i}", kind="block", params=1, score=s) for i, s in enumerate(scores.values())]
    return build(layers=tuple(found), cuts=())


def listed(lists: dict[str, int]) -> PruneReport:
    kind = "transformer_block"
    found = [LayerScore(address=f"{name}.{i}", kind=kind, params=1, score=1e-3) for name, n in lists.items() for i in range(n)]
    return build(layers=tuple(found), cuts=())


CASES = {
    **{name: build(name) for name in prune_reports.NETWORKS},
    "all cut": build(layers=prune_reports.layers("flux", cut=1.0)),
    "no scores": prune_reports.unscored("sdxl"),
    "fine": build(layers=fine()),
    "one narrow column": build(
        layers=tuple(x for x in fine() if not x.address.startswith("up_blocks.2") or x.address.endswith("s.0"))
    ),
    "120 blocks": listed({"blocks": 120}),
    "three lists": listed({"transformer_blocks": 2, "a.rather.long.name.of.a.list." * 3 + "single": 40, "x": 1}),
    "hostile": prune_reports.hostile(),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PruneReport, Picture]:
    return CASES[request.param], Picture(CASES[request.param])


def test_every_layer_is_drawn_once(case: tuple[PruneReport, Picture]) -> None:
    report, picture = case
    expected = sorted(layer.address.split(", ")[0] for layer in report.layers)
    assert sorted(cell.address for cell in picture.cells) == expected


def test_what_is_cut_is_crossed_out_and_nothing_else(case: tuple[PruneReport, Picture]) -> None:
    report, picture = case
    cut = {layer.address for layer in report.layers if layer.cut}
    assert {cell.address for cell in picture.cells if cell.strokes == 2} == cut
    assert {cell.address for cell in picture.cells if cell.fate == "cut"} == cut


def test_nothing_is_outside_the_frame(case: tuple[PruneReport, Picture]) -> None:
    _, picture = case
    left, top, width, height = picture.frame
    for x0, y0, x1, y1 in picture.boxes():
        assert left <= x0 and x1 <= left + width, (x0, x1)
        assert top <= y0 and y1 <= top + height, (y0, y1)


def test_cells_do_not_overlap_and_texts_fit_them(case: tuple[PruneReport, Picture]) -> None:
    _, picture = case
    for a, b in itertools.combinations(picture.cells, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, (a, b)
    for cell in picture.cells:
        room = cell.width / 2 if cell.strokes else cell.width  # the cross has the right half
        assert len(cell.text) * cell.size * BOLD <= room and cell.size <= cell.height, cell
        assert cell.size >= 4 or not cell.text, cell  # below that it is dust
        assert cell.text or cell.strokes and cell.width < 20, cell  # only a narrow cross leaves no room for it
        assert cell.width >= 9, cell


def test_resnets_and_attentions_alternate_and_stages_of_one_resolution_are_level() -> None:
    cells = {cell.address: cell for cell in Picture(build("sd15")).cells}
    ran = ["resnets.0", "attentions.0", "resnets.1", "attentions.1"]
    for stage in ("down_blocks.0", "up_blocks.2", "up_blocks.3"):
        places = [cells[f"{stage}.{name}"].x for name in ran]
        assert places == sorted(places)
    for level in range(4):
        assert cells[f"down_blocks.{level}.resnets.0"].y == cells[f"up_blocks.{3 - level}.resnets.0"].y
        assert cells[f"down_blocks.{level}.resnets.0"].x < cells[f"up_blocks.{3 - level}.resnets.0"].x
    tops = [cells[f"down_blocks.{level}.resnets.0"].y for level in range(4)]
    assert [*tops, cells["mid_block.resnets.0"].y] == sorted([*tops, cells["mid_block.resnets.0"].y])
    places = [cells[f"mid_block.{name}"].x for name in ("resnets.0", "attentions.0", "resnets.1")]
    assert places == sorted(places)


def test_blocks_run_from_left_to_right_and_carry_their_numbers() -> None:
    cells = Picture(build("flux", layers=prune_reports.layers("flux", cut=0.0), cuts=())).cells
    for name, count in (("transformer_blocks", 19), ("single_transformer_blocks", 38)):
        found = [cell for cell in cells if cell.address.startswith(f"{name}.")]
        assert [cell.text for cell in found] == [str(i) for i in range(count)]
        assert [(cell.y, cell.x) for cell in found] == sorted((cell.y, cell.x) for cell in found)


def level(cell: Cell) -> int:
    found = re.fullmatch(r"var\(--q(\d),#[0-9a-f]{6}\)", cell.fill)
    assert found is not None, cell
    return int(found[1])


def test_colours_follow_the_logarithm_of_the_score() -> None:
    picture = Picture(scored(a=1e-7, b=1e-6, c=1e-5, d=1e-4 * 1.01, e=1e-3 * 1.01, f=0.01 * 1.01, g=1.0))
    assert [level(cell) for cell in picture.cells] == [0, 1, 2, 3, 4, 5, 6]
    assert {"1e-07", "0.00032", "1"} <= set(picture.print)  # both ends and the middle of the scale
    many = Picture(build("sdxl"))
    by_score = sorted(build("sdxl").layers, key=lambda layer: layer.score or 0)
    levels = {cell.address: level(cell) for cell in many.cells}
    ranked = [levels[layer.address] for layer in by_score]
    assert ranked == sorted(ranked) and set(ranked) == set(range(7))


def test_scores_that_have_no_logarithm() -> None:
    picture = Picture(scored(a=0.0, b=1e-3, c=0.1, d=0.0))
    assert [level(cell) for cell in picture.cells] == [0, 0, 6, 0]
    assert "≤ 0.001" in picture.print and "log scale" in " ".join(picture.print)
    signed = Picture(scored(a=-3.0, b=-1.0, c=0.0, d=4.0))  # logits of gates
    assert [level(cell) for cell in signed.cells] == [0, 2, 3, 6]
    assert {"-3", "0.5", "4"} <= set(signed.print) and "log scale" not in " ".join(signed.print)
    zeros = Picture(scored(a=0.0, b=0.0))
    assert [level(cell) for cell in zeros.cells] == [0, 0] and "0" in zeros.print
    same = Picture(scored(a=0.5, b=0.5))
    assert same.print.count("0.5") == 1 and len(list(same.root.findall("rect"))) == 1


def test_what_has_no_score_has_no_colour() -> None:
    picture = Picture(scored(a=None, b=1e-3, c=0.1))
    assert picture.cells[0].fill == "none" and "no score" in picture.print
    assert "no score" not in Picture(scored(b=1e-3, c=0.1)).print
    bare = Picture(prune_reports.unscored())
    assert {cell.fill for cell in bare.cells} == {"none"}
    assert not any("log scale" in text or text == "no score" for text in bare.print)


def test_what_is_cut_in_part_is_struck_through_once() -> None:
    cuts = (Cut(address="up_blocks.1.attentions.0", what="replace", value="empty"),)
    whole = tuple(layer.model_copy(update={"cut": False}) for layer in prune_reports.layers("sd15"))
    picture = Picture(build(layers=whole, cuts=cuts))
    assert [(c.address, c.fate) for c in picture.cells if c.strokes == 1] == [("up_blocks.1.attentions.0", "cut in part")]
    assert "cut in part" in picture.print and "cut" not in picture.print
    assert "cut in part" not in Picture(build()).print and "cut" in Picture(build()).print


def test_the_key_explains_the_letters_that_are_there() -> None:
    assert "R resnet, S self attention, X cross attention, F feed forward." in " ".join(Picture(build(layers=fine())).print)
    assert Picture(build("flux")).print[-1] == "Numbers: the block's place in its list."
    assert "A attention, R resnet. Square corners: resnet." in Picture(build()).print
    assert prune_network.network(build(layers=(), cuts=())) is None


def test_hostile_names_are_text() -> None:
    svg = prune_network.network(prune_reports.hostile())
    assert svg is not None and "<script" not in svg and EVIL.split("\n")[0].replace("<", "&lt;").replace(">", "&gt;") in svg


def luminance(color: str) -> float:
    """Of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible_in_light_and_dark(tmp_path: Path) -> None:
    """Letters on every class, classes from each other in order; every variable that is used is defined in both."""
    page = prune_html.render(build(), tmp_path)
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = {}, {}
    for block in re.findall(r"(?:@media \(prefers-color-scheme: dark\) \{ )?:root \{[^}]*\}", style):
        (dark if block.startswith("@media") else light).update(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block))
    assert light.keys() == dark.keys() >= set(re.findall(r"var\(--([\w-]+)", page))
    for theme, sign in ((light, -1), (dark, 1)):
        for i in range(prune_network.LEVELS):
            assert contrast(theme[f"q{i}"], theme[f"t{i}"]) >= 4.5, (i, theme[f"q{i}"])
        classes = [luminance(theme[f"q{i}"]) for i in range(prune_network.LEVELS)]
        steps = [sign * math.log((b + 0.05) / (a + 0.05)) for a, b in itertools.pairwise(classes)]
        assert min(steps) > 0.1, steps  # from light to dark on a light page, from dark to light on a dark one
        assert contrast(theme["ink"], theme["surface"]) >= 7 and contrast(theme["muted"], theme["surface"]) >= 4.5
        assert contrast(theme["searched"], theme["surface"]) >= 4.5 and contrast(theme["good"], theme["surface"]) >= 4.5
    fallback = [light[f"q{i}"] for i in range(prune_network.LEVELS)]
    assert fallback == list(prune_network.FALLBACK)  # for a picture that is taken out of its page
