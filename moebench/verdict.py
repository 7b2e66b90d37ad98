"""Two runs, cell by cell: what got slower or broke, what did not, and what nobody can say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, log
from statistics import fmean, median
from typing import Literal

import numpy as np

from moebench.case import Case
from moebench.compare import Key, Side, sides
from moebench.flags import FLAGS, at_power_limit, clocks_are_set, doubts
from moebench.gate import Effects, Findings, Floats, Outcome, Rule, find, floors, of_rounds, rounds_needed
from moebench.journal import Run, merge
from moebench.record import Canary, Record, Scope, Status

Answer = Literal["pass", "fail", "none"]

ERROR_FACTOR = 2.0  # of the relative L2 error: more is another class of numerics; a tile shape or a summation order changes it by less
ERROR_SHARE = 0.05  # of its tolerance, below which an error may grow
CLOCK_DRIFT = 0.015  # of a clock; the SM clock of an H200 that nothing hinders is 1950 to 1980 MHz, 1.5 % apart
OTHER_CLOCK = 0.05  # of the SM clock: beyond, another state of the machine; up to it, what the clock may explain is taken into account
POWER_DRIFT = 0.01  # of the power limit
CONTROL_DRIFT = 0.01  # of a control, which no change can touch
CONTROLS: dict[str, Callable[[Canary], float]] = {
    "copy": lambda canary: (max(canary.before_us, 0.0) * max(canary.after_us, 0.0)) ** 0.5,
    "matmul": lambda canary: canary.matmul_us,
}
LEFT = 0.75  # of a cell's rounds that must be without flags: those that are left out would else choose the result
UNSTORED = 0.10  # what a stored baseline without a band of its own is judged at: jobs differ by 4 to 6 % although nothing changed
LEAST_JOBS = 5  # on which a band is calibrated
TIMES = ("_s", "_us", "_ms", "seconds")  # ends of names of facts that never repeat
ORDER: tuple[Outcome, ...] = ("broken", "slower", "missing", "unclear", "faster", "same")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a gate is asked for."""

    rule: Rule = field(default_factory=Rule)
    strict: bool = False  # another kernel, tactic or workspace fails as well
    allow_missing: bool = False
    allowed_flags: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What is known of a base that was not measured beside the candidate."""

    name: str
    trusted: bool = False
    jobs: Mapping[Key, tuple[float, ...]] | None = None  # logarithms of each job's median us; the band comes from their spread

    @property
    def calibrated(self) -> bool:
        """Whether it may fail a change."""
        return self.trusted and any(len(centers) >= LEAST_JOBS for centers in (self.jobs or {}).values())

    def band(self, key: Key) -> tuple[float, ...]:
        found = (self.jobs or {}).get(key, ())
        return found if len(found) >= LEAST_JOBS else ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one backend on one case."""

    case: Case
    backend: str
    scope: Scope
    outcome: Outcome
    reason: str = ""  # a sentence, where the numbers do not say it all
    base_us: float | None = None
    candidate_us: float | None = None
    ratio: float | None = None  # candidate over base
    low: float | None = None  # 95 % interval of the ratio
    high: float | None = None
    sees: float | None = None  # the slowdown that is found with 90 %, a share; None where nothing is decided
    threshold: float | None = None  # its own, a share
    rounds: int = 0  # pairs that count
    blind: bool = False  # a slowdown of the rule's threshold may well be missed
    needs: int | None = None  # rounds with which it would see that
    clears: bool = False  # a slowdown of its threshold is ruled out, or there is nothing to rule out
    changes: tuple[str, ...] = ()  # what ran, where that is not the same
    flags: tuple[str, ...] = ()

    @property
    def effect(self) -> float:
        return abs(log(self.ratio)) if self.ratio else 0.0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    verdicts: tuple[Verdict, ...]  # in the order of ORDER, the largest effect first
    options: Options
    reasons: tuple[str, ...] = ()  # why there is no verdict, as sentences
    notes: tuple[str, ...] = ()
    may_fail: bool = True  # False: a stored baseline, which can only ask for both sides to be measured

    @property
    def answer(self) -> Answer:
        bad = any(verdict.outcome in ("slower", "broken") for verdict in self.verdicts)
        if bad and self.may_fail:
            return "fail"
        return "none" if bad or self.reasons or any(self.blocks(verdict) for verdict in self.verdicts) else "pass"

    def blocks(self, verdict: Verdict) -> bool:
        """Whether this cell alone keeps the gate from being green."""
        if verdict.outcome == "missing":
            return not self.options.allow_missing
        return verdict.outcome in ("slower", "broken") or not verdict.clears

    def count(self, outcome: Outcome) -> int:
        return sum(verdict.outcome == outcome for verdict in self.verdicts)


