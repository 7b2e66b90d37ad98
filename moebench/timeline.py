"""What one call does over time: events, the phases they belong to, where the time goes, how two profiles differ."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from statistics import fmean
from typing import Literal, TypeVar, get_args

from moebench.case import BLOCK, MODELS, Case
from moebench.device import Device
from moebench.realized import Realized

# Saved profiles; a newer major is not readable by older code.
# 1.0  case, backend, act_dtype, device, source, launch, calls, untraced_us, routing, notes
SCHEMA = "1.0"

Kind = Literal["kernel", "memcpy", "memset", "op"]  # op: an operation of torch on a CPU
Source = Literal["kineto", "nsys", "cpu"]
Launch = Literal["cuda_graph", "eager", ""]  # "": the recording does not tell

# In the order in which a layer needs them. A kernel that does several has their names joined by "+", as gemm1+activation.
#   route      which expert gets which pair, in what order: sorting, offsets, tile maps, strides of the grouped GEMMs
#   quantize   activations to the format that the GEMM multiplies
#   dequantize weights to what the GEMM multiplies, where that is a step of its own (the torch reference)
#   permute    rows gathered by expert or copied into padded buffers
#   finalize   the weighted sum of a token's experts; columns cut back to size
#   other      known, and none of these
PHASES = ("route", "quantize", "dequantize", "permute", "gemm1", "activation", "gemm2", "finalize", "other")
UNKNOWN = "unclassified"
GAPS = "gaps"
_GEMM = "gemm"  # gemm1 or gemm2: the order within the call tells

SAME_US, SAME_SHARE = 0.1, 0.02  # a difference below both is none: CUPTI's clock ticks in steps of 32 ns
MOST_EVENTS = 2_000_000  # of a profile that is read


class ProfileError(Exception):
    """A profile that cannot be taken or read; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One kernel, copy, fill or operation; times on any one clock."""

    name: str
    start_ns: int
    end_ns: int
    stream: int = 0
    kind: Kind = "kernel"


Call = tuple[Event, ...]  # what one call launched, in order of start


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Several calls of one backend on one case."""

    case: Case
    backend: str
    act_dtype: str
    device: Device
    source: Source
    launch: Launch
    calls: tuple[Call, ...]
    untraced_us: tuple[float, ...] = ()  # the same calls without a profiler, first to last kernel
    routing: Realized | None = None
    notes: tuple[str, ...] = ()  # what a reader has to know of how it was taken


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A name that matches `pattern` belongs to `phase`; after the second GEMM has begun, to `late`."""

    pattern: str
    phase: str
    late: str = ""


# The first that matches decides. Names as seen in traces on an H200, except where a comment says they come from the sources.
RULES = (
    # ours: triton_mxfp4_bf16_details/{route,gemm}.py, hopper_mxfp4_bf16_details/{moe,prefill}.cu
    Rule(pattern=r"^gate_up_kernel", phase="gemm1+activation"),
    Rule(pattern=r"^down_kernel", phase="gemm2"),
    Rule(pattern=r"^add_slots", phase="finalize"),
    Rule(pattern=r"^(sort|count|place)_pairs", phase="route"),
    Rule(pattern=r"^hopper_mxfp4_(bf16|prefill)", phase="route+gemm1+activation+gemm2+finalize"),
    # OpenAI's triton_kernels; _p_, _topk, _downcast and _finalize from the sources
    Rule(pattern=r"^_(p_)?matmul\w*_swiglu", phase="gemm1+activation"),
    Rule(pattern=r"^_(p_)?matmul", phase=_GEMM),
    Rule(pattern=r"^(pack_kernel|_sum_bitmatrix|_combined_routing|_routing|_topk)", phase="route"),
    Rule(pattern=r"^_downcast_to_mxfp", phase="quantize"),
    Rule(pattern=r"^_(reduce|finalize)", phase="finalize"),
    # FlashInfer's CUTLASS path (tensorrt_llm); what only Blackwell or FP8 activations launch, from the sources
    Rule(
        pattern=r"ExpertPrefixSum|BuildExpertMaps|ActiveExpertMaps|computeStrides|work_tile_map|TokenScalePtrArray|prepareMinLatency",
        phase="route",
    ),
    Rule(pattern=r"expandInputRowsKernel<__nv_bfloat16, (?!__nv_bfloat16)", phase="quantize+permute"),
    Rule(pattern=r"expandInputRowsKernel", phase="permute"),
    Rule(pattern=r"do(Gated)?ActivationKernel<(?!__nv_bfloat16)", phase="quantize+activation"),
    Rule(pattern=r"do(Gated)?ActivationKernel", phase="activation"),
    Rule(pattern=r"finalizeMoeRouting", phase="finalize"),
    Rule(pattern=r"device_kernel.*(ScaleScatter|FusedFinalize)", phase="gemm2+finalize"),
    Rule(pattern=r"device_kernel", phase=_GEMM),
    # vLLM's Marlin path; moe_sum and silu_and_mul from the sources
    Rule(pattern=r"moe_align_block_size|count_and_sort_expert_tokens", phase="route"),
    Rule(pattern=r"marlin_moe", phase=_GEMM),
    Rule(pattern=r"(swigluoai|silu|act)_and_mul", phase="activation"),
    Rule(pattern=r"moe_sum", phase="finalize"),
    # anybody's
    Rule(pattern=r"(?i)quantiz", phase="quantize"),
    Rule(pattern=r"(?i)topk|softmax", phase="route"),
    Rule(pattern=r"^Memcpy|copy_kernel", phase="permute", late="finalize"),
    Rule(pattern=r"at::native::reduce_kernel", phase="other", late="finalize"),
    Rule(pattern=r"^Memset|FillFunctor", phase="other"),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kernel of a call; means over the calls."""

    phase: str
    name: str
    launches: float
    us: float  # in which it ran and none that began before it


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Where the time of a call goes: parts and gaps add up to the span, first start to last end. Means over the calls."""

    parts: tuple[Part, ...]  # in order of first launch
    gaps_us: float  # nothing ran
    spans_us: tuple[float, ...]  # of each call
    overlap_us: float  # in which several ran at once, counted once above

    @property
    def span_us(self) -> float:
        return fmean(self.spans_us) if self.spans_us else 0.0

    @property
    def phases_us(self) -> dict[str, float]:
        """In the order of a layer; the unclassified last, without the gaps."""
        total: dict[str, float] = defaultdict(float)
        for part in self.parts:
            total[part.phase] += part.us
        return dict(sorted(total.items(), key=lambda item: phase_order(item[0])))

    @property
    def busy_us(self) -> float:
        return sum(part.us for part in self.parts)

    @property
    def coverage(self) -> float:
        """The share of the busy time that is in kernels whose phase is known."""
        known = sum(part.us for part in self.parts if part.phase != UNKNOWN)
        return known / self.busy_us if self.busy_us else 1.0


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """What a GEMM must at least move and multiply."""

    moved_bytes: int  # weights of the experts that get tokens, once; for gemm1 the hidden states, too
    flop: float


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time that the roofs allow a phase."""

    us: float
    limiter: Literal["memory", "compute"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One kernel in two profiles."""

    phase: str
    before: str | None  # its name; None where it is new
    after: str | None  # None where it is gone
    before_us: float
    after_us: float

    @property
    def delta_us(self) -> float:
        return self.after_us - self.before_us

    @property
    def what(self) -> str:
        if self.before is None:
            return "new"
        if self.after is None:
            return "gone"
        if self.before != self.after:
            return "replaced"
        if abs(self.delta_us) <= max(SAME_US, SAME_SHARE * self.before_us):
            return "same"
        return "slower" if self.delta_us > 0 else "faster"


@dataclass(frozen=True, kw_only=True)
class View:
    """A profile, and what it is to be judged by."""

    profile: Profile
    breakdown: Breakdown
    floors: Mapping[str, Floor]  # by phase
    roof: str  # where the floors come from, or why there are none


@dataclass(frozen=True, kw_only=True)
class Counters:
    """A kernel as ncu saw it, alone on the device with a cold L2."""

    phase: str
    name: str
    us: float
    dram_share: float | None  # of the peak bandwidth
    sm_share: float | None  # of the peak of the busiest pipe


def classify(call: Sequence[Event], case: Case | None = None) -> list[str]:
    """The phase of each event of one call, by its name and its place.

    The first grouped GEMM is gemm1 and the rest gemm2; where activation is a kernel of its own, what comes before it is gemm1.
    case: for operations on a CPU, whose shapes tell the GEMMs apart."""
    matched = [_match(event, case) for event in call]
    gemms = [number for number, rule in enumerate(matched) if rule.phase == _GEMM]
    activations = [number for number, rule in enumerate(matched) if "activation" in rule.phase.split("+")]
    second = min((number for number in gemms if number > activations[0]), default=None) if activations else next(iter(gemms[1:]), None)
    if second is None:  # told by its name
        second = next((number for number, rule in enumerate(matched) if "gemm2" in rule.phase.split("+")), None)
    phases = []
    for number, rule in enumerate(matched):
        after = second is not None and number >= second
        numbered = "gemm2" if after else "gemm1"
        phases.append(numbered if rule.phase == _GEMM else rule.late if rule.late and after else rule.phase)
    return phases


def breakdown(calls: Sequence[Call], case: Case | None = None) -> Breakdown:
    """Each instant is counted once, for the event that began first: kernels overlap on several streams, and on one with
    programmatic dependent launch."""
    total_ns: dict[tuple[str, str], int] = defaultdict(int)
    launches: dict[tuple[str, str], int] = defaultdict(int)
    spans_ns: list[int] = []
    gaps_ns = overlap_ns = 0
    for call in calls:
        events = sorted(call, key=lambda event: (event.start_ns, event.end_ns))
        if not events:
            spans_ns.append(0)
            continue
        until = events[0].start_ns
        for event, phase in zip(events, classify(events, case), strict=True):
            gaps_ns += max(0, event.start_ns - until)
            counted = max(0, event.end_ns - max(event.start_ns, until))
            overlap_ns += event.end_ns - event.start_ns - counted
            total_ns[phase, event.name] += counted
            launches[phase, event.name] += 1
            until = max(until, event.end_ns)
        spans_ns.append(until - events[0].start_ns)
    scale = 1e3 * max(len(calls), 1)
    parts = tuple(
        Part(phase=phase, name=name, launches=launches[phase, name] / max(len(calls), 1), us=ns / scale)
        for (phase, name), ns in total_ns.items()
    )
    return Breakdown(parts=parts, gaps_us=gaps_ns / scale, spans_us=tuple(ns / 1e3 for ns in spans_ns), overlap_us=overlap_ns / scale)


def phase_order(phase: str) -> tuple[int, ...]:
    """Sorts phases as a layer needs them, a fused one where it begins."""
    return tuple(PHASES.index(part) if part in PHASES else len(PHASES) for part in phase.split("+"))


def gemm_work(case: Case, realized: Realized) -> dict[str, PhaseWork]:
    """Of gemm1 and gemm2, at unpadded sizes. What lies between them may stay in the L2 and is not counted."""
    h, i, experts, pairs = case.hidden_size, case.local_intermediate_size, realized.active_experts, realized.local_pairs
    bias = MODELS[case.model].bias
    tokens = math.ceil(pairs / min(case.top_k, case.num_local_experts))
    up = experts * (h * i + 2 * h * i // BLOCK + (4 * i if bias else 0))
    down = experts * (h * i // 2 + h * i // BLOCK + (2 * h if bias and case.tp_rank == 0 else 0))
    return {
        "gemm1": PhaseWork(moved_bytes=up + 2 * tokens * h, flop=4.0 * pairs * h * i),
        "gemm2": PhaseWork(moved_bytes=down, flop=2.0 * pairs * h * i),
    }


def floor(phase: str, work: Mapping[str, PhaseWork], bandwidth_bytes_s: float | None, flop_s: float) -> Floor | None:
    """Of a phase that holds a GEMM, fused or not. bandwidth_bytes_s None: caches may hold the weights, so memory is no floor."""
    needed = [work[part] for part in phase.split("+") if part in work]
    if not needed:
        return None
    computed_us = sum(need.flop for need in needed) / flop_s * 1e6
    moved_us = sum(need.moved_bytes for need in needed) / bandwidth_bytes_s * 1e6 if bandwidth_bytes_s else 0.0
    return Floor(us=max(computed_us, moved_us), limiter="memory" if moved_us > computed_us else "compute")


def diff(before: Breakdown, after: Breakdown) -> list[Change]:
    """Largest effect first, the gaps among them; the deltas add up to that of the span.

    Kernels are the same by phase and name. Where one is left in a phase on either side, one replaced the other."""
    left = {(part.phase, part.name): part.us for part in before.parts}
    right = {(part.phase, part.name): part.us for part in after.parts}
    changes = [
        Change(phase=phase, before=name, after=name, before_us=left[phase, name], after_us=right[phase, name])
        for phase, name in left.keys() & right.keys()
    ]
    gone, new = _by_phase(left.keys() - right.keys()), _by_phase(right.keys() - left.keys())
    for phase in gone.keys() | new.keys():
        if len(gone[phase]) == len(new[phase]) == 1:
            pairs: list[tuple[str | None, str | None]] = [(gone[phase][0], new[phase][0])]
        else:
            pairs = [*((name, None) for name in gone[phase]), *((None, name) for name in new[phase])]
        for a, b in pairs:
            before_us, after_us = left.get((phase, a or ""), 0.0), right.get((phase, b or ""), 0.0)
            changes.append(Change(phase=phase, before=a, after=b, before_us=before_us, after_us=after_us))
    changes.append(Change(phase=GAPS, before=GAPS, after=GAPS, before_us=before.gaps_us, after_us=after.gaps_us))
    return sorted(changes, key=lambda change: (-abs(change.delta_us), phase_order(change.phase), change.after or "", change.before or ""))


def repeats(events: Sequence[Event]) -> tuple[Call, ...]:
    """Cut into calls where the names are a sequence that repeats as a whole, else all as one call."""
    names = [event.name for event in events]
    borders = [0] * len(names)  # Knuth, Morris, Pratt: the longest border of each beginning
    for number in range(1, len(names)):
        length = borders[number - 1]
        while length and names[number] != names[length]:
            length = borders[length - 1]
        borders[number] = length + (names[number] == names[length])
    period = len(names) - borders[-1] if names else 0
    if not period or len(names) % period:
        period = len(names)
    return tuple(tuple(events[first : first + period]) for first in range(0, len(names), period)) if period else ()


def to_json(profile: Profile) -> str:
    names: dict[str, int] = {}
    kinds = get_args(Kind)
    calls = [
        [[names.setdefault(e.name, len(names)), e.start_ns, e.end_ns - e.start_ns, e.stream, kinds.index(e.kind)] for e in call]
        for call in profile.calls
    ]
    rest = {f.name: getattr(profile, f.name) for f in fields(profile) if f.name not in ("calls", "case", "device", "routing")}
    document = {
        "moebench_profile": SCHEMA,
        **rest,
        "case": asdict(profile.case),
        "device": asdict(profile.device),
        "routing": asdict(profile.routing) if profile.routing else None,
        "names": list(names),
        "calls": calls,  # name, start_ns, duration_ns, stream, kind
    }
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def from_json(text: bytes | str) -> Profile:
    """Raises ProfileError for what to_json did not write."""
    try:
        row = json.loads(text)
        if not isinstance(row, dict) or "moebench_profile" not in row:
            raise ValueError("it is not a saved profile; moebench profile --save FILE writes one")
        if str(row["moebench_profile"]).split(".")[0] != SCHEMA.split(".")[0]:
            raise ValueError(f"its schema is {row['moebench_profile']!r}, and this version reads {SCHEMA!r}")
        return _profile(row)
    except KeyError as error:
        raise ProfileError(f"the field {error} is missing") from None
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ProfileError(str(error) or type(error).__name__) from None


def median_call(calls: Sequence[Call]) -> Call:
    """The one whose span is the median, to be drawn."""
    spans = {number: max(e.end_ns for e in call) - min(e.start_ns for e in call) for number, call in enumerate(calls) if call}
    ordered = sorted(spans, key=lambda number: spans[number])
    return tuple(sorted(calls[ordered[len(ordered) // 2]], key=lambda e: (e.start_ns, e.end_ns))) if ordered else ()


_D = TypeVar("_D", Device, Realized)
_UNMATCHED = Rule(pattern="", phase=UNKNOWN)


def _match(event: Event, case: Case | None) -> Rule:
    rules = _op_rules(case) if event.kind == "op" and case is not None else RULES
    return next((rule for rule in rules if re.search(rule.pattern, event.name)), _UNMATCHED)


@cache
def _op_rules(case: Case) -> tuple[Rule, ...]:
    """Of torch operations with the shapes of their inputs, as "aten::matmul [9, 2880] [2880, 5760]", in the torch reference."""
    h, i, tokens, k = case.hidden_size, case.local_intermediate_size, case.num_tokens, case.top_k
    multiply = r"^aten::(matmul|mm|addmm|linear|bmm)\b.*"
    blocks = rf"\[{2 * i}, ({h // BLOCK}|{h // 2})\b|\[{h}, ({i // BLOCK}|{i // 2})\b"  # scales and packed codes of one expert
    table = rf"\[256\b|\[(16|512|{h * i}|{2 * h * i}|{h * i // 2})\]$"  # E2M1 values, pairs of them by byte, what is looked up there
    return (
        Rule(pattern=rf"{multiply}\[{h}, {2 * i}\]|^aten::add_ \[\d+, {2 * i}\] \[{2 * i}\]", phase="gemm1"),
        Rule(pattern=rf"{multiply}\[{i}, {h}\]|^aten::add_ \[\d+, {h}\] \[{h}\]", phase="gemm2"),
        Rule(pattern=rf"^aten::(index_add|zeros_like|mul \[\d+, {h}\] \[\d+, 1\])|\[{tokens}, {k}, 1\]", phase="finalize"),
        Rule(pattern=r"^aten::(argsort|searchsorted|floor_divide)\b", phase="route"),
        Rule(pattern=rf"{blocks}|{table}", phase="dequantize"),
        Rule(pattern=rf"^aten::index(_select)?\b.*\[{tokens}, {h}\]", phase="permute"),
        Rule(pattern=rf"^aten::\w+ (\[{tokens}, {k}\]|\[{tokens * k}\])", phase="route"),
        Rule(pattern=r"^aten::(sigmoid|clamp)", phase="activation"),
        Rule(pattern=rf"^aten::(mul|add|select|slice|to)_?\b.*\[\d+, {i}\]", phase="activation"),
    )


def _by_phase(keys: set[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for phase, name in sorted(keys):
        found[phase].append(name)
    return found


def _profile(row: Mapping[str, object]) -> Profile:
    names, kinds = row["names"], get_args(Kind)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names is not a list of texts")
    raw: list[list[list[int]]] = row["calls"]  # type: ignore[assignment]  # checked below
    if sum(len(call) for call in raw) > MOST_EVENTS:
        raise ValueError(f"it holds more than {MOST_EVENTS} events")
    calls = []
    for call in raw:
        if not all(type(number) is int and number >= 0 for event in call for number in event):
            raise ValueError("an event is not five whole numbers of 0 or more")
        calls.append(
            tuple(
                Event(name=names[name], start_ns=start, end_ns=start + length, stream=stream, kind=kinds[kind])
                for name, start, length, stream, kind in call
            )
        )
    if row["source"] not in get_args(Source) or row["launch"] not in get_args(Launch):
        raise ValueError(f"source {row['source']!r} or launch {row['launch']!r} is unknown")
    untraced = row["untraced_us"]
    if not isinstance(untraced, list) or not all(type(us) in (int, float) and 0 <= us < math.inf for us in untraced):
        raise ValueError("untraced_us is not a list of times")
    notes, routing = row["notes"], row["routing"]
    if not isinstance(notes, list):
        raise ValueError("notes is not a list")
    nobody = Realized(active_experts=0, empty_experts=0, local_pairs=0, load_max_over_mean=0.0, pairs_per_rank=(), sha256="")
    return Profile(
        case=Case(**row["case"]),  # type: ignore[arg-type]
        backend=str(row["backend"]),
        act_dtype=str(row["act_dtype"]),
        device=_like(Device(arch="", name="", torch="", memory_bytes=0), row["device"]),
        source=row["source"],  # type: ignore[arg-type]
        launch=row["launch"],  # type: ignore[arg-type]
        calls=tuple(calls),
        untraced_us=tuple(float(us) for us in untraced),
        routing=_like(nobody, routing) if routing is not None else None,
        notes=tuple(str(note) for note in notes),
    )


def _like(sample: _D, row: object) -> _D:
    """A dataclass of the sample's types; what a newer version added is left out."""
    if not isinstance(row, dict):
        raise ValueError(f"{type(sample).__name__} is not a JSON object")
    found: dict[str, object] = {}
    for name in row.keys() & {f.name for f in fields(sample)}:
        value, wanted = row[name], getattr(sample, name)
        value = tuple(value) if isinstance(wanted, tuple) and isinstance(value, list) else value
        fits = type(value) is type(wanted) or (isinstance(wanted, float) and type(value) is int)
        if not fits and not (value is None and name == "torch"):
            raise ValueError(f"{type(sample).__name__}.{name} is {str(value)[:80]!r}")
        found[name] = value
    return replace(sample, **found)  # type: ignore[arg-type]  # checked above
