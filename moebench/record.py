"""What happened to one backend on one case, as one JSON line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from math import dist, inf
from typing import Literal, TypeVar, get_args

from moebench.case import Case
from moebench.device import Device
from moebench.once import once
from moebench.realized import Realized

# Schema history; a newer major is not readable by older code.
# 1.0  case, backend, act_dtype, arch, device, status, reason, error, timing, routing, prepare_s, facts, kernels, time, run_id
# 1.1  scope, round, contract, roofline, telemetry, canary, flags, phases_s, launches_compared; timing: regions of several calls, why it
#      stopped, proof of a cold L2, host time, cross-check, the window it was taken in; statuses oom to interrupted; a checksum a line
# 1.2  canary: matmul_us
SCHEMA = "1.2"

MEDIAN_HALF_WIDTH = 0.02  # samples of a process vary by 0.3 to 1.8 % on an H200 with nothing else on it

Status = Literal[
    "ok",
    "skipped",
    "wrong",
    "nonfinite",
    "unwritten",
    "input_changed",
    "nondeterministic",
    "too_fast",  # a time below what physics allows: something was not computed, or not timed
    "oom",
    "compile_error",
    "compile_timeout",
    "hang",
    "crash",
    "cuda_error",
    "interrupted",
    "failed",
]
STATUSES: tuple[Status, ...] = get_args(Status)
ClockName = Literal["cuda_graph", "cuda_events", "wall", "simulated"]
L2State = Literal["cold", "hot"]
L2Method = Literal["rotation", "read_flush", "replay", "none"]  # what made the L2 cold or hot; none: no GPU cache is involved
StopReason = Literal["interval", "max_samples", "max_s", "once", ""]
Scope = Literal["experts", "layer"]  # from ids and weights to the weighted sum; or from router logits
SCOPES: tuple[Scope, ...] = get_args(Scope)
T = TypeVar("T")


class RecordError(Exception):
    """A journal or manifest that cannot be read; the message names file, line and reason."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """Distance of an output from the reference of its activation format."""

    rel_l2: float  # ||out - ref|| / ||ref||
    worst: float  # max |out - ref| / max(|ref|, rms of its token, rms of its column)
    worst_token: int
    worst_column: int
    max_abs: float
    rel_l2_tolerance: float
    worst_tolerance: float

    @property
    def ok(self) -> bool:
        return self.rel_l2 <= self.rel_l2_tolerance and self.worst <= self.worst_tolerance  # False for NaN


@dataclass(frozen=True, kw_only=True)
class L2Proof:
    """Why the weights came from memory: what was touched between two uses of the same bytes, at least."""

    token_sets: int  # the same work on other experts
    weight_copies: int
    bytes_between_uses: int
    l2_bytes: int
    flush_bytes: int = 0  # read before each call where rotation does not suffice


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Every sample, and how it was taken; medians and quartiles are computed when asked."""

    samples_us: tuple[float, ...]  # time of one region over the calls in it, in the order they were taken
    clock: ClockName
    l2: L2State | None  # None where no GPU cache is involved
    l2_method: str  # what made it so, as a sentence
    warmup_calls: int
    comparable: bool = True  # False: the number does not describe the kernel (an interpreter, say)
    note: str = ""
    calls_per_region: int = 1
    stop_reason: StopReason = ""
    warmup_s: float = 0.0
    settled: bool = True  # the last two batches of the warm-up agreed, and the SM clock
    proof: L2Proof | None = None
    host_us: float | None = None  # what the host needs to enqueue one eager call: the time of a server without CUDA graphs, if longer
    host_bound: bool = False  # the GPU waited for the host within the timed region
    busy_us: float | None = None  # sum of kernel times of one call, by the profiler
    span_us: float | None = None  # first kernel's start to last kernel's end, per call, by the profiler
    traced_us: float | None = None  # the clock's time of the same region: profiled calls are slower, so it is not the median
    window_s: tuple[float, float] | None = None  # when it was taken, on this machine's monotonic clock
    stages_us: dict[str, float] = field(default_factory=dict)  # scope layer: route, prepare, experts, finalize

    @once
    def _ordered_us(self) -> list[float]:
        """Sorted once for median, quartiles and interval: 6 us for 60 samples, of 30 that a row of a table takes."""
        return sorted(self.samples_us)

    @property
    def least_us(self) -> float:
        return self._ordered_us[0]

    @once  # reports and the gate ask for it again and again
    def median_us(self) -> float:
        ordered, middle = self._ordered_us, len(self.samples_us) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def quartiles_us(self) -> tuple[float, float]:
        """As statistics.quantiles(method="inclusive") has them, without its sorting once more and its median: 7 us of a row's."""
        return _quartile(self._ordered_us, 1), _quartile(self._ordered_us, 3)

    @property
    def effective_samples(self) -> float:
        """Independent samples that say as much as these: neighbours that resemble each other say less."""
        samples, n = self.samples_us, len(self.samples_us)
        if n < 10:
            return float(n)
        mean = sum(samples) / n
        total = _square(dist(samples, (mean,) * n))  # a loop in C: 450 samples take 11 us, and 100 in Python
        if not _square(1e-9 * mean) * n < total < inf:  # all the same, or not times at all
            return float(n)
        # The product of two neighbours is half of what the square of the step between them lacks to the sum of their squares.
        ends = _square(samples[0] - mean) + _square(samples[-1] - mean)
        lag1 = 1 - (_square(dist(samples[1:], samples[:-1])) + ends) / (2 * total)
        return n * (1 - max(lag1, 0.0)) / (1 + max(lag1, 0.0))

    @property
    def half_width(self) -> float:
        """Of the interval of the median, as a share of it."""
        low, high = self.interval_us
        return (high - low) / 2 / self.median_us

    @property
    def is_wide(self) -> bool:
        """Whether sampling ended by number or by time before the median was known well. Its interval says how well."""
        return self.stop_reason in ("max_samples", "max_s") and self.half_width > MEDIAN_HALF_WIDTH

    @once  # that of the fastest is compared with all others'
    def interval_us(self) -> tuple[float, float]:
        """95 % interval of the median from order statistics, wider where neighbouring samples resemble each other."""
        ordered = self._ordered_us
        n = len(ordered)
        # 1.96 standard deviations of a binomial(n, 1/2) count, as if only the effective samples had been drawn
        half = 0.98 * n**0.5 * (n / max(self.effective_samples, 1.0)) ** 0.5
        low, high = int(n / 2 - half), int(n / 2 + half)
        return ordered[max(low, 0)], ordered[min(high, n - 1)]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a time means. Times under two different contracts are never compared."""

    scope: Scope
    inside: str  # what the call includes
    clock: ClockName
    l2: L2State | None
    l2_method: L2Method
    warmup: str  # the rule
    rank_aggregate: str  # how the ranks of an expert-parallel group become one number
    reference: str  # what decides that the output is right

    @once  # records read from one journal share their contracts
    def id(self) -> str:
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a case needs at least, and the roofs it is measured by."""

    weight_bytes: int  # codes, scales and biases of the experts that get tokens, once
    activation_bytes: int  # hidden states in, output out, ids and weights
    flop: float  # useful: unpadded sizes, pairs of this rank
    padded_flop: float | None  # what the backend's padding makes of it, where it says so
    floor_us: float
    limiter: Literal["memory", "compute"]
    bandwidth_bytes_s: float
    flop_s: float
    source: str  # where the roofs come from


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """What the GPU's own sensors said while a row was timed; 0.0 is what the driver does not tell."""

    samples: int
    sm_mhz: tuple[float, float, float]  # at most a tenth of the samples are below the first; median; most
    max_sm_mhz: float  # what it may reach
    mem_mhz: float
    power_w: float  # mean over the window
    power_limit_w: float
    temperature_c: float  # highest
    reasons: dict[str, float]  # clock event reason -> share of the samples in which it was active
    energy_j: float | None  # by the counter, over the window
    window_s: float
    ecc_corrected: int  # new ones in the window
    ecc_uncorrected: int
    foreign_bytes: int  # device memory in use before the first worker started


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A fixed copy, timed before and after a row: where it changed, something else did. And a matmul, before."""

    before_us: float
    after_us: float
    matmul_us: float = 0.0  # 0: not timed


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A GPU kernel that one call launched."""

    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Record:
    case: Case
    backend: str
    act_dtype: str
    arch: str
    device: str  # its name; the manifest has the rest
    status: Status
    reason: str = ""
    error: Error | None = None
    timing: Timing | None = None
    routing: Realized | None = None
    prepare_s: float | None = None
    facts: dict[str, str | int | float] = field(default_factory=dict)  # what the backend says of itself: padding, tactics, tuning
    kernels: tuple[Kernel, ...] = ()  # what one call really launched, in order of first launch; empty on a CPU
    launches_compared: int = 0  # that gave the same bits, or were within tolerance where the backend says that its bits differ
    scope: Scope = "experts"
    round: int = 0  # of the plan's repetitions, each in fresh processes
    contract: Contract | None = None  # of the timing
    roofline: Roofline | None = None
    telemetry: Telemetry | None = None
    canary: Canary | None = None
    flags: dict[str, str] = field(default_factory=dict)  # reasons to doubt the number: flag -> sentence
    phases_s: dict[str, float] = field(default_factory=dict)  # where the worker's time went
    run_id: str = ""
    time: str = ""  # UTC, when the record was made
    schema: str = SCHEMA

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case.key, self.backend, self.arch

    @property
    def median_us(self) -> float | None:
        return self.timing.median_us if self.timing else None

    @property
    def usable(self) -> bool:
        """Whether its time says how fast the kernel is."""
        timing = self.timing
        return self.status == "ok" and timing is not None and timing.comparable and timing.least_us > 0

    @property
    def contract_id(self) -> str:
        """What the time means, as a name; empty where there is no time."""
        if self.timing is None:
            return ""
        return self.contract.id if self.contract else f"1.0-{self.timing.clock}-{self.timing.l2}"  # schema 1.0 had none

    @property
    def energy_per_call_j(self) -> float | None:
        return energy_per_call_j(self.telemetry, self.timing) if self.telemetry and self.timing else None

    @property
    def roof_share(self) -> float | None:
        """Of the time that the roofs allow at least, over the measured; 1.0 is perfect."""
        if self.timing is None or not self.timing.comparable or self.roofline is None:
            return None
        if not self.roofline.floor_us or not self.timing.median_us:
            return None
        return self.roofline.floor_us / self.timing.median_us


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """run.json: what was asked for and on what it ran."""

    run_id: str
    started: str
    command: tuple[str, ...]
    device: Device
    plan: dict[str, object]  # as plan.Plan.to_dict() wrote it
    plan_hash: str
    versions: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA


