"""One backend on one case: compare with the reference, time, and check again what was timed."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from moebench.backend import Backend, Experts
from moebench.case import Case
from moebench.check import compare, inspect, repeat_check
from moebench.device import Device
from moebench.mx import Mxfp4
from moebench.problem import Layer, Tokens, make_tokens
from moebench.record import Canary, Contract, Kernel, L2State, Record, Scope, Timing
from moebench.reference.diagnosis import explain
from moebench.reference.torch_experts import experts as reference
from moebench.roofline import RoofsError, best_roof, impossible, roofline, work
from moebench.rotation import plan_rotation, token_sets
from moebench.router import logits, route
from moebench.routing import Assignment, assign, realized
from moebench.timeline import Call as Events
from moebench.timeline import breakdown
from moebench.timing import CPU_RULE, GPU_RULE, ONCE, CudaStopwatch, StopRule, Stopwatch, WallStopwatch, enqueue_us, measure
from moebench.trace import missing_kernel, stands_aside, timeline

REFERENCE = "torch_experts 1"  # raised when the reference computes something else than before
INSIDE: dict[Scope, str] = {
    "experts": "expert ids and weights given, bf16 in, bf16 out: padding, activation quantization, experts, weighted sum",
    "layer": "router logits given, bf16 in, bf16 out: top-k, softmax, padding, activation quantization, experts, weighted sum",
}
TRACE_WARMUP_US = 30_000.0  # an idle H200 falls to 345 MHz while the profiler starts
WAKE_S = 0.05  # of load before the controls of a row
MATMUL_SIZE = 2048
MOST_REPEATED = 8  # inputs of the repeat check, whose expected outputs are kept
REPEAT_S, REPEAT_CPU_S = 0.4, 0.25  # 300 launches fit up to about 1000 tokens on an H200
MOST_FREE_SHARE = 0.6  # of free device memory that weight copies may take
FLUSH_L2S, FLUSH_BYTES = 4, 256 << 20  # read before each call where rotation does not suffice: at least so much

Announce = Callable[[str], AbstractContextManager[None]]  # enter a phase


class Copies:
    """Prepared copies of one layer's weights, made when the first case needs them."""

    def __init__(self, backend: Backend, layer: Layer, max_num_tokens: int, device: Device) -> None:
        self.layer = layer
        self._backend, self._max_num_tokens, self._device = backend, max_num_tokens, device
        free = self._free_bytes()
        self._experts = [backend.prepare(layer, max_num_tokens)]
        self._bytes = max(free - self._free_bytes(), layer_bytes(layer))

    def take(self, count: int) -> list[Experts]:
        while len(self._experts) < count:
            self._experts.append(self._backend.prepare(cloned(self.layer), self._max_num_tokens))
        return self._experts[:count]

    def most(self) -> int:
        """How many could be held, with those that are."""
        more = MOST_FREE_SHARE * self._free_bytes() / (2 * self._bytes)  # a layer and what is made of it
        return len(self._experts) + int(more)

    def _free_bytes(self) -> int:
        if not self._device.is_gpu:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])


