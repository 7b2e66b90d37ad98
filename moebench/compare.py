"""Two runs, cell by cell: ratios of medians with their intervals, and what cannot be compared."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import atan, cos, exp, hypot, log, pi, sin, sqrt
from operator import attrgetter
from statistics import fmean, median
from typing import Generic, Protocol, TypeVar

from moebench.brief import Brief, Within, briefs, reach
from moebench.case import CASE_FIELDS, Case
from moebench.once import once
from moebench.record import Contract, Manifest, Record, Scope, Status, Telemetry

Key = tuple[Case, str, Scope]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Candidate over base, with a 95 % interval where there is one; below 1 the candidate is faster."""

    value: float
    low: float | None  # None: too few samples for an interval
    high: float | None
    rounds: tuple[int, int]  # base's, candidate's

    @property
    def within_process(self) -> bool:
        """A side has one round: what differs from process to process is not in the interval."""
        return min(self.rounds) < 2

    @property
    def decided(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def effect(self) -> float:
        """Size of the change, the same for twice as fast and half as fast."""
        return abs(log(self.value))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One backend on one case in both runs."""

    case: Case
    backend: str
    scope: Scope
    base_us: float
    candidate_us: float
    ratio: Ratio
    flags: tuple[str, ...] = ()  # reasons to doubt either time
    across: tuple[str, ...] = ()  # what differs although it should not: "device", "contract"


@dataclass(frozen=True, kw_only=True)
class Uncompared:
    """One backend on one case that has a time on one side only, or two times that mean different things."""

    case: Case
    backend: str
    scope: Scope
    base: Status | None  # None: no record
    candidate: Status | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What is said of all cells, whether they are listed or not."""

    cells: int = 0
    faster: int = 0
    slower: int = 0
    ties: int = 0  # undecided, with an interval
    unknown: int = 0  # without one
    within_process: int = 0
    flags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    @property
    def undecided(self) -> int:
        return self.cells - self.faster - self.slower


@dataclass(frozen=True, kw_only=True)
class Comparison:
    cells: tuple[Cell, ...]  # decided ones first, the largest effect first; where there are many, maybe only the first
    tally: Tally  # of all cells
    changed: tuple[Uncompared, ...] = ()  # another status
    mismatched: tuple[Uncompared, ...] = ()  # other devices or contracts
    alone: tuple[Uncompared, ...] = ()  # on one side only
    across: tuple[str, ...] = ()  # what the cells compare although it differs, as sentences


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something about the two runs that is not the same."""

    what: str
    base: str
    candidate: str


class Judged(Protocol):
    """What sides are made of: records, or what is kept of them."""

    @property
    def case(self) -> Case: ...
    @property
    def backend(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def device(self) -> str: ...
    @property
    def contract_id(self) -> str: ...
    @property
    def status(self) -> Status: ...
    @property
    def usable(self) -> bool: ...


J = TypeVar("J", bound=Judged)


@dataclass(kw_only=True)
class Side(Generic[J]):
    timed: dict[tuple[str, str], list[J]] = field(default_factory=lambda: defaultdict(list))  # by device and contract
    other: list[J] = field(default_factory=list)

    @property
    def status(self) -> Status | None:
        if self.other:
            return next((record.status for record in self.other if record.status != "ok"), "ok")
        return "ok" if self.timed else None


@dataclass(kw_only=True)
class Sensed:
    """What the sensors said over rows: value -> rows, so that those of several processes add up."""

    sm_mhz: Counter[float] = field(default_factory=Counter)  # medians of rows
    mem_mhz: Counter[float] = field(default_factory=Counter)
    power_limit_w: Counter[float] = field(default_factory=Counter)

    def add(self, telemetry: Telemetry) -> None:
        self.sm_mhz[telemetry.sm_mhz[1]] += 1
        self.mem_mhz[telemetry.mem_mhz] += 1
        self.power_limit_w[telemetry.power_limit_w] += 1

    def __add__(self, other: Sensed) -> Sensed:
        return Sensed(
            sm_mhz=self.sm_mhz + other.sm_mhz,
            mem_mhz=self.mem_mhz + other.mem_mhz,
            power_limit_w=self.power_limit_w + other.power_limit_w,
        )


def compare(base: Iterable[Record], candidate: Iterable[Record], across: bool = False) -> Comparison:
    """Match by case, backend, scope, device and contract; with across, by the first three where the others match nothing."""
    return of_briefs(briefs(base), briefs(candidate), across)


def of_briefs(base: Iterable[Brief], candidate: Iterable[Brief], across: bool = False, most: int | None = None) -> Comparison:
    """With at most so many of its cells."""
    both = sides(base), sides(candidate)
    cells: list[Cell] = []
    lists: dict[str, list[Uncompared]] = defaultdict(list)
    sentences: dict[str, None] = {}
    nothing: Side[Brief] = Side()
    for key in sorted(both[0].keys() | both[1].keys(), key=_order):
        old, new = both[0].get(key, nothing), both[1].get(key, nothing)
        common = [meaning for meaning in old.timed if meaning in new.timed]
        cells += [_cell(key, old.timed[meaning], new.timed[meaning]) for meaning in common]
        if common:
            for name, side in (("base", old), ("candidate", new)):
                lists["alone"] += [
                    _uncompared(key, old, new, f"under this contract only in {name}: {_meaning(records[0])}")
                    for meaning, records in side.timed.items()
                    if meaning not in common
                ]
        elif old.timed and new.timed:
            pairs = [(a, b) for a in old.timed.values() for b in new.timed.values()]
            difference = _differences(pairs[0][0][0], pairs[0][1][0])
            if across and len(pairs) == 1:
                sentences |= dict.fromkeys(difference.values())
                cells.append(_cell(key, *pairs[0], across=tuple(difference)))
            else:
                lists["mismatched"].append(_uncompared(key, old, new, "; ".join(difference.values())))
        elif old.status is None or new.status is None:
            lists["alone"].append(_uncompared(key, old, new, f"only in {'candidate' if old.status is None else 'base'}"))
        elif old.timed or new.timed or old.status != new.status:
            lists["changed"].append(_uncompared(key, old, new, _why(new if old.timed else old)))
    return Comparison(
        cells=tuple(sorted(cells, key=_by_effect)[:most]),
        tally=_tally(cells),
        changed=tuple(lists["changed"]),
        mismatched=tuple(lists["mismatched"]),
        alone=tuple(lists["alone"]),
        across=tuple(sorted(sentences)),
    )


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Of comparisons that have no cell in common."""
    if len(parts) == 1:
        return parts[0]

    def in_order(lists: Iterable[Iterable[Uncompared]]) -> tuple[Uncompared, ...]:
        return tuple(sorted((row for rows in lists for row in rows), key=_order_of))

    cells = sorted((cell for part in parts for cell in part.cells), key=_order_of)
    tallies = [part.tally for part in parts]
    return Comparison(
        cells=tuple(sorted(cells, key=_by_effect)),
        tally=Tally(
            cells=sum(tally.cells for tally in tallies),
            faster=sum(tally.faster for tally in tallies),
            slower=sum(tally.slower for tally in tallies),
            ties=sum(tally.ties for tally in tallies),
            unknown=sum(tally.unknown for tally in tallies),
            within_process=sum(tally.within_process for tally in tallies),
            flags=tuple(sorted({flag for tally in tallies for flag in tally.flags})),
            models=tuple(sorted({model for tally in tallies for model in tally.models})),
        ),
        changed=in_order(part.changed for part in parts),
        mismatched=in_order(part.mismatched for part in parts),
        alone=in_order(part.alone for part in parts),
        across=tuple(sorted({sentence for part in parts for sentence in part.across})),
    )


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The times of one cell, a round each, with the logarithms of their medians."""

    rows: tuple[Brief, ...]
    logs: tuple[float, ...]

    @property
    def center_us(self) -> float:
        """One number for all: the geometric mean of the medians."""
        return exp(_mean(self.logs))

    @once
    def widths(self) -> Within | None:
        """How far the 95 % interval reaches below and above, as logarithms."""
        logs = self.logs
        if len(logs) < 2:
            return reach(self.rows[0])
        half = student_t(len(logs) - 1) * sqrt(_variance(logs) / len(logs))
        return half, half


def rounds_of(rows: Iterable[Brief]) -> Rounds:
    """Of what is usable."""
    rows = tuple(rows)
    return Rounds(rows=rows, logs=tuple([row.log_us for row in rows]))


def ratio(base: Rounds, candidate: Rounds) -> Ratio:
    """Candidate over base.

    Rounds are the unit: with two or more on each side, a Welch t interval of the difference of the mean logarithms of their medians.
    With a single round on a side, its interval is the one of its median, and the sides' intervals are added in quadrature on the
    logarithmic scale (MOVER: Zou and Donner, Statistics in Medicine 27, 2008)."""
    difference = _mean(candidate.logs) - _mean(base.logs)
    rounds = len(base.logs), len(candidate.logs)
    if min(rounds) >= 2:
        half = _welch(base.logs, candidate.logs)
        return Ratio(value=exp(difference), low=exp(difference - half), high=exp(difference + half), rounds=rounds)
    widths = base.widths, candidate.widths
    if widths[0] is None or widths[1] is None:
        return Ratio(value=exp(difference), low=None, high=None, rounds=rounds)
    (old_down, old_up), (new_down, new_up) = widths[0], widths[1]
    low, high = difference - hypot(new_down, old_up), difference + hypot(new_up, old_down)
    return Ratio(value=exp(difference), low=exp(low), high=exp(high), rounds=rounds)


def environment(base: tuple[Manifest, Sensed], candidate: tuple[Manifest, Sensed]) -> list[Difference]:
    """Everything that differs in what the runs ran on, devices first."""
    told = _environment(*base), _environment(*candidate)
    return [
        Difference(what=what, base=told[0].get(what, ""), candidate=told[1].get(what, ""))
        for what in dict.fromkeys([*told[0], *told[1]])
        if told[0].get(what, "") != told[1].get(what, "")
    ]


@lru_cache
def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its distribution function (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    low, high = 0.0, 13.0  # 12.706 with one degree of freedom
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """Probability of a Student's t between -t and t."""
    theta = atan(t / sqrt(degrees))
    odd = degrees % 2
    term = cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / pi * (theta + sin(theta) * total) if odd else sin(theta) * total


def _welch(old: Sequence[float], new: Sequence[float]) -> float:
    """Half a 95 % interval of the difference of two means."""
    parts = [_variance(side) / len(side) for side in (old, new)]
    if not sum(parts):
        return 0.0
    degrees = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (old, new), strict=True))
    return student_t(max(int(degrees + 1e-9), 1)) * sqrt(sum(parts))  # rounded down: a wider interval, never a narrower one


