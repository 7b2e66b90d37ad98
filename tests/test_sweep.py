"""The whole line from plan to report in real worker processes, with backends that go wrong on purpose."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moebench.device import detect
from moebench.journal import load_run
from tests.orphans import left_over
from tests.running import ENVIRONMENT, heed_interrupts, moebench

FAULTS = (
    *("raises", "prepare", "compile", "nan", "zeros", "writes", "unwritten", "random", "sporadic", "dies", "chatty"),
    *("skips", "import", "misnamed", "ok"),
)
STORM = {  # token count -> what its fault must become; tests/faults says which it is
    5: ("failed", "no kernel image"),
    10: ("nonfinite", "NaN"),
    15: ("nonfinite", "1 Inf"),
    20: ("wrong", "the output is zero"),
    25: ("unwritten", "320 of 8000"),
    30: ("input_changed", "hidden_states"),
    33: ("hang", "it was in hang (moebench_faults.py:"),
    36: ("crash", "SIGKILL"),
    40: ("crash", "exit code 0"),
    45: ("failed", "200 MB"),
    50: ("oom", "4096.00 GiB (predicted"),
    55: ("cuda_error", "CUDA error 700"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One sweep over every fault and a right backend."""
    directory = tmp_path_factory.mktemp("faulty")
    names = ",".join([*(f"fault_{name}" for name in FAULTS), "torch"])
    done = moebench("sweep", "--model", "tiny", "--tokens", "2,4,8", "--backend", names, "--out", "run", "--json", cwd=directory, check=3)
    return done, load_run(directory / "run"), directory


@pytest.mark.parametrize(
    ("backend", "statuses", "reason"),
    [
        ("torch", ["ok", "ok", "ok"], ""),
        ("fault_ok", ["ok", "ok", "ok"], ""),
        ("fault_chatty", ["ok", "ok", "ok"], ""),
        ("fault_raises", ["ok", "failed", "ok"], "in phase check: RuntimeError: no kernel image"),
        ("fault_prepare", ["failed"] * 3, "in phase jit: ValueError: this layout"),
        ("fault_compile", ["compile_error"] * 3, "in phase jit: CompilationError: at 12:7"),
        ("fault_sporadic", ["wrong"] * 3, "launches came out different"),
        ("fault_nan", ["nonfinite"] * 3, ""),
        ("fault_zeros", ["wrong"] * 3, "zero"),
        ("fault_writes", ["input_changed"] * 3, "hidden_states"),
        ("fault_unwritten", ["unwritten"] * 3, ""),
        ("fault_random", ["nondeterministic"] * 3, ""),
        ("fault_dies", ["crash"] * 3, "SIGKILL"),
        ("fault_skips", ["skipped"] * 3, "quantum computer"),
        ("fault_import", ["failed"] * 3, "ModuleNotFoundError"),
        ("fault_misnamed", ["failed"] * 3, "another_name"),
    ],
)
def test_each_fault_ends_as_its_own_status_and_harms_no_other(faulty, backend, statuses, reason):
    _, run, _ = faulty
    rows = sorted((r for r in run.records if r.backend == backend), key=lambda r: r.case.num_tokens)
    assert [r.status for r in rows] == statuses
    assert all(reason in r.reason for r in rows if r.status not in ("ok",)), [r.reason for r in rows]
    assert all((r.timing is not None) == (r.status == "ok") for r in rows)


def test_bad_rows_make_exit_3_and_one_json_document_ends_stdout(faulty):
    done, run, _ = faulty
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["exit_code"] == done.returncode == 3
    assert document["counts"]["ok"] == 11
    assert len(document["records"]) == len(run.records) == 48
    assert done.stdout.count("\n") == 1  # everything else went to stderr


def test_a_backend_that_prints_does_not_disturb_the_protocol(faulty):
    _, _, directory = faulty
    assert any("not a frame" in log.read_text() for log in (directory / "run" / "logs").glob("*fault_chatty.log"))


def test_the_traceback_of_a_failure_is_in_its_log(faulty):
    _, _, directory = faulty
    assert any("no kernel image" in log.read_text() for log in (directory / "run" / "logs").glob("*fault_raises.log"))


