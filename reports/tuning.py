"""Points at which a tuned backend is slower than it is untuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moebench.record import Record
from moebench.reports.grid import median_us

UNTUNED = "@untuned"  # X@untuned is X without its tuning
NOTABLE = 1.02  # on an H200 the medians of fresh processes vary by 0.1 to 0.4 % at most points (docs/measuring.md)


@dataclass(frozen=True, kw_only=True)
class Setback:
    """One case that tuning made slower."""

    tuned: Record
    untuned: Record

    @property
    def ratio(self) -> float:
        return median_us(self.tuned) / median_us(self.untuned)


def setbacks(records: Iterable[Record]) -> list[Setback]:
    """Where X takes more than NOTABLE times as long as X@untuned, of equal case, device, contract and round; worst first."""
    records = list(records)
    names = {record.backend for record in records}
    if not any(name + UNTUNED in names for name in names):  # a key takes 3 us
        return []
    timed = {_point(record, record.backend): record for record in records if _describes_kernel(record)}
    found = []
    for record in timed.values():
        untuned = timed.get(_point(record, record.backend + UNTUNED))
        if untuned is not None and median_us(record) > NOTABLE * median_us(untuned):
            found.append(Setback(tuned=record, untuned=untuned))
    return sorted(found, key=lambda setback: setback.ratio, reverse=True)


def _describes_kernel(record: Record) -> bool:
    return record.status == "ok" and record.timing is not None and record.timing.comparable


def _point(record: Record, backend: str) -> tuple[object, ...]:
    assert record.timing is not None  # callers look at timed records
    return backend, record.case, record.arch, record.device, record.scope, record.round, record.contract_id
