"""The last line of a sweep says where its time went."""

import pytest

from moebench.case import case
from moebench.record import Record
from moebench.reports.terminal import time_line


def spent(**phases_s):
    return Record(case=case("tiny", 1), backend="torch", act_dtype="bf16", arch="cpu", device="", status="ok", phases_s=phases_s)


def test_measuring_is_a_share_and_what_no_worker_spent_is_processes_and_files():
    rows = [spent(time=150.0, check=60.0, jit=80.0, alloc=0.4), spent(time=7.0, check=38.0, trace=11.0, jit=9.0)]
    told = time_line(rows, 380.0)
    assert told == "380 s: 266 (70%) measuring (time 157, check 98, trace 11), jit 89, processes and files 25"


@pytest.mark.parametrize(
    ("rows", "wall_s", "told"),
    [
        ([], 2.0, "2 s: 0 (0%) measuring, processes and files 2"),
        ([], 0.0, "0 s: 0 measuring, no other second"),
    ],
)
def test_little_and_nothing_are_said_too(rows, wall_s, told):
    assert time_line(rows, wall_s) == told
