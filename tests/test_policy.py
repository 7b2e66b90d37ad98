"""Which backend to use when: merged ranges, ties, regret, who cannot win, and which flags a server gets."""

import json
from dataclasses import replace
from importlib.resources import files
from subprocess import run as run_process
from sys import executable

import jsonschema
import pytest
from click.testing import CliRunner
from rich.console import Console

from moebench import serving_flags
from moebench.commands.policy import MOST_TABLES
from moebench.commands.policy import policy as command
from moebench.crossover import crossovers
from moebench.policy_lookup import backend_for
from moebench.registry import names
from moebench.reports import policy as pages
from tests.full_records import TELEMETRY
from tests.made_runs import rounds, timed, untimed, write_run

SCHEMA = json.loads(files("moebench").joinpath("policy.schema.json").read_text())
TRITON, MARLIN, CUTLASS, OURS = "openai_triton_kernels", "marlin_mxfp4_bf16", "cutlass_mxfp4_bf16", "triton_mxfp4_bf16"


def grid(**times_us):
    """times_us: backend -> {tokens: median}."""
    return [timed(backend, tokens, us) for backend, row in times_us.items() for tokens, us in row.items()]


def ranges(table):
    return [(s.from_tokens, s.to_tokens, s.backend) for s in table.stretches]


def screen(tables, width=80):
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(pages.table(tables))
    return captured.get()


