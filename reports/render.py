"""A figure as PNG files, and as SVG that takes its colours from the page it is in."""

from __future__ import annotations

import textwrap
from pathlib import Path

from moebench.reports.drawing import DARK, LIGHT, NARROW, WIDE, Figure, Sheet, page_look, palettes
from moebench.reports.markup import Html, join, tag
from moebench.reports.svg import SvgPaper
from moebench.reports.text import clean

PNG_SCALE = 2


def inline(figure: Figure) -> Html:
    """Both widths; the style sheet shows one of them."""
    return Html(svg(figure, WIDE).markup + svg(figure, NARROW).markup)


def png(figure: Figure, directory: Path) -> list[Path]:
    """NAME.png for light pages and NAME-dark.png for dark ones."""
    from moebench.reports.canvas import drawn_on_canvas

    paths = []
    for look, ending in ((LIGHT, ""), (DARK, "-dark")):
        path = directory / f"{figure.name}{ending}.png"
        with drawn_on_canvas(figure, look, textwrap.wrap(clean(figure.title), 90)) as canvas:
            canvas.savefig(path, dpi=72 * PNG_SCALE, facecolor=look.surface, metadata={"Software": None, "Title": clean(figure.title)})
        paths.append(path)
    return paths


def svg(figure: Figure, width: int) -> Html:
    """For the page: without styles of its own, its ids unlike those of other figures, and with a title and a description."""
    prefix, look = f"{figure.name}-{width}", page_look(width)
    paper = SvgPaper(prefix=prefix, height=figure.height(look))
    figure.draw(Sheet(paper=paper, look=look, width=width, height=paper.height))
    return tag(
        "svg",
        tag("title", clean(figure.title), id=f"{prefix}-title"),
        tag("desc", clean(figure.finding), id=f"{prefix}-desc"),
        paper.inner,
        viewBox=f"0 0 {width} {paper.height:g}",
        role="img",
        aria_labelledby=f"{prefix}-title",
        aria_describedby=f"{prefix}-desc",
        class_="wide" if width == WIDE else "narrow",
    )


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
