"""HTML elements whose text is always escaped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeAlias
from unicodedata import category

ESCAPED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})
SPECIAL = frozenset("&<>\"'")
VOID = frozenset(("br", "input", "link", "meta", "wbr"))


@dataclass(frozen=True, slots=True)
class Html:
    """Markup. Only this module and what draws figures make it; every other text is escaped on its way in."""

    markup: str


Child: TypeAlias = "Html | str | int | Iterable[Child] | None"


@lru_cache(maxsize=1 << 14)  # a page of 3000 rows escapes 80 000 texts, of which 8000 differ
def escape(text: str) -> str:
    """Foreign text as text, in an element or a quoted attribute: on one line, without control, bidi or unpaired surrogate characters."""
    if not text.isprintable():
        text = " ".join("".join(char for char in text if char.isspace() or not category(char).startswith("C")).split())
    return text if SPECIAL.isdisjoint(text) else text.translate(ESCAPED)


def tag(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Html:
    """An element. `class_` is the attribute class, `aria_label` is aria-label; True is an attribute without a value, None or False none."""
    opened = [name]
    for key, value in attributes.items():
        if value is True:
            opened.append(_name(key))
        elif value is not None and value is not False:
            opened.append(f'{_name(key)}="{escape(str(value))}"')
    start = " ".join(opened)
    return Html(f"<{start}>") if name in VOID else Html(f"<{start}>{''.join(map(_markup, children))}</{name}>")


def join(*children: Child) -> Html:
    """One after the other, nothing between them."""
    return Html("".join(map(_markup, children)))


def breakable(name: str) -> Html:
    """A backend's name, which a narrow column may break after an underscore."""
    parts = name.replace("_", "_\n").split("\n")
    return join(*(join(tag("wbr") if index else None, part) for index, part in enumerate(parts)))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], *, caption: str, left: Iterable[int] = (), class_: str = "") -> Html:
    """A table in a box that scrolls where it is too wide. The first cell of a row is its header; columns in `left` are words, the others
    numbers, which stand right."""
    words = frozenset(left)

    def align(column: int) -> str | None:
        return "w" if column in words else None

    titles = [tag("th", cell, scope="col", class_=align(column)) for column, cell in enumerate(head)]
    body = [
        tag(
            "tr",
            [tag("td" if column else "th", cell, scope=None if column else "row", class_=align(column)) for column, cell in enumerate(row)],
        )
        for row in rows
    ]
    inner = tag("table", tag("caption", caption), tag("thead", tag("tr", titles)), tag("tbody", body), class_=class_ or None)
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _markup(child: Child) -> str:
    if isinstance(child, Html):
        return child.markup
    if isinstance(child, str):
        return escape(child)
    if child is None:
        return ""
    if isinstance(child, int):
        return str(child)
    return "".join(map(_markup, child))


@cache
def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
