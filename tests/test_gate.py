"""The gate: its statistics against published values, and verdicts on runs whose truth is known."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import exp, inf, log, nan
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moebench.commands.gate import gate
from moebench.gate import Rule, _flips_agree, find, floors, holm, of_rounds, rounds_needed, t_quantile, t_tail
from moebench.journal import Run
from moebench.record import Kernel, Manifest
from moebench.verdict import Options, foresee, judge
from tests import rounds

ROOT = Path(__file__).parents[1]


def run(name, us=lambda cell, number: 100.0, *, cells=6, count=12, noise=0.002, change=None, device=rounds.DEVICE, minute=0):
    """A run in memory; change(row) replaces each row."""
    draw = random.Random(name)
    rows = rounds.rows(cells, count, lambda c, n: us(c, n) * exp(draw.gauss(0, noise)), run_id=name, minute=minute)
    manifest = Manifest(run_id=name, started="", command=(), device=device, plan={}, plan_hash="")
    return Run(path=Path(name), manifest=manifest, records=tuple(change(row) if change else row for row in rows))


def outcomes(judgement):
    return {verdict.case: verdict.outcome for verdict in judgement.verdicts}


def only(judgement, outcome):
    return [verdict for verdict in judgement.verdicts if verdict.outcome == outcome]


BASE = run("base")


# Two-sided 5 % and one-sided 0.05 % points as statistical tables print them.
@pytest.mark.parametrize(
    ("p", "degrees", "t"),
    [(0.025, 1, 12.706), (0.025, 2, 4.303), (0.025, 5, 2.571), (0.05, 11, 1.796), (0.05, 30, 1.697), (0.0005, 7, 5.408), (0.1, 11, 1.363)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(p, degrees, t):
    assert t_quantile(p, degrees) == pytest.approx(t, abs=5e-4)
    assert t_tail(np.array([t, -t]), np.array([degrees, degrees])) == pytest.approx([p, 1 - p], rel=2e-3)


def test_the_tail_of_students_t_is_the_area_under_its_density():
    for degrees in (3, 4, 11):
        x = np.linspace(1.5, 400, 400_001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        half = np.linspace(0, 400, 400_001)
        whole = 2 * np.trapezoid((1 + half**2 / degrees) ** (-(degrees + 1) / 2), half)
        assert t_tail(np.array([1.5]), np.array([degrees]))[0] == pytest.approx(np.trapezoid(density, x) / whole, abs=2e-5)


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_never_lets_order_turn():
    assert holm(np.array([0.01, 0.04, nan, 0.03])) == pytest.approx([0.03, 0.06, nan, 0.06], nan_ok=True)
    assert holm(np.array([0.01, 0.5]), 10) == pytest.approx([0.1, 1.0])


def test_rounds_give_the_mean_and_its_standard_error_and_leave_out_what_is_no_number():
    found = of_rounds(np.array([[0.01, 0.03, nan, 0.02], [nan, nan, nan, 0.5], [nan, nan, nan, nan]]))
    assert found.estimate[:2] == pytest.approx([0.02, 0.5])
    assert found.error[0] == pytest.approx(0.01 / 3**0.5)
    assert np.isnan(found.error[1:]).all()
    assert list(found.degrees) == [2, 0, 0]


def test_a_sign_flip_test_can_keep_a_t_test_from_being_believed():
    """One round in six is not slower: the mean is well above what is ignored for a t test that is content with 30 %."""
    row = np.array([[0.05, 0.05, 0.05, 0.05, -0.02, -0.02]])
    lax = Rule(alpha=0.3)
    effects = of_rounds(row)
    assert not find(effects, 0.0, lax).slower[0]
    assert find(replace(effects, differences=None), 0.0, lax).slower[0]


@pytest.mark.parametrize("rounds", [5, 6, 11, 12])
def test_a_sign_flip_test_counts_every_pattern_of_a_dozen_rounds(rounds):
    rows = np.random.default_rng(2).normal(0.2, 1, (200, rounds))
    patterns = np.array(list(product((1, -1), repeat=rounds)))
    rare = [(patterns @ row >= row.sum() - 1e-12).mean() <= 0.05 for row in rows]
    assert 5 < sum(rare) < 195
    assert _flips_agree(rows, np.ones(200, bool)).tolist() == rare
    spread = np.full((200, 30), np.nan)
    spread[:, 1 : 2 * rounds : 2] = rows  # where rounds are missing
    assert _flips_agree(spread, np.ones(200, bool)).tolist() == rare


@pytest.mark.parametrize("rounds", [13, 20, 64])
def test_a_sign_flip_test_of_many_rounds_is_wrong_as_often_as_it_says_and_finds_what_is_there(rounds):
    draw = np.random.default_rng(rounds)
    noise, every = draw.standard_t(3, (20_000, rounds)), np.ones(20_000, bool)
    assert _flips_agree(noise, every).mean() == pytest.approx(0.05, abs=0.006)
    assert _flips_agree(noise + 6 / rounds**0.5, every).mean() > 0.9
    assert not _flips_agree(noise, ~every).any()


def test_a_call_of_five_microseconds_is_not_judged_by_less_than_half_of_one():
    assert np.exp(floors(np.array([5.0, 500.0]))) - 1 == pytest.approx([0.1, 0.001])


def test_the_floor_is_three_standard_deviations_of_the_base_against_itself():
    control = np.array([[0.02, -0.02, 0.02, -0.02]])
    assert floors(np.array([1e4]), control)[0] == pytest.approx(3 * 0.04 / 3**0.5 / 2)


def test_the_printed_effect_is_found_with_the_promised_power():
    rule, draw, sd, trials = Rule(), np.random.default_rng(3), 0.01, 4_000
    noise = draw.normal(0, sd, (trials, 1, 12))
    sees = find(of_rounds(noise), 0.0, rule, tested=20).sees[:, 0]
    found = find(of_rounds(noise + np.median(sees)), 0.0, rule, tested=20).slower[:, 0]
    assert found.mean() == pytest.approx(0.9, abs=0.05)


def test_as_many_rounds_as_it_says_let_a_cell_see_the_threshold():
    rule, deviation = Rule(), 0.02
    needed = rounds_needed(deviation / 12**0.5, 12, 0.0, 60, rule)
    seen = []
    for count in (needed - 1, needed):
        pattern = np.resize([1.0, -1.0], count)
        row = (pattern - pattern.mean()) / np.std(pattern, ddof=1) * deviation
        seen.append(find(of_rounds(row[None, :]), 0.0, rule, tested=60).sees[0] <= rule.log_threshold)
    assert seen == [False, True]


@pytest.mark.parametrize(("threshold", "ignore"), [(0.01, 0.01), (0.0, 0.0), (1.0, 0.1), (nan, 0.01)])
def test_a_rule_without_room_between_ignored_and_forbidden_is_refused(threshold, ignore):
    with pytest.raises(ValueError, match="give 0 <= ignore < threshold"):
        Rule(threshold=threshold, ignore=ignore)


def test_the_same_code_is_green():
    found = judge(BASE, run("again"))
    assert found.answer == "pass"
    assert set(outcomes(found).values()) == {"same"}
    assert all(verdict.sees < 0.03 and not verdict.blind for verdict in found.verdicts)


def test_twenty_percent_is_red_and_named():
    found = judge(BASE, run("slow", lambda c, n: 120.0 if c == 2 else 100.0))
    assert found.answer == "fail"
    (slow,) = only(found, "slower")
    assert slow.case == rounds.cases(6)[2]
    assert slow.ratio == pytest.approx(1.2, abs=0.005)
    assert slow.low < 1.2 < slow.high
    assert found.verdicts[0] == slow


def test_swapped_runs_have_swapped_signs():
    slow = run("slow", lambda c, n: (120.0, 100.0, 90.0, 102.0, 97.0, 100.0)[c])
    there, back = judge(BASE, slow), judge(slow, BASE)
    flip = {"slower": "faster", "faster": "slower"}
    assert outcomes(back) == {case: flip.get(outcome, outcome) for case, outcome in outcomes(there).items()}
    assert {"slower", "faster"} < set(outcomes(there).values())
    ratios = {verdict.case: verdict.ratio for verdict in back.verdicts}
    assert [1 / ratios[verdict.case] for verdict in there.verdicts] == pytest.approx([verdict.ratio for verdict in there.verdicts])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_lines_in_the_files_changes_nothing(seed):
    slow = run("slow", lambda c, n: 110.0 if c == 1 else 100.0)
    mixed = [replace(one, records=tuple(random.Random(seed).sample(one.records, len(one.records)))) for one in (BASE, slow)]
    assert outcomes(judge(*mixed)) == outcomes(judge(BASE, slow))


def test_a_larger_effect_never_has_a_milder_verdict():
    order = ("same", "unclear", "slower")
    found = [
        order.index(judge(run("noisy", noise=0.01), run("x", lambda c, n, by=by: 100.0 * (1 + by), noise=0.01)).verdicts[0].outcome)
        for by in np.arange(0, 0.1, 0.0025)
    ]
    assert found == sorted(found)
    assert set(found) == {0, 1, 2}


def test_no_rounds_one_round_and_five_are_no_verdict():
    for count in (0, 1, 5):
        found = judge(BASE, run("few", count=count))
        assert found.answer == "none"
        assert not only(found, "same")
    assert "5 of the 6 rounds" in judge(BASE, run("few", count=5)).verdicts[0].reason


def test_two_empty_runs_are_no_verdict():
    found = judge(run("nothing", count=0), run("none", count=0))
    assert (found.answer, found.verdicts) == ("none", ())
    assert found.reasons == ("the runs have no case and backend in common that was timed",)


def test_a_run_is_not_compared_with_itself():
    found = judge(BASE, BASE)
    assert found.answer == "none"
    assert "same run" in found.reasons[0]


def test_runs_without_a_common_cell_are_no_verdict():
    found = judge(run("a", change=lambda row: replace(row, backend="a")), run("b", change=lambda row: replace(row, backend="b")))
    assert found.answer == "none"
    assert set(outcomes(found).values()) == {"missing"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: replace(row, device="NVIDIA H100"), "devices differ: NVIDIA H200 / NVIDIA H100"),
        (lambda row: replace(row, telemetry=replace(row.telemetry, power_limit_w=600.0)), "power limits differ: 700 W / 600 W"),
        (lambda row: replace(row, telemetry=replace(row.telemetry, mem_mhz=2619.0)), "memory clocks differ: 3201 MHz / 2619 MHz"),
        (
            lambda row: replace(row, canary=replace(row.canary, before_us=126.0, after_us=126.0)),
            "same copy.* took \\+5.0% in the candidate run",
        ),
        (lambda row: replace(row, canary=replace(row.canary, matmul_us=27.0)), "same matmul.* took \\+8.0% in the candidate run"),
    ],
)
def test_another_device_power_limit_memory_clock_or_slower_controls_are_no_verdict(change, reason):
    other = run("other", lambda c, n: 120.0, change=change)
    found = judge(BASE, other)
    assert found.answer == "none"
    assert not {"slower", "same"} & set(outcomes(found).values())
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reasons[0])


@pytest.mark.parametrize("field", ["l2_method", "reference", "warmup"])
def test_another_contract_is_no_verdict(field):
    other = run("other", change=lambda row: replace(row, contract=replace(row.contract, **{field: "none"})))
    if field == "warmup":
        other = run("other", change=lambda row: replace(row, contract=replace(row.contract, warmup="at least 1 s")))
    found = judge(BASE, other)
    assert found.answer == "none"
    assert "mean different things" in found.verdicts[0].reason


def test_another_sm_clock_makes_a_cell_unclear():
    def slow_clock(row):
        return replace(row, telemetry=replace(row.telemetry, sm_mhz=(1800.0, 1800.0, 1815.0))) if row.case == rounds.cases(6)[1] else row

    found = judge(BASE, run("clock", lambda c, n: 110.0 if c == 1 else 100.0, change=slow_clock))
    (unclear,) = only(found, "unclear")
    assert unclear.reason == "the SM clock was 1980 MHz for the base and 1800 MHz for the candidate"
    assert found.answer == "none"


@pytest.mark.parametrize(
    ("us", "mhz", "outcome"),
    [
        (100.0, 1935.0, "same"),  # at the base's clock it would take 97.7 to 100 us
        (100.0, 1900.0, "unclear"),  # or 96 to 100, perhaps more than 3 % faster
        (102.0, 1980.0, "same"),
        (101.5, 2015.0, "unclear"),  # or 101.5 to 103.3
        (106.0, 1935.0, "slower"),  # or 103.6
        (104.5, 1935.0, "unclear"),  # or 102.1, which may pass
        (97.0, 2015.0, "unclear"),  # or 98.7
        (95.0, 2012.0, "faster"),  # or 96.5
    ],
)
def test_a_small_difference_of_clocks_leaves_what_it_cannot_explain(us, mhz, outcome):
    def clock(row):
        return replace(row, telemetry=replace(row.telemetry, sm_mhz=(mhz, mhz, mhz))) if row.case == rounds.cases(6)[1] else row

    found = judge(BASE, run("clock", lambda c, n: us if c == 1 else 100.0, change=clock))
    assert outcomes(found)[rounds.cases(6)[1]] == outcome
    if outcome == "unclear":
        (unclear,) = only(found, "unclear")
        assert unclear.reason.endswith(f"the SM clock was 1980 MHz for the base and {mhz:.0f} MHz for the candidate")


def test_clocks_that_are_fixed_on_one_side_only_are_another_state():
    def fixed(row):
        seen = replace(row.telemetry, sm_mhz=(1905.0, 1905.0, 1905.0), reasons={"user_clocks": 1.0})
        return replace(row, telemetry=seen) if row.case == rounds.cases(6)[1] else row

    def slow(cell, _):
        return 110.0 if cell == 1 else 100.0

    (unclear,) = only(judge(BASE, run("fixed", slow, change=fixed)), "unclear")
    assert unclear.reason == "the SM clock was 1980 MHz for the base and 1905 MHz for the candidate"
    both = judge(run("fixed base", change=fixed), run("both fixed", slow, change=fixed))
    assert outcomes(both)[rounds.cases(6)[1]] == "slower"


def test_rows_at_the_power_limit_are_judged_by_how_they_spread_over_rounds():
    def capped(mhz, **reasons):
        def change(row):
            if row.case != rounds.cases(6)[1]:
                return row
            seen = replace(row.telemetry, sm_mhz=(mhz, mhz, 1980.0), reasons={"sw_power_cap": 1.0, **reasons})
            return replace(row, flags={"throttled": "SM clock 1800 of 1980 MHz; sw_power_cap"}, telemetry=seen)

        return change

    base = run("capped base", change=capped(1750.0))
    found = judge(base, run("capped", lambda c, n: 105.0 if c == 1 else 100.0, change=capped(1680.0)))  # the clocks are 4 % apart
    assert outcomes(found)[rounds.cases(6)[1]] == "slower"
    assert outcomes(judge(base, run("as fast", change=capped(1680.0))))[rounds.cases(6)[1]] == "same"
    restless = judge(base, run("restless", lambda c, n: 100.0 + 5 * (n % 2) if c == 1 else 100.0, change=capped(1750.0)))
    assert outcomes(restless)[rounds.cases(6)[1]] == "unclear"
    hot = judge(base, run("hot", change=capped(1750.0, sw_thermal_slowdown=0.2)))
    (unclear,) = only(hot, "unclear")
    assert unclear.reason == "12 of 12 rounds are in doubt: throttled"


def test_the_clock_of_a_round_that_does_not_count_does_not_count():
    mhz = {0: 1500.0, 1: 1500.0, 2: 1500.0, 3: 1935.0, 4: 1935.0, 5: 1935.0, 6: 1935.0}  # of all rounds the median is 1935, else 1980

    def clocks(row):
        if row.case != rounds.cases(6)[1] or row.round not in mhz:
            return row
        flags = {"throttled": "SM clock 1500 of 1980 MHz"} if mhz[row.round] == 1500.0 else {}
        return replace(row, flags=flags, telemetry=replace(row.telemetry, sm_mhz=(mhz[row.round],) * 3))

    found = judge(BASE, run("throttled", lambda c, n: 98.0 if c == 1 else 100.0, change=clocks))
    assert outcomes(found)[rounds.cases(6)[1]] == "same"  # 4 % faster, perhaps, had all rounds counted


def test_times_that_are_no_numbers_decide_nothing():
    def broken(row):
        return replace(row, timing=replace(row.timing, samples_us=(nan,))) if row.case == rounds.cases(6)[0] else row

    found = judge(BASE, run("nan", change=broken))
    assert found.answer == "none"
    assert outcomes(found)[rounds.cases(6)[0]] not in ("same", "faster", "slower")


def test_rows_in_doubt_neither_pass_nor_fail_a_cell():
    def flagged(row):
        return replace(row, flags={"throttled": "slow"}) if row.case in rounds.cases(2) else row

    found = judge(BASE, run("hot", lambda c, n: 130.0 if c == 0 else 100.0, change=flagged))
    assert [verdict.reason for verdict in only(found, "unclear")] == ["12 of 12 rounds are in doubt: throttled"] * 2
    assert found.answer == "none"
    allowed = judge(
        BASE, run("hot", lambda c, n: 130.0 if c == 0 else 100.0, change=flagged), Options(allowed_flags=frozenset({"throttled"}))
    )
    assert allowed.answer == "fail"


def test_where_every_row_is_in_doubt_the_flags_and_the_way_out_are_named():
    found = judge(BASE, run("noisy", change=lambda row: replace(row, flags={"unstable": "x"})))
    assert found.answer == "none"
    assert found.reasons == ("no cell has 6 rounds beyond doubt on both sides: unstable (--allow-flag uses them all the same)",)


def test_a_round_or_two_in_doubt_are_left_out():
    def flagged(row):
        return replace(row, flags={"unstable": "x"}, timing=replace(row.timing, samples_us=(900.0,))) if row.round in (3, 7) else row

    found = judge(BASE, run("doubt", change=flagged))
    assert {verdict.rounds for verdict in found.verdicts} == {10}
    assert found.answer == "pass"
    assert found.verdicts[0].flags == ("unstable",)


def test_a_missing_cell_fails_closed_unless_it_is_allowed_to():
    fewer = run("fewer", cells=5)
    for pair in ((BASE, fewer), (fewer, BASE)):
        assert judge(*pair).answer == "none"
        assert len(only(judge(*pair), "missing")) == 1
        assert judge(*pair, Options(allow_missing=True)).answer == "pass"


@pytest.mark.parametrize("status", ["wrong", "hang", "crash", "nondeterministic", "failed"])
def test_a_status_that_got_worse_in_one_round_is_red_whatever_the_times(status):
    def broken(row):
        here = row.case == rounds.cases(6)[4] and row.round == 5
        return replace(row, status=status, reason="why", timing=None) if here else row

    found = judge(BASE, run("bad", change=broken))
    assert found.answer == "fail"
    (bad,) = only(found, "broken")
    assert bad.reason == f"{status} in 1 of 12 rounds, which the base never was: why"
    assert judge(run("bad", change=broken), BASE).answer == "pass"  # 11 rounds are left


def test_an_interrupted_row_is_no_regression():
    found = judge(BASE, run("cut", change=lambda row: replace(row, status="interrupted", timing=None) if row.round == 11 else row))
    assert found.answer == "pass"
    assert {verdict.rounds for verdict in found.verdicts} == {11}


def test_rows_of_architectures_that_this_machine_is_not_are_nobodys_fault():
    other = run("other")
    skips = tuple(replace(row, arch="sm100", status="skipped", timing=None, reason="this machine is sm90") for row in other.records)
    for pair in ((BASE, replace(other, records=(*other.records, *skips))), (replace(other, records=(*other.records, *skips)), BASE)):
        assert judge(*pair).answer == "pass"


def test_what_runs_on_neither_side_is_no_cell():
    def gone(row):
        return replace(row, status="skipped", timing=None, reason="needs sm100") if row.case == rounds.cases(6)[0] else row

    found = judge(run("a", change=gone), run("b", change=gone))
    assert (found.answer, len(found.verdicts)) == ("pass", 5)


def test_a_backend_that_no_longer_runs_is_broken():
    gone = {
        status: run(status, change=lambda row, s=status: replace(row, status=s, timing=None, reason="x")) for status in ("skipped", "oom")
    }
    assert {status: judge(BASE, other).answer for status, other in gone.items()} == {"skipped": "fail", "oom": "fail"}


@pytest.mark.parametrize(
    ("rel_l2", "tolerance", "outcome"),
    [(0.002, 0.01, "same"), (0.0039, 0.01, "same"), (0.0041, 0.01, "broken"), (0.011, 0.02, "broken"), (nan, 0.01, "broken")],
)
def test_an_error_that_doubled_or_passed_the_bases_tolerance_is_broken(rel_l2, tolerance, outcome):
    error = replace(rounds.ERROR, rel_l2=rel_l2, rel_l2_tolerance=tolerance)
    found = judge(BASE, run("error", change=lambda row: replace(row, error=error)))
    assert set(outcomes(found).values()) == {outcome}


def test_an_error_far_below_its_tolerance_may_double():
    tiny = [run(f"{size}", change=lambda row, size=size: replace(row, error=replace(rounds.ERROR, rel_l2=size))) for size in (1e-7, 1e-5)]
    assert judge(*tiny).answer == "pass"


def test_other_kernels_and_tactics_are_told_and_fail_where_that_is_asked():
    other = run(
        "tactic",
        change=lambda row: replace(
            row, kernels=(Kernel(name="moe_gemm", count=2), Kernel(name="zero", count=2)), facts={**row.facts, "tactic": 9, "tuning_s": 4.2}
        ),
    )
    found = judge(BASE, other)
    assert found.answer == "pass"
    assert found.verdicts[0].changes == ("3 -> 4 kernels a call; no longer finalize; now zero", "tactic: 7 -> 9")
    strict = judge(BASE, other, Options(strict=True))
    assert strict.answer == "fail"
    assert set(outcomes(strict).values()) == {"broken"}


def test_a_base_that_differs_from_itself_is_no_verdict():
    slower = run("slower", lambda c, n: 104.0)
    assert judge(BASE, slower, control=run("control")).answer == "fail"
    found = judge(BASE, slower, control=run("moved", lambda c, n: 104.0 if c == 1 else 100.0))
    assert found.answer == "none"
    assert found.reasons[0].startswith("the environment changed: the base differs from itself by +4.")


def test_a_control_that_varies_widens_a_cells_threshold():
    found = judge(BASE, run("slower", lambda c, n: 104.0), control=run("control", noise=0.05))
    assert all(0.03 < verdict.threshold < 0.10 and verdict.blind for verdict in found.verdicts)
    assert [verdict.outcome for verdict in found.verdicts if verdict.threshold > 0.05] == ["same"] * 3
    assert not judge(BASE, run("slower", lambda c, n: 104.0)).verdicts[0].blind


def test_noise_is_no_verdict_and_the_cells_that_see_too_little_are_named():
    found = judge(run("n1", noise=0.05), run("n2", noise=0.05))
    assert found.answer == "none"
    assert all(verdict.blind and verdict.sees > 0.03 for verdict in found.verdicts)


def test_one_run_foretells_what_a_gate_will_see():
    told = foresee(run("quiet", noise=0.001)) + foresee(run("loud", noise=0.04))
    assert [verdict.blind for verdict in told] == [False] * 6 + [True] * 6
    assert all(verdict.outcome == "unclear" and verdict.ratio is None for verdict in told)
    assert foresee(run("one", count=1))[0].blind


def test_runs_one_after_the_other_are_noted():
    assert judge(BASE, run("late", minute=30)).notes
    assert not judge(BASE, run("again")).notes


def invoke(*words):
    done = CliRunner().invoke(gate, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Runs on disk by name."""
    home = tmp_path_factory.mktemp("runs")
    slow = run("slow", lambda c, n: 120.0 if c == 2 else 100.0)
    kinds = {"base": BASE, "again": run("again"), "slow": slow, "one": run("one", count=1), "empty": run("empty", count=0)}
    for name, kind in kinds.items():
        rounds.run(home / name, list(kind.records))
    return home


