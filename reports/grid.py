"""Grids of measured points: token counts down, backends across, and in one grid only what may be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from moebench.case import MODELS, Case
from moebench.record import ClockName, L2State, Record
from moebench.reports.text import ratio, us

Mark = Literal["", "fastest", "tie"]
Method = tuple[ClockName, L2State | None]

FASTEST = "*"  # where there is no bold
TIE = "~"
DAGGER = "†"
BASELINE = "torch"
CLOCKS: dict[ClockName, str] = {
    "cuda_graph": "CUDA graph replay",
    "cuda_events": "eager calls",
    "wall": "host clock",
    "simulated": "simulated clock",
}
SHORT_CLOCKS: dict[ClockName, str] = {"cuda_graph": "graph", "cuda_events": "eager", "wall": "host", "simulated": "simulated"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One backend at one token count: a record per rank that was timed, and what is known of the ranks that were not."""

    backend: str
    timed: tuple[Record, ...] = ()  # slowest first
    status: str = ""  # of a rank that has no time here, or the method that timed it elsewhere
    num_ranks: int = 1
    mark: Mark = ""

    @property
    def slowest(self) -> Record | None:
        return self.timed[0] if self.timed else None

    @property
    def slowest_us(self) -> float:
        return median_us(self.timed[0])

    @property
    def mean_us(self) -> float:
        return fmean(median_us(record) for record in self.timed)

    @property
    def interval_us(self) -> tuple[float, float]:
        timing = self.timed[0].timing
        assert timing is not None  # timed holds nothing else
        return timing.interval_us

    @property
    def describes_kernel(self) -> bool:
        return all(record.timing is not None and record.timing.comparable for record in self.timed)

    @property
    def counts(self) -> bool:
        """Whether it may be called fastest or stand in a ratio: every rank timed, every time comparable."""
        return len(self.timed) == self.num_ranks and self.describes_kernel

    @property
    def text(self) -> str:
        """What a reader sees, the mark left to the report: `91.2`, `91.2†`, `91.2 (3/4)`, `failed` or nothing."""
        if not self.timed:
            return self.status
        partial = f" ({len(self.timed)}/{self.num_ranks})" if len(self.timed) < self.num_ranks else ""
        return us(self.slowest_us) + ("" if self.describes_kernel else DAGGER) + partial


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What one timing method found in one family."""

    method: Method
    l2_methods: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]  # backend, what its timing says of itself
    backends: tuple[str, ...]
    rows: dict[int, dict[str, Point]]  # num_tokens -> backend -> point, every backend in every row

    @property
    def title(self) -> str:
        return method_name(self.method)

    @property
    def baseline(self) -> str | None:
        """What the others are divided by: the torch reference where it counts, else the first backend that does."""
        able = [name for name in self.backends if any(row[name].counts for row in self.rows.values())]
        return BASELINE if BASELINE in able else able[0] if able else None

    def speed_up(self, num_tokens: int, backend: str) -> str:
        """How many times as fast as the baseline, or nothing where one of the two does not count."""
        row = self.rows[num_tokens]
        if self.baseline is None or not row[self.baseline].counts or not row[backend].counts:
            return ""
        return ratio(row[self.baseline].slowest_us / row[backend].slowest_us)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Records of one device that differ in token count, backend and rank only."""

    case: Case  # num_tokens and ranks are 0
    arch: str
    device: str
    records: tuple[Record, ...]

    @property
    def ranks(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted({_rank(record.case) for record in self.records}))

    @property
    def title(self) -> str:
        case = self.case
        parts = [case.model, f"top_k={case.top_k}", f"ep={case.ep_size}", f"tp={case.tp_size}", case.routing]
        return " ".join([*parts, *([f"seed={case.seed}"] if case.seed else [])])

    @property
    def which_rank(self) -> str:
        """What a cell stands for when the layer is spread over ranks; empty when it is not."""
        if self.case.ep_size * self.case.tp_size == 1:
            return ""
        if len(self.ranks) == 1:
            return f"{rank_name(self.case, *self.ranks[0])} only"
        return f"slowest of {len(self.ranks)} ranks"

    def grids(self) -> list[Grid]:
        """One per timing method that timed anything, in the order they came up."""
        methods = dict.fromkeys(method for r in self.records if (method := _method(r)))
        return [self._grid(method) for method in methods]

    def _grid(self, method: Method) -> Grid:
        here = [r for r in self.records if _method(r) == method]
        backends = tuple(dict.fromkeys(r.backend for r in here))
        return Grid(
            method=method,
            l2_methods=tuple(dict.fromkeys(r.timing.l2_method for r in here if r.timing and r.timing.l2_method)),
            notes=tuple(dict.fromkeys((r.backend, r.timing.note) for r in here if r.timing and r.timing.note)),
            backends=backends,
            rows={tokens: self._row(tokens, backends, here) for tokens in sorted({r.case.num_tokens for r in here})},
        )

    def _row(self, num_tokens: int, backends: Sequence[str], here: Sequence[Record]) -> dict[str, Point]:
        there = [r for r in self.records if r.case.num_tokens == num_tokens]
        num_ranks = len({_rank(r.case) for r in there})
        points = []
        for backend in backends:
            timed = [r for r in here if (r.case.num_tokens, r.backend) == (num_tokens, backend)]
            others = [r for r in there if r.backend == backend and r not in timed]
            points.append(
                Point(
                    backend=backend,
                    timed=tuple(sorted(timed, key=median_us, reverse=True)),
                    status=_why_absent(others[0]) if others else "",
                    num_ranks=num_ranks,
                )
            )
        return {point.backend: point for point in _marked(points)}