def judge(
    base: Run, candidate: Run, options: Options | None = None, *, control: Run | None = None, stored: Stored | None = None
) -> Judgement:
    """control: the base once more, measured in turns with both; how far it is from itself is noise."""
    options = options or Options()
    if stored is not None and not stored.calibrated:
        options = replace(options, rule=replace(options.rule, threshold=max(options.rule.threshold, UNSTORED)))
    records = _finished(base), _finished(candidate)
    reasons = _unfit(base, candidate, records)
    old, new = sides(records[0]), sides(records[1])
    again = sides(_finished(control)) if control else {}
    exact: list[Verdict] = []
    pairs: list[_Pair] = []
    nothing: Side[Record] = Side()
    for key in dict.fromkeys([*old, *new]):
        verdict, pair = _match(key, old.get(key, nothing), new.get(key, nothing), again.get(key, nothing), options)
        exact += [verdict] if verdict else []
        pairs += [pair] if pair else []
    reasons += _restless(pairs, options.rule)
    timed = _timed(pairs, options, stored, "; ".join(reasons))
    if not any(verdict.rounds for verdict in timed) and not any(verdict.outcome == "broken" for verdict in exact):
        reasons.append(_nothing(pairs, exact, options))
    verdicts = sorted([*exact, *timed], key=lambda verdict: (ORDER.index(verdict.outcome), -verdict.effect))
    return Judgement(
        verdicts=tuple(verdicts),
        options=options,
        reasons=tuple(reasons),
        notes=tuple(_notes(records, stored, pairs)),
        may_fail=stored is None or stored.calibrated,
    )


