"""Which of several ways to run the same calls is clearly the fastest: candidates against what is used now, by interleaved rounds.

A first look at all candidates proposes one; fresh rounds of that one alone decide, so that the luckiest of many is not taken for the
fastest. What is taken becomes what is used now, and its own alternatives are looked at next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import exp, inf, log, sqrt
from random import Random
from statistics import fmean, median, stdev
from typing import Protocol

from moebench.backend import Choice, Regime
from moebench.gate import t_quantile
from moebench.timing import Stopwatch

LOOK_ROUNDS, PROOF_ROUNDS = 4, 12
REGIONS = 8  # a sample's median is of as many, about 8 ms
AT_ONCE = 8  # candidates that are held ready at a time: a CUDA graph of 16384 tokens keeps 1 GB of its own
MISS = 0.025  # either end of the interval
LEAST_GAIN = 0.005  # medians of fresh processes differ by 0.1 to 0.4 % on an H200: less is no reason to change a table
WORST_LOSS = 0.01  # at one token count, that is made up for at others
MOST_STEPS = 4  # choices taken one after the other


class Bench(Protocol):
    def reject(self, choice: Choice, tokens: Sequence[int]) -> str:
        """Why a choice may not be timed, it does not compile or is wrong; empty once it was found right at each token count."""
        ...

    def ready(self, tokens: int, choices: Sequence[Choice]) -> AbstractContextManager[Mapping[Choice, Stopwatch]]:
        """Clocks of calls with so many tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Of one choice over another: time after / time before, less than 1 if it is faster, over token counts the geometric mean."""

    ratio: float
    low: float  # 95 % interval over rounds
    high: float
    by_tokens: dict[int, float]  # ratio at each
    before_us: dict[int, float]  # medians of medians
    after_us: dict[int, float]

    @property
    def is_clear(self) -> bool:
        return self.high < 1 and self.ratio <= 1 - LEAST_GAIN and max(self.by_tokens.values()) <= 1 + WORST_LOSS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one regime."""

    regime: str
    tokens: tuple[int, ...]
    before: Choice
    after: Choice  # the same where nothing was taken
    tried: int  # choices that were timed, the present one not counted
    gain: Gain | None = None  # of after over before, or of the best candidate over it where that was not taken
    candidate: Choice = ""  # the best one where it was not taken
    reason: str = ""  # why nothing was taken
    rejected: dict[str, str] = field(default_factory=dict)  # choices that were not timed, and why


def outcome_of(row: Mapping[str, object]) -> Outcome:
    """From what asdict and JSON made of one: their keys are strings."""
    values: dict[str, object] = {**row, "tokens": tuple(row["tokens"])}  # type: ignore[arg-type]  # made by asdict
    if isinstance(gain := row["gain"], dict):
        numbers = {name: {int(count): value for count, value in gain[name].items()} for name in ("by_tokens", "before_us", "after_us")}
        values["gain"] = Gain(**{**gain, **numbers})
    return Outcome(**values)  # type: ignore[arg-type]  # as above


def tune(
    regime: Regime,
    alternatives: Callable[[Choice], Sequence[Choice]],
    bench: Bench,
    *,
    rejected: Mapping[Choice, str] | None = None,
    seed: int = 0,
) -> Outcome:
    """rejected: choices not to be looked at, and why."""
    random = Random(seed)
    out = dict(rejected or {})
    start = Outcome(regime=regime.name, tokens=regime.tokens, before=regime.choice, after=regime.choice, tried=0)
    if not regime.tokens:
        return _ended(start, "no token count of this case falls into it", out)
    if problem := out.get(regime.choice) or bench.reject(regime.choice, regime.tokens):
        return _ended(start, f"the present choice cannot be timed: {problem}", out)
    now, taken, tried = regime.choice, 0, {regime.choice}
    gain: Gain | None = None
    reason = candidate = ""
    while taken < MOST_STEPS:
        fresh = [choice for choice in alternatives(now) if choice not in tried and choice not in out]
        for choice in fresh:
            if problem := bench.reject(choice, regime.tokens):
                out[choice] = problem
        fresh = [choice for choice in fresh if choice not in out]
        tried |= set(fresh)
        looks = {
            c: _mean(look) for part in _parts(fresh) for c, look in _rounds(bench, regime.tokens, now, part, LOOK_ROUNDS, random).items()
        }
        best = min(looks, key=lambda choice: looks[choice], default="")
        if not best or looks[best] >= 0:
            reason = "nothing was faster" if fresh else "nothing is left to try"
            break
        found = _gain(bench, regime.tokens, now, best, random)
        if not found.is_clear:
            reason, candidate = _unclear(found), best
            gain = gain or found
            break
        now, taken, gain = best, taken + 1, found
    if taken > 1:  # over what there was in the beginning, measured and not multiplied
        gain = _gain(bench, regime.tokens, regime.choice, now, random)
        if not gain.is_clear:
            return _ended(start, f"small steps that together are not clear: {_unclear(gain)}", out, len(tried) - 1, gain, now)
    if not taken:
        return _ended(start, reason, out, len(tried) - 1, gain, candidate)
    return Outcome(regime=regime.name, tokens=regime.tokens, before=regime.choice, after=now, tried=len(tried) - 1, gain=gain, rejected=out)


