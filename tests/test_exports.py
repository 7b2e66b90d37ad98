"""A run in other tools' formats, as the tools themselves read it."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import jsonschema
import junitparser
import pandas
import pytest
from click.testing import CliRunner
from cuda.bench.results import BenchmarkResult

from moebench.commands.export import FORMATS
from moebench.commands.export import export as command
from moebench.record import Roofline, Telemetry
from moebench.reports import flashinfer_csv, frame, google_benchmark, junit, nvbench, parquet
from tests.made_runs import rounds, run, timed, timing, untimed, write_run

SCHEMAS = Path(__file__).parent / "schemas"
COMPARE_PY = Path("/usr/share/benchmark/compare.py")  # Debian's libbenchmark-tools
ROOFLINE = Roofline(
    weight_bytes=50_000_000,
    activation_bytes=10_000_000,
    flop=2e8,
    padded_flop=None,
    floor_us=20.0,
    limiter="memory",
    bandwidth_bytes_s=4e12,
    flop_s=1e15,
    source="measured",
)
TELEMETRY = Telemetry(
    samples=9,
    sm_mhz=(1700.0, 1755.0, 1980.0),
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
MORE = {"record": {"roofline": ROOFLINE, "telemetry": TELEMETRY}}
HOSTILE = "<b>&\"' \x00\x1b[31m]]> é"


def exported(tmp_path, style, *records, name="out"):
    path = tmp_path / f"{name}-run"
    done = CliRunner().invoke(command, [str(write_run(path, *records)), "--format", style, "--out", str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    return tmp_path / name


def read_by(*words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)


def a_run(factor=1.0):
    return [
        *(timed("a", m, us * factor, **MORE) for m, us in ((1, 30.0), (64, 100.0))),
        timed("b", 1, 50.0 * factor, ep_size=2, ep_rank=1, **MORE),
        untimed("b", 2, "wrong", "relative L2 error 0.3"),
    ]


def test_nvbenchs_own_reader_finds_states_axes_samples_and_skips(tmp_path):
    (name, a), (_, b) = BenchmarkResult.from_json(str(exported(tmp_path, "nvbench", *a_run()))).items()
    assert name == "a/experts/cuda_graph/cold/1.0-cuda_graph-cold"
    assert [state.point["num_tokens"] for state in a] == ["1", "64"]
    assert list(a[0].samples) == pytest.approx([us * 1e-6 for us in timing(30.0).samples_us], rel=1e-6)
    summaries = {tag: summary.value for tag, summary in a[0].summaries.items()}
    assert summaries["nv/cold/time/gpu/median"] == pytest.approx(30e-6)
    assert summaries["nv/cold/sm_clock_rate/mean"] == 1.755e9
    assert (summaries["nv/cold/bw/global/bytes_per_second"], a[0].bw) == (pytest.approx(2e12), pytest.approx(0.5))
    assert [(state.point["ep_rank"], state.is_skipped, state.skip_reason) for state in b] == [
        ("1", False, None),
        ("0", True, "wrong: relative L2 error 0.3"),
    ]


def test_nvbench_compare_tells_faster_from_same(tmp_path):
    base = exported(tmp_path, "nvbench", timed("a", 1, 30.0, **MORE), timed("a", 2, 30.0, **MORE), name="base.json")
    candidate = exported(tmp_path, "nvbench", timed("a", 1, 30.0, **MORE), timed("a", 2, 15.0, **MORE), name="candidate.json")
    robust = read_by("-m", "cuda.bench.scripts.nvbench_compare_robust", base, candidate, "--no-color")
    assert (robust.returncode, robust.stderr) == (0, "")
    assert "Total Matches: 2" in robust.stdout
    lines = [line for line in robust.stdout.splitlines() if line.startswith("| gpt-oss-20b |")]
    assert ["SAME" in lines[0], "FAST" in lines[1]] == [True, True]
    legacy = read_by("-m", "cuda.bench.scripts.nvbench_compare", base, candidate, "--no-color")
    assert legacy.returncode == 1  # how many changed by more than their noise
    assert "-50.00%" in legacy.stdout


def test_in_nvbench_two_contracts_are_two_benchmarks(tmp_path):
    hot = exported(tmp_path, "nvbench", timed("a", 1, 30.0), timed("a", 1, 20.0, how={"l2": "hot"}))
    assert list(BenchmarkResult.from_json(str(hot))) == [
        "a/experts/cuda_graph/cold/1.0-cuda_graph-cold",
        "a/experts/cuda_graph/hot/1.0-cuda_graph-hot",
    ]


def test_googles_format_has_one_repetition_a_round(tmp_path):
    path = exported(tmp_path, "googlebench", *rounds("a", 1, (30.0, 31.0)), untimed("a", 2, "crash", "signal 11"))
    page = json.loads(path.read_text())
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / "google_benchmark.schema.json").read_text())).validate(page)
    assert [(e["repetition_index"], e["repetitions"], e["real_time"], e["time_unit"]) for e in page["benchmarks"]] == [
        (0, 2, pytest.approx(30.0), "us"),
        (1, 2, pytest.approx(31.0), "us"),
    ]
    assert len({e["name"] for e in page["benchmarks"]}) == 1


def test_in_googles_format_a_name_is_one_case_backend_scope_and_contract(tmp_path):
    other = [
        timed("a", 1, 1.0, ep_size=2),
        timed("a", 1, 1.0, ep_size=2, ep_rank=1),
        timed("a", 1, 1.0, tp_size=2),
        timed("a", 1, 1.0, top_k=2),
        timed("a", 1, 1.0, seed=1),
        timed("a", 1, 1.0, routing="balanced"),
        timed("a", 1, 1.0, record={"scope": "layer"}),
        timed("a", 1, 1.0, how={"l2": "hot"}),
        timed("b", 1, 1.0),
        timed("a", 1, 1.0),
    ]
    page = json.loads(exported(tmp_path, "googlebench", *other).read_text())
    assert len({e["name"] for e in page["benchmarks"]}) == len(other)


@pytest.mark.skipif(not COMPARE_PY.exists(), reason="Debian's libbenchmark-tools is not installed")
def test_googles_compare_reads_it_and_tests_the_rounds(tmp_path):
    base = exported(tmp_path, "googlebench", *rounds("a", 1, [30 + n / 100 for n in range(9)]), name="base.json")
    candidate = exported(tmp_path, "googlebench", *rounds("a", 1, [15 + n / 100 for n in range(9)]), name="candidate.json")
    done = read_by(COMPARE_PY, "--no-color", "benchmarks", base, candidate)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "-0.5000" in next(line for line in lines if line.startswith("a/experts/gpt-oss-20b/num_tokens:1/"))
    assert "U Test, Repetitions: 9 vs 9" in next(line for line in lines if "_pvalue" in line)


def test_flashinfers_columns_are_its_own_in_its_order_and_none_twice():
    known = json.loads((SCHEMAS / "flashinfer_columns.json").read_text())
    theirs = known["perf"] + known["moe"] + known["general"]
    ours = list(flashinfer_csv.COLUMNS)
    assert [name for name in theirs if name in ours] == ours
    assert set(known["perf"]) <= set(ours)


def test_flashinfers_csv_has_its_units_and_quotes_what_needs_it(tmp_path):
    path = exported(tmp_path, "flashinfer", *a_run(), timed("c,d", 1, 10.0))
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["backend"], row["num_tokens"]) for row in rows] == [("a", "1"), ("a", "64"), ("b", "1"), ("c,d", "1")]
    first, spread, bare = rows[0], rows[2], rows[3]
    assert float(first["median_time"]) == pytest.approx(0.030)
    assert float(first["std_time"]) == pytest.approx(stdev(timing(30.0).samples_us) / 1e3)
    assert (float(first["tflops"]), float(first["tb_per_sec"])) == (pytest.approx(2e8 / 30e-6 / 1e12), pytest.approx(60e6 / 30e-6 / 1e12))
    assert (spread["ep_size"], spread["ep_rank"], spread["local_expert_offset"], spread["local_num_experts"]) == ("2", "1", "16", "16")
    assert (bare["tflops"], bare["no_cuda_graph"], bare["refcheck"]) == ("", "False", "True")
    assert first["repro_command"] == "moebench sweep --model gpt-oss-20b --tokens 1 --backend a"
    assert list(pandas.read_csv(path)["median_time"]) == pytest.approx([0.030, 0.100, 0.050, 0.010])


def test_parquet_is_the_frame_with_the_manifest_beside_it(tmp_path):
    from pyarrow.parquet import read_schema

    path = exported(tmp_path, "parquet", *a_run())
    found = pandas.read_parquet(path)
    pandas.testing.assert_frame_equal(found, frame.records(a_run()))
    assert list(found["median_us"][:3]) == pytest.approx([30.0, 100.0, 50.0])
    assert found["median_us"].isna().tolist() == [False, False, False, True]
    assert json.loads(read_schema(path).metadata[b"moebench"])["device"]["driver"] == "580.159.04"


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "find_spec", lambda name: None)
    done = CliRunner().invoke(command, [str(write_run(tmp_path / "r", *a_run())), "--format", "parquet", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert done.output == "error: Parquet needs pyarrow, which is not installed; pip install 'moebench[parquet]'\n"


def test_junit_has_a_suite_for_each_backend_and_an_outcome_for_each_row(tmp_path):
    rows = [
        timed("a", 1, 30.0, record={"phases_s": {"check": 1.5, "time": 0.5}, "flags": {"throttled": "slow"}}),
        untimed("a", 2, "wrong", "relative L2 error 0.3"),
        untimed("a", 4, "oom", "out of memory"),
        untimed("b", 1, "skipped", "needs sm100"),
    ]
    suites = junitparser.JUnitXml.fromfile(str(exported(tmp_path, "junit", *rows)))
    assert [(s.name, s.tests, s.failures, s.errors, s.skipped) for s in suites] == [("a", 3, 1, 1, 0), ("b", 1, 0, 0, 1)]
    assert (suites.tests, suites.failures, suites.errors, suites.skipped) == (4, 1, 1, 1)
    cases = [case for suite in suites for case in suite]
    assert [(c.classname, c.name, c.time) for c in cases[:2]] == [
        ("moebench.a", "gpt-oss-20b M=1", 2.0),
        ("moebench.a", "gpt-oss-20b M=2", 0.0),
    ]
    outcomes = [[(type(found).__name__, found.type, found.message) for found in c.result] for c in cases]
    assert outcomes == [
        [],
        [("Failure", "wrong", "relative L2 error 0.3")],
        [("Error", "oom", "out of memory")],
        [("Skipped", None, "needs sm100")],
    ]
    properties = {p.name: p.value for p in cases[0].child(junitparser.Properties)}
    assert (properties["median_us"], properties["flags"]) == ("30.0", "throttled")
    assert "again with: moebench sweep --model gpt-oss-20b --tokens 2 --backend a" in cases[1].result[0].text


def test_foreign_text_cannot_break_a_format(tmp_path):
    rows = [untimed("a", 1, "crash", HOSTILE), timed("a", 2, 30.0, record={"flags": {HOSTILE: HOSTILE}})]
    suites = junitparser.JUnitXml.fromfile(str(exported(tmp_path, "junit", *rows, name="j")))
    assert next(iter(next(iter(suites)))).result[0].message == "<b>&\"' [31m]]> é"
    (only,) = BenchmarkResult.from_json(str(exported(tmp_path, "nvbench", *rows, name="n"))).values()
    assert only[0].skip_reason == f"crash: {HOSTILE}"


@pytest.mark.parametrize("style", FORMATS)
def test_a_run_without_records_gives_an_empty_file_of_the_format(tmp_path, style):
    path = exported(tmp_path, style)
    empty = {
        "nvbench": lambda: len(BenchmarkResult.from_json(str(path))),
        "googlebench": lambda: len(json.loads(path.read_text())["benchmarks"]),
        "flashinfer": lambda: len(list(csv.DictReader(path.open(newline="")))),
        "parquet": lambda: len(pandas.read_parquet(path)),
        "junit": lambda: junitparser.JUnitXml.fromfile(str(path)).tests,
    }
    assert empty[style]() == 0


def test_what_has_no_time_is_left_out_aloud_where_a_format_holds_times_only(tmp_path):
    done = CliRunner().invoke(
        command, [str(write_run(tmp_path / "r", *a_run())), "--format", "flashinfer", "--out", str(tmp_path / "x.csv")]
    )
    assert done.output == f"note: 1 of 4 records have no time and are left out\n{tmp_path / 'x.csv'}\n"


def test_an_exporter_returns_the_named_file_first():
    for module in (nvbench, google_benchmark, flashinfer_csv, parquet, junit):
        assert next(iter(module.export(run(*a_run()), "some.name"))) == "some.name"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(command, [str(write_run(tmp_path / "r")), "--format", "junit", "--out", str(tmp_path / "file" / "x")])
    assert done.exit_code == 5
    assert str(tmp_path / "file") in done.output
