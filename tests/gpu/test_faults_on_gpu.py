"""Real faults on a real GPU: each is one bad row, and its neighbours are right in fresh processes."""

from pathlib import Path

import pytest

from moebench.journal import load_run
from tests.orphans import left_over
from tests.running import moebench

EXPECTED = {  # token count -> what tests/faults makes of it
    2: ("cuda_error", "CUDA error 700"),
    4: ("cuda_error", "CUDA error 710"),
    6: ("oom", "Tried to allocate"),
    8: ("hang", "no sign of life for 8 s"),
}


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("storm")
    command = ("sweep", "--model", "tiny", "--tokens", "1:9:1", "--backend", "fault_gpu_storm", "--repeat-check", "20", "--out", "run")
    mark = {"MOEBENCH_TEST": str(directory)}
    moebench(*command, "--deadline", "check=8", "--deadline", "teardown=5", cwd=directory, check=3, **mark)
    return directory, {row.case.num_tokens: row for row in load_run(directory / "run").records}


def test_each_real_fault_is_one_bad_row_and_every_other_row_is_ok(storm):
    _, rows = storm
    assert sorted(rows) == list(range(1, 10))
    assert {tokens: row.status for tokens, row in rows.items()} == {t: EXPECTED[t][0] if t in EXPECTED else "ok" for t in rows}
    for tokens, (_, part) in EXPECTED.items():
        assert part in rows[tokens].reason
        assert rows[tokens].timing is None


def test_the_neighbours_of_a_fault_ran_in_different_processes(storm):
    _, rows = storm
    for tokens in EXPECTED:
        assert rows[tokens - 1].facts["process"] != rows[tokens + 1].facts["process"]


def test_no_process_is_left_and_the_device_is_well(storm):
    directory, _ = storm
    assert left_over("MOEBENCH_TEST", str(directory)) == []
    (log,) = Path(directory, "run", "logs").glob("*fault_gpu_storm.log")
    assert "most recent call first" in log.read_text()  # of the hang
    done = moebench("sweep", "--model", "tiny", "--tokens", "5", "--backend", "torch", "--out", "after", cwd=directory, check=0)
    assert "1 ok" in done.stdout