def _square(number: float) -> float:
    """Infinite where number ** 2 raises OverflowError."""
    return number * number


def _quartile(ordered: list[float], number: int) -> float:
    """Between the two samples around it, by how far it is from each."""
    below, quarters = divmod(number * (len(ordered) - 1), 4)
    above = min(below + 1, len(ordered) - 1)
    return (ordered[below] * (4 - quarters) + ordered[above] * quarters) / 4


def energy_per_call_j(telemetry: Telemetry, timing: Timing) -> float | None:
    """Joules of one timed call and of what keeps the L2 cold between two: the counter over the window, over the calls in it."""
    if telemetry.energy_j is None or timing.window_s is None:
        return None
    start_s, end_s = timing.window_s
    calls = len(timing.samples_us) * timing.calls_per_region
    if not calls or end_s <= start_s:
        return None
    return telemetry.energy_j / (calls * telemetry.window_s / (end_s - start_s))  # the last poll may lie before the window's end


def to_json(item: Record | Manifest) -> str:
    return json.dumps(asdict(item), allow_nan=False, separators=(",", ":"))


def record_from_dict(row: Mapping[str, object]) -> Record:
    """Raises TypeError, KeyError or ValueError for what is not a record of this major schema. What a newer minor added is left out."""
    newer = row["schema"] != SCHEMA and _minor(str(row["schema"])) > _minor(SCHEMA)
    values = _known(row) if newer else dict(row)
    values["case"] = Case(**values["case"])  # type: ignore[arg-type]
    if values.get("kernels") is not None:
        values["kernels"] = tuple(_part(Kernel, kernel) for kernel in values["kernels"])  # type: ignore[attr-defined]
    for name, kind in _PARTS.items():
        value = values.get(name)
        if isinstance(value, dict):  # what is of another kind altogether stays as it is
            if isinstance(value.get("proof"), dict):  # of a timing
                value = {**value, "proof": _part(L2Proof, value["proof"])}
            values[name] = _part(kind, value)
    if values["status"] not in STATUSES:
        raise ValueError(f"status {values['status']!r} is not one of {', '.join(STATUSES)}")
    return Record(**values)  # type: ignore[arg-type]  # misfit looks at them


_LISTS: dict[type, tuple[str, ...]] = {Timing: ("samples_us", "window_s"), Realized: ("pairs_per_rank",), Telemetry: ("sm_mhz", "window_s")}
_PARTS: dict[str, type] = {
    "error": Error,
    "timing": Timing,
    "routing": Realized,
    "contract": Contract,
    "roofline": Roofline,
    "telemetry": Telemetry,
    "canary": Canary,
}


def _part(kind: type[T], value: dict[str, object]) -> T:
    lists: dict[str, object] = {}
    for name in _LISTS.get(kind, ()):
        content = value.get(name)
        if isinstance(content, list):
            lists[name] = tuple(content)
    return kind(**(value | lists))


def _known(row: Mapping[str, object]) -> dict[str, object]:
    kept = {name: value for name, value in row.items() if name in _names(Record)}
    for name, kind in _PARTS.items():
        value = kept.get(name)
        if isinstance(value, dict):
            kept[name] = {k: v for k, v in value.items() if k in _names(kind)}
    return kept


@cache
def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _minor(schema: str) -> int:
    return int(schema.split(".")[1])
