"""The supervisor: hands groups of cases to worker processes, watches their deadlines, yields records as they come.

It never imports torch and never owns a CUDA context, so a kernel that hangs or poisons its context takes only its worker along."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moebench.case import Case
from moebench.device import Device
from moebench.plan import Plan, Point
from moebench.record import Record, record_from_dict

# Seconds a worker may stay silent in each phase. jit: a vendor library may compile for minutes at its first call.
DEADLINES_S: Mapping[str, float] = {"start": 120, "import": 120, "alloc": 300, "jit": 1800, "check": 900, "time": 900, "trace": 120}
MAX_RESTARTS = 3  # of one group after workers that died; then its remaining cases are failed with the reason

ROOT = Path(__file__).parents[1]  # so that a worker of a bare checkout finds moebench from any working directory

Watch = Callable[[str, Case | None, str], None]  # phase, case, backend: what is going on now


class SweepError(Exception):
    """The machine cannot be surveyed at all."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What this machine is, and which points it cannot run and why."""

    device: Device
    reasons: Mapping[tuple[str, str], str]  # (case key, backend) -> sentence
    broken: Mapping[str, str]  # backend -> why it cannot be loaded
    act_dtypes: Mapping[str, str]

    def reason(self, point: Point) -> str | None:
        return self.reasons.get((point.case.key, point.backend))


def survey(points: Sequence[Point], plugins: Collection[str], log: Path | None = None) -> Survey:
    """Ask fresh processes, one for ours and one for each plug-in, so that a plug-in that crashes harms nobody else."""
    backends = list(dict.fromkeys(point.backend for point in points))
    groups = [[b for b in backends if b not in plugins], *([b] for b in backends if b in plugins)]
    device: Device | None = None
    reasons: dict[tuple[str, str], str] = {}
    broken: dict[str, str] = {}
    act_dtypes: dict[str, str] = {}
    for group in groups:
        cases = list(dict.fromkeys(point.case for point in points if point.backend in group))
        known = asdict(device) if device else None  # asking torch takes seconds; once is enough
        request = {"op": "survey", "backends": group, "cases": [asdict(case) for case in cases], "device": known}
        answered: set[str] = set()
        with _spawn(request, log) as worker:
            for frame in worker.frames():
                if "device" in frame:
                    device = device or Device(**frame["device"])  # type: ignore[arg-type]
                elif "broken" in frame:
                    broken[str(frame["backend"])] = str(frame["broken"])
                    answered.add(str(frame["backend"]))
                elif "unsupported" in frame:
                    name = str(frame["backend"])
                    answered.add(name)
                    act_dtypes[name] = str(frame["act_dtype"])
                    sentences: list[str | None] = frame["unsupported"]  # type: ignore[assignment]
                    reasons |= {(case.key, name): text for case, text in zip(cases, sentences, strict=True) if text}
        for name in group:
            if name not in answered:
                broken[name] = f"its survey process {worker.ending()}"
    if device is None:
        raise SweepError(f"this machine could not be surveyed: the worker {worker.ending()}{worker.last_words()}")
    return Survey(device=device, reasons=reasons, broken=broken, act_dtypes=act_dtypes)


def run(plan: Plan, found: Survey, run_id: str, done: Collection[tuple[str, str, str]], logs: Path, watch: Watch) -> Iterator[Record]:
    """A record for every point and arch of the plan that is not in `done`; skips first, then group by group."""
    logs.mkdir(parents=True, exist_ok=True)
    archs = plan.archs or (found.device.arch,)
    todo: list[Point] = []
    for arch in archs:
        for point in plan.points:
            if (point.case.key, point.backend, arch) in done:
                continue
            record = _blank(point, found, run_id, arch)
            if arch != found.device.arch:
                where = f"this machine is {found.device.arch}; run the same plan on {arch} and merge both with: moebench report RUN RUN"
                yield replace(record, status="skipped", reason=where)
            elif point.backend in found.broken:
                yield replace(record, reason=found.broken[point.backend])
            elif reason := found.reason(point):
                yield replace(record, status="skipped", reason=reason)
            else:
                todo.append(point)
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in todo:
        groups.setdefault((point.case.layer_key, point.backend), []).append(point)
    for number, group in enumerate(groups.values()):
        for record in _run_group(group, plan, found, run_id, logs / f"{number:03}-{group[0].backend}.log", watch):
            yield replace(record, run_id=run_id, time=_now())


