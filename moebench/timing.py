"""Samples of how long a call takes, on a GPU, a CPU or a simulated clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Protocol

from moebench.record import ClockName, L2Method, L2State, StopReason, Timing

if TYPE_CHECKING:
    import torch

Call = Callable[[], "torch.Tensor"]

REGION_US = 1000.0  # about this long, so that an event's 0.5 us and a graph's launch of some us are below 1 % of it
LEAST_REGION_US = 300.0  # of eager calls, whose launches the host must have enqueued before the GPU wakes
LONGEST_LEAD_S = 0.02  # of a device sleep that lets the host get ahead; longer would only hide that the host is the bottleneck
CLOCK_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a measurement has seen enough: the median is known to `target`, or time or count ran out.

    A call so slow that time runs out before min_samples gets at least 5 samples, or min_samples if that is less."""

    min_samples: int
    max_samples: int
    max_s: float
    min_s: float = 0.0
    target: float = 0.005  # half width of the median's 95 % interval, relative
    warmup_s: float = 0.0  # at least; then until two batches agree
    max_warmup_s: float = 0.0
    batch_s: float = 0.05  # between two looks at the rule

    @property
    def warmup(self) -> str:
        """The rule for the warm-up, as a contract states it."""
        if not self.warmup_s:
            return "none"
        return f"at least {self.warmup_s:g} s, until two batches agree within 1 % and the SM clock too, at most {self.max_warmup_s:g} s"


# The last 0.5 % of a noisy point costs more than it tells; with 0.3 s most points of an H200 are known to 0.1 %. Under load the power
# cap moves the SM clock in steps: neighbouring samples agree with each other more than with the median. In a run that took 2000 of 20
# such points, the first 1000 of each had a median inside the interval of all.
GPU_RULE = StopRule(min_samples=30, max_samples=1000, min_s=0.3, max_s=5.0, warmup_s=0.25, max_warmup_s=5.0)
CPU_RULE = StopRule(min_samples=3, max_samples=50, max_s=3.0, target=0.02)
ONCE = StopRule(min_samples=1, max_samples=1, max_s=0.0)


class Stopwatch(Protocol):
    """Calls made ready to be timed by one clock."""

    @property
    def clock(self) -> ClockName: ...
    @property
    def l2(self) -> L2State | None: ...
    @property
    def l2_method(self) -> L2Method: ...
    @property
    def calls_per_region(self) -> int: ...
    @property
    def note(self) -> str: ...
    @property
    def host_bound(self) -> bool:
        """Whether the GPU ran dry in any region so far."""
        ...

    def sample(self, count: int) -> list[float]:
        """Microseconds per call of `count` regions, one after the other."""
        ...

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Run what is timed once more, untimed: each output that is still there after it, valid until the next, and which call's it is."""
        ...

    def now(self) -> float:
        """Seconds that pass as the samples do; the machine's monotonic clock where they are real."""
        ...

    def sm_mhz(self) -> float | None:
        """The SM clock right now, where it can be asked."""
        ...


def measure(watch: Stopwatch, rule: StopRule) -> Timing:
    """Warm up, then sample until the rule is content. Nothing is trimmed."""
    started = watch.now()
    warmups, settled = _warm_up(watch, rule)
    first = watch.now()
    samples: list[float] = []
    gc.disable()  # a collection inside a sample would be measured as kernel time
    try:
        while not (reason := _enough(samples, watch, watch.now() - first, rule)):
            samples += watch.sample(min(_batch(samples, watch, rule), rule.max_samples - len(samples)))
    finally:
        gc.enable()
    return Timing(
        samples_us=tuple(samples),
        clock=watch.clock,
        l2=watch.l2,
        l2_method=L2_SENTENCES[watch.l2_method],
        warmup_calls=warmups,
        note=watch.note,
        calls_per_region=watch.calls_per_region,
        stop_reason=reason,
        warmup_s=first - started,
        settled=settled,
        host_bound=watch.host_bound,
        window_s=(first, watch.now()),
    )


