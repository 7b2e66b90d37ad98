"""What happened to one backend on one case, as one JSON line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import BinaryIO, Literal, get_args

from moebench.case import Case
from moebench.device import Device
from moebench.routing import Realized

# Schema history; a newer major is not readable by older code.
# 1.0  case, backend, act_dtype, arch, device, status, reason, error, timing, routing, prepare_s, facts, kernels, time, run_id
SCHEMA = "1.0"

Status = Literal["ok", "skipped", "wrong", "nonfinite", "unwritten", "input_changed", "nondeterministic", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
ClockName = Literal["cuda_graph", "cuda_events", "wall", "simulated"]
L2State = Literal["cold", "hot"]


class RecordError(Exception):
    """A journal or manifest that cannot be read; the message names file, line and reason."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """Distance of an output from the reference of its activation format."""

    rel_l2: float  # ||out - ref|| / ||ref||
    worst: float  # max |out - ref| / max(|ref|, rms of its token, rms of its column)
    worst_token: int
    worst_column: int
    max_abs: float
    rel_l2_tolerance: float
    worst_tolerance: float

    @property
    def ok(self) -> bool:
        return self.rel_l2 <= self.rel_l2_tolerance and self.worst <= self.worst_tolerance  # False for NaN


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Every sample, and how it was taken; medians and quartiles are computed when asked."""

    samples_us: tuple[float, ...]
    clock: ClockName
    l2: L2State | None  # None where no GPU cache is involved
    l2_method: str  # what made it so, as a sentence
    warmup_calls: int
    comparable: bool = True  # False: the number does not describe the kernel (an interpreter, say)
    note: str = ""

    @property
    def median_us(self) -> float:
        return median(self.samples_us)

    @property
    def quartiles_us(self) -> tuple[float, float]:
        if len(self.samples_us) < 2:
            return self.samples_us[0], self.samples_us[0]
        q1, _, q3 = quantiles(self.samples_us, n=4, method="inclusive")
        return q1, q3

    @property
    def interval_us(self) -> tuple[float, float]:
        """95 % interval of the median from order statistics; needs no shape of the distribution."""
        ordered = sorted(self.samples_us)
        n = len(ordered)
        half = 0.98 * n**0.5  # 1.96 standard deviations of a binomial(n, 1/2) count
        low, high = int(n / 2 - half), int(n / 2 + half)
        return ordered[max(low, 0)], ordered[min(high, n - 1)]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A GPU kernel that one call launched."""

    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Record:
    case: Case
    backend: str
    act_dtype: str
    arch: str
    device: str  # its name; the manifest has the rest
    status: Status
    reason: str = ""
    error: Error | None = None
    timing: Timing | None = None
    routing: Realized | None = None
    prepare_s: float | None = None
    facts: dict[str, str | int | float] = field(default_factory=dict)  # what the backend says of itself: padding, tactics, tuning
    kernels: tuple[Kernel, ...] = ()  # what one call really launched, in order of first launch; empty on a CPU
    run_id: str = ""
    time: str = ""  # UTC, when the record was made
    schema: str = SCHEMA

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case.key, self.backend, self.arch

    @property
    def median_us(self) -> float | None:
        return self.timing.median_us if self.timing else None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """run.json: what was asked for and on what it ran."""

    run_id: str
    started: str
    command: tuple[str, ...]
    device: Device
    plan: dict[str, object]  # as plan.Plan.to_dict() wrote it
    plan_hash: str
    versions: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Run:
    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    torn: bool = False  # the last line was cut off, as a killed writer leaves it


def to_json(item: Record | Manifest) -> str:
    return json.dumps(asdict(item), allow_nan=False, separators=(",", ":"))


def record_from_dict(row: dict[str, object]) -> Record:
    """Raises TypeError, KeyError or ValueError for what is not a record of this schema."""
    values: dict[str, object] = dict(row)
    values["case"] = Case(**row["case"])  # type: ignore[arg-type]
    parts: dict[str, type] = {"error": Error, "timing": Timing, "routing": Realized}
    for name, kind in parts.items():
        value = row.get(name)
        if isinstance(value, dict):
            values[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
    kernels: list[dict[str, str | int]] = row.get("kernels", [])  # type: ignore[assignment]
    values["kernels"] = tuple(Kernel(**kernel) for kernel in kernels)  # type: ignore[arg-type]
    if values["status"] not in STATUSES:
        raise ValueError(f"status {values['status']!r} is not one of {', '.join(STATUSES)}")
    return Record(**values)  # type: ignore[arg-type]


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
    """One record per key and L2 state. A later run beats an earlier one, and a measured row beats a skip, which another machine wrote
    for an arch that is not its own."""
    chosen: dict[tuple[object, ...], Record] = {}
    for record in sorted((r for run in runs for r in run.records), key=lambda r: r.time):
        chosen[(*record.key, record.status == "skipped", record.timing.l2 if record.timing else None)] = record
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