def called(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_ranges_with_the_same_winner_are_merged():
    (table,) = crossovers(grid(a={1: 10, 2: 10, 4: 10, 8: 30, 16: 30}, b={1: 20, 2: 20, 4: 20, 8: 20, 16: 20}))
    assert ranges(table) == [(1, 4, "a"), (8, 16, "b")]


def test_regret_is_what_the_runner_up_costs_on_geometric_average_and_at_worst():
    (table,) = crossovers(grid(a={1: 10, 2: 10}, b={1: 20, 2: 12.5}, c={1: 13, 2: 40}))
    (only,) = table.stretches
    assert (only.runner_up, only.worst_tokens) == ("b", 1)
    assert (only.regret, only.worst_regret) == (pytest.approx((2 * 1.25) ** 0.5 - 1), pytest.approx(1.0))


def test_a_tie_does_not_break_a_range():
    (table,) = crossovers(grid(a={1: 10, 2: 10.001, 4: 10}, b={1: 20, 2: 10, 4: 20}))
    assert ranges(table) == [(1, 4, "a")]
    assert table.measured[1].ties == ("b", "a")


def test_whoever_ties_at_every_count_of_a_range_is_named():
    (table,) = crossovers(grid(a={1: 10, 2: 10}, b={1: 10.001, 2: 10.001}, c={1: 10.001, 2: 30}))
    assert [(s.backend, s.ties) for s in table.stretches] == [("a", ("b",))]
    assert "a ~ b" in screen([table])


def test_whoever_ties_at_some_counts_of_a_range_is_named_with_them():
    tables = crossovers(grid(a={1: 10, 2: 10, 4: 10, 8: 10}, b={1: 10.001, 2: 30, 4: 10.001, 8: 9.999}))
    assert ranges(tables[0]) == [(1, 8, "a")]
    assert "| 1 to 8 | a | b at 1 and 4 to 8 |" in pages.markdown(tables)
    assert "a ~ b at 1 and 4 to 8" in screen(tables)
    assert "at all counts or those named" in screen(tables)


def test_rounds_decide_ties_where_there_are_several():
    noisy = [*rounds("a", 1, (10.0, 12.0, 11.0)), *rounds("b", 1, (11.0, 10.5, 12.5))]
    steady = [*rounds("a", 1, (10.0, 10.01, 10.02)), *rounds("b", 1, (10.1, 10.11, 10.12))]
    assert crossovers(noisy)[0].measured[0].ties == ("a", "b")
    assert crossovers(steady)[0].measured[0].ties == ("a",)
    assert (crossovers(steady)[0].rounds, "within one process" in screen(crossovers(steady))) == (3, False)


def test_the_one_for_all_is_the_one_that_loses_least_on_average():
    (table,) = crossovers(grid(a={1: 10, 2: 40}, b={1: 11.5, 2: 22}, c={1: 30, 2: 20}))
    best = table.one_for_all
    assert (best.backend, best.worst_tokens) == ("b", 1)
    assert (best.loss, best.worst_loss) == (pytest.approx((1.15 * 1.1) ** 0.5 - 1), pytest.approx(0.15))


@pytest.mark.parametrize(
    ("loser", "reason"),
    [
        (timed("b", 1, 5.0, record={"flags": {"throttled": "slow", "unstable": "drifts"}}), "flagged throttled, unstable"),
        (timed("b", 1, 5.0, how={"comparable": False}), "its time does not describe the kernel"),
        (timed("b", 1, 5.0, record={"status": "wrong", "reason": "off by 3"}), "wrong: off by 3"),
        (untimed("b", 1, "skipped", "needs sm100"), "skipped"),
    ],
)
def test_what_is_flagged_or_not_ok_cannot_win(loser, reason):
    (table,) = crossovers([timed("a", 1, 10.0), loser])
    assert ranges(table) == [(1, 1, "a")]
    assert [(row.backend, row.num_tokens, row.reason) for row in table.excluded] == [("b", 1, reason)]
    assert (f"cannot win: b at 1: {reason}" in screen([table])) == (reason != "skipped")


def test_a_row_that_only_ran_into_the_power_limit_can_win():
    seen = TELEMETRY
    capped = replace(seen, reasons={"sw_power_cap": 1.0})
    flags = {"throttled": "SM clock 1830 to 1950 MHz of 1980; sw_power_cap active"}
    (table,) = crossovers([timed("a", 1, 10.0), timed("b", 1, 5.0, record={"flags": flags, "telemetry": capped})])
    assert ranges(table) == [(1, 1, "b")]
    hot = replace(seen, reasons={"sw_power_cap": 1.0, "hw_thermal": 0.2})
    (table,) = crossovers([timed("a", 1, 10.0), timed("b", 1, 5.0, record={"flags": flags, "telemetry": hot})])
    assert ranges(table) == [(1, 1, "a")]


def test_a_wide_interval_decides_between_win_and_tie_and_does_not_exclude():
    capped = replace(TELEMETRY, reasons={"sw_power_cap": 1.0})
    doubts = {"flags": {"throttled": "sw_power_cap active", "unstable": "knows the median to 12% only"}, "telemetry": capped}
    wide = timed("b", 1, 5.0, how={"stop_reason": "max_samples", "spread": 0.12}, record=doubts)
    assert wide.timing.is_wide
    (table,) = crossovers([timed("a", 1, 10.0), wide])
    assert (ranges(table), table.measured[0].ties) == ([(1, 1, "b")], ("b",))
    (table,) = crossovers([timed("a", 1, 5.05), wide])
    assert set(table.measured[0].ties) == {"a", "b"}
    drifting = replace(wide, timing=replace(wide.timing, stop_reason="interval"))
    (table,) = crossovers([timed("a", 1, 10.0), drifting])
    assert ranges(table) == [(1, 1, "a")]


def test_one_wrong_round_is_enough_and_a_flagged_round_is_left_out():
    first, second, third = rounds("b", 1, (5.0, 5.1, 5.2))
    wrong = replace(second, status="wrong", reason="off")
    flagged = replace(second, flags={"throttled": "slow"})
    (table,) = crossovers([timed("a", 1, 10.0), first, wrong, third])
    assert ranges(table) == [(1, 1, "a")]
    (table,) = crossovers([timed("a", 1, 10.0), first, flagged, third])
    assert ranges(table) == [(1, 1, "b")]
    assert table.measured[0].times_us["b"] == pytest.approx((5.0 * 5.2) ** 0.5)


def test_the_slowest_rank_counts():
    ranks = [timed(b, 1, us, ep_size=2, ep_rank=r) for b, times in (("a", (10, 30)), ("b", (20, 21))) for r, us in enumerate(times)]
    (table,) = crossovers(ranks)
    assert (ranges(table), table.num_ranks) == ([(1, 1, "b")], 2)
    assert table.measured[0].times_us == {"b": pytest.approx(21), "a": pytest.approx(30)}


def test_a_backend_without_all_ranks_cannot_win():
    ranks = [timed("a", m, 10.0, ep_size=2, ep_rank=r) for m in (1, 2) for r in (0, 1)]
    (table,) = crossovers([*ranks, timed("b", 1, 5.0, ep_size=2, ep_rank=0)])
    assert ranges(table) == [(1, 2, "a")]
    assert [row.reason for row in table.excluded] == ["timed on 1 of 2 ranks"]


def test_a_plan_of_worst_ranks_has_one_rank_a_count_and_says_so():
    (table,) = crossovers([timed("a", m, 10.0, ep_size=8, ep_rank=m) for m in (1, 2, 4)])
    assert ranges(table) == [(1, 4, "a")]
    assert "one rank only" in screen([table])


def test_activation_formats_are_apart_and_then_together_with_a_warning():
    tables = crossovers([timed("a", 1, 10.0), timed("b", 1, 11.0), timed("c", 1, 5.0, record={"act_dtype": "fp8"})])
    assert [(table.act_dtype, ranges(table)) for table in tables] == [
        ("bf16", [(1, 1, "a")]),
        ("fp8", [(1, 1, "c")]),
        (None, [(1, 1, "c")]),
    ]
    assert "all activation formats: not the same arithmetic" in screen(tables, width=130)
    assert "c fp8" in screen(tables)


@pytest.mark.parametrize(
    "changed", [{"ep_size": 2}, {"tp_size": 2}, {"top_k": 2}, {"routing": "balanced"}, {"seed": 1}, {"model": "gpt-oss-120b"}]
)
def test_what_is_not_the_same_work_is_in_another_table(changed):
    tables = crossovers([timed("a", 1, 10.0), timed("b", 1, 20.0), timed("a", 1, 30.0, **changed), timed("b", 1, 25.0, **changed)])
    assert [ranges(table) for table in tables] == [[(1, 1, "a")], [(1, 1, "b")]]


@pytest.mark.parametrize("changed", [{"device": "NVIDIA H100"}, {"scope": "layer"}])
def test_other_devices_and_scopes_are_in_another_table(changed):
    tables = crossovers(
        [timed("a", 1, 10.0), timed("b", 1, 20.0), timed("a", 1, 30.0, record=changed), timed("b", 1, 25.0, record=changed)]
    )
    assert [ranges(table) for table in tables] == [[(1, 1, "a")], [(1, 1, "b")]]


def test_contracts_are_never_in_one_table_and_one_without_rivals_is_left_out():
    rows = grid(a={1: 10}, b={1: 20})
    eager = timed("torch", 1, 5.0, how={"clock": "cuda_events"})
    assert [ranges(table) for table in crossovers([*rows, eager])] == [[(1, 1, "a")]]
    assert [ranges(table) for table in crossovers([eager])] == [[(1, 1, "torch")]]


def test_the_json_is_what_its_schema_says(tmp_path):
    rows = [
        *grid(**{TRITON: {1: 10, 64: 30}, MARLIN: {1: 9, 64: 35}, OURS: {1: 8}}),
        timed("cutlass_mxfp4_fp8", 1, 5.0, record={"act_dtype": "fp8"}),
        untimed(CUTLASS, 1, "crash", "signal 11"),
    ]
    page = json.loads(called(write_run(tmp_path / "r", *rows), "--format", "json").output)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(page)
    first = page["tables"][0]
    assert [(s["backend"], s["flags"]["vllm"]["0.33.0"]) for s in first["stretches"]] == [(OURS, None), (TRITON, "--moe-backend triton")]
    broken = {**page, "tables": [{**first, "stretches": [{**first["stretches"][0], "regret": "much"}]}]}
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(broken)


POLICY = json.loads(
    pages.to_json(crossovers([*grid(a={1: 10, 64: 10, 128: 30, 512: 30}, b={1: 20, 64: 20, 128: 20, 512: 20}), timed("a", 1, 1.0, seed=1)]))
)
ASKED = {"model": "gpt-oss-20b", "device": "NVIDIA H200", "seed": 0}


@pytest.mark.parametrize(
    ("num_tokens", "backend"), [(0, "a"), (1, "a"), (33, "a"), (64, "a"), (65, "b"), (128, "b"), (300, "b"), (9999, "b")]
)
def test_the_lookup_answers_between_and_beyond_what_was_measured(num_tokens, backend):
    assert backend_for(POLICY, num_tokens, **ASKED) == backend


def test_the_lookup_refuses_to_guess_a_table():
    with pytest.raises(LookupError, match=r"2 of the policy's 2 tables are for model=gpt-oss-20b, device=NVIDIA H200, act_dtype=bf16"):
        backend_for(POLICY, 1, model="gpt-oss-20b", device="NVIDIA H200")
    with pytest.raises(LookupError, match="0 of the policy's 2 tables"):
        backend_for(POLICY, 1, **ASKED | {"device": "NVIDIA H100"})


def test_the_lookup_runs_alone_with_nothing_but_python(tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps(POLICY))
    (tmp_path / "lookup.py").write_text(files("moebench").joinpath("policy_lookup.py").read_text())
    asked = "model='gpt-oss-20b', device='NVIDIA H200', seed=0"
    asks = f"import json, lookup; print(lookup.backend_for(json.load(open('policy.json')), 65, {asked}))"
    done = run_process([executable, "-S", "-c", asks], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("b\n", "")


def test_every_backend_in_the_flag_table_exists_and_every_line_names_its_source():
    assert {flag.backend for flag in serving_flags.FLAGS} <= set(names())
    for flag in serving_flags.FLAGS:
        assert flag.source.startswith(f"{flag.server}/")
        assert flag.flags.startswith("--moe-backend " if flag.server == "vllm" else "--moe-runner-backend ")
    lines = [(flag.server, flag.version, flag.backend) for flag in serving_flags.FLAGS]
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"version": "0.34.0"}, "vllm 0.34.0 was not read, only 0.33.0; another release may name it otherwise"),
        ({"model": "mixtral-8x7b"}, "only gpt-oss-20b and gpt-oss-120b have MXFP4 experts that vllm was read for"),
        ({"arch": "sm100"}, "vllm 0.33.0 runs it on sm90 only, as far as was read"),
        ({"backend": OURS}, "vllm 0.33.0 has no flag for it"),
        (
            {"server": "sglang", "version": "0.5.23", "backend": TRITON, "ep_size": 2},
            "sglang 0.5.23 refuses it with more than one expert-parallel rank",
        ),
    ],
)
def test_what_was_not_read_gets_no_flag_but_the_reason(asked, why):
    values = {"server": "vllm", "version": "0.33.0", "backend": CUTLASS, "model": "gpt-oss-20b", "arch": "sm90", "ep_size": 1} | asked
    found = serving_flags.setting(values.pop("server"), values.pop("version"), values.pop("backend"), **values)
    assert (found.flags, found.why) == ("", why)


