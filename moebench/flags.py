"""Reasons to doubt a measured time, found in what was recorded beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from moebench.record import Record, Telemetry, Timing

# Measured on an H200 with nothing else on it: medians of fresh processes vary by 0.1 to 0.4 % at most points and 1.35 % at the worst,
# samples within a process by 0.3 to 1.8 %. What moves by more than 2 % was moved by something.
CANARY_DRIFT = 0.02
SAMPLE_DRIFT = 0.02
# There an unhindered row runs at 1950 to 1980 of 1980 MHz (98.5 %), the longest power-capped ones at 1830 to 1875 (92 to 95 %).
SLOW_CLOCK = 0.95
FOREIGN_BYTES = 1 << 30  # a driver's own share and a desktop stay below; a CUDA context with anything in it does not
FOREIGN_UTILIZATION = 0.05  # of a second before the first worker, in which nothing of ours runs
ROOF_SHARE = 1.02  # the roofs were measured as well, and are about as uncertain as a median
DISAGREEMENT, DISAGREEMENT_US = 0.03, 2.0  # events resolve 0.5 us, and gaps between launches are in one of the two times only
ROTATED_L2S, FLUSHED_L2S = 5, 4  # bytes in units of the L2: at 2 an H200's still held a part of what was read before
MIN_THIRD = 10  # samples, below which a third's median has no interval worth the name

# What slows a GPU down against its will. sw_power_cap is not here: it is active, at times, in rows that keep their clock.
SLOWDOWNS = ("hw_slowdown", "sw_thermal", "hw_thermal", "power_brake", "board_limit", "reliability")


@dataclass(frozen=True, kw_only=True)
class Flag:
    meaning: str
    remedy: str


FLAGS: Mapping[str, Flag] = {
    "throttled": Flag(
        meaning="The GPU ran slower than it can, or its protection was active.",
        remedy="Cool it, give it its power limit back or let it rest between rows, and measure again.",
    ),
    "contended": Flag(
        meaning="Something else used the GPU or its memory.",
        remedy="End the other process (nvidia-smi lists what it can see) and measure again.",
    ),
    "unstable": Flag(
        meaning="The samples do not agree on a median, or drift.",
        remedy="Give the row more time, and look at its samples in the order they were taken.",
    ),
    "host_bound": Flag(
        meaning="The GPU waited for the host, so the time is the host's.",
        remedy="Compare it with other host-bound rows only; a call that a CUDA graph can capture has no such wait.",
    ),
    "l2_warm": Flag(
        meaning="The L2 may have held weights although the row says cold.",
        remedy="Use more token sets or weight copies, or a larger flush.",
    ),
    "unchecked": Flag(
        meaning="The output was not compared with the reference.",
        remedy="Run the case with the check before the time is used.",
    ),
    "above_roof": Flag(
        meaning="The call was faster than the roofs allow.",
        remedy="Measure the roofs of this GPU again; if they stand, look for work that was not done or bytes that came from the L2.",
    ),
    "timing_disagree": Flag(
        meaning="Clock and profiler give different times for the same call.",
        remedy="Look at the kernels of the row with the profiler: gaps, a second stream, or work outside the timed region.",
    ),
    "ecc": Flag(
        meaning="The GPU's memory had errors while the row was timed.",
        remedy="Corrected ones: look at the trend. Uncorrected ones: take the GPU out of use, and do not trust the output.",
    ),
}


def raised(record: Record, *, foreign_utilization: float = 0.0) -> dict[str, str]:
    """Flag -> sentence with the numbers, in the order of FLAGS. The utilization is that of the GPU before the first worker."""
    found = {name: _TESTS[name](record) for name in FLAGS}
    if foreign_utilization > FOREIGN_UTILIZATION and not found["contended"] and record.timing is not None:
        found["contended"] = f"the GPU was busy {foreign_utilization:.0%} of the time before the first worker started"
    return {name: sentence for name, sentence in found.items() if sentence}


def doubts(record: Record) -> set[str]:
    """Flags that speak against a row as what this GPU takes for this call: not a clock that was lowered to keep the power limit, nor how
    well that left the median known. From some size on every backend runs into that limit, the sooner the faster it is, and a row
    without it would need another GPU. The clock moves in steps, so few samples know the median to 2 %; that is in an interval over
    samples or over rounds, which decides then."""
    wide = record.timing is not None and record.timing.is_wide
    return set(record.flags) - ({"unstable"} if wide else set()) - ({"throttled"} if at_power_limit(record) else set())


def at_power_limit(record: Record) -> bool:
    """Whether the clock was lowered for that and for nothing else."""
    seen = record.telemetry
    if seen is None or "throttled" not in record.flags or not seen.reasons.get("sw_power_cap"):
        return False
    return not any(share for name, share in seen.reasons.items() if name not in ("sw_power_cap", "gpu_idle", "user_clocks"))


def clocks_are_set(seen: Telemetry) -> bool:
    """By the machine's owner, who fixed them."""
    return seen.reasons.get("user_clocks", 0.0) > 0.5


