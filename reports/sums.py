"""Sums of what records say, which two processes can each make of their share and then join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite, isnan
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from moebench.case import Case
from moebench.parts import Place
from moebench.record import Error, Telemetry


class Joins(Protocol):
    """What two shares of the records say, as what both say."""

    def join(self, other: Self, /) -> None: ...


class JoinsInOrder(Joins, Protocol):
    first: Place


K = TypeVar("K")
J = TypeVar("J", bound=Joins)
InOrder = TypeVar("InOrder", bound=JoinsInOrder)
T = TypeVar("T")


class Sums(dict[K, J]):
    """By what the records have in common."""

    def add(self, key: K, value: J) -> None:
        if key in self:
            self[key].join(value)
        else:
            self[key] = value

    def join(self, other: Sums[K, J]) -> None:
        for key, value in other.items():
            self.add(key, value)


class Ordered(Sums[K, InOrder]):
    """In the order in which they come up."""

    def in_order(self) -> list[tuple[K, InOrder]]:
        return sorted(self.items(), key=lambda item: item[1].first)


@dataclass(slots=True)
class Group(Generic[T]):
    """How many records, and what is shown of the first."""

    first: Place
    such_as: T
    number: int = 1

    def join(self, other: Group[T]) -> None:
        self.number += other.number
        if other.first < self.first:
            self.first, self.such_as = other.first, other.such_as


class Groups(Ordered[K, Group[T]]):
    """Records counted."""

    def largest_first(self) -> list[tuple[K, Group[T]]]:
        return sorted(self.in_order(), key=lambda item: -item[1].number)


@dataclass(kw_only=True)
class Firsts(Generic[T]):
    """The first of many, and how many there are."""

    most: int
    number: int = 0
    _kept: list[tuple[Place, T]] = field(default_factory=list)

    def add(self, place: Place, told: Callable[[], T]) -> None:
        self.number += 1
        kept = self._kept
        if len(kept) >= self.most and place > kept[-1][0]:
            return
        kept.append((place, told()))
        if len(kept) > 1 and place < kept[-2][0]:  # most come in order
            kept.sort(key=_place)
        del kept[self.most :]

    def join(self, other: Firsts[T]) -> None:
        self.number += other.number
        self._kept = sorted([*self._kept, *other._kept], key=_place)[: self.most]

    @property
    def shown(self) -> list[T]:
        return [told for _, told in self._kept]


@dataclass(kw_only=True)
class Excuse:
    """Rows without a time, all for one reason."""

    first: Place
    case: Case  # of the first
    number: int = 1
    backends: dict[str, Place] = field(default_factory=dict)

    def join(self, other: Excuse) -> None:
        self.number += other.number
        if other.first < self.first:
            self.first, self.case = other.first, other.case
        _earliest(self.backends, other.backends)

    @property
    def names(self) -> list[str]:
        return sorted(self.backends, key=self.backends.__getitem__)


class Farthest(NamedTuple):
    """The largest of some errors, and where it was; the first of equal ones."""

    value: float
    place: Place
    error: Error
    case: Case


@dataclass(slots=True)
class Errors:
    """Of one backend, activation format and architecture."""

    first: Place
    rel_l2: Farthest
    worst: Farthest
    number: int = 1

    @staticmethod
    def of(place: Place, error: Error, case: Case) -> Errors:
        return Errors(place, Farthest(error.rel_l2, place, error, case), Farthest(error.worst, place, error, case))

    def count(self, place: Place, error: Error, case: Case) -> None:
        """As join, without an object for each record."""
        rel_l2, worst = self.rel_l2, self.worst
        if error.rel_l2 <= rel_l2.value and error.worst <= worst.value and place > rel_l2.place and place > worst.place:
            self.number += 1  # neither is farther, and most records are of this kind
        else:
            self.join(Errors.of(place, error, case))

    def join(self, other: Errors) -> None:
        self.first = min(self.first, other.first)
        self.number += other.number
        self.rel_l2 = _farther(self.rel_l2, other.rel_l2)
        self.worst = _farther(self.worst, other.worst)


@dataclass(slots=True)
class Shares:
    """A backend's errors as shares of their tolerances; those that would be drawn at one place are kept once."""

    number: int = 0
    above: int = 0  # that are not at most 1
    largest: float = -inf  # NaN is larger than all
    rel_l2: dict[str, float] = field(default_factory=dict)  # by its text of two digits
    worst: dict[str, float] = field(default_factory=dict)

    def count(self, error: Error) -> None:
        self._count(error.rel_l2 / error.rel_l2_tolerance, self.rel_l2)
        self._count(error.worst / error.worst_tolerance, self.worst)

    def _count(self, share: float, marks: dict[str, float]) -> None:
        self.number += 1
        if not share <= self.largest:
            self.largest = _larger(self.largest, share)
        if not share <= 1:
            self.above += 1
        if 0 < share < inf:  # what a logarithmic axis can show
            text = f"{share:.1e}"
            known = marks.get(text)
            if known is None or share < known:
                marks[text] = share

    def join(self, other: Shares) -> None:
        self.number += other.number
        self.above += other.above
        self.largest = _larger(self.largest, other.largest)
        for mine, theirs in ((self.rel_l2, other.rel_l2), (self.worst, other.worst)):
            for text, value in theirs.items():
                mine[text] = min(mine.get(text, value), value)