def test_a_sweep_leaves_a_report_and_a_table(faulty):
    _, run, directory = faulty
    assert "fault_ok" in (directory / "run" / "report.md").read_text()
    assert len((directory / "run" / "results.csv").read_text().splitlines()) == len(run.records) + 1


def test_routing_and_error_are_in_the_record(faulty):
    _, run, _ = faulty
    row = next(r for r in run.records if r.backend == "torch" and r.case.num_tokens == 8)
    assert row.routing is not None
    assert row.routing.local_pairs == 32
    assert row.error is not None
    assert row.error.rel_l2 < 0.003
    assert row.timing is not None
    assert row.timing.clock == "wall"


def test_what_a_backend_says_of_itself_is_in_the_record(faulty):
    _, run, _ = faulty
    assert {r.facts["largest_batch"] for r in run.records if r.backend == "fault_ok"} == {8}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of no token and one, for this machine and for another, in a process that tells whether it imported torch."""
    directory = tmp_path_factory.mktemp("small")
    here = detect().arch
    other = "sm100" if here != "sm100" else "cpu"
    (directory / "small.toml").write_text(
        '[[sweep]]\nmodel = "tiny"\ntokens = "0,1"\nbackend = "torch"\n'
        '[[sweep]]\nmodel = "tiny"\ntokens = "0"\nbackend = "numpy,triton_mxfp4_bf16"\n'
    )
    command = f"sweep --plan small.toml --arch {here},{other} --repeat-check 1 --out run"
    code = (
        "import sys; from moebench.cli import main\n"
        f"try: main({command.split()})\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    records = load_run(directory / "run").records
    return done, [r for r in records if r.arch == here], [r for r in records if r.arch == other]


def test_rows_of_another_architecture_are_skipped_with_a_sentence(small):
    _, here, elsewhere = small
    assert {(r.backend, r.case.num_tokens, r.status) for r in here if r.backend == "torch"} == {("torch", 0, "ok"), ("torch", 1, "ok")}
    assert len(elsewhere) == 4
    assert {r.status for r in elsewhere} == {"skipped"}
    assert all("moebench report" in r.reason for r in elsewhere)


def test_zero_tokens_work(small):
    _, here, _ = small
    rows = {r.backend: r.status for r in here if r.case.num_tokens == 0}
    assert rows == dict.fromkeys(("torch", "numpy", "triton_mxfp4_bf16"), "ok")


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path):
    done = moebench(
        "sweep", "--model", "gpt-oss-20b,tiny", "--tokens", "1,16384", "--backend", "torch,fault_skips", "--dry-run", cwd=tmp_path, check=0
    )
    assert "8 points" in done.stdout
    assert "GiB" in done.stdout
    assert "quantum" in done.stdout
    assert list(tmp_path.iterdir()) == []
    document = json.loads(
        moebench("sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--dry-run", "--json", cwd=tmp_path, check=0).stdout
    )
    assert document["points"][0]["skip"] is None


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    """Sixty cases of one backend, twelve of which go wrong, each in its own way."""
    directory = tmp_path_factory.mktemp("storm")
    command = ("sweep", "--model", "tiny", "--tokens", "1:60:1", "--backend", "fault_storm", "--repeat-check", "10", "--out", "run")
    done = moebench(*command, "--deadline", "check=10", cwd=directory, check=3, MOEBENCH_TEST=str(directory))
    return done, {r.case.num_tokens: r for r in load_run(directory / "run").records}, directory


def test_twelve_faults_in_sixty_cases_are_twelve_bad_rows(storm):
    _, rows, _ = storm
    assert sorted(rows) == list(range(1, 61))
    assert {tokens: row.status for tokens, row in rows.items() if row.status != "ok"} == {t: status for t, (status, _) in STORM.items()}
    for tokens, (_, part) in STORM.items():
        assert part in rows[tokens].reason
        assert rows[tokens].timing is None


def test_no_process_outlives_a_sweep_not_even_one_that_ignores_sigterm(storm):
    _, _, directory = storm
    assert left_over("MOEBENCH_TEST", str(directory)) == []
    for name in ("hanging.pid", "grandchild.pid"):  # both were there
        assert not Path("/proc", (directory / name).read_text()).exists()


def test_after_an_abnormal_end_the_next_case_runs_in_a_new_process(storm):
    _, rows, _ = storm
    processes = {tokens: row.facts["process"] for tokens, row in rows.items() if row.status == "ok"}
    assert len({processes[tokens] for tokens in range(1, 33) if tokens in processes}) == 1  # an exception costs no process
    for ended in (33, 36, 40, 50, 55):
        assert processes[ended - 1] != processes[ended + 1]


def test_200_mb_of_warnings_make_a_log_of_half_a_megabyte_with_head_and_tail(storm):
    _, _, directory = storm
    (log,) = (directory / "run" / "logs").glob("*fault_storm.log")
    text = log.read_text()
    assert len(text) < 5 * 2**20 / 8
    assert "bytes left out" in text
    assert "after 200 MB of warnings" in text


def test_the_stack_of_a_hang_is_in_its_log(storm):
    _, _, directory = storm
    (log,) = (directory / "run" / "logs").glob("*fault_storm.log")
    assert "most recent call first" in log.read_text()


def test_a_compiler_that_does_not_end_is_a_compile_timeout_of_all_that_need_it(tmp_path):
    command = ("sweep", "--model", "tiny", "--tokens", "1,2", "--backend", "fault_slow_compile", "--out", "run", "--json")
    done = moebench(*command, "--deadline", "jit=1.5", cwd=tmp_path, check=3)
    rows = load_run(tmp_path / "run").records
    assert [row.status for row in rows] == ["compile_timeout"] * 2
    assert "compile_for_a_minute" in rows[0].reason
    assert json.loads(done.stdout)["deadlines_s"]["jit"] == 1.5


@pytest.mark.parametrize("given", ["jitt=3", "jit", "jit=-1", "jit=nan", "jit=1e9"])
def test_a_deadline_that_is_none_is_refused(tmp_path, given):
    done = moebench("sweep", "--deadline", given, "--dry-run", cwd=tmp_path, check=2)
    assert given in done.stderr


def test_a_device_on_which_nothing_starts_any_more_is_quarantined(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        "if 'moebench.probe' in sys.orig_argv and pathlib.Path('grave').exists(): os._exit(9)\n"
        "if 'moebench.worker' in sys.orig_argv: pathlib.Path('starts').open('a').write('x')\n"
    )
    (tmp_path / "grave").write_text("")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    command = ("sweep", "--model", "tiny", "--tokens", "1,2", "--backend", "fault_dies,torch", "--out", "run")
    moebench(*command, cwd=tmp_path, check=3, PYTHONPATH=path)
    rows = load_run(tmp_path / "run").records
    crashed = [row for row in rows if row.status == "crash"]
    refused = [row for row in rows if "quarantined" in row.reason]
    assert len(crashed) <= 1
    assert len(crashed) + len(refused) + sum(row.status == "ok" for row in rows) == 4
    assert refused
    assert all("probes failed in a row, the last one: " in row.reason and "exit code 9" in row.reason for row in refused)
    starts = len((tmp_path / "starts").read_text())
    moebench(*command, "--resume", cwd=tmp_path, check=3, PYTHONPATH=path)  # what was not tried may be tried as often as you like
    (tmp_path / "grave").unlink()
    moebench(*command, "--resume", cwd=tmp_path, check=3, PYTHONPATH=path)
    assert {row.case.num_tokens for row in load_run(tmp_path / "run").records if row.backend == "torch" and row.status == "ok"} == {1, 2}
    assert len((tmp_path / "starts").read_text()) > starts


def begin(directory, *command, **extra):
    """A sweep that a test interferes with; its output goes to a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "moebench", "sweep", "--model", "tiny", "--out", "run", *command],
        cwd=directory,
        env={**ENVIRONMENT, "MOEBENCH_TEST": str(directory), **extra},
        preexec_fn=heed_interrupts,
        stdout=(directory / "output").open("w"),
        stderr=subprocess.STDOUT,
    )


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_interrupting_finishes_the_point_in_progress_and_prints_how_to_go_on(tmp_path):
    process = begin(tmp_path, "--tokens", "0:400:1", "--backend", "fault_slow", "--repeat-check", "1")
    output = tmp_path / "output"
    wait_for(lambda: output.read_text().count("\nok ") == 1)
    time.sleep(0.3)  # into the next point, which takes seconds
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    expected = "moebench sweep --model tiny --out run --tokens 0:400:1 --backend fault_slow --repeat-check 1 --resume"
    assert output.read_text().rstrip().endswith(expected)
    assert [row.status for row in load_run(tmp_path / "run").records] == ["ok", "ok"]
    assert left_over("MOEBENCH_TEST", str(tmp_path)) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_point_that_does_not_end_after_an_interrupt_is_given_up(tmp_path, number, code):
    process = begin(tmp_path, "--tokens", "1,2", "--backend", "fault_hangs", "--deadline", "interrupt=1")
    wait_for((tmp_path / "hanging.pid").exists)
    process.send_signal(number)
    assert process.wait(60) == code
    assert [(row.case.num_tokens, row.status) for row in load_run(tmp_path / "run").records] == [(1, "interrupted")]
    assert "--resume" in (tmp_path / "output").read_text()
    assert left_over("MOEBENCH_TEST", str(tmp_path)) == []


