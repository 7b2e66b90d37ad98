"""Where profiles come from: the capture child, nsys or ncu around it, an nsys export; with their floors, and as a Perfetto trace."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar
from urllib.parse import quote

from moebench import registry
from moebench.backend import ACT_DTYPES
from moebench.case import CASE_FIELDS, Case
from moebench.child import environment, spawn
from moebench.device import Device
from moebench.failure import without_advice
from moebench.realized import Realized
from moebench.reports.text import kernel_name
from moebench.roofline import RoofsError, best_roof
from moebench.routing import assign, realized
from moebench.timeline import (
    MOST_EVENTS,
    Counters,
    Event,
    Profile,
    ProfileError,
    View,
    breakdown,
    classify,
    floor,
    from_json,
    gemm_work,
    repeats,
)

Tool = Literal["nsys", "ncu"]
CALLS: Mapping[Tool | None, int] = {None: 10, "nsys": 10, "ncu": 1}  # ncu runs each kernel some 40 times to read all counters

# Seconds the child may stay silent in each phase; a vendor library may compile for minutes at its first call.
DEADLINES_S: Mapping[str, float] = {
    "start": 120,
    "import": 120,
    "alloc": 300,
    "jit": 1800,
    "check": 900,
    "warm up": 300,
    "profile": 900,
    "teardown": 30,
}
TOOL_DEADLINE_S = 3600  # of all phases, and of what nsys or ncu add

SAVED_BYTES_LIMIT = 256 << 20
EXPORT_BYTES_LIMIT = 4 << 30
EXPORT_SECONDS_LIMIT = 120
TEXT_BYTES_LIMIT = 1 << 20  # of one value in an export; CUTLASS has kernel names of 2000
ROUTED_LIMIT = 1 << 27  # router scores that a floor is worth computing

LOCKED = "ERR_NVGPUCTRPERM"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a capture child is asked for."""

    case: Case
    backend: str
    calls: int
    tool: Tool | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def capture(request: Request, log: Path) -> Iterator[str | Profile]:
    """The phases that the child is in, then its profile. Raises ProfileError with the reason where there is none."""
    with spawn("moebench.capture", asdict(request), DEADLINES_S, log) as child:
        for frame in child.frames():
            if "phase" in frame:
                yield child.phase
            elif "refused" in frame:
                raise ProfileError(str(frame["refused"]))
            else:
                yield from_json(json.dumps(frame["profile"]))
                return
    if child.failure is None:
        raise ProfileError(f"the child ended without a profile{child.last_words()}")
    reason = without_advice(child.failure.reason)
    raise ProfileError(reason if child.failure.status in ("hang", "compile_timeout") else f"{reason}{child.last_words()}")