def _mean(values: Sequence[float]) -> float:
    """Most runs have one round, and fmean takes 1 us for it."""
    return values[0] if len(values) == 1 else fmean(values)


def _variance(values: Sequence[float]) -> float:
    """In plain floats: statistics.variance takes exact fractions, 0.2 ms for five numbers."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def sides(records: Iterable[J]) -> dict[Key, Side[J]]:
    found: dict[Key, Side[J]] = {}
    for record in records:
        key = record.case, record.backend, record.scope
        side = found.get(key)
        if side is None:
            side = found[key] = Side()
        if record.usable:
            side.timed[record.device, record.contract_id].append(record)
        else:
            side.other.append(record)
    return found


_FIRST = ("model", "top_k", "ep_size", "tp_size", "routing", "seed", "num_tokens", "tp_rank", "ep_rank")
_in_order = attrgetter(*_FIRST, *(name for name in CASE_FIELDS if name not in _FIRST))


def _order(key: Key) -> tuple[object, ...]:
    case, backend, scope = key
    return (*_in_order(case), backend, scope)


def _order_of(row: Cell | Uncompared) -> tuple[object, ...]:
    return _order((row.case, row.backend, row.scope))


def _by_effect(cell: Cell) -> tuple[bool, float]:
    return not cell.ratio.decided, -cell.ratio.effect


def _tally(cells: Sequence[Cell]) -> Tally:
    decided = [cell.ratio.value for cell in cells if cell.ratio.decided]
    unknown = sum(cell.ratio.low is None for cell in cells)
    return Tally(
        cells=len(cells),
        faster=sum(value < 1 for value in decided),
        slower=sum(value > 1 for value in decided),
        ties=len(cells) - len(decided) - unknown,
        unknown=unknown,
        within_process=sum(cell.ratio.within_process for cell in cells),
        flags=tuple(sorted({flag for cell in cells for flag in cell.flags})),
        models=tuple(sorted({cell.case.model for cell in cells})),
    )


def _cell(key: Key, base: Sequence[Brief], candidate: Sequence[Brief], across: tuple[str, ...] = ()) -> Cell:
    old, new = rounds_of(base), rounds_of(candidate)
    return Cell(
        case=key[0],
        backend=key[1],
        scope=key[2],
        base_us=old.center_us,
        candidate_us=new.center_us,
        ratio=ratio(old, new),
        flags=tuple(dict.fromkeys([flag for record in (*base, *candidate) for flag in record.flags])),
        across=across,
    )


def _uncompared(key: Key, old: Side[Brief], new: Side[Brief], reason: str) -> Uncompared:
    return Uncompared(case=key[0], backend=key[1], scope=key[2], base=old.status, candidate=new.status, reason=reason)


def _why(side: Side[Brief]) -> str:
    """Why a side has no time to compare."""
    record = next((record for record in side.other if record.status != "ok"), side.other[0])
    if record.status != "ok":
        return record.reason
    return "its time does not describe the kernel" if record.timed else "it has no time"


def _meaning(brief: Brief) -> str:
    return f"{brief.clock}, {brief.l2 or 'no'} L2, {brief.contract_id}"


def _differences(old: Brief, new: Brief) -> dict[str, str]:
    """What keeps two times from being compared: "device" or "contract" -> a sentence."""
    found = {}
    if old.device != new.device:
        found["device"] = f"device {old.device} / {new.device}"
    if old.contract_id != new.contract_id:
        found["contract"] = f"contract {_contract_difference(old, new)}"
    return found


def _contract_difference(old: Brief, new: Brief) -> str:
    if isinstance(old.contract, Contract) and isinstance(new.contract, Contract):
        mine, other = asdict(old.contract), asdict(new.contract)
        return ", ".join(f"{name} {mine[name]} / {other[name]}" for name in mine if mine[name] != other[name])
    return f"{_meaning(old)} / {_meaning(new)}"


def _environment(manifest: Manifest, sensed: Sensed) -> dict[str, str]:
    device = manifest.device
    told = {
        "device": device.name,
        "architecture": device.arch,
        "driver": device.driver,
        "memory": f"{device.memory_bytes / 2**30:.0f} GiB",
        "SMs": str(device.num_sms),
        "highest clock": f"{device.clock_mhz} MHz",
    }
    if sensed.sm_mhz:
        told["SM clock, median of rows"] = f"{_middle(sensed.sm_mhz):.0f} MHz"
        told["memory clock"] = f"{_middle(sensed.mem_mhz):.0f} MHz"
        told["power limit"] = f"{_middle(sensed.power_limit_w):.0f} W"
    return told | {name: version for name, version in sorted({**device.versions, **manifest.versions}.items()) if version}


def _middle(values: Counter[float]) -> float:
    return median(values.elements())
