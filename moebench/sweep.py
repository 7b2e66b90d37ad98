"""The supervisor: hands groups of cases to worker processes, watches their deadlines, yields records as they come.

It never imports torch and never owns a CUDA context, so a kernel that hangs or poisons its context takes only its worker along."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from types import TracebackType

from moebench.case import Case
from moebench.child import Child, Frame, leashed, spawn
from moebench.device import Device
from moebench.failure import Failure, of_exit
from moebench.flags import raised
from moebench.plan import Plan, Point
from moebench.record import Record, record_from_dict
from moebench.telemetry import Sensors

# Seconds a child may stay silent in each phase. jit: a vendor library may compile for minutes at its first call. interrupt: what the
# case in progress gets after Ctrl-C. teardown: from its last frame to its end.
DEADLINES_S: Mapping[str, float] = {
    "start": 120,
    "import": 120,
    "alloc": 300,
    "jit": 1800,
    "check": 900,
    "time": 900,
    "trace": 120,
    "teardown": 60,
    "probe": 60,
    "interrupt": 30,
}
MAX_DEATHS = 3  # workers of one group in a row without an ok between them; then its remaining cases are failed with the reason
MAX_DEVICE_DEATHS = 12  # of whatever backend; then the device is quarantined although its probes are well
PROBE_PAUSES_S = (0.0, 2.0, 5.0)  # before each probe after an abnormal end; when the last one fails too, the device is quarantined
CORES_AHEAD = 4  # of ours; on fewer, a worker that imports would disturb the one that measures
REPEAT_CHECK = 300  # launches; finds what happens once in a hundred with 95 %

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


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How long anything may take, and how often a result is looked at."""

    deadlines_s: Mapping[str, float] = field(default_factory=lambda: dict(DEADLINES_S))
    repeat_check: int = REPEAT_CHECK
    ahead: bool | None = None  # start the next group's worker early, for its imports; None: where that disturbs no measurement

    def starts_ahead(self, device: Device) -> bool:
        """Never where the CPU is what is timed."""
        return self.ahead if self.ahead is not None else device.is_gpu and len(os.sched_getaffinity(0)) >= CORES_AHEAD


def survey(points: Sequence[Point], plugins: Collection[str], log: Path | None = None, rules: Rules | None = None) -> Survey:
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
        with spawn("moebench.worker", request, (rules or Rules()).deadlines_s, log) as child:
            for frame in child.frames():
                try:
                    if "device" in frame:
                        device = device or Device(**frame["device"])  # type: ignore[arg-type]
                    elif "broken" in frame:
                        broken[str(frame["backend"])] = str(frame["broken"])
                        answered.add(str(frame["backend"]))
                    elif "unsupported" in frame:
                        name = str(frame["backend"])
                        sentences: list[str | None] = frame["unsupported"]  # type: ignore[assignment]
                        reasons |= {(case.key, name): str(text) for case, text in zip(cases, sentences, strict=True) if text}
                        act_dtypes[name] = str(frame["act_dtype"])
                        answered.add(name)
                except (KeyError, TypeError, ValueError) as error:
                    child.failure = Failure(status="crash", reason=f"in phase {child.phase}: the worker sent a bad frame: {error}")
                    break
        ended = (child.failure or of_exit(0, child.phase)).reason
        for name in group:
            if name not in answered:
                broken[name] = f"its survey did not end well: {ended}"
    if device is None:
        raise SweepError(f"this machine could not be surveyed: {ended}{child.last_words()}")
    return Survey(device=device, reasons=reasons, broken=broken, act_dtypes=act_dtypes)