def command(tool: Tool, request: Request, output: Path, frames: str = "-") -> list[str]:
    """The command line that records one case in one process; output without suffix, which the tool appends."""
    child = _capture_command(frames, request.to_json())
    if tool == "nsys":
        # node: the kernels inside a CUDA graph, not the graph as one bar. Event tracing stalls programs that record many events.
        return [
            *("nsys", "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node"),
            *("--cuda-event-trace=false", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--export=sqlite"),
            *("--force-overwrite=true", f"--output={output}", *child),
        ]
    # The slash makes it a push/pop range. Clocks stay as they are: ncu's default changes a setting of the device.
    return [
        *("ncu", "--set", "full", "--nvtx", "--nvtx-include", "moebench@call/", "--profile-from-start", "off"),
        *("--graph-profiling", "node", "--clock-control", "none", "--target-processes", "all"),
        *("--force-overwrite", "--export", str(output), *child),
    ]


def run_tool(tool: Tool, request: Request, output: Path) -> Path:
    """Record with nsys or ncu; the export or report that it left. Raises ProfileError with the reason where there is none."""
    if shutil.which(tool) is None:
        raise ProfileError(f"{tool} is not on the PATH")
    endings = ".frames", ".log", ".sqlite" if tool == "nsys" else ".ncu-rep"
    frames, log, found = (output.with_name(output.name + ending) for ending in endings)
    found.unlink(missing_ok=True)
    code, said = _run(command(tool, request, output, str(frames)), log)
    refused = [json.loads(line)["refused"] for line in _frames(frames) if b'"refused"' in line]
    if refused:
        raise ProfileError(str(refused[0]))
    if LOCKED.encode() in said:
        raise ProfileError(f"{tool} may not read the GPU's counters here ({LOCKED}): the driver keeps them for administrators")
    if code or not found.is_file():
        raise ProfileError(f"{tool} ended with exit code {code} and left no {found.name}{_last_words(said)}; see {log}")
    return found


def read_ncu(report: Path) -> list[Counters]:
    """What `ncu --import` says of a report. Raises ProfileError where it says nothing that is understood."""
    lines = ["ncu", "--import", str(report), "--csv", "--page", "raw", "--print-units", "base"]
    done = subprocess.run(lines, capture_output=True, timeout=TOOL_DEADLINE_S, check=False)
    if done.returncode:
        raise ProfileError(f"ncu --import ended with exit code {done.returncode}{_last_words(done.stderr)}")
    return ncu_counters(done.stdout.decode(errors="replace"))


def ncu_counters(text: str) -> list[Counters]:
    """Of ncu's raw page as CSV in base units: a row of titles, a row of units, a row for each kernel. Raises ProfileError."""
    rows = list(csv.reader(text[text.find('"ID"') :].splitlines())) if '"ID"' in text else []
    titles = {title: number for number, title in enumerate(rows[0])} if rows else {}
    wanted = ("Kernel Name", "gpu__time_duration.sum")
    if missing := [name for name in wanted if name not in titles]:
        raise ProfileError(f"ncu's table has no column {' and none '.join(missing)}")

    def number(row: Sequence[str], title: str) -> float | None:
        with suppress(KeyError, ValueError, IndexError):
            return float(row[titles[title]].replace(",", ""))
        return None

    kernels = [row for row in rows[2:] if len(row) == len(rows[0])]
    events = [Event(name=row[titles["Kernel Name"]], start_ns=place, end_ns=place) for place, row in enumerate(kernels)]
    found = []
    for row, event, phase in zip(kernels, events, classify(events), strict=True):
        time_ns = number(row, "gpu__time_duration.sum")
        dram = number(row, "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed")
        sm = number(row, "sm__throughput.avg.pct_of_peak_sustained_elapsed")
        if time_ns is None:
            raise ProfileError(f"ncu's table has no duration for {kernel_name(event.name)}")
        shares = (value / 100 if value is not None else None for value in (dram, sm))
        found.append(Counters(phase=phase, name=event.name, us=time_ns / 1e3, dram_share=next(shares), sm_share=next(shares)))
    return found


def load(path: Path) -> Profile:
    """A saved profile. Raises ProfileError for what is none."""
    try:
        if path.stat().st_size > SAVED_BYTES_LIMIT:
            raise ProfileError(f"{path} is larger than {SAVED_BYTES_LIMIT >> 20} MiB, and no saved profile is")
        return from_json(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror or error}") from None
    except ProfileError as error:
        raise ProfileError(f"{path} is no profile that can be read: {error}" if str(path) not in str(error) else str(error)) from None


def view(profile: Profile) -> View:
    """With the floors of its GEMMs, where the case's routing and the device's roofs are known."""
    found = breakdown(profile.calls, profile.case if profile.source == "cpu" else None)
    try:
        roof = best_roof(profile.device.name)
    except RoofsError as error:
        return View(profile=profile, breakdown=found, floors={}, roof=f"no floors: {error}")
    if roof is None:
        return View(
            profile=profile,
            breakdown=found,
            floors={},
            roof=f"no floors: the roofs of {profile.device.name} are not known; moebench calibrate measures them",
        )
    act_dtype = next((name for name in ACT_DTYPES if name == profile.act_dtype), None)
    if profile.routing is None or act_dtype is None:
        return View(profile=profile, breakdown=found, floors={}, roof="no floors: the recording does not say which experts got tokens")
    bandwidth = roof.bandwidth_bytes_s if profile.source != "cpu" else None  # a CPU's caches hold weights from the call before
    work = gemm_work(profile.case, profile.routing)
    floors = {phase: floor(phase, work, bandwidth, roof.flop_s(act_dtype)) for phase in found.phases_us}
    return View(
        profile=profile, breakdown=found, floors={phase: least for phase, least in floors.items() if least and least.us}, roof=roof.source
    )


def perfetto(views: Sequence[View]) -> str:
    """A trace in Chrome's JSON format, which ui.perfetto.dev opens: a process for each profile, a track for calls and for each stream."""
    events: list[dict[str, object]] = []
    for number, shown in enumerate(views, 1):
        profile = shown.profile
        begin = min((event.start_ns for call in profile.calls for event in call), default=0)
        title = f"{profile.backend}, {profile.case.label}, {profile.device.name}"
        events.append({"ph": "M", "pid": number, "tid": 0, "name": "process_name", "args": {"name": title}})
        streams = sorted({event.stream for call in profile.calls for event in call})
        tracks = {stream: place for place, stream in enumerate(streams, 1)}
        word = "thread" if profile.source == "cpu" else "stream"
        for tid, name in [(0, "calls"), *((tracks[stream], f"{word} {stream}") for stream in streams)]:
            events.append({"ph": "M", "pid": number, "tid": tid, "name": "thread_name", "args": {"name": name}})
        for place, call in enumerate(profile.calls):
            if call:
                first, last = min(e.start_ns for e in call), max(e.end_ns for e in call)
                events.append(_span(number, 0, f"call {place}", "call", first - begin, last - first, {}))
            for event, phase in zip(call, classify(call, profile.case), strict=True):
                args: dict[str, object] = {"phase": phase, "call": place, "name": event.name}
                name = kernel_name(event.name) if event.kind != "op" else event.name
                events.append(_span(number, tracks[event.stream], name, phase, event.start_ns - begin, event.end_ns - event.start_ns, args))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}, allow_nan=False)


