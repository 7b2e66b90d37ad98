"""What all figures share: looks, axes, and names at the ends of lines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moebench.reports.text import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text
    from matplotlib.typing import RcKeyType

WIDE, NARROW = 900, 360  # pixels; the page shows one of the two
MARKERS = "osD^vPX*"


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
    draw: Callable[[Canvas, Look], None]
    notes: tuple[str, ...] = field(default=())


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
    x: float | None = None  # of a line that ends before the axis does
    marker: str = ""


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

# The page's own names for colours, as values that no figure uses otherwise; reports/page.css says what they are, light and dark.
SLOT_ORDER = ("ink", "muted", "rule", "surface", *(f"s{i}" for i in range(8)), *(f"h{i}" for i in range(7)), *(f"i{i}" for i in range(7)))
SLOTS = {name: f"#0{index:02x}e{index:02x}" for index, name in enumerate(SLOT_ORDER, 1)}


def page_look(width: int) -> Look:
    """The colours are slots, which the style sheet of the page fills."""
    return Look(
        width=width,
        ink=SLOTS["ink"],
        muted=SLOTS["muted"],
        rule=SLOTS["rule"],
        surface=SLOTS["surface"],
        series=tuple(SLOTS[f"s{i}"] for i in range(8)),
        heat=tuple(SLOTS[f"h{i}"] for i in range(7)),
        heat_ink=tuple(SLOTS[f"i{i}"] for i in range(7)),
    )


def palettes() -> str:
    """The style sheet's variables: light, dark where the reader prefers it, and light on paper."""
    light, dark = _variables(LIGHT), _variables(DARK)
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n@media print{{:root{{{light}}}}}\n"