L2_SENTENCES: dict[L2Method, str] = {
    "rotation": "calls rotate over other experts and weight copies",
    "read_flush": "a large buffer is read before each call",
    "replay": "the same call again and again",
    "none": "host time; CPU caches as they are",
}


def _warm_up(watch: Stopwatch, rule: StopRule) -> tuple[int, bool]:
    """(calls made, whether the last two batches agreed)."""
    if not rule.warmup_s:
        return 0, True
    started, regions = watch.now(), 0
    before: tuple[float, float | None] | None = None
    samples: list[float] = []
    while True:
        samples = watch.sample(_batch(samples, watch, rule))
        regions += len(samples)
        here = median(samples), watch.sm_mhz()
        elapsed = watch.now() - started
        if elapsed >= rule.warmup_s and before is not None and _agree(before, here):
            return regions * watch.calls_per_region, True
        if elapsed >= rule.max_warmup_s:
            return regions * watch.calls_per_region, False
        before = here


def _agree(a: tuple[float, float | None], b: tuple[float, float | None]) -> bool:
    same_time = abs(a[0] - b[0]) <= CLOCK_TOLERANCE * max(a[0], b[0])
    same_clock = a[1] is None or b[1] is None or abs(a[1] - b[1]) <= CLOCK_TOLERANCE * max(a[1], b[1])
    return same_time and same_clock


def _batch(samples: Sequence[float], watch: Stopwatch, rule: StopRule) -> int:
    """Regions until the next look at the rule, after a first few that tell how long one takes."""
    if not samples:
        return min(rule.min_samples, 5)
    return max(1, int(rule.batch_s * 1e6 / max(samples[-1] * watch.calls_per_region, 1.0)))


def _enough(samples: Sequence[float], watch: Stopwatch, elapsed_s: float, rule: StopRule) -> StopReason:
    if len(samples) >= rule.max_samples:
        return "once" if rule.max_samples == 1 else "max_samples"
    if elapsed_s >= rule.max_s and len(samples) >= min(rule.min_samples, 5):
        return "max_s"
    if len(samples) < rule.min_samples or elapsed_s < rule.min_s:
        return ""
    low, high = Timing(samples_us=tuple(samples), clock=watch.clock, l2=None, l2_method="", warmup_calls=0).interval_us
    return "interval" if (high - low) / 2 <= rule.target * median(samples) else ""


