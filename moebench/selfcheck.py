"""Whether the times of this machine can be trusted, found by timing what is known.

A GPU is tried in a process of its own, `python -m moebench.selfcheck FD`, which `on_this_gpu` starts; without a GPU the same questions
are put to a simulated clock."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import ceil, exp, log, sqrt
from statistics import fmean, median, stdev
from typing import BinaryIO, TypeVar

from moebench.child import spawn
from moebench.compare import student_t
from moebench.device import Device, detect
from moebench.flags import raised
from moebench.leash import send, serve, take
from moebench.plan import Plan, Point
from moebench.record import Record
from moebench.simulated import CASE, Scenario, SimulatedStopwatch, measured
from moebench.telemetry import Sensors
from moebench.timing import GPU_RULE, Call, CudaStopwatch, StopRule, Stopwatch, measure

PARTS = ("bias", "cold", "nvtx", "telemetry")  # of a GPU, in this order
DEADLINES_S: Mapping[str, float] = {"start": 120.0, "teardown": 20.0}  # importing torch from a cold disk takes long

# Graphs of many calls, or of one call where something is flushed before it; eager: one call between two events.
DEFAULT, READ_FLUSH, WRITE_FLUSH, EAGER, HOT = "rotation (default)", "read flush", "write flush", "eager call", "hot replay"
STREAM = "more than any L2 holds"
LENGTHS_US = (2.0, 10.0, 50.0, 200.0)
LONG_US, LONG_BIAS, SHORT_BIAS_US = 50.0, 0.01, 0.5  # what the default method may be off beyond an empty kernel: of long calls, of others
READ_BYTES = 53_000_000  # the weights that one token of gpt-oss-20b touches
TOO_FAST = 1.02  # times the rate of a read that no cache can hold
PAIRS = 6
MOST_COST = 0.005
COST_BYTES = 192 << 20  # about 50 us of reading on an H200
WARMUP_REGIONS, BATCH_REGIONS, BATCHES = 100, 25, 8  # of 1 ms: 0.3 s for each side of a pair
# Two medians differ by less than 1.96 * sqrt(2) standard deviations of one in 95 of 100 cases where nothing changed.
SPAN = 2.8
COARSE = 0.05  # a machine whose single runs cannot show this much is no place to compare backends
ORDER_ROUNDS = 100

# Shorter than a point's: 16 lengths and methods have to fit into some seconds, and a spin kernel needs no time to settle.
# batch_s: a batch of 2 us calls behind flushes of 65 us is 10 times as long.
RULE = StopRule(min_samples=30, max_samples=500, min_s=0.1, max_s=1.0, warmup_s=0.05, max_warmup_s=0.5, batch_s=0.005)

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Bias:
    """A call of known length, and an empty one, timed by the same method."""

    method: str
    length_us: float  # cycles over the rate of the SM clock before and after
    time_us: float
    empty_us: float
    clock_moved: float = 0.0  # between before and after, relative

    @property
    def excess_us(self) -> float:
        return self.time_us - self.length_us

    @property
    def beyond_us(self) -> float:
        """What is left when launch and drain, which an empty kernel pays too, are taken away."""
        return self.excess_us - self.empty_us


@dataclass(frozen=True, kw_only=True)
class Cold:
    """A read whose bytes a method is to keep out of the L2, and an empty kernel timed by the same method."""

    method: str
    read_bytes: int
    time_us: float
    empty_us: float

    @property
    def bytes_s(self) -> float:
        return self.read_bytes / self.time_us * 1e6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something that runs beside a measurement does to it, by pairs without and with it, in ABBA order."""

    what: str
    without_us: float  # median
    ratios: tuple[float, ...]  # with over without, pair by pair

    @property
    def ratio(self) -> float:
        return interval(self.ratios)[0]

    @property
    def low(self) -> float:
        return interval(self.ratios)[1]

    @property
    def high(self) -> float:
        return interval(self.ratios)[2]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """One backend on one case in fresh processes, between which nothing changed."""

    case: str
    backend: str
    medians_us: tuple[float, ...]
    within: float  # coefficient of variation of a process's samples, the median over the processes
    flags: tuple[str, ...] = ()

    @property
    def cv(self) -> float:
        """Of the medians of the processes."""
        return variation(self.medians_us)

    @property
    def range(self) -> float:
        return (max(self.medians_us) - min(self.medians_us)) / fmean(self.medians_us)

    def resolves(self, rounds: int = 1) -> float:
        """The least difference between two sides of so many rounds each that is more than noise."""
        return SPAN * self.cv / sqrt(rounds)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A scenario of the simulated clock, and the flags that its records raised."""

    scenario: str
    expected: str  # a flag; empty: none
    flags: dict[str, str]

    @property
    def ok(self) -> bool:
        return self.expected in self.flags if self.expected else not self.flags


@dataclass(frozen=True, kw_only=True)
class Order:
    """Two equal backends on a GPU that favours the first of each round: what their comparison says."""

    order: str
    shuffled: bool
    rounds: int
    ratio: float  # second backend over first; 1 is true
    low: float
    high: float

    @property
    def finds_nothing(self) -> bool:
        return self.low <= 1 <= self.high


Row = Bias | Cold | Cost | Noise | Tried | Order
R = TypeVar("R", Bias, Cold, Cost, Noise, Tried, Order)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one part of the check found, or the sentence why it found nothing."""

    name: str
    rows: tuple[Row, ...] = ()
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    ok: bool
    text: str
    do: str = ""  # where it is not ok