def read_nsys(path: Path) -> list[Profile]:
    """The cases in an SQLite export of nsys, as `nsys export --type sqlite` and `nsys profile --export=sqlite` write it.

    Raises ProfileError for a file that is none, or in which moebench left no ranges. Tables are read, nothing in the file is run."""
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            magic = opened.read(16)
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror or error}") from None
    if magic != b"SQLite format 3\0":
        advice = "nsys export --type sqlite makes one of a .nsys-rep" if path.suffix == ".nsys-rep" else "see docs/profiling.md"
        raise ProfileError(f"{path} is not an SQLite file; {advice}")
    if size > EXPORT_BYTES_LIMIT:
        raise ProfileError(
            f"{path} has {size >> 20} MiB, and more than {EXPORT_BYTES_LIMIT >> 20} are not read; record fewer cases at once"
        )
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)) as connection:
            return _Export(connection).profiles()
    except sqlite3.Error as error:
        why = f"that took more than {EXPORT_SECONDS_LIMIT} s" if str(error) == "interrupted" else error
        raise ProfileError(f"{path} cannot be read as an nsys export: {why}") from None
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Range:
    text: str
    thread: int
    start_ns: int
    end_ns: int

    def holds(self, other: _Range) -> bool:
        return self.thread == other.thread and self.start_ns <= other.start_ns and other.end_ns <= self.end_ns


@dataclass(kw_only=True)
class _Recorded:
    """One `call` or `timed` range, and what was launched in it."""

    range: _Range
    events: list[Event] = field(default_factory=list)
    graph: bool = False


TIMED = ("call", "timed")  # ranges of moebench.capture, around one call, and of moebench.worker, around a region as it was timed

_T = TypeVar("_T", int, str)
_KERNELS, _COPIES, _FILLS = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET"
_LAUNCHES, _RANGES, _STRINGS = "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS", "StringIds"
_TABLES = {_KERNELS, _COPIES, _FILLS, _LAUNCHES, _RANGES, _STRINGS, "TARGET_INFO_GPU"}
_PUSH_POP, _DOMAIN = 59, 75  # of ENUM_NSYS_EVENT_TYPE
_COPY_KINDS: Mapping[object, str] = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}  # of ENUM_CUDA_MEMCPY_OPER


