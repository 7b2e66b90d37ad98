"""The journal of a run: one record a line behind its checksum, appended by one writer, never rewritten."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from zlib import crc32

from moebench.conform import misfit
from moebench.device import Device
from moebench.lines import EXPERTS_LIMIT, Read, reader
from moebench.record import SCHEMA, Manifest, Record, RecordError, Status, record_from_dict, to_json

RUNS = Path("runs")  # where a run goes that is not told otherwise
JOURNAL = "journal.jsonl"
MANIFEST = "run.json"
LOCK = ".lock"
PLAIN = ("1.0", "1.1")  # schemas whose lines had no checksum
CHECKSUM = len("00000000 ")
JOURNAL_BYTES_LIMIT = 1 << 30  # 20 000 points of 400 samples are a tenth of it
LINE_BYTES_LIMIT = 16 << 20  # of lines that several processes read; one reads longer ones as well
LOOKED_THROUGH = 1 << 16
MANIFEST_BYTES_LIMIT = 64 << 20
# What a second attempt may change; --resume makes one. Every other status is a result.
RETRYABLE: frozenset[Status] = frozenset({"hang", "crash", "oom", "cuda_error", "compile_timeout", "failed"})
ATTEMPTS = 2
NOT_TRIED = "not tried:"  # begins the reason of a record that is no attempt: too large for what was free, or a device in quarantine

Cell = tuple[str, str, str, str, int]  # case key, backend, arch, scope, round: what one record is about


@dataclass(frozen=True, kw_only=True)
class Run:
    path: Path
    manifest: Manifest
    records: tuple[Record, ...]
    torn: bool = False  # the last line was cut off, as a killed writer leaves it


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A place of a run directory that is not as it was written."""

    file: str
    line: int  # from 1; 0 where it is the file as a whole
    offset: int  # of the line's first byte
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some bytes of a run's journal."""

    path: Path  # of the run
    start: int
    end: int


class InUse(Exception):
    """Another process writes this run; the message names it."""


def load_run(path: Path) -> Run:
    """Read a run directory. A cut-off last line is dropped and reported; any other bad line raises RecordError."""
    manifest = load_manifest(path)
    records: list[Record] = []
    offset, torn = 0, False
    read = reader()
    with _without_collections():
        for number, line in enumerate(_lines(path / JOURNAL), 1):
            torn = not line.endswith(b"\n")
            if torn:
                break
            try:
                record = _parse(line, read)
            except _BadLine as error:
                where = f"{path / JOURNAL}, line {number} (byte {offset})"
                raise RecordError(f"{where}: {error}; moebench fsck {path} lists all that is wrong") from None
            if record.timing is not None:
                record.timing.median_us  # noqa: B018  kept; later its samples come from memory once more, a tenth of a gate
            records.append(record)
            offset += len(line)
    return Run(path=path, manifest=manifest, records=tuple(records), torn=torn)


def whole_journal(path: Path) -> Stretch:
    """What there is of it. Raises RecordError for what is no journal."""
    fd = _open(path / JOURNAL, JOURNAL_BYTES_LIMIT, missing=True)
    if fd is None:
        return Stretch(path=path, start=0, end=0)
    with os.fdopen(fd, "rb") as file:
        return Stretch(path=path, start=0, end=os.fstat(file.fileno()).st_size)


def is_torn(stretch: Stretch) -> bool:
    """Whether the line at its end was cut off."""
    if stretch.end == stretch.start:
        return False
    with (stretch.path / JOURNAL).open("rb") as file:
        file.seek(stretch.end - 1)
        return file.read(1) != b"\n"


def read_stretch(stretch: Stretch) -> Iterator[tuple[Record, bytes]]:
    """The records of whole lines that begin in it, each with its text. Raises RecordError, which load_run does with a sentence."""
    read = reader()
    offset = stretch.start
    with (stretch.path / JOURNAL).open("rb", buffering=1 << 20) as file:
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # the end of the line that began before
        for line in file:
            if offset >= stretch.end or not line.endswith(b"\n"):
                break
            yield _record(line, read), line[_start(line) : -1]
            offset += len(line)


