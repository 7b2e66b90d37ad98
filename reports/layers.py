"""Which layers a report shows one by one, and what all of them say together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import median
from typing import NamedTuple

from moebench.case import Case, layer_of
from moebench.parts import Place, Placed
from moebench.record import ClockName, L2State, Record, Scope
from moebench.reports.grid import Family, families, layer_name, layer_order, method_name

MOST_LAYERS = 60  # of 15 token counts and 6 backends: 5400 rows, and more tables than anybody reads
UNITS = 10**15  # of a logarithm of 1
WHERE_ALL_ARE = "results.csv of a run's directory, and moebench report --format csv or json, have every row"

Order = tuple[tuple[str, str, int, int, int, int, str, int], Place]  # of layers, then of rows in one


class TimedRow(NamedTuple):
    """A row with a time that describes the kernel."""

    place: Place
    backend: str
    case: Case
    round: int
    median_us: float
    scope: Scope  # from here on what is the same of times that are compared
    contract_id: str
    act_dtype: str
    clock: ClockName
    l2: L2State | None
    num_tokens: int

    @property
    def means(self) -> tuple[object, ...]:
        return self[5:]


@dataclass(kw_only=True)
class Layer:
    """Where the records of a family are, and those of its times that can be compared."""

    case: Case  # num_tokens and ranks are 0
    arch: str
    device: str
    timed: bool = False
    places: list[Place] = field(default_factory=list)
    rows: list[TimedRow] = field(default_factory=list)
    ranks: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))  # by num_tokens

    def add(self, place: Place, record: Record) -> None:
        timing, case = record.timing, record.case
        self.places.append(place)
        self.ranks[case.num_tokens].add((case.tp_rank, case.ep_rank))
        if record.status != "ok" or timing is None:
            return
        self.timed = True
        if timing.comparable:
            means = record.scope, record.contract_id, record.act_dtype, timing.clock, timing.l2, case.num_tokens
            self.rows.append(TimedRow(place, record.backend, case, record.round, timing.median_us, *means))


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Families in which something was timed, in the order of reports."""

    shown: tuple[Family, ...]
    number: int  # shown or not
    standings: tuple[Standing, ...]  # over all of them

    @property
    def note(self) -> str:
        """What is left out, and where it is; empty where nothing is."""
        if len(self.shown) == self.number:
            return ""
        return f"{self.number} layers were timed. One by one the first {len(self.shown)} are shown, lowest seeds first; {WHERE_ALL_ARE}."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One backend over all layers that differ in routing and seed only, under one contract, among those of its activation format."""

    layer: str
    device: str
    how: str
    backend: str
    compared: int  # layers and token counts at which it and another have a time that counts
    fastest: int  # of those, where its median is the lowest
    mean_ratio: float  # of its median to the lowest, geometric

    @property
    def share(self) -> float:
        return self.fastest / self.compared


@dataclass(kw_only=True)
class Shown:
    """The layers of lowest seeds, with where their records are."""

    most: int = MOST_LAYERS
    number: int = 0
    _kept: list[tuple[int, Order, Layer]] = field(default_factory=list)

    def add(self, layer: Layer) -> None:
        """Nothing where nothing was timed."""
        if layer.timed:
            without_rows = Layer(case=layer.case, arch=layer.arch, device=layer.device, places=layer.places)
            self.join(Shown(number=1, _kept=[(layer.case.seed, _order(layer), without_rows)]))

    def join(self, other: Shown) -> None:
        self.number += other.number
        self._kept = sorted([*self._kept, *other._kept], key=lambda one: one[:2])[: self.most]

    def layers(self, at: Callable[[Iterable[Place]], Sequence[Record]], standings: Standings) -> Layers:
        """With their records."""
        kept = sorted(self._kept, key=lambda one: one[1])
        found = families(at(place for _, _, layer in kept for place in layer.places))
        return Layers(shown=tuple(found), number=self.number, standings=tuple(standings.all()))


@dataclass(kw_only=True)
class _Tally:
    compared: int = 0
    fastest: int = 0
    logs: int = 0  # sum of those of the ratios, in 1 / UNITS: whole numbers have one sum in whatever order they are added


@dataclass(kw_only=True)
class _Table:
    first: Order
    backends: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))


_Name = tuple[str, str, str, str, str, str]  # layer, device, scope, contract, activations, how


@dataclass(kw_only=True)
class Standings:
    """Of medians alone, since intervals of 100 000 rows take 2 s: near ties count as won."""

    tables: dict[_Name, _Table] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        name, among = layer_name(replace(layer.case, routing="uniform", seed=0)), layer_order(layer.case, layer.arch, layer.device)
        for (first, scope, contract_id, act_dtype, how), row in _times_us(layer):
            lowest = min(row.values())
            if len(row) < 2 or lowest <= 0:
                continue
            key = name, layer.device, scope, contract_id, act_dtype, how
            table = self.tables.get(key)
            if table is None:
                table = self.tables[key] = _Table(first=(among, first))
            elif (among, first) < table.first:
                table.first = among, first
            for backend, time_us in row.items():
                tally = table.backends[backend]
                tally.compared += 1
                tally.fastest += time_us == lowest
                tally.logs += round(log(time_us / lowest) * UNITS)

    def join(self, other: Standings) -> None:
        for key, theirs in other.tables.items():
            mine = self.tables.setdefault(key, _Table(first=theirs.first))
            mine.first = min(mine.first, theirs.first)
            for backend, tally in theirs.backends.items():
                mine.backends[backend].compared += tally.compared
                mine.backends[backend].fastest += tally.fastest
                mine.backends[backend].logs += tally.logs

    def all(self) -> list[Standing]:
        """Tables in the order of their layers, in each the lowest mean first."""
        formats = {key[4] for key in self.tables}
        return [
            Standing(
                layer=layer,
                device=device,
                how=f"{how}{', whole layer' if scope == 'layer' else ''}{f', {act_dtype} activations' if len(formats) > 1 else ''}",
                backend=backend,
                compared=tally.compared,
                fastest=tally.fastest,
                mean_ratio=exp(tally.logs / UNITS / tally.compared),
            )
            for (layer, device, scope, _, act_dtype, how), table in sorted(self.tables.items(), key=lambda item: item[1].first)
            for backend, tally in sorted(table.backends.items(), key=lambda item: (item[1].logs / item[1].compared, item[0]))
        ]


def by_layer(placed: Placed) -> list[Layer]:
    found: dict[tuple[object, ...], Layer] = {}
    blanks: dict[int, tuple[Case, tuple[object, ...]]] = {}  # by the identity of a case, beside it, which keeps another from having that
    for place, record in placed:
        case = record.case
        known = blanks.get(id(case))
        if known is None:
            known = blanks[id(case)] = case, layer_of(case)
        key = known[1], record.arch, record.device
        layer = found.get(key)
        if layer is None:
            blank = replace(case, num_tokens=0, ep_rank=0, tp_rank=0)
            layer = found[key] = Layer(case=blank, arch=record.arch, device=record.device)
        layer.add(place, record)
    return list(found.values())


def _order(layer: Layer) -> Order:
    return layer_order(layer.case, layer.arch, layer.device), min(layer.places)


def _times_us(layer: Layer) -> Iterable[tuple[tuple[Place, str, str, str, str], dict[str, float]]]:
    """What each backend of a format took at each token count under each contract: the slowest rank, where every rank counts."""
    cells: dict[tuple[object, ...], list[TimedRow]] = {}
    for row in layer.rows:
        cells.setdefault(row.means, []).append(row)
    num_ranks = max(map(len, layer.ranks.values()))
    for rows in cells.values():
        by_rank: dict[tuple[str, int, int], list[float]] = {}
        for row in rows:
            by_rank.setdefault((row.backend, row.case.tp_rank, row.case.ep_rank), []).append(row.median_us)
        slowest: dict[str, list[float]] = {}
        for (backend, _, _), rounds in by_rank.items():
            slowest.setdefault(backend, []).append(_median(rounds))
        whole = {backend: max(ranks) for backend, ranks in slowest.items() if len(ranks) == num_ranks}
        if whole:
            first = rows[0]
            place = min(row.place for row in rows)
            yield (place, first.scope, first.contract_id, first.act_dtype, method_name((first.clock, first.l2))), whole


def _median(rounds: Sequence[float]) -> float:
    """Most runs have one round, and statistics.median takes 1 us for it."""
    return rounds[0] if len(rounds) == 1 else median(rounds)
