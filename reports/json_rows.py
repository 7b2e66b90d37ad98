"""Runs as one JSON document: manifests, and every record as it is in the journal with what can be computed from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from moebench.journal import Run, merge
from moebench.record import SCHEMA, Record
from moebench.reports.reproduce import command


def document(runs: Sequence[Run]) -> str:
    """`{"schema", "runs": [...], "records": [{..., "derived": {...}}]}`, records merged as every report merges them, one a line."""
    head = f'{{"schema": {_text(SCHEMA)}, "runs": {_text([asdict(run.manifest) | {"torn": run.torn} for run in runs])}, "records": ['
    rows = (_text(_fields(record) | {"derived": _derived(record)}) for record in merge(runs))
    return head + "\n" + ",\n".join(rows) + "\n]}\n"


def _text(value: object) -> str:
    """Without indentation, with which json encodes in Python and takes 10 times as long."""
    return json.dumps(value, allow_nan=False, default=_fields)


def _fields(item: object) -> dict[str, object]:
    """As asdict, without its copies of every list and number."""
    return {name: getattr(item, name) for name in _names(type(item))}


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


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
