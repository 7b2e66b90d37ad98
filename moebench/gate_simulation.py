"""What the gate says of simulated machines: how often it is wrong, what it finds, how often it does not answer.

A family is one gate run over some cells, with rounds of a base and a candidate in random ABBA order on one machine. What disturbs
the times is a `Noise`; the statistics are those of gate.py, called as the gate calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moebench.gate import Findings, Floats, Rule, find, of_rounds, suspects

Order = Literal["turns", "after"]  # base and candidate in turns; or all rounds of the base, then all of the candidate


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What makes times differ although nothing changed; shares of a time, so 0.01 is 1 %."""

    name: str
    process: tuple[float, ...]  # standard deviation from process to process; cells have them in turn
    shared: float = 0.0  # part of that variance that all cells of a process have in common
    cells_per_process: int = 15
    tails: int | None = None  # degrees of freedom of Student's t for a process's offset; None: normal
    slow_share: float = 0.0  # of processes that are slower as a whole, as with another memory layout
    slow_by: float = 0.0
    sample: float = 0.0  # standard deviation of a sample within a process
    samples: int = 60
    sample_ar1: float = 0.0  # correlation of neighbouring samples
    wander: float = 0.0  # standard deviation of the machine's state, the same for all cells
    wander_ar1: float = 0.0  # correlation of the state between neighbouring turns
    drift: float = 0.0  # from the first turn to the last
    throttle_share: float = 0.0  # of families in which the clock ramps down at some turn
    throttle_by: float = 0.0
    throttle_cells: float = 0.5  # share of cells that follow the clock; the others wait for memory
    throttle_turns: int = 4  # that the ramp takes
    first_by: float = 0.0  # what the first of a round's two gains from a GPU that had time to cool


# CVs of the medians of ten fresh processes at twelve points of an H200; the noise of samples is in them.
H200 = Noise(
    name="H200",
    process=(0.0009, 0.0007, 0.0012, 0.0014, 0.0039, 0.0027, 0.0011, 0.0024, 0.0030, 0.0021, 0.0135, 0.0041),
)
NOISY = Noise(
    name="noisy",
    process=(0.01, 0.02, 0.03),
    shared=0.3,
    tails=3,
    slow_share=0.1,
    slow_by=0.04,
    sample=0.03,
    sample_ar1=0.6,
    wander=0.01,
    wander_ar1=0.7,
    drift=0.03,
    throttle_share=0.2,
    throttle_by=0.08,
    first_by=0.02,
)
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10, 0.20)
NOISES = {noise.name: noise for noise in (H200, NOISY)}


@dataclass(frozen=True, kw_only=True)
class Design:
    """How a gate measures."""

    first: int = 12  # rounds over all cells
    again: int = 12  # fresh rounds over the cells that the first leave open; 0: the first decide
    order: Order = "turns"


