"""The journal of a run: one record a line, appended, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moebench.device import Device
from moebench.record import SCHEMA, Manifest, Record, RecordError, record_from_dict, to_json

RUNS = Path("runs")  # where a run goes that is not told otherwise


@dataclass(frozen=True, kw_only=True)
class Run:
    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    torn: bool = False  # the last line was cut off, as a killed writer leaves it


def load_run(path: Path) -> Run:
    """Read a run directory. A cut-off last line is dropped and reported; any other bad line raises RecordError."""
    manifest = load_manifest(path)
    journal = path / "journal.jsonl"
    data = journal.read_bytes() if journal.exists() else b""
    *lines, tail = data.split(b"\n")
    records = [_parse(journal, number, line) for number, line in enumerate(lines, 1)]
    return Run(path=path, manifest=manifest, records=tuple(records), torn=bool(tail))


def load_manifest(path: Path) -> Manifest:
    file = path / "run.json"
    try:
        row = json.loads(file.read_text())
        _check_schema(file, row["schema"])
        row["device"] = Device(**row["device"])
        row["command"] = tuple(row["command"])
        return Manifest(**row)
    except FileNotFoundError:
        raise RecordError(f"{path} is not a run directory: it has no run.json (moebench sweep makes one)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file}: {error}") from None


class Journal:
    """Appends records to one run's journal; each is on disk when append returns."""

    def __init__(self, path: Path) -> None:
        self.path = path / "journal.jsonl"
        self._file: BinaryIO = self.path.open("ab")
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):  # cut the half line a killed writer left
            self._file.truncate(data.rfind(b"\n") + 1)

    def append(self, record: Record) -> None:
        self._file.write(to_json(record).encode() + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    temporary = path / "run.json.tmp"
    temporary.write_text(to_json(manifest) + "\n")
    temporary.replace(path / "run.json")


def merge(runs: Iterable[Run]) -> list[Record]:
    """One record per key, scope, round and contract. A later one beats an earlier one, a measured row beats a skip, which another
    machine wrote for an arch that is not its own, and a time beats the failure before it."""
    chosen: dict[tuple[object, ...], Record] = {}
    for record in sorted((r for run in runs for r in run.records), key=lambda r: r.time):
        cell = (*record.key, record.scope, record.round)
        if record.timing:
            chosen.pop((*cell, ""), None)
        chosen[*cell, record.contract_id] = record
    attempted = {record.key for record in chosen.values() if record.status != "skipped"}
    return [record for record in chosen.values() if record.status != "skipped" or record.key not in attempted]


def _parse(journal: Path, number: int, line: bytes) -> Record:
    try:
        row = json.loads(line)
        _check_schema(journal, row["schema"])
        return record_from_dict(row)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{journal}, line {number}: {error}") from None


def _check_schema(file: Path, schema: str) -> None:
    if schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise RecordError(f"{file}: schema {schema}, this moebench reads {SCHEMA}; a moebench that writes {schema} is needed")
