"""The statistics of a regression gate: log ratios of rounds in; slower, faster, the same or nobody can say out.

The unit is the round, one fresh process a side: what differs from process to process is most of the noise, so more samples in one
process prove nothing. A round gives each cell one number, the logarithm of the candidate's median over the base's.

A cell *clears* where a slowdown of `threshold` is ruled out. It is *slower* where that is not so, a slowdown of more than `ignore` is
proven, by a t test after Holm over the cells and by a sign-flip test that needs no normal distribution, and the estimate is above the
alarm line, halfway between `ignore` and `threshold`. In all other cases nobody can say, and more rounds may.

So with a threshold of 3 % a cell that is slower by 3 % is found as often as it does not clear, 97.5 %, where its noise allows that; with
the alarm line at the threshold half of such slowdowns would be unclear. One of 2 % in a quiet cell is green, as asked, and none below
1 % is ever called slower but by the chance `alpha`. What a cell's noise allows is its minimum detectable effect.

Student's t is computed here, in the finite form that whole degrees of freedom have: two functions do not make SciPy a dependency."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import atan, cos, log1p, pi, sin, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["same", "faster", "slower", "unclear", "broken", "missing"]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

RESOLUTION_US = 0.5  # of a CUDA event
BAND = 3.0  # standard deviations of an A/A difference that no change is claimed within
POWER = 0.9  # with which a minimum detectable effect is found
BLOCKS = 12  # of rounds that are flipped together, a round each where there are no more: 4096 sign patterns
FLIP_LEVEL = 0.05
PART = 64  # cells whose flips are looked at at once: 256 KB, which stay in a cache
MOST_ROUNDS = 64  # that are proposed to make a cell see more


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a change has to look like to be called one; shares, so 0.03 is 3 %."""

    threshold: float = 0.03  # a slowdown that green rules out
    ignore: float = 0.01  # a slowdown that is never red
    alpha: float = 0.01  # probability that any of all cells is called slower although none is by more than `ignore`
    miss: float = 0.025  # probability that a cell slower by its threshold clears
    least_rounds: int = 6  # below, 2 ** -rounds leaves a sign-flip test nothing to say

    def __post_init__(self) -> None:
        if not 0 <= self.ignore < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold:.3g} and ignore {self.ignore:.3g}: give 0 <= ignore < threshold < 1")

    @property
    def log_threshold(self) -> float:
        return log1p(self.threshold)

    @property
    def log_ignore(self) -> float:
        return log1p(self.ignore)


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Log ratios, candidate over base, of cells along the last axis; NaN where a cell has none."""

    estimate: Floats
    error: Floats  # standard error of the estimate
    degrees: NDArray[np.int64]  # of freedom of the standard error; 0: it has none
    differences: Floats | None = None  # [..., cells, rounds] that they come from, NaN where a round has no pair; None: not from rounds


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of each cell, in the shape of its effects."""

    slower: Flags
    faster: Flags
    clears: Flags  # a slowdown of its threshold is ruled out
    gains_little: Flags  # a speed-up of its threshold is ruled out too
    decided: Flags  # there was enough to decide on
    low: Floats  # log ratios: bounds that hold with probability 1 - miss each
    high: Floats
    threshold: Floats  # its own, as a log ratio
    sees: Floats  # minimum detectable effect, as a log ratio; inf where nothing is decided

    @property
    def same(self) -> Flags:
        return self.clears & self.gains_little


def of_rounds(differences: Floats) -> Effects:
    """Mean and standard error of log ratios [..., cells, rounds]; NaN marks a round without a usable pair."""
    known = np.isfinite(differences)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, differences, 0.0).sum(-1) / count
        off = np.where(known, differences - mean[..., None], 0.0)
        error = np.sqrt((off**2).sum(-1) / (count - 1) / count)
    return Effects(estimate=mean, error=np.where(count > 1, error, np.nan), degrees=np.maximum(count - 1, 0), differences=differences)


def floors(median_us: Floats, control: Floats | None = None) -> Floats:
    """Log ratios that no change is claimed below: half a microsecond, and three standard deviations of A/A.

    control: log ratios [cells, rounds] of the base against itself, where it was measured again."""
    lowest = np.log1p(RESOLUTION_US / median_us)
    if control is None:
        return np.asarray(lowest, np.float64)
    found = of_rounds(control)
    band = BAND * np.hypot(np.nan_to_num(found.estimate), np.nan_to_num(found.error))
    return np.maximum(lowest, band)


