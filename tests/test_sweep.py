"""The whole line from plan to report in real worker processes, with backends that go wrong on purpose."""

import json
import subprocess
import sys

import pytest

from moebench.journal import load_run
from tests.running import ENVIRONMENT, heed_interrupts, moebench

FAULTS = ("raises", "prepare", "nan", "zeros", "writes", "unwritten", "random", "dies", "chatty", "skips", "import", "misnamed", "ok")


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
        ("fault_prepare", ["failed"] * 3, "in phase jit: MemoryError: workspace of 3 TiB"),
        ("fault_nan", ["nonfinite"] * 3, ""),
        ("fault_zeros", ["wrong"] * 3, "zero"),
        ("fault_writes", ["input_changed"] * 3, "hidden_states"),
        ("fault_unwritten", ["unwritten"] * 3, ""),
        ("fault_random", ["nondeterministic"] * 3, ""),
        ("fault_dies", ["failed"] * 3, "SIGKILL"),
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
    assert len(document["records"]) == len(run.records) == 42
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
    assert {tuple(r.facts.items()) for r in run.records if r.backend == "fault_ok"} == {(("largest_batch", 8),)}


def test_resume_does_only_what_is_missing(tmp_path):
    command = ("sweep", "--model", "tiny", "--tokens", "1,2,3", "--backend", "fault_ok,torch", "--out", "run")
    moebench(*command, cwd=tmp_path, check=0)
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], lines[2][:50]]))
    moebench(*command, "--resume", cwd=tmp_path, check=0)
    resumed = journal.read_text().splitlines(keepends=True)
    assert resumed[:2] == lines[:2]
    records = load_run(tmp_path / "run").records
    assert len({r.key for r in records}) == len(records) == 6
    assert len({r.run_id for r in records}) == 1


def test_resuming_a_journal_that_cannot_be_read_is_an_error_that_names_the_line(tmp_path):
    command = ("sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--out", "run")
    moebench(*command, cwd=tmp_path, check=0)
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_text("nonsense\n" + journal.read_text())
    done = moebench(*command, "--resume", cwd=tmp_path, check=6)
    assert "journal.jsonl, line 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_directory_is_not_overwritten_nor_resumed_with_another_plan(tmp_path):
    command = ("sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--out", "run")
    moebench(*command, cwd=tmp_path, check=0)
    assert "--resume" in moebench(*command, cwd=tmp_path, check=2).stderr
    other = moebench("sweep", "--model", "tiny", "--tokens", "2", "--backend", "torch", "--out", "run", "--resume", cwd=tmp_path, check=2)
    assert "another plan" in other.stderr
    assert (
        "no run of this plan"
        in moebench("sweep", "--model", "tiny", "--tokens", "2", "--backend", "torch", "--resume", cwd=tmp_path, check=2).stderr
    )


def test_rows_of_another_architecture_are_skipped_with_a_sentence(tmp_path):
    moebench(
        "sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--arch", "cpu,sm100", "--out", "run", cwd=tmp_path, check=0
    )
    rows = {r.arch: r for r in load_run(tmp_path / "run").records}
    assert rows["cpu"].status == "ok" or rows["cpu"].reason  # skipped where this test runs on a GPU machine
    assert rows["sm100"].status == "skipped"
    assert "moebench report" in rows["sm100"].reason


def test_zero_tokens_work(tmp_path):
    moebench(
        "sweep", "--model", "tiny", "--tokens", "0", "--backend", "torch,numpy,triton_mxfp4_bf16", "--out", "run", cwd=tmp_path, check=0
    )
    assert {r.status for r in load_run(tmp_path / "run").records} == {"ok"}


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


def test_a_silent_worker_is_stopped_at_its_deadline(tmp_path, monkeypatch):
    from moebench import sweep
    from moebench.case import case
    from moebench.plan import Plan, Point

    monkeypatch.setattr(sweep, "DEADLINES_S", {**sweep.DEADLINES_S, "import": 0.05})
    plan = Plan(points=(Point(case=case("tiny", 1), backend="torch"),))
    found = sweep.Survey(device=sweep.Device(arch="cpu", name="cpu", torch="cpu", memory_bytes=0), reasons={}, broken={}, act_dtypes={})
    (record,) = sweep.run(plan, found, "r", (), tmp_path, lambda *_: None)
    assert record.status == "failed"
    assert "phase import" in record.reason
    assert "no sign of life" in record.reason


def test_interrupting_keeps_what_was_measured_and_prints_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", "sweep", "--model", "tiny", "--tokens", "0:400:1", "--backend", "torch", "--out", "run"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        preexec_fn=heed_interrupts,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ok"):
            break
    process.send_signal(2)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert rest.rstrip().endswith("moebench sweep --model tiny --tokens 0:400:1 --backend torch --out run --resume")
    assert load_run(tmp_path / "run").records
