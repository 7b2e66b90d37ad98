"""Whether the gate says what it promises of this machine: gates of the same code against itself, and of calls made slower on purpose.

The unit is the process, so each side of each round is one of its own. No two gates of the same code share one; those of slower calls
do, since a candidate measures each cell with all lengths. A gate's processes prepare together and measure one after the other, in
the order in which `moebench ab` takes its turns; meanwhile those of the next gate import what they need, and touch no GPU.
`moebench.gate_worker` is the process. Without a GPU a simulated clock takes its place."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

from moebench.ab import swaps
from moebench.case import Case, case
from moebench.child import Child, Frame, spawn
from moebench.device import Device
from moebench.flags import raised
from moebench.gate import POWER, Outcome, Rule
from moebench.gate_simulation import NOISES, Rates, survey
from moebench.journal import Run
from moebench.record import Manifest, Record, record_from_dict
from moebench.simulated import Scenario, SimulatedStopwatch, measured
from moebench.telemetry import Sensors
from moebench.timing import StopRule
from moebench.verdict import Answer, Judgement, Options, judge

SLOWDOWNS = (0.02, 0.03, 0.05, 0.10)
MODEL, TOKENS = "gpt-oss-20b", (1, 64, 512)
GATES = 10
IDLE_S = 3.0  # that the sensors get to say what a GPU without us is like
CHANCE = 0.01  # with which a promise that holds 9 times in 10 is broken as often as it was
# start: from a cold disk; prepare: kernels may be compiled.
DEADLINES_S: Mapping[str, float] = {"start": 120.0, "import": 180.0, "prepare": 300.0, "turn": 60.0, "teardown": 20.0}
ROUNDS = Rule().least_rounds + 2  # of 20 gates with 6 rounds 4 had no verdict on an H200, since one round of a cell was in doubt
# Shorter than a point's, since a gate of three cells takes 48 of them. 0.05 s would know a median of an H200 to 0.1 to 0.3 %, but
# a call that runs into the power limit lowers its clock within 0.1 s.
RULE = StopRule(min_samples=30, max_samples=1000, min_s=0.12, max_s=0.5, warmup_s=0.06, max_warmup_s=0.5, batch_s=0.02)

SIMULATED = Device(arch="sm90", name="simulated GPU", torch=None, memory_bytes=0)

Side = Literal["base", "cand"]
Tell = Callable[[str], None]


class CheckError(Exception):
    """A process that did not measure; the message says why."""


class NoGpuError(CheckError):
    """There is none here."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one process measures: each cell with each of these appended."""

    side: Side
    round: int
    # Shares of the cell's own median that a spin kernel takes, 0: an empty spin kernel; none: the call alone.
    appended: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A cell as one process saw it."""

    record: Record
    place: int = 0  # of its length among those that the turn asks for
    length: float = 0.0  # of the spin kernel over the cell's own median in this process: what was really appended


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of one gate, and what was promised of it."""

    case: str
    base_us: float
    slowdown: float  # what was appended, as a share; 0: nothing
    ratio: float | None
    low: float | None
    high: float | None
    sees: float | None
    threshold: float | None
    outcome: Outcome
    clears: bool
    reason: str = ""

    @property
    def promise(self) -> Literal["slower", "not green", "green", ""]:
        """What a gate of these rounds has to say of so large a slowdown; nothing where it cannot see it and need not."""
        if not self.slowdown:
            return "green"
        if self.sees is not None and self.slowdown >= self.sees:
            return "slower"
        if self.threshold is not None and self.slowdown >= self.threshold:
            return "not green"
        return ""

    @property
    def kept(self) -> bool:
        told = {"slower": self.outcome == "slower", "not green": not self.clears, "green": self.clears and self.outcome != "slower"}
        return told.get(self.promise, self.outcome != "faster")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate run: of the same code, or of calls that were made slower."""

    slowdown: float  # asked for; 0: the same code
    answer: Answer
    reasons: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One line of the simulator's table."""

    noise: str
    slowdown: float
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    ok: bool
    text: str
    do: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried, and with how many processes."""

    gates: int = GATES  # of the same code
    rounds: int = ROUNDS
    slowdowns: tuple[float, ...] = SLOWDOWNS
    seed: int = 0

    def batches(self) -> Iterator[tuple[bool, tuple[Turn, ...]]]:
        """(whether something is appended, turns in their order) of each group of processes. One group serves all slowdowns: its
        candidates measure each cell with one after the other, and its bases as often with an empty spin kernel, since what a process
        measures first may differ from what it measures later: calls of 1 token on an H200 seemed slowed by 0.7 to 1.0 % too little."""
        order = Random(self.seed)
        if self.slowdowns:
            nothing = (0.0,) * (1 + len(self.slowdowns))
            yield True, tuple(_turns(self.rounds, order, {"base": nothing, "cand": (0.0, *self.slowdowns)}))
        for _ in range(self.gates):
            yield False, tuple(_turns(self.rounds, order, {"base": (), "cand": ()}))

    @property
    def processes(self) -> int:
        return sum(len(turns) for _, turns in self.batches())


def simulator(families: int = 400) -> Iterator[Simulated]:
    for noise, slowdown, rates in survey(families):
        yield Simulated(noise=noise.name, slowdown=slowdown, rates=rates)


def on_simulated_clock(plan: Plan, *, process_noise: float = 0.002) -> Iterator[Gate]:
    """The same gates where times come from a script: an H200's medians, and how its processes differ."""
    number = 0
    for slowed, turns in plan.batches():
        samples = []
        for turn in turns:
            number += 1
            samples.append((turn, simulated_samples(turn, seed=plan.seed + 1000 * number, process_noise=process_noise)))
        yield from judged(plan, slowed, samples, SIMULATED)