def find(effects: Effects, floor: Floats | float, rule: Rule, tested: NDArray[np.int64] | int | None = None) -> Findings:
    """What can be said of each cell. Holm goes over the cells of the last axis that have an effect, or over `tested` if that is more."""
    estimate, error, degrees = effects.estimate, effects.error, effects.degrees
    decided = (
        np.isfinite(estimate)
        & np.isfinite(error)
        & (degrees >= max(rule.least_rounds - 1, 1) if effects.differences is not None else degrees >= 1)
    )
    threshold = np.maximum(rule.log_threshold, floor) * np.ones_like(estimate)
    alarm = np.maximum((rule.log_threshold + rule.log_ignore) / 2, floor)
    family = np.asarray(decided.sum(-1) if tested is None else np.maximum(decided.sum(-1), tested))
    slower = decided & _proven(estimate, error, degrees, decided, family, rule) & (estimate > alarm)
    faster = decided & _proven(-estimate, error, degrees, decided, family, rule) & (-estimate > alarm)
    reach = _quantiles(np.full(estimate.shape, rule.miss), degrees) * error
    low, high = estimate - reach, estimate + reach
    clears, gains_little = decided & (high < threshold), decided & (-low < threshold)
    if effects.differences is not None:
        rounds = effects.differences
        slower &= _flips_agree(rounds - rule.log_ignore, slower)
        faster &= _flips_agree(-rounds - rule.log_ignore, faster)
        clears &= _flips_agree(threshold[..., None] - rounds, clears)
        gains_little &= _flips_agree(threshold[..., None] + rounds, gains_little)
    slower &= ~clears
    faster &= ~gains_little
    return Findings(
        slower=slower,
        faster=faster,
        clears=clears,
        gains_little=gains_little,
        decided=decided,
        low=low,
        high=high,
        threshold=threshold,
        sees=_detectable(error, degrees, decided, family, alarm, threshold, rule),
    )


def suspects(effects: Effects, found: Findings) -> Flags:
    """Cells that a first look leaves open: a second one, with fresh rounds, alone decides on them."""
    return ~found.clears | (effects.estimate >= found.threshold / 2)


def rounds_needed(error: float, rounds: int, floor: float, family: int, rule: Rule) -> int | None:
    """With which a cell of this standard error would see the rule's threshold; None where MOST_ROUNDS do not suffice."""
    deviation = error * sqrt(rounds)
    alarm = max((rule.log_threshold + rule.log_ignore) / 2, floor)
    for count in range(rule.least_rounds, MOST_ROUNDS + 1):
        level, spread = t_quantile(rule.alpha / max(family, 1), count - 1), t_quantile(1 - POWER, count - 1)
        if _reach(level, spread, count - 1, alarm, deviation / sqrt(count), rule) <= rule.log_threshold:
            return count
    return None


def holm(p: Floats, family: NDArray[np.int64] | int | None = None) -> Floats:
    """Adjusted p values over the last axis; NaN is not part of the family, which is as large as it has values or larger."""
    known = np.isfinite(p)
    count = np.asarray(known.sum(-1) if family is None else family)
    order = np.argsort(np.where(known, p, np.inf), axis=-1, kind="stable")
    factors = np.maximum(count[..., None] - np.arange(p.shape[-1]), 1)
    steps = np.maximum.accumulate(np.nan_to_num(np.take_along_axis(p, order, -1), nan=1.0) * factors, axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(steps, 1.0), -1)
    return np.where(known, adjusted, np.nan)


def t_tail(t: Floats, degrees: NDArray[np.int64]) -> Floats:
    """Probability of a Student's t above `t` (Abramowitz and Stegun 26.7.3 and 26.7.4); NaN where there are no degrees of freedom."""
    tail = np.full(np.broadcast(t, degrees).shape, np.nan)
    t, degrees = np.broadcast_arrays(t, degrees)
    for one in sorted(set(degrees[degrees > 0].tolist())):  # np.unique imports numpy.ma, 30 ms of a gate
        here = degrees == one
        theta = np.arctan(np.abs(t[here]) / sqrt(one))
        half = (1 - _within(np.sin(theta), np.cos(theta), theta, one)) / 2
        tail[here] = np.where(t[here] > 0, half, 1 - half)
    return tail


@lru_cache(maxsize=4096)
def t_quantile(p: float, degrees: int) -> float:
    """The t that is exceeded with probability p < 0.5, by bisection."""
    low, high = 0.0, 1.0
    while _tail(high, degrees) > p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, degrees) > p else (low, middle)
    return high


def _tail(t: float, degrees: int) -> float:
    theta = atan(t / sqrt(degrees))
    return float((1 - _within(np.float64(sin(theta)), np.float64(cos(theta)), np.float64(theta), degrees)) / 2)


