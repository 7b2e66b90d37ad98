"""Records made by hand, and exactly what each report says of them."""

import csv
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moebench.case import CASE_FIELDS, case
from moebench.device import Device
from moebench.journal import Run
from moebench.realized import Realized
from moebench.record import Error, Kernel, Manifest, Record, Timing
from moebench.reports import grid, markdown, table_csv, terminal, text, tuning
from moebench.reports.digest import overview_of_records

ROOT = Path(__file__).parents[1]
ERROR = Error(rel_l2=1.8e-3, worst=0.01, worst_token=3, worst_column=17, max_abs=0.25, rel_l2_tolerance=5e-3, worst_tolerance=0.05)


def timing(median_us, spread_us=1.0, **changed):
    """Three samples: their 95 % interval is first to last."""
    values = {"clock": "cuda_graph", "l2": "cold", "l2_method": "read 256 MiB", "warmup_calls": 5} | changed
    return Timing(samples_us=(median_us - spread_us, median_us, median_us + spread_us), **values)


def ok(backend, num_tokens, median_us, *, error=ERROR, time="1", timed=None, **case_fields):
    routed = Realized(
        active_experts=4, empty_experts=4, local_pairs=4 * num_tokens, load_max_over_mean=1.5, pairs_per_rank=(1, 2), sha256="ab"
    )
    return Record(
        case=case("tiny", num_tokens, **case_fields),
        backend=backend,
        act_dtype="bf16",
        arch="sm90",
        device="NVIDIA H200",
        status="ok",
        error=error,
        timing=timed or timing(median_us),
        routing=routed,
        prepare_s=1.25,
        run_id="r1",
        time=time,
    )


def bad(backend, num_tokens, status, reason, **case_fields):
    return replace(ok(backend, num_tokens, 1.0, **case_fields), status=status, reason=reason, timing=None, error=None, routing=None)


def run(*records, **changed):
    device = Device(
        arch="sm90",
        name="NVIDIA H200",
        torch="cuda:0",
        memory_bytes=140 << 30,
        num_sms=132,
        driver="580.159.04",
        versions={"torch": "2.13.0"},
    )
    values = {"run_id": "r1", "started": "2026-11-22T00:00:00+00:00", "command": ("moebench", "sweep", "--tokens", "1 2"), "device": device}
    manifest = Manifest(plan={}, plan_hash="abcdef", versions={"moebench": "0.1.0"}, **(values | changed))
    return Run(path=Path("r1"), manifest=manifest, records=records)


def page(*records):
    return markdown.report([run(*records)]).splitlines()


def screen(renderable, width=100):
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_the_fastest_is_bold_and_overlapping_intervals_tie():
    shown = page(ok("torch", 4, 900.0), ok("a", 4, 100.0), ok("b", 4, 101.9), ok("c", 4, 102.1))
    assert "| tokens | torch | a | b | c |" in shown
    assert "| 4 | 900.0 | **100.0** | ~ 101.9 | 102.1 |" in shown


def test_a_backend_alone_has_beaten_nobody():
    assert "| 4 | 100.0 |" in page(ok("a", 4, 100.0))


def test_a_time_that_is_not_the_kernels_is_neither_fastest_nor_in_a_ratio():
    shown = page(
        ok("torch", 4, 200.0),
        ok("interpreted", 4, 0, timed=timing(50.0, comparable=False, note="ran in Triton's interpreter")),
        ok("a", 4, 100.0),
    )
    assert "| 4 | 200.0 | 50.0† | **100.0** |" in shown
    assert "| 4 | 2.00x |" in shown
    assert "- interpreted: ran in Triton's interpreter" in shown


def test_speed_ups_are_over_torch_and_without_it_over_the_first_that_counts():
    assert "Times as fast as torch:" in page(ok("a", 4, 100.0), ok("torch", 4, 900.0))
    shown = page(ok("dagger", 4, 0, timed=timing(5.0, comparable=False)), ok("a", 4, 100.0), ok("b", 4, 50.0))
    assert "Times as fast as a:" in shown
    assert "| 4 | 2.00x |" in shown


@pytest.mark.parametrize("other", [{"clock": "cuda_events"}, {"l2": "hot"}])
def test_two_ways_of_timing_are_never_in_one_table(other):
    records = ok("a", 4, 100.0), ok("b", 4, 0, timed=timing(50.0, **other)), ok("b", 8, 60.0)
    assert [found.backends for found in grid.families(records)[0].grids()] == [("a", "b"), ("b",)]
    assert "**100.0**" not in "\n".join(page(*records))


