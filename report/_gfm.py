"""Pieces of GitHub-flavoured Markdown that both reports are made of. Texts from elsewhere can neither break nor script them."""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

OPENING = re.compile(
    r"^(?:[#>=~`*+\[|_-]|\d{1,9}(?=[.)]\s))+"
)  # makes a heading, a list, a fence, a link's definition, … of a text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every text goes through `cell`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def facts(title: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A section that is a table of names and what they are."""
    return [f"## {title}", table(["", ""], pairs)]


def bullets(title: str, texts: Sequence[str]) -> list[str]:
    """A section that is a list; no section without an entry."""
    return [f"## {title}", listing(texts)] if texts else []


def listing(texts: Iterable[str]) -> str:
    """A list; every text goes through `cell`."""
    return "\n".join(f"- {block(cell(text))}" for text in texts)


def pictures(named: Sequence[tuple[str, str | None]]) -> str:
    """Images side by side, each under its name; one that was never written is said to be missing."""
    head = " | ".join(cell(name) for name, _ in named)
    images = " | ".join(picture(f"samples of {name}", path) if path else "no sheet was written" for name, path in named)
    return f"| {head} |\n|{'---|' * len(named)}\n| {images} |"


def picture(name: str, path: str) -> str:
    """An image beside the text. An address elsewhere becomes the name of a file that is not there."""
    return f"![{cell(name)}]({quote(path.lstrip('/'))})"


def cell(text: str) -> str:
    """A pipe would end the cell, a newline the row, and < would start HTML."""
    return line(text).replace("\\", "\\\\").replace("|", "\\|")


def line(text: str) -> str:
    """Running text: one line, no HTML, no link or picture, and nobody is called by @name."""
    plain = re.sub(
        r"(?<!\w)([@#])(?=\w)", "\\1\u2060", " ".join(text.split())
    )  # an invisible joiner: no mention, no link to issue 12
    return plain.replace("<", "&lt;").replace("](", "]&#40;")


def block(text: str) -> str:
    """Text that begins a block: it stays running text whatever it starts with."""
    return OPENING.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), text)


def fence(language: str, code: str) -> str:
    """A block of code, fenced by more backticks than the code has in a row."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}{language}\n{code.rstrip()}\n{mark}"