def _within(sine: Floats | np.float64, cosine: Floats | np.float64, theta: Floats | np.float64, degrees: int) -> Floats | np.float64:
    """Probability of a Student's t between -t and t, theta = atan(t / sqrt(degrees))."""
    odd = degrees % 2
    term = cosine if odd else np.ones_like(cosine)
    total = term if degrees > 1 else np.zeros_like(cosine)
    for k in range(3 if odd else 2, degrees - 1, 2):
        term = term * cosine**2 * (k - 1) / k
        total = total + term
    return (theta + sine * total) * 2 / pi if odd else sine * total


def _proven(estimate: Floats, error: Floats, degrees: NDArray[np.int64], decided: Flags, family: NDArray[np.int64], rule: Rule) -> Flags:
    """Whether an effect above `ignore` is, among a family of tests."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(decided, (estimate - rule.log_ignore) / error, np.nan)
    return np.asarray(holm(t_tail(t, np.where(decided, degrees, 0)), family) <= rule.alpha)


def _quantiles(p: Floats, degrees: NDArray[np.int64]) -> Floats:
    """t quantiles cell by cell; NaN where there are no degrees of freedom."""
    pairs = list(zip(p.ravel().tolist(), degrees.ravel().tolist(), strict=True))
    values = {(one, df): t_quantile(one, df) if df > 0 else np.nan for one, df in set(pairs)}
    return np.array([values[pair] for pair in pairs], np.float64).reshape(p.shape)


def _detectable(
    error: Floats,
    degrees: NDArray[np.int64],
    decided: Flags,
    family: NDArray[np.int64],
    alarm: Floats | float,
    threshold: Floats,
    rule: Rule,
) -> Floats:
    """The slowdown that is found with probability POWER, were it the first of the family that Holm looks at."""
    level = _quantiles(np.ascontiguousarray(np.broadcast_to((rule.alpha / np.maximum(family, 1))[..., None], error.shape)), degrees)
    spread = _quantiles(np.full(error.shape, 1 - POWER), degrees)
    unclear = threshold - (_quantiles(np.full(error.shape, rule.miss), degrees) - spread) * error  # below, it clears too often
    needs = np.maximum(_reach(level, spread, np.maximum(degrees, 1), alarm, error, rule), unclear)
    return np.where(decided, needs, np.inf)


def _reach(
    level: Floats | float,
    spread: Floats | float,
    degrees: NDArray[np.int64] | int,
    alarm: Floats | float,
    error: Floats | float,
    rule: Rule,
) -> Floats:
    """The effect that is both proven and above the alarm line with the power that `spread` stands for.

    The proof needs `level` standard errors, and these are estimated too: that adds level^2 / (2 degrees) to the variance."""
    proof = rule.log_ignore + (level + spread * np.sqrt(1 + level**2 / (2 * degrees))) * error
    return np.asarray(np.maximum(proof, alarm + spread * error))


def _flips_agree(rounds: Floats, asked: Flags) -> Flags:
    """Whether so large a sum of a cell's rounds is rare among those with signs flipped at random; computed where asked."""
    agrees = np.zeros(asked.shape, bool)
    chosen = rounds[asked]
    known = np.isfinite(chosen)
    first = np.take_along_axis(chosen, np.argsort(~known, axis=-1, kind="stable"), -1)  # those that a cell has
    counts = known.sum(-1)
    found = np.zeros(len(chosen), bool)
    for count in set(counts.tolist()) - {0}:
        here = counts == count
        found[here] = _is_rare(first[here, :count])
    agrees[asked] = found
    return agrees


def _is_rare(rounds: Floats) -> Flags:
    """Of cells that all have these rounds. Of more than BLOCKS, neighbours are flipped together: a subgroup of all flips, so a test as
    exact, with all its patterns.

    A pattern is any of the first half with any of the second: one comparison each, and matrices too small for BLAS to call its threads,
    which on 16 cores waited for 0.6 to 1.5 s of CPU in a judgement of 0.3 to 0.5 s."""
    count = min(rounds.shape[-1], BLOCKS)
    blocks = np.add.reduceat(rounds, np.arange(count) * rounds.shape[-1] // count, axis=-1)
    half = count // 2
    signs = _signs(half), _signs(count - half)
    rare = np.empty(len(blocks), bool)
    for start in range(0, len(blocks), PART):
        part = blocks[start : start + PART]
        lacks = (part.sum(-1, keepdims=True) - 1e-12) - part[:, :half] @ signs[0]
        as_large = np.count_nonzero((part[:, half:] @ signs[1])[:, None, :] >= lacks[:, :, None], axis=(1, 2))
        rare[start : start + PART] = as_large / (1 << count) <= FLIP_LEVEL
    return rare


@lru_cache
def _signs(count: int) -> Floats:
    """[count, patterns] of 1 and -1: all there are."""
    bits = np.arange(1 << count)[None, :] >> np.arange(count)[:, None] & 1
    return (1 - 2 * bits).astype(np.float64)
