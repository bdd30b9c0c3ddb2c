"""What only a browser can say of a comparison's page: widths, wrapped texts, dark and light, sorting. Skipped without one."""

from pathlib import Path

import pytest
from lissom.report import compare_html
from lissom.tests.report.browser import BROWSER, look
from lissom.tests.report.compare_reports import EVERY

PROBE = """<script>
const box = element => element.getBoundingClientRect();
const column = i => [...document.querySelectorAll("#measurements tbody tr")].map(row => row.cells[i].dataset.v || row.cells[i].textContent);
const texts = [...document.querySelectorAll("svg.rows text")];
const crossing = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
document.querySelectorAll("#measurements th button")[2].click();
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  page: getComputedStyle(document.body).backgroundColor,
  tone: getComputedStyle(document.querySelector(".banner strong")).color,
  escaping: [...document.querySelectorAll("svg.plot text, h1, p, dd, dt, li, figcaption")].filter(e => box(e).right > innerWidth
    && !e.closest(".box")).map(e => e.textContent),
  outside: texts.filter(e => box(e).right > box(e.closest("svg")).right + 6 || box(e).left < box(e.closest("svg")).left - 6)
    .map(e => e.textContent),
  touching: texts.flatMap((a, i) => texts.slice(i + 1, i + 12).filter(b => a.closest("svg") === b.closest("svg")
    && crossing(box(a), box(b))).map(b => a.textContent + " / " + b.textContent)),
  status: [...document.querySelectorAll("table .state")].every(e => box(e).right <= innerWidth),
  sorted: column(2).map(Number),
};
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize(("name", "width", "dark"), [("regression", 1240, False), ("many", 500, True), ("hostile", 500, False)])
def test_page_in_a_browser(name: str, width: int, dark: bool, tmp_path: Path) -> None:
    found = look(compare_html.render(EVERY[name](), tmp_path), PROBE, tmp_path, width, dark)
    assert found["width"] == width and found["scroll"] <= width  # only tables and code scroll sideways, each in its box
    assert found["escaping"] == [] and found["outside"] == [] and found["touching"] == []
    assert found["page"] == ("rgb(17, 21, 26)" if dark else "rgb(246, 247, 249)")
    assert found["tone"] == ("rgb(248, 113, 113)" if dark else "rgb(185, 28, 28)")
    assert found["status"] or width < 1000  # the verdicts of the table are seen without scrolling
    assert found["sorted"] == sorted(found["sorted"])
