"""A figure's lines, areas and texts as SVG, which a browser lays out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebench.reports.drawing import Align, Baseline, Place
from moebench.reports.markup import Html, join, tag

BELOW: dict[Baseline, float] = {"baseline": 0.0, "center": 0.36, "top": 0.9}  # of the size: from the place down to the line it stands on
ANCHOR: dict[Align, str] = {"left": "start", "center": "middle", "right": "end"}

_PLUS = ((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1))
_CROSS = ((-1, -2), (0, -1), (1, -2), (2, -1), (1, 0), (2, 1), (1, 2), (0, 1), (-1, 2), (-2, 1), (-1, 0), (-2, -1))
_STAR_NOTCH = (3 - math.sqrt(5)) / 2  # radius of a pentagram's inner corners over that of its points
# Corners of matplotlib's markers of size 1, whose figures are the picture files; y goes down. "o" is a circle.
CORNERS: dict[str, tuple[Place, ...]] = {
    "s": ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)),
    "D": ((0.0, -math.sqrt(0.5)), (math.sqrt(0.5), 0.0), (0.0, math.sqrt(0.5)), (-math.sqrt(0.5), 0.0)),
    "^": ((0.0, -0.5), (-0.5, 0.5), (0.5, 0.5)),
    "v": ((0.0, 0.5), (-0.5, -0.5), (0.5, -0.5)),
    "P": tuple((x / 6, y / 6) for x, y in _PLUS),
    "X": tuple((x / 4, y / 4) for x, y in _CROSS),
    "*": tuple(
        (-radius * math.sin(math.pi * turn / 5), -radius * math.cos(math.pi * turn / 5))
        for turn, radius in enumerate([0.5, 0.5 * _STAR_NOTCH] * 5)
    ),
}


@dataclass(frozen=True, kw_only=True)
class SvgPaper:
    """Importing matplotlib takes longer than all else that a page of 1,000 rows needs, and its SVG has to be rewritten for the page.

    As on its canvas, areas lie below lines, and lines below texts."""

    prefix: str  # of the ids, unlike those of the page's other figures
    height: float
    _areas: list[Html] = field(default_factory=list)
    _lines: list[Html] = field(default_factory=list)
    _texts: list[Html] = field(default_factory=list)
    _markers: dict[tuple[str, float], Html] = field(default_factory=dict)

    @property
    def inner(self) -> Html:
        """What is to stand in an svg element whose viewBox is the sheet."""
        defs = tag("defs", self._markers.values()) if self._markers else None
        return join(defs, self._areas, self._lines, self._texts)

    def text(
        self, place: Place, text: str, *, colour: str, size: float, align: Align, baseline: Baseline, weight: str, rotation: int
    ) -> None:
        x, y = place[0], self.height - place[1]
        turn = None
        if rotation:  # upwards, ending at the place: what is above and beside of level text changes places
            assert (rotation, align, baseline) == (90, "center", "top")
            x, y = x + BELOW[baseline] * size, y
            align, turn = "right", f"rotate(-90 {_number(x)} {_number(y)})"
        else:
            y += BELOW[baseline] * size
        anchor = None if align == "left" else ANCHOR[align]
        bold = None if weight == "normal" else weight
        where = {"x": _number(x), "y": _number(y), "transform": turn}
        self._texts.append(tag("text", text, **where, font_size=f"{size:g}px", font_weight=bold, text_anchor=anchor, fill=colour))

    def line(
        self, places: Sequence[Place], colour: str, width: float, *, marker: str, size: float, alpha: float, dashes: Sequence[float]
    ) -> None:
        if width:
            shown = " ".join(_number(dash * width) for dash in dashes) or None
            cap = None if dashes else "square"
            look = {"fill": "none", "stroke": colour, "stroke_width": f"{width:g}", "stroke_dasharray": shown, "stroke_linecap": cap}
            self._lines.append(tag("path", d=self._path(places), **look, stroke_opacity=_opacity(alpha)))
        if marker:
            name = self._marker(marker, size)
            uses = [tag("use", href=f"#{name}", x=_number(x), y=_number(self.height - y)) for x, y in places]
            self._lines.append(tag("g", uses, fill=colour, fill_opacity=_opacity(alpha)))

    def stroke(self, segments: Sequence[tuple[Place, Place]], colour: str, width: float) -> None:
        drawn = "".join(map(self._path, segments))
        self._areas.append(tag("path", d=drawn, fill="none", stroke=colour, stroke_width=f"{width:g}"))

    def areas(self, found: Sequence[Sequence[Place]], colour: str, alpha: float, edge: str) -> None:
        drawn = "".join(f"{self._path(corners)}z" for corners in found)
        self._areas.append(tag("path", d=drawn, fill=colour, stroke=edge or None, opacity=_opacity(alpha)))

    def _path(self, places: Sequence[Place]) -> str:
        return _path([(x, self.height - y) for x, y in places])

    def _marker(self, marker: str, size: float) -> str:
        """The id of its shape around 0, 0."""
        known = list(self._markers)
        if (marker, size) in known:
            return f"{self.prefix}-m{known.index((marker, size))}"
        name = f"{self.prefix}-m{len(known)}"
        if marker == "o":
            self._markers[marker, size] = tag("circle", r=f"{size / 2:g}", id=name)
        else:
            corners = [(x * size, y * size) for x, y in CORNERS[marker]]
            self._markers[marker, size] = tag("path", d=f"{_path(corners)}z", id=name)
        return name


def _path(places: Sequence[Place]) -> str:
    return f"M{'L'.join(f'{_number(x)} {_number(y)}' for x, y in places)}"


def _number(value: float) -> str:
    """To a tenth of a pixel."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def _opacity(alpha: float) -> str | None:
    return None if alpha == 1 else f"{alpha:g}"
