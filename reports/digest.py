"""What a page says of all records together, and which of them it shows one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from moebench.case import Case
from moebench.journal import Run
from moebench.parts import Place, Placed, RunFacts, Whole, in_memory, made_here
from moebench.record import Contract, Record
from moebench.reports.layers import Layers, Shown, Standings, by_layer
from moebench.reports.ran import facts_text, kernels_text
from moebench.reports.sums import Errors, Excuse, Firsts, Group, Groups, Ordered, Sensors, Shares, Spent, Sums
from moebench.reports.tuning import Setbacks

MOST_LINES = 200  # of a table that lists rows or reasons one by one
MOST_ROWS = 3000  # of the table of all rows: 2.4 MB, which a browser lays out within a second


class Doubted(NamedTuple):
    """A row with a flag, and what the flag says of it."""

    backend: str
    case: Case
    median_us: float | None
    sentence: str


class NotOk(NamedTuple):
    """A row with which something went wrong."""

    status: str
    backend: str
    case: Case
    arch: str
    reason: str


class Meaning(NamedTuple):
    """Of a time; the contract is None where schema 1.0 wrote it."""

    contract: Contract | None
    clock: str
    l2: str


@dataclass(kw_only=True)
class Digest:
    """Of a share of the records, or of all."""

    number: int = 0
    doubted: int = 0  # with a flag
    timed: int = 0
    checked: int = 0  # timed under a contract, so that doubts were looked for
    repeated: int = 0  # of another round than the first
    statuses: Groups[str, None] = field(default_factory=Groups)
    models: Groups[str, None] = field(default_factory=Groups)
    devices: Groups[str, None] = field(default_factory=Groups)
    backends: Groups[str, None] = field(default_factory=Groups)
    excuses: Ordered[tuple[str, str], Excuse] = field(default_factory=Ordered)  # by status and reason
    not_ok: Firsts[NotOk] = field(default_factory=lambda: Firsts(most=MOST_LINES))
    flags: Groups[str, None] = field(default_factory=Groups)
    doubts: Sums[str, Firsts[Doubted]] = field(default_factory=Sums)  # by flag
    launched: Groups[tuple[str, str, str], Case] = field(default_factory=Groups)  # by backend, arch, text
    said: Groups[tuple[str, str, str], Case] = field(default_factory=Groups)
    contracts: Groups[str, Meaning] = field(default_factory=Groups)
    roofs: Groups[tuple[str, float, float, str, str], None] = field(default_factory=Groups)  # device, byte/s, FLOP/s, activations, source
    errors: Ordered[tuple[str, str, str], Errors] = field(default_factory=Ordered)  # by backend, activations, arch
    shares: Sums[str, Shares] = field(default_factory=Sums)  # by backend
    sensors: Ordered[str, Sensors] = field(default_factory=Ordered)  # by backend
    spent: Ordered[str, Spent] = field(default_factory=Ordered)
    rows: Firsts[Place] = field(default_factory=lambda: Firsts(most=MOST_ROWS))
    shown: Shown = field(default_factory=Shown)
    standings: Standings = field(default_factory=Standings)
    setbacks: Setbacks = field(default_factory=lambda: Setbacks(most=MOST_LINES))

    def without_result(self, *, skipped: bool) -> list[tuple[tuple[str, str], Excuse]]:
        """By reason, the commonest first: of rows that were skipped, or of those with which something went wrong."""
        found = [(key, excuse) for key, excuse in self.excuses.in_order() if (key[0] == "skipped") == skipped]
        return sorted(found, key=lambda item: -item[1].number)

    def join(self, other: Digest) -> None:
        """With one that has none of its layers."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, int):
                setattr(self, one.name, mine + theirs)
            else:
                mine.join(theirs)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All that a page is made from."""

    digest: Digest
    layers: Layers
    runs: tuple[RunFacts, ...]
    _whole: Whole

    def rows(self) -> list[Record]:
        """The first of all."""
        return self._whole.at(self.digest.rows.shown)


def overview(parts: Sequence[Digest], whole: Whole) -> Overview:
    """Of all shares of the records. The first of them becomes the sum."""
    total, *others = parts
    for part in others:
        total.join(part)
    return Overview(digest=total, layers=total.shown.layers(whole.at, total.standings), runs=whole.runs, _whole=whole)


def overview_of(runs: Sequence[Run]) -> Overview:
    """Of runs in memory, merged."""
    made, whole = made_here(runs, digest)
    return overview([made], whole)


def overview_of_records(records: Sequence[Record]) -> Overview:
    """Of records that were merged."""
    whole = Whole(runs=(), at=lambda places: [records[index] for _, _, index in sorted(places)])
    return overview([digest(in_memory(records))], whole)


def digest(placed: Placed) -> Digest:
    """Of records, where no others have one of their layers."""
    found = Digest()
    kinds: dict[tuple[object, ...], _Kind] = {}

    def counted() -> Placed:
        for place, record in placed:
            _count(found, place, record, kinds)
            yield place, record

    for layer in by_layer(counted()):
        found.shown.add(layer)
        found.standings.add(layer)
        found.setbacks.add(layer)
    for kind in kinds.values():
        _add_kind(found, kind)
    return found


@dataclass(slots=True)
class _Kind:
    """Records that differ in nothing that is counted: thousands of them, as they share their kernels and facts."""

    anchor: Record  # keeps what the key has the identity of
    first: Place
    case: Case  # of the first
    number: int = 0


def _key(record: Record) -> tuple[object, ...]:
    roofline, timing = record.roofline, record.timing
    return (
        record.status,
        record.case.model,
        record.backend,
        record.act_dtype,
        record.arch,
        record.device,
        id(record.contract) if record.contract else record.contract_id,
        record.round != 0,
        timing is None,
        id(record.kernels),
        id(record.facts),
        roofline and (roofline.bandwidth_bytes_s, roofline.flop_s, roofline.source),
    )


def _count(found: Digest, place: Place, record: Record, kinds: dict[tuple[object, ...], _Kind]) -> None:
    """What differs from record to record at once, what they have in common by kind."""
    key = _key(record)
    kind = kinds.get(key)
    if kind is None:
        kind = kinds[key] = _Kind(record, place, record.case)
    elif place < kind.first:
        kind.first, kind.case = place, record.case
    kind.number += 1
    found.rows.add(place, lambda: place)
    if record.flags:
        _count_flags(found, place, record)
    if record.status != "ok":
        _count_excuse(found, place, record)
    backend, error, telemetry = record.backend, record.error, record.telemetry
    if error is not None:
        whose = backend, record.act_dtype, record.arch
        if whose in found.errors:
            found.errors[whose].count(place, error, record.case)
        else:
            found.errors[whose] = Errors.of(place, error, record.case)
        if error.rel_l2_tolerance > 0 and error.worst_tolerance > 0:
            if backend not in found.shares:
                found.shares[backend] = Shares()
            found.shares[backend].count(error)
    if telemetry is not None and record.timing is not None:
        if backend not in found.sensors:
            found.sensors[backend] = Sensors.of(place, telemetry)
        found.sensors[backend].count(place, telemetry)
    if record.phases_s:
        spent = found.spent.get(backend)
        if spent is None:
            spent = found.spent[backend] = Spent(place)
        spent.count(place, record.phases_s)


def _count_flags(found: Digest, place: Place, record: Record) -> None:
    found.doubted += 1
    for flag, sentence in record.flags.items():
        found.flags.add(flag, Group(place, None))
        if flag not in found.doubts:
            found.doubts[flag] = Firsts(most=MOST_LINES)
        row = Doubted(record.backend, record.case, record.median_us, sentence)
        found.doubts[flag].add(place, lambda row=row: row)  # type: ignore[misc]


def _count_excuse(found: Digest, place: Place, record: Record) -> None:
    found.excuses.add((record.status, record.reason), Excuse(first=place, case=record.case, backends={record.backend: place}))
    if record.status != "skipped":
        found.not_ok.add(place, lambda: NotOk(record.status, record.backend, record.case, record.arch, record.reason))


def _add_kind(found: Digest, kind: _Kind) -> None:
    record, first, number, case = kind.anchor, kind.first, kind.number, kind.case
    found.number += number
    found.repeated += number * (record.round != 0)
    found.statuses.add(record.status, Group(first, None, number))
    found.models.add(case.model, Group(first, None, number))
    found.devices.add(record.device, Group(first, None, number))
    found.backends.add(record.backend, Group(first, None, number))
    if record.kernels:
        found.launched.add((record.backend, record.arch, kernels_text(record.kernels)), Group(first, case, number))
    if record.facts:
        found.said.add((record.backend, record.arch, facts_text(record.facts)), Group(first, case, number))
    if (timing := record.timing) is not None:
        found.timed += number
        found.checked += number * (record.contract is not None)
        found.contracts.add(record.contract_id, Group(first, Meaning(record.contract, timing.clock, str(timing.l2)), number))
    if (roofline := record.roofline) is not None:
        roofs = record.device, roofline.bandwidth_bytes_s, roofline.flop_s, record.act_dtype, roofline.source
        found.roofs.add(roofs, Group(first, None, number))