def foresee(run: Run, rule: Rule | None = None) -> list[Verdict]:
    """What a gate with this run as its base could see, from how far its own rounds are apart: nothing is decided, all is unclear."""
    pairs = []
    for key, side in sides(_finished(run)).items():
        for rows in side.timed.values():
            by_round = _by_round(rows)
            pairs.append(_Pair(key=key, base=by_round, candidate=by_round, control={}, changes=(), allowed_flags=frozenset(FLAGS)))
    if not pairs:
        return []
    logs = np.full((len(pairs), max(len(pair.rounds) for pair in pairs)), np.nan)
    for row, pair in enumerate(pairs):
        logs[row, : len(pair.rounds)] = [log(record.timing.median_us) for record in pair.base.values() if record.timing]
    # A difference of two such processes varies by the root of two more.
    effects = of_rounds(2**0.5 * (logs - np.nanmean(logs, axis=1, keepdims=True)))
    floor = floors(np.array([pair.base_us for pair in pairs]))
    options = Options(rule=rule or Rule())
    found = find(effects, floor, options.rule)
    family = int(found.decided.sum())
    verdicts = [_verdict(pair, number, effects, found, float(floor[number]), family, options, "") for number, pair in enumerate(pairs)]
    return [replace(told, outcome="unclear", ratio=None, low=None, high=None, clears=False, reason="one run alone") for told in verdicts]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The rows of a cell under one contract on one device, round by round."""

    key: Key
    base: dict[int, Record]
    candidate: dict[int, Record]
    control: dict[int, Record]
    changes: tuple[str, ...]
    allowed_flags: frozenset[str]

    @cached_property
    def rounds(self) -> list[int]:
        return sorted(self.base.keys() & self.candidate.keys())

    @cached_property
    def usable(self) -> list[int]:
        """Rounds with neither side in doubt."""
        pairs = [(number, self.base[number], self.candidate[number]) for number in self.rounds]
        return [number for number, a, b in pairs if not (a.flags or b.flags) or not (self._doubts(a) or self._doubts(b))]

    @cached_property
    def base_us(self) -> float:
        return _center_us(self.base)

    @cached_property
    def candidate_us(self) -> float:
        return _center_us(self.candidate)

    @cached_property
    def clocks(self) -> tuple[float, float]:
        """Medians of the rounds that count, in MHz; 0 where nothing is known, or where the power limit sets the clock: then what a call
        draws does, and the clock is a part of what it takes."""
        sides = ([side[number] for number in self.usable] for side in (self.base, self.candidate))
        found = []
        for rows in sides:
            if 2 * sum([bool(row.flags) and at_power_limit(row) for row in rows]) >= len(rows) > 0:
                return 0.0, 0.0
            found.append(_median([row.telemetry.sm_mhz[1] for row in rows if row.telemetry]))
        return found[0], found[1]

    @cached_property
    def clock_shift(self) -> float:
        """By how much the candidate's log ratio could be larger had it not had the faster clock; negative: the base had it."""
        base, candidate = self.clocks
        if not base or not candidate or _apart(base, candidate) <= CLOCK_DRIFT:
            return 0.0
        return log(candidate / base)

    @property
    def clock(self) -> str:
        """The clocks as a sentence, where they differ."""
        if not self.clock_shift:
            return ""
        return f"the SM clock was {self.clocks[0]:.0f} MHz for the base and {self.clocks[1]:.0f} MHz for the candidate"

    @property
    def is_of_another_clock_state(self) -> bool:
        """Whether the clocks are too far apart to be made up for, or differ and somebody fixed those of one side only."""
        if not self.clock_shift:
            return False
        sides = ([seen for number in self.usable if (seen := side[number].telemetry)] for side in (self.base, self.candidate))
        fixed = [2 * sum(map(clocks_are_set, seen)) > len(seen) for seen in sides]
        return abs(self.clock_shift) > OTHER_CLOCK or fixed[0] != fixed[1]

    @property
    def flags(self) -> tuple[str, ...]:
        rows = [side[number] for number in self.rounds for side in (self.base, self.candidate)]
        found = {name for row in rows if row.flags for name in self._doubts(row)}
        return tuple([name for name in FLAGS if name in found]) if found else ()

    def _doubts(self, row: Record) -> set[str]:
        return doubts(row) - self.allowed_flags


def _match(key: Key, old: Side[Record], new: Side[Record], again: Side[Record], options: Options) -> tuple[Verdict | None, _Pair | None]:
    """What is certain without statistics, or the rows for them, or neither: nothing was measured on either side."""
    case, backend, scope = key
    worse = _worse(old, new)
    if worse:
        return Verdict(case=case, backend=backend, scope=scope, outcome="broken", reason=worse), None
    if not old.timed and not new.timed:
        if old.status is None or new.status is None:
            where = "base" if old.status is None else "candidate"
            status = new.status if old.status is None else old.status
            skipped = status == "skipped"
            verdict = Verdict(
                case=case, backend=backend, scope=scope, outcome="missing", reason=f"not in the {where} run; {status} in the other"
            )
            return (None if skipped else verdict), None
        return None, None
    if not old.timed or not new.timed:
        where, side = ("candidate", new) if old.timed else ("base", old)
        return Verdict(case=case, backend=backend, scope=scope, outcome="missing", reason=f"no time in the {where} run: {_why(side)}"), None
    common = [meaning for meaning in old.timed if meaning in new.timed]
    if len(common) != 1 or len(old.timed) != 1 or len(new.timed) != 1:
        reason = "the times mean different things: " + _meanings(old, new)
        return Verdict(case=case, backend=backend, scope=scope, outcome="unclear", reason=reason), None
    rows = [_by_round(side.timed.get(common[0], [])) for side in (old, new, again)]
    changes = tuple(_changes(rows[0].values(), rows[1].values()))
    broken = _numerics(rows[0].values(), rows[1].values()) or (options.strict and "; ".join(changes)) or ""
    if broken:
        return Verdict(
            case=case,
            backend=backend,
            scope=scope,
            outcome="broken",
            reason=broken,
            base_us=_center_us(rows[0]),
            candidate_us=_center_us(rows[1]),
            changes=changes,
        ), None
    return None, _Pair(key=key, base=rows[0], candidate=rows[1], control=rows[2], changes=changes, allowed_flags=options.allowed_flags)


