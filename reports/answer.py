"""Which backend is fastest where, by how much, and where nobody can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from moebench.reports.grid import Grid, Point
from moebench.reports.text import listed, ratio


@dataclass(frozen=True, kw_only=True)
class Win:
    """The outcome at one token count."""

    num_tokens: int
    best: Point  # the lowest median
    ties: tuple[Point, ...]  # their 95 % intervals overlap the best one's
    runner_up: Point | None  # the fastest that does not tie; None where all tie or the best is alone

    @property
    def names(self) -> tuple[str, ...]:
        """Whoever may be the fastest, by name."""
        return tuple(sorted(point.backend for point in (self.best, *self.ties)))

    @property
    def lead(self) -> float | None:
        """How many times as fast as the runner-up."""
        return self.runner_up.slowest_us / self.best.slowest_us if self.runner_up and self.best.slowest_us else None


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring token counts with one outcome."""

    wins: tuple[Win, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.wins[0].names

    @property
    def tie(self) -> bool:
        return len(self.names) > 1

    @property
    def tokens(self) -> str:
        """`64` or `1 to 512`."""
        first, last = self.wins[0].num_tokens, self.wins[-1].num_tokens
        return str(first) if first == last else f"{first} to {last}"

    @property
    def runners_up(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(win.runner_up.backend for win in self.wins if win.runner_up))

    @property
    def lead(self) -> str:
        """`1.04x` or `1.04x to 1.58x`; empty without a runner-up."""
        leads = [win.lead for win in self.wins if win.lead is not None]
        if not leads:
            return ""
        low, high = ratio(min(leads)), ratio(max(leads))
        return low if low == high else f"{low} to {high}"

    @property
    def roof_shares(self) -> tuple[float, float] | None:
        """Lowest and highest share of the roof that the fastest reaches."""
        shares = [win.best.roof_share for win in self.wins if win.best.roof_share is not None]
        return (min(shares), max(shares)) if shares else None

    @property
    def limiters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(win.best.roofline.limiter for win in self.wins if win.best.roofline))

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the times that decided."""
        points = [point for win in self.wins for point in (win.best, *win.ties, win.runner_up) if point]
        return tuple(dict.fromkeys(flag for point in points for flag in point.flags))


def wins(grid: Grid) -> list[Win]:
    """One per token count at which any backend counts, smallest first. One alone is best, and has no runner-up."""
    found = []
    for tokens, row in grid.rows.items():
        able = sorted((point for point in row.values() if point.counts), key=lambda point: point.slowest_us)
        if able:
            ties = tuple(point for point in able[1:] if point.mark == "tie")
            runner_up = next((point for point in able[1:] if point.mark != "tie"), None)
            found.append(Win(num_tokens=tokens, best=able[0], ties=ties, runner_up=runner_up))
    return found


def stretches(grid: Grid) -> list[Stretch]:
    """Neighbouring token counts of the grid merged while the same backends lead or tie. Between two of them nothing was measured."""
    return [Stretch(wins=tuple(group)) for _, group in groupby(wins(grid), key=lambda win: (win.names, win.runner_up is None))]


def contested(grid: Grid) -> bool:
    """Whether two backends can be compared at any token count."""
    return any(win.ties or win.runner_up for win in wins(grid))


def sentence(grid: Grid) -> str:
    """The answer for one grid, in words: `At 1 to 512 tokens a is fastest (1.04x to 1.58x as fast as the next); at 1024 tokens a and b
    tie.`"""
    found = stretches(grid)
    if not found:
        return "No backend has a time that describes its kernel."
    if not contested(grid):
        names = list(dict.fromkeys(name for stretch in found for name in stretch.names))
        whose = f"Only {names[0]} has a time" if len(names) == 1 else f"{listed(names)} have no time at a common token count"
        return f"{whose} under this contract, so nothing was compared."
    told = "; ".join(_clause(names, parts) for names, parts in _joined(found))
    return f"{told[0].upper()}{told[1:]}."


def _joined(found: Sequence[Stretch]) -> list[tuple[tuple[str, ...], list[Stretch]]]:
    """Stretches of one outcome together, in the order in which outcomes first come up."""
    outcomes: dict[tuple[str, ...], list[Stretch]] = {}
    for stretch in found:
        outcomes.setdefault(stretch.names, []).append(stretch)
    return list(outcomes.items())


def _clause(names: tuple[str, ...], parts: Sequence[Stretch]) -> str:
    where = listed([part.tokens for part in parts])
    at = f"at {where} token{'' if where == '1' else 's'}"
    leads = [win.lead for part in parts for win in part.wins if win.lead is not None]
    if len(names) > 1:
        return f"{at} {listed(names)} tie"
    if not leads:
        return f"{at} {names[0]} is alone"
    low, high = ratio(min(leads)), ratio(max(leads))
    by = low if low == high else f"{low} to {high}"
    return f"{at} {names[0]} is fastest ({by} as fast as the next)"