def test_a_second_interrupt_stops_at_once(tmp_path):
    process = begin(tmp_path, "--tokens", "1,2", "--backend", "fault_hangs", "--deadline", "interrupt=9999")
    wait_for((tmp_path / "hanging.pid").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the point, as long as it was told to
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert load_run(tmp_path / "run").records == ()
    assert left_over("MOEBENCH_TEST", str(tmp_path)) == []


def test_a_second_process_on_a_run_is_refused_and_told_who_has_it(tmp_path):
    process = begin(tmp_path, "--tokens", "1,2", "--backend", "fault_hangs")
    wait_for((tmp_path / "hanging.pid").exists)
    command = ("sweep", "--model", "tiny", "--tokens", "1,2", "--backend", "fault_hangs", "--out", "run", "--resume")
    done = moebench(*command, cwd=tmp_path, check=2)
    assert f"process {process.pid}: moebench sweep --model tiny --out run" in done.stderr
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_worker_dies_with_a_supervisor_that_is_killed(tmp_path):
    process = begin(tmp_path, "--tokens", "1,2", "--backend", "fault_hangs")
    wait_for((tmp_path / "hanging.pid").exists)
    worker = Path("/proc", (tmp_path / "hanging.pid").read_text())
    assert worker.exists()
    process.kill()
    process.wait()
    os.kill(int((tmp_path / "grandchild.pid").read_text()), signal.SIGKILL)  # it left the worker's process group
    wait_for(lambda: left_over("MOEBENCH_TEST", str(tmp_path)) == [], 10)


def test_the_supervisor_never_imports_torch(small):
    done, _, _ = small
    assert done.stdout.splitlines()[-1] == "False 0"


def test_a_soak_counts_launches_and_those_that_differ(tmp_path):
    good = moebench("soak", "fault_ok", "--minutes", "0.02", "--model", "tiny", "--tokens", "2", "--json", cwd=tmp_path, check=0)
    assert json.loads(good.stdout)["launches"] >= 1
    assert json.loads(good.stdout)["mismatches"] == 0
    bad = moebench("soak", "fault_sporadic", "--minutes", "0.1", "--model", "tiny", "--tokens", "2", "--json", cwd=tmp_path, check=3)
    told = json.loads(bad.stdout)
    assert told["status"] == "wrong"
    assert told["mismatches"] >= 1
    assert "came out different" in told["reason"]
    assert "did you mean 'fault_ok'" in moebench("soak", "fault_okk", cwd=tmp_path, check=2).stderr
    assert json.loads(moebench("soak", "fault_skips", "--json", cwd=tmp_path, check=3).stdout)["status"] == "skipped"