def test_a_terminal_gets_the_first_tables_and_is_told_where_the_others_are(tmp_path):
    rows = [timed(name, 1, us, seed=seed) for seed in range(MOST_TABLES + 2) for name, us in ((TRITON, 10.0), (MARLIN, 9.0))]
    shown = called(write_run(tmp_path / "many", *rows)).output
    assert shown.count("bf16 activations") == MOST_TABLES
    assert shown.endswith("\nonly the first 60 tables; --format md or json has all of them\n")
    for style, title in (("md", "bf16 activations"), ("json", '"contract"')):
        assert called(tmp_path / "many", "--format", style).output.count(title) == MOST_TABLES + 2
    few = called(write_run(tmp_path / "few", *rows[: 2 * MOST_TABLES])).output
    assert few.count("bf16 activations") == MOST_TABLES
    assert "only the first" not in few


def test_a_server_is_offered_only_what_it_has_with_its_flags(tmp_path):
    path = write_run(tmp_path / "r", *grid(**{TRITON: {1: 10, 64: 30}, MARLIN: {1: 9, 64: 35}, OURS: {1: 1, 64: 1}}))
    shown = called(path, "--format", "vllm").output
    assert "marlin_mxfp4_bf16: --moe-backend marlin" in shown
    assert "openai_triton_kernels: --moe-backend triton" in shown
    assert "so not in the tables: triton_mxfp4_bf16" in " ".join(shown.split())
    assert "read in vLLM 0.33.0: vllm/model_executor/layers/fused_moe/oracle/mxfp4.py" in " ".join(shown.split())
    assert "--moe-runner-backend triton_kernel" in called(path, "--format", "sglang").output


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (
            ("--format", "vllm", "--server-version", "9.9"),
            4,
            "no flag rather than a wrong one: vLLM 9.9 was not read; --server-version takes 0.33.0",
        ),
        (("--server-version", "0.33.0"), 2, "--server-version 0.33.0: only with --format vllm or sglang"),
        (("--format", "vllm"), 4, "triton_mxfp4_bf16: vllm 0.33.0 has no flag for it"),
    ],
)
def test_the_command_refuses_in_words(tmp_path, words, code, sentence):
    done = called(write_run(tmp_path / "r", timed(OURS, 1, 10.0)), *words)
    assert done.exit_code == code
    assert sentence in done.output


def test_a_run_in_which_nothing_can_win_has_no_verdict(tmp_path):
    done = called(write_run(tmp_path / "r", untimed("a", 1, "crash", "signal 11")))
    assert (done.exit_code, done.output) == (4, "error: no backend can win: no row is ok, timed and without flags\n")


def test_the_table_fits_80_columns():
    tables = crossovers(grid(**{TRITON: {1: 10, 1024: 10, 16384: 10}, CUTLASS: {1: 9, 1024: 20, 16384: 20}}))
    lines = screen(tables).splitlines()
    assert f"1024 to 16384 {TRITON} {CUTLASS} +100 % (to +100 %)" in [" ".join(line.split()) for line in lines]
    assert max(map(len, lines)) <= 80