def families(records: Iterable[Record]) -> list[Family]:
    """Records by family, models in the order of the presets, then by sizes."""
    found: dict[tuple[Case, str, str], list[Record]] = defaultdict(list)
    for record in records:
        case = replace(record.case, num_tokens=0, ep_rank=0, tp_rank=0)
        found[case, record.arch, record.device].append(record)
    return sorted(
        (Family(case=case, arch=arch, device=device, records=tuple(rows)) for (case, arch, device), rows in found.items()),
        key=_family_order,
    )


def method_name(method: Method) -> str:
    clock, l2 = method
    return CLOCKS[clock] + (f", {l2} L2" if l2 else "")


def median_us(record: Record) -> float:
    assert record.timing is not None  # callers hand over timed records
    return record.timing.median_us


def rank_name(case: Case, tp_rank: int, ep_rank: int) -> str:
    parts = [f"tp rank {tp_rank}"] if case.tp_size > 1 else []
    return ", ".join([*parts, *([f"ep rank {ep_rank}"] if case.ep_size > 1 else [])])


def skipped(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.status == "skipped"]


def not_ok(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.status not in ("ok", "skipped")]


def by_reason(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one status and reason together, the largest group first."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.status, record.reason].append(record)
    return sorted(found.values(), key=len, reverse=True)


def _marked(points: list[Point]) -> list[Point]:
    """The lowest median is fastest; whoever's interval overlaps its interval ties with it. One alone has beaten nobody."""
    able = [point for point in points if point.counts]
    if len(able) < 2:
        return points
    best = min(able, key=lambda point: point.slowest_us)
    low, high = best.interval_us

    def mark(point: Point) -> Mark:
        if point is best:
            return "fastest"
        overlaps = point.counts and point.interval_us[0] <= high and low <= point.interval_us[1]
        return "tie" if overlaps else ""

    return [replace(point, mark=mark(point)) for point in points]


def _method(record: Record) -> Method | None:
    """How its time was taken, if it has one that counts."""
    return (record.timing.clock, record.timing.l2) if record.status == "ok" and record.timing else None


def _why_absent(record: Record) -> str:
    return record.status if record.status != "ok" or record.timing is None else SHORT_CLOCKS[record.timing.clock]


def _rank(case: Case) -> tuple[int, int]:
    return case.tp_rank, case.ep_rank


def _family_order(family: Family) -> tuple[str, str, int, int, int, int, str, int]:
    case = family.case
    model = list(MODELS).index(case.model)
    return family.arch, family.device, model, case.top_k, case.ep_size, case.tp_size, case.routing, case.seed