class WallStopwatch:
    """Host time of one call, for backends that compute on the CPU."""

    clock: ClockName = "wall"
    l2: L2State | None = None
    l2_method: L2Method = "none"
    calls_per_region = 1
    note = ""
    host_bound = False

    def __init__(self, call: Call) -> None:
        self._call = call

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, self._call()

    def sample(self, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def now(self) -> float:
        return time.monotonic()

    def sm_mhz(self) -> float | None:
        return None

    def _once(self) -> float:
        start = time.perf_counter_ns()
        self._call()
        return (time.perf_counter_ns() - start) / 1e3


class CudaStopwatch:
    """CUDA events around regions of calls: replays of a CUDA graph, or eager calls where capture fails.

    The calls are made in turn, so that what one leaves in the L2 is evicted by the others before it is used again (rotation.py plans
    and proves that). Where they do not suffice, `flush_bytes` are *read* before each call, which is then a region of its own: reading
    evicts the weights and leaves no dirty lines; evicting by writing makes the timed kernel pay 6 to 12 us of write-back on an H200.

    Before each batch the GPU sleeps for a bounded time in which the host gets ahead of it, so launch latency stays outside."""

    def __init__(self, calls: Sequence[Call], l2: L2State, flush_bytes: int = 0, sm_mhz: Callable[[], float | None] | None = None) -> None:
        import torch

        self._torch, self._ask_clock = torch, sm_mhz
        self._calls = calls if l2 == "cold" else calls[:1]
        self.l2: L2State | None = l2
        self.l2_method: L2Method = "replay" if l2 == "hot" else "read_flush" if flush_bytes else "rotation"
        self.host_bound = False
        self._flush = torch.ones(flush_bytes // 4, dtype=torch.float32, device="cuda") if self.l2_method == "read_flush" else None
        self._sink = torch.empty((), device="cuda")
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._outputs: dict[int, torch.Tensor] = {}
        self._regions = [[0]]
        self._enqueue_s = 1e-4  # of a region, by the last batch
        self._turns = cycle([0])
        failure = self._capture()
        self.clock: ClockName = "cuda_events" if failure else "cuda_graph"
        self.note = f"not captured as a CUDA graph: {failure}" if failure else ""
        self._regions = self._divide(REGION_US if self._graphs else LEAST_REGION_US)
        self.host_bound = False
        if self._graphs:
            self._capture()
        self._turns = cycle(range(len(self._regions)))

    @property
    def calls_per_region(self) -> int:
        return len(self._regions[0])

    def region(self) -> None:
        """Enqueue the next region."""
        turn = next(self._turns)
        if self._graphs:
            self._graphs[turn].replay()
        else:
            for index in self._regions[turn]:
                self._calls[index]()

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        for turn, region in enumerate(self._regions):
            if not self._graphs:
                for index in sorted(set(region)):
                    yield index, self._calls[index]()
                continue
            for index in region:
                self._outputs[index].fill_(float("nan"))
            self._graphs[turn].replay()
            last_writers = {self._outputs[index].data_ptr(): index for index in region}  # calls may share a buffer
            yield from ((index, self._outputs[index]) for index in last_writers.values())

    def sample(self, count: int) -> list[float]:
        most = count if self._graphs else max(1, int(LONGEST_LEAD_S / (1.5 * self._enqueue_s)))  # what the host can be ahead by
        samples: list[float] = []
        while len(samples) < count:
            samples += self._batch(min(most, count - len(samples)))
        return samples

    def now(self) -> float:
        return time.monotonic()

    def sm_mhz(self) -> float | None:
        return self._ask_clock() if self._ask_clock else None

    def _batch(self, count: int) -> list[float]:
        torch = self._torch
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        torch.cuda.synchronize()
        lead_s = min(1.5 * count * self._enqueue_s, LONGEST_LEAD_S)
        torch.cuda._sleep(int(lead_s * 2e9))  # 2e9: no current GPU runs its SMs much above 2 GHz
        started = time.perf_counter()
        for start, stop in events:
            if self._flush is not None:
                torch.amax(self._flush, dim=0, out=self._sink)
            start.record()
            self.region()
            stop.record()
        enqueued_s = time.perf_counter() - started
        is_ahead = not events[0][0].query()  # of the GPU, by all of the batch
        torch.cuda.synchronize()
        self._enqueue_s = enqueued_s / count
        device_s = events[0][0].elapsed_time(events[-1][1]) / 1e3
        self.host_bound = self.host_bound or (not is_ahead and enqueued_s > 0.9 * device_s)
        return [start.elapsed_time(stop) * 1e3 / self.calls_per_region for start, stop in events]

    def _capture(self) -> str:
        """A graph for each region; empty, or why there is none."""
        torch = self._torch
        self._graphs, self._outputs = [], {}
        indices = sorted({index for region in self._regions for index in region})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants lazily made handles and workspaces to exist
            for index in indices:
                for _ in range(3):
                    self._calls[index]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graphs = []
        try:
            for region in self._regions:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for index in region:
                        self._outputs[index] = self._calls[index]()
                graphs.append(graph)
        except RuntimeError as error:
            torch.cuda.synchronize()
            return str(error).splitlines()[0]
        self._graphs = graphs
        return ""

    def _divide(self, region_us: float) -> list[list[int]]:
        """Calls into regions: all of them in turn, often enough to fill one; a region a call where one call fills it."""
        self.sample(2)
        once_us = median(self.sample(3))
        everyone = list(range(len(self._calls)))
        if self._flush is not None or once_us >= region_us:
            return [[index] for index in everyone]
        return [everyone * max(1, round(region_us / (once_us * len(everyone))))]


def enqueue_us(call: Call, calls: int = 10) -> float:
    """Host time of an eager call: what a server without CUDA graphs pays, if the GPU takes less."""
    import torch

    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return median(times)
