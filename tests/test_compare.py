"""Two runs beside each other: what is matched, how sure a ratio is, and what is refused."""

import gc
import json
import random
from dataclasses import replace
from math import exp, log, sqrt
from statistics import fmean, variance

import pytest
from click.testing import CliRunner
from rich.console import Console

from moebench.brief import briefs
from moebench.case import case
from moebench.commands.compare import compare as command
from moebench.compare import Sensed, compare, environment, rounds_of, student_t
from moebench.compare import ratio as ratio_of
from moebench.record import Contract, Telemetry
from moebench.reports import comparison as pages
from tests.made_runs import H200, rounds, run, timed, timing, untimed, write_run

CONTRACT = Contract(
    scope="experts", inside="all", clock="cuda_graph", l2="cold", l2_method="rotation", warmup="rule", rank_aggregate="each", reference="r"
)


def screen(comparison, differences=(), width=80):
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(pages.table(comparison, differences, ("a", "b")))
    return captured.get()


def ratio(*sides):
    """Of the timings of base and candidate."""
    rows = ([replace(timed("a", 1, 1.0), timing=timing, round=number) for number, timing in enumerate(side)] for side in sides)
    return ratio_of(*(rounds_of(list(briefs(side))) for side in rows))


def called(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # published tables, four digits
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799), (399, 1.9659)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-5)


def test_rounds_are_the_unit_of_the_interval():
    base, candidate = [100.0, 101.0, 99.0, 100.5], [90.0, 91.0, 89.5]
    found = ratio([timing(us, spread=0.5) for us in base], [timing(us, spread=0.5) for us in candidate])
    logs = [log(us) for us in base], [log(us) for us in candidate]
    parts = [variance(side) / len(side) for side in logs]
    degrees = int(sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, logs, strict=True)))
    half = student_t(degrees) * sqrt(sum(parts))
    center = fmean(logs[1]) - fmean(logs[0])
    assert (found.value, found.low, found.high) == pytest.approx((exp(center), exp(center - half), exp(center + half)))
    assert found.decided
    assert not found.within_process


def test_within_one_process_the_two_median_intervals_are_added_in_quadrature():
    base, candidate = timing(100.0), timing(110.0, spread=0.02)
    found = ratio([base], [candidate])
    down = sqrt(log(110 / candidate.interval_us[0]) ** 2 + log(base.interval_us[1] / 100) ** 2)
    up = sqrt(log(candidate.interval_us[1] / 110) ** 2 + log(100 / base.interval_us[0]) ** 2)
    assert (found.value, found.low, found.high) == pytest.approx((1.1, 1.1 * exp(-down), 1.1 * exp(up)))
    assert found.within_process


def test_a_single_round_against_several_is_within_one_process():
    found = ratio([timing(100.0)], [timing(us) for us in (99.0, 100.0, 101.0)])
    assert found.within_process
    assert found.low < 1 < found.high


def test_rounds_without_any_spread_are_decided_by_any_difference():
    assert ratio([timing(100.0)] * 2, [timing(101.0)] * 2).decided
    assert not ratio([timing(100.0)] * 2, [timing(100.0)] * 2).decided


def test_five_samples_have_no_interval_and_decide_nothing():
    found = ratio([timing(100.0, samples=5)], [timing(200.0)])
    assert (found.low, found.high, found.decided) == (None, None, False)
    assert "? 2.000" in screen(compare([timed("a", 1, 100.0, how={"samples": 5})], [timed("a", 1, 200.0)]))


def test_swapping_the_runs_inverts_ratio_and_interval():
    one, other = [timing(us) for us in (100.0, 103.0)], [timing(us) for us in (97.0, 99.0, 98.0)]
    there, back = ratio(one, other), ratio(other, one)
    assert (there.value, there.low, there.high) == pytest.approx((1 / back.value, 1 / back.high, 1 / back.low))


@pytest.mark.parametrize(("num_rounds", "least"), [(2, 0), (3, 20), (8, 60)])  # Welch is careful with few
def test_of_equal_runs_at_most_about_one_in_twenty_is_decided(num_rounds, least):
    noise = random.Random(7)

    def side():
        return [timing(100 * exp(noise.gauss(0, 0.005)), samples=7) for _ in range(num_rounds)]

    decided = sum(ratio(side(), side()).decided for _ in range(2000))
    assert least <= decided <= 130  # 100 expected, 3 standard deviations are 29


def test_decided_cells_come_first_and_the_largest_change_of_either_sign_first():
    base = [timed("a", m, 100.0) for m in (1, 2, 4, 8)]
    candidate = [timed("a", m, us) for m, us in ((1, 100.01), (2, 120.0), (4, 70.0), (8, 99.9))]
    assert [cell.case.num_tokens for cell in compare(base, candidate).cells] == [4, 2, 8, 1]


