"""Records as one CSV table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache

from moebench.case import CASE_FIELDS
from moebench.record import Error, Record, Roofline, Telemetry, Timing
from moebench.reports.text import clean
from moebench.routing import Realized

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
    "clock_reasons": lambda record: _pairs(record.telemetry.reasons) if record.telemetry else None,
    "launches_compared": lambda record: record.launches_compared,
    "phases_s": lambda record: _pairs(record.phases_s),
}
HEADER = (*RECORD, *CASE_FIELDS, "median_us", *SPREAD, *TIMING, *ERROR, *(f"routing_{name}" for name in REALIZED), *RAN)
HEADER = (*HEADER, *TRUST, *HOW, *(f"roof_{name}" for name in ROOFLINE), *(f"gpu_{name}" for name in TELEMETRY))


def rows(records: Iterable[Record]) -> str:
    """A header and one row per record, numbers in full; a cell is empty where a record has no such fact."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([_cell(value) for value in _values(record)] for record in records)
    return text.getvalue()


def _values(record: Record) -> list[Value]:
    return [
        *(getattr(record, name) for name in RECORD),
        *(getattr(record.case, name) for name in CASE_FIELDS),
        *([record.timing.median_us, *record.timing.quartiles_us, *record.timing.interval_us] if record.timing else [None] * 5),
        *(value(record.timing) if record.timing else None for value in TIMING.values()),
        *(getattr(record.error, name, None) for name in ERROR),
        *(getattr(record.routing, name, None) for name in REALIZED),
        _pairs(record.facts),
        "; ".join(f"{kernel.count} {kernel.name}" for kernel in record.kernels),
        *(value(record) for value in TRUST.values()),
        *(value(record.timing) if record.timing else None for value in HOW.values()),
        *(getattr(record.roofline, name, None) for name in ROOFLINE),
        *(getattr(record.telemetry, name, None) for name in TELEMETRY),
    ]


def _pairs(values: Mapping[str, str | int | float]) -> str:
    return "; ".join(f"{name}={value}" for name, value in values.items())


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return _words(value) if isinstance(value, str) else repr(value)


@lru_cache(maxsize=4096)  # kernels and facts are 7 KB a row, and the same in most rows of a backend
def _words(text: str) -> str:
    return _no_formula(clean(text))


def _no_formula(text: str) -> str:
    """Spreadsheets compute a cell that starts with = + - @; an apostrophe keeps it text."""
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