def test_two_activation_formats_are_never_in_one_table_and_their_tables_say_which():
    records = ok("a", 4, 100.0), ok("b", 4, 120.0), replace(ok("hopper_mxfp4_fp8", 4, 50.0), act_dtype="fp8_pow2")
    (family,) = grid.families(records)
    assert [(found.title, found.backends) for found in family.grids()] == [
        ("CUDA graph replay, cold L2, bf16 activations", ("a", "b")),
        ("CUDA graph replay, cold L2, fp8_pow2 activations", ("hopper_mxfp4_fp8",)),
    ]
    shown = page(*records)
    assert "| 4 | **100.0** | 120.0 |" in shown
    assert "| 4 | 50.0 |" in shown
    (answered,) = (line for line in shown if line.startswith("- tiny"))
    assert answered.endswith("bf16 activations: At 4 tokens a is fastest (1.20x as fast as the next).")
    assert [(one.backend, one.compared, one.how) for one in overview_of_records(records).layers.standings] == [
        ("a", 1, "CUDA graph replay, cold L2"),
        ("b", 1, "CUDA graph replay, cold L2"),
    ]


def test_a_cell_whose_time_was_taken_in_another_way_says_so():
    shown = page(ok("a", 4, 100.0), ok("b", 4, 0, timed=timing(50.0, clock="cuda_events")), ok("b", 8, 60.0), ok("a", 8, 61.0))
    assert "| 4 | 100.0 | eager |" in shown


@pytest.mark.parametrize("changed", [{"arch": "sm100"}, {"device": "NVIDIA H100"}])
def test_two_devices_are_never_in_one_table(changed):
    records = ok("a", 4, 100.0), replace(ok("b", 4, 50.0), **changed)
    assert sorted(found.grids()[0].backends for found in grid.families(records)) == [("a",), ("b",)]


def test_a_spread_layer_is_as_slow_as_its_slowest_rank():
    ranks = [ok("a", 8, us, ep_size=2, ep_rank=rank) for rank, us in enumerate((30.0, 50.0))]
    shown = page(*ranks, ok("b", 8, 60.0, ep_size=2, ep_rank=0), ok("b", 8, 44.0, ep_size=2, ep_rank=1))
    assert "**CUDA graph replay, cold L2** (read 256 MiB). Each cell: slowest of 2 ranks." in shown
    assert "| 8 | **50.0** | 60.0 |" in shown
    assert "| 8 | a | 2/2 | 50.0 | ep rank 1 | 40.0 | 1.25x |" in shown
    assert "| 8 | b | 2/2 | 60.0 | ep rank 0 | 52.0 | 1.15x |" in shown


def test_a_backend_that_lacks_a_rank_is_not_compared():
    whole = [ok("a", 8, 50.0, ep_size=2, ep_rank=rank) for rank in (0, 1)]
    half = [ok("b", 8, 20.0, ep_size=2, ep_rank=0), bad("b", 8, "wrong", "", ep_size=2, ep_rank=1)]
    assert "| 8 | 50.0 | 20.0 (1/2) |" in page(*whole, *half)


def test_one_rank_is_named():
    assert "Each cell: tp rank 0, ep rank 1 only." in "\n".join(page(ok("a", 8, 50.0, ep_size=2, ep_rank=1, tp_size=2)))


def test_a_failed_point_keeps_its_place_in_the_table_and_its_reason_in_the_list():
    shown = page(ok("a", 1, 10.0), ok("b", 1, 20.0), ok("a", 2, 10.0), bad("b", 2, "failed", "in phase time: out of memory"))
    assert "| 2 | 10.0 | failed |" in shown
    assert "| failed | b | tiny M=2 | sm90 | in phase time: out of memory |" in shown


def test_skips_are_grouped_by_reason_with_counts():
    reason = "needs sm100, this is sm90"
    shown = page(*(bad(name, m, "skipped", reason) for name in ("a", "b") for m in (1, 2)), bad("a", 4, "skipped", "other"))
    assert "| 4 | needs sm100, this is sm90 | a, b | tiny M=1 |" in shown
    assert "| 1 | other | a | tiny M=4 |" in shown
    assert "5 records: 5 skipped." in shown
    assert "## Times" not in shown