def _throttled(record: Record) -> str:
    seen = record.telemetry
    if seen is None or record.timing is None:
        return ""
    slow_mhz, _, most_mhz = seen.sm_mhz
    # Clocks that the machine's owner has set are not throttled: the row is held to the best of its own.
    may_reach_mhz = most_mhz if clocks_are_set(seen) else max(seen.max_sm_mhz, most_mhz)
    idle = seen.reasons.get("gpu_idle", 0.0) == 1.0  # the row was too short to be seen running
    slow = not idle and slow_mhz < SLOW_CLOCK * may_reach_mhz  # the first of sm_mhz has a tenth of the samples below it
    active = [name for name in SLOWDOWNS if seen.reasons.get(name)]
    if slow and seen.reasons.get("sw_power_cap"):
        active.append("sw_power_cap")
    if not slow and not active:
        return ""
    causes = ", ".join(f"{name} active in {seen.reasons[name]:.0%} of {seen.samples} samples" for name in active)
    clock = f"SM clock {slow_mhz:.0f} to {most_mhz:.0f} MHz of {may_reach_mhz:.0f}"
    power = f" at {seen.power_w:.0f} of {seen.power_limit_w:.0f} W" if "sw_power_cap" in active else ""
    return f"{clock}; {causes or 'the driver gives no reason'}{power}"


def _contended(record: Record) -> str:
    if record.timing is None:
        return ""
    seen, canary = record.telemetry, record.canary
    if seen and seen.foreign_bytes > FOREIGN_BYTES:
        return f"{seen.foreign_bytes / 2**30:.1f} GiB of the GPU's memory were in use before the first worker started"
    if canary is None or min(canary.before_us, canary.after_us) <= 0:
        return ""
    drift = canary.after_us / canary.before_us - 1
    slow_mhz, _, most_mhz = seen.sm_mhz if seen else (0.0, 0.0, 0.0)
    explained = most_mhz / slow_mhz - 1 if slow_mhz else 0.0
    if abs(drift) <= CANARY_DRIFT + explained:
        return ""
    clock = f"the SM clock varied by {explained:.1%}" if slow_mhz else "the SM clock is not known"
    return f"the same copy took {canary.before_us:.1f} us before and {canary.after_us:.1f} us after ({drift:+.1%}); {clock}"


def _unstable(record: Record) -> str:
    timing = record.timing
    if timing is None or not timing.comparable or timing.stop_reason == "once" or not timing.median_us:
        return ""
    if timing.is_wide:
        cap = "their number" if timing.stop_reason == "max_samples" else "time"
        return f"{len(timing.samples_us)} samples, stopped by {cap}, know the median to {timing.half_width:.1%} only"
    third = len(timing.samples_us) // 3
    if third < MIN_THIRD:
        return ""
    first, last = timing.samples_us[:third], timing.samples_us[-third:]
    (first_low, first_high), (last_low, last_high) = _interval(timing, first), _interval(timing, last)
    if max(last_low - first_high, first_low - last_high) <= SAMPLE_DRIFT * timing.median_us:
        return ""
    change = median(last) / median(first) - 1
    return f"the samples drift: median {median(first):.1f} us in the first third and {median(last):.1f} us in the last ({change:+.1%})"


def _host_bound(record: Record) -> str:
    timing = record.timing
    if timing is None or not timing.host_bound:
        return ""
    host = f": enqueueing a call takes the host {timing.host_us:.1f} us" if timing.host_us is not None else ""
    return f"the GPU waited for the host within calls of {timing.median_us:.1f} us{host}"


def _l2_warm(record: Record) -> str:
    timing = record.timing
    if timing is None or timing.l2 != "cold" or (record.routing is not None and not record.routing.active_experts):
        return ""
    proof = timing.proof
    if proof is None:
        return "nothing was recorded that shows the L2 to be cold"
    if proof.bytes_between_uses >= ROTATED_L2S * proof.l2_bytes or proof.flush_bytes >= FLUSHED_L2S * proof.l2_bytes:
        return ""
    between, flush, l2 = (f"{count / 2**20:.0f} MiB" for count in (proof.bytes_between_uses, proof.flush_bytes, proof.l2_bytes))
    return f"{between} between two uses of the same bytes and a flush of {flush}, against an L2 of {l2}"


def _unchecked(record: Record) -> str:
    if record.timing is None or record.error is not None:
        return ""
    return "a time without a comparison of the output with the reference"


def _above_roof(record: Record) -> str:
    share, roof = record.roof_share, record.roofline
    if share is None or roof is None or share <= ROOF_SHARE:
        return ""
    return f"{record.median_us:.1f} us is {share:.2f} of what {roof.limiter} allows: at least {roof.floor_us:.1f} us by {roof.source}"


def _timing_disagree(record: Record) -> str:
    timing = record.timing
    if timing is None or timing.span_us is None:
        return ""
    clock_us = timing.median_us if timing.traced_us is None else timing.traced_us
    apart_us = abs(clock_us - timing.span_us)
    if apart_us <= max(DISAGREEMENT * clock_us, DISAGREEMENT_US):
        return ""
    return f"{clock_us:.1f} us by {timing.clock}, {timing.span_us:.1f} us by the profiler: {apart_us:.1f} us apart"


def _ecc(record: Record) -> str:
    seen = record.telemetry
    if seen is None or not (seen.ecc_corrected or seen.ecc_uncorrected):
        return ""
    return f"{seen.ecc_uncorrected} uncorrected and {seen.ecc_corrected} corrected memory errors in {seen.window_s:.1f} s"


def _interval(timing: Timing, samples_us: tuple[float, ...]) -> tuple[float, float]:
    return replace(timing, samples_us=samples_us).interval_us


_TESTS: Mapping[str, Callable[[Record], str]] = {
    "throttled": _throttled,
    "contended": _contended,
    "unstable": _unstable,
    "host_bound": _host_bound,
    "l2_warm": _l2_warm,
    "unchecked": _unchecked,
    "above_roof": _above_roof,
    "timing_disagree": _timing_disagree,
    "ecc": _ecc,
}
