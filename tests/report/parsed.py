"""A page as the tests look at it."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags balanced; what is loaded, links, ids and references to them collected."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.links: list[dict[str, str | None]] = []  # attributes of the <a>
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [dict(attrs)] if tag == "a" else []
        self.ids += [value or "" for key, value in attrs if key == "id"]
        for key, value in attrs:
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            self.references |= {(value or "")[1:]} if key in ("href", "xlink:href") and (value or "").startswith("#") else set()
        self.loaded += [value or "" for key, value in attrs if key in ("src", "srcset", "data", "poster", "background")]
        self.loaded += [v or "" for k, v in attrs if k in ("href", "xlink:href") and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as rows of cells; the line of dashes is checked and left out."""
    found = []
    for text in re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
        assert len({len(row) for row in rows}) == 1, text
        assert all(re.fullmatch(r":?-{3,}:?", cell) for cell in rows[1]), text
        found.append([rows[0], *rows[2:]])
    return found