def _timed(pairs: Sequence[_Pair], options: Options, stored: Stored | None, unfit: str) -> list[Verdict]:
    """The verdicts that need statistics."""
    if not pairs:
        return []
    differences = np.full((len(pairs), _most_rounds(pairs)), np.nan)
    centers = np.array([pair.base_us for pair in pairs])
    for row, pair in enumerate(pairs):
        usable = pair.usable
        differences[row, : len(usable)] = [_log_ratio(pair.base[number], pair.candidate[number]) for number in usable]
    rule = options.rule
    floor = floors(centers, _controls(pairs))
    effects = of_rounds(differences)
    if stored is not None and stored.calibrated:
        effects = _against_jobs(pairs, stored)
    found = _whatever_the_clock(effects, np.array([pair.clock_shift for pair in pairs]), floor, rule)
    family = int(found.decided.sum())
    return [_verdict(pair, number, effects, found, float(floor[number]), family, options, unfit) for number, pair in enumerate(pairs)]


def _whatever_the_clock(effects: Effects, shifts: Floats, floor: Floats, rule: Rule) -> Findings:
    """Only what is true of the times as they are and of those that one SM clock for both sides would give; a time changes by no more
    than the clock."""
    found = find(effects, floor, rule)
    if not shifts.any():
        return found
    up, down = (find(_shifted(effects, limit(shifts, 0.0)), floor, rule) for limit in (np.maximum, np.minimum))
    return replace(
        found,
        slower=down.slower,
        faster=up.faster,
        clears=up.clears,
        gains_little=down.gains_little,
        low=down.low,
        high=up.high,
        sees=found.sees + np.abs(shifts),
    )


def _shifted(effects: Effects, by: Floats) -> Effects:
    differences = None if effects.differences is None else effects.differences + by[:, None]
    return replace(effects, estimate=effects.estimate + by, differences=differences)


def _controls(pairs: Sequence[_Pair]) -> Floats:
    """Log ratios [cells, rounds] of the base against itself; NaN where it was not measured again."""
    found = np.full((len(pairs), _most_rounds(pairs)), np.nan)
    for row, pair in enumerate(pairs):
        repeated = [number for number in pair.rounds if number in pair.control]
        found[row, : len(repeated)] = [_log_ratio(pair.base[number], pair.control[number]) for number in repeated]
    return found


def _most_rounds(pairs: Sequence[_Pair]) -> int:
    return max(1, *(len(pair.rounds) for pair in pairs))


def _restless(pairs: Sequence[_Pair], rule: Rule) -> list[str]:
    """Whether the base differs from itself, as a sentence."""
    if not pairs:
        return []
    control = of_rounds(_controls(pairs))
    found = find(control, 0.0, rule)
    moved = found.slower | found.faster
    if not moved.any():
        return []
    most = int(np.argmax(np.where(moved, np.abs(control.estimate), 0)))
    where = f"{pairs[most].key[0].label} {pairs[most].key[1]}"
    return [f"the environment changed: the base differs from itself by {exp(control.estimate[most]) - 1:+.1%} in {where}"]