def test_numerics_show_the_worst_row_of_each_backend_with_its_tolerance():
    large = replace(ERROR, rel_l2=4e-3, worst=0.001)
    shown = page(ok("a", 1, 10.0), ok("a", 2, 10.0, error=large), ok("a", 4, 10.0, error=replace(ERROR, rel_l2=1e-4)))
    row = "| a | bf16 | sm90 | 3 | 4.00e-03 / 5.00e-03 | tiny M=2 | 1.00e-02 / 5.00e-02 | tiny M=1, token 3, column 17 |"
    assert row in shown


def test_routing_facts_are_those_of_the_cases():
    shown = page(ok("a", 4, 10.0), ok("b", 4, 20.0))
    assert "Routing over 8 local experts:" in shown
    assert shown.count("| 4 | 4 | 16 | 1.50 |") == 1


def test_each_run_tells_device_versions_plan_and_command():
    shown = page(ok("a", 4, 10.0))
    assert "- device: NVIDIA H200 (sm90, 140 GiB, 132 SMs, driver 580.159.04)" in shown
    assert "- versions: torch 2.13.0, moebench 0.1.0" in shown
    assert "- command: moebench sweep --tokens '1 2'" in shown
    assert "- plan: abcdef" in shown


def test_runs_are_merged_a_later_one_over_an_earlier_one():
    early, late = run(ok("a", 4, 10.0, time="1")), run(ok("a", 4, 20.0, time="2"), run_id="r2")
    shown = markdown.report([late, early]).splitlines()
    assert "| 4 | 20.0 |" in shown
    assert "1 record: 1 ok." in shown
    assert {"### r1", "### r2"} <= set(shown)


def test_a_page_without_records_says_so():
    assert "No records." in page()


def test_foreign_text_cannot_write_markdown():
    told = "a | b\n`c` <img src=x> [link](http://x) **d** \x1b[31m\u202e \ud800"
    row = next(line for line in page(bad("a", 1, "failed", told)) if line.startswith("| failed"))
    assert row == "| failed | a | tiny M=1 | sm90 | a \\| b \\`c\\` &lt;img src=x&gt; \\[link\\](http://x) \\*\\*d\\*\\* \\[31m |"
    row.encode()


def test_csv_reads_back_with_every_case_field_and_full_numbers():
    record = ok("a", 4, 0, timed=timing(100.123456789), ep_size=2, ep_rank=1)
    (row,) = csv.DictReader(io.StringIO(table_csv.rows([record])))
    assert {name: row[name] for name in CASE_FIELDS} == {name: str(getattr(record.case, name)) for name in CASE_FIELDS}
    assert float(row["median_us"]) == 100.123456789
    assert (float(row["ci_low_us"]), float(row["ci_high_us"])) == (99.123456789, 101.123456789)
    assert float(row["q1_us"]) == pytest.approx(99.623456789)
    assert (row["n_samples"], row["clock"], row["l2"], row["comparable"]) == ("3", "cuda_graph", "cold", "true")
    assert (row["prepare_s"], row["rel_l2"], row["routing_pairs_per_rank"]) == ("1.25", "0.0018", "1 2")