@pytest.mark.parametrize(
    ("names", "code"), [(("base", "again"), 0), (("base", "slow"), 1), (("base", "one"), 4), (("empty", "empty"), 4), (("base", "no"), 6)]
)
def test_exit_status_is_0_1_4_or_6(stored, names, code):
    done = invoke(*(stored / name for name in names), "--format", "json")
    assert done.exit_code == code
    if code != 6:
        assert json.loads(done.stdout)["exit_code"] == code


def test_red_prints_the_commands_that_explain_it(stored):
    done = invoke(stored / "base", stored / "slow")
    assert "moebench profile --diff base.profile.json candidate.profile.json" in done.stdout
    assert "moebench profile --model gpt-oss-20b --tokens 3 --backend triton_mxfp4_bf16 --save base.profile.json" in done.stdout


def test_the_profile_command_takes_what_the_gate_prints():
    from moebench.commands.profile import profile

    names = {option for parameter in profile.params for option in parameter.opts}
    assert {"--model", "--tokens", "--top-k", "--ep", "--ep-ranks", "--tp", "--tp-ranks", "--routing", "--seed", "--backend"} < names
    assert {"--save", "--diff"} < names


def test_options_that_contradict_are_refused(stored):
    done = invoke(stored / "base", stored / "again", "--threshold", "1", "--ignore", "2")
    assert done.exit_code == 2
    assert "--threshold 1 --ignore 2" in done.stderr
    done = invoke(stored / "base", stored / "again", "--trust-stored")
    assert done.exit_code == 2