def on_this_gpu(plan: Plan, backend: str, tell: Tell, *, simulated: bool = False, tokens: Sequence[int] = TOKENS) -> Iterator[Gate]:
    """Gates as they are measured. Raises CheckError, and NoGpuError before anything else.

    simulated: the processes are real, what they measure is not."""
    request: Frame = {"backend": backend, "cases": [asdict(case(MODEL, count)) for count in tokens], "simulated": simulated}
    with tempfile.TemporaryDirectory(prefix="moebench-gate-") as folder, ExitStack() as everything:
        started = time.monotonic()
        tell(f"one process checks {backend} and compiles what it needs")
        with _Group([Turn(side="base", round=0)], request | {"check": True}, Path(folder) / "first") as first:
            first.prepare()
            device = first.device
            first.measure()
        batches = list(plan.batches())

        def group(number: int) -> _Group:
            return everything.enter_context(_Group(batches[number][1], request, Path(folder) / str(number), number))

        before, now = first, group(0)
        sensors = None if simulated else everything.enter_context(Sensors(device.uuid))
        _look_at_the_idle_gpu(sensors)
        for number, (slowed, turns) in enumerate(batches):
            what = f"calls slower by {', '.join(f'{100 * share:g} %' for share in plan.slowdowns)}" if slowed else "the same code"
            tell(f"{time.monotonic() - started:.0f} s: {number + 1} of {len(batches)}, {what}, {len(turns)} processes")
            now.prepare()  # while those before end
            before.close()
            before, following = now, group(number + 1) if number + 1 < len(batches) else now
            found = [(turn, [replace(one, record=_doubted(one.record, sensors)) for one in seen]) for turn, seen in now.measure()]
            yield from judged(plan, slowed, found, device)
            now = following
        tell(f"{time.monotonic() - started:.0f} s: done")


