"""Records as pandas data frames: one row a record or one row a sample, the unit in a column's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moebench.case import CASE_FIELDS
from moebench.record import Record

if TYPE_CHECKING:
    from pandas import DataFrame

Value = str | int | float | bool | None
Column = tuple[str, Callable[[Record], Value]]  # pandas dtype, what is in it

TEXT, WHOLE, NUMBER, TRUTH = "string", "Int64", "Float64", "boolean"  # pandas' types with a missing value of their own


def _of(part: str, name: str) -> Callable[[Record], Value]:
    """A field of a part of the record, missing where the record has no such part."""
    return lambda record: getattr(getattr(record, part), name, None)


def _case(name: str) -> Callable[[Record], Value]:
    return lambda record: getattr(record.case, name)


def _pair(name: str, end: int) -> Callable[[Record], Value]:
    return lambda record: getattr(record.timing, name)[end] if record.timing else None


IDENTITY: dict[str, Column] = {
    "run_id": (TEXT, lambda record: record.run_id),
    "backend": (TEXT, lambda record: record.backend),
    "act_dtype": (TEXT, lambda record: record.act_dtype),
    "arch": (TEXT, lambda record: record.arch),
    "device": (TEXT, lambda record: record.device),
    "scope": (TEXT, lambda record: record.scope),
    "contract": (TEXT, lambda record: record.contract_id),
    "round": (WHOLE, lambda record: record.round),
    **{name: (TEXT if name in ("model", "routing") else WHOLE, _case(name)) for name in CASE_FIELDS},
}
COLUMNS: dict[str, Column] = {
    **IDENTITY,
    "status": (TEXT, lambda record: record.status),
    "reason": (TEXT, lambda record: record.reason),
    "flags": (TEXT, lambda record: ", ".join(record.flags)),
    "median_us": (NUMBER, lambda record: record.median_us),
    "low_us": (NUMBER, _pair("interval_us", 0)),
    "high_us": (NUMBER, _pair("interval_us", 1)),
    "q1_us": (NUMBER, _pair("quartiles_us", 0)),
    "q3_us": (NUMBER, _pair("quartiles_us", 1)),
    "num_samples": (WHOLE, lambda record: len(record.timing.samples_us) if record.timing else None),
    "clock": (TEXT, _of("timing", "clock")),
    "l2": (TEXT, _of("timing", "l2")),
    "comparable": (TRUTH, _of("timing", "comparable")),
    "host_us": (NUMBER, _of("timing", "host_us")),
    "busy_us": (NUMBER, _of("timing", "busy_us")),
    "span_us": (NUMBER, _of("timing", "span_us")),
    "rel_l2": (NUMBER, _of("error", "rel_l2")),
    "worst": (NUMBER, _of("error", "worst")),
    "weight_bytes": (WHOLE, _of("roofline", "weight_bytes")),
    "activation_bytes": (WHOLE, _of("roofline", "activation_bytes")),
    "flop": (NUMBER, _of("roofline", "flop")),
    "floor_us": (NUMBER, _of("roofline", "floor_us")),
    "limiter": (TEXT, _of("roofline", "limiter")),
    "roof_share": (NUMBER, lambda record: record.roof_share),
    "active_experts": (WHOLE, _of("routing", "active_experts")),
    "local_pairs": (WHOLE, _of("routing", "local_pairs")),
    "load_max_over_mean": (NUMBER, _of("routing", "load_max_over_mean")),
    "sm_mhz": (NUMBER, lambda record: record.telemetry.sm_mhz[1] if record.telemetry else None),
    "power_w": (NUMBER, _of("telemetry", "power_w")),
    "temperature_c": (NUMBER, _of("telemetry", "temperature_c")),
    "prepare_s": (NUMBER, lambda record: record.prepare_s),
    "time": (TEXT, lambda record: record.time),
}


def records(rows: Sequence[Record]) -> DataFrame:
    """COLUMNS, one row a record; what a record does not have is pandas.NA."""
    return _frame(COLUMNS, rows)


def samples(rows: Sequence[Record]) -> DataFrame:
    """IDENTITY, sample (its number, in the order taken) and sample_us, one row a sample."""
    timed = [record for record in rows if record.timing]
    counts = [len(record.timing.samples_us) for record in timed if record.timing]
    frame = _frame(IDENTITY, timed)
    frame = frame.loc[frame.index.repeat(counts)].reset_index(drop=True)
    frame["sample"] = [number for count in counts for number in range(count)]
    frame["sample_us"] = [sample for record in timed if record.timing for sample in record.timing.samples_us]
    return frame


def _frame(columns: dict[str, Column], rows: Sequence[Record]) -> DataFrame:
    import pandas

    series = {name: pandas.array([value(row) for row in rows], dtype=dtype) for name, (dtype, value) in columns.items()}  # type: ignore[call-overload]  # stubs know no dtype by a str
    return pandas.DataFrame(series, columns=list(columns))