def test_what_really_ran_is_told_once_for_all_cases_where_it_is_the_same():
    ran = {"facts": {"padding": 64, "s": 0.123456}, "kernels": (Kernel(name="void a::gemm<a|b>", count=2), Kernel(name="k|" * 60, count=1))}
    records = [replace(ok("a", m, 10.0), **ran) for m in (1, 2)]
    shown = page(*records)
    piped = "k\\|" * 49
    assert f"| a | sm90 | gemm x2, {piped}k… | 2 | tiny M=1 |" in shown
    assert "| a | sm90 | padding=64, s=0.1235 | 2 | tiny M=1 |" in shown
    row = next(csv.DictReader(io.StringIO(table_csv.rows(records))))
    assert (row["facts"], row["kernels"]) == ("padding=64; s=0.123456", f"2 void a::gemm<a|b>; 1 {'k|' * 60}")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("gate_up_kernel", "gate_up_kernel"),
        ("void marlin_moe_wna16::Marlin<112l, 5629l>(int4 const*)", "Marlin"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("_ZN7cutlass13device_kernelINS_4gemm6kernel33GemmUniversal", "device_kernel"),
        ("_ZN999", "_ZN999"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_a_kernel_is_called_by_its_own_name(name, plain):
    assert text.kernel_name(name) == plain


def test_a_tuned_backend_that_is_slower_than_untuned_is_told():
    pair = ok("x", 4, 110.0), ok("x@untuned", 4, 100.0)
    row = "| x | tiny M=4 | sm90 | CUDA graph replay, cold L2 | 110.0 | 100.0 | 1.10x |"
    shown = page(*pair, ok("x", 8, 90.0), ok("x@untuned", 8, 100.0))
    assert "## Tuning" in shown
    assert [line for line in shown if line.startswith("| x | tiny")] == [row]
    assert "tuned slower than untuned by more than 2 %: 1 point, worst x tiny M=4, 1.10x" in screen(terminal.summary(pair))


def test_the_worst_setback_comes_first_and_variants_have_untuned_ones_too():
    pairs = [(4, 103.0), (8, 150.0), (16, 120.0)]
    records = [ok(name, m, us) for m, slow in pairs for name, us in (("x@pad", slow), ("x@pad@untuned", 100.0))]
    found = tuning.setbacks(records, most=2)
    assert [(s.backend, s.case.num_tokens) for s in found.shown] == [("x@pad", 8), ("x@pad", 16)]
    assert (found.shown[0].ratio, found.number) == (1.5, 3)
    assert tuning.setbacks([ok("x", 4, 10.0), ok("x@untuned", 4, 0.0)], most=2).number == 0
    assert "3 points, worst x@pad tiny M=8, 1.50x" in screen(terminal.summary(records))


UNTUNED = ok("x@untuned", 4, 100.0)


@pytest.mark.parametrize(
    "other",
    [
        ok("x", 4, 102.0),
        ok("x", 4, 50.0),
        ok("x", 8, 200.0),
        ok("xx", 4, 200.0),
        ok("x", 4, 200.0, ep_size=2),
        ok("x", 4, 0, timed=timing(200.0, l2="hot")),
        ok("x", 4, 0, timed=timing(200.0, clock="cuda_events")),
        ok("x", 4, 0, timed=timing(200.0, comparable=False)),
        replace(ok("x", 4, 200.0), arch="sm100"),
        replace(ok("x", 4, 200.0), device="NVIDIA H100"),
        replace(ok("x", 4, 200.0), status="wrong"),
        bad("x", 4, "failed", "out of memory"),
    ],
)
def test_what_is_not_a_setback_of_tuning_is_not_told(other):
    assert tuning.setbacks([other, UNTUNED], most=9).number == 0
    assert "## Tuning" not in page(other, UNTUNED)
    assert "tuned slower" not in screen(terminal.summary([other, UNTUNED]))


def test_csv_leaves_empty_what_a_record_does_not_know():
    (row,) = csv.DictReader(io.StringIO(table_csv.rows([bad("a", 4, "skipped", "why, not")])))
    assert (row["status"], row["reason"], row["median_us"], row["rel_l2"], row["routing_sha256"]) == ("skipped", "why, not", "", "", "")


def test_csv_of_nothing_is_its_header():
    assert table_csv.rows([]) == ",".join(table_csv.HEADER) + "\n"


@pytest.mark.parametrize(
    ("told", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+SUM(A1)", "'+SUM(A1)"),
        ("-cmd", "'-cmd"),
        ("@x", "'@x"),
        ("\t=1+1", "'=1+1"),
        ("-1.5", "-1.5"),
        ("a=1", "a=1"),
        ('a "b"\nc', 'a "b" c'),
    ],
)
def test_csv_cells_are_never_formulas(told, cell):
    (row,) = csv.DictReader(io.StringIO(table_csv.rows([bad("a", 4, "failed", told)])))
    assert row["reason"] == cell


def test_summary_puts_backends_side_by_side():
    shown = screen(
        terminal.summary(
            [
                ok("torch", 4, 900.0),
                ok("triton_mxfp4_bf16", 4, 100.0),
                ok("b", 4, 101.0),
                ok("c", 4, 0, timed=timing(5.0, comparable=False)),
                bad("d", 4, "skipped", "needs sm100"),
                bad("b", 8, "wrong", "relative L2 1e-1"),
                ok("torch", 8, 900.0),
            ]
        )
    )
    rows = [line.split() for line in shown.splitlines()]
    assert ["tokens", "torch", "mxfp4_bf16", "b", "c"] in rows
    assert ["4", "900.0", "*", "100.0", "~", "101.0", "5.00†"] in rows
    assert ["8", "900.0", "wrong"] in rows
    assert "* fastest   ~ tie: 95 % intervals overlap   † not comparable" in shown
    assert "  1 needs sm100  (d; tiny M=4)" in shown
    assert "  1 wrong: relative L2 1e-1  (b; tiny M=8)" in shown
    assert "7 records: 5 ok, 1 skipped, 1 wrong" in shown


def test_the_fastest_is_bold_green_on_a_terminal():
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(terminal.summary([ok("a", 4, 100.0), ok("b", 4, 200.0)]))
    assert "\x1b[1;32m* 100.0\x1b[0m" in console.file.getvalue()


@pytest.mark.parametrize("num_backends", [1, 5, 6, 7, 13])
def test_a_summary_fits_80_columns_and_shows_every_number(num_backends):
    names = [f"vendor{i}_mxfp4_mxfp8" for i in range(num_backends)]
    shown = screen(terminal.summary([ok(name, 16384, 14698.0 + 100 * i) for i, name in enumerate(names)]), width=80)
    assert all(str(14698 + 100 * i) in shown for i in range(num_backends))
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_summary_tells_each_reason_once():
    shown = screen(terminal.summary([bad(name, m, "failed", "no such device") for name in ("a", "b") for m in (1, 2)]))
    assert "  4 failed: no such device  (a, b; such as tiny M=1)" in shown


def test_a_summary_lists_so_many_reasons_and_counts_the_rest():
    shown = screen(terminal.summary([bad("a", m, "failed", f"reason {m}") for m in range(25)]))
    assert "reason 19" in shown
    assert "reason 20" not in shown
    assert "and 5 more reasons; the report has them all" in shown


def test_a_summary_of_nothing_says_so():
    assert screen(terminal.summary([])) == "no records\n"


def test_a_line_is_plain_text_for_one_record():
    assert str(terminal.line(ok("a", 4, 100.0))) == f"ok       {'a':<22} tiny M=4  100.0 us (99.0 to 101.0), relative L2 1.80e-03"
    assert str(terminal.line(bad("a", 4, "skipped", "needs\nsm100"))) == f"skipped  {'a':<22} tiny M=4  needs sm100"


def test_foreign_text_cannot_style_or_steer_a_terminal():
    told = "[bold]x[/bold] \x1b[2J\x07 y"
    assert "[bold]x[/bold] [2J y" in screen(terminal.line(bad("a", 4, "failed", told)))
    assert "[bold]x[/bold] [2J y" in screen(terminal.summary([bad("a", 4, "failed", told)]))


def test_backends_table_says_whether_and_why_not():
    ours = {"name": "torch", "source": "moebench", "act_dtype": "bf16", "runs_here": "yes", "reason": ""}
    other = {"name": "x", "source": "acme 1.0", "act_dtype": "mxfp8", "runs_here": "no", "reason": "needs sm100; run it on a B200"}
    alone, both = screen(terminal.backends_table([ours])), screen(terminal.backends_table([ours, other]))
    assert "from" not in alone
    assert "acme 1.0" in both
    assert ["x", "mxfp8", "no", "acme", "1.0", "needs", "sm100;", "run", "it", "on", "a", "B200"] in [
        line.split() for line in both.splitlines()
    ]


def test_plan_table_says_what_will_run():
    rows = [{"backend": "a", "arch": "sm90", "label": "tiny M=1", "skip": skip} for skip in (None, "needs sm100")]
    lines = [line.split() for line in screen(terminal.plan_table(rows)).splitlines()]
    assert ["a", "sm90", "tiny", "M=1", "run"] in lines
    assert ["a", "sm90", "tiny", "M=1", "skip:", "needs", "sm100"] in lines


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (0.12345, "0.123"),
        (9.123, "9.12"),
        (91.23, "91.2"),
        (912.34, "912.3"),
        (9123.4, "9123"),
        (14698.2, "14698"),
    ],
)
def test_microseconds_have_three_or_four_digits(value, shown):
    assert text.us(value) == shown


def test_reports_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import moebench.reports.markdown, moebench.reports.table_csv, moebench.reports.terminal; del sys.modules['torch']\n"
        "print(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
