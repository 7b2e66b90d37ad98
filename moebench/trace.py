"""Which GPU kernels a call launches: the proof that the backend asked for is the one that ran."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from moebench.record import Kernel

# CUPTI serves one tool at a time; where nsys or ncu injected theirs, ours stands aside.
INJECTED = ("CUDA_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE")


def launched_kernels(call: Callable[[], object]) -> tuple[Kernel, ...]:
    """Kernels, copies and fills of one eager call, in order of first launch; empty where another profiler is attached."""
    if any(name in os.environ for name in INJECTED):
        return ()
    import torch
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    events = traced.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    counts: dict[str, int] = {}
    for event in sorted(on_device, key=lambda event: event.time_range.start):
        counts[event.name] = counts.get(event.name, 0) + 1
    return tuple(Kernel(name=name, count=count) for name, count in counts.items())


def missing_kernel(pattern: str | None, kernels: Sequence[Kernel]) -> str | None:
    """A sentence when kernels were seen and none of them is the backend's own."""
    if pattern is None or not kernels or any(re.search(pattern, kernel.name) for kernel in kernels):
        return None
    seen = "; ".join(kernel.name[:80] for kernel in kernels[:4])
    return f"none of the backend's own kernels ran (pattern {pattern!r}); the call launched: {seen}"
