"""What all figures share: looks, panels with their axes, lines with their names, and what they are drawn on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

from moebench.reports.text import label

WIDE, NARROW = 900, 360  # pixels; the page shows one of the two
MARKERS = "osD^vPX*"

Place: TypeAlias = tuple[float, float]  # in points from the lower left corner of a sheet
Align = Literal["left", "center", "right"]
Baseline = Literal["baseline", "center", "top"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where a figure will be seen."""

    width: int
    ink: str
    muted: str
    rule: str
    surface: str
    series: tuple[str, ...]
    heat: tuple[str, ...]  # from little to much
    heat_ink: tuple[str, ...]

    @property
    def wide(self) -> bool:
        return self.width == WIDE

    @property
    def font(self) -> float:
        return 12.5 if self.wide else 10.5

    def colour(self, index: int) -> str:
        return self.series[index % len(self.series)]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that can be drawn in any look."""

    name: str  # of its file, and of its place on the page
    title: str
    finding: str  # what it shows, in words
    height: Callable[[Look], float]
    draw: Callable[[Sheet], None]
    notes: tuple[str, ...] = field(default=())


class Paper(Protocol):
    """What a sheet is drawn on: SVG, or matplotlib's canvas. Areas and strokes lie below lines, and those below texts."""

    def text(
        self, place: Place, text: str, *, colour: str, size: float, align: Align, baseline: Baseline, weight: str, rotation: int
    ) -> None: ...

    def line(
        self, places: Sequence[Place], colour: str, width: float, *, marker: str, size: float, alpha: float, dashes: Sequence[float]
    ) -> None: ...

    def stroke(self, segments: Sequence[tuple[Place, Place]], colour: str, width: float) -> None: ...

    def areas(self, found: Sequence[Sequence[Place]], colour: str, alpha: float, edge: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Where a figure is drawn: in points from the lower left corner."""

    paper: Paper
    look: Look
    width: float
    height: float  # without the title that a picture file has above it


@dataclass(frozen=True, kw_only=True)
class Axis:
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = True

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The area in which data are drawn, in points."""

    sheet: Sheet
    x: Axis
    y: Axis
    left: float
    right: float
    bottom: float
    top: float

    def at(self, x: float, y: float) -> Place:
        return self.left + self.x.share(x) * (self.right - self.left), self.bottom + self.y.share(y) * (self.top - self.bottom)


@dataclass(frozen=True, kw_only=True)
class Value:
    tokens: int
    y: float
    low: float = 0.0
    high: float = 0.0
    x: float = 0.0  # where the axis is not of tokens


@dataclass(frozen=True, kw_only=True)
class End:
    """Where a line ends, and what is written there."""

    text: str
    y: float
    colour: str
    marker: str = ""
    dashed: bool = False


# Contrast with the surface is at least 4.5:1 for text colours and 3:1 for lines; the same values are in reports/page.css.
LIGHT = Look(
    width=WIDE,
    ink="#1b1f24",
    muted="#57606a",
    rule="#d8dee4",
    surface="#ffffff",
    series=("#0b5cad", "#c2410c", "#0f7b4f", "#7c3aed", "#8a6100", "#b8257f", "#0e7490", "#4b5563"),
    heat=("#eef4fb", "#d3e4f6", "#aaccee", "#78ade2", "#2b6cb0", "#1a5596", "#0b3f78"),
    heat_ink=("#1b1f24", "#1b1f24", "#1b1f24", "#1b1f24", "#ffffff", "#ffffff", "#ffffff"),
)
DARK = Look(
    width=WIDE,
    ink="#e6edf3",
    muted="#9da7b3",
    rule="#30363d",
    surface="#0d1117",
    series=("#6cb2ff", "#ff9e64", "#57d39b", "#c4a5ff", "#e3c04f", "#ff8ccf", "#4fd1e0", "#b3bcc6"),
    heat=("#14202e", "#173251", "#1b4674", "#215d9c", "#3575b8", "#74a9e0", "#b4d3f4"),
    heat_ink=("#e6edf3", "#e6edf3", "#e6edf3", "#e6edf3", "#ffffff", "#0d1117", "#0d1117"),
)


def page_look(width: int) -> Look:
    """The colours are variables, which the style sheet of the page fills, light and dark."""
    return Look(
        width=width,
        ink="var(--ink)",
        muted="var(--muted)",
        rule="var(--rule)",
        surface="var(--surface)",
        series=tuple(f"var(--s{i})" for i in range(len(LIGHT.series))),
        heat=tuple(f"var(--h{i})" for i in range(len(LIGHT.heat))),
        heat_ink=tuple(f"var(--i{i})" for i in range(len(LIGHT.heat_ink))),
    )


def palettes() -> str:
    """The style sheet's variables: light, dark where the reader prefers it, and light on paper."""
    light, dark = _variables(LIGHT), _variables(DARK)
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n@media print{{:root{{{light}}}}}\n"


def panel(
    sheet: Sheet,
    x: Axis,
    y: Axis,
    *,
    title: str,
    xlabel: str,
    ends: Sequence[End] = (),
    names_at_ends: bool | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> Panel:
    """Grid, ticks and labels, then the names of the lines: at their ends where there is room beside the plot, else below it.

    The box is left, right, bottom and top of the sheet; ticks whose labels would touch are left out."""
    look = sheet.look
    left, right, bottom, top = box or (0, sheet.width, 0, sheet.height)
    beside = look.wide if names_at_ends is None else names_at_ends
    if ends and not beside:
        bottom = legend(sheet, [(f"{'--' if end.dashed else '-'}{end.marker}", end.colour, end.text) for end in ends], bottom=bottom)
    tick = look.font - 1
    made = Panel(
        sheet=sheet,
        x=x,
        y=y,
        left=left + max((width_of(text, tick) for _, text in y.ticks), default=0) + 12,
        right=right - (max((width_of(end.text, look.font) for end in ends), default=0) + 28 if ends and beside else 12),
        bottom=bottom + tick + 12 + (look.font + 6 if xlabel else 0),
        top=top - (look.font + 14 if title else 8),
    )
    across = _fitting(x, made.right - made.left, lambda text: width_of(text, tick) + 8)
    up = _fitting(y, made.top - made.bottom, lambda _: tick * 1.3)
    grid = [((made.at(value, y.low)[0], made.bottom), (made.at(value, y.low)[0], made.top)) for value, _ in across]
    grid += [((made.left, made.at(x.low, value)[1]), (made.right, made.at(x.low, value)[1])) for value, _ in up]
    stroke(sheet, grid, look.rule, 0.6)
    stroke(sheet, [((made.left, made.top), (made.left, made.bottom)), ((made.left, made.bottom), (made.right, made.bottom))], look.rule, 1)
    for value, text in across:
        write(sheet, (made.at(value, y.low)[0], made.bottom - 6), text, colour=look.muted, size=tick, ha="center", va="top")
    for value, text in up:
        write(sheet, (made.left - 6, made.at(x.low, value)[1]), text, colour=look.muted, size=tick, ha="right", va="center")
    if xlabel:
        write(sheet, ((made.left + made.right) / 2, bottom + 4), xlabel, colour=look.muted, ha="center")
    if title:
        write(sheet, (made.left, top - look.font - 2), title, colour=look.muted)
    if beside:
        _label_ends(made, ends)
    return made


def lines(made: Panel, series: Mapping[str, Sequence[Value]], *, band: bool = True, dashed: bool = False) -> None:
    """A line with markers for each series, its interval as a band."""
    look = made.sheet.look
    for index, values in enumerate(series.values()):
        if not values:
            continue
        places = [made.at(value.x or value.tokens, value.y) for value in values]
        if band:
            above = [made.at(value.x or value.tokens, min(value.high, made.y.high)) for value in values]
            below = [made.at(value.x or value.tokens, max(value.low, made.y.low)) for value in values]
            areas(made.sheet, [[*above, *reversed(below)]], look.colour(index), 0.25)
        if dashed:
            line(made.sheet, places, look.colour(index), 1.1, dashes=(3, 2))
        else:
            line(made.sheet, places, look.colour(index), 1.8, marker=MARKERS[index % len(MARKERS)])


def ends_of(series: Mapping[str, Sequence[Value]], look: Look) -> list[End]:
    """The names of the lines, where each ends."""
    return [
        End(text=label(name), y=values[-1].y, colour=look.colour(index), marker=MARKERS[index % len(MARKERS)])
        for index, (name, values) in enumerate(series.items())
        if values
    ]


def token_axis(tokens: Sequence[int]) -> Axis:
    """Logarithmic, with the measured counts as plain numbers."""
    return Axis(low=tokens[0] / 1.25, high=tokens[-1] * 1.25, ticks=tuple((float(number), str(number)) for number in tokens))


def log_axis(values: Sequence[float], *, spare: float = 1.12) -> Axis:
    """1, 10, 100 where that gives three ticks or more, else 1, 2, 5, 10: plain numbers."""
    low, high = min(values) / spare, max(values) * spare
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [digit * 10.0**power for power in decades for digit in digits if low <= digit * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    texts = [f"{tick:,.0f}".replace(",", "\u2009") if tick >= 1 and tick == int(tick) else f"{tick:.2g}" for tick in ticks]
    return Axis(low=low, high=high, ticks=tuple(zip(ticks, texts, strict=True)))


def ratio_axis(values: Sequence[float]) -> Axis:
    """Plain ratios around 1, as many as can be read."""
    low, high = min([*values, 1.0]) / 1.06, max([*values, 1.0]) * 1.06
    candidates = (
        [0.01, 0.1, 1, 10, 100, 1000],
        [2.0**k for k in range(-10, 14)],
        [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8],
        [k / 10 for k in range(1, 30)],
    )
    ticks: list[float] = []
    for candidate in candidates:
        ticks = [tick for tick in candidate if low <= tick <= high]
        if len(ticks) >= 4:
            break
    while len(ticks) > 9:
        ticks = ticks[::2]
    return Axis(low=low, high=high, ticks=tuple((tick, f"{tick:g}x") for tick in ticks))


def linear_axis(high: float, step: float) -> Axis:
    """From 0."""
    return Axis(low=0, high=high, ticks=tuple((step * k, f"{step * k:g}") for k in range(int(high / step + 1e-9) + 1)), log=False)


def names_axis(names: Sequence[str]) -> Axis:
    """A place a name, the first at the low end."""
    return Axis(low=-0.5, high=len(names) - 0.5, ticks=tuple((float(k), name) for k, name in enumerate(names)), log=False)


def legend(sheet: Sheet, entries: Sequence[tuple[str, str, str]], *, bottom: float = 0) -> float:
    """Below the plot: marker, with - before it on a line, -- on a dashed one, colour, words; wide: side by side. Its height."""
    look, x, row = sheet.look, 10.0, 0
    places = []
    for index, (_, _, words) in enumerate(entries):
        width = 32 + width_of(words, look.font)
        if index and (not look.wide or x + width > sheet.width):
            x, row = 10.0, row + 1
        places.append((x, row))
        x += width
    for (marker, colour, words), (x, at) in zip(entries, places, strict=True):
        y = bottom + 9 + 19 * (row - at)
        if marker.startswith("-"):
            line(sheet, [(x, y), (x + 18, y)], colour, 1.8, dashes=(4, 3) if marker.startswith("--") else ())
        if marker.strip("-"):
            line(sheet, [(x + 9, y)], colour, 0, marker=marker.strip("-"), size=9 if marker == "s" else 6)
        write(sheet, (x + 24, y), words, va="center")
    return bottom + 19 * (row + 1) + 4


def write(
    sheet: Sheet,
    place: Place,
    text: str,
    *,
    colour: str = "",
    size: float = 0,
    ha: Align = "left",
    va: Baseline = "baseline",
    weight: str = "normal",
    rotation: int = 0,
) -> None:
    colour, size = colour or sheet.look.ink, size or sheet.look.font
    sheet.paper.text(place, text, colour=colour, size=size, align=ha, baseline=va, weight=weight, rotation=rotation)


def line(
    sheet: Sheet,
    places: Sequence[Place],
    colour: str,
    width: float,
    *,
    marker: str = "",
    size: float = 5.0,
    alpha: float = 1,
    dashes: Sequence[float] = (),
) -> None:
    """Through the places, with a marker at each; of width 0 the markers alone. Dashes and gaps are in widths of the line."""
    sheet.paper.line(places, colour, width, marker=marker, size=size, alpha=alpha, dashes=dashes)


def stroke(sheet: Sheet, segments: Iterable[tuple[Place, Place]], colour: str, width: float) -> None:
    """Lines of two points each, as one path."""
    if found := list(segments):
        sheet.paper.stroke(found, colour, width)


def areas(sheet: Sheet, found: Sequence[Sequence[Place]], colour: str, alpha: float, edge: str = "") -> None:
    """Areas of one look, each by its corners, as one path."""
    sheet.paper.areas(found, colour, alpha, edge)


def width_of(text: str, size: float) -> float:
    """At most, in the fonts of pages and pictures, which are narrower than this but for a name of capitals only."""
    return size * sum(1.0 if char > "\u2e7f" else 0.64 for char in text)


def _variables(look: Look) -> str:
    named = {"ink": look.ink, "muted": look.muted, "rule": look.rule, "surface": look.surface}
    for letter, colours in (("s", look.series), ("h", look.heat), ("i", look.heat_ink)):
        named |= {f"{letter}{index}": colour for index, colour in enumerate(colours)}
    return ";".join(f"--{name}:{colour}" for name, colour in named.items())


def _fitting(axis: Axis, room: float, size: Callable[[str], float]) -> list[tuple[float, str]]:
    """As many ticks as fit without touching: every one, every second, ..., always with the last."""
    for stride in range(1, len(axis.ticks) + 1):
        shown = list(axis.ticks[-1::-stride][::-1])
        ends = sorted((room * axis.share(value) - size(text) / 2, room * axis.share(value) + size(text) / 2) for value, text in shown)
        if all(before[1] <= after[0] for before, after in pairwise(ends)):
            break
    return shown if axis.ticks else []


def _label_ends(made: Panel, ends: Sequence[End]) -> None:
    """Names right of the plot at the height of their line's end, pushed apart where lines end together, each with its marker."""
    look = made.sheet.look
    ordered = sorted(ends, key=lambda end: end.y)
    wanted = [made.at(made.x.low, end.y)[1] for end in ordered]
    gap = min(look.font * 1.3, (made.top - made.bottom + look.font) / max(len(ends), 1))
    for end, y in zip(ordered, spread(wanted, gap, made.bottom, made.top), strict=True):
        if end.marker:
            line(made.sheet, [(made.right + 11, y)], end.colour, 0, marker=end.marker, size=6)
        write(made.sheet, (made.right + 20, y), end.text, colour=end.colour, va="center")


def spread(wanted: Sequence[float], gap: float, least: float, most: float = math.inf) -> list[float]:
    """Places at least `gap` apart and in the same order, near the wanted ones: clusters are centred on the mean of their wishes."""
    clusters: list[list[float]] = []
    for wish in wanted:
        clusters.append([wish])
        while len(clusters) > 1 and _low(clusters[-1], gap, least) - _high(clusters[-2], gap, least) < gap:
            last = clusters.pop()
            clusters[-1] += last
    placed = [_low(cluster, gap, least) + gap * index for cluster in clusters for index in range(len(cluster))]
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], placed[index + 1] - gap if index + 1 < len(placed) else most)
    return placed


def _low(cluster: Sequence[float], gap: float, least: float) -> float:
    return max(sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2, least)


def _high(cluster: Sequence[float], gap: float, least: float) -> float:
    return _low(cluster, gap, least) + gap * (len(cluster) - 1)
