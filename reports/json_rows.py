"""Runs as one JSON document: manifests, and every record as it is in the journal with what can be computed from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from operator import attrgetter

import msgspec

from moebench.journal import Run, merge
from moebench.record import SCHEMA, Record
from moebench.reports.reproduce import command

NAMES = tuple(field.name for field in fields(Record))


def document(runs: Sequence[Run]) -> str:
    """`{"schema", "runs": [...], "records": [{..., "derived": {...}}]}`, records merged as every report merges them, one a line."""
    return "".join(parts(runs))


def parts(runs: Sequence[Run]) -> Iterator[str]:
    """As document, record by record: 100,000 of them are a gigabyte."""
    yield f'{{"schema": {_text(SCHEMA)}, "runs": {_text([asdict(run.manifest) | {"torn": run.torn} for run in runs])}, "records": ['
    before = "\n"
    for record in merge(runs):
        yield before
        yield _text(dict(zip(NAMES, _values(record), strict=True)) | {"derived": _derived(record)})
        before = ",\n"
    yield "\n]}\n"


_values = attrgetter(*NAMES)


def _text(value: object) -> str:
    """All ASCII: a name may hold what steers a terminal, and json.dumps escapes that. msgspec takes a tenth of its time."""
    with suppress(UnicodeEncodeError, OverflowError):  # half a surrogate pair; an integer of more than 64 bits
        text = msgspec.json.encode(value)
        if text.isascii():
            return text.decode("ascii")
    return json.dumps(value, allow_nan=False, default=_fields)


def _fields(item: object) -> dict[str, object]:
    """As asdict, without its copies of every list and number."""
    return {field.name: getattr(item, field.name) for field in fields(item)}  # type: ignore[arg-type]  # a dataclass: nothing else is in one


def _derived(record: Record) -> dict[str, object]:
    timing = record.timing
    return {
        "median_us": record.median_us,
        "quartiles_us": timing.quartiles_us if timing else None,
        "interval_us": timing.interval_us if timing else None,
        "contract_id": record.contract_id or None,
        "roof_share": record.roof_share,
        "command": command(record),
    }
