"""What a call really launches, when and for how long: the proof that the backend asked for is the one that ran."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moebench.record import Kernel
from moebench.timeline import Call, Event, Kind

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

# CUPTI serves one tool at a time; where nsys or ncu injected theirs, ours stands aside.
INJECTED = ("CUDA_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE")
RANGE = "moebench.call"  # around each call that is traced; Kineto shows it on the device's timeline too


def timeline(run: Callable[[], object]) -> Call:
    """Kernels, copies and fills of one eager call, in order of start; empty where another profiler is attached."""
    if stands_aside():
        return ()
    import torch

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return tuple(sorted(_device_events(_traced(whole, host=False, device=True)), key=_start))


def timelines(run: Callable[[], object], between: Callable[[], object], count: int) -> tuple[Call, ...]:
    """Of `count` calls, each after an untraced-for `between`: what starts while the host waits for the call belongs to it.

    Empty where another profiler is attached."""
    if stands_aside():
        return ()
    import torch
    from torch.profiler import record_function

    def whole() -> None:
        for _ in range(count):
            between()
            torch.cuda.synchronize()
            with record_function(RANGE):
                run()
                torch.cuda.synchronize()

    found = _traced(whole, host=True, device=True)
    return windows(_device_events(found), [_window(event) for event in found if event.name == RANGE and not _on_device(event)])


def operations(run: Callable[[], object], count: int) -> tuple[Call, ...]:
    """Of `count` calls on a CPU, the torch operations that the call itself asks for, named with the shapes of their inputs."""
    from torch.profiler import record_function

    def whole() -> None:
        for _ in range(count):
            with record_function(RANGE):
                run()

    found = _traced(whole, host=True, device=False)
    calls: dict[int, list[Event]] = {event.id: [] for event in found if event.name == RANGE}
    for event in found:
        if event.cpu_parent is not None and event.cpu_parent.id in calls and event.cpu_parent.name == RANGE:
            calls[event.cpu_parent.id].append(_event(event, "op"))
    return tuple(tuple(sorted(events, key=_start)) for events in calls.values())


def windows(events: Sequence[Event], ranges: Sequence[tuple[int, int]]) -> tuple[Call, ...]:
    """For each (start_ns, end_ns), the events that start in it."""
    return tuple(tuple(sorted((e for e in events if start <= e.start_ns < end), key=_start)) for start, end in ranges)


def launched_kernels(call: Callable[[], object]) -> tuple[Kernel, ...]:
    """Kernels, copies and fills of one eager call, in order of first launch; empty where another profiler is attached."""
    counts: dict[str, int] = {}
    for event in timeline(call):
        counts[event.name] = counts.get(event.name, 0) + 1
    return tuple(Kernel(name=name, count=count) for name, count in counts.items())


def missing_kernel(pattern: str | None, kernels: Sequence[Kernel]) -> str | None:
    """A sentence when kernels were seen and none of them is the backend's own."""
    if pattern is None or not kernels or any(re.search(pattern, kernel.name) for kernel in kernels):
        return None
    seen = "; ".join(kernel.name[:80] for kernel in kernels[:4])
    return f"none of the backend's own kernels ran (pattern {pattern!r}); the call launched: {seen}"


def stands_aside() -> bool:
    """Whether nsys or ncu is attached to this process."""
    return any(name in os.environ for name in INJECTED)


def _traced(run: Callable[[], object], *, host: bool, device: bool) -> list[FunctionEvent]:
    """torch.profiler.profile's own core: around it, that one asks for torch._inductor, whose import takes seconds of each process."""
    from torch.autograd.profiler import profile

    with profile(use_cpu=host, use_device="cuda" if device else None, use_kineto=True, record_shapes=not device) as traced:
        run()
    return list(traced.function_events or [])


def _device_events(found: Sequence[FunctionEvent]) -> list[Event]:
    kinds: dict[str, Kind] = {"Memcpy": "memcpy", "Memset": "memset"}
    return [_event(event, kinds.get(event.name[:6], "kernel")) for event in found if _on_device(event) and event.name != RANGE]


def _on_device(event: FunctionEvent) -> bool:
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    return bool(event.device_type == DeviceType.CUDA)


def _event(event: FunctionEvent, kind: Kind) -> Event:
    start_ns, end_ns = _window(event)
    stream = int(getattr(event, "device_resource_id", 0) or 0) if kind != "op" else 0
    return Event(name=_name(event) if kind == "op" else event.name, start_ns=start_ns, end_ns=end_ns, stream=stream, kind=kind)


def _window(event: FunctionEvent) -> tuple[int, int]:
    """Kineto's nanoseconds since the trace began; torch shows them in microseconds."""
    return round(event.time_range.start * 1e3), round(event.time_range.end * 1e3)


def _name(event: FunctionEvent) -> str:
    return " ".join([event.name, *(str(shape) for shape in event.input_shapes or () if shape)])


def _start(event: Event) -> tuple[int, int]:
    return event.start_ns, event.end_ns
