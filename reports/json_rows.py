"""Runs as one JSON document: manifests, and every record as it is in the journal with what can be computed from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from moebench.journal import Run, merge
from moebench.record import SCHEMA, Record
from moebench.reports.reproduce import command


def document(runs: Sequence[Run]) -> str:
    """`{"schema", "runs": [...], "records": [{..., "derived": {...}}]}`, records merged as every report merges them."""
    rows = {
        "schema": SCHEMA,
        "runs": [asdict(run.manifest) | {"torn": run.torn} for run in runs],
        "records": [asdict(record) | {"derived": _derived(record)} for record in merge(runs)],
    }
    return json.dumps(rows, allow_nan=False, indent=1) + "\n"


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