def run(
    plan: Plan,
    found: Survey,
    run_id: str,
    done: Collection[tuple[str, str, str, str, int]],  # journal.settled
    logs: Path,
    watch: Watch,
    rules: Rules | None = None,
    halt: Callable[[], bool] = lambda: False,
    sensors: Sensors | None = None,
) -> Iterator[Record]:
    """A record for every point, arch and round of the plan that is not in `done`; skips first, then group by group.

    Once halt() is true the case in progress is finished, or given up after the deadline `interrupt`, and nothing else is begun."""
    logs.mkdir(parents=True, exist_ok=True)
    todo: list[_Group] = []
    for arch in plan.archs or (found.device.arch,):
        for number, points in plan.groups():
            tasks = []
            for point in points:
                record = _blank(point, plan, found, run_id, arch, number)
                if (*record.key, record.scope, record.round) in done:
                    continue
                if arch != found.device.arch:
                    where = f"this machine is {found.device.arch}; run the same plan on {arch} and merge both with: moebench report RUN RUN"
                    yield replace(record, status="skipped", reason=where)
                elif point.backend in found.broken:
                    yield replace(record, reason=found.broken[point.backend])
                elif reason := found.reason(point):
                    yield replace(record, status="skipped", reason=reason)
                else:
                    tasks.append(_Task(point=point, blank=record))
            if tasks:
                log = logs / f"{len(todo):03}-{_file_name(tasks[0].point.backend)}.log"
                todo.append(_Group(tasks=tasks, log=log))
    with _Supervisor(plan, found, run_id, watch, rules or Rules(), halt) as supervisor:
        for group, following in zip_longest(todo, todo[1:]):
            for record in supervisor.run_group(group, following):
                yield _doubted(replace(record, run_id=run_id, time=_now()), sensors)
            if halt():
                return


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A point in one round, and the record of it that says nothing yet."""

    point: Point
    blank: Record

    @property
    def case(self) -> Case:
        return self.point.case

    def failed(self, failure: Failure) -> Record:
        return replace(self.blank, status=failure.status, reason=failure.reason)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Points that share a layer and a backend, and so a process while nothing goes wrong."""

    tasks: Sequence[_Task]
    log: Path


class _Supervisor:
    """One device, who may use it, and who waits for that."""

    def __init__(self, plan: Plan, found: Survey, run_id: str, watch: Watch, rules: Rules, halt: Callable[[], bool]) -> None:
        self._plan, self._found, self._run_id, self._watch, self._rules, self._halt = plan, found, run_id, watch, rules, halt
        self._quarantine = ""  # why the device gets no more cases
        self._deaths = 0  # of workers of all groups in a row, without an ok between them
        self._waiting: tuple[_Group, Child] | None = None  # started early; touches no GPU before its turn

    def __enter__(self) -> _Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._waiting:
            _, child = self._waiting
            child.dismiss()
            child.stop()

    def run_group(self, group: _Group, following: _Group | None) -> Iterator[Record]:
        """Records of one group, from as many workers as it takes; the worker of the following one is started on the way."""
        left, log = list(group.tasks), group.log
        deaths = 0  # in a row, without an ok between them
        retried: _Task | None = None  # that was out of memory in a worker that had done others before
        while left and not self._quarantine and not self._halt():
            turn = _Turn(left, retried)
            with leashed(self._waited(group) or self._started(left, log)) as child:
                child.release()
                self._watch("start", left[0].case, left[0].point.backend)
                for frame in child.frames(self._halt):
                    record = turn.take(frame)
                    if "phase" in frame:
                        self._watch(turn.phase, left[0].case if left else None, group.tasks[0].point.backend)
                        if turn.phase == "jit" and following and self._rules.starts_ahead(self._found.device) and not self._halt():
                            self._start_ahead(following)
                    if record is not None:
                        if record.status == "ok":
                            deaths = self._deaths = 0
                        yield record
                    if turn.again or turn.failure or (record is not None and self._halt()):
                        child.dismiss()
                        break
            failure = child.failure or turn.failure
            if self._halt() and (child.interrupted or failure is None):
                if turn.prepared and turn.midway and left:
                    yield left[0].failed(Failure(status="interrupted", reason=f"in phase {turn.phase}: stopped on request"))
                return
            if failure is None and turn.midway and left and not turn.again:
                failure = of_exit(0, turn.phase)
            retried = turn.again
            if failure is not None:
                deaths += 1
                self._deaths += 1
                failure = replace(failure, reason=f"{failure.reason} (see logs/{log.name})")
                hopeless = not turn.prepared or deaths > MAX_DEATHS
                for task in list(left) if hopeless else left[:1] if turn.midway else []:
                    left.remove(task)
                    yield task.failed(failure)
            if failure is not None or turn.last_status == "cuda_error":
                needed = left[0].case.device_bytes if left else 0
                self._quarantine = self._probe(needed, failure.reason if failure else "a CUDA error", log)
            if failure is not None and self._deaths >= MAX_DEVICE_DEATHS and not self._quarantine:
                told = f"{self._deaths} workers in a row ended abnormally and no case was ok between them, the last one: {failure.reason}"
                self._quarantine = self._not_tried(told)
        if self._quarantine:
            yield from (task.failed(Failure(status="failed", reason=self._quarantine)) for task in left)

    def _started(self, tasks: Sequence[_Task], log: Path, *, held: bool = False) -> Child:
        return Child("moebench.worker", self._request(tasks), self._rules.deadlines_s, log, held=held)

    def _start_ahead(self, group: _Group) -> None:
        """While the present worker prepares, before it times: then the imports, 3.6 s on an H200's host, disturb nothing."""
        if self._waiting is None:
            self._waiting = group, self._started(group.tasks, group.log, held=True)

    def _waited(self, group: _Group) -> Child | None:
        """The worker that waits for this group's turn, if one does; once."""
        if self._waiting is None or self._waiting[0] is not group:
            return None
        _, child = self._waiting
        self._waiting = None
        return child

    def _request(self, tasks: Sequence[_Task]) -> Frame:
        return {
            "op": "measure",
            "run_id": self._run_id,
            "backend": tasks[0].point.backend,
            "l2": self._plan.l2,
            "scope": self._plan.scope,
            "round": tasks[0].blank.round,
            "repeat_check": self._rules.repeat_check,
            "cases": [asdict(task.case) for task in tasks],
        }

    def _probe(self, needed_bytes: int, after: str, log: Path) -> str:
        """Why the device takes no more cases, once no fresh process finds it well; empty if one does, or the user wants to stop."""
        told = ""
        for pause_s in PROBE_PAUSES_S:
            until = time.monotonic() + pause_s
            while time.monotonic() < until and not self._halt():
                time.sleep(min(0.1, pause_s))
            if self._halt():
                return ""
            self._watch("probe", None, "")
            verdict: object = None
            request = {"on_gpu": self._found.device.is_gpu, "needed_bytes": needed_bytes}
            with spawn("moebench.probe", request, self._rules.deadlines_s, log) as child:
                for frame in child.frames(self._halt):
                    verdict = frame.get("verdict", verdict)
            if isinstance(verdict, dict) and verdict.get("reason") == "" and child.failure is None:
                return ""
            said = str(verdict.get("reason")) if isinstance(verdict, dict) else ""
            told = said or (child.failure or of_exit(0, "probe")).reason + child.last_words()
        return self._not_tried(f"{len(PROBE_PAUSES_S)} probes failed in a row, the last one: {told}; before that, {after}")

    def _not_tried(self, why: str) -> str:
        return f"not tried: {self._found.device.name} is quarantined, {why}; when the device is well again, --resume goes on"


