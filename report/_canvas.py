"""What all plots share: a bare matplotlib figure, colours that the page decides, and the way to a small inline SVG.

Colours are CSS variables of the page (with a fallback), so one picture serves light and dark. Nothing touches global state.
"""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.9  # inches: at 1280 px two plots stand side by side, at 390 px one fills the width and stays legible

# matplotlib wants colours, the page wants variables: each stand-in is replaced in the finished SVG.
INK, MUTED, LINE, SEARCHED, FIXED, DOT, SURFACE = (f"#00000{i}" for i in range(1, 8))
THEME = {
    INK: "var(--ink,#1c2530)",
    MUTED: "var(--muted,#5b6672)",
    LINE: "var(--line,#d6dbe1)",
    SEARCHED: "var(--searched,#c2410c)",
    FIXED: "var(--fixed,#0369a1)",
    DOT: "var(--dot,#8a94a0)",
    SURFACE: "var(--surface,#ffffff)",
}


def new_figure(height: float) -> tuple["Figure", "Axes"]:
    """A figure of WIDTH by `height` inches with one plot in it, transparent, on no global state."""
    figure, (axes,) = new_panels(1, height)
    return figure, axes


def new_panels(count: int, height: float) -> tuple["Figure", list["Axes"]]:
    """Plots below each other, each with its own scale; `height` in inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * count), layout="constrained", facecolor="none")
    panels = [figure.add_subplot(count, 1, place, facecolor="none") for place in range(1, count + 1)]
    for axes in panels:
        _bare(axes)
    return figure, panels


def _bare(axes: "Axes") -> None:
    """Two quiet spines, small ticks, a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(which="both", colors=MUTED, labelsize=10, length=3)
    axes.xaxis.label.set(color=INK, fontsize=10.5)
    axes.yaxis.label.set(color=INK, fontsize=10.5)
    axes.grid(color=LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def new_rows(names: Sequence[str], height: float, mono: bool = False) -> tuple["Figure", "Axes"]:
    """One horizontal line per name, the first on top; `height` in inches a line."""
    figure, axes = new_figure(0.75 + height * len(names))
    axes.set_yticks(
        range(len(names)), names, color=INK, fontfamily="monospace" if mono else "sans-serif", fontsize=8 if mono else 10
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def log_where_wide(axes: "Axes", which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Logarithmic where values span a factor of three and more: early candidates would squeeze the good ones into a line."""
    if not values or min(values) <= 0 or max(values) < 3 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    span = max(values) / min(values)
    subs = (1,) if span > 1000 else (1, 2, 5) if span > 30 else (1, 1.5, 2, 3, 4, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7 if span > 1e5 else None))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: "Axes") -> None:
    """Above the plot, where it hides no data, in as many columns as the longest label leaves room for."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if longest <= 13 else 2 if longest <= 22 else 1, frameon=False, fontsize=9.5, labelcolor=INK,
        handletextpad=0.3, columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def to_svg(figure: "Figure", name: str) -> str:
    """An <svg> element to set into a page: no prolog, no metadata, no ids but those it uses (prefixed with `name`)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    for label in figure.findobj(Text):
        label.set_parse_math(False)  # a $ in a name is a dollar
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "lissom", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = out.getvalue()
    text = drawn[drawn.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|\sxmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|xlink:href=\"#)([\w.-]+)", text))
    text = re.sub(r" id=\"([\w.-]+)\"", lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|xlink:href=\"#)", rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*Mono[^;\"]*", "font-family: ui-monospace, monospace", text)
    text = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    for stand_in, variable in THEME.items():
        text = text.replace(stand_in, variable)
    return text.replace("<svg", f'<svg class="plot" aria-hidden="true" data-plot="{name}"', 1).strip()
