"""What is said of all records of some runs, by several processes where the journals are large.

Each process has all records of its share of the layers, so one alone says what is said of a case, of two times beside each other, of a
layer; what is said of all records has to add up. Where a line may be of any layer, and where anything is wrong, one process reads all in
one piece, and says what is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moebench.case import CASE_FIELDS, Case
from moebench.forked import Forked, processes_for
from moebench.journal import (
    Run,
    Stretch,
    is_torn,
    lines_around,
    load_manifest,
    load_run,
    merge,
    merge_records,
    read_at,
    read_some,
    whole_journal,
)
from moebench.lines import reader
from moebench.record import Manifest, Record, RecordError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LOOKED_AT = 256  # lines from all over a journal
ENOUGH = 4  # layers among them for each process; few layers would be few shares, of unlike sizes

# In the order of a merge: a time, the run, and where in the run. Of records that are all in one process: "", the list, the index.
Place = tuple[str, int, int]
Placed = Iterable[tuple[Place, Record]]
T = TypeVar("T")

# The case as record.to_json writes it: its texts of the fields that make a layer are equal where the layers are.
_CASE = re.compile(
    rb'[0-9a-f]{8} \{"case":\{("model":"[^"\\]*"),"num_tokens":\d+,'
    rb'("hidden_size":\d+,"intermediate_size":\d+,"num_experts":\d+,"top_k":\d+,"tp_size":\d+),"tp_rank":\d+,'
    rb'("ep_size":\d+),"ep_rank":\d+,("routing":"[^"\\]*","seed":\d+)\}'
)
CASE = len(b'00000000 {"case":{')
_values = attrgetter(*CASE_FIELDS)
_TEXT = ",".join(f'"{name}":"%s"' if name in ("model", "routing") else f'"{name}":%s' for name in CASE_FIELDS)
_Layer = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run without its records."""

    path: Path
    manifest: Manifest
    number: int  # of records, before a merge
    schemas: tuple[str, ...]  # of those
    torn: bool


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Runs that were read, by whomever."""

    runs: tuple[RunFacts, ...]
    at: Callable[[Iterable[Place]], list[Record]]  # the records at these places, in order


@dataclass(kw_only=True)
class _Share:
    """What one process has read of one run."""

    number: int = 0
    schemas: set[str] = field(default_factory=set)


def made_of(
    paths: Sequence[Path], make: Callable[[Placed], T], *, apart: bool = False, keep: Callable[[list[Run]], list[Run]] = list
) -> tuple[list[T], Whole]:
    """What is made of each share of the records, merged; run by run where they are to stay apart, and then a place says of which it is.

    `keep` is told of runs that are read in one piece. Raises RecordError."""
    with suppress(FileNotFoundError):  # a journal that was there a moment ago
        found = _made_by_several(paths, make, apart)
        if found is not None:
            return found
    made, whole = made_here(keep([load_run(path) for path in paths]), make, apart=apart)
    return [made], whole


def made_here(runs: Sequence[Run], make: Callable[[Placed], T], *, apart: bool = False) -> tuple[T, Whole]:
    """The same of runs that are in memory."""
    merged = [merge([run]) for run in runs] if apart else [merge(runs)]
    facts = [
        RunFacts(
            path=run.path,
            manifest=run.manifest,
            number=len(run.records),
            schemas=tuple(sorted({record.schema for record in run.records})),
            torn=run.torn,
        )
        for run in runs
    ]
    placed = (one for which, records in enumerate(merged) for one in in_memory(records, which))
    return make(placed), Whole(runs=tuple(facts), at=lambda places: [merged[which][index] for _, which, index in sorted(places)])


def in_memory(records: Iterable[Record], which: int = 0) -> Placed:
    """Records that were merged."""
    return ((("", which, index), record) for index, record in enumerate(records))


def _made_by_several(paths: Sequence[Path], make: Callable[[Placed], T], apart: bool) -> tuple[list[T], Whole] | None:
    """None where one process does as well, and where something is wrong, which that one says."""
    manifests = [load_manifest(path) for path in paths]
    journals = [whole_journal(path) for path in paths]  # as they are now: what is appended from here on nobody reads
    processes = processes_for(sum(journal.end for journal in journals))
    if processes < 2:
        return None
    layers = {_layer(line) for journal in journals for line in lines_around(journal, LOOKED_AT)}
    processes = min(processes, len(layers) // ENOUGH)
    if processes < 2 or None in layers:
        return None
    readers: list[Forked] = []
    try:
        for number in range(processes):
            try:
                readers.append(Forked(partial(_read_and_make, journals, number, processes, make, apart)))
            except OSError:
                return None
        found: list[tuple[T, list[_Share]]] = []
        for one in readers:
            try:
                found.append(one.pipe.recv())
            except (EOFError, OSError):
                return None
    finally:
        for one in readers:
            one.end()
    shares = list(zip(*(shares for _, shares in found), strict=True))
    facts = [
        RunFacts(
            path=journal.path,
            manifest=manifest,
            number=sum(share.number for share in shared),
            schemas=tuple(sorted({schema for share in shared for schema in share.schemas})),
            torn=is_torn(journal),
        )
        for journal, manifest, shared in zip(journals, manifests, shares, strict=True)
    ]
    return [made for made, _ in found], Whole(runs=tuple(facts), at=partial(_read_again, paths))


def _read_and_make(
    journals: Sequence[Stretch], number: int, processes: int, make: Callable[[Placed], T], apart: bool, pipe: Connection
) -> None:
    """All processes see all lines, so that they agree about whose each is, and read their own."""
    found: tuple[T, list[_Share]] | None = None
    with suppress(_Replaced):
        shares = [_Share() for _ in journals]
        found = make(_unmerged(_mine(journals, number, processes, shares), apart)), shares
    if found is None:
        shares = [_Share() for _ in journals]
        found = make(_merged(_mine(journals, number, processes, shares), apart)), shares
    pipe.send(found)
    os._exit(0)  # without taking apart what was made


def _mine(journals: Sequence[Stretch], number: int, processes: int, shares: Sequence[_Share]) -> Iterator[tuple[Place, Record, int]]:
    """With a number that equal cases have in common. Raises RecordError where it is not certain that no other process has one of their
    layers."""
    dealer, read = _Dealer(number, processes), reader()
    for which, journal in enumerate(journals):
        share = shares[which]
        for offset, record in read_some(journal, dealer.is_mine, read):
            case = dealer.number_of(record.case)
            share.number += 1
            share.schemas.add(record.schema)
            yield (record.time, which, offset), record, case


def _unmerged(mine: Iterable[tuple[Place, Record, int]], apart: bool) -> Iterator[tuple[Place, Record]]:
    """As long as a merge would leave all as they are, they need not be kept: to keep them takes as long again as to read them.

    Raises _Replaced."""
    seen, latest = _Seen(), 0
    for place, record, case in mine:
        if apart and place[1] != latest:
            seen, latest = _Seen(), place[1]
        seen.add(case, record)
        yield place, record


def _merged(mine: Iterable[tuple[Place, Record, int]], apart: bool) -> Iterator[tuple[Place, Record]]:
    runs: dict[int, list[Record]] = {}
    places: dict[int, Place] = {}  # by identity
    for place, record, _ in mine:
        runs.setdefault(place[1] if apart else 0, []).append(record)
        places[id(record)] = place
    for records in runs.values():
        yield from ((places[id(record)], record) for record in merge_records(records))


class _Dealer:
    """Gives each process the layers that are its, by the text of a line's case alone."""

    def __init__(self, number: int, processes: int) -> None:
        self._number, self._processes = number, processes
        self._order: dict[_Layer, int] = {}
        self._whose: dict[bytes, int] = {}  # text of a case -> process; to look one up takes a tenth of matching it
        self._cases: dict[bytes, tuple[int, Case]] = {}
        self._latest = b""

    def is_mine(self, text: bytes, begin: int) -> bool:
        """Whether the line that begins there is. Raises RecordError where that cannot be said."""
        begin += CASE
        case = text[begin : text.find(b"}", begin)]
        whose = self._whose.get(case)
        if whose is None:
            layer = _layer(text, begin - CASE)
            if layer is None:
                raise RecordError("a line may be of any layer")
            whose = self._whose[case] = self._order.setdefault(layer, len(self._order)) % self._processes
        self._latest = case
        return whose == self._number

    def number_of(self, case: Case) -> int:
        """The same for equal cases. Raises RecordError where the latest line is of another case than its text seems to have: it may have
        two, and then the last one counts."""
        known = self._cases.get(self._latest)
        if known is None:
            known = self._cases[self._latest] = len(self._cases), case
            if _TEXT % _values(case) != self._latest.decode():
                raise RecordError("a line is of another case than it seems")
        elif case is not known[1] and case != known[1]:  # most often it is one object
            raise RecordError("a line is of another case than it seems")
        return known[0]