class _Turn:
    """What one worker has said so far; takes points off `left` as their records come."""

    def __init__(self, left: list[_Task], retried: _Task | None) -> None:
        self.phase = "start"
        self.prepared = False  # the layer and the backend are there; what fails from here on is one case's
        self.midway = True  # a case has begun and has no record yet
        self.again: _Task | None = None  # is tried once more, in a fresh process
        self.last_status = ""
        self.failure: Failure | None = None  # it sent what cannot be understood
        self._left, self._retried = left, retried
        self._compiled = False
        self._measured = False

    def take(self, frame: Frame) -> Record | None:
        """The record that the frame holds, where it is that of a point which has none."""
        if "phase" in frame:
            self.phase = str(frame["phase"])
            self.midway = True
            self._compiled = self._compiled or self.phase == "jit"
            self.prepared = self.prepared or (self._compiled and self.phase != "jit")
        if "record" not in frame:
            return None
        try:
            record = record_from_dict(frame["record"])  # type: ignore[arg-type]  # checked by what it raises
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.failure = Failure(status="crash", reason=f"in phase {self.phase}: the worker sent what is no record: {error}")
            return None
        task = next((task for task in self._left if task.case == record.case), None)
        if task is None:
            return None
        self.midway = False
        if record.status == "oom" and self._measured and task != self._retried:
            self.again = task  # the memory that earlier cases fragmented may be to blame
            return None
        self._measured = self._measured or record.status == "ok"
        self.last_status = record.status
        self._left.remove(task)
        return record


def _doubted(record: Record, sensors: Sensors | None) -> Record:
    """With what the sensors said while it was timed, and the reasons to doubt its time."""
    idle = sensors.idle() if sensors else None
    if sensors and record.timing and record.timing.window_s:
        record = replace(record, telemetry=sensors.window(*record.timing.window_s))
    return replace(record, flags=raised(record, foreign_utilization=idle.utilization if idle else 0.0))


def _blank(point: Point, plan: Plan, found: Survey, run_id: str, arch: str, number: int) -> Record:
    return Record(
        case=point.case,
        backend=point.backend,
        act_dtype=found.act_dtypes.get(point.backend, ""),
        arch=arch,
        device=found.device.name if arch == found.device.arch else "",
        status="failed",
        scope=plan.scope,
        round=number,
        run_id=run_id,
        time=_now(),
    )


def _file_name(name: str) -> str:
    """A plug-in names itself; its log stays in the log directory."""
    return re.sub(r"[^A-Za-z0-9._@-]", "_", name)[:64]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def now_id() -> str:
    """A run id that sorts by time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid() % 0x10000:04x}"