def _run_group(group: list[Point], plan: Plan, found: Survey, run_id: str, log: Path, watch: Watch) -> Iterator[Record]:
    left = list(group)
    deaths = 0
    while left:
        backend = left[0].backend
        request = {"op": "measure", "run_id": run_id, "backend": backend, "l2": plan.l2, "cases": [asdict(p.case) for p in left]}
        phase = "start"
        prepared = False
        with _spawn(request, log) as worker:
            watch(phase, left[0].case, backend)
            for frame in worker.frames():
                if "phase" in frame:
                    phase = str(frame["phase"])
                    prepared = prepared or phase in ("check", "time")
                    watch(phase, left[0].case if left else None, backend)
                elif "record" in frame:
                    record = record_from_dict(frame["record"])  # type: ignore[arg-type]
                    if left and record.case == left[0].case:
                        left.pop(0)
                        yield record
        if not left or worker.clean:
            if left and not worker.progressed:
                yield from (_failed(p, found, run_id, f"the worker ended without a result{_see(log)}") for p in left)
                return
            continue  # a worker whose device was poisoned leaves after its failed record; the rest gets a fresh one
        deaths += 1
        ending = f"in phase {phase}: the worker {worker.ending()}{_see(log)}"
        if not prepared or deaths > MAX_RESTARTS:
            yield from (_failed(point, found, run_id, ending) for point in left)
            return
        yield _failed(left.pop(0), found, run_id, ending)


class _Worker:
    """A worker process and its pipe."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, log: Path | None) -> None:
        self._process, self._pipe, self._log = process, pipe, log
        self._overdue: str | None = None
        self.progressed = False

    @property
    def clean(self) -> bool:
        return self._process.returncode == 0 and self._overdue is None

    def frames(self) -> Iterator[dict[str, object]]:
        """JSON frames until the worker closes its pipe, dies, or stays silent past the deadline of its phase."""
        phase, pending = "start", b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                if not selector.select(DEADLINES_S.get(phase, 60)):
                    self._overdue = f"gave no sign of life for {DEADLINES_S.get(phase, 60):.0f} s and was stopped"
                    return
                chunk = os.read(self._pipe, 1 << 20)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    frame: dict[str, object] = json.loads(line)
                    phase = str(frame.get("phase", phase))
                    self.progressed = self.progressed or "record" in frame
                    yield frame

    def stop(self) -> None:
        """End the process and whatever it started: politely, then not."""
        deadline = 60.0 if self._overdue is None else 0.0
        for wait_s, number in ((deadline, signal.SIGTERM), (2.0, signal.SIGKILL), (10.0, signal.SIGKILL)):
            try:
                self._process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                _kill_group(self._process.pid, number)
        _kill_group(self._process.pid, signal.SIGKILL)  # children that outlived it
        os.close(self._pipe)

    def ending(self) -> str:
        code = self._process.returncode
        if self._overdue:
            return self._overdue
        if code is None:
            return "does not end even after SIGKILL"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def last_words(self) -> str:
        if self._log is None or not self._log.exists():
            return ""
        words = self._log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
        return f": {words[-1]}" if words else ""


@contextmanager
def _spawn(request: Mapping[str, object], log: Path | None) -> Iterator[_Worker]:
    read_end, write_end = os.pipe()
    sink = log.open("ab") if log else subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "moebench.worker", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            pass_fds=[write_end],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            start_new_session=True,  # Ctrl-C is ours to handle, and killpg reaches what the worker starts
        )
    finally:
        os.close(write_end)
        if not isinstance(sink, int):
            sink.close()
    worker = _Worker(process, read_end, log)
    try:
        assert process.stdin is not None  # stdin=PIPE
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its exit code tells
        yield worker
    except BaseException:
        _kill_group(process.pid, signal.SIGKILL)
        raise
    finally:
        worker.stop()


def _kill_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _blank(point: Point, found: Survey, run_id: str, arch: str) -> Record:
    return Record(
        case=point.case,
        backend=point.backend,
        act_dtype=found.act_dtypes.get(point.backend, ""),
        arch=arch,
        device=found.device.name if arch == found.device.arch else "",
        status="failed",
        run_id=run_id,
        time=_now(),
    )


def _failed(point: Point, found: Survey, run_id: str, reason: str) -> Record:
    return replace(_blank(point, found, run_id, found.device.arch), reason=reason)


def _see(log: Path) -> str:
    return f" (see logs/{log.name})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def now_id() -> str:
    """A run id that sorts by time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid() % 0x10000:04x}"