class _Export:
    """Tables of an export, whoever wrote it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        deadline = time.monotonic() + EXPORT_SECONDS_LIMIT
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, TEXT_BYTES_LIMIT)
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        connection.execute("PRAGMA trusted_schema = OFF")
        schema = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        # a view or a virtual table of that name would run code of the file's
        plain = {str(name) for name, sql in schema if str(sql).lstrip().upper().startswith("CREATE TABLE")}
        self._columns = {name: {str(row[1]) for row in connection.execute(f"PRAGMA table_info({name})")} for name in _TABLES & plain}

        known = self._columns.get(_STRINGS, set()) >= {"id", "value"}  # not joined: a long text would be there once for each row
        rows = self._rows(f"SELECT id, value FROM {_STRINGS}") if known else []
        self._strings: dict[object, str] = {number: _of(str, text) for number, text in rows}

    def profiles(self) -> list[Profile]:
        if _KERNELS not in self._columns and _COPIES not in self._columns:
            raise ProfileError("it holds no CUDA kernels; record with --trace=cuda,nvtx")
        cases, recorded = self._ranges()
        if not cases:
            raise ProfileError("it holds no ranges of moebench; record `moebench sweep` or `moebench profile` with --trace=cuda,nvtx")
        if not recorded:
            raise ProfileError("it holds cases, but no range `call` or `timed` within them: nothing was timed while nsys recorded")
        self._fill(recorded)
        device = self._device()
        return [
            _recorded_profile(case, backend, device, inside)
            for outer, case, backend in cases
            if (inside := [one for one in recorded if outer.holds(one.range)])
        ]

    def _ranges(self) -> tuple[list[tuple[_Range, Case, str]], list[_Recorded]]:
        """Of cases with what they are of, and what is timed within them."""
        columns = self._columns.get(_RANGES, set())
        if not {"start", "end", "globalTid"} <= columns:
            return [], []
        defaults = {"text": "NULL", "textId": "NULL", "eventType": str(_PUSH_POP), "domainId": "0"}
        wanted = ", ".join(name if name in columns else default for name, default in defaults.items())
        rows = [
            (start, end, thread, kind, domain, text if text is not None else self._strings.get(number))
            for start, end, thread, text, number, kind, domain in self._rows(f'SELECT start, "end", globalTid, {wanted} FROM {_RANGES}')
        ]
        ours = {(_process(_of(int, row[2])), row[4]) for row in rows if row[3] == _DOMAIN and row[5] == "moebench"}
        found = [
            _Range(text=_of(str, row[5]), thread=_of(int, row[2]), start_ns=_of(int, row[0]), end_ns=_of(int, row[1]))
            for row in rows
            if row[3] == _PUSH_POP
            and row[1] is not None
            and row[5] is not None
            and (not ours or (_process(_of(int, row[2])), row[4]) in ours)
        ]
        cases = [(one, *known) for one in sorted(found, key=lambda r: r.start_ns) if (known := _case_of(one.text))]
        timed = [one for one in found if one.text in TIMED]
        return cases, [_Recorded(range=one) for one in sorted(timed, key=lambda r: r.start_ns)]

    def _fill(self, recorded: Sequence[_Recorded]) -> None:
        """What was launched in a range belongs to it; where the launch is not known, what began to run in it."""
        launches: dict[tuple[int, int, bool], tuple[int, int]] = {}
        if {"start", "globalTid", "correlationId", "nameId"} <= self._columns.get(_LAUNCHES, set()):
            for start, thread, correlation, name in self._rows(f"SELECT start, globalTid, correlationId, nameId FROM {_LAUNCHES}"):
                of_graph = "GraphLaunch" in self._strings.get(name, "")
                launches[_process(_of(int, thread)), _of(int, correlation), of_graph] = _of(int, start), _of(int, thread)
        by_process: dict[int, list[_Recorded]] = defaultdict(list)
        for one in recorded:
            by_process[_process(one.range.thread)].append(one)
        starts = {process: [one.range.start_ns for one in inside] for process, inside in by_process.items()}
        for process, correlation, graph, event in self._events():
            # a node of a graph may instead have the correlation of the call that made it, long before
            moment, thread = launches.get((process, correlation, graph), (event.start_ns, None))
            place = bisect_right(starts.get(process, []), moment) - 1
            if place >= 0:
                one = by_process[process][place]
                if moment <= one.range.end_ns and thread in (None, one.range.thread):
                    one.events.append(event)
                    one.graph = one.graph or graph

    def _events(self) -> Iterator[tuple[int, int, bool, Event]]:
        """(process, correlation, whether of a graph, event)."""
        for table in (_KERNELS, _COPIES, _FILLS):
            columns = self._columns.get(table, set())
            if not {"start", "end", "streamId", "correlationId", "globalPid"} <= columns:
                continue
            what = {_KERNELS: "demangledName", _COPIES: "copyKind"}.get(table, "")
            wanted = ", ".join(name if name in columns else "NULL" for name in ("graphNodeId", what))
            rows = self._rows(f'SELECT start, "end", streamId, correlationId, globalPid, {wanted} FROM {table}')
            for start, end, stream, correlation, process, graph_node, found in rows:
                if table == _KERNELS:
                    name = self._strings.get(found, "kernel without a name")
                else:
                    name = f"Memcpy {_COPY_KINDS.get(found, '')}".strip() if table == _COPIES else "Memset"
                event = Event(
                    name=name,
                    start_ns=_of(int, start),
                    end_ns=max(_of(int, start), _of(int, end)),
                    stream=_of(int, stream),
                    kind="kernel" if table == _KERNELS else "memcpy" if table == _COPIES else "memset",
                )
                yield _process(_of(int, process)), _of(int, correlation), graph_node not in (None, 0), event

    def _device(self) -> Device:
        columns = self._columns.get("TARGET_INFO_GPU", set())
        wanted = [name for name in ("name", "computeMajor", "computeMinor", "totalMemory", "l2CacheSize", "smCount") if name in columns]
        rows = self._rows(f"SELECT {', '.join(wanted)} FROM TARGET_INFO_GPU LIMIT 1") if "name" in wanted else []
        facts = dict(zip(wanted, rows[0], strict=True)) if rows else {}
        numbers = {name: value for name, value in facts.items() if isinstance(value, int)}
        arch = f"sm{numbers['computeMajor']}{numbers['computeMinor']}" if {"computeMajor", "computeMinor"} <= numbers.keys() else "gpu"
        return Device(
            arch=arch,
            name=str(facts.get("name", "a GPU that the export does not name")),
            torch=None,
            memory_bytes=numbers.get("totalMemory", 0),
            l2_bytes=numbers.get("l2CacheSize", 0),
            num_sms=numbers.get("smCount", 0),
        )

    def _rows(self, query: str) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = self._connection.execute(query).fetchmany(MOST_EVENTS + 1)
        if len(rows) > MOST_EVENTS:
            raise ProfileError(f"a table has more than {MOST_EVENTS} rows; record fewer cases at once")
        return rows


def _recorded_profile(case: Case, backend: str, device: Device, inside: Sequence[_Recorded]) -> Profile:
    exact = [one for one in inside if one.range.text == "call"]
    notes: tuple[str, ...] = ()
    if exact:
        calls = [tuple(sorted(one.events, key=_start)) for one in exact]
    else:
        calls = [call for one in inside for call in repeats(sorted(one.events, key=_start))]
        notes = ("calls were told apart by the sequence of kernel names that repeats",)
    return Profile(
        case=case,
        backend=backend,
        act_dtype=next((found.act_dtype for found in registry.builtin() if found.name == backend), ""),
        device=device,
        source="nsys",
        launch="cuda_graph" if any(one.graph for one in inside) else "eager",
        calls=tuple(calls),
        routing=_routing(case),
        notes=notes,
    )


def _routing(case: Case) -> Realized | None:
    """None where it cannot be known here: a recording may name any file as its trace, and none is opened for it."""
    if case.routing.startswith("trace") or case.num_tokens * case.num_experts > ROUTED_LIMIT:
        return None
    with suppress(ValueError):
        return realized(case, assign(case))
    return None


def _case_of(text: str) -> tuple[Case, str] | None:
    """Of a range's text case|BACKEND|KEY."""
    kind, _, rest = text.partition("|")
    backend, _, key = rest.partition("|")
    if kind != "case" or not key:
        return None
    names = "|".join(CASE_FIELDS)
    values = dict(re.findall(rf"(?:^|,)({names})=(.*?)(?=,(?:{names})=|$)", key, re.DOTALL))
    with suppress(TypeError, ValueError):
        fields = {name: value if name in ("model", "routing") else int(value) for name, value in values.items()}
        return Case(**fields), backend  # type: ignore[arg-type]  # Case checks them
    return None


