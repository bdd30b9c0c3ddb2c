"""What only a browser can say of the page: real widths of letters, the sorting script, dark and light. Skipped without one."""

from pathlib import Path

import pytest
from lissom.report import prune_html
from lissom.tests.report.browser import BROWSER, look
from lissom.tests.report.prune_reports import SLOW, build

PROBE = """<script>
const column = i => [...document.querySelectorAll("#layers tbody tr")].map(row => row.cells[i].textContent);
const sorted = i => { document.querySelectorAll("#layers th button")[i].click(); return column(i); };
const outside = (a, b) => a.left < b.left - 0.5 || a.right > b.right + 0.5 || a.top < b.top - 0.5 || a.bottom > b.bottom + 0.5;
const box = element => element.getBoundingClientRect();
const cells = [...document.querySelectorAll("svg.network g")];
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  page: getComputedStyle(document.body).backgroundColor,
  cell: getComputedStyle(cells[0].querySelector("rect")).fill,
  spilling: cells.filter(g => g.querySelector("text") && outside(box(g.querySelector("text")), box(g.querySelector("rect"))))
    .map(g => g.textContent),
  cramped: cells.filter(g => g.querySelector("path") && g.querySelector("text") &&
    box(g.querySelector("text")).right > box(g.querySelector("path")).left + 0.5).map(g => g.textContent),
  escaping: [...document.querySelectorAll("svg.plot text, h1, p, dd, figcaption")].filter(e => box(e).right > innerWidth
    && !e.closest(".box")).map(e => e.textContent),
  before: column(0), rising: sorted(2), falling: sorted(2), names: sorted(1), restored: sorted(0),
  marked: document.querySelectorAll("#layers th[aria-sort]").length,
};
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize(("network", "width", "dark"), [("sd15", 1200, False), ("sdxl", 500, True), ("flux", 500, False)])
def test_page_in_a_browser(network: str, width: int, dark: bool, tmp_path: Path) -> None:
    layers = list(build(network).layers)
    layers[3] = layers[3].model_copy(update={"score": None})
    report = build(network, layers=tuple(layers), latency=SLOW, opens_plain=False)
    found = look(prune_html.render(report, tmp_path), PROBE, tmp_path, width, dark)
    assert found["width"] == width and found["scroll"] <= width  # only tables and code scroll sideways, each in its box
    assert found["spilling"] == [] and found["cramped"] == [] and found["escaping"] == []
    assert (found["page"], found["cell"] != "none") == ("rgb(17, 21, 26)" if dark else "rgb(246, 247, 249)", True)

    names = [layer.address for layer in layers]
    assert found["before"] == found["restored"] == names
    for order, sign in ((found["rising"], 1), (found["falling"], -1)):
        assert order[-1] == "–"  # what is not known stays at the end, whichever way
        values = [sign * float(text) for text in order[:-1]]
        assert len(order) == len(layers) and values == sorted(values)
    assert found["names"] == sorted(found["names"]) and found["marked"] == 1
