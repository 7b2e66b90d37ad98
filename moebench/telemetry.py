"""What a GPU's own sensors say while it is measured, asked by a process of its own that never changes a setting.

NVML can block inside the driver, so neither the supervisor nor a timed process calls it. `python -m moebench.telemetry FD [UUID]` is the
child: JSON lines on the file descriptor FD, 20 a second. `Sensors` is the supervisor's end."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Self

from moebench.record import Telemetry

PERIOD_S = 0.05
KEPT_SAMPLES = round(20 * 60 / PERIOD_S)
MAX_GAP_S = 1.0  # a hole of 20 polls inside a window: the rest of it says too little about the row
MIN_ENERGY_S = 5 * PERIOD_S  # the counter advances in steps; of a shorter window one step is too large a part
IDLE_S = 1.0  # of first samples. A worker is slower than that to touch the GPU: importing torch alone takes 2.9 s
START_S = 10.0  # until the first line; Python and the driver have to start
SILENT_S = 2.0  # between lines, then the child counts as hung
MAX_LINE_BYTES = 1 << 16  # a real one is about 400
FLOOD_BYTES, FLOOD_BYTES_S = 1 << 20, 1 << 16  # at once and per second; 20 real lines are about 8000 bytes

# Bits of NVML's clocks event reasons: what holds the clocks down.
REASONS = {
    0x001: "gpu_idle",
    0x002: "user_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}

_SM, _MEMORY = 1, 2  # nvmlClockType_t
_CORRECTED, _UNCORRECTED = 0, 1  # nvmlMemoryErrorType_t
_VOLATILE = 0  # nvmlEccCounterType_t: since the driver was loaded
_MEMORY_V2 = 0x02000028  # the version that does not count what the driver reserves as used
_PR_SET_PDEATHSIG = 1  # prctl(2): a signal when the parent ends
_ROOT = Path(__file__).parents[1]  # so that the child of a bare checkout finds moebench from any working directory


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question to NVML."""

    field: str
    function: str  # of nvidia-ml-py
    arguments: tuple[int, ...] = ()
    member: str = ""  # of the structure it returns, or of each structure in the list
    scale: float = 1.0
    every: int = 1  # polls; some answers matter before the first row only


