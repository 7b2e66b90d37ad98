"""Samples of how long a call takes, on a GPU, a CPU or a simulated clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moebench.record import ClockName, L2State, Timing

if TYPE_CHECKING:
    import torch

Call = Callable[[], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a measurement has seen enough: the median is known to `target`, or time or count ran out.

    A call so slow that time runs out before min_samples gets at least 5 samples, or min_samples if that is less."""

    min_samples: int
    max_samples: int
    max_s: float
    target: float = 0.005  # half width of the median's 95 % interval, relative
    warmup_s: float = 0.0
    batch: int = 1  # samples between two looks at the rule


GPU_RULE = StopRule(min_samples=40, max_samples=400, max_s=2.0, warmup_s=0.1, batch=20)
ONCE = StopRule(min_samples=1, max_samples=1, max_s=0.0)
CPU_RULE = StopRule(min_samples=3, max_samples=50, max_s=3.0, target=0.02)


class Stopwatch(Protocol):
    """A call made ready to be timed by one clock."""

    @property
    def clock(self) -> ClockName: ...
    @property
    def l2(self) -> L2State | None: ...
    @property
    def l2_method(self) -> str: ...
    @property
    def note(self) -> str: ...

    def run(self) -> torch.Tensor:
        """Run the timed thing once, untimed, and return its output (valid until the next run)."""
        ...

    def sample(self, count: int) -> list[float]:
        """Microseconds of `count` runs, one after the other."""
        ...


def measure(watch: Stopwatch, rule: StopRule) -> Timing:
    """Warm up, then sample until the rule is content. Nothing is trimmed."""
    warmups = _warm_up(watch, rule.warmup_s)
    samples: list[float] = []
    started = time.perf_counter()
    gc.disable()  # a collection inside a sample would be measured as kernel time
    try:
        while not _enough(samples, time.perf_counter() - started, rule):
            samples += watch.sample(min(_batch(samples, rule), rule.max_samples - len(samples)))
    finally:
        gc.enable()
    return Timing(
        samples_us=tuple(samples),
        clock=watch.clock,
        l2=watch.l2,
        l2_method=watch.l2_method,
        warmup_calls=warmups,
        note=watch.note,
    )


def _warm_up(watch: Stopwatch, seconds: float) -> int:
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds and calls < 1000:
        watch.sample(5)
        calls += 5
    return calls


def _batch(samples: Sequence[float], rule: StopRule) -> int:
    """Samples until the next look at the rule: about a tenth of its time, after a first few that tell how long one takes."""
    if not samples:
        return min(rule.batch, 5)
    return max(1, min(rule.batch, int(rule.max_s / 10 * 1e6 / max(samples[-1], 1.0))))


def _enough(samples: Sequence[float], elapsed_s: float, rule: StopRule) -> bool:
    if len(samples) >= rule.max_samples:
        return True
    if elapsed_s >= rule.max_s and len(samples) >= min(rule.min_samples, 5):
        return True
    if len(samples) < rule.min_samples:
        return False
    low, high = Timing(samples_us=tuple(samples), clock="simulated", l2=None, l2_method="", warmup_calls=0).interval_us
    return (high - low) / 2 <= rule.target * sorted(samples)[len(samples) // 2]


class WallStopwatch:
    """Host time of one call, for backends that compute on the CPU."""

    clock: ClockName = "wall"
    l2: L2State | None = None
    l2_method = "host time; CPU caches as they are"
    note = ""

    def __init__(self, call: Call) -> None:
        self._call = call

    def run(self) -> torch.Tensor:
        return self._call()

    def sample(self, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def _once(self) -> float:
        start = time.perf_counter_ns()
        self._call()
        return (time.perf_counter_ns() - start) / 1e3


class CudaStopwatch:
    """CUDA events around a CUDA-graph replay, or around an eager call where capture fails.

    Cold L2: before each sample a buffer of four times the L2 is *read*. Reading evicts the weights and leaves no dirty lines;
    evicting by writing would make the timed kernel pay 6 to 12 us of write-back on an H200 (docs/measuring.md). The read keeps
    the GPU busy while the host enqueues the rest, so launch latency stays outside; an eager call gets a bounded device sleep too."""

    def __init__(self, call: Call, l2: L2State, l2_bytes: int) -> None:
        import torch

        self._torch = torch
        self._call = call
        self.l2: L2State | None = l2
        self._lead_cycles = 0
        self._graph, self._output, failure = _capture(call)
        self.clock: ClockName = "cuda_graph" if self._graph else "cuda_events"
        self.note = f"not captured as a CUDA graph: {failure}" if failure else ""
        if self._graph is None:
            self._lead_cycles = _lead_cycles(call)
        flush_bytes = max(4 * l2_bytes, 256 << 20)
        self._flush = torch.ones(flush_bytes // 4, dtype=torch.float32, device="cuda") if l2 == "cold" else None
        self._sink = torch.empty((), device="cuda")
        self.l2_method = f"{flush_bytes >> 20} MiB read before each sample" if l2 == "cold" else "replayed back to back"

    def run(self) -> torch.Tensor:
        if self._graph is None:
            return self._call()
        assert self._output is not None  # capture gave both
        self._output.fill_(float("nan"))
        self._graph.replay()
        return self._output

    def sample(self, count: int) -> list[float]:
        torch = self._torch
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, stop in events:
            if self._flush is not None:
                torch.amax(self._flush, dim=0, out=self._sink)
            if self._lead_cycles:
                torch.cuda._sleep(self._lead_cycles)
            start.record()
            if self._graph is None:
                self._call()
            else:
                self._graph.replay()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) * 1e3 for start, stop in events]


def _capture(call: Call) -> tuple[torch.cuda.CUDAGraph | None, torch.Tensor | None, str]:
    """(graph, its output, "") or (None, None, why not)."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants lazily made handles and workspaces to exist
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, None, str(error).splitlines()[0]
    return graph, output, ""


def _lead_cycles(call: Call) -> int:
    """Device cycles to sleep so that the host has enqueued a whole eager call before the GPU reaches it; at most 20 ms."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    torch.cuda.synchronize()
    return int(min(2 * host_s, 0.02) * 2e9)  # 2e9: no current GPU runs its SMs much above 2 GHz