def judged(plan: Plan, slowed: bool, samples: Sequence[tuple[Turn, Sequence[Sample]]], device: Device) -> Iterator[Gate]:
    """The gates that a group's rounds make: one, or one for each slowdown."""
    for place, slowdown in enumerate(plan.slowdowns, start=1) if slowed else [(0, 0.0)]:
        chosen: dict[Side, list[Sample]] = {"base": [], "cand": []}
        for turn, seen in samples:
            chosen[turn.side] += [sample for sample in seen if sample.place == place]
        found = judge(_run("base", chosen["base"], device), _run("cand", chosen["cand"], device), Options())
        yield _gate(slowdown, found, chosen["cand"])


def simulated_samples(turn: Turn, *, seed: int, process_noise: float = 0.002) -> list[Sample]:
    """What a process on a simulated GPU measures."""
    random = Random(seed)
    speed = random.gauss(1, process_noise)
    samples = []
    for tokens, us in zip(TOKENS, (31.5, 171.0, 412.0), strict=True):
        for place, share in enumerate(turn.appended or (0.0,)):
            scenario = Scenario(call_us=us * speed * (1 + share))
            record = measured(SimulatedStopwatch(scenario, seed=random.randrange(1 << 30)), RULE, number=turn.round)
            record = replace(record, case=case(MODEL, tokens), run_id=turn.side)
            samples.append(Sample(record=record, place=place, length=share))
    return samples


def judge_simulator(rows: Sequence[Simulated]) -> list[Finding]:
    """What the simulator's rates have to be before anyone relies on the gate."""
    limits = {"H200": 0.01, "noisy": 0.05}
    alarms = {name: max(row.rates.false_alarm for row in rows if row.noise == name) for name in NOISES}
    power = {row.slowdown: row.rates.found for row in rows if row.noise == "H200"}
    silent = next(row.rates.no_verdict for row in rows if row.noise == "noisy" and not row.slowdown)
    families = rows[0].rates.families
    right = all(alarms[name] <= limits[name] for name in alarms)
    finds = power[0.03] >= POWER and power[0.05] >= 0.99
    bug = "Do not rely on the gate, and report this as a bug."
    told = [f"{share:.1%} of {families} {name} families (allowed: {limits[name]:.0%})" for name, share in alarms.items()]
    finds_3, finds_5 = f"{power[0.03]:.1%}", f"{power[0.05]:.1%}"
    return [
        Finding(name="false alarms", ok=right, text=f"in {', '.join(told)}", do="" if right else bug),
        Finding(
            name="power",
            ok=finds,
            text=f"with the noise of an H200 one of 60 cells slower by 3 % is found in {finds_3} of families, by 5 % in {finds_5}",
            do="" if finds else bug,
        ),
        Finding(
            name="no verdict",
            ok=silent >= 0.95,
            text=f"with heavy noise {silent:.1%} of families in which nothing changed have no verdict rather than a green one",
            do="" if silent >= 0.95 else bug,
        ),
    ]


def judge_gates(gates: Sequence[Gate], rounds: int) -> list[Finding]:
    """What follows from gates of the same code and of slower calls, for a person who has to act on it."""
    same = [gate for gate in gates if not gate.slowdown]
    slower = [gate for gate in gates if gate.slowdown]
    return [*([_judge_same(same)] if same else []), *([_judge_slower(slower)] if slower else []), _judge_reach(gates, rounds)]


def _judge_same(gates: Sequence[Gate]) -> Finding:
    green = sum(gate.answer == "pass" for gate in gates)
    apart = max((abs(cell.ratio - 1) for gate in gates for cell in gate.cells if cell.ratio), default=0.0)
    red = [cell.case for gate in gates for cell in gate.cells if cell.outcome in ("slower", "broken")]
    text = f"{green} of {len(gates)} gates of the same code are green; the largest difference of a cell is {apart:.2%}"
    if green == len(gates):
        return Finding(name="same code", ok=True, text=text)
    open_cells = sorted({f"{cell.case}: {cell.reason}" for gate in gates for cell in gate.cells if not cell.kept})
    why = list(dict.fromkeys([*(reason for gate in gates for reason in gate.reasons), *open_cells]))
    do = "Do not let this machine fail a change: it calls a change what is none." if red else _QUIETER
    return Finding(name="same code", ok=False, text=f"{text}; {'; '.join(why[:3])}", do=do)