# All that is ever called with a GPU's handle: getters. Of several lines for one field the first that the driver answers is kept.
QUERIES = (
    Query(field="sm_mhz", function="nvmlDeviceGetClockInfo", arguments=(_SM,)),
    Query(field="mem_mhz", function="nvmlDeviceGetClockInfo", arguments=(_MEMORY,)),
    Query(field="power_w", function="nvmlDeviceGetPowerUsage", scale=1e-3),
    Query(field="temperature_c", function="nvmlDeviceGetTemperatureV", arguments=(0,)),
    Query(field="temperature_c", function="nvmlDeviceGetTemperature", arguments=(0,)),  # older drivers
    Query(field="reasons", function="nvmlDeviceGetCurrentClocksEventReasons"),
    Query(field="reasons", function="nvmlDeviceGetCurrentClocksThrottleReasons"),  # its name in older drivers
    Query(field="energy_mj", function="nvmlDeviceGetTotalEnergyConsumption"),
    Query(field="ecc_corrected", function="nvmlDeviceGetTotalEccErrors", arguments=(_CORRECTED, _VOLATILE)),
    Query(field="ecc_uncorrected", function="nvmlDeviceGetTotalEccErrors", arguments=(_UNCORRECTED, _VOLATILE)),
    Query(field="max_sm_mhz", function="nvmlDeviceGetMaxClockInfo", arguments=(_SM,), every=10),
    Query(field="power_limit_w", function="nvmlDeviceGetEnforcedPowerLimit", scale=1e-3, every=10),
    Query(field="used_bytes", function="nvmlDeviceGetMemoryInfo", arguments=(_MEMORY_V2,), member="used", every=10),
    Query(field="used_bytes", function="nvmlDeviceGetMemoryInfo", member="used", every=10),
    Query(field="utilization", function="nvmlDeviceGetUtilizationRates", member="gpu", scale=1e-2, every=10),
    Query(field="processes", function="nvmlDeviceGetComputeRunningProcesses", member="pid", every=10),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at the sensors; None where the driver does not tell."""

    t: float  # s on this machine's monotonic clock
    sm_mhz: float | None = None
    mem_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    reasons: tuple[str, ...] | None = None
    energy_mj: float | None = None
    ecc_corrected: float | None = None
    ecc_uncorrected: float | None = None
    max_sm_mhz: float | None = None
    power_limit_w: float | None = None
    used_bytes: float | None = None
    utilization: float | None = None  # share of the driver's last sampling period in which a kernel ran
    processes: tuple[int, ...] | None = None  # empty in some virtual machines and containers, whoever is there


@dataclass(frozen=True, kw_only=True)
class Idle:
    """The GPU before any worker touched it."""

    used_bytes: int
    utilization: float
    processes: tuple[int, ...]


class Sensors:
    """The child, and what it has said in the last 20 minutes. Whatever happens to it costs the telemetry and nothing else.

    Open it in the main thread before the first worker starts: the kernel ends the child with the thread that started it."""

    def __init__(self, uuid: str = "", command: Sequence[str] = (sys.executable, "-m", "moebench.telemetry")) -> None:
        self._uuid, self._command = uuid, command
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._first: list[Sample] = []
        self._lock = threading.Lock()
        self._problem = ""
        self._heard = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except (OSError, RuntimeError) as error:  # no process, no descriptor or no thread to be had
            self._problem = f"the process that reads the GPU's sensors cannot be started: {error}"
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def problem(self) -> str:
        """Why there is no telemetry, or no more; empty while all is well."""
        silent_s = time.monotonic() - self._heard
        if self._problem or self._process is None or silent_s <= (SILENT_S if self._samples else START_S):
            return self._problem
        return f"the process that reads the GPU's sensors has said nothing for {silent_s:.0f} s: the driver may hang"

    def window(self, start_s: float, end_s: float) -> Telemetry | None:
        """What was sensed from start_s to end_s of the monotonic clock; None where too little of it was."""
        with self._lock:
            samples = list(self._samples)
        idle = self.idle()
        return summarize(samples, start_s, end_s, foreign_bytes=idle.used_bytes if idle else 0)

    def idle(self) -> Idle | None:
        """The first second of samples. Complete before a worker that was started after this has imported torch."""
        with self._lock:
            first = list(self._first)
        if not first:
            return None
        return Idle(
            used_bytes=round(_median(s.used_bytes for s in first)),
            utilization=_median(s.utilization for s in first),
            processes=tuple(sorted({pid for s in first for pid in s.processes or ()})),
        )

    def close(self) -> None:
        """End the child: by closing its stdin, then politely, then not. Takes 2 s at most, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # stdin=PIPE
        process.stdin.close()
        for wait_s, number in ((0.5, signal.SIGTERM), (0.5, signal.SIGKILL), (0.5, signal.SIGKILL)):
            try:
                process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                _kill_group(process.pid, number)
        _kill_group(process.pid, signal.SIGKILL)  # whatever it started
        if self._listener is not None:
            self._listener.join(0.5)  # one that cannot be killed, deep in the driver, leaves a daemon thread waiting

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                [*self._command, str(write_end), *filter(None, [self._uuid])],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[write_end],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))},
                start_new_session=True,  # Ctrl-C is the supervisor's to handle, and killpg reaches what the child starts
            )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._process = process
        self._heard = time.monotonic()
        self._listener = threading.Thread(target=self._listen, args=(read_end, process), name="telemetry", daemon=True)
        self._listener.start()

    def _listen(self, pipe: int, process: subprocess.Popen[bytes]) -> None:
        pending, received, started = b"", 0, time.monotonic()
        with open(pipe, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                received += len(chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                flood = received > FLOOD_BYTES + FLOOD_BYTES_S * (time.monotonic() - started) or len(pending) > MAX_LINE_BYTES
                if flood:
                    self._problem = "the process that reads the GPU's sensors floods its pipe and was stopped"
                elif all(map(self._take, lines)):
                    continue
                _kill_group(process.pid, signal.SIGKILL)
                return
        if self._process is not None and not self._problem:  # else it was told to end
            self._problem = "the process that reads the GPU's sensors has ended; to see why: python -m moebench.telemetry 1"

    def _take(self, line: bytes) -> bool:
        """False when nothing that follows can be trusted."""
        try:
            told = parse(line)
            if isinstance(told, Sample) and self._samples and told.t <= self._samples[-1].t:
                raise ValueError("time runs backwards")
        except (ValueError, RecursionError, OverflowError) as error:
            self._problem = f"the process that reads the GPU's sensors wrote something else and was stopped: {error}"[:300]
            return False
        if isinstance(told, str):
            self._problem = told
            return True
        self._heard = time.monotonic()
        with self._lock:
            self._samples.append(told)
            if told.t - (self._first[0].t if self._first else told.t) <= IDLE_S:
                self._first.append(told)
        return True


def summarize(samples: Sequence[Sample], start_s: float, end_s: float, *, foreign_bytes: int = 0) -> Telemetry | None:
    """What samples in order of time say about a window; its neighbours stand in where fewer than two lie inside."""
    inside = [s for s in samples if start_s <= s.t <= end_s]
    before = [s for s in samples if start_s - MAX_GAP_S <= s.t < start_s][-1:]
    after = [s for s in samples if end_s < s.t <= end_s + MAX_GAP_S][:1]
    around = before + inside + after
    if not around or _longest_hole(around, start_s, end_s) > MAX_GAP_S:
        return None
    chosen = inside if len(inside) >= 2 else around
    busy = [s for s in chosen if "gpu_idle" not in (s.reasons or ())] or chosen  # an idle neighbour's clock is not the row's
    clocks = sorted(s.sm_mhz for s in busy if s.sm_mhz is not None) or [0.0]
    told = [s.reasons for s in chosen if s.reasons is not None]
    energy_j, window_s = _energy(around, start_s, end_s)
    return Telemetry(
        samples=len(chosen),
        sm_mhz=(clocks[len(clocks) // 10], median(clocks), clocks[-1]),
        max_sm_mhz=max(_known(s.max_sm_mhz for s in around), default=0.0),
        mem_mhz=_median(s.mem_mhz for s in chosen),
        power_w=energy_j / window_s if energy_j is not None else fmean(_known(s.power_w for s in chosen) or [0.0]),
        power_limit_w=min(_known(s.power_limit_w for s in around), default=0.0),
        temperature_c=max(_known(s.temperature_c for s in chosen), default=0.0),
        reasons={name: sum(name in names for names in told) / len(told) for name in sorted({n for names in told for n in names})},
        energy_j=energy_j,
        window_s=window_s,
        ecc_corrected=_increase(s.ecc_corrected for s in around),
        ecc_uncorrected=_increase(s.ecc_uncorrected for s in around),
        foreign_bytes=foreign_bytes,
    )


def parse(line: bytes) -> Sample | str:
    """A sample, or the sentence why there are none. Raises ValueError, RecursionError or OverflowError for anything else."""
    row = json.loads(line, parse_constant=_refuse)
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} instead of an object")
    if "unavailable" in row:
        return str(row["unavailable"])[:500]
    values: dict[str, float | tuple[str, ...] | tuple[int, ...]] = {}
    for name, value in row.items():
        if name not in _FIELDS:
            continue
        if name in ("reasons", "processes"):
            kind = str if name == "reasons" else int
            if not isinstance(value, list) or not all(type(item) is kind for item in value):
                raise ValueError(f"{name}={value!r} is no list of {kind.__name__}")
            values[name] = tuple(value)
        elif type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is no number")
        else:
            values[name] = float(value)
    if "t" not in values:
        raise ValueError("a sample without its time")
    return Sample(**values)  # type: ignore[arg-type]  # each was checked above


def main(pipe: int, uuid: str) -> None:
    """Write lines until the pipe or stdin closes or the parent dies."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # not Linux: parent and stdin are looked at as well, as long as NVML answers
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    lines = poll(uuid)
    with suppress(BrokenPipeError):
        while True:
            started = time.monotonic()
            line = next(lines, None)
            if line is None or os.getppid() != parent:
                return
            os.write(pipe, json.dumps(line, allow_nan=False).encode() + b"\n")
            due_s = PERIOD_S - (time.monotonic() - started)
            if select.select([0], [], [], max(due_s, 0.0))[0]:  # stdin is never written to: readable means closed
                return


def poll(uuid: str) -> Iterator[dict[str, object]]:
    """One line after the other; ends with {"unavailable": sentence} where there is no more to say."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        yield {"unavailable": f"nvidia-ml-py is not installed ({error}): pip install nvidia-ml-py"}
        return
    failure: type[Exception] = nvml.NVMLError
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, uuid)
    except failure as error:
        yield {"unavailable": f"NVML, a part of the NVIDIA driver, does not answer: {error}"}
        return
    except _UnavailableError as error:
        yield {"unavailable": str(error)}
        return
    queries = _answered(nvml, handle)
    if not queries:
        yield {"unavailable": "NVML knows this GPU and answers nothing about it; a driver update may help"}
        return
    slow: dict[str, object] = {}
    number = 0
    while True:
        line: dict[str, object] = {"t": time.monotonic()}
        asked = heard = 0
        for query in queries:
            if number % query.every:
                continue
            asked += 1
            try:
                value = _ask(nvml, handle, query)
            except failure:
                slow.pop(query.field, None)
                continue
            heard += 1
            (line if query.every == 1 else slow)[query.field] = value
        if asked and not heard:
            yield {"unavailable": "the GPU no longer answers NVML; dmesg may say why (look for Xid)"}
            return
        yield slow | line
        number += 1


class _UnavailableError(Exception):
    """Why there is nothing to poll, as a sentence."""


def _handle(nvml: ModuleType, uuid: str) -> object:
    """NVML's handle of the GPU that is measured."""
    count: int = nvml.nvmlDeviceGetCount()
    if uuid:
        named = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"  # torch leaves the prefix out
        try:
            return nvml.nvmlDeviceGetHandleByUUID(named)
        except nvml.NVMLError as error:
            raise _UnavailableError(f"NVML has no GPU {named}: {error}; its {count} are listed by nvidia-smi -L") from None
    if count != 1:
        raise _UnavailableError(f"NVML sees {count} GPUs and was not told which one is measured")
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _answered(nvml: ModuleType, handle: object) -> list[Query]:
    """The queries that this driver and this nvidia-ml-py answer, one for each field."""
    found: dict[str, Query] = {}
    for query in QUERIES:
        if query.field in found or not hasattr(nvml, query.function):
            continue
        try:
            _ask(nvml, handle, query)
        except nvml.NVMLError:
            continue
        found[query.field] = query
    return list(found.values())


def _ask(nvml: ModuleType, handle: object, query: Query) -> object:
    answer = getattr(nvml, query.function)(handle, *query.arguments)
    if query.field == "processes":
        return [int(getattr(process, query.member)) for process in answer]
    value = getattr(answer, query.member) if query.member else answer
    if query.field == "reasons":
        return _reason_names(int(value))
    return value * query.scale


def _reason_names(bits: int) -> list[str]:
    ones = [1 << n for n in range(bits.bit_length()) if bits >> n & 1]
    return [REASONS.get(bit, f"reason_{bit:#x}") for bit in ones]


def _longest_hole(around: Sequence[Sample], start_s: float, end_s: float) -> float:
    """Seconds of the window without a sample, at a stretch."""
    times = [min(max(s.t, start_s), end_s) for s in around]
    return max(b - a for a, b in zip([start_s, *times], [*times, end_s], strict=True))


def _energy(around: Sequence[Sample], start_s: float, end_s: float) -> tuple[float | None, float]:
    """Joules by the counter, and the seconds they were counted over: the window, as far as samples reach."""
    counted = [(s.t, s.energy_mj) for s in around if s.energy_mj is not None]
    if len(counted) >= 2:
        first_s, last_s = max(start_s, counted[0][0]), min(end_s, counted[-1][0])
        energy_j = (_between(counted, last_s) - _between(counted, first_s)) / 1e3
        if last_s - first_s >= MIN_ENERGY_S and energy_j >= 0:  # a counter that fell was reset with the driver
            return energy_j, last_s - first_s
    return None, end_s - start_s


def _between(counted: Sequence[tuple[float, float]], t: float) -> float:
    """The counter at t, on the line between its neighbours."""
    (t0, e0), (t1, e1) = next(pair for pair in pairwise(counted) if pair[1][0] >= t)
    return e0 + (e1 - e0) * (t - t0) / (t1 - t0)


def _increase(counts: Iterator[float | None]) -> int:
    known = _known(counts)
    return round(max(known[-1] - known[0], 0)) if known else 0


def _median(values: Iterator[float | None]) -> float:
    return median(_known(values) or [0.0])


def _known(values: Iterator[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _kill_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


_FIELDS = {field.name for field in fields(Sample)}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
