"""A figure's lines, areas and texts on matplotlib's canvas, which becomes a picture file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D, Transform

from moebench.reports.drawing import Align, Baseline, Figure, Look, Place, Sheet, write

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType


@contextmanager
def drawn_on_canvas(figure: Figure, look: Look, title: Sequence[str] = ()) -> Iterator[Canvas]:
    """On a canvas of its own: no state of pyplot, no display. Text is never parsed as mathematics: `$` in a name is a `$`.

    Lines, areas and texts are put on the canvas at places of our own: matplotlib's axes and layout take 200 ms a figure, these 20."""
    settings: dict[RcKeyType, object] = {"text.parse_math": False, "font.size": look.font}
    height, above = figure.height(look), 18 * len(title) + 8 * bool(title)
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that DejaVu lacks: a box stands there
        canvas = Canvas(figsize=(look.width / 72, (height + above) / 72), dpi=72)
        points = Affine2D().scale(1 / 72) + canvas.dpi_scale_trans
        sheet = Sheet(paper=_CanvasPaper(canvas=canvas, points=points), look=look, width=look.width, height=height)
        for row, line in enumerate(title):
            write(sheet, (10, height + above - 18 * (row + 1)), line, size=look.font + 1, weight="bold")
        figure.draw(sheet)
        yield canvas


@dataclass(frozen=True, kw_only=True)
class _CanvasPaper:
    canvas: Canvas
    points: Transform

    def text(
        self, place: Place, text: str, *, colour: str, size: float, align: Align, baseline: Baseline, weight: str, rotation: int
    ) -> None:
        self.canvas.text(
            *place,
            text,
            transform=self.points,
            color=colour,
            fontsize=size,
            ha=align,
            va=baseline,
            fontweight=weight,
            rotation=rotation,
        )

    def line(
        self, places: Sequence[Place], colour: str, width: float, *, marker: str, size: float, alpha: float, dashes: Sequence[float]
    ) -> None:
        xs, ys = zip(*places, strict=True)
        self.canvas.add_artist(
            Line2D(
                xs,
                ys,
                transform=self.points,
                color=colour,
                linewidth=width,
                linestyle=(0, dashes) if dashes else "solid" if width else "none",
                marker=marker or "none",
                markersize=size,
                markeredgewidth=0,
                alpha=alpha,
            )
        )

    def stroke(self, segments: Sequence[tuple[Place, Place]], colour: str, width: float) -> None:
        path = Path([place for segment in segments for place in segment], [Path.MOVETO, Path.LINETO] * len(segments))
        self.canvas.add_artist(PathPatch(path, transform=self.points, facecolor="none", edgecolor=colour, linewidth=width))

    def areas(self, found: Sequence[Sequence[Place]], colour: str, alpha: float, edge: str) -> None:
        points = [point for corners in found for point in (*corners, corners[0])]
        codes = [code for corners in found for code in (Path.MOVETO, *[Path.LINETO] * (len(corners) - 1), Path.CLOSEPOLY)]
        look = {"facecolor": colour, "edgecolor": edge or "none", "linewidth": 1 if edge else 0, "alpha": alpha}
        self.canvas.add_artist(PathPatch(Path(points, codes), transform=self.points, **look))
