"""Roofs as this device really has them: how fast it copies, reads and multiplies.

Measured in a process of its own, since the command line never imports torch; `roofs_of_this_machine` starts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, BinaryIO

from moebench.child import spawn
from moebench.device import Device, detect
from moebench.failure import of_exit, without_advice
from moebench.leash import send, serve, take
from moebench.record import Timing
from moebench.roofline import Rate, Roofs, RoofsError, roofs_from_dict, roofs_to_dict

if TYPE_CHECKING:
    import torch

DEADLINES_S = {"start": 120.0}  # importing torch; each measurement has a minute
REGION_US = 200.0  # of back-to-back calls between two events: the events' own resolution is 0.5 us
GPU_SAMPLES = 50
GPU_BYTES = 2 << 30  # of a buffer: 30 times the largest L2, and 0.25 ms of reading at 8 TB/s
GPU_SIZE = 8192  # of a square matmul
REST_S = 0.05  # between bursts
LOAD_US, BURST_US = 50_000.0, 5_000.0  # of work under which the clock is asked for: the query takes a few milliseconds
CPU_BYTES = 256 << 20  # a CPU whose caches hold more has them in its bandwidth; no floor of a CPU row uses that
CPU_SIZE = 1024
CPU_S = 0.4  # for each rate, so that four take about 2 s
CPU_SAMPLES = 5, 50  # at least and at most

Call = Callable[[], object]
Tell = Callable[[str], None]


def roofs_of_this_machine() -> Iterator[str | Roofs]:
    """What is being measured, then the roofs. An exception or a closed iterator ends the child.

    Raises RoofsError with the reason where it ends without roofs, or stays silent for too long."""
    found = False
    with spawn("moebench.calibrate", {}, DEADLINES_S) as child:
        for frame in child.frames():
            if "failed" in frame:
                raise RoofsError(str(frame["failed"]))
            if "phase" in frame:
                yield child.phase
            elif "roofs" in frame:
                found = True
                yield roofs_from_dict(frame["roofs"])
    if not found:
        raise RoofsError(without_advice((child.failure or of_exit(0, child.phase)).reason) + child.last_words())


def calibrate(device: Device, tell: Tell = lambda what: None) -> Roofs:
    """Measure in this process: about 2 s on a CPU. tell: what comes next."""
    import torch

    if device.is_gpu:
        return _calibrate_gpu(device, tell)
    rates = {}
    elements = min(CPU_BYTES, device.memory_bytes // 16 or CPU_BYTES) // 4
    source = torch.ones(elements)
    target = torch.empty_like(source)
    tell("copying")
    rates["copy"] = _rate(_cpu_sample(lambda: target.copy_(source)), 2 * 4 * elements)
    tell("reading")
    rates["read"] = _rate(_cpu_sample(source.amax), 4 * elements)
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        tell(f"multiplying {name}")
        a, b = (torch.randn(CPU_SIZE, CPU_SIZE).to(dtype) for _ in range(2))
        rates[name] = _rate(_cpu_sample(lambda a=a, b=b: a @ b), 2 * CPU_SIZE**3)  # type: ignore[misc]
    return Roofs(
        device=device.name,
        arch=device.arch,
        measured=_today(),
        torch=torch.__version__,
        copy_bytes_s=rates["copy"],
        read_bytes_s=rates["read"],
        bf16_flop_s=rates["bf16"],
        float32_flop_s=rates["float32"],
    )


def main(pipe: BinaryIO) -> None:
    """The child."""
    device = detect()
    if device.torch is None:
        send(pipe, {"failed": "torch is not installed, and it is what measures; install it with: pip install torch"})
        return
    roofs = calibrate(device, lambda what: send(pipe, {"phase": what}))
    send(pipe, {"roofs": roofs_to_dict(roofs)})


def _calibrate_gpu(device: Device, tell: Tell) -> Roofs:
    import torch

    where = device.torch or "cuda"
    elements = min(GPU_BYTES, device.memory_bytes // 8) // 4
    source = torch.ones(elements, device=where)
    target = torch.empty_like(source)
    sink = torch.empty((), device=where)
    tell("copying")
    copied = _gpu_rate(lambda: target.copy_(source), 2 * 4 * elements)
    tell("reading")
    reductions = (lambda: torch.amax(source, dim=0, out=sink), lambda: torch.sum(source, dim=0, out=sink))
    read = max((_gpu_rate(call, 4 * elements) for call in reductions), key=lambda rate: rate.value)
    tell("multiplying bf16")
    a, b = (torch.randn(GPU_SIZE, GPU_SIZE, device=where, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bf16 = _gpu_burst_rate(lambda: torch.mm(a, b, out=out), 2 * GPU_SIZE**3)
    tell("multiplying FP8")
    fp8 = _fp8_rate(a, b)
    return Roofs(
        device=device.name,
        arch=device.arch,
        measured=_today(),
        torch=torch.__version__,
        copy_bytes_s=copied,
        read_bytes_s=read,
        bf16_flop_s=bf16,
        fp8_flop_s=fp8,
    )


def _fp8_rate(a: torch.Tensor, b: torch.Tensor) -> Rate | None:
    """None where the device or this torch has no FP8 matmul."""
    import torch

    one = torch.ones((), device=a.device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # row-major times column-major is what there is

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        multiply()
        torch.cuda.synchronize()
    except RuntimeError:  # "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9"
        return None
    return _gpu_burst_rate(multiply, 2 * GPU_SIZE**3)


def _gpu_burst_rate(call: Call, amount: float) -> Rate:
    """In bursts with rests between: without them the power cap slows an H200 down to 1500 of 1980 MHz within 0.1 s, and then a
    kernel of some milliseconds would beat the roof."""
    _gpu_sample(call)
    samples_us: list[float] = []
    clocks: list[int] = []
    for _ in range(GPU_SAMPLES):
        time.sleep(REST_S)
        call()  # fetches what is cold, so that the next finds the GPU at work
        samples_us += _regions_us(call, 1, 2)
        if mhz := _busy_sm_mhz(call, samples_us[-1], BURST_US):
            clocks.append(mhz)
    return _rate(samples_us, amount, int(median(clocks)) if clocks else None)


def _gpu_rate(call: Call, amount: float) -> Rate:
    samples_us = _gpu_sample(call)
    return _rate(samples_us, amount, _busy_sm_mhz(call, median(samples_us)))


def _gpu_sample(call: Call) -> list[float]:
    """Microseconds of one call each, from regions of at least REGION_US; all are enqueued before the first is waited for."""
    _regions_us(call, 3, 1)
    (first_us,) = _regions_us(call, 10, 1)
    _regions_us(call, ceil(100_000 / first_us), 1)  # 0.1 s of load brings the clocks up
    (one_us,) = _regions_us(call, 10, 1)
    return _regions_us(call, ceil(1.2 * REGION_US / one_us), GPU_SAMPLES)  # 1.2: samples differ, and none may fall below


def _regions_us(call: Call, calls: int, regions: int) -> list[float]:
    import torch

    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(regions)]
    for start, stop in pairs:
        start.record()
        for _ in range(calls):
            call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 / calls for start, stop in pairs]


def _busy_sm_mhz(call: Call, call_us: float, load_us: float = LOAD_US) -> int | None:
    """The SMs' clock while the device works, or None without NVML."""
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    for _ in range(ceil(load_us / call_us)):
        call()
    try:
        return int(torch.cuda.clock_rate()) or None
    except (RuntimeError, pynvml.NVMLError):
        return None
    finally:
        torch.cuda.synchronize()


def _cpu_sample(call: Call) -> list[float]:
    call()
    samples: list[float] = []
    least, most = CPU_SAMPLES
    started = time.perf_counter()
    while len(samples) < least or (len(samples) < most and time.perf_counter() - started < CPU_S):
        before = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - before) / 1e3)
    return samples


def _rate(samples_us: Sequence[float], amount: float, sm_mhz: int | None = None) -> Rate:
    """Of samples that each moved or computed `amount`."""
    timing = Timing(samples_us=tuple(samples_us), clock="wall", l2=None, l2_method="none", warmup_calls=0)
    fast_us, slow_us = timing.interval_us
    per_second = amount * 1e6
    return Rate(
        value=per_second / timing.median_us, low=per_second / slow_us, high=per_second / fast_us, samples=len(samples_us), sm_mhz=sm_mhz
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


if __name__ == "__main__":
    take()  # there is nothing to ask for; with it the child is on the leash
    serve(main)