@pytest.mark.parametrize(
    "other",
    [
        timed("b", 1, 50.0),
        timed("a", 2, 50.0),
        timed("a", 1, 50.0, seed=1),
        timed("a", 1, 50.0, record={"scope": "layer"}),
    ],
)
def test_only_the_same_case_backend_and_scope_are_matched(other):
    found = compare([timed("a", 1, 100.0)], [other])
    assert found.cells == ()
    assert sorted(row.reason for row in found.alone) == ["only in base", "only in candidate"]


@pytest.mark.parametrize(
    ("changed", "difference", "word"),
    [
        ({"record": {"device": "NVIDIA H100"}}, "device NVIDIA H200 / NVIDIA H100", "device"),
        (
            {"how": {"l2": "hot"}},
            "contract cuda_graph, cold L2, 1.0-cuda_graph-cold / cuda_graph, hot L2, 1.0-cuda_graph-hot",
            "contract",
        ),
    ],
)
def test_other_devices_and_contracts_are_compared_only_across_and_every_line_says_so(changed, difference, word):
    sides = [timed("a", 1, 100.0), timed("a", 2, 100.0)], [timed("a", m, 50.0, **changed) for m in (1, 2)]
    refused = compare(*sides)
    assert (refused.cells, [row.reason for row in refused.mismatched]) == ((), [difference] * 2)
    across = compare(*sides, across=True)
    assert [(cell.across, cell.ratio.value) for cell in across.cells] == [((word,), pytest.approx(0.5))] * 2
    assert across.across == (difference,)
    lines = screen(across, width=130).splitlines()
    assert all(line.endswith(word) for line in lines if line.startswith("M="))
    assert sum(line.startswith("M=") for line in lines) == 2


def test_contracts_say_in_which_field_they_differ():
    hot = replace(CONTRACT, l2="hot", l2_method="replay")
    found = compare([timed("a", 1, 9.0, record={"contract": CONTRACT})], [timed("a", 1, 9.0, record={"contract": hot})])
    assert found.mismatched[0].reason == "contract l2 cold / hot, l2_method rotation / replay"


def test_of_several_contracts_the_common_one_is_compared_and_the_other_listed():
    cold, hot = timed("a", 1, 100.0), timed("a", 1, 60.0, how={"l2": "hot"})
    found = compare([cold, hot], [timed("a", 1, 90.0)])
    assert [cell.ratio.value for cell in found.cells] == [pytest.approx(0.9)]
    assert [row.reason for row in found.alone] == ["under this contract only in base: cuda_graph, hot L2, 1.0-cuda_graph-hot"]


def test_a_row_that_went_wrong_is_told_with_its_reason():
    found = compare([timed("a", 1, 100.0)], [untimed("a", 1, "wrong", "relative L2 error 0.3")])
    assert [(row.base, row.candidate, row.reason) for row in found.changed] == [("ok", "wrong", "relative L2 error 0.3")]
    assert "M=1  a  ok -> wrong: relative L2 error 0.3" in screen(
        replace(found, cells=compare([timed("b", 1, 1.0)], [timed("b", 1, 1.0)]).cells)
    )


def test_what_failed_in_both_in_the_same_way_is_no_news():
    row = untimed("a", 1, "skipped", "needs sm100")
    found = compare([row], [row])
    assert (found.changed, found.alone, found.mismatched) == ((), (), ())


def test_a_time_that_is_not_the_kernels_is_not_compared():
    found = compare([timed("a", 1, 100.0)], [timed("a", 1, 9.0, how={"comparable": False})])
    assert [row.reason for row in found.changed] == ["its time does not describe the kernel"]


def test_flags_of_either_side_mark_the_line():
    doubtful = timed("a", 1, 100.0, record={"flags": {"throttled": "why"}})
    found = compare([doubtful], [timed("a", 1, 100.0)])
    assert found.cells[0].flags == ("throttled",)
    assert "!~ 1.000" in screen(found)
    assert "! a time is in doubt: throttled" in screen(found)


def test_environment_lists_only_what_differs_and_clocks_from_telemetry():
    def seen(mhz):
        telemetry = Telemetry(
            samples=9,
            sm_mhz=(mhz - 9, mhz, mhz + 9),
            max_sm_mhz=1980,
            mem_mhz=3201,
            power_w=600,
            power_limit_w=700,
            temperature_c=60,
            reasons={},
            energy_j=None,
            window_s=1,
            ecc_corrected=0,
            ecc_uncorrected=0,
            foreign_bytes=0,
        )
        return timed("a", 1, 100.0, record={"telemetry": telemetry})

    other = replace(H200, driver="590.1", versions={"torch": "2.14.0"})
    runs = run(seen(1980.0)), run(seen(1755.0), device=other)
    sensed = Sensed(), Sensed()
    for one, told in zip(runs, sensed, strict=True):
        told.add(one.records[0].telemetry)
    found = environment((runs[0].manifest, sensed[0]), (runs[1].manifest, sensed[1]))
    assert [(d.what, d.base, d.candidate) for d in found] == [
        ("driver", "580.159.04", "590.1"),
        ("SM clock, median of rows", "1980 MHz", "1755 MHz"),
        ("torch", "2.13.0", "2.14.0"),
    ]


