"""What only a browser can say of the page of a distilled model: widths, contrast, lists that open. Skipped without one."""

from pathlib import Path

import pytest
from lissom.report import distill_html
from lissom.tests.report import distill_reports
from lissom.tests.report.browser import BROWSER, look

PROBE = """<script>
const box = element => element.getBoundingClientRect();
const all = selector => [...document.querySelectorAll(selector)];
const texts = all("svg.plot text");
const crossing = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
const rgb = color => color.match(/[\\d.]+/g).map(Number);
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = color => rgb(color).slice(0, 3).map(v => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => { const color = getComputedStyle(element).backgroundColor;
  return color.startsWith("rgb(") ? color : behind(element.parentElement); };
const contrast = element => { const style = getComputedStyle(element);
  const pair = [light(element.closest("svg") ? style.fill : style.color), light(behind(element))].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05); };
const lists = all("details");
const shut = lists.filter(list => list.querySelector("ul").checkVisibility()).length;
lists.forEach(list => list.querySelector("summary").click());
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  page: getComputedStyle(document.body).backgroundColor,
  escaping: all("svg.plot text, h1, h2, h3, p, dd, dt, li, figcaption, summary, img")
    .filter(e => box(e).right > innerWidth && !e.closest(".box")).map(e => e.textContent),
  outside: texts.filter(e => box(e).right > box(e.closest("svg")).right + 6 || box(e).left < box(e.closest("svg")).left - 6)
    .map(e => e.textContent),
  touching: texts.flatMap((a, i) => texts.slice(i + 1).filter(b => a.closest("svg") === b.closest("svg")
    && crossing(box(a), box(b))).map(b => a.textContent + " / " + b.textContent)),
  faint: all(".verdict, dt, dd, dd small, td, figcaption, .muted, svg.plot text")
    .filter(e => contrast(e) < 4.5).map(e => e.textContent),
  lists: lists.length, shut: shut, opened: lists.filter(list => list.querySelector("ul").checkVisibility()).length,
};
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("better", 1280, True), ("worse", 500, False), ("many_sites", 500, True), ("hostile", 500, False), ("empty", 500, True)],
)
def test_page_in_a_browser(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    report = getattr(distill_reports, name)()
    if name != "hostile":  # its sheets have names that no folder should hold
        distill_reports.paint(report, tmp_path)
    found = look(distill_html.render(report, tmp_path), PROBE, tmp_path, width, dark)
    assert found["width"] == width and found["scroll"] <= width  # only tables and code scroll sideways, each in its box
    assert found["escaping"] == [] and found["outside"] == [] and found["touching"] == []
    assert found["page"] == ("rgb(17, 21, 26)" if dark else "rgb(246, 247, 249)")
    assert found["faint"] == []
    assert (found["shut"], found["opened"], found["lists"]) == (0, len(report.sites), len(report.sites))