def judge(part: Part) -> list[Check]:
    """What follows from a part, for a person who has to act on it."""
    checks = [
        *_judged(Bias, _judge_biases, part.rows),
        *_judged(Cold, _judge_colds, part.rows),
        *_judged(Cost, _judge_costs, part.rows),
        *_judged(Noise, _judge_noise, part.rows),
        *_judged(Tried, _judge_scenarios, part.rows),
        *_judged(Order, _judge_orders, part.rows),
    ]
    if part.failure or not checks:
        text = f"not measured: {part.failure or 'there is nothing to judge'}"
        checks.append(Check(name=part.name, ok=False, text=text, do=REMEDIES.get(part.name, QUIET)))
    return checks


QUIET = "End whatever else uses this machine and its GPU, then run it again."
REMEDIES = {
    "telemetry": "Without it throttling is not seen. Install it with `pip install nvidia-ml-py`; if it is there, ask `moebench doctor`.",
    "noise": "Run the point alone with `moebench sweep` and look at its log.",
}


def on_this_gpu() -> Iterator[Device | str | Part]:
    """The device, what is being measured, and each part; of a machine without a GPU only the device.

    A part that fails or takes the process down costs itself alone: a fresh process does the rest."""
    left = list(PARTS)
    told_device = False
    while left:
        failure = ""
        with spawn("moebench.selfcheck", {"parts": left}, DEADLINES_S) as child:
            for frame in child.frames():
                if "device" in frame:
                    device = Device(**frame["device"])  # type: ignore[arg-type]
                    if not told_device:
                        told_device = True
                        yield device
                    if not device.is_gpu:
                        left = []
                elif "progress" in frame:
                    yield str(frame["progress"])
                elif "failed" in frame:
                    failure = str(frame["failed"])
                elif "rows" in frame:
                    yield Part(name=left.pop(0), rows=tuple(_rows(frame["rows"])))  # type: ignore[arg-type]
        if left:
            ended = child.failure.reason if child.failure else "the process ended without a result"
            yield Part(name=left.pop(0), failure=failure or ended + child.last_words())


def on_simulated_clock(rounds: int) -> Iterator[Part]:
    """The same questions where the answers are known: what the clock adds, how processes differ, what must raise a flag."""
    yield Part(name="bias", rows=tuple(simulated_biases()))
    if rounds:
        watches = (SimulatedStopwatch(Scenario(process_noise=0.002), seed=number) for number in range(rounds))
        records = [measured(watch, GPU_RULE, number=number) for number, watch in enumerate(watches)]
        yield Part(name="noise", rows=tuple(noise(records)))
    yield Part(name="flags", rows=tuple(scenarios()))
    yield Part(name="order", rows=tuple(orders()))


def simulated_biases(event_us: float = 0.5) -> Iterator[Bias]:
    """By the default method and by a region for each call, where the clock adds so much to each region."""
    for method, region_us in ((DEFAULT, 1000.0), (READ_FLUSH, 0.0)):

        def timed(length_us: float, region_us: float = region_us) -> float:
            scenario = Scenario(call_us=length_us, launch_us=1.0, event_us=event_us)
            return measure(SimulatedStopwatch(scenario, region_us=region_us), GPU_RULE).median_us

        empty_us = timed(0.0)
        yield from (Bias(method=method, length_us=us, time_us=timed(us), empty_us=empty_us) for us in LENGTHS_US)


