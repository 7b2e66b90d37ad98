"""Two runs, cell by cell: ratios of medians with their intervals, and what cannot be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import atan, cos, exp, hypot, log, pi, sin, sqrt
from statistics import fmean, median
from typing import Literal

from moebench.case import Case
from moebench.journal import Run
from moebench.record import Contract, Record, Scope, Status, Timing

SideName = Literal["base", "candidate"]
LEAST_SAMPLES = 6  # lowest to highest of fewer covers the median with less than 95 %: 1 - 2 * 0.5 ** 5 = 0.94


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
class Comparison:
    cells: tuple[Cell, ...]  # decided ones first, the largest effect first
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


@dataclass(kw_only=True)
class Side:
    timed: dict[tuple[str, str], list[Record]] = field(default_factory=lambda: defaultdict(list))  # by device and contract
    other: list[Record] = field(default_factory=list)

    @property
    def status(self) -> Status | None:
        if self.other:
            return next((record.status for record in self.other if record.status != "ok"), "ok")
        return "ok" if self.timed else None


def compare(base: Iterable[Record], candidate: Iterable[Record], across: bool = False) -> Comparison:
    """Match by case, backend, scope, device and contract; with across, by the first three where the others match nothing."""
    both = sides(base), sides(candidate)
    cells: list[Cell] = []
    lists: dict[str, list[Uncompared]] = defaultdict(list)
    sentences: dict[str, None] = {}
    nothing = Side()
    for key in dict.fromkeys([*both[0], *both[1]]):
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
        cells=tuple(sorted(cells, key=lambda cell: (not cell.ratio.decided, -cell.ratio.effect))),
        changed=tuple(lists["changed"]),
        mismatched=tuple(lists["mismatched"]),
        alone=tuple(lists["alone"]),
        across=tuple(sentences),
    )


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The times of one cell, a round each, with the logarithms of their medians."""

    timings: tuple[Timing, ...]
    logs: tuple[float, ...]

    @property
    def center_us(self) -> float:
        """One number for all: the geometric mean of the medians."""
        return exp(_mean(self.logs))


def rounds_of(records: Iterable[Record]) -> Rounds:
    """Of records that are usable."""
    timings = tuple([record.timing for record in records if record.timing])
    return Rounds(timings=timings, logs=tuple([log(timing.median_us) for timing in timings]))


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
    widths = _widths(base), _widths(candidate)
    if widths[0] is None or widths[1] is None:
        return Ratio(value=exp(difference), low=None, high=None, rounds=rounds)
    (old_down, old_up), (new_down, new_up) = widths[0], widths[1]
    low, high = difference - hypot(new_down, old_up), difference + hypot(new_up, old_down)
    return Ratio(value=exp(difference), low=exp(low), high=exp(high), rounds=rounds)


def usable(record: Record) -> bool:
    """Whether its time says how fast the kernel is."""
    timing = record.timing
    return record.status == "ok" and timing is not None and timing.comparable and timing.least_us > 0


def environment(base: Run, candidate: Run) -> list[Difference]:
    """Everything that differs in what the runs ran on, devices first."""
    told = _environment(base), _environment(candidate)
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


def _widths(rounds: Rounds) -> tuple[float, float] | None:
    """How far the 95 % interval reaches below and above, as logarithms."""
    logs = rounds.logs
    if len(logs) >= 2:
        half = student_t(len(logs) - 1) * sqrt(_variance(logs) / len(logs))
        return half, half
    timing = rounds.timings[0]
    if len(timing.samples_us) < LEAST_SAMPLES:
        return None
    low, high = timing.interval_us
    return logs[0] - log(low), log(high) - logs[0]


def _mean(values: Sequence[float]) -> float:
    """Most runs have one round, and fmean takes 1 us for it."""
    return values[0] if len(values) == 1 else fmean(values)


def _variance(values: Sequence[float]) -> float:
    """In plain floats: statistics.variance takes exact fractions, 0.2 ms for five numbers."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def sides(records: Iterable[Record]) -> dict[tuple[Case, str, Scope], Side]:
    found: dict[tuple[Case, str, Scope], Side] = {}
    for record in records:
        key = record.case, record.backend, record.scope
        side = found.get(key)
        if side is None:
            side = found[key] = Side()
        if usable(record):
            side.timed[record.device, record.contract_id].append(record)
        else:
            side.other.append(record)
    return found


def _cell(key: tuple[Case, str, Scope], base: Sequence[Record], candidate: Sequence[Record], across: tuple[str, ...] = ()) -> Cell:
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


def _uncompared(key: tuple[Case, str, Scope], old: Side, new: Side, reason: str) -> Uncompared:
    return Uncompared(case=key[0], backend=key[1], scope=key[2], base=old.status, candidate=new.status, reason=reason)


def _why(side: Side) -> str:
    """Why a side has no time to compare."""
    record = next((record for record in side.other if record.status != "ok"), side.other[0])
    if record.status != "ok":
        return record.reason
    return "its time does not describe the kernel" if record.timing else "it has no time"


def _meaning(record: Record) -> str:
    timing = record.timing
    assert timing is not None  # only timed records have a contract
    return f"{timing.clock}, {timing.l2 or 'no'} L2, {record.contract_id}"


def _differences(old: Record, new: Record) -> dict[str, str]:
    """What keeps two times from being compared: "device" or "contract" -> a sentence."""
    found = {}
    if old.device != new.device:
        found["device"] = f"device {old.device} / {new.device}"
    if old.contract_id != new.contract_id:
        found["contract"] = f"contract {_contract_difference(old, new)}"
    return found


def _contract_difference(old: Record, new: Record) -> str:
    if isinstance(old.contract, Contract) and isinstance(new.contract, Contract):
        mine, other = asdict(old.contract), asdict(new.contract)
        return ", ".join(f"{name} {mine[name]} / {other[name]}" for name in mine if mine[name] != other[name])
    return f"{_meaning(old)} / {_meaning(new)}"


def _environment(run: Run) -> dict[str, str]:
    device = run.manifest.device
    told = {
        "device": device.name,
        "architecture": device.arch,
        "driver": device.driver,
        "memory": f"{device.memory_bytes / 2**30:.0f} GiB",
        "SMs": str(device.num_sms),
        "highest clock": f"{device.clock_mhz} MHz",
    }
    seen = [record.telemetry for record in run.records if record.telemetry]
    if seen:
        told["SM clock, median of rows"] = f"{median(row.sm_mhz[1] for row in seen):.0f} MHz"
        told["memory clock"] = f"{median(row.mem_mhz for row in seen):.0f} MHz"
        told["power limit"] = f"{median(row.power_limit_w for row in seen):.0f} W"
    return told | {name: version for name, version in sorted({**device.versions, **run.manifest.versions}.items()) if version}