def _judge_slower(gates: Sequence[Gate]) -> Finding:
    cells = [cell for gate in gates for cell in gate.cells]
    promised = [cell for cell in cells if cell.promise == "slower"]
    found = sum(cell.kept for cell in promised)
    green = [cell for cell in cells if cell.clears and cell.threshold is not None and cell.slowdown >= cell.threshold]
    faster = [cell for cell in cells if cell.outcome == "faster"]
    if not promised:
        return Finding(name="slower calls", ok=False, text="no cell can see any of the slowdowns", do=_QUIETER)
    text = (
        f"{found} of {len(promised)} cells slowed by what they see or more were called slower (promised: {POWER:.0%} of them); "
        f"{len(green)} cells slowed by their threshold or more were green, {len(faster)} called faster"
    )
    ok = len(promised) - found <= broken_by_chance(len(promised), 1 - POWER) and not green and not faster
    return Finding(name="slower calls", ok=ok, text=text, do="" if ok else "Do not rely on what the gate says that it sees here.")


def _judge_reach(gates: Sequence[Gate], rounds: int) -> Finding:
    seen = [cell.sees for gate in gates if not gate.slowdown for cell in gate.cells] or [cell.sees for gate in gates for cell in gate.cells]
    known = [share for share in seen if share is not None]
    if not known:
        return Finding(name="reach", ok=False, text="no gate could decide anything", do=_QUIETER)
    worst, usual = max(known), median(known)
    threshold = Rule().threshold
    text = f"{rounds} rounds see {usual:.1%} (median over cells and gates), {worst:.1%} at worst; the threshold is {threshold:.0%}"
    if usual <= threshold:
        return Finding(name="reach", ok=True, text=text)
    return Finding(name="reach", ok=False, text=text, do=f"Gate with more rounds than {rounds}, or with --threshold {100 * usual:.0f}.")


_QUIETER = "End whatever else uses this machine and its GPU, run it again, and if it stays gate with more rounds."


def broken_by_chance(count: int, share: float) -> int:
    """The most of `count` that go wrong where each does with probability `share`, but for one case in a hundred."""
    total = 0.0
    for wrong in range(count + 1):
        total += comb(count, wrong) * share**wrong * (1 - share) ** (count - wrong)
        if total >= 1 - CHANCE:
            return wrong
    return count