def test_every_cell_of_one_round_has_an_interval_whatever_its_case_hashes_to():
    rows = [timed("a", 1, 100.0, seed=seed) for seed in (-1, -2, 0, 2**61 - 1)]  # hash(-1) == hash(-2)
    assert [cell.ratio.low is not None for cell in compare(rows, rows).cells] == [True] * 4


def test_one_round_is_said_to_be_within_one_process_and_two_are_not():
    alone = compare([timed("a", 1, 100.0)], [timed("a", 1, 90.0)])
    assert "intervals are within one process" in screen(alone)
    twice = compare(rounds("a", 1, (100.0, 101.0)), rounds("a", 1, (90.0, 91.0)))
    assert "within one process" not in screen(twice)


def test_the_table_fits_80_columns():
    names = ("cutlass_mxfp4_bf16", "openai_triton_kernels", "cutlass_mxfp4_bf16@untuned")
    rows = [timed(name, m, 10.0 * m) for name in names for m in (1, 16384)]
    lines = screen(compare(rows, rows)).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[1] for line in lines if line.startswith("M=16384")] == sorted(names)


def test_the_command_prints_json_with_numbers_in_full(tmp_path):
    base = write_run(tmp_path / "a", timed("a", 1, 100.0), timed("b", 1, 50.0))
    candidate = write_run(tmp_path / "b", timed("a", 1, 90.0))
    done = called(base, candidate, "--format", "json")
    page = json.loads(done.output)
    assert (done.exit_code, page["base"]) == (0, str(base))
    assert [(cell["backend"], cell["ratio"], cell["decided"], cell["rounds"]) for cell in page["cells"]] == [
        ("a", pytest.approx(0.9), True, [1, 1])
    ]
    assert page["cells"][0]["case"]["num_tokens"] == 1
    assert [(row["backend"], row["base"], row["candidate"]) for row in page["alone"]] == [("b", "ok", None)]


def test_the_command_prints_markdown_in_which_foreign_text_stays_text(tmp_path):
    base = write_run(tmp_path / "a", timed("a", 1, 100.0), timed("b", 1, 50.0))
    candidate = write_run(tmp_path / "b", timed("a", 1, 90.0), untimed("b", 1, "crash", "<b>|x|"), versions={"moebench": "0.2.0"})
    shown = called(base, candidate, "--format", "md").output.splitlines()
    assert "| moebench | 0.1.0 | 0.2.0 |" in shown
    assert "| gpt-oss-20b M=1 | a | 100.0 | 90.0 | 0.900 | 0.895-0.905 |  |" in shown
    assert "| gpt-oss-20b M=1 | b | ok | crash | &lt;b&gt;\\|x\\| |" in shown


def test_the_command_refuses_with_4_what_cannot_be_compared(tmp_path):
    base = write_run(tmp_path / "a", timed("a", 1, 100.0))
    other = write_run(tmp_path / "b", timed("a", 1, 90.0, record={"device": "NVIDIA H100"}), device=replace(H200, name="NVIDIA H100"))
    empty = write_run(tmp_path / "c", untimed("a", 1, "crash", "signal 11"))
    refused = called(base, other)
    assert refused.exit_code == 4
    assert "(device NVIDIA H200 / NVIDIA H100); --across compares them all the same" in refused.output
    assert called(base, other, "--across").exit_code == 0
    assert (called(base, empty).exit_code, f"{empty} has no times" in called(base, empty).output) == (4, True)


def test_the_command_leaves_the_garbage_collector_as_it_was(tmp_path):
    path = write_run(tmp_path / "a", timed("a", 1, 100.0))
    assert (called(path, path).exit_code, gc.isenabled()) == (0, True)
    assert (called(path, tmp_path).exit_code, gc.isenabled()) == (6, True)


def test_the_command_says_which_directory_holds_no_run(tmp_path):
    done = called(write_run(tmp_path / "a"), tmp_path)
    assert done.exit_code == 6
    assert f"{tmp_path} is not a run directory" in done.output


def test_a_case_keeps_its_whole_name_where_models_differ():
    rows = [timed("a", 1, 100.0), timed("a", 1, 100.0, model="gpt-oss-120b")]
    shown = screen(compare(rows, rows))
    assert case("gpt-oss-120b", 1).label in shown
    assert case("gpt-oss-20b", 1).label in shown