def _ended(
    start: Outcome, reason: str, out: dict[Choice, str], tried: int = 0, gain: Gain | None = None, candidate: Choice = ""
) -> Outcome:
    return Outcome(
        regime=start.regime,
        tokens=start.tokens,
        before=start.before,
        after=start.before,
        tried=tried,
        gain=gain,
        candidate=candidate,
        reason=reason,
        rejected=out,
    )


def _gain(bench: Bench, tokens: Sequence[int], before: Choice, after: Choice, random: Random) -> Gain:
    times: dict[int, tuple[list[float], list[float]]] = {}
    for count in tokens:
        with bench.ready(count, [before, after]) as watches:
            rounds = list(_interleaved(watches, PROOF_ROUNDS, random))
        times[count] = [one[before] for one in rounds], [one[after] for one in rounds]
    logs = {count: [log(b / a) for a, b in zip(*pair, strict=True)] for count, pair in times.items()}
    means = [fmean(logs[count][number] for count in tokens) for number in range(PROOF_ROUNDS)]
    reach = t_quantile(MISS, PROOF_ROUNDS - 1) * stdev(means) / sqrt(PROOF_ROUNDS)
    return Gain(
        ratio=exp(fmean(means)),
        low=exp(fmean(means) - reach),
        high=exp(fmean(means) + reach),
        by_tokens={count: exp(fmean(values)) for count, values in logs.items()},
        before_us={count: median(pair[0]) for count, pair in times.items()},
        after_us={count: median(pair[1]) for count, pair in times.items()},
    )


def _rounds(
    bench: Bench, tokens: Sequence[int], now: Choice, others: Sequence[Choice], rounds: int, random: Random
) -> dict[Choice, list[float]]:
    """Log ratios of each to what is used now, of all token counts and rounds."""
    found: dict[Choice, list[float]] = {choice: [] for choice in others}
    for count in tokens:
        with bench.ready(count, [now, *others]) as watches:
            for one in _interleaved(watches, rounds, random):
                for choice in others:
                    found[choice].append(log(one[choice] / one[now]))
    return found


def _interleaved(watches: Mapping[Choice, Stopwatch], rounds: int, random: Random) -> Iterator[dict[Choice, float]]:
    """Microseconds of each, once a round, in another order each time; a round before them warms up."""
    order = list(watches)
    for number in range(rounds + 1):
        random.shuffle(order)
        times = {choice: median(watches[choice].sample(REGIONS)) for choice in order}
        if number:
            yield times


def _parts(choices: Sequence[Choice]) -> Iterator[Sequence[Choice]]:
    yield from (choices[first : first + AT_ONCE] for first in range(0, len(choices), AT_ONCE))


def _mean(logs: Sequence[float]) -> float:
    return fmean(logs) if logs else inf


def _unclear(gain: Gain) -> str:
    worst = max(gain.by_tokens, key=lambda count: gain.by_tokens[count])
    if gain.high >= 1:
        return "its interval holds no gain for certain"
    if gain.ratio > 1 - LEAST_GAIN:
        return f"it gains less than {LEAST_GAIN:.1%}".replace("%", " %")
    return f"{worst} tokens would lose more than {WORST_LOSS:.0%}".replace("%", " %")
