"""Filling a page: templates on a common base, our own SVG let through, images set into the page itself."""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ._words import NOT_MEASURED

PIXELATED_BELOW = 128  # pixels a tile: smaller images are enlarged without smoothing, as they are


class Sheet(NamedTuple):
    name: str
    uri: str = ""
    pixelated: bool = False
    missing: str = ""  # why there is no picture


class Key(NamedTuple):
    """A box on top of the page: one figure, and what stands beside it in small print."""

    kind: str  # its CSS class
    title: str
    figure: str
    beside: str = ""


def fill(template: str, **values: Any) -> str:
    """A template of this folder, filled. Every value is escaped but those that went through `trusted`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": _prose, "dotted": _dotted}
    return environment.get_template(template).render(**values)


def trusted(drawn: Mapping[str, str | None]) -> dict[str, Any]:
    """The plots that were drawn, as markup: they are our own SVG, and their texts are escaped in it already."""
    from markupsafe import Markup

    return {name: Markup(svg) for name, svg in drawn.items() if svg}


def sheet(name: str, file: str | None, folder: Path) -> Sheet:
    """A contact sheet of eight images a row."""
    if file is None:
        return Sheet(name, missing="No sheet of samples was written.")
    return picture(name, file, folder, "sheet", across=8)


def picture(name: str, file: str, folder: Path, what: str = "image", across: int = 1) -> Sheet:
    """An image file of the folder as a data URI, so that the page stays one file. `across`: images that it holds in a row."""
    from PIL import Image, UnidentifiedImageError

    try:
        path = (folder / file).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise OSError("outside the folder")
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small, kind = image.width < across * PIXELATED_BELOW, Image.MIME[image.format or "PNG"]
    except (OSError, ValueError, UnidentifiedImageError):  # ValueError: a NUL in the name
        return Sheet(name, missing=f"The {what} that report.json names is missing from the folder or cannot be read.")
    return Sheet(name, f"data:{kind};base64,{base64.b64encode(data).decode()}", small)


def key(kind: str, title: str, quoted: str, note: str = "") -> Key:
    """The box of a value as `_words.quoted` gives it: its interval goes beside it, before the note."""
    figure, _, interval = (quoted, "", "") if quoted == NOT_MEASURED else quoted.partition(" ")
    return Key(kind, title, figure, (interval + note).lstrip(", "))


def _prose(text: str) -> Any:
    """Running text in which browsers do not break 3.1e-07 after the minus."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"[\d.]+e-\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _dotted(text: str) -> Any:
    """An address that may go on in the next line before a name, so that numbers stay with what they number."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\.(?=[A-Za-z_])", ".<wbr>", str(escape(text))))