ONE_STAGE = Design(again=0)
TWO_STAGES = Design(first=6)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of families."""

    families: int
    false_alarm: float  # a cell that did not change is called slower
    found: float  # the cell that did is; 0 where none did
    green: float
    no_verdict: float
    measured_again: float  # cells, mean over families


def survey(families: int = 400) -> Iterator[tuple[Noise, float, Rates]]:
    """Every noise with every slowdown, 0 first: the table in docs/ci.md."""
    for noise in NOISES.values():
        for slowdown in SLOWDOWNS:
            yield noise, slowdown, simulate(noise, slowdown=slowdown, families=families, seed=round(100 * slowdown))


def simulate(
    noise: Noise,
    rule: Rule | None = None,
    *,
    design: Design = TWO_STAGES,
    slowdown: float = 0.0,
    families: int = 400,
    cells: int = 60,
    seed: int = 0,
) -> Rates:
    """Families in each of which one random cell is slower by `slowdown`, or none where that is 0."""
    rule = rule or Rule()
    random = np.random.default_rng(seed)
    effect = np.zeros((families, cells))
    changed = random.integers(0, cells, families)
    effect[np.arange(families), changed] = np.log1p(slowdown)
    found, again = _gate(noise, rule, design, effect, random)
    alarms = found.slower.copy()
    if slowdown:
        alarms[np.arange(families), changed] = False
    red = found.slower.any(-1)
    green = found.clears.all(-1) & ~red
    return Rates(
        families=families,
        false_alarm=float(alarms.any(-1).mean()),
        found=float(found.slower[np.arange(families), changed].mean()) if slowdown else 0.0,
        green=float(green.mean()),
        no_verdict=float((~red & ~green).mean()),
        measured_again=again,
    )


def differences(noise: Noise, effect: Floats, rounds: int, order: Order, random: np.random.Generator) -> Floats:
    """Log ratios [families, cells, rounds] of a candidate that is slower by `effect` [families, cells], a log ratio."""
    families, cells = effect.shape
    sides = np.stack([_offsets(noise, families, cells, rounds, random) for _ in range(2)])  # [2, families, cells, rounds]
    turns = _turns(order, families, rounds, random)  # [2, families, rounds]: when each side has its turn
    state = _state(noise, families, cells, 2 * rounds, random)  # [families, cells, turns]
    for side, turn in enumerate(turns):
        sides[side] += np.take_along_axis(state, np.broadcast_to(turn[:, None, :], (families, cells, rounds)), -1)
        is_first = turn % 2 == 0 if order == "turns" else turn == 0
        sides[side] -= noise.first_by * is_first[:, None, :]
    return np.asarray(sides[1] - sides[0] + effect[..., None], np.float64)


def _gate(noise: Noise, rule: Rule, design: Design, effect: Floats, random: np.random.Generator) -> tuple[Findings, float]:
    """What is said in the end, and how many cells a second look took on average."""
    first = of_rounds(differences(noise, effect, design.first, design.order, random))
    found = find(first, 0.0, rule)
    if not design.again:
        return found, 0.0
    routed = suspects(first, found)
    fresh = differences(noise, effect, design.again, design.order, random)
    fresh[~routed] = np.nan
    second = find(of_rounds(fresh), 0.0, rule)
    decided = {name: np.where(routed, getattr(second, name), getattr(found, name)) for name in ("clears", "gains_little", "low", "high")}
    return Findings(**{**vars(second), **decided, "slower": second.slower & routed}), float(routed.sum(-1).mean())


def _offsets(noise: Noise, families: int, cells: int, rounds: int, random: np.random.Generator) -> Floats:
    """What fresh processes add, [families, cells, rounds]."""
    shape = (families, cells, rounds)
    deviation = np.resize(noise.process, cells)[:, None]
    processes = -(-cells // noise.cells_per_process)
    of_process = np.arange(cells) // noise.cells_per_process
    own = _draw(noise, shape, random) * np.sqrt(1 - noise.shared)
    common = _draw(noise, (families, processes, rounds), random)[:, of_process] * np.sqrt(noise.shared)
    slow = (random.random((families, processes, rounds)) < noise.slow_share)[:, of_process]
    # The median of n correlated samples: 1.25 standard deviations over the root of as many as would say as much if independent.
    effective = noise.samples * (1 - noise.sample_ar1) / (1 + noise.sample_ar1)
    median_noise = 1.2533 * noise.sample / np.sqrt(effective)
    return np.asarray((own + common) * deviation + slow * noise.slow_by + random.standard_normal(shape) * median_noise)


def _draw(noise: Noise, shape: tuple[int, ...], random: np.random.Generator) -> Floats:
    """Of standard deviation 1."""
    if noise.tails is None:
        return random.standard_normal(shape)
    return np.asarray(random.standard_t(noise.tails, shape) / np.sqrt(noise.tails / (noise.tails - 2)))


def _turns(order: Order, families: int, rounds: int, random: np.random.Generator) -> NDArray[np.int64]:
    """The turn of the base and of the candidate in each round."""
    number = np.arange(rounds)
    if order == "after":
        return np.broadcast_to(np.stack([number, rounds + number])[:, None, :], (2, families, rounds))
    blocks = random.integers(0, 2, (families, -(-rounds // 2)))  # AB BA or BA AB, drawn for two rounds at a time
    flipped = (np.repeat(blocks, 2, axis=1)[:, :rounds] + number) % 2
    return np.stack([2 * number + flipped, 2 * number + 1 - flipped])


def _state(noise: Noise, families: int, cells: int, turns: int, random: np.random.Generator) -> Floats:
    """What the machine adds at each turn, [families, cells, turns]."""
    wander = np.zeros((families, turns))
    steps = random.standard_normal((families, turns))
    wander[:, 0] = steps[:, 0]
    for turn in range(1, turns):
        wander[:, turn] = noise.wander_ar1 * wander[:, turn - 1] + np.sqrt(1 - noise.wander_ar1**2) * steps[:, turn]
    shared = noise.wander * wander + noise.drift * np.arange(turns) / max(turns - 1, 1)
    onset = random.integers(0, turns, (families, 1))
    ramp = np.clip((np.arange(turns) - onset) / noise.throttle_turns, 0, 1) * noise.throttle_by
    ramp *= random.random((families, 1)) < noise.throttle_share
    follows = random.random((families, cells)) < noise.throttle_cells
    return np.asarray(shared[:, None, :] + ramp[:, None, :] * follows[..., None])
