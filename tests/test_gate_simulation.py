"""How often the gate is wrong on simulated machines, how much it finds, and that it rather says nothing. Seeded: the same each time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebench.gate import Rule, find, of_rounds
from moebench.gate_simulation import H200, NOISY, ONE_STAGE, Design, Noise, differences, simulate, survey

FAMILIES = 400
QUIET = Noise(name="quiet", process=(0.002,))


def between(noise, *, slowdown=0.0, rounds=12, order="turns", families=300, cells=4, seed=0):
    effect = np.full((families, cells), np.log1p(slowdown))
    return differences(noise, effect, rounds, order, np.random.default_rng(seed))


def test_clean_families_have_at_most_one_false_alarm_in_a_hundred_under_the_noise_of_an_h200():
    rates = simulate(H200, families=FAMILIES)
    assert rates.false_alarm <= 0.01
    assert rates.green >= 0.95


def test_clean_families_have_at_most_five_in_a_hundred_under_heavy_noise_and_no_verdict_instead_of_green():
    rates = simulate(NOISY, families=FAMILIES)
    assert rates.false_alarm <= 0.05
    assert rates.green <= 0.01
    assert rates.no_verdict >= 0.95


@pytest.mark.parametrize(("slowdown", "least"), [(0.03, 0.90), (0.05, 0.99), (0.10, 0.99), (0.20, 0.99)])
def test_one_slower_cell_of_sixty_is_found_under_the_noise_of_an_h200(slowdown, least):
    rates = simulate(H200, slowdown=slowdown, families=FAMILIES, seed=1)
    assert rates.found >= least
    assert rates.false_alarm <= 0.01
    assert rates.green <= 0.05  # what Rule.miss allows, in two looks


def test_two_percent_are_green_where_three_are_asked_for():
    rates = simulate(H200, slowdown=0.02, families=FAMILIES, seed=2)
    assert rates.found <= 0.05
    assert rates.green >= 0.90


def test_heavy_noise_never_makes_a_slower_cell_green():
    for slowdown in (0.03, 0.05):
        assert simulate(NOISY, slowdown=slowdown, families=100, seed=3).green == 0


def test_one_look_at_all_cells_finds_them_too_and_is_no_redder():
    clean = simulate(H200, design=ONE_STAGE, families=100)
    slower = simulate(H200, design=ONE_STAGE, slowdown=0.05, families=100, seed=4)
    assert clean.false_alarm <= 0.01
    assert slower.found >= 0.97
    assert clean.measured_again == slower.measured_again == 0


def test_a_second_look_takes_few_cells_of_a_quiet_machine():
    assert simulate(H200, families=100).measured_again < 2


@pytest.mark.parametrize(
    "disturbance",
    [
        {"process": (0.01,), "tails": 3},
        {"process": (0.005,), "slow_share": 0.3, "slow_by": 0.03},
        {"process": (0.005,), "drift": 0.10},
        {"process": (0.005,), "wander": 0.01, "wander_ar1": 0.9},
        {"process": (0.005,), "throttle_share": 1.0, "throttle_by": 0.10},
        {"process": (0.005,), "first_by": 0.05},
        {"process": (0.002,), "sample": 0.05, "sample_ar1": 0.8},
        {"process": (0.01,), "shared": 1.0},
    ],
    ids=["tails", "bimodal", "drift", "wander", "throttle", "order", "samples", "shared"],
)
def test_no_single_disturbance_makes_clean_families_red(disturbance):
    assert simulate(Noise(name="one", **disturbance), cells=30, families=150, seed=5).false_alarm <= 0.01


def test_the_simulated_noise_is_what_it_says():
    cells = len(H200.process)
    spread = between(H200, families=2000, rounds=2, cells=cells).std(axis=(0, 2))
    assert spread == pytest.approx(np.sqrt(2) * np.array(H200.process), rel=0.05)


def test_a_slowdown_is_the_mean_of_its_differences():
    assert between(QUIET, slowdown=0.04).mean() == pytest.approx(np.log(1.04), abs=1e-4)


def test_correlated_samples_say_less_than_as_many_independent_ones():
    loose = between(Noise(name="x", process=(0.0,), sample=0.03, samples=60), families=2000)
    tight = between(Noise(name="x", process=(0.0,), sample=0.03, samples=60, sample_ar1=0.6), families=2000)
    assert tight.std() / loose.std() == pytest.approx(2, rel=0.02)  # (1 + 0.6) / (1 - 0.6) = 4 times fewer


def test_taking_turns_cancels_drift_and_order_and_measuring_one_after_the_other_does_not():
    for disturbance in ({"drift": 0.06}, {"first_by": 0.05}):
        noise = replace(QUIET, **disturbance)
        turns, after = (between(noise, order=order).mean() for order in ("turns", "after"))
        assert turns == pytest.approx(0, abs=2e-3)
        assert abs(after) > 2 * abs(turns)
    assert simulate(replace(QUIET, drift=0.10), design=Design(order="after"), families=50).false_alarm == 1
    assert simulate(replace(QUIET, drift=0.10), design=Design(order="turns"), families=50).false_alarm == 0


def test_processes_share_what_they_are_told_to_share():
    noise = Noise(name="x", process=(0.01,), shared=1.0, cells_per_process=2)
    found = between(noise, cells=4)
    assert found[:, 0] == pytest.approx(found[:, 1])
    assert np.corrcoef(found[:, 1].ravel(), found[:, 2].ravel())[0, 1] == pytest.approx(0, abs=0.1)


def test_slow_processes_and_throttling_slow_down():
    slow = between(Noise(name="x", process=(0.0,), slow_share=0.25, slow_by=0.04), families=2000)
    assert (np.abs(slow) > 0.03).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)
    ramp = between(Noise(name="x", process=(0.0,), throttle_share=1.0, throttle_by=0.1, throttle_cells=1.0), order="after")
    assert ramp.mean() > 0.03


def test_the_t_test_alone_keeps_its_level_on_normal_noise():
    """At the ignored slowdown itself, where the gate has the least room: at most alpha of families, one cell each."""
    noise = between(Noise(name="x", process=(0.05,)), slowdown=0.01, families=20_000, cells=1)
    found = find(of_rounds(noise), 0.0, Rule())
    assert found.slower.mean() <= 0.012


def test_the_guide_has_the_rates_that_come_out():
    """A tenth of the families, so within what chance makes of them."""
    guide = (Path(__file__).parents[1] / "docs" / "ci.md").read_text(encoding="utf-8")
    for noise, slowdown, rates in survey(families=40):
        effect = f"{100 * slowdown:g} %" if slowdown else "none"
        (row,) = [line.split("|") for line in guide.splitlines() if line.startswith(f"| {noise.name} | {effect} |")]
        printed = [float(cell.strip().removesuffix(" %") or 0) / 100 for cell in row[3:7]]
        assert [rates.found, rates.false_alarm, rates.green, rates.no_verdict] == pytest.approx(printed, abs=0.15)
