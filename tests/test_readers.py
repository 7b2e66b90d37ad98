"""A table that several processes wrote is the table that one writes, or is left to one."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moebench.journal import JOURNAL, Journal, load_run, merge, whole_journal
from moebench.record import to_json
from moebench.reports import json_rows, table_csv
from tests.full_records import HOSTILE, full, whole_run
from tests.made_runs import untimed, write_run
from tests.running import ENVIRONMENT, heed_interrupts

# The command with three processes for however little there is, and a word on stderr where they wrote the table.
SEVERAL = """
import os, resource, sys
from moebench.cli import main
from moebench import forked
from moebench.reports import readers
forked.WORTH, forked.SHARE, several = 0, 1, readers.write
os.sched_getaffinity = lambda process: {0, 1, 2}
def write(journals, table, out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ.get("MOST_BYTES", limits[0])), limits[1]))
    try:
        done = several(journals, table, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print("written by several" if done else "left to one", file=sys.stderr)
    return done
readers.write = write
main()
"""
ROWS = [replace(row, time=f"2026-11-29T00:00:{number:02d}+00:00") for number, row in enumerate(whole_run())]


def report(cwd, *words, **environment):
    command = [sys.executable, "-c", SEVERAL, "report", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_a_csv_of_several_processes_is_that_of_one_to_the_last_byte(tmp_path):
    runs = [write_run(tmp_path / "a", *ROWS[:20]), write_run(tmp_path / "b", *ROWS[20:])]
    done = report(tmp_path, *runs, "--out", "several.csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "several.csv\n", "written by several\n")
    assert (tmp_path / "several.csv").read_text(encoding="utf-8") == table_csv.rows(merge([load_run(run) for run in runs]))


def test_a_json_of_several_processes_says_what_that_of_one_says(tmp_path):
    runs = [write_run(tmp_path / "a", *ROWS[:20]), write_run(tmp_path / "b", *ROWS[20:])]
    done = report(tmp_path, *runs, "--out", "several.json")
    assert (done.returncode, done.stderr) == (0, "written by several\n")
    several = json.loads((tmp_path / "several.json").read_text(encoding="utf-8"))
    assert several == json.loads(json_rows.document([load_run(run) for run in runs]))
    assert len(several["records"]) == len(ROWS)


def test_lines_of_older_schemas_and_of_hostile_names_are_in_the_json_as_records_are(tmp_path):
    old = {**json.loads(to_json(ROWS[0])), "schema": "1.1"}
    del old["canary"]["matmul_us"]  # of schema 1.2
    hostile = replace(ROWS[1], backend=HOSTILE, reason='\u00e4\u2028\x1b[31m], "kernels":[', facts={"kernels": '],"x":['})
    run = write_run(tmp_path / "run")
    with (run / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(old) + "\n")
    journal = Journal(run)
    journal.append(hostile)
    journal.append(ROWS[2])
    done = report(tmp_path, run, "--out", "several.json")
    assert (done.returncode, done.stderr) == (0, "written by several\n")
    found = json.loads((tmp_path / "several.json").read_text(encoding="utf-8"))
    assert found == json.loads(json_rows.document([load_run(run)]))
    assert found["records"][0]["canary"]["matmul_us"] == 0.0


@pytest.mark.parametrize(
    ("why", "runs"),
    [
        ("a row was done again", [[*ROWS[:9], replace(ROWS[3], time="2026-11-29T00:01:00+00:00", reason="again")]]),
        ("a failure came before its time", [[untimed("triton_mxfp4_bf16", 1, "oom", "", record={"time": "2026-11-28"}), *ROWS[:9]]]),
        (
            "another machine skipped what this one measured",
            [[replace(ROWS[0], status="skipped", timing=None, round=7, time="2026-11-28"), *ROWS[:9]]],
        ),
        ("the clock was set back", [[*ROWS[5:9], *ROWS[:5]]]),
        ("the later run is named first", [ROWS[9:], ROWS[:9]]),
        ("two runs went on at the same time", [ROWS[::2], ROWS[1::2]]),
    ],
)
def test_rows_that_have_to_be_merged_are_left_to_one_process(tmp_path, why, runs):
    paths = [write_run(tmp_path / str(number), *rows) for number, rows in enumerate(runs)]
    done = report(tmp_path, *paths, "--out", "out.csv")
    assert (done.returncode, done.stderr) == (0, "left to one\n"), why
    assert rows_of(tmp_path / "out.csv") == list(csv.DictReader(io.StringIO(table_csv.rows(merge([load_run(path) for path in paths])))))


def test_a_line_that_is_wrong_is_named_and_the_file_that_was_there_stays(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    (run / JOURNAL).write_bytes(b"".join([*lines[:30], lines[30].replace(b"cuda_graph", b"cuda_grape"), *lines[31:]]))
    (tmp_path / "out.csv").write_text("what was there\n")
    done = report(tmp_path, run, "--out", "out.csv")
    assert done.returncode == 6
    assert "left to one" in done.stderr
    assert f"{run / JOURNAL}, line 31" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.csv").read_text() == "what was there\n"


def test_a_last_line_that_was_cut_off_is_left_out_and_noted(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    data = (run / JOURNAL).read_bytes()
    (run / JOURNAL).write_bytes(data[:-100])
    for name in ("out.csv", "out.json"):
        done = report(tmp_path, run, "--out", name)
        assert done.stderr == f"written by several\nnote: {run}: the journal's last line was cut off and is left out\n"
    assert len(rows_of(tmp_path / "out.csv")) == len(ROWS) - 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert (len(found["records"]), found["runs"][0]["torn"]) == (len(ROWS) - 1, True)


def test_a_file_that_cannot_be_written_whole_is_an_error_in_a_sentence(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    done = report(tmp_path, run, "--out", "out.csv", MOST_BYTES="12000")  # which the first process writes
    assert (done.returncode, done.stderr) == (5, "error: out.csv: File too large\n")


def test_what_is_no_plain_file_is_left_to_one_process(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    done = report(tmp_path, run, "--format", "csv", "--out", "/dev/stdout")
    assert done.stdout.startswith("run_id,time,")
    assert done.stderr == ""


def test_a_process_that_is_gone_is_no_reason_to_have_no_table(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", *ROWS)
    end = "from moebench.reports import table_csv\ntable_csv._encoded = lambda kernels: os.kill(os.getpid(), 9)\nmain()\n"
    monkeypatch.setitem(globals(), "SEVERAL", SEVERAL.replace("main()\n", end))
    done = report(tmp_path, run, "--out", "out.csv")
    assert (done.returncode, done.stderr) == (0, "left to one\n")
    assert len(rows_of(tmp_path / "out.csv")) == len(ROWS)


def test_processes_do_not_outlive_one_that_was_killed(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    dying = SEVERAL.replace("main()\n", "readers._each_for_itself = lambda seen: os.kill(os.getpid(), 9)\nmain()\n")
    command = [sys.executable, "-c", dying, "report", str(run), "--out", "out.csv"]
    done = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
    assert done.wait() == -signal.SIGKILL
    for _ in range(100):
        if not alive(done.pid):
            return
        time.sleep(0.1)
    os.killpg(done.pid, signal.SIGKILL)
    pytest.fail("its readers wait for it")


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_all_processes_without_a_traceback(tmp_path):
    run = write_run(tmp_path / "run", *ROWS)
    slow = SEVERAL.replace(
        "main()\n", "import time\nfrom moebench.reports import table_csv\ntable_csv._encoded = lambda k: time.sleep(60)\nmain()\n"
    )
    command = [sys.executable, "-c", slow, "report", str(run), "--out", "out.csv"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as done:
        children = Path(f"/proc/{done.pid}/task/{done.pid}/children")
        while len(children.read_text().split()) < 3:
            time.sleep(0.02)
        time.sleep(0.5)
        os.killpg(done.pid, signal.SIGINT)
        told = done.communicate(timeout=20)[1]
    assert (done.returncode, told.strip()) == (1, "Aborted!")
    assert not alive(done.pid)
    assert not (tmp_path / "out.csv").exists()


def test_where_no_process_can_be_started_one_does_it_all(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", *ROWS)
    full_up = "def no(*arguments): raise BlockingIOError(11, 'Resource temporarily unavailable')\nreaders._Reader = no\nmain()\n"
    monkeypatch.setitem(globals(), "SEVERAL", SEVERAL.replace("main()\n", full_up))
    done = report(tmp_path, run, "--out", "out.csv")
    assert (done.returncode, done.stderr) == (0, "left to one\n")
    assert len(rows_of(tmp_path / "out.csv")) == len(ROWS)


def test_reports_of_small_journals_do_not_import_multiprocessing(tmp_path):
    code = "import sys, moebench.commands.report\nprint([name for name in sys.modules if name.startswith('multiprocessing')])"
    uncovered = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("COVERAGE")}  # which would import it itself
    done = subprocess.run([sys.executable, "-c", code], env=uncovered, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_small_journals_are_left_to_one_process(tmp_path):
    journal = whole_journal(write_run(tmp_path / "run", *ROWS))
    assert journal.end > 10_000
    assert not table_csv.write([journal], tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_rows_that_differ_in_one_thing_are_each_for_themselves(tmp_path):
    rows = [full("a", 4, 50.0, record={"time": f"2026-11-29T00:00:{number:02d}", "round": number}) for number in range(8)]
    rows += [replace(rows[0], backend="b", time="2026-11-29T00:01:00"), replace(rows[0], arch="sm100", time="2026-11-29T00:01:01")]
    run = write_run(tmp_path / "run", *rows)
    assert report(tmp_path, run, "--out", "out.csv").stderr == "written by several\n"
    assert len(rows_of(tmp_path / "out.csv")) == len(rows)