@contextmanager
def drawn_on_canvas(figure: Figure, look: Look) -> Iterator[Canvas]:
    """On a canvas of its own: no state of pyplot, no display. Text is never parsed as mathematics: `$` in a name is a `$`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    settings: dict[RcKeyType, object] = {
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,
        "axes.grid": True,
        "grid.color": look.rule,
        "grid.linewidth": 0.6,
        "axes.facecolor": "none",
        "text.color": look.ink,
        "axes.edgecolor": look.rule,
        "font.size": look.font,
        "figure.constrained_layout.h_pad": 0.06,
        "figure.constrained_layout.w_pad": 0.06,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that DejaVu lacks: the browser has a font for it
        canvas = Canvas(figsize=(look.width / 72, figure.height(look) / 72), dpi=72, layout="constrained")
        figure.draw(canvas, look)
        yield canvas


def lines(axes: Axes, series: Mapping[str, Sequence[Value]], look: Look, *, band: bool = True, dashed: bool = False) -> list[End]:
    """A line with markers for each series, its interval as a band; where each ends."""
    ends = []
    last = max((value.x or value.tokens for values in series.values() for value in values), default=0)
    for index, (name, values) in enumerate(series.items()):
        if not values:
            continue
        colour = look.colour(index)
        xs, ys = [value.x or value.tokens for value in values], [value.y for value in values]
        if band:
            axes.fill_between(xs, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.25, linewidth=0)
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle=(0, (3, 2)) if dashed else "solid",
            linewidth=1.1 if dashed else 1.8,
            marker="" if dashed else MARKERS[index % len(MARKERS)],
            markersize=4.5,
            markeredgewidth=0,
        )
        early = xs[-1] if xs[-1] < last else None
        ends.append(End(text=label(name), y=ys[-1], colour=colour, x=early, marker=MARKERS[index % len(MARKERS)]))
    return ends


def token_axis(axes: Axes, tokens: Sequence[int], look: Look, columns: int = 1) -> None:
    """Logarithmic, with the measured counts as plain numbers: as many as fit without touching."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    room = (look.width - (250 if look.wide else 80)) / columns
    span = math.log(tokens[-1] / tokens[0] * 1.5625)
    shown: list[int] = []
    right_edge = -math.inf
    strides = [tokens[-1::-stride][::-1] for stride in range(1, len(tokens) + 1)]
    for candidate in strides:
        right_edge, shown = -math.inf, []
        for number in candidate:
            center, half = room * math.log(number / tokens[0] * 1.25) / span, 0.32 * (look.font - 1) * len(str(number)) + 3
            if center - half < right_edge:
                break
            right_edge = center + half
            shown.append(number)
        if len(shown) == len(candidate):
            break
    axes.xaxis.set_major_locator(FixedLocator([float(number) for number in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(number) for number in shown])
    axes.set_xlabel("tokens")


def log_ticks(axes: Axes, look: Look, which: str = "y") -> None:
    """1, 10, 100 where that gives three ticks or more, else 1, 2, 5, 10: plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [digit * 10.0**power for power in decades for digit in digits if low <= digit * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([f"{tick:,.0f}".replace(",", "\u2009") if tick >= 1 and tick == int(tick) else f"{tick:.2g}" for tick in ticks])


def ratio_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Plain ratios around 1, as many as can be read."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min([*values, 1.0]) / 1.06, max([*values, 1.0]) * 1.06
    axes.set_ylim(low, high)
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
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([f"{tick:g}x" for tick in ticks])


def finish(canvas: Canvas, axes: Axes, ends: Sequence[End], look: Look, *, ylabel: str, xlabel: str = "", end_labels: bool = False) -> None:
    """Labels, colours of the look, and names of the lines: at their ends where there is room beside the plot, else below it."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(look.rule)
    axes.tick_params(colors=look.muted, labelsize=look.font - 1, width=0.8)
    axes.tick_params(axis="both", color=look.rule)
    axes.xaxis.label.set(color=look.muted, fontsize=look.font)
    axes.set_axisbelow(True)
    if xlabel:
        axes.set_xlabel(xlabel, color=look.muted, fontsize=look.font)
    axes.set_title(ylabel, loc="left", color=look.muted, fontsize=look.font, pad=10)
    if look.wide or end_labels:
        _label_ends(canvas, axes, ends, look)
    elif ends:
        legend(canvas, [(f"-{end.marker}", end.colour, end.text) for end in ends], look)


def legend(canvas: Canvas, entries: Sequence[tuple[str, str, str]], look: Look) -> None:
    """Below the plot: marker, with - before it on a line, colour, words."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle="solid" if marker[0] == "-" else "none", marker=marker.removeprefix("-"), markeredgewidth=0)
        for marker, colour, _ in entries
    ]
    canvas.legend(
        handles,
        [words for _, _, words in entries],
        loc="outside lower left",
        ncols=max(1, min(len(entries), 3)) if look.wide else 1,
        frameon=False,
        fontsize=look.font,
        labelcolor=look.ink,
        handlelength=1.2,
        borderpad=0.2,
    )


def _variables(look: Look) -> str:
    named = {"ink": look.ink, "muted": look.muted, "rule": look.rule, "surface": look.surface}
    for letter, colours in (("s", look.series), ("h", look.heat), ("i", look.heat_ink)):
        named |= {f"{letter}{index}": colour for index, colour in enumerate(colours)}
    return ";".join(f"--{name}:{colour}" for name, colour in named.items())


def _label_ends(canvas: Canvas, axes: Axes, ends: Sequence[End], look: Look) -> None:
    """Names right of the plot at the height of their line, pushed apart where lines end together."""
    if not ends:
        return
    texts: list[tuple[float, Text]] = []
    for end in ends:
        if end.x is not None:
            axes.annotate(end.text, (end.x, end.y), (6, 0), textcoords="offset points", color=end.colour, va="center", fontsize=look.font)
            continue
        text = axes.annotate(
            end.text, (1.0, end.y), (8, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", color=end.colour
        )
        text.set(va="center", fontsize=look.font, annotation_clip=False)
        texts.append((end.y, text))
    canvas.draw_without_rendering()
    gap = look.font * 1.3
    scale = 72 / canvas.dpi
    heights = [axes.transData.transform((1.0, y))[1] * scale for y, _ in texts]
    bottom = axes.get_window_extent().y0 * scale
    order = sorted(range(len(texts)), key=lambda index: heights[index])
    placed = spread([heights[index] for index in order], gap, bottom)
    for index, place in zip(order, placed, strict=True):
        texts[index][1].set_position((8, place - heights[index]))


def spread(wanted: Sequence[float], gap: float, least: float) -> list[float]:
    """Places at least `gap` apart and in the same order, near the wanted ones: clusters are centred on the mean of their wishes."""
    clusters: list[list[float]] = []
    for wish in wanted:
        clusters.append([wish])
        while len(clusters) > 1 and _low(clusters[-1], gap, least) - _high(clusters[-2], gap, least) < gap:
            last = clusters.pop()
            clusters[-1] += last
    return [_low(cluster, gap, least) + gap * index for cluster in clusters for index in range(len(cluster))]


def _low(cluster: Sequence[float], gap: float, least: float) -> float:
    return max(sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2, least)


def _high(cluster: Sequence[float], gap: float, least: float) -> float:
    return _low(cluster, gap, least) + gap * (len(cluster) - 1)
