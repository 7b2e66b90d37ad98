"""Runs as one JSON document: manifests, and every record as it is in the journal with what can be computed from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path

import msgspec

from moebench.journal import Run, Stretch, is_torn, merge
from moebench.record import SCHEMA, Manifest, Record
from moebench.reports import readers
from moebench.reports.reproduce import command

NAMES = tuple(field.name for field in fields(Record))


def document(runs: Sequence[Run]) -> str:
    """`{"schema", "runs": [...], "records": [{..., "derived": {...}}]}`, records merged as every report merges them, one a line."""
    return "".join(parts(runs))


def parts(runs: Sequence[Run]) -> Iterator[str]:
    """As document, record by record: 100,000 of them are a gigabyte."""
    yield _head([(run.manifest, run.torn) for run in runs])
    before = ""
    for record in merge(runs):
        yield before
        yield _told(record)
        before = BETWEEN
    yield TAIL


def write(runs: Sequence[tuple[Manifest, Stretch]], out: Path) -> bool:
    """As document of the records of large journals, in a fraction of the time; False where readers.write leaves it to others."""
    head = _head([(manifest, is_torn(journal)) for manifest, journal in runs])
    table = readers.Table(head=head.encode(), tell=_teller(), between=BETWEEN.encode(), tail=TAIL.encode())
    return readers.write([journal for _, journal in runs], table, out)


KERNELS = b',"kernels":['
BETWEEN = ",\n"
TAIL = "\n]}\n"


def _head(runs: Sequence[tuple[Manifest, bool]]) -> str:
    told = [asdict(manifest) | {"torn": torn} for manifest, torn in runs]
    return f'{{"schema": {_text(SCHEMA)}, "runs": {_text(told)}, "records": [\n'


def _told(record: Record) -> str:
    return _text(dict(zip(NAMES, _values(record), strict=True)) | {"derived": _derived(record)})


def _teller() -> readers.Tell:
    """The text of the journal, where it is of this schema, with what can be computed from it at its end."""
    kernels = b""  # from there on in the text before, 7 of 10 KB, and most often here as well

    def tell(record: Record, text: bytes) -> tuple[bytes, ...]:
        nonlocal kernels
        if record.schema != SCHEMA or not text.endswith(b"}") or not text.isascii():
            return (_told(record).encode(),)
        start = text.find(KERNELS)
        if not kernels or not text.startswith(kernels, start):
            kernels = text[start : text.find(b"]", start)]
        return text[:start], kernels, text[start + len(kernels) : -1], f',"derived":{_text(_derived(record))}}}'.encode()

    return tell


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
