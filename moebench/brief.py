"""What comparisons need of a record, since to keep 100,000 of them as a whole takes as long again as to read them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from math import log
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from moebench.case import Case
from moebench.flags import doubts
from moebench.parts import Place, Placed
from moebench.record import Contract, Record, Scope, Status, Timing

LEAST_SAMPLES = 6  # lowest to highest of fewer covers the median with less than 95 %: 1 - 2 * 0.5 ** 5 = 0.94

Within = tuple[float, float]  # how far the 95 % interval of the median reaches below and above, as logarithms
Samples: TypeAlias = "array[float]"


class Brief(NamedTuple):
    """A tuple, as one is made of each of many records."""

    case: Case
    backend: str
    act_dtype: str
    arch: str
    device: str
    scope: Scope
    status: Status
    reason: str
    flags: tuple[str, ...]
    contract: Contract | None
    contract_id: str
    clock: str  # empty where there is no time
    l2: str
    usable: bool
    doubtful: bool  # flags speak against it
    log_us: float  # of the median, where it is usable
    within: Within | Samples | None

    @property
    def timed(self) -> bool:
        return bool(self.clock)


def briefs(records: Iterable[Record], *, later: bool = False) -> Iterator[Brief]:
    """`within` has only the first of the usable rounds of a cell, and the first that is in no doubt: of two rounds it is not asked for,
    and it takes 20 us. Where most will not be asked for either it is made later, and till then it is the samples."""
    seen: dict[tuple[object, ...], bool] = {}  # by cell: whether it had one that is in no doubt
    for record in records:
        timing, usable = record.timing, record.usable
        doubtful = bool(record.flags) and bool(doubts(record))
        within: Within | Samples | None = None
        if timing is not None and usable:
            alike = record.case, record.backend, record.act_dtype, record.arch, record.device, record.scope, record.contract_id
            if not seen.get(alike, False) and (not doubtful or alike not in seen):
                within = array("d", timing.samples_us) if later else _within(timing)
                seen[alike] = not doubtful
        yield Brief(
            record.case,
            record.backend,
            record.act_dtype,
            record.arch,
            record.device,
            record.scope,
            record.status,
            record.reason,
            tuple(record.flags),
            record.contract,
            record.contract_id,
            timing.clock if timing else "",
            (timing.l2 or "") if timing else "",
            usable,
            doubtful,
            log(timing.median_us) if timing and usable else 0.0,
            within,
        )


def placed_briefs(placed: Placed, *, later: bool = False) -> list[tuple[Place, Brief]]:
    """In the order of their places."""
    places: list[Place] = []

    def records() -> Iterator[Record]:
        for place, record in placed:
            places.append(place)
            yield record

    found = list(briefs(records(), later=later))  # which fills the places
    return sorted(zip(places, found, strict=True), key=itemgetter(0))


def reach(brief: Brief) -> Within | None:
    """None where there are too few samples for an interval."""
    if not isinstance(brief.within, array):
        return brief.within
    return _within(Timing(samples_us=tuple(brief.within), clock="wall", l2=None, l2_method="", warmup_calls=0))  # whatever the clock was


def _within(timing: Timing) -> Within | None:
    if len(timing.samples_us) < LEAST_SAMPLES:
        return None
    low, high = timing.interval_us
    middle = log(timing.median_us)
    return middle - log(low), log(high) - middle
