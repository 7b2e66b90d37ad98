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
from moebench.record import Canary, Error, Kernel, Record, Roofline, Telemetry
from moebench.reports import readers
from moebench.reports.text import clean

Value = str | int | float | bool | tuple[int | float, ...] | None

RECORD = ("run_id", "time", "schema", "backend", "act_dtype", "arch", "device", "status", "reason", "prepare_s")
RAN = ("facts", "kernels")
TIMING = {  # column -> attribute
    **{name: name for name in ("clock", "l2", "l2_method", "warmup_calls", "comparable")},
    "timing_note": "note",
}
SPREAD = ("q1_us", "q3_us", "ci_low_us", "ci_high_us")
HOW = ("calls_per_region", "stop_reason", "settled", "host_us", "host_bound", "busy_us", "span_us", "traced_us")
ERROR = tuple(field.name for field in fields(Error))
REALIZED = tuple(field.name for field in fields(Realized))
ROOFLINE = tuple(field.name for field in fields(Roofline))
TELEMETRY = tuple(field.name for field in fields(Telemetry) if field.name != "reasons")
CANARY = tuple(field.name for field in fields(Canary))
TRUST = (
    *("scope", "round", "contract_id", "roof_share", "flags", *(f"canary_{name}" for name in CANARY)),
    *("clock_reasons", "launches_compared", "phases_s"),
)
# As tuples, from C: a lambda for each column took a tenth of a row's time.
_of_record = attrgetter(*RECORD)
_of_timing = attrgetter(*TIMING.values())
_how = attrgetter(*HOW)
_of_canary = attrgetter(*CANARY)
_of_telemetry = attrgetter(*TELEMETRY)
HEADER = (*RECORD, *CASE_FIELDS, "median_us", *SPREAD, "n_samples", *TIMING, *ERROR, *(f"routing_{name}" for name in REALIZED), *RAN)
HEADER = (*HEADER, *TRUST, *HOW, "stages_us", *(f"roof_{name}" for name in ROOFLINE), *(f"gpu_{name}" for name in TELEMETRY))


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
    timing, telemetry, canary = record.timing, record.telemetry, record.canary
    spread = (timing.median_us, *timing.quartiles_us, *timing.interval_us, len(timing.samples_us)) if timing else (None,) * 6
    trust = (
        *(record.scope, record.round, record.contract_id or None, record.roof_share, _pairs(record.flags)),
        *(_of_canary(canary) if canary else (None,) * len(CANARY)),
        *(_pairs(telemetry.reasons) if telemetry else None, record.launches_compared, _pairs(record.phases_s)),
    )
    before = (
        _cells(_of_record(record)),
        _cells_of(record.case, CASE_FIELDS),
        _cells(spread),
        _cells(_of_timing(timing) if timing else (None,) * len(TIMING)),
        _cells_of(record.error, ERROR),
        _cells_of(record.routing, REALIZED),
        _words(_pairs(record.facts)),
        "",
    )
    after = (
        "",
        _cells(trust),
        _cells((*_how(timing), _pairs(timing.stages_us)) if timing else (None,) * (len(HOW) + 1)),
        _cells_of(record.roofline, ROOFLINE),
        _cells(_of_telemetry(telemetry) if telemetry else (None,) * len(TELEMETRY)),
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
