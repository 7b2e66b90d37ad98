"""Real faults on a real GPU: each is one bad row, and its neighbours are right in fresh processes; one sweep, about a minute."""

import time
from pathlib import Path

import pytest

from moebench.journal import load_run
from tests.orphans import left_over
from tests.running import moebench

EXPECTED = {  # token count -> what tests/faults makes of it
    1: ("oom", "Tried to allocate 4096.00 GiB"),
    3: ("cuda_error", "CUDA error 700"),
    5: ("cuda_error", "CUDA error 710"),
    7: ("hang", "no sign of life for 6 s"),
}
SLACK_BYTES = 64 << 20  # the driver's own, which comes and goes
FREED_S = 10  # within so long


def used_bytes():
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    """Where it ran, its rows by token count, and the device memory that was in use before."""
    directory = tmp_path_factory.mktemp("storm")
    before = used_bytes()
    # hot: a tiny layer is cold only after hundreds of copies, which cost seconds a row
    axes = ("--model", "tiny", "--tokens", "1:8:1", "--backend", "fault_gpu_storm", "--l2", "hot")
    command = ("sweep", *axes, "--repeat-check", "20", "--out", "run")
    mark = {"MOEBENCH_TEST": str(directory)}
    moebench(*command, "--deadline", "check=6", "--deadline", "teardown=5", cwd=directory, check=3, **mark)
    return directory, {row.case.num_tokens: row for row in load_run(directory / "run").records}, before


def test_each_real_fault_is_one_bad_row_and_every_other_row_is_ok(storm):
    _, rows, _ = storm
    assert sorted(rows) == list(range(1, 9))
    found = {tokens: (row.status, row.reason) for tokens, row in rows.items()}
    assert {t: s for t, (s, _) in found.items()} == {t: EXPECTED[t][0] if t in EXPECTED else "ok" for t in rows}, found
    for tokens, (_, part) in EXPECTED.items():
        assert part in rows[tokens].reason
        assert rows[tokens].timing is None


def test_the_neighbours_of_a_fault_ran_in_different_processes(storm):
    _, rows, _ = storm
    processes = [rows[tokens].facts["process"] for tokens in (2, 4, 6, 8)]  # one after each fault
    assert len(set(processes)) == 4


def test_no_process_is_left_and_no_memory_is_in_use(storm):
    directory, _, before = storm
    assert left_over("MOEBENCH_TEST", str(directory)) == []
    (log,) = Path(directory, "run", "logs").glob("*fault_gpu_storm.log")
    assert "most recent call first" in log.read_text()  # of the hang
    until = time.monotonic() + FREED_S
    while (used := used_bytes()) > before + SLACK_BYTES:
        assert time.monotonic() < until, f"{(used - before) >> 20} MiB are still in use"
        time.sleep(0.2)