def read_some(journal: Stretch, wanted: Callable[[bytes, int], bool], read: Read) -> Iterator[tuple[int, Record]]:
    """Those of a journal's records up to its end whose lines are wanted, each with the place of its first byte. `wanted` is given bytes
    and where in them a line begins. A cut-off last line is left out.

    Raises RecordError, which load_run does with a sentence."""
    fd = _open(journal.path / JOURNAL, JOURNAL_BYTES_LIMIT, missing=True)
    if fd is None:
        return
    offset, rest = 0, b""  # of the chunk's first byte; of a line that is not yet whole
    with os.fdopen(fd, "rb"):
        for chunk in _chunks(fd, journal.end, 1 << 20):
            text, begin, end = rest + chunk, 0, len(rest)
            while (end := text.find(b"\n", end)) >= 0:
                if wanted(text, begin):
                    yield offset + begin, _record(text[begin : end + 1], read)
                begin = end = end + 1
            offset, rest = offset + begin, text[begin:]
            if len(rest) > LINE_BYTES_LIMIT:
                raise RecordError("a line too long for a record")


def read_at(path: Path, offsets: Iterable[int]) -> list[Record]:
    """The records at places that read_some gave. Raises RecordError where they are there no more."""
    read = reader()
    found = []
    try:
        with _opened(path) as file:
            for offset in offsets:
                file.seek(offset)
                found.append(_record(file.readline(LINE_BYTES_LIMIT), read))
    except (FileNotFoundError, RecordError):
        raise RecordError(f"{path / JOURNAL} was changed by somebody while it was read; try it again") from None
    return found


def lines_around(journal: Stretch, count: int) -> Iterator[bytes]:
    """At most so many lines of a journal, from all over it, each whole but for what is too long to be a record."""
    if journal.end:
        with _opened(journal.path) as file:
            for number in range(count):
                file.seek(number * journal.end // count)
                if number:
                    file.readline(LOOKED_THROUGH)
                if (line := file.readline(LOOKED_THROUGH)).endswith(b"\n") or len(line) == LOOKED_THROUGH:
                    yield line


def load_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        row = _json(_read(file, MANIFEST_BYTES_LIMIT))
        if not isinstance(row, dict):
            raise ValueError("holds no table")
        newer = _minor(_check_schema(row.get("schema"))) > _minor(SCHEMA)
        row = _known(row, Manifest) if newer else row  # what a newer minor added is left out
        row["device"] = Device(**(_known(row["device"], Device) if newer else row["device"]))
        row["command"] = tuple(row["command"])
        manifest = Manifest(**row)
        if problem := misfit(manifest, Manifest, "it"):
            raise ValueError(problem)
        return manifest
    except FileNotFoundError:
        raise RecordError(f"{path} is not a run directory: it has no {MANIFEST} (moebench sweep makes one)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file}: {_told(error)}") from None


def problems(path: Path) -> list[Problem]:
    """All that is wrong with a run directory; empty for a good one. Raises RecordError for what is no run directory."""
    if not path.is_dir():
        raise RecordError(f"{path} is not a run directory")
    found = []
    try:
        load_manifest(path)
    except RecordError as error:
        found.append(Problem(file=MANIFEST, line=0, offset=0, reason=str(error)))
    data = _read(path / JOURNAL, JOURNAL_BYTES_LIMIT, missing=b"")
    offset = 0
    seen: dict[Cell, int] = {}
    read = reader()
    for number, line in enumerate(data.split(b"\n"), 1):
        last = offset + len(line) == len(data)
        if last and line:
            reason = f"cut off after {len(line)} bytes, as a killed writer leaves it; --resume cuts it away and does that point again"
            found.append(Problem(file=JOURNAL, line=number, offset=offset, reason=reason))
        elif not last:
            try:
                record = _parse(line + b"\n", read)
            except _BadLine as error:
                found.append(Problem(file=JOURNAL, line=number, offset=offset, reason=str(error)))
            else:
                if _cell(record) in seen:
                    reason = f"line {seen[_cell(record)]} has a result for the same point already"
                    found.append(Problem(file=JOURNAL, line=number, offset=offset, reason=reason))
                elif record.status not in RETRYABLE and record.status != "interrupted":
                    seen[_cell(record)] = number
        offset += len(line) + 1
    return found


def is_of_a_run(file: Path) -> bool:
    """Whether it is, by whatever name, the journal or the manifest of a run directory."""
    real = Path(os.path.realpath(file))  # resolve raises RuntimeError for a link to itself
    return real.name in (JOURNAL, MANIFEST) and (real.parent / MANIFEST).exists()


def settled(records: Iterable[Record]) -> set[Cell]:
    """What --resume leaves alone: results, and what failed as often as it may."""
    records = list(records)
    attempts = Counter(_cell(record) for record in records if record.status in RETRYABLE and not record.reason.startswith(NOT_TRIED))
    results = {_cell(record) for record in records if record.status not in RETRYABLE and record.status != "interrupted"}
    return results | {cell for cell, count in attempts.items() if count >= ATTEMPTS}


class RunLock:
    """The right to write one run directory. The kernel takes it back the moment its holder is gone, however it went."""

    def __init__(self, path: Path) -> None:
        """Raises InUse where somebody else has it."""
        self._fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 4096).decode(errors="replace").strip() or "a process that has just started"
            os.close(self._fd)
            raise InUse(f"{path} is being written by {holder}; wait for it, stop it, or choose another --out") from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"process {os.getpid()}: {' '.join(['moebench', *sys.argv[1:]])}\n".encode(errors="replace")[:4000])

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)


