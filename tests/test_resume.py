"""A run that was cut short and resumed is the run that was not."""

import json
import resource
import shutil

import pytest

from moebench.journal import load_run
from tests.kill_resume import kill_and_resume
from tests.running import moebench

TINY = ("sweep", "--model", "tiny", "--repeat-check", "5", "--out", "run")
ONE = (*TINY, "--tokens", "1", "--backend", "torch")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Where ONE was run as a resumption of nothing."""
    directory = tmp_path_factory.mktemp("one")
    moebench(*ONE, "--resume", cwd=directory, check=0)
    return directory


@pytest.fixture
def finished(one, tmp_path):
    """A copy of that run, for a test that damages it or tries to."""
    shutil.copytree(one / "run", tmp_path / "run")
    return tmp_path


def test_resume_does_only_what_is_missing(tmp_path):
    command = (*TINY, "--tokens", "1,2,3", "--backend", "fault_ok,torch")
    moebench(*command, cwd=tmp_path, check=0)
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], lines[2][:50]]))
    assert "cut off" in moebench(*command, "--resume", cwd=tmp_path, check=0).stdout
    resumed = journal.read_text().splitlines(keepends=True)
    assert resumed[:2] == lines[:2]
    records = load_run(tmp_path / "run").records
    assert len({r.key for r in records}) == len(records) == 6
    assert len({r.run_id for r in records}) == 1


def test_killing_the_supervisor_loses_nothing_and_repeats_nothing(tmp_path):
    tally = kill_and_resume(tmp_path / "runs", kills=5, seed=11)
    assert tally.kills == 5


def test_what_failed_is_tried_once_more_and_what_is_wrong_is_not(tmp_path):
    command = (*TINY, "--tokens", "4", "--backend", "fault_raises,fault_zeros,fault_dies,torch", "--json")
    statuses = {"fault_raises": "failed", "fault_zeros": "wrong", "fault_dies": "crash", "torch": "ok"}

    def attempts():
        found = load_run(tmp_path / "run").records
        assert {r.backend: r.status for r in found} == statuses
        return {name: sum(r.backend == name for r in found) for name in statuses}

    moebench(*command, cwd=tmp_path, check=3)
    assert attempts() == {"fault_raises": 1, "fault_zeros": 1, "fault_dies": 1, "torch": 1}
    for _ in range(2):
        again = moebench(*command, "--resume", cwd=tmp_path, check=3)
        assert attempts() == {"fault_raises": 2, "fault_zeros": 1, "fault_dies": 2, "torch": 1}
        assert json.loads(again.stdout)["counts"] == {"failed": 1, "wrong": 1, "crash": 1, "ok": 1}  # a point counts once


def test_resuming_where_nothing_was_stored_begins(one):
    assert [r.status for r in load_run(one / "run").records] == ["ok"]


def test_resuming_a_journal_that_cannot_be_read_is_an_error_that_names_the_line(finished):
    journal = finished / "run" / "journal.jsonl"
    journal.write_text("nonsense\n" + journal.read_text())
    before = journal.read_bytes()
    done = moebench(*ONE, "--resume", cwd=finished, check=6)
    assert "journal.jsonl, line 1 (byte 0): is no record" in done.stderr
    assert "moebench fsck run" in done.stderr
    assert "Traceback" not in done.stderr
    assert journal.read_bytes() == before


def test_a_run_directory_is_not_overwritten_nor_resumed_with_another_plan(finished):
    command = (*TINY, "--backend", "torch")
    assert "--resume" in moebench(*ONE, cwd=finished, check=2).stderr
    assert "another plan" in moebench(*command, "--tokens", "2", "--resume", cwd=finished, check=2).stderr
    elsewhere = ("sweep", "--model", "tiny", "--tokens", "2", "--backend", "torch", "--resume")
    assert "no run of this plan" in moebench(*elsewhere, cwd=finished, check=2).stderr


def test_a_full_disk_ends_the_run_with_5_and_what_was_measured_is_printed(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # a child inherits it; this process writes no file meanwhile
    try:
        done = moebench(*TINY, "--tokens", "1:12:1", "--backend", "fault_ok", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 5, done.stderr
    assert "journal.jsonl: File too large; what was written before is intact" in done.stderr
    kept = load_run(tmp_path / "run").records
    assert 1 <= len(kept) < 12
    assert f"{len(kept) + 1} records: {len(kept) + 1} ok" in done.stdout  # the one that did not fit is in the table
    assert moebench("fsck", "run", cwd=tmp_path, check=0).stdout == "run: all is well\n"
    moebench(*TINY, "--tokens", "1:12:1", "--backend", "fault_ok", "--resume", cwd=tmp_path, check=0)
    assert len(load_run(tmp_path / "run").records) == 12


@pytest.mark.parametrize("name", ["journal.jsonl", ".lock"])
def test_a_run_directory_with_a_link_in_it_is_not_written(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    done = moebench(*TINY, "--tokens", "1", "--backend", "torch", cwd=tmp_path)
    assert done.returncode == 5
    assert not (tmp_path / "elsewhere").exists()
    assert "Traceback" not in done.stderr