SCENARIOS: Mapping[str, tuple[Scenario, str]] = {
    "nothing happens": (Scenario(), ""),
    "the GPU throttles after 0.4 s": (Scenario(throttle_after_s=0.4), "throttled"),
    "the call gets 10 % slower each second": (Scenario(drift_per_s=0.1), "unstable"),
    "the first of a round meets a cool GPU": (Scenario(warm_mhz=1860.0), "throttled"),
}


def scenarios() -> Iterator[Tried]:
    for name, (scenario, expected) in SCENARIOS.items():
        flags: dict[str, str] = {}
        for turn in range(2):  # of a round
            flags |= raised(measured(SimulatedStopwatch(scenario, seed=turn, turn=turn), GPU_RULE))
        yield Tried(scenario=name, expected=expected, flags=flags)


def orders(rounds: int = ORDER_ROUNDS, *, warm_mhz: float = 1940.0) -> Iterator[Order]:
    """A round's first backend is faster than the others by 2 %, which no flag shows."""
    scenario = Scenario(warm_mhz=warm_mhz)
    plan = Plan(points=tuple(Point(case=CASE, backend=name) for name in ("first", "second")), rounds=rounds)
    shuffled = [points[0].backend for _, points in plan.groups()]
    for order, turns in (("always the same", ["first", "second"] * rounds), ("shuffled in each round, as sweeps do", shuffled)):
        medians: dict[str, list[float]] = {"first": [], "second": []}
        for number, name in enumerate(turns):
            record = measured(SimulatedStopwatch(scenario, seed=number, turn=number % 2), RULE, backend=name)
            medians[name].append(record.median_us or 0.0)
        ratio, low, high = interval([b / a for a, b in zip(medians["first"], medians["second"], strict=True)])
        yield Order(order=order, shuffled=turns is shuffled, rounds=rounds, ratio=ratio, low=low, high=high)


def noise(records: Sequence[Record]) -> Iterator[Noise]:
    """Of each case that was timed at least twice."""
    timed: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.status == "ok" and record.timing is not None:
            timed.setdefault((record.case.label, record.backend), []).append(record)
    for (label, backend), same in timed.items():
        samples = [record.timing.samples_us for record in same if record.timing]
        if len(same) >= 2:
            yield Noise(
                case=label,
                backend=backend,
                medians_us=tuple(record.median_us or 0.0 for record in same),
                within=median(map(variation, samples)),
                flags=tuple(dict.fromkeys(flag for record in same for flag in raised(record) | record.flags)),
            )