def test_a_larger_threshold_lets_a_slowdown_pass(stored):
    assert invoke(stored / "base", stored / "slow", "--threshold", "45").exit_code == 0


def test_every_output_is_written_beside_the_table(stored, tmp_path):
    files = {name: tmp_path / name for name in ("json-out", "junit", "comment", "summary")}
    files["summary"].write_text("before\n")
    done = invoke(stored / "base", stored / "slow", *(word for name, file in files.items() for word in (f"--{name}", file)), "--annotate")
    assert done.exit_code == 1
    assert files["summary"].read_text().startswith("before\n## moebench gate: red")
    assert files["comment"].read_text().startswith("## moebench gate: red")
    assert json.loads(files["json-out"].read_text())["answer"] == "fail"
    assert b'failures="1"' in files["junit"].read_bytes()
    assert done.stderr.startswith("::error title=gpt-oss-20b M=3 triton_mxfp4_bf16::slower: +2")


def test_the_gate_needs_no_torch():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'flashinfer', 'scipy')))\n"
        "import moebench.commands.gate, moebench.commands.baseline, moebench.gate_simulation"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ratios_are_never_infinite_in_json(stored):
    cells = json.loads(invoke(stored / "base", stored / "again", "--format", "json").stdout)["cells"]
    for cell, name in product(cells, ("ratio", "low", "high", "sees")):
        assert -inf < log(1 + abs(cell[name])) < inf
