"""Text of an SVG file, placed without being measured."""

from __future__ import annotations

from functools import lru_cache

from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.font_manager import FontProperties

BELOW = {"baseline": 0.0, "center": 0.36, "top": 0.9}  # of the size: from the place down to the baseline


class SvgText(Artist):
    """A browser lays out the text itself: all that is asked of matplotlib is where. Its own text measures every string several times, half
    of the time that a figure takes."""

    def __init__(self, place: tuple[float, float], text: str, *, colour: str, size: float, ha: str, va: str, weight: str) -> None:
        super().__init__()
        self._place, self._text, self._colour, self._ha = place, text, colour, ha
        self._font = _font(size, weight)
        self._below = BELOW[va] * size

    def draw(self, renderer: RendererBase) -> None:
        gc = renderer.new_gc()
        gc.set_foreground(self._colour)
        x, y = self.get_transform().transform(self._place)
        height = renderer.get_canvas_width_height()[1]
        renderer.draw_text(gc, x, height - y + self._below, self._text, self._font, 0, ismath=False, mtext=self)  # type: ignore[arg-type]
        gc.restore()

    def get_unitless_position(self) -> tuple[float, float]:
        return self._place

    def get_ha(self) -> str:
        return self._ha


@lru_cache(maxsize=64)
def _font(size: float, weight: str) -> FontProperties:
    return FontProperties(size=size, weight=weight)