class Batch:
    """What one timed call reads, at addresses that a CUDA graph keeps."""

    def __init__(self, case: Case, where: str, assignment: Assignment, scope: Scope) -> None:
        self._made_for = case, assignment
        self._tokens = make_tokens(case, where, assignment)
        self._logits = logits(assignment, case.num_experts, where) if scope == "layer" else None

    def call(self, experts: Experts) -> Tensor:
        return experts(self.routed())

    def routed(self) -> Tokens:
        """What the experts are given; in scope layer the router's work is done here."""
        if self._logits is None:
            return self._tokens
        ids, weights = route(self._logits, self._tokens.topk_ids.shape[1])
        return replace(self._tokens, topk_ids=ids, topk_weights=weights)

    def restore(self) -> None:
        """What it held at first."""
        self.fill(*self._made_for)

    def fill(self, case: Case, assignment: Assignment) -> None:
        """Other tokens at the same addresses."""
        fresh = make_tokens(case, str(self._tokens.hidden_states.device), assignment)
        for field in fields(Tokens):
            getattr(self._tokens, field.name).copy_(getattr(fresh, field.name))
        if self._logits is not None:
            self._logits.copy_(logits(assignment, case.num_experts, str(self._logits.device)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A backend prepared for a layer, and how its cases are to be timed."""

    backend: Backend
    device: Device
    copies: Copies
    layer_checksum: int
    l2: L2State
    scope: Scope
    repeat_check: int  # launches whose outputs are compared
    phase: Announce
    block: Callable[[], AbstractContextManager[None]]  # around one region as it was timed, for profilers that filter by range

    def run(self, record: Record) -> Record:
        """The record with what was found; a time only where the output was right before and after it was taken."""
        case, layer, act_dtype = record.case, self.copies.layer, self.backend.act_dtype
        where = self.device.torch or "cpu"
        on_gpu = self.device.is_gpu and not getattr(self.backend, "computes_on_cpu", False)
        with self.phase("alloc"):
            before = controls() if on_gpu else NO_CONTROL  # before the check, whose load may have lowered the clocks
            assignment = assign(case)
            (experts,) = self.copies.take(1)
            facts: dict[str, str | int | float] = dict(getattr(experts, "facts", {}))
            record = replace(record, routing=realized(case, assignment), facts=facts)
            batch = Batch(case, where, assignment, self.scope)
        with self.phase("check"):
            tokens = batch.routed()
            want = reference(layer, tokens, act_dtype)
            deterministic: bool = getattr(self.backend, "deterministic", True)
            found = inspect(experts, layer, tokens, want, act_dtype, layer_checksum=self.layer_checksum, deterministic=deterministic)
            if not deterministic and found.error is not None:  # else it ended before launches were compared
                record = replace(record, facts={**facts, "elements_differing_between_launches": found.differing})
            record = replace(record, error=found.error)
            if found.status != "ok":
                told = explain(found.output, layer, tokens, act_dtype, want) if found.output is not None else ""
                return replace(record, status=found.status, reason=found.reason + (f" ({told})" if told else ""))
            wanted = {} if deterministic else {batch: want}
            del tokens, want
        if on_gpu:
            record = self._time_on_gpu(record, assignment, batch, before, wanted)
        else:
            record = self._time_on_cpu(record, batch, experts, wanted)
        if self.device.is_gpu:
            torch.cuda.empty_cache()
        return self._judged(record)

    def _time_on_gpu(self, record: Record, assignment: Assignment, batch: Batch, before: Control, wanted: dict[Batch, Tensor]) -> Record:
        case, device = record.case, self.device
        with self.phase("alloc"):
            rotation = plan_rotation(case, assignment, device.l2_bytes, self.copies.most()) if self.l2 == "cold" else None
            sets = list(token_sets(case, assignment, rotation.token_sets if rotation else 1))
            others = [Batch(reseeded(case, i), device.torch or "cuda", sets[i], self.scope) for i in range(1, len(sets))]
            batches = [batch, *others]
        with self.phase("jit"):
            turns = [(each, copy) for copy in self.copies.take(rotation.weight_copies if rotation else 1) for each in batches]
            torch.cuda.synchronize()
        calls = [partial(each.call, experts) for each, experts in turns]
        record = self._repeated(record, turns, wanted)
        if record.reason:
            return record
        flush_bytes = 0 if rotation is None or rotation.is_cold else max(FLUSH_L2S * device.l2_bytes, FLUSH_BYTES)
        with self.phase("time"):
            watch = CudaStopwatch(calls, self.l2, flush_bytes, sm_mhz)
            timing = measure(watch, GPU_RULE)
            host_us = enqueue_us(calls[0], 10 if timing.median_us < 5000 else 3)
        timing = replace(timing, host_us=host_us, proof=rotation.proof(flush_bytes) if rotation else None)
        record = replace(
            record,
            canary=Canary(before_us=before.copy_us, after_us=copy_us(), matmul_us=before.matmul_us),
            contract=self._contract(watch, GPU_RULE),
        )
        with self.phase("check"):
            if wrong := self._check_timed(record, watch, [each for each, _ in turns]):
                return wrong
        with self.phase("trace"):
            timing, events = self._cross_checked(timing, watch, batch)
            record = replace(record, timing=timing, kernels=kernels_of_a_call(events, timing.calls_per_region))
            if record.kernels and timing.span_us is None:
                told = "none: regions launch different numbers of kernels, and those listed are of several regions"
                record = replace(record, facts={**record.facts, "cross_check": told})
            if not record.kernels and case.num_tokens:  # ok means right and timed here, not proven to be the backend's own kernels
                record = replace(record, facts={**record.facts, "kernels": "not traced: another profiler is attached, or it saw none"})
        pattern: str | None = getattr(self.backend, "kernel_pattern", None)
        if problem := missing_kernel(pattern, record.kernels):
            return replace(record, status="wrong", reason=problem, timing=None)
        return record

    def _repeated(self, record: Record, turns: Sequence[tuple[Batch, Experts]], wanted: dict[Batch, Tensor]) -> Record:
        """Many launches over the inputs that are timed, for what goes wrong once in a hundred; with a reason where one did.

        wanted: references that are known; those of a backend that may give other bits are added: one is up to 0.2 s on an H200, and
        weight copies share their batch."""
        turns = turns[:MOST_REPEATED]
        deterministic: bool = getattr(self.backend, "deterministic", True)
        if not self.repeat_check or not record.case.num_tokens:
            return record
        with self.phase("check"):
            if deterministic:
                expected = [batch.call(experts).clone() for batch, experts in turns]
            else:
                for batch, _ in turns:
                    if batch not in wanted:
                        wanted[batch] = reference(self.copies.layer, batch.routed(), self.backend.act_dtype)
                expected = [wanted[batch] for batch, _ in turns]
            wanted.clear()  # 0.2 GB each at 16384 tokens
            found = repeat_check(
                lambda index: turns[index][0].call(turns[index][1]),
                expected,
                self.backend.act_dtype,
                launches=self.repeat_check,
                budget_s=REPEAT_S if self.device.is_gpu else REPEAT_CPU_S,
                deterministic=deterministic,
            )
        record = replace(record, launches_compared=found.launches)
        if found.finding.status == "ok":
            return record
        return replace(record, status=found.finding.status, reason=found.finding.reason, error=found.finding.error or record.error)

    def _cross_checked(self, timing: Timing, watch: CudaStopwatch, batch: Batch) -> tuple[Timing, Events]:
        """With what a profiler sees of one region, after others that bring the clocks back up; the region's events."""
        count = 1 + math.ceil(TRACE_WARMUP_US / (timing.median_us * timing.calls_per_region))
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def run() -> None:
            for _ in range(count - 1):
                watch.region()
            with self.block():
                start.record()
                watch.region()
                stop.record()
                torch.cuda.synchronize()

        if stands_aside():
            run()
            return timing, ()
        events = timeline(run)
        each, rest = divmod(len(events), count)
        if not each or rest:  # regions that launch different numbers of kernels cannot be told apart
            return timing, events
        calls = timing.calls_per_region
        whole = breakdown([events[-each:]])
        traced_us = start.elapsed_time(stop) * 1e3 / calls
        timing = replace(timing, traced_us=traced_us, busy_us=whole.busy_us / calls, span_us=whole.span_us / calls)
        routing = len(timeline(batch.routed)) if self.scope == "layer" else 0
        return replace(timing, stages_us=stages(events[-each:], calls, routing)), events[-each:]

    def _time_on_cpu(self, record: Record, batch: Batch, experts: Experts, wanted: dict[Batch, Tensor]) -> Record:
        record = self._repeated(record, [(batch, experts)], wanted)
        if record.reason:
            return record
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # a time that says nothing is taken once
        watch = WallStopwatch(partial(batch.call, experts))
        rule = ONCE if interpreted else CPU_RULE
        with self.phase("time"):
            timing = measure(watch, rule)
        with self.phase("check"):
            if wrong := self._check_timed(record, watch, [batch]):
                return wrong
        if interpreted:
            timing = replace(timing, comparable=False, note="ran in Triton's interpreter: right or wrong is real, the time is not")
        return replace(record, timing=timing, contract=self._contract(watch, rule))

    def _check_timed(self, record: Record, watch: Stopwatch, batches: Sequence[Batch]) -> Record | None:
        """Give what was timed other tokens and other experts, run it as it was timed, and judge it; None if it is right."""
        for number, batch in enumerate(dict.fromkeys(batches)):
            fresh = reseeded(record.case, len(batches) + number)
            batch.fill(fresh, assign(fresh))
        wrong = self._judge_outputs(record, watch, batches)
        for batch in dict.fromkeys(batches):
            batch.restore()  # another routing has other tiles: a profiler would see another call than the clock did
        return wrong

    def _judge_outputs(self, record: Record, watch: Stopwatch, batches: Sequence[Batch]) -> Record | None:
        act_dtype = self.backend.act_dtype
        wanted: dict[Batch, Tensor] = {}
        for index, out in watch.outputs():
            batch = batches[index]
            if batch not in wanted:
                wanted[batch] = reference(self.copies.layer, batch.routed(), act_dtype)
            if not bool(out.isfinite().all()):
                missing = int((~out.isfinite()).sum())
                reason = f"what was timed ({watch.clock}) leaves {missing} of {out.numel()} elements unwritten or not finite"
                return replace(record, status="unwritten", reason=reason)
            error = compare(out, wanted[batch], act_dtype)
            if not error.ok:
                reason = f"what was timed ({watch.clock}) gives relative L2 {error.rel_l2:.2e} on fresh tokens; the eager call was right"
                return replace(record, status="wrong", reason=reason, error=error)
        return None

    def _judged(self, record: Record) -> Record:
        """With the roofs; ok, unless the time is impossible."""
        timing = record.timing
        if timing is None or record.routing is None:
            return record
        needed = work(record.case, record.routing)
        l2 = timing.l2
        if reason := impossible(timing.median_us, needed, self.device, self.backend.act_dtype, l2) if timing.comparable else None:
            return replace(record, status="too_fast", reason=reason, timing=None)
        try:
            roof = best_roof(self.device.name)
        except RoofsError as error:
            return replace(record, status="ok", facts={**record.facts, "roofs": str(error)})
        found = roofline(needed, roof, self.backend.act_dtype, l2, record.facts) if roof else None
        return replace(record, status="ok", roofline=found)

    def _contract(self, watch: Stopwatch, rule: StopRule) -> Contract:
        return Contract(
            scope=self.scope,
            inside=INSIDE[self.scope],
            clock=watch.clock,
            l2=watch.l2,
            l2_method=watch.l2_method,
            warmup=rule.warmup,
            rank_aggregate="each rank alone",
            reference=REFERENCE,
        )


def stages(events: Events, calls: int, routing: int) -> dict[str, float]:
    """Microseconds of one call in each part of a layer, of which the first `routing` kernels are the router's; empty without one."""
    each, rest = divmod(len(events), calls)
    if not routing or rest:
        return {}
    found: dict[str, float] = defaultdict(float)
    for first in range(0, len(events), each):
        found["route"] += breakdown([events[first : first + routing]]).busy_us / calls
        for phase, us in breakdown([events[first + routing : first + each]]).phases_us.items():
            found[stage(phase)] += us / calls
    return dict(found)


def stage(phase: str) -> str:
    """Which part of a layer a kernel's phase is; a kernel that does several belongs to the experts."""
    parts = set(phase.split("+"))
    if parts & {"gemm1", "activation", "gemm2"}:
        return "experts"
    if parts <= {"quantize", "dequantize", "permute"}:
        return "prepare"
    return phase if phase in ("route", "finalize") else "other"


def kernels_of_a_call(events: Events, calls: int) -> tuple[Kernel, ...]:
    """What one of the calls launched; rounded up where calls differ."""
    counts = Counter(event.name for event in events)
    return tuple(Kernel(name=name, count=-(-count // calls)) for name, count in counts.items())


def reseeded(case: Case, number: int) -> Case:
    """The same case with other tokens and, where a seed decides, other experts."""
    return replace(case, seed=(case.seed + 7919 * number) % 2**31)


def layer_bytes(layer: Layer) -> int:
    tensors = [layer.w13.codes, layer.w13.scales, layer.w2.codes, layer.w2.scales]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cloned(layer: Layer) -> Layer:
    """At addresses of its own."""

    def copy(weights: Mxfp4) -> Mxfp4:
        return replace(weights, codes=weights.codes.clone(), scales=weights.scales.clone())

    b13 = layer.b13.clone() if layer.b13 is not None else None
    b2 = layer.b2.clone() if layer.b2 is not None else None
    return replace(layer, w13=copy(layer.w13), w2=copy(layer.w2), b13=b13, b2=b2)


@dataclass(frozen=True, kw_only=True)
class Control:
    """What no kernel under test can change: a copy of 256 MiB, 127 us on an H200, and a product of two bf16 matrices."""

    copy_us: float
    matmul_us: float


NO_CONTROL = Control(copy_us=0.0, matmul_us=0.0)


def controls() -> Control:
    """After some load: the SM clock of an H200 that idles falls to 345 MHz, and the matmul goes with it. The copy does not: after 2 s of
    idling it took 128 us there as ever."""
    matrix = torch.zeros(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(matrix)
    until = perf_counter() + WAKE_S
    while perf_counter() < until:
        for _ in range(20):
            torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize()
    return Control(copy_us=copy_us(), matmul_us=_fastest_us(lambda: torch.mm(matrix, matrix, out=product)))


def copy_us() -> float:
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _fastest_us(lambda: target.copy_(source))


def _fastest_us(call: Callable[[], object], samples: int = 10) -> float:
    """Not the median: right after a large reference calculation the first few copies took 10 % longer. The GPU sleeps while
    the host enqueues, 200 us of an H200: with 50 a few of some hundred canaries showed 143 us, in runs that had rows where the host was
    late; neither idling nor other memory made a copy slower there."""
    times: list[float] = []
    for _ in range(samples):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return min(times)


def sm_mhz() -> float | None:
    """By NVML, where its Python package is installed."""
    try:
        rate: int = torch.cuda.clock_rate()
        return float(rate)
    except (ImportError, RuntimeError):
        return None