@dataclass(slots=True)
class Span:
    """Lowest and highest."""

    low: float
    high: float

    def count(self, value: float) -> None:
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def join(self, other: Span) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class Sensors:
    """What a GPU's sensors said over the rows of a backend."""

    first: Place
    power_limit_w: float  # of the first
    sm_mhz: Span
    max_sm_mhz: Span
    power_w: Span
    temperature_c: Span
    reasons: dict[str, Place]
    number: int = 0

    @staticmethod
    def of(place: Place, seen: Telemetry) -> Sensors:
        sm_mhz, max_sm_mhz, power_w, temperature_c = (
            Span(value, value) for value in (seen.sm_mhz[0], seen.max_sm_mhz, seen.power_w, seen.temperature_c)
        )
        return Sensors(place, seen.power_limit_w, sm_mhz, max_sm_mhz, power_w, temperature_c, {})

    def count(self, place: Place, seen: Telemetry) -> None:
        self.number += 1
        if place < self.first:
            self.first, self.power_limit_w = place, seen.power_limit_w
        self.sm_mhz.count(seen.sm_mhz[0])
        self.sm_mhz.count(seen.sm_mhz[2])
        self.max_sm_mhz.count(seen.max_sm_mhz)
        self.power_w.count(seen.power_w)
        self.temperature_c.count(seen.temperature_c)
        for reason, share in seen.reasons.items():
            if share and (reason not in self.reasons or place < self.reasons[reason]):
                self.reasons[reason] = place

    def join(self, other: Sensors) -> None:
        self.number += other.number
        if other.first < self.first:
            self.first, self.power_limit_w = other.first, other.power_limit_w
        self.sm_mhz.join(other.sm_mhz)
        self.max_sm_mhz.join(other.max_sm_mhz)
        self.power_w.join(other.power_w)
        self.temperature_c.join(other.temperature_c)
        _earliest(self.reasons, other.reasons)

    @property
    def names(self) -> list[str]:
        """Of the clock event reasons."""
        return sorted(self.reasons, key=self.reasons.__getitem__)


NS = 1_000_000_000


@dataclass(slots=True)
class Phase:
    """How long one took, in whole nanoseconds: their sum is the same in whatever order they are added."""

    first: tuple[Place, int]  # with its number in that record
    ns: int


@dataclass(slots=True)
class Spent:
    """The time that the workers of a backend spent, by phase."""

    first: Place
    phases: dict[str, Phase] = field(default_factory=dict)

    def count(self, place: Place, phases_s: dict[str, float]) -> None:
        if place < self.first:
            self.first = place
        for number, (name, spent_s) in enumerate(phases_s.items()):
            self._add(name, (place, number), round(spent_s * NS) if isfinite(spent_s) else 0)

    def join(self, other: Spent) -> None:
        self.first = min(self.first, other.first)
        for name, phase in other.phases.items():
            self._add(name, phase.first, phase.ns)

    def _add(self, name: str, first: tuple[Place, int], ns: int) -> None:
        known = self.phases.get(name)
        if known is None:
            self.phases[name] = Phase(first, ns)
            return
        known.ns += ns
        if first < known.first:
            known.first = first

    @property
    def phases_s(self) -> dict[str, float]:
        """In the order in which they come up."""
        return {name: phase.ns / NS for name, phase in sorted(self.phases.items(), key=lambda item: item[1].first)}


def _place(one: tuple[Place, object]) -> Place:
    return one[0]


def _earliest(mine: dict[str, Place], theirs: dict[str, Place]) -> None:
    for name, place in theirs.items():
        if name not in mine or place < mine[name]:
            mine[name] = place


def _larger(one: float, other: float) -> float:
    """NaN is larger than all."""
    return other if isnan(other) or other > one else one


def _farther(one: Farthest, other: Farthest) -> Farthest:
    a, b = isnan(one.value), isnan(other.value)
    if a != b:
        return one if a else other
    if a or one.value == other.value:
        return one if one.place < other.place else other
    return one if one.value > other.value else other
