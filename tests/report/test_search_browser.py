"""What only a browser can say of a search's page: widths, texts that touch, dark and light, sorting, lists that open. Skipped without one."""

from pathlib import Path

import pytest
from lissom.report import html
from lissom.tests.report import search_reports
from lissom.tests.report.browser import BROWSER, look

PROBE = """<script>
const box = element => element.getBoundingClientRect();
const rows = () => [...document.querySelectorAll("#candidates tbody tr")];
const texts = [...document.querySelectorAll("svg.plot text")];
const crossing = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
document.querySelectorAll("#candidates th button")[2].click();
const lists = [...document.querySelectorAll("td details")];
const shut = lists.filter(list => list.querySelector("ul").checkVisibility()).length;
lists.slice(0, 3).forEach(list => list.querySelector("summary").click());
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  page: getComputedStyle(document.body).backgroundColor,
  escaping: [...document.querySelectorAll("svg.plot text, h1, h2, p, dd, dt, li, figcaption, summary")]
    .filter(e => box(e).right > innerWidth && !e.closest(".box")).map(e => e.textContent),
  outside: texts.filter(e => box(e).right > box(e.closest("svg")).right + 6 || box(e).left < box(e.closest("svg")).left - 6)
    .map(e => e.textContent),
  touching: texts.flatMap((a, i) => texts.slice(i + 1).filter(b => a.closest("svg") === b.closest("svg")
    && crossing(box(a), box(b))).map(b => a.textContent + " / " + b.textContent)),
  sorted: rows().map(row => [row.className, row.cells[2].dataset.v]),
  shut: shut, opened: lists.slice(0, 3).filter(list => list.querySelector("ul").checkVisibility()).length,
  focusable: lists.every(list => list.querySelector("summary").tabIndex >= 0),
};
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("one_objective", 1280, False), ("two_objectives", 500, True), ("two_metrics", 500, False), ("hostile", 1280, True)],
)
def test_page_in_a_browser(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    report = getattr(search_reports, name)()
    found = look(html.render(report, tmp_path), PROBE, tmp_path, width, dark)
    assert found["width"] == width and found["scroll"] <= width  # only tables and code scroll sideways, each in its box
    assert found["escaping"] == [] and found["outside"] == [] and found["touching"] == []
    assert found["page"] == ("rgb(17, 21, 26)" if dark else "rgb(246, 247, 249)")
    values = [float(value) for _, value in found["sorted"] if value]
    assert values == sorted(values) and len(found["sorted"]) == len(report.candidates)
    behind = found["sorted"][len(values) :]
    assert all(value == "" for _, value in behind) and all(kind != "early" for kind, value in found["sorted"] if value)
    assert (found["shut"], found["opened"], found["focusable"]) == (0, 3, True)
