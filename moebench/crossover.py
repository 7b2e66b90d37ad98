"""Which backend to use for how many tokens, and what the second best costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean

from moebench.brief import Brief, briefs
from moebench.case import Case, layer_of
from moebench.compare import Rounds, ratio, rounds_of
from moebench.record import Record, Scope

Allowed = Callable[[str, Case, str], bool]  # backend, a case of the table, arch


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What each backend took at one token count: the slowest rank of a layer that is spread."""

    num_tokens: int
    times_us: Mapping[str, float]  # fastest first; only of what may win
    ties: tuple[str, ...]  # whose interval against the fastest includes 1, the fastest itself first

    @property
    def best_us(self) -> float:
        return self.times_us[self.ties[0]]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring token counts at which one backend is the fastest, or ties with it."""

    from_tokens: int
    to_tokens: int
    backend: str
    act_dtype: str
    ties: tuple[str, ...]  # others that tie with the fastest at every one of these counts
    runner_up: str | None  # the best of the others that have a time at all of them; None: there is none
    regret: float | None  # what it costs more than the backend, as a geometric mean; 0.05 is 5 %
    worst_regret: float | None
    worst_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class OneForAll:
    """The backend to take where one has to serve all token counts, each of which counts alike."""

    backend: str
    loss: float  # over the fastest at each count, as a geometric mean
    worst_loss: float
    worst_tokens: int


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A backend that cannot win at a token count although it was tried."""

    backend: str
    num_tokens: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """One model on one device, spread in one way, under one contract and with one activation format."""

    case: Case  # num_tokens and ranks are 0
    arch: str
    device: str
    scope: Scope
    contract_id: str
    act_dtype: str | None  # None: all of them, which are not the same arithmetic
    num_ranks: int
    measured: tuple[Measured, ...]
    stretches: tuple[Stretch, ...]
    one_for_all: OneForAll | None  # None: no backend has a time at every count
    excluded: tuple[Excluded, ...]
    rounds: int  # fewest that a time comes from


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One backend at one token count: the rounds of its slowest rank."""

    backend: str
    slowest: Rounds


def crossovers(records: Iterable[Record], allowed: Allowed | None = None) -> list[Crossover]:
    """All tables, in the order in which their layers come up."""
    return [table for rows in spreads(briefs(records), allowed) for table in of_spread(rows)]


def spreads(records: Iterable[Brief], allowed: Allowed | None = None) -> list[list[Brief]]:
    """What is of one layer, device and scope together; only of backends that are allowed."""
    found: dict[tuple[Case, str, str, Scope], list[Brief]] = defaultdict(list)
    blanks: dict[tuple[str | int, ...], Case] = {}
    for record in records:
        layer = layer_of(record.case)
        if layer not in blanks:
            blanks[layer] = _blank(record.case)
        blank = blanks[layer]
        if allowed is None or allowed(record.backend, blank, record.arch):
            found[blank, record.arch, record.device, record.scope].append(record)
    return list(found.values())


def of_spread(rows: Sequence[Brief]) -> list[Crossover]:
    """A table per activation format, then one over all where there are several.

    A table in which a backend is alone is left out where others of that model, device and scope were measured against each other."""
    contracts = dict.fromkeys(record.contract_id for record in rows if record.usable)
    tables = [table for contract_id in contracts for table in _tables(contract_id, rows)]
    contested = [table for table in tables if len(_backends(table)) > 1]
    formats = {table.act_dtype for table in contested}
    return [table for table in tables if table in contested or table.act_dtype not in formats]


def _tables(contract_id: str, rows: Sequence[Brief]) -> list[Crossover]:
    first = rows[0]
    here = [record for record in rows if record.contract_id in ("", contract_id)]
    formats = list(dict.fromkeys(record.act_dtype for record in here if record.usable))
    choices: list[str | None] = [*formats, *([None] if len(formats) > 1 else [])]
    tables = []
    for act_dtype in choices:
        chosen = [record for record in here if act_dtype in (None, record.act_dtype)]
        entries, excluded, num_ranks = _entries(chosen)
        if not entries:
            continue
        measured = tuple(_measured(num_tokens, entries[num_tokens]) for num_tokens in sorted(entries))
        dtypes = {record.backend: record.act_dtype for record in chosen}
        tables.append(
            Crossover(
                case=_blank(first.case),
                arch=first.arch,
                device=first.device,
                scope=first.scope,
                contract_id=contract_id,
                act_dtype=act_dtype,
                num_ranks=num_ranks,
                measured=measured,
                stretches=tuple(_stretch(rows_, backend, ties, dtypes) for rows_, backend, ties in _merged(measured)),
                one_for_all=_one_for_all(measured),
                excluded=tuple(excluded),
                rounds=min(len(entry.slowest.logs) for found in entries.values() for entry in found),
            )
        )
    return tables


def _blank(case: Case) -> Case:
    return replace(case, num_tokens=0, ep_rank=0, tp_rank=0)


def _backends(table: Crossover) -> set[str]:
    return {backend for row in table.measured for backend in row.times_us}


def _entries(records: Sequence[Brief]) -> tuple[dict[int, list[_Entry]], list[Excluded], int]:
    """What may win at each token count, what may not with its reason, and over how many ranks."""
    points: dict[tuple[int, str], list[Brief]] = defaultdict(list)
    ranks: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for record in records:
        points[record.case.num_tokens, record.backend].append(record)
        ranks[record.case.num_tokens].add((record.case.tp_rank, record.case.ep_rank))
    num_ranks = max((len(found) for found in ranks.values()), default=0)  # at a count with fewer, the sweep was cut short
    entries: dict[int, list[_Entry]] = defaultdict(list)
    excluded = []
    for (num_tokens, backend), rows in points.items():
        by_rank: dict[tuple[int, int], list[Brief]] = defaultdict(list)
        for record in rows:
            if record.usable and not record.doubtful:
                by_rank[record.case.tp_rank, record.case.ep_rank].append(record)
        if reason := _why_not(rows, len(by_rank), num_ranks):
            excluded.append(Excluded(backend=backend, num_tokens=num_tokens, reason=reason))
            continue
        slowest = max(map(rounds_of, by_rank.values()), key=lambda rounds: rounds.center_us)
        entries[num_tokens].append(_Entry(backend=backend, slowest=slowest))
    return entries, excluded, num_ranks


def _why_not(rows: Sequence[Brief], num_able: int, num_ranks: int) -> str:
    """Why a backend cannot win here; empty if it can. One bad round or rank is enough, a doubtful round is left out."""
    bad = next((record for record in rows if record.status != "ok"), None)
    if bad is not None:
        return bad.status if bad.status == "skipped" else f"{bad.status}: {bad.reason}"
    if num_able == num_ranks:
        return ""
    flags = dict.fromkeys(flag for record in rows for flag in record.flags)
    if flags:
        return f"flagged {', '.join(flags)}"
    if not all(record.usable for record in rows):
        return "its time does not describe the kernel"
    return f"timed on {num_able} of {num_ranks} ranks"


def _measured(num_tokens: int, entries: Sequence[_Entry]) -> Measured:
    ordered = sorted(entries, key=lambda entry: entry.slowest.center_us)
    best = ordered[0]
    return Measured(
        num_tokens=num_tokens,
        times_us={entry.backend: entry.slowest.center_us for entry in ordered},
        ties=(best.backend, *(entry.backend for entry in ordered[1:] if not ratio(best.slowest, entry.slowest).decided)),
    )


def _merged(measured: Sequence[Measured]) -> list[tuple[list[Measured], str, tuple[str, ...]]]:
    """As few stretches as there can be: each goes on while one backend is fastest, or ties, at all of its counts."""
    found: list[tuple[list[Measured], list[str]]] = []
    for row in measured:
        still = [name for name in found[-1][1] if name in row.ties] if found else []
        if still:
            found[-1] = ([*found[-1][0], row], still)
        else:
            found.append(([row], list(row.ties)))
    chosen = []
    for rows, names in found:
        ordered = sorted(names, key=lambda name, rows=rows: _mean_loss(rows, name, None))  # type: ignore[misc]
        chosen.append((rows, ordered[0], tuple(ordered[1:])))
    return chosen


def _stretch(rows: Sequence[Measured], backend: str, ties: tuple[str, ...], act_dtypes: Mapping[str, str]) -> Stretch:
    others = [name for name in rows[0].times_us if name != backend and all(name in row.times_us for row in rows)]
    runner_up = min(others, key=lambda name: _mean_loss(rows, name, backend), default=None)
    worst = max(rows, key=lambda row: row.times_us[runner_up] / row.times_us[backend]) if runner_up else None
    return Stretch(
        from_tokens=rows[0].num_tokens,
        to_tokens=rows[-1].num_tokens,
        backend=backend,
        act_dtype=act_dtypes[backend],
        ties=ties,
        runner_up=runner_up,
        regret=_mean_loss(rows, runner_up, backend) if runner_up else None,
        worst_regret=worst.times_us[runner_up] / worst.times_us[backend] - 1 if worst and runner_up else None,
        worst_tokens=worst.num_tokens if worst else None,
    )


def _one_for_all(measured: Sequence[Measured]) -> OneForAll | None:
    able = [name for name in measured[0].times_us if all(name in row.times_us for row in measured)]
    if not able:
        return None
    best = min(able, key=lambda name: _mean_loss(measured, name, None))
    worst = max(measured, key=lambda row: row.times_us[best] / row.best_us)
    return OneForAll(
        backend=best,
        loss=_mean_loss(measured, best, None),
        worst_loss=worst.times_us[best] / worst.best_us - 1,
        worst_tokens=worst.num_tokens,
    )


def _mean_loss(rows: Sequence[Measured], name: str, against: str | None) -> float:
    """How much longer it takes than another, or than the fastest at each count, as a geometric mean."""
    return exp(fmean(log(row.times_us[name] / (row.times_us[against] if against else row.best_us)) for row in rows)) - 1
