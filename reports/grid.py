"""Grids of measured points: token counts down, backends across, and in one grid only what may be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Literal

from moebench.case import MODELS, Case, layer_of
from moebench.record import ClockName, Contract, L2State, Record, Roofline, Scope, Timing
from moebench.reports.text import clean, ratio, us

Mark = Literal["", "fastest", "tie"]
Method = tuple[ClockName, L2State | None]

FASTEST = "*"  # where there is no bold
TIE = "~"
DAGGER = "†"
FLAGGED = "!"
BASELINE = "torch"
CLOCKS: dict[ClockName, str] = {
    "cuda_graph": "CUDA graph replay",
    "cuda_events": "eager calls",
    "wall": "host clock",
    "simulated": "simulated clock",
}
SHORT_CLOCKS: dict[ClockName, str] = {"cuda_graph": "graph", "cuda_events": "eager", "wall": "host", "simulated": "simulated"}
ROUNDS_FOR_AN_INTERVAL = 6  # fewer medians have no 95 % interval of order statistics: 1 - 2 * 0.5 ** 6 = 0.97


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What one backend took for one case: a record per round."""

    rounds: tuple[Record, ...]

    @property
    def case(self) -> Case:
        return self.rounds[0].case

    @cached_property  # asked for about 20 times a page
    def median_us(self) -> float:
        """The median of the rounds' medians."""
        return median(median_us(record) for record in self.rounds)

    @cached_property
    def interval_us(self) -> tuple[float, float]:
        """95 % interval: of the samples of a single round, and of the rounds' medians from six on. With two to five rounds it reaches
        from the lowest to the highest end of theirs."""
        if len(self.rounds) >= ROUNDS_FOR_AN_INTERVAL:
            medians = tuple(median_us(record) for record in self.rounds)
            return replace(_timing(self.rounds[0]), samples_us=medians).interval_us
        ends = [_timing(record).interval_us for record in self.rounds]
        return min(low for low, _ in ends), max(high for _, high in ends)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One backend at one token count: what each rank took, and what is known of the ranks that were not timed.

    What is computed is kept: a page asks for `counts` about 30 times a point."""

    backend: str
    timed: tuple[Timed, ...] = ()  # a rank each, slowest first
    status: str = ""  # of a rank that has no time here, or the method that timed it elsewhere
    num_ranks: int = 1
    mark: Mark = ""

    @property
    def slowest(self) -> Timed | None:
        return self.timed[0] if self.timed else None

    @property
    def slowest_us(self) -> float:
        return self.timed[0].median_us

    @cached_property
    def mean_us(self) -> float:
        return fmean(rank.median_us for rank in self.timed)

    @property
    def interval_us(self) -> tuple[float, float]:
        return self.timed[0].interval_us

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for rank in self.timed for record in rank.rounds)

    @cached_property
    def describes_kernel(self) -> bool:
        return all(_timing(record).comparable for record in self.records)

    @cached_property
    def flags(self) -> dict[str, str]:
        """Of all its records: flag -> the first sentence."""
        found: dict[str, str] = {}
        for record in self.records:
            found = record.flags | found
        return found

    @property
    def stages_us(self) -> dict[str, float]:
        """Of the slowest rank's first round; empty where stages were not timed."""
        return _timing(self.timed[0].rounds[0]).stages_us if self.timed else {}

    @cached_property
    def roofline(self) -> Roofline | None:
        """Of the slowest rank, where its time describes the kernel."""
        return self.timed[0].rounds[0].roofline if self.timed and self.describes_kernel else None

    @cached_property
    def roof_share(self) -> float | None:
        """Of the time that the roofs allow at least, over the measured one; 1.0 is perfect."""
        return self.roofline.floor_us / self.slowest_us if self.roofline and self.slowest_us else None

    @cached_property
    def counts(self) -> bool:
        """Whether it may be called fastest or stand in a ratio: every rank timed, every time comparable."""
        return len(self.timed) == self.num_ranks and self.describes_kernel

    @property
    def text(self) -> str:
        """What a reader sees, the mark left to the report: `91.2`, `91.2†`, `91.2!`, `91.2 (3/4)`, `failed` or nothing."""
        if not self.timed:
            return self.status
        partial = f" ({len(self.timed)}/{self.num_ranks})" if len(self.timed) < self.num_ranks else ""
        return us(self.slowest_us) + ("" if self.describes_kernel else DAGGER) + (FLAGGED if self.flags else "") + partial


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What was found in one family under one contract, of backends with one activation format: the others compute something else."""

    scope: Scope
    act_dtype: str  # empty where the family has one format only
    method: Method
    contract_id: str
    contract: Contract | None  # None for schema 1.0, which had none
    differs: str  # from the other grids of the family, where the title does not tell them apart
    l2_methods: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]  # backend, what its timing says of itself
    backends: tuple[str, ...]
    rows: dict[int, dict[str, Point]]  # num_tokens -> backend -> point, every backend in every row

    @property
    def title(self) -> str:
        whole = ", whole layer from router logits" if self.scope == "layer" else ""
        format_ = f", {clean(self.act_dtype)} activations" if self.act_dtype else ""
        return method_name(self.method) + whole + format_ + (f" ({self.differs})" if self.differs else "")

    def base(self, wanted: str | None = None) -> str | None:
        """What the others are divided by: the wanted one, else the torch reference, where they count, else what counts at the most token
        counts, the first of these: one that holds few tokens would leave the others without a ratio."""
        able = self._able
        return next((name for name in (wanted, BASELINE) if name in able), next(iter(able), None))

    @cached_property
    def _able(self) -> tuple[str, ...]:
        """Backends that count somewhere, at the most token counts first."""
        counted = {name: sum(row[name].counts for row in self.rows.values()) for name in self.backends}
        return tuple(sorted((name for name in self.backends if counted[name]), key=lambda name: -counted[name]))

    def times_as_fast(self, num_tokens: int, backend: str, wanted: str | None = None) -> float | None:
        """As the baseline, or None where one of the two does not count."""
        row, base = self.rows[num_tokens], self.base(wanted)
        if base is None or not row[base].counts or not row[backend].counts or not row[backend].slowest_us:
            return None
        return row[base].slowest_us / row[backend].slowest_us

    def speed_up(self, num_tokens: int, backend: str, wanted: str | None = None) -> str:
        """times_as_fast as text, empty where there is nothing to divide."""
        value = self.times_as_fast(num_tokens, backend, wanted)
        return "" if value is None else ratio(value)

    @property
    def points(self) -> list[Point]:
        return [point for row in self.rows.values() for point in row.values()]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Records of one device that differ in token count, backend, rank and round only."""

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
    def name(self) -> str:
        return layer_name(self.case)

    @property
    def which_rank(self) -> str:
        """What a cell stands for when the layer is spread over ranks; empty when it is not."""
        if self.case.ep_size * self.case.tp_size == 1:
            return ""
        if len(self.ranks) == 1:
            return f"{rank_name(self.case, *self.ranks[0])} only"
        return f"slowest of {self.num_ranks} ranks" if self.num_ranks > 1 else "one rank, not the same at every token count"

    @property
    def num_ranks(self) -> int:
        """Ranks that a token count has at most: where one has fewer, ranks are missing."""
        found: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for record in self.records:
            found[record.case.num_tokens].add(_rank(record.case))
        return max(map(len, found.values()))

    def grids(self) -> list[Grid]:
        """One per scope, contract and activation format that timed anything, in the order they came up."""
        terms: dict[tuple[Scope, str, str], list[Record]] = defaultdict(list)
        for record in self.records:
            if record.status == "ok" and record.timing:
                terms[record.scope, record.contract_id, record.act_dtype].append(record)
        num_ranks, formats = self.num_ranks, {act_dtype for _, _, act_dtype in terms}
        found = [self._grid(here, num_ranks, len(formats) > 1) for here in terms.values()]
        titles = [grid.title for grid in found]
        return [replace(grid, differs=_difference(grid, found)) if titles.count(grid.title) > 1 else grid for grid in found]

    def _grid(self, here: list[Record], num_ranks: int, many_formats: bool) -> Grid:
        first, timings = here[0], [_timing(record) for record in here]
        backends = tuple(dict.fromkeys(r.backend for r in here))
        rows: dict[int, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in here:
            rows[record.case.num_tokens][record.backend].append(record)
        there: dict[int, list[Record]] = defaultdict(list)
        for record in self.records:
            there[record.case.num_tokens].append(record)
        return Grid(
            scope=first.scope,
            act_dtype=first.act_dtype if many_formats else "",
            method=(timings[0].clock, timings[0].l2),
            contract_id=first.contract_id,
            contract=first.contract,
            differs="",
            l2_methods=tuple(dict.fromkeys(timing.l2_method for timing in timings if timing.l2_method)),
            notes=tuple(dict.fromkeys((r.backend, note) for r in here if (note := _timing(r).note))),
            backends=backends,
            rows={tokens: _row(backends, rows[tokens], there[tokens], num_ranks) for tokens in sorted(rows)},
        )


def families(records: Iterable[Record]) -> list[Family]:
    """Records by family, in the order of layers."""
    found: dict[tuple[Case, str, str], list[Record]] = defaultdict(list)
    blanks: dict[tuple[str | int, ...], Case] = {}
    for record in records:
        layer = layer_of(record.case)
        if layer not in blanks:
            blanks[layer] = replace(record.case, num_tokens=0, ep_rank=0, tp_rank=0)
        found[blanks[layer], record.arch, record.device].append(record)
    return sorted(
        (Family(case=case, arch=arch, device=device, records=tuple(rows)) for (case, arch, device), rows in found.items()),
        key=lambda family: layer_order(family.case, family.arch, family.device),
    )


def layer_name(case: Case) -> str:
    """What differs from a plain layer of this model: `gpt-oss-20b` or `gpt-oss-20b EP 4 zipf:1.2`."""
    parts = [case.model]
    parts += [f"top_k={case.top_k}"] if case.top_k != MODELS[case.model].top_k else []
    parts += [f"EP {case.ep_size}"] if case.ep_size > 1 else []
    parts += [f"TP {case.tp_size}"] if case.tp_size > 1 else []
    parts += [case.routing] if case.routing != "uniform" else []
    parts += [f"seed={case.seed}"] if case.seed else []
    return " ".join(parts)


def layer_order(case: Case, arch: str, device: str) -> tuple[str, str, int, int, int, int, str, int]:
    """Models in the order of the presets, then by sizes."""
    return arch, device, list(MODELS).index(case.model), case.top_k, case.ep_size, case.tp_size, case.routing, case.seed


def method_name(method: Method) -> str:
    clock, l2 = method
    return CLOCKS[clock] + (f", {l2} L2" if l2 else "")


def median_us(record: Record) -> float:
    return _timing(record).median_us


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


def flagged(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Flag -> the timed records that carry it, the commonest first."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        for flag in record.flags:
            found[flag].append(record)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _row(backends: Sequence[str], here: Mapping[str, Sequence[Record]], there: Sequence[Record], num_ranks: int) -> dict[str, Point]:
    mine = {id(record) for rows in here.values() for record in rows}
    absent: dict[str, Record] = {}
    for record in there:
        if id(record) not in mine:
            absent.setdefault(record.backend, record)
    points = []
    for backend in backends:
        ranks: dict[tuple[int, int], list[Record]] = defaultdict(list)
        for record in here.get(backend, ()):
            ranks[_rank(record.case)].append(record)
        timed = [Timed(rounds=tuple(sorted(rounds, key=lambda record: record.round))) for rounds in ranks.values()]
        points.append(
            Point(
                backend=backend,
                timed=tuple(sorted(timed, key=lambda rank: rank.median_us, reverse=True)),
                status=_why_absent(absent[backend]) if backend in absent else "",
                num_ranks=num_ranks,
            )
        )
    return {point.backend: point for point in _marked(points)}


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
        if not point.counts or _fastest_sample_us(point) > high:  # an interval takes 20 times as long as a minimum
            return ""
        return "tie" if point.interval_us[0] <= high and low <= point.interval_us[1] else ""

    marks = [(point, mark(point)) for point in points]
    return [replace(point, mark=found) if found else point for point, found in marks]


def _fastest_sample_us(point: Point) -> float:
    """No interval reaches below it."""
    return min(min(_timing(record).samples_us) for record in point.timed[0].rounds)


def _difference(grid: Grid, others: Sequence[Grid]) -> str:
    """What its contract says that another's of the same title does not; its id where they cannot be told apart."""
    mine = asdict(grid.contract) if grid.contract else {}
    theirs = [asdict(other.contract) if other.contract else {} for other in others if other is not grid and other.title == grid.title]
    names = [name for name, value in mine.items() if any(other.get(name, value) != value for other in theirs)]
    return "; ".join(f"{name}: {mine[name]}" for name in names) or f"contract {grid.contract_id}"


def _timing(record: Record) -> Timing:
    assert record.timing is not None  # callers hand over timed records
    return record.timing


def _why_absent(record: Record) -> str:
    return record.status if record.status != "ok" or record.timing is None else SHORT_CLOCKS[record.timing.clock]


def _rank(case: Case) -> tuple[int, int]:
    return case.tp_rank, case.ep_rank