class _Replaced(Exception):
    """A record takes the place of another."""


class _Seen:
    """Of the records of a merge, what says whether one takes the place of another."""

    def __init__(self) -> None:
        self._contracts: dict[tuple[int, str, str, str, int], tuple[str, ...]] = {}
        self._skipped: set[tuple[int, str, str]] = set()
        self._tried: set[tuple[int, str, str]] = set()

    def add(self, case: int, record: Record) -> None:
        """Raises _Replaced where it does."""
        point, contract = (case, record.backend, record.arch), record.contract_id
        cell = *point, record.scope, record.round
        others = self._contracts.get(cell)
        if others is None:
            self._contracts[cell] = (contract,)
        elif not contract or "" in others or contract in others:
            raise _Replaced
        else:
            self._contracts[cell] = (*others, contract)
        here, there = (self._skipped, self._tried) if record.status == "skipped" else (self._tried, self._skipped)
        here.add(point)
        if point in there:
            raise _Replaced


def _layer(text: bytes, begin: int = 0) -> _Layer | None:
    """Of the line that begins there; None where that is not certain before the whole line was read."""
    found = _CASE.match(text, begin)
    return found.groups() if found else None


def _read_again(paths: Sequence[Path], places: Iterable[Place]) -> list[Record]:
    ordered = sorted(places)
    found = [iter(read_at(path, [offset for _, here, offset in ordered if here == which])) for which, path in enumerate(paths)]
    return [next(found[which]) for _, which, _ in ordered]
