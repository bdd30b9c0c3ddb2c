"""The HTML page of a pruned model: one file, nothing hostile in it, plots that fit, in light and in dark."""

import re
from pathlib import Path

import numpy as np
import pytest
from lissom.report import prune_html, prune_markdown, prune_plots
from lissom.report.prune_schema import Size
from lissom.report.sheets import sheet
from lissom.tests.report.parsed import Page
from lissom.tests.report.prune_reports import NETWORKS, build, hostile


@pytest.fixture(scope="module")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    for name in ("before", "after"):
        sheet(pixels, folder / f"{name}.png")
    return folder


def test_sheets(sheets: Path, tmp_path: Path) -> None:
    report = build()
    assert prune_html.render(report, sheets).count("data:image/png;base64,") == 2
    assert "![samples of before](before.png) | ![samples of after](after.png)" in prune_markdown.render(report)
    (tmp_path / "after.png").write_bytes(b"no picture")  # before.png is not there
    assert prune_html.render(report, tmp_path).count("missing from the folder or cannot be read") == 2
    one = report.scored[1].model_copy(update={"sheet": None})
    half = build(scored=(report.scored[0], one))
    assert prune_html.render(half, sheets).count("No sheet of samples was written.") == 1
    assert "![samples of before](before.png) | no sheet was written" in prune_markdown.render(half)


def test_html_escapes_what_it_is_given(sheets: Path) -> None:
    page = prune_html.render(hostile(), sheets)
    parsed = Page(page)
    assert parsed.open == [] and parsed.tags.count("script") == 1 and parsed.tags.count("title") >= 1
    assert "<script>alert" not in page and parsed.links == []
    assert "&lt;script&gt;alert(1)" in page
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.loaded)


@pytest.mark.parametrize("network", NETWORKS)
def test_page_needs_nothing_else_and_ids_do_not_clash(network: str, sheets: Path) -> None:
    page = prune_html.render(build(network), sheets)
    parsed = Page(page)
    assert parsed.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.loaded)
    assert "@import" not in page and "url(http" not in page and "default-src 'none'" in page
    assert parsed.links == [{"href": "https://arxiv.org/abs/2404.11098", "rel": "noreferrer"}]
    assert len(parsed.ids) == len(set(parsed.ids)) and parsed.references <= set(parsed.ids)
    assert re.findall(r'data-plot="(\w+)"', page) == ["shares", "network", "ranking", "bargains", "additivity"]


def test_long_table_has_every_layer_and_what_to_sort_by(sheets: Path) -> None:
    """The script sorts by data-v where there is one: numbers in full, empty where a value is not known."""
    found = list(build().layers)
    found[0] = found[0].model_copy(update={"score": None, "macs": None})
    page = prune_html.render(build(layers=tuple(found)), sheets)
    body = page[page.index('<table id="layers">') :]
    head, *rows = re.findall(r"<tr.*?</tr>", body[: body.index("</table>")], re.DOTALL)
    assert head.count("<button") == 6 and len(rows) == len(found)
    keys = [re.findall(r'data-v="([^"]*)"', row) for row in rows]
    assert [int(place) for place, *_ in keys] == list(range(len(found)))
    assert keys[0][1:] == ["", str(found[0].params), ""]
    assert [float(key[1]) for key in keys[1:]] == [layer.score for layer in found[1:]]
    assert sum('class="cut"' in row for row in rows) == sum(layer.cut for layer in found)


def test_no_cuts_no_layers_no_sizes(sheets: Path) -> None:
    """A report of nothing is still a page."""
    report = build(cuts=(), layers=(), before=Size(params=0, macs=0, disk=0), after=Size(params=0, macs=0, disk=0), latency=())
    page = prune_html.render(report, sheets)
    assert Page(page).open == [] and "No layer is listed." in page
    assert "## What was cut\n\nNothing." in prune_markdown.render(report)


def test_plots_are_the_same_every_time_and_take_the_colours_of_the_page() -> None:
    report = build()
    for draw in (prune_plots.shares, prune_plots.ranking, prune_plots.bargains, prune_plots.additivity):
        one, two = draw(report), draw(report)
        assert one == two and one is not None
        assert "http" not in one and "<date" not in one and "#00000" not in one and "var(--ink" in one


def test_scores_that_a_log_axis_cannot_show_are_drawn_on_its_edge() -> None:
    found = [layer.model_copy(update={"score": 0.0 if i < 3 else layer.score}) for i, layer in enumerate(build().layers)]
    for draw in (prune_plots.ranking, prune_plots.bargains):
        assert "lower edge: 0 or less" in (draw(build(layers=tuple(found))) or "")
        assert "lower edge" not in (draw(build()) or "")


def test_legends_are_no_wider_than_their_plots() -> None:
    """Three columns of long names once pushed the axes into a corner."""
    wide = prune_plots.bargains(build("sdxl"))
    assert wide is not None
    _, _, width, _ = map(float, re.findall(r'viewBox="([^"]+)"', wide)[0].split())
    places = [float(x) for x, _ in re.findall(r'<text[^>]*?\bx="([\d.]+)"[^>]*>([a-z ]+)<', wide)]
    right = max(map(float, re.findall(r"L ([\d.]+) [\d.]+ \"", wide)), default=0.0)
    assert places and max(places) < width * 0.75 and right > width * 0.9
