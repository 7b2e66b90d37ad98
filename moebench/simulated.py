"""A clock that runs on a script, so that everything above the clock can be tried without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import exp
from random import Random
from typing import TYPE_CHECKING

from moebench.case import Case, case
from moebench.record import Canary, ClockName, Error, L2Method, L2Proof, L2State, Record, Telemetry
from moebench.telemetry import PERIOD_S, Sample, summarize
from moebench.timing import StopRule, measure

if TYPE_CHECKING:
    import torch

CASE: Case = case("gpt-oss-20b", 64)  # that every simulated record is of
CANARY_US = 120.0  # at full clock
L2_BYTES = 60 << 20


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What a simulated GPU does to a call that takes `call_us` at `sm_mhz`."""

    call_us: float = 100.0
    noise: float = 0.003  # standard deviation of a region's time, relative; an H200 shows 0.3 to 0.8 %
    process_noise: float = 0.0  # of a process's own speed, relative; an H200 shows 0.1 to 0.4 %
    sm_mhz: float = 1980.0
    throttle_after_s: float | None = None  # from then on the SM clock is throttled_mhz, and the call as much slower
    throttled_mhz: float = 1500.0
    warm_mhz: float | None = None  # SM clock of each turn of a round but the first, for which the GPU had time to cool
    drift_per_s: float = 0.0  # relative, of the call alone: the clock stays
    outlier_share: float = 0.0  # of regions that take twice as long
    launch_us: float = 0.0  # what every call pays before and after its work
    event_us: float = 0.0  # what the clock adds to each region


class SimulatedStopwatch:
    """Samples of a scenario; its seconds pass as the simulated regions do."""

    clock: ClockName = "simulated"
    l2: L2State | None = "cold"
    l2_method: L2Method = "rotation"
    note = ""
    host_bound = False

    def __init__(self, scenario: Scenario, *, seed: int = 0, region_us: float = 1000.0, turn: int = 0) -> None:
        """seed: of the process. turn: its place in the round."""
        self.scenario = scenario
        self.calls_per_region = max(1, round(region_us / max(scenario.call_us + scenario.launch_us, 1e-3)))
        self._random = Random(seed)
        self._speed = max(self._random.gauss(1, scenario.process_noise), 0.5)
        self._turn = turn
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def sm_mhz(self) -> float:
        return self.sm_mhz_at(self._now_s)

    def sm_mhz_at(self, seconds: float) -> float:
        what = self.scenario
        if what.throttle_after_s is not None and seconds >= what.throttle_after_s:
            return what.throttled_mhz
        return what.warm_mhz if what.warm_mhz is not None and self._turn else what.sm_mhz

    def sample(self, count: int) -> list[float]:
        return [self._region_us() / self.calls_per_region for _ in range(count)]

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """There are none: nothing is computed."""
        return iter(())

    def _region_us(self) -> float:
        what = self.scenario
        slower = self._speed * what.sm_mhz / self.sm_mhz() * exp(what.drift_per_s * self._now_s)
        if self._random.random() < what.outlier_share:
            slower *= 2
        call_us = what.call_us * slower * max(self._random.gauss(1, what.noise), 0.5) + what.launch_us
        took_us = call_us * self.calls_per_region + what.event_us
        self._now_s += took_us / 1e6
        return took_us


def measured(watch: SimulatedStopwatch, rule: StopRule, *, backend: str = "simulated", number: int = 0) -> Record:
    """What a worker and its supervisor would record of it: time, canary and the sensors' view. number: of the round."""
    before_us = _canary_us(watch)
    timing = measure(watch, rule)
    after_us = _canary_us(watch)
    proof = L2Proof(token_sets=1, weight_copies=6, bytes_between_uses=5 * L2_BYTES, l2_bytes=L2_BYTES)
    return Record(
        case=CASE,
        backend=backend,
        act_dtype="bf16",
        arch="sm90",
        device="simulated GPU",
        status="ok",
        error=Error(rel_l2=0.0, worst=0.0, worst_token=0, worst_column=0, max_abs=0.0, rel_l2_tolerance=1.0, worst_tolerance=1.0),
        timing=replace(timing, proof=proof),
        telemetry=_sensed(watch, timing.window_s or (0.0, watch.now())),
        canary=Canary(before_us=before_us, after_us=after_us),
        round=number,
    )


def _canary_us(watch: SimulatedStopwatch) -> float:
    return CANARY_US * watch.scenario.sm_mhz / watch.sm_mhz()


def _sensed(watch: SimulatedStopwatch, window_s: tuple[float, float]) -> Telemetry | None:
    what = watch.scenario
    start_s, end_s = window_s
    polls = int((end_s - start_s) / PERIOD_S) + 2
    times = [start_s + PERIOD_S * poll for poll in range(polls)]
    reasons = [("hw_thermal",) if watch.sm_mhz_at(t) == what.throttled_mhz else () for t in times]
    samples = [
        Sample(t=t, sm_mhz=watch.sm_mhz_at(t), max_sm_mhz=what.sm_mhz, reasons=reason) for t, reason in zip(times, reasons, strict=True)
    ]
    return summarize(samples, start_s, end_s)