def _verdict(
    pair: _Pair, number: int, effects: Effects, found: Findings, floor: float, family: int, options: Options, unfit: str
) -> Verdict:
    case, backend, scope = pair.key
    usable, rule = len(pair.usable), options.rule
    reason = unfit or _too_little(pair, rule) or (pair.clock if pair.is_of_another_clock_state else "")
    decided = bool(found.decided[number]) and not reason
    outcome: Outcome = "unclear"
    if decided and found.slower[number]:
        outcome = "slower"
    elif decided and found.faster[number]:
        outcome = "faster"
    elif decided and found.same[number]:
        outcome = "same"
    clears = decided and bool(found.clears[number])
    sees = float(found.sees[number])
    blind = not decided or sees > rule.log_threshold
    needs = None
    if blind and decided and effects.differences is not None:
        needs = rounds_needed(float(effects.error[number]), usable, floor, family, rule)
    if not decided and not reason:
        known = bool(np.isfinite(effects.estimate[number])) or effects.differences is not None
        reason = "too few of its times are numbers" if known else f"the baseline has fewer than {LEAST_JOBS} jobs of it"
    if outcome == "unclear" and decided:
        reason = "not slower; how much faster cannot be said" if clears else _between(found, number, rule)
        reason += f"; {pair.clock}" if pair.clock else ""
    known = bool(np.isfinite(effects.estimate[number]))
    bounded = known and bool(np.isfinite(found.low[number]))
    return Verdict(
        case=case,
        backend=backend,
        scope=scope,
        outcome=outcome,
        reason=reason,
        base_us=pair.base_us,
        candidate_us=pair.candidate_us,
        ratio=exp(effects.estimate[number]) if known else None,
        low=exp(found.low[number]) if bounded else None,
        high=exp(found.high[number]) if bounded else None,
        sees=exp(sees) - 1 if decided and np.isfinite(sees) else None,
        threshold=exp(found.threshold[number]) - 1,
        rounds=usable,
        blind=blind,
        needs=needs,
        clears=clears,
        changes=pair.changes,
        flags=pair.flags,
    )


def _against_jobs(pairs: Sequence[_Pair], stored: Stored) -> Effects:
    """The job is the unit, and the base the mean of its jobs."""
    bands = [stored.band(pair.key) for pair in pairs]
    jobs = np.array([len(band) for band in bands])
    centers = np.array([log(pair.candidate_us) for pair in pairs])
    means = np.array([np.mean(band) if band else np.nan for band in bands])
    spread = np.array([np.std(band, ddof=1) * (1 + 1 / len(band)) ** 0.5 if band else np.nan for band in bands])
    return Effects(estimate=centers - means, error=spread, degrees=np.maximum(jobs - 1, 0))


def _finished(run: Run) -> list[Record]:
    return [record for record in merge([run]) if record.status != "interrupted"]


def _by_round(rows: Iterable[Record]) -> dict[int, Record]:
    return {row.round: row for row in rows}


def _center_us(rows: Mapping[int, Record]) -> float:
    """The geometric mean of the rounds' medians."""
    return exp(fmean([log(row.timing.median_us) for row in rows.values() if row.timing]))


def _log_ratio(base: Record, candidate: Record) -> float:
    assert base.timing is not None  # only timed rows are paired
    assert candidate.timing is not None
    return log(candidate.timing.median_us / base.timing.median_us)


@dataclass(kw_only=True)
class _Conditions:
    """What a run's rows say of where they were measured, collected in one pass: a run may have tens of thousands."""

    run_ids: set[str] = field(default_factory=set)
    devices: set[str] = field(default_factory=set)
    power_limits_w: list[float] = field(default_factory=list)
    memory_mhz: list[float] = field(default_factory=list)
    canaries: dict[int, list[Canary]] = field(default_factory=lambda: defaultdict(list))  # by round

    @classmethod
    def of(cls, rows: Iterable[Record]) -> _Conditions:
        found = cls()
        for row in rows:
            found.run_ids.add(row.run_id)
            if row.timing is not None:
                found.devices.add(row.device)
            if (seen := row.telemetry) is not None:
                found.power_limits_w.append(seen.power_limit_w)
                found.memory_mhz.append(seen.mem_mhz)
            if row.canary is not None:
                found.canaries[row.round].append(row.canary)
        return found

    def control_times_us(self, time_us: Callable[[Canary], float]) -> dict[int, float]:
        """A control's time in each round, the median over rows."""
        times = {number: [us for us in map(time_us, canaries) if us > 0] for number, canaries in self.canaries.items()}
        return {number: median(values) for number, values in times.items() if values}