class Journal:
    """Appends records to one run's journal; each is on disk when append returns."""

    def __init__(self, path: Path) -> None:
        self.path = path / JOURNAL
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o644)
        data = _read(self.path, JOURNAL_BYTES_LIMIT)
        self._size = data.rfind(b"\n") + 1
        if self._size < len(data):  # cut the half line a killed writer left
            os.ftruncate(self._fd, self._size)

    def append(self, record: Record) -> None:
        """Raises OSError, and leaves no half line, where the record cannot be stored."""
        line = _line(record)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(line)

    def close(self) -> None:
        os.close(self._fd)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    temporary = path / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(to_json(manifest) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / MANIFEST)


def merge(runs: Sequence[Run]) -> list[Record]:
    """One record per key, scope, round and contract, as merge_records has them."""
    return merge_records([record for run in runs for record in run.records])


def merge_records(records: Sequence[Record]) -> list[Record]:
    """A later one beats an earlier one, a measured row beats a skip, which another machine wrote for an arch that is not its own, and a
    time beats the failure before it."""
    chosen: dict[tuple[object, ...], Record] = {}
    untimed = skipped = False
    for record in sorted(records, key=attrgetter("time")):
        cell = record.case, record.backend, record.arch, record.scope, record.round  # hashing a case takes 1 us, writing its key 4
        if record.timing is None:
            untimed = True
        elif untimed:
            chosen.pop((*cell, ""), None)
        skipped = skipped or record.status == "skipped"
        key = *cell, record.contract_id
        chosen.pop(key, None)  # or it would be at its predecessor's place, and not at that of its time
        chosen[key] = record
    if not skipped:
        return list(chosen.values())
    attempted = {(r.case, r.backend, r.arch) for r in records if r.status != "skipped"}
    return [r for r in chosen.values() if r.status != "skipped" or (r.case, r.backend, r.arch) not in attempted]