def _of(kind: type[_T], value: object) -> _T:
    """SQLite stores anything in any column."""
    if type(value) is not kind:
        raise ProfileError(f"a value is {str(value)[:80]!r} where there should be {'a number' if kind is int else 'a text'}")
    return value


def _process(identifier: int) -> int:
    """Of nsys' globalPid or globalTid: 24 bits of the process above 24 of the thread."""
    return identifier >> 24 & 0xFFFFFF


def _start(event: Event) -> tuple[int, int]:
    return event.start_ns, event.end_ns


def _span(pid: int, tid: int, name: str, phase: str, start_ns: int, length_ns: int, args: Mapping[str, object]) -> dict[str, object]:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": phase, "ts": start_ns / 1e3, "dur": length_ns / 1e3, "args": args}


def _capture_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moebench.capture", *arguments]


@contextmanager
def _process_of(line: Sequence[str], sink: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which is ended with all that it started."""
    process = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=sink,
        env=environment(),
        start_new_session=True,  # Ctrl-C is the parent's to handle, and killpg reaches what a tool starts
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(line: Sequence[str], log: Path) -> tuple[int, bytes]:
    """Exit code and what it said. Raises ProfileError where it does not end."""
    with log.open("wb") as sink, _process_of(line, sink) as process:
        try:
            process.wait(timeout=TOOL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise ProfileError(f"{line[0]} did not end within {TOOL_DEADLINE_S} s and was stopped") from None
    return process.returncode, log.read_bytes()


def _frames(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.is_file() else []


def _last_words(said: bytes) -> str:
    words = said[-2000:].decode(errors="replace").strip().splitlines()
    return f": {words[-1]}" if words else ""