def _unfit(base: Run, candidate: Run, records: tuple[list[Record], list[Record]]) -> list[str]:
    """Why times of these two runs cannot be compared at all."""
    found = []
    old, new = map(_Conditions.of, records)
    ids = old.run_ids - {""}, new.run_ids - {""}
    if base.path.resolve() == candidate.path.resolve() or (ids[0] and ids[0] == ids[1] and base.manifest == candidate.manifest):
        found.append("base and candidate are the same run, and a run is never slower than itself")
    if old.devices and new.devices and old.devices != new.devices:
        found.append(f"the devices differ: {', '.join(sorted(old.devices))} / {', '.join(sorted(new.devices))}")
    limits = _median(old.power_limits_w), _median(new.power_limits_w)
    if limits[0] and limits[1] and _apart(*limits) > POWER_DRIFT:
        found.append(f"the power limits differ: {limits[0]:.0f} W / {limits[1]:.0f} W")
    memory = _median(old.memory_mhz), _median(new.memory_mhz)
    if memory[0] and memory[1] and _apart(*memory) > CLOCK_DRIFT:
        found.append(f"the memory clocks differ: {memory[0]:.0f} MHz / {memory[1]:.0f} MHz")
    for control, time_us in CONTROLS.items():
        times = old.control_times_us(time_us), new.control_times_us(time_us)
        both = sorted(times[0].keys() & times[1].keys())
        if len(both) < 2:
            continue
        moved = of_rounds(np.array([[log(times[1][number] / times[0][number]) for number in both]]))
        if abs(moved.estimate[0]) > CONTROL_DRIFT and abs(moved.estimate[0]) > 3 * moved.error[0]:
            change = exp(moved.estimate[0]) - 1
            found.append(f"the environment changed: the same {control}, which no change can touch, took {change:+.1%} in the candidate run")
    return found


def _worse(old: Side[Record], new: Side[Record]) -> str:
    """A status of the candidate that the base does not have in any round, as a sentence."""
    fine: set[Status] = {"ok", "skipped"} if not old.timed else {"ok"}
    known = {record.status for record in old.other} | fine
    if old.status is None or (not old.timed and old.status != "skipped"):
        return ""
    known |= {"skipped"} if new.timed else set()  # of another architecture that the plan names
    bad = [record for record in new.other if record.status not in known]
    if not bad:
        return ""
    rounds = len({record.round for record in bad})
    return f"{bad[0].status} in {rounds} of {rounds + _timed_rounds(new)} rounds, which the base never was: {bad[0].reason}"


def _timed_rounds(side: Side[Record]) -> int:
    return len({record.round for rows in side.timed.values() for record in rows})


def _why(side: Side[Record]) -> str:
    if side.status is None:
        return "it has no such row"
    row = next((record for record in side.other if record.status != "ok"), side.other[0])
    if row.status == "ok":
        return "its time does not describe the kernel" if row.timing else "it has none"
    return f"{row.status}: {row.reason}" if row.reason else row.status


def _meanings(old: Side[Record], new: Side[Record]) -> str:
    told = []
    for side in (old, new):
        told.append(" and ".join(f"{device} under contract {contract}" for device, contract in side.timed))
    return " / ".join(told)


def _numerics(base: Iterable[Record], candidate: Iterable[Record]) -> str:
    """A larger error than before, as a sentence."""
    old = [row.error for row in base if row.error]
    new = [row.error for row in candidate if row.error]
    if not old or not new:
        return ""
    before, after = max(e.rel_l2 for e in old), max(e.rel_l2 for e in new)
    tolerance = min(e.rel_l2_tolerance for e in old)
    if not after <= tolerance:
        return f"the relative L2 error is {after:.2e}, above the base's tolerance of {tolerance:.2e}"
    if after > ERROR_FACTOR * before and after > ERROR_SHARE * tolerance:
        return f"the relative L2 error grew from {before:.2e} to {after:.2e}, by more than {ERROR_FACTOR:g} times"
    return ""