def variation(values: Sequence[float]) -> float:
    """The coefficient of variation: standard deviation over mean."""
    return stdev(values) / fmean(values) if len(values) > 1 else 0.0


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % t interval."""
    logs = [log(ratio) for ratio in ratios]
    half = student_t(len(logs) - 1) * stdev(logs) / sqrt(len(logs))
    return exp(fmean(logs)), exp(fmean(logs) - half), exp(fmean(logs) + half)


def cycles_per_us() -> float:
    """Of the SM clock, from sleeps of about 1 and 3 ms: what launch, drain and events add is in both and cancels."""
    import torch

    short, long = 2_000_000, 6_000_000
    times_us = _regions_us([lambda: torch.cuda._sleep(short), lambda: torch.cuda._sleep(long)] * 5)
    return (long - short) / median(b - a for a, b in zip(times_us[::2], times_us[1::2], strict=True))


def main(pipe: BinaryIO) -> None:
    """The child: says what GPU it has, then does the parts in turn until one fails."""
    parts: list[str] = take()["parts"]  # type: ignore[assignment]
    device = detect()
    send(pipe, {"device": asdict(device)})
    if not device.is_gpu:
        return
    for part in parts:
        send(pipe, {"phase": part})
        try:
            rows = _MEASURERS[part](device, lambda what: send(pipe, {"progress": what}))
        except Exception as error:  # noqa: BLE001  a driver may raise anything
            traceback.print_exc()
            send(pipe, {"failed": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"})
            return  # the device may be poisoned
        send(pipe, {"rows": [{"kind": type(row).__name__, **asdict(row)} for row in rows]})


def _judged(kind: type[R], judge_rows: Callable[[Sequence[R]], Check], rows: Sequence[Row]) -> list[Check]:
    ours = [row for row in rows if isinstance(row, kind)]
    return [judge_rows(ours)] if ours else []


def _judge_biases(rows: Sequence[Bias]) -> Check:
    ours = [row for row in rows if row.method == DEFAULT]
    allowed = [LONG_BIAS * row.length_us if row.length_us >= 0.99 * LONG_US else SHORT_BIAS_US for row in ours]
    worst, limit_us = max(zip(ours, allowed, strict=True), key=lambda pair: abs(pair[0].beyond_us) / pair[1])
    raw = max(ours, key=lambda row: row.excess_us)
    ok = abs(worst.beyond_us) < limit_us
    moved = max(row.clock_moved for row in ours)
    text = (
        f"{DEFAULT}: a call of {worst.length_us:.1f} us reads {worst.time_us:.2f} us, {worst.beyond_us:+.2f} us beyond what an empty "
        f"kernel reads (allowed: {limit_us:.2f}); with it the excess is {raw.excess_us:.2f} us at most, at {raw.length_us:.1f} us"
    )
    return Check(
        name="timer",
        ok=ok,
        text=text + (f"; the SM clock moved by {moved:.2%} meanwhile" if not ok and moved > 0.001 else ""),
        do="" if ok else f"{QUIET} If it stays, claim no difference below {max(abs(row.beyond_us) for row in ours):.1f} us.",
    )


def _judge_colds(rows: Sequence[Cold]) -> Check:
    times = {row.method: row for row in rows}
    rotation, stream = times[DEFAULT], times[STREAM]
    warm = [row for row in (rotation, times[READ_FLUSH]) if row.bytes_s > TOO_FAST * stream.bytes_s]
    added = ", ".join(f"{method} {times[method].time_us - rotation.time_us:+.1f} us" for method in (READ_FLUSH, WRITE_FLUSH, HOT))
    read = f"{rotation.read_bytes / 1e6:.0f} MB are read in {rotation.time_us:.1f} us by rotation ({rotation.bytes_s / 1e12:.2f} TB/s)"
    if warm:
        name, rate = warm[0].method, warm[0].bytes_s / 1e12
        text = f"{name}: reads at {rate:.2f} TB/s, faster than memory can ({stream.bytes_s / 1e12:.2f} TB/s): the L2 was not cold"
        return Check(name="cold L2", ok=False, text=text, do="Do not trust cold times of small batches here, and report it as a bug.")
    large = f"{stream.read_bytes / 2**30:.1f} GiB at {stream.bytes_s / 1e12:.2f} TB/s"
    text = f"{read}, no faster than {large}, which no L2 holds; against rotation: {added}"
    return Check(name="cold L2", ok=True, text=text)


def _judge_costs(rows: Sequence[Cost]) -> Check:
    (row,) = rows
    told = f"with {row.what} a median changes by {row.ratio - 1:+.2%} ({row.low - 1:+.2%} to {row.high - 1:+.2%})"
    if row.low >= 1 - MOST_COST and row.high <= 1 + MOST_COST:
        return Check(name=row.what, ok=True, text=f"{told}, less than {MOST_COST:.1%}")
    if row.low > 1 + MOST_COST or row.high < 1 - MOST_COST:
        return Check(name=row.what, ok=False, text=told, do="Compare only times that were all taken with it, or all without.")
    return Check(name=row.what, ok=False, text=f"{told}: too uncertain to say whether it is less than {MOST_COST:.1%}", do=QUIET)


def _judge_noise(rows: Sequence[Noise]) -> Check:
    worst = max(rows, key=lambda row: row.cv)
    rounds = len(worst.medians_us)
    flagged = [f"{row.case} {', '.join(row.flags)}" for row in rows if row.flags]
    ok = worst.resolves() <= COARSE and not flagged
    text = (
        f"one run can show differences from {worst.resolves():.2%}, {rounds} rounds from {worst.resolves(rounds):.2%} "
        f"({worst.case}, the noisiest; estimated from {rounds} processes)"
    )
    return Check(
        name="noise",
        ok=ok,
        text=text + (f"; flags: {'; '.join(flagged)}" if flagged else ""),
        do="" if ok else f"{QUIET} If it stays, compare with more rounds: n times as many show differences smaller by the root of n.",
    )


def _judge_scenarios(rows: Sequence[Tried]) -> Check:
    bad = [f"{row.scenario}: expected {row.expected or 'no flag'}, got {', '.join(row.flags) or 'none'}" for row in rows if not row.ok]
    text = (
        "; ".join(bad)
        or f"each of {sum(bool(row.expected) for row in rows)} simulated disturbances raises its flag, a quiet GPU raises none"
    )
    return Check(name="flags", ok=not bad, text=text, do="Do not trust rows without flags, and report this as a bug." if bad else "")


def _judge_orders(rows: Sequence[Order]) -> Check:
    wrong = [row for row in rows if row.finds_nothing is not row.shuffled]
    told = "; ".join(f"{row.order}: {row.ratio - 1:+.2%} ({row.low - 1:+.2%} to {row.high - 1:+.2%})" for row in rows)
    return Check(
        name="order",
        ok=not wrong,
        text=f"two equal backends where the first of a round is faster: {told}",
        do="Do not compare backends that were measured in one fixed order, and report this as a bug." if wrong else "",
    )


def _bias_on_gpu(device: Device, tell: Tell) -> list[Row]:
    import torch

    from moebench.trial import FLUSH_BYTES, FLUSH_L2S

    flush_bytes = max(FLUSH_L2S * device.l2_bytes, FLUSH_BYTES)
    sink = torch.zeros((), device="cuda")

    def spin(cycles: int) -> Call:
        def call() -> torch.Tensor:
            torch.cuda._sleep(cycles)
            return sink

        return call

    methods: dict[str, Callable[[Call], float]] = {
        DEFAULT: lambda call: measure(CudaStopwatch([call] * 3, "cold"), RULE).median_us,
        READ_FLUSH: lambda call: measure(CudaStopwatch([call], "cold", flush_bytes), RULE).median_us,
        EAGER: lambda call: median(_regions_us([call] * 120)[20:]),
        HOT: lambda call: measure(CudaStopwatch([call], "hot"), RULE).median_us,
    }
    tell("how fast the SM clock runs")
    _regions_us([spin(6_000_000)] * 100)  # 0.3 s bring the clock up
    rate = cycles_per_us()
    rows: list[Row] = []
    for method, timed_us in methods.items():
        tell(f"timing calls of known length: {method}")
        empty_us = timed_us(spin(0))
        for length_us in LENGTHS_US:
            cycles = round(length_us * rate)
            before = cycles_per_us()
            time_us = timed_us(spin(cycles))
            after = cycles_per_us()
            length = cycles / fmean((before, after))
            rows.append(Bias(method=method, length_us=length, time_us=time_us, empty_us=empty_us, clock_moved=abs(after / before - 1)))
    return rows


def _cold_on_gpu(device: Device, tell: Tell) -> list[Row]:
    import torch

    from moebench.rotation import COLD
    from moebench.trial import FLUSH_BYTES, FLUSH_L2S

    flush_bytes = max(FLUSH_L2S * device.l2_bytes, FLUSH_BYTES)
    sink = torch.zeros((), device="cuda")
    scratch = torch.empty(flush_bytes // 4, device="cuda")
    count = 1 + ceil(COLD * device.l2_bytes / READ_BYTES)
    buffers = [torch.rand(READ_BYTES // 4, device="cuda") for _ in range(count)]

    def read(source: torch.Tensor) -> Call:
        return lambda: torch.amax(source, dim=0, out=sink)

    def nothing() -> torch.Tensor:
        torch.cuda._sleep(0)
        return sink

    def after_writing(call: Call) -> float:
        watch = CudaStopwatch([call], "cold", flush_bytes)  # for its graph of one call
        return median(_regions_us([watch.region] * 200, lambda: scratch.fill_(1.0)))

    methods: dict[str, Callable[[Sequence[Call]], float]] = {
        DEFAULT: lambda calls: measure(CudaStopwatch(calls, "cold"), RULE).median_us,
        READ_FLUSH: lambda calls: measure(CudaStopwatch(calls[:1], "cold", flush_bytes), RULE).median_us,
        WRITE_FLUSH: lambda calls: after_writing(calls[0]),
        HOT: lambda calls: measure(CudaStopwatch(calls, "hot"), RULE).median_us,
    }
    rows: list[Row] = []
    for method, timed_us in methods.items():
        tell(f"reading {READ_BYTES / 1e6:.0f} MB: {method}")
        rows.append(
            Cold(
                method=method,
                read_bytes=READ_BYTES // 4 * 4,
                time_us=timed_us([read(source) for source in buffers]),
                empty_us=timed_us([nothing] * count),
            )
        )
    tell(f"reading {STREAM}")
    elements = min(2 << 30, device.memory_bytes // 8) // 4
    large = torch.ones(elements, device="cuda")
    time_us = measure(CudaStopwatch([read(large)], "cold"), RULE).median_us
    rows.append(Cold(method=STREAM, read_bytes=4 * elements, time_us=time_us, empty_us=0.0))
    return rows


def _nvtx_on_gpu(device: Device, tell: Tell) -> list[Row]:
    import nvtx

    domain = nvtx.get_domain("moebench")
    attributes = domain.get_event_attributes(message="batch")

    @contextmanager
    def within_range() -> Iterator[None]:
        domain.push_range(attributes)
        try:
            yield
        finally:
            domain.pop_range()

    watch = _reading()
    tell("timing with and without NVTX ranges")
    return [_cost("NVTX ranges", lambda: _batches_us(watch, nullcontext), lambda: _batches_us(watch, within_range))]


def _telemetry_on_gpu(device: Device, tell: Tell) -> list[Row]:
    import torch

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    watch = _reading()

    def sensed() -> float:
        with Sensors(uuid) as sensors:
            until = time.monotonic() + 15
            while sensors.idle() is None:
                if sensors.problem or time.monotonic() > until:
                    raise RuntimeError(sensors.problem or "the process that reads the GPU's sensors said nothing for 15 s")
                watch.sample(10)  # so that neither side starts on a GPU that has rested
            return _batches_us(watch, nullcontext)

    tell("timing with and without the process that reads the sensors")
    return [_cost("telemetry", lambda: _batches_us(watch, nullcontext), sensed)]


def _reading() -> Stopwatch:
    """Reads of about 50 us."""
    import torch

    sink = torch.zeros((), device="cuda")
    source = torch.rand(COST_BYTES // 4, device="cuda")
    return CudaStopwatch([lambda: torch.amax(source, dim=0, out=sink)], "cold")


def _batches_us(watch: Stopwatch, around: Callable[[], AbstractContextManager[None]]) -> float:
    watch.sample(WARMUP_REGIONS)
    samples: list[float] = []
    for _ in range(BATCHES):
        with around():
            samples += watch.sample(BATCH_REGIONS)
    return median(samples)


def _cost(what: str, without: Callable[[], float], with_it: Callable[[], float], pairs: int = PAIRS) -> Cost:
    ratios, base = [], []
    without()  # the first measurement of a process is its own kind
    for pair in range(pairs):
        if pair % 2:
            changed_us, plain_us = with_it(), without()
        else:
            plain_us, changed_us = without(), with_it()
        base.append(plain_us)
        ratios.append(changed_us / plain_us)
    return Cost(what=what, without_us=median(base), ratios=tuple(ratios))


def _regions_us(regions: Sequence[Callable[[], object]], before: Callable[[], object] = lambda: None) -> list[float]:
    """Each region's time between two events; all are enqueued while the GPU sleeps."""
    import torch

    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in regions]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(len(regions) * 5e-5, 0.02) * 2e9))  # 50 us each: an eager launch between two events takes the host 10 to 20
    for (start, stop), region in zip(events, regions, strict=True):
        before()
        start.record()
        region()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]


_MEASURERS: Mapping[str, Callable[[Device, Tell], list[Row]]] = {
    "bias": _bias_on_gpu,
    "cold": _cold_on_gpu,
    "nvtx": _nvtx_on_gpu,
    "telemetry": _telemetry_on_gpu,
}


def _rows(told: Sequence[dict[str, object]]) -> Iterator[Row]:
    kinds: Mapping[str, type[Bias | Cold | Cost]] = {"Bias": Bias, "Cold": Cold, "Cost": Cost}  # what the child measures
    for row in told:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name != "kind"}
        yield kinds[str(row["kind"])](**values)  # type: ignore[arg-type]


if __name__ == "__main__":
    serve(main)
