"""Points at which a tuned backend is slower than it is untuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moebench.case import Case
from moebench.parts import Place, in_memory
from moebench.record import Record
from moebench.reports.grid import Method
from moebench.reports.layers import Layer, TimedRow, by_layer

UNTUNED = "@untuned"  # X@untuned is X without its tuning
NOTABLE = 1.02  # on an H200 the medians of fresh processes vary by 0.1 to 0.4 % at most points (docs/measuring.md)


@dataclass(frozen=True, kw_only=True)
class Setback:
    """One case that tuning made slower."""

    backend: str
    case: Case
    arch: str
    method: Method
    tuned_us: float
    untuned_us: float
    place: Place

    @property
    def ratio(self) -> float:
        return self.tuned_us / self.untuned_us


@dataclass(kw_only=True)
class Setbacks:
    """The worst of all, and how many there are."""

    most: int
    number: int = 0
    shown: list[Setback] = field(default_factory=list)  # worst first

    def add(self, layer: Layer) -> None:
        """Where X takes more than NOTABLE times as long as X@untuned, of equal case, contract and round."""
        names = {row.backend for row in layer.rows}
        if not any(name + UNTUNED in names for name in names):
            return
        timed = {_point(row, row.backend): row for row in layer.rows}
        for row in timed.values():
            untuned = timed.get(_point(row, row.backend + UNTUNED))
            if untuned is not None and row.median_us > NOTABLE * untuned.median_us > 0:
                found = Setback(
                    backend=row.backend,
                    case=row.case,
                    arch=layer.arch,
                    method=(row.clock, row.l2),
                    tuned_us=row.median_us,
                    untuned_us=untuned.median_us,
                    place=row.place,
                )
                self.join(Setbacks(most=self.most, number=1, shown=[found]))

    def join(self, other: Setbacks) -> None:
        self.number += other.number
        self.shown = sorted([*self.shown, *other.shown], key=lambda found: (-found.ratio, found.place))[: self.most]


def setbacks(records: Iterable[Record], most: int) -> Setbacks:
    """Of records that were merged."""
    found = Setbacks(most=most)
    for layer in by_layer(in_memory(records)):
        found.add(layer)
    return found


def _point(row: TimedRow, backend: str) -> tuple[object, ...]:
    return backend, row.case, row.scope, row.round, row.contract_id