def _changes(base: Iterable[Record], candidate: Iterable[Record]) -> list[str]:
    """What one call launches and what the backend says of itself, where it is not the same in both."""
    old, new = list(base), list(candidate)
    if _all_alike([*old, *new]):
        return []
    found = []
    launched = [{row.kernels for row in rows if row.kernels} for rows in (old, new)]
    if launched[0] and launched[1] and launched[0] != launched[1]:
        counts = [{sum(kernel.count for kernel in kernels) for kernels in side} for side in launched]
        names = [{kernel.name for kernels in side for kernel in kernels} for side in launched]
        told = [f"{_numbers(counts[0])} -> {_numbers(counts[1])} kernels a call"] if counts[0] != counts[1] else []
        told += [f"no longer {_some(names[0] - names[1])}"] if names[0] - names[1] else []
        told += [f"now {_some(names[1] - names[0])}"] if names[1] - names[0] else []
        found.append("; ".join(told) or "the same kernels in another order or number")
    for name in sorted({name for row in (*old, *new) for name in row.facts}):
        if name.endswith(TIMES) or name == "elements_differing_between_launches":
            continue
        said = [{str(row.facts[name]) for row in rows if name in row.facts} for rows in (old, new)]
        if said[0] != said[1]:
            found.append(f"{name}: {_some(said[0])} -> {_some(said[1])}")
    return found


def _all_alike(rows: Sequence[Record]) -> bool:
    """To the letter, as most are: rows of one journal even share what they say."""
    first, facts = rows[0], repr(rows[0].facts)
    seen: set[tuple[int, int]] = set()  # by identity, which rows keep
    for row in rows:
        what = id(row.facts), id(row.kernels)
        if what in seen:
            continue
        if row.kernels != first.kernels or repr(row.facts) != facts:
            return False
        seen.add(what)
    return True


def _numbers(values: Collection[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def _some(words: Collection[str]) -> str:
    shown = sorted(words)
    return (", ".join(word[:80] for word in shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")) or "nothing"


def _too_little(pair: _Pair, rule: Rule) -> str:
    rounds, usable = len(pair.rounds), len(pair.usable)
    if rounds < rule.least_rounds:
        return f"{rounds} of the {rule.least_rounds} rounds that both need: moebench sweep --rounds 12"
    if usable < max(rule.least_rounds, LEFT * rounds):
        return f"{rounds - usable} of {rounds} rounds are in doubt: {', '.join(pair.flags)}"
    return ""


def _between(found: Findings, number: int, rule: Rule) -> str:
    low, high = exp(found.low[number]) - 1, exp(found.high[number]) - 1
    return (
        f"between {low:+.1%} and {high:+.1%}: neither above {rule.ignore:.1%} nor below {exp(found.threshold[number]) - 1:.1%} for certain"
    )


def _nothing(pairs: Sequence[_Pair], exact: Sequence[Verdict], options: Options) -> str:
    least = options.rule.least_rounds
    if any(len(pair.rounds) >= least for pair in pairs):
        flags = ", ".join(name for name in FLAGS if any(name in pair.flags for pair in pairs))
        return f"no cell has {least} rounds beyond doubt on both sides: {flags} (--allow-flag uses them all the same)"
    if pairs:
        return f"no cell has the {least} rounds on both sides that a verdict needs"
    if exact:
        return f"no cell can be compared; the first: {exact[0].reason}"
    return "the runs have no case and backend in common that was timed"


def _notes(records: tuple[list[Record], list[Record]], stored: Stored | None, pairs: Sequence[_Pair]) -> list[str]:
    notes = []
    times = [sorted(record.time for record in rows if record.timing and record.time) for rows in records]
    apart = bool(times[0] and times[1]) and (times[0][-1] < times[1][0] or times[1][-1] < times[0][0])
    if stored is not None:
        notes.append(_stored_note(stored, pairs))
    elif apart:
        notes.append("the runs were measured one after the other, not in turns: what changed on the machine in between counts as a change")
    return notes


def _stored_note(stored: Stored, pairs: Sequence[_Pair]) -> str:
    if stored.calibrated:
        banded = sum(bool(stored.band(pair.key)) for pair in pairs)
        return f"{stored.name} is trusted: {banded} of {len(pairs)} cells have a band of {LEAST_JOBS} jobs or more, and the job is the unit"
    limit = f"{100 * UNSTORED:g} %"
    asks = "all it can ask for is base and candidate measured in turns (moebench ab)"
    return f"{stored.name} is stored: judged at {limit} or more, and {asks}"


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if value]
    return median(known) if known else 0.0


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(a, b)
