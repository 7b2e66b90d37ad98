"""What a simulated GPU does to a row raises its flag, and a quiet one raises none."""

import pytest

from moebench.case import case
from moebench.flags import raised
from moebench.plan import Plan, Point
from moebench.selfcheck import SCENARIOS, orders, scenarios
from moebench.simulated import Scenario, SimulatedStopwatch, measured
from moebench.timing import GPU_RULE


def flags_of(scenario, *, seed=0, turn=0):
    return raised(measured(SimulatedStopwatch(scenario, seed=seed, turn=turn), GPU_RULE))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("call_us", [2.0, 100.0, 5000.0])
def test_a_clean_clock_raises_no_flag(call_us, seed):
    assert flags_of(Scenario(call_us=call_us, process_noise=0.004, noise=0.008), seed=seed) == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_clock_that_throttles_raises_its_flag(seed):
    flags = flags_of(Scenario(throttle_after_s=0.4), seed=seed)
    assert "SM clock 1500 to 1980 MHz of 1980; hw_thermal active in" in flags["throttled"]
    assert "contended" not in flags  # the canary is slower by what the clock is slower


def test_a_clock_that_throttles_after_the_row_raises_nothing():
    assert flags_of(Scenario(throttle_after_s=60.0)) == {}


@pytest.mark.parametrize("drift_per_s", [0.1, 0.3, -0.1, -0.3])
def test_a_call_that_drifts_raises_its_flag(drift_per_s):
    assert list(flags_of(Scenario(drift_per_s=drift_per_s))) == ["unstable"]


def test_a_drift_that_moves_a_row_by_less_than_2_percent_raises_none():
    record = measured(SimulatedStopwatch(Scenario(drift_per_s=0.05)), GPU_RULE)
    start_s, end_s = record.timing.window_s
    assert 0.05 * (end_s - start_s) < 0.02
    assert raised(record) == {}


def test_a_throttled_row_shows_its_time_and_a_clean_one_too():
    clean = measured(SimulatedStopwatch(Scenario()), GPU_RULE)
    slow = measured(SimulatedStopwatch(Scenario(throttle_after_s=0.0)), GPU_RULE)
    assert clean.median_us == pytest.approx(100.0, rel=0.002)
    assert slow.median_us == pytest.approx(100.0 * 1980 / 1500, rel=0.002)
    assert clean.telemetry.sm_mhz == (1980.0, 1980.0, 1980.0)


def test_the_backend_that_does_not_come_first_raises_the_flag_where_the_clock_falls_far_enough():
    scenario = Scenario(warm_mhz=1860.0)
    assert flags_of(scenario, turn=0) == {}
    assert list(flags_of(scenario, turn=1)) == ["throttled"]
    assert flags_of(Scenario(warm_mhz=1940.0), turn=1) == {}  # 2 % are below what a flag can tell from an unhindered row


@pytest.mark.parametrize("warm_mhz", [1860.0, 1940.0])
def test_shuffled_rounds_remove_the_favour_of_the_first_and_a_fixed_order_keeps_it(warm_mhz):
    fixed, shuffled = orders(60, warm_mhz=warm_mhz)
    truth = 1980 / warm_mhz
    assert fixed.ratio == pytest.approx(truth, rel=0.001)
    assert fixed.low > 1
    assert not fixed.finds_nothing
    assert shuffled.finds_nothing
    assert abs(shuffled.ratio - 1) < abs(fixed.ratio - 1) / 2


def test_the_order_of_a_plan_gives_each_backend_the_first_turn_about_as_often():
    points = tuple(Point(case=case("gpt-oss-20b", 1), backend=name) for name in ("a", "b"))
    first = [group[0].backend for _, group in Plan(points=points, rounds=200).groups()][::2]
    assert 70 <= first.count("a") <= 130


def test_without_a_favour_both_orders_find_nothing():
    assert all(order.finds_nothing for order in orders(60, warm_mhz=1980.0))


def test_every_scenario_of_the_self_check_gets_what_it_expects():
    tried = {row.scenario: row for row in scenarios()}
    assert tried.keys() == SCENARIOS.keys()
    assert all(row.ok for row in tried.values())
    assert [row.expected for row in tried.values()].count("") == 1
