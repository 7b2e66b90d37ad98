"""A figure as PNG files, and as SVG that takes its colours from the page it is in."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from xml.etree import ElementTree

from moebench.reports.drawing import DARK, LIGHT, NARROW, SLOTS, WIDE, Figure, drawn_on_canvas, page_look, palettes
from moebench.reports.markup import Html, join, tag
from moebench.reports.text import clean

PNG_SCALE = 2


def inline(figure: Figure) -> Html:
    """Both widths; the style sheet shows one of them."""
    return Html(svg(figure, WIDE).markup + svg(figure, NARROW).markup)


def png(figure: Figure, directory: Path) -> list[Path]:
    """NAME.png for light pages and NAME-dark.png for dark ones."""
    paths = []
    for look, ending in ((LIGHT, ""), (DARK, "-dark")):
        path = directory / f"{figure.name}{ending}.png"
        with drawn_on_canvas(figure, look, textwrap.wrap(clean(figure.title), 90)) as canvas:
            canvas.savefig(path, dpi=72 * PNG_SCALE, facecolor=look.surface, metadata={"Software": None, "Title": clean(figure.title)})
        paths.append(path)
    return paths


def svg(figure: Figure, width: int) -> Html:
    """For the page: without styles of its own, its ids unlike those of other figures, and with a title and a description."""
    text = io.StringIO()
    with drawn_on_canvas(figure, page_look(width), measured=False) as canvas:
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    prefix = f"{figure.name}-{width}"
    root = ElementTree.fromstring(text.getvalue())
    inner = "".join(_element(child, prefix) for child in root)
    box = root.get("viewBox", "")
    told = tag("title", clean(figure.title), id=f"{prefix}-title").markup + tag("desc", clean(figure.finding), id=f"{prefix}-desc").markup
    opened = f'<svg viewBox="{box}" role="img" aria-labelledby="{prefix}-title" aria-describedby="{prefix}-desc"'
    return Html(f'{opened} class="{"wide" if width == WIDE else "narrow"}">{told}{inner}</svg>')


def picture(figure: Figure) -> str:
    """An SVG file by itself: its title above it, light, or dark where the reader prefers that."""
    inner = svg(figure, WIDE).markup
    width, height = inner.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    lines = textwrap.wrap(clean(figure.title), 90)
    above = 20 * len(lines) + 14
    title = [
        tag("text", line, x=10, y=20 * (row + 1), font_size=14, font_weight="bold", fill="var(--ink)") for row, line in enumerate(lines)
    ]
    plot = inner.replace("<svg ", f'<svg y="{above}" width="{width}" height="{height}" ', 1)
    box = f"0 0 {width} {float(height) + above:g}"
    style = f"<style>{palettes()}text{{font-family:Helvetica,Arial,sans-serif}}</style>"
    paper = tag("rect", width="100%", height="100%", fill="var(--surface)")
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{box}">{style}{join(paper, title).markup}{plot}</svg>\n'


_DROPPED = {"metadata", "style"}
_KEPT_STYLES = (
    "fill",
    "fill-opacity",
    "stroke",
    "stroke-width",
    "stroke-opacity",
    "stroke-dasharray",
    "stroke-dashoffset",
    "stroke-linecap",
    "opacity",
    "text-anchor",
    "font-size",
)
_SLOT_NAMES = {value: name for name, value in SLOTS.items()}


def _element(node: ElementTree.Element, prefix: str) -> str:
    """As markup without namespaces: styles become attributes, which the page's policy allows, and colours the page's own."""
    name = node.tag.rpartition("}")[2]
    if name in _DROPPED:
        return ""
    if name == "defs" and not any(child.tag.rpartition("}")[2] not in _DROPPED for child in node):
        return ""
    attributes = []
    for key, value in _attributes(node, prefix).items():
        attributes.append(f' {key}="{tag("x", value).markup[3:-4]}"')
    inner = tag("x", node.text.strip()).markup[3:-4] if node.text and node.text.strip() else ""
    inner += "".join(_element(child, prefix) for child in node)
    if name == "g" and not inner:
        return ""
    return f"<{name}{''.join(attributes)}>{inner}</{name}>"


def _attributes(node: ElementTree.Element, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.attrib.items():
        key = key.rpartition("}")[2]
        if key == "style":
            found |= _styles(value)
        elif key == "id":
            if node.tag.endswith(("clipPath", "path")) or re.fullmatch(r"[A-Za-z][0-9a-f]{8,}", value):
                found["id"] = f"{prefix}-{value}"
        elif key == "href":
            found["href"] = f"#{prefix}-{value[1:]}"
        elif key == "d":
            found["d"] = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", " ".join(value.split()))
        elif key in ("x", "y", "width", "height"):
            found[key] = f"{float(value):.1f}"
        else:
            found[key] = value.replace("url(#", f"url(#{prefix}-")
    return found


def _styles(style: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in style.split(";"):
        key, _, value = (text.strip() for text in part.partition(":"))
        if key == "font":  # "12px 'DejaVu Sans', ..."; the page has a font of its own
            found["font-size"] = next(word for word in value.split() if word.endswith("px"))
        elif key in _KEPT_STYLES:
            slot = _SLOT_NAMES.get(value)
            found[key] = f"var(--{slot})" if slot else value
    return found