def wait_for(path: Path) -> None:
    """Until whoever holds it lets it go."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def to_frame(samples: Sequence[Sample]) -> Frame:
    return {"samples": [{"record": asdict(s.record), "place": s.place, "length": s.length} for s in samples]}


class _Hold:
    """A file that processes wait for; the kernel lets it go when this process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class _Group:
    """The processes of one gate: they import at once, prepare together when told, and measure one after the other."""

    def __init__(self, turns: Sequence[Turn], request: Frame, folder: Path, number: int = 0) -> None:
        folder.mkdir()
        self._turns = turns
        self._stack = ExitStack()
        self._start = _Hold(folder / "start")
        self._holds = [_Hold(folder / f"turn-{place}") for place in range(len(turns))]
        self._end = _Hold(folder / "end")
        self._done = False
        self._children: list[tuple[Child, Iterator[Frame]]] = []
        self.device = SIMULATED
        try:
            for place, (turn, hold) in enumerate(zip(turns, self._holds, strict=True)):
                asked = request | {"turn": asdict(turn), "seed": 1000 * number + place}
                asked |= {"start": str(self._start.path), "go": str(hold.path), "end": str(self._end.path)}
                child = self._stack.enter_context(spawn("moebench.gate_worker", asked, DEADLINES_S))
                child.ask()  # or it would begin to import when it is first listened to
                self._children.append((child, child.frames()))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        for place in range(len(self._turns)):
            self._until(place, "imported")
        self._start.let_go()
        for place in range(len(self._turns)):
            self.device = Device(**self._until(place, "device")["device"])  # type: ignore[arg-type]
            if not self.device.is_gpu:
                raise NoGpuError
        for place in range(len(self._turns)):
            self._until(place, "prepared")

    def measure(self) -> list[tuple[Turn, list[Sample]]]:
        found = []
        for place, (turn, hold) in enumerate(zip(self._turns, self._holds, strict=True)):
            hold.let_go()
            told: list[Frame] = self._until(place, "samples")["samples"]  # type: ignore[assignment]
            found.append((turn, [_sample(frame) for frame in told]))
        self._done = True
        self._end.let_go()  # of all at once: a context that goes while others measure would be seen, and 12 in turn take seconds
        return found

    def close(self) -> None:
        if not self._done:
            for child, _ in self._children:
                child.dismiss()
        for hold in (self._start, *self._holds, self._end):
            hold.let_go()
        self._stack.close()

    def _until(self, place: int, wanted: str) -> Frame:
        child, frames = self._children[place]
        for frame in frames:
            if "failed" in frame:
                raise CheckError(str(frame["failed"]))
            if wanted in frame:
                return frame
        ended = child.failure.reason if child.failure else f"in phase {child.phase}: the process ended without a result"
        raise CheckError(ended + child.last_words())


def _turns(rounds: int, order: Random, appended: Mapping[Side, tuple[float, ...]]) -> Iterator[Turn]:
    for number, swapped in enumerate(swaps(rounds, order)):
        sides: tuple[Side, Side] = ("cand", "base") if swapped else ("base", "cand")
        for side in sides:
            yield Turn(side=side, round=number, appended=appended[side])


def _gate(slowdown: float, found: Judgement, candidates: Sequence[Sample]) -> Gate:
    lengths: dict[Case, list[float]] = {}
    for sample in candidates:
        lengths.setdefault(sample.record.case, []).append(sample.length)
    cells = tuple(
        Cell(
            case=verdict.case.label,
            base_us=verdict.base_us or 0.0,
            slowdown=median(lengths.get(verdict.case, [0.0])),
            ratio=verdict.ratio,
            low=verdict.low,
            high=verdict.high,
            sees=verdict.sees,
            threshold=verdict.threshold,
            outcome=verdict.outcome,
            clears=verdict.clears,
            reason=verdict.reason,
        )
        for verdict in sorted(found.verdicts, key=lambda verdict: verdict.case.num_tokens)
    )
    return Gate(slowdown=slowdown, answer=found.answer, reasons=found.reasons, cells=cells)


def _run(side: Side, samples: Sequence[Sample], device: Device) -> Run:
    manifest = Manifest(run_id=side, started="", command=(), device=device, plan={}, plan_hash="")
    return Run(path=Path(side), manifest=manifest, records=tuple(replace(sample.record, run_id=side) for sample in samples))


def _sample(frame: Frame) -> Sample:
    return Sample(
        record=record_from_dict(frame["record"]),  # type: ignore[arg-type]
        place=int(str(frame["place"])),
        length=float(str(frame["length"])),
    )


def _look_at_the_idle_gpu(sensors: Sensors | None) -> None:
    until = time.monotonic() + IDLE_S
    while sensors and not sensors.problem and sensors.idle() is None and time.monotonic() < until:
        time.sleep(0.05)


def _doubted(record: Record, sensors: Sensors | None) -> Record:
    """With what the sensors said meanwhile; not with `unchecked`, since the first process checked all cells for the others."""
    if sensors and record.timing and record.timing.window_s:
        record = replace(record, telemetry=sensors.window(*record.timing.window_s))
    return replace(record, flags={name: why for name, why in raised(record).items() if name != "unchecked"})
