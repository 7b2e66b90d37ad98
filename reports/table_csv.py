"""Records as one CSV table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

from moebench.case import CASE_FIELDS, Case
from moebench.journal import Stretch
from moebench.realized import Realized
from moebench.record import Error, Kernel, Record, Roofline, Telemetry, Timing
from moebench.reports import readers
from moebench.reports.text import clean

Value = str | int | float | bool | tuple[int | float, ...] | None

RECORD = ("run_id", "time", "schema", "backend", "act_dtype", "arch", "device", "status", "reason", "prepare_s")
RAN = ("facts", "kernels")
TIMING: dict[str, Callable[[Timing], Value]] = {
    "n_samples": lambda timing: len(timing.samples_us),
    "clock": lambda timing: timing.clock,
    "l2": lambda timing: timing.l2,
    "l2_method": lambda timing: timing.l2_method,
    "warmup_calls": lambda timing: timing.warmup_calls,
    "comparable": lambda timing: timing.comparable,
    "timing_note": lambda timing: timing.note,
}
SPREAD = ("q1_us", "q3_us", "ci_low_us", "ci_high_us")
HOW: dict[str, Callable[[Timing], Value]] = {
    "calls_per_region": lambda timing: timing.calls_per_region,
    "stop_reason": lambda timing: timing.stop_reason,
    "settled": lambda timing: timing.settled,
    "host_us": lambda timing: timing.host_us,
    "host_bound": lambda timing: timing.host_bound,
    "busy_us": lambda timing: timing.busy_us,
    "span_us": lambda timing: timing.span_us,
    "traced_us": lambda timing: timing.traced_us,
    "stages_us": lambda timing: _pairs(timing.stages_us),
}
ERROR = tuple(field.name for field in fields(Error))
REALIZED = tuple(field.name for field in fields(Realized))
ROOFLINE = tuple(field.name for field in fields(Roofline))
TELEMETRY = tuple(field.name for field in fields(Telemetry) if field.name != "reasons")
TRUST: dict[str, Callable[[Record], Value]] = {
    "scope": lambda record: record.scope,
    "round": lambda record: record.round,
    "contract_id": lambda record: record.contract_id or None,
    "roof_share": lambda record: record.roof_share,
    "flags": lambda record: _pairs(record.flags),
    "canary_before_us": lambda record: record.canary.before_us if record.canary else None,
    "canary_after_us": lambda record: record.canary.after_us if record.canary else None,
    "canary_matmul_us": lambda record: record.canary.matmul_us if record.canary else None,
    "clock_reasons": lambda record: _pairs(record.telemetry.reasons) if record.telemetry else None,
    "launches_compared": lambda record: record.launches_compared,
    "phases_s": lambda record: _pairs(record.phases_s),
}
_facts_of_record = attrgetter(*RECORD)
_facts_of_telemetry = attrgetter(*TELEMETRY)
HEADER = (*RECORD, *CASE_FIELDS, "median_us", *SPREAD, *TIMING, *ERROR, *(f"routing_{name}" for name in REALIZED), *RAN)
HEADER = (*HEADER, *TRUST, *HOW, *(f"roof_{name}" for name in ROOFLINE), *(f"gpu_{name}" for name in TELEMETRY))


def rows(records: Iterable[Record]) -> str:
    """A header and one row per record, numbers in full; a cell is empty where a record has no such fact."""
    return "".join(lines(records))


def lines(records: Iterable[Record]) -> Iterator[str]:
    """As rows, line by line: 100,000 of them are a gigabyte."""
    yield ",".join(HEADER) + "\n"
    for record in records:
        yield _line(record) + "\n"


def write(journals: Sequence[Stretch], out: Path) -> bool:
    """As rows of all records of large journals, in a fraction of the time; False where readers.write leaves it to others."""

    def tell(record: Record, text: bytes) -> tuple[bytes, ...]:
        before, kernels, after = _thirds(record)
        return before.encode(), _encoded(kernels), f"{after}\n".encode()

    return readers.write(journals, readers.Table(head=f"{','.join(HEADER)}\n".encode(), tell=tell), out)


def _line(record: Record) -> str:
    return "".join(_thirds(record))


def _thirds(record: Record) -> tuple[str, str, str]:
    """A line: what comes before its kernels, those, which are most of it and which many records share, and the rest."""
    timing, telemetry = record.timing, record.telemetry
    spread = (timing.median_us, *timing.quartiles_us, *timing.interval_us) if timing else (None,) * 5
    before = (
        _cells(_facts_of_record(record)),
        _cells_of(record.case, CASE_FIELDS),
        _cells(spread),
        _cells([value(timing) for value in TIMING.values()] if timing else (None,) * len(TIMING)),
        _cells_of(record.error, ERROR),
        _cells_of(record.routing, REALIZED),
        _words(_pairs(record.facts)),
        "",
    )
    after = (
        "",
        _cells([value(record) for value in TRUST.values()]),
        _cells([value(timing) for value in HOW.values()] if timing else (None,) * len(HOW)),
        _cells_of(record.roofline, ROOFLINE),
        _cells(_facts_of_telemetry(telemetry) if telemetry else (None,) * len(TELEMETRY)),
    )
    return ",".join(before), _launched(record.kernels), ",".join(after)


def _cells(values: Iterable[Value]) -> str:
    return ",".join([_TEXTS[type(value)](value) for value in values])


@lru_cache(maxsize=4096)  # many rows have the same case, error and roofs
def _cells_of(item: Case | Error | Realized | Roofline | None, names: tuple[str, ...]) -> str:
    return _cells(getattr(item, name, None) for name in names)


@lru_cache(maxsize=256)  # 7 KB a row, and the same in most rows of a backend
def _launched(kernels: tuple[Kernel, ...]) -> str:
    return _words("; ".join(f"{kernel.count} {kernel.name}" for kernel in kernels))


@lru_cache(maxsize=256)
def _encoded(kernels: str) -> bytes:
    return kernels.encode()


def _pairs(values: Mapping[str, str | int | float]) -> str:
    return "; ".join([f"{name}={value}" for name, value in values.items()]) if values else ""


@lru_cache(maxsize=4096)
def _words(text: str) -> str:
    told = _no_formula(clean(text))
    return '"' + told.replace('"', '""') + '"' if any(mark in told for mark in ',"\r\n') else told


def _no_formula(text: str) -> str:
    """Spreadsheets compute a cell that starts with = + - @; an apostrophe keeps it text."""
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


# As csv.writer writes them, which takes 0.4 ms a row for looking at each character of the kernels' names.
_TEXTS: Mapping[type, Callable[..., str]] = {
    float: repr,
    int: repr,
    str: _words,
    bool: {True: "true", False: "false"}.__getitem__,
    type(None): {None: ""}.__getitem__,
    tuple: lambda values: " ".join(map(str, values)),
}