@contextmanager
def _without_collections() -> Iterator[None]:
    """Records hold no cycles, and looking for some among 100 000 of them takes a tenth of the time that reading them does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cell(record: Record) -> Cell:
    return (*record.key, record.scope, record.round)


class _BadLine(ValueError):
    """Why a line of a journal is no record."""


def _line(record: Record) -> bytes:
    body = to_json(record).encode()
    return b"%08x %s\n" % (crc32(body), body)


def _parse(line: bytes, read: Read) -> Record:
    """A line with its end."""
    plain = line.startswith(b"{")
    start = _start(line)
    body = memoryview(line)[start:-1]
    if not plain and line[:CHECKSUM] != b"%08x " % crc32(body):
        checksum, _, rest = line[:-1].partition(b" ")
        if not re.fullmatch(rb"[0-9a-f]{8}", checksum):
            raise _BadLine(f"is no record: {line[:-1][:40]!r}")
        raise _BadLine(f"its checksum is {checksum.decode()} and that of its {len(rest)} bytes is {crc32(rest):08x}")
    record = read(line, start)
    if record is not None and _is_sound(record, plain):
        return record
    return _parse_slowly(bytes(body), plain)


def _record(line: bytes, read: Read) -> Record:
    """For those who leave the sentence about a bad one to load_run."""
    try:
        return _parse(line, read)
    except _BadLine as error:
        raise RecordError(str(error)) from None


def _start(line: bytes) -> int:
    """Of the record in it."""
    return 0 if line.startswith(b"{") else CHECKSUM


def _is_sound(record: Record, plain: bool) -> bool:
    """What its types do not say."""
    return record.schema in (PLAIN if plain else (SCHEMA, *PLAIN)) and (record.timing is None or bool(record.timing.samples_us))


def _parse_slowly(body: bytes, plain: bool) -> Record:
    """Decides about every line of which lines.reader is not certain, in sentences: 170 us a line, and 25 there."""
    try:
        row = _json(body)
        if not isinstance(row, dict):
            raise ValueError("is no record")
        schema = _check_schema(row.get("schema"))
        if plain and schema not in PLAIN:
            raise ValueError(f"has no checksum, as only schemas {' and '.join(PLAIN)} may; it says {schema}")
        _check_experts(row.get("case"))
        record = record_from_dict(row)
        problem = misfit(record, Record, "the record")
    except KeyError as error:
        raise _BadLine(f"lacks {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _BadLine(_told(error)) from None
    if problem:
        raise _BadLine(problem)
    if record.timing is not None and not record.timing.samples_us:
        raise _BadLine("the record.timing.samples_us is empty")
    return record


def _check_experts(case: object) -> None:
    experts = case.get("num_experts") if isinstance(case, dict) else None
    if isinstance(experts, int) and experts > EXPERTS_LIMIT:
        raise ValueError(f"case.num_experts is {experts}; the limit is {EXPERTS_LIMIT}")


def _check_schema(schema: object) -> str:
    if schema == SCHEMA:
        return SCHEMA
    if not isinstance(schema, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", schema):
        raise ValueError(f"schema is {str(schema)[:40]!r}, not a number such as {SCHEMA!r}")
    if schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise ValueError(f"schema {schema}, this moebench reads {SCHEMA}; a moebench that writes {schema} is needed")
    return schema


def _minor(schema: str) -> int:
    return int(schema.split(".")[1])


def _known(row: dict[str, Any], kind: type[Manifest | Device]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind) if field.name in row}


def _json(data: bytes) -> object:
    """Strict: JSON has no NaN and no Infinity. Raises ValueError."""
    try:
        if data.isascii():  # as ours is; what follows looks for other encodings and for spaces as well
            with suppress(ValueError):
                text = data.decode("ascii")
                value, end = _decoder().raw_decode(text)
                if end == len(text):
                    return value
        return _decoder().decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


@cache  # json.loads makes one each time that it is given a parse_constant
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_no_constant)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _told(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def _lines(path: Path) -> Iterator[bytes]:
    """Of a regular file, with their ends; none where there is no file. Raises RecordError."""
    fd = _open(path, JOURNAL_BYTES_LIMIT, missing=True)
    if fd is not None:
        with os.fdopen(fd, "rb", buffering=1 << 20) as file:
            yield from file


def _read(path: Path, limit: int, missing: bytes | None = None) -> bytes:
    """A regular file, whole. Raises RecordError."""
    fd = _open(path, limit, missing=missing is not None)
    if fd is None:
        return missing or b""
    with os.fdopen(fd, "rb"):
        return b"".join(_chunks(fd, limit))


def _open(path: Path, limit: int, missing: bool) -> int | None:
    """No link is followed and nothing that is not a file is opened for long. None for what may be missing and is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        if not missing:
            raise
        return None
    except OSError as error:
        reason = "is a symbolic link, and a run directory holds none" if path.is_symlink() else (error.strerror or str(error))
        raise RecordError(f"{path}: {reason}") from None
    facts = os.fstat(fd)
    problem = "is not a regular file" if not stat.S_ISREG(facts.st_mode) else ""
    if not problem and facts.st_size > limit:
        problem = f"has {facts.st_size} bytes; the limit is {limit}"
    if problem:
        os.close(fd)
        raise RecordError(f"{path} {problem}")
    return fd


def _opened(path: Path) -> BinaryIO:
    fd = _open(path / JOURNAL, JOURNAL_BYTES_LIMIT, missing=False)
    assert fd is not None  # else it is missing, which raises FileNotFoundError
    return os.fdopen(fd, "rb")


def _chunks(fd: int, limit: int, size: int = 1 << 24) -> Iterator[bytes]:
    left = limit
    while left > 0 and (chunk := os.read(fd, min(left, size))):
        left -= len(chunk)
        yield chunk
