"""The worker of the next group starts while the present one prepares: it waits, is used, and outlives nobody."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moebench import child, sweep
from moebench.case import case
from moebench.plan import Plan, Point
from moebench.sweep import Rules
from tests.orphans import left_over
from tests.running import ENVIRONMENT


@dataclass
class Seen:
    """Every worker that was started, as it was."""

    started: list[child.Child] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    running: list[int] = field(default_factory=list)  # workers alive when it was started


def plan(*backends, tokens=(1,)):
    """In this order, which a plan draws by its seed."""
    points = tuple(Point(case=case("tiny", m), backend=backend) for backend in backends for m in tokens)
    for seed in range(1000):
        drawn = Plan(points=points, order_seed=seed)
        if [group[0].backend for _, group in drawn.groups()] == list(backends):
            return drawn
    raise AssertionError(backends)


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Its faults are found; what sweep starts is written down."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "COLUMNS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    found = Seen()

    class Spied(child.Child):
        def __init__(self, *arguments, held=False):
            found.running.append(sum(one._process.poll() is None for one in found.started))
            super().__init__(*arguments, held=held)
            found.started.append(self)
            found.held.append(held)

    monkeypatch.setattr(sweep, "Child", Spied)
    return found


def records(of, tmp_path, **rules):
    machine = sweep.survey(of.points, [], tmp_path / "survey.log")
    given = Rules(repeat_check=2, **rules)
    return sweep.run(of, machine, "r", (), tmp_path / "logs", lambda phase, current, backend: None, given)


def test_each_group_but_the_first_gets_a_worker_that_was_there_before_its_turn(seen, tmp_path):
    rows = list(records(plan("fault_ok", "torch", "fault_raises"), tmp_path, ahead=True))
    assert [(row.backend, row.status) for row in rows] == [("fault_ok", "ok"), ("torch", "ok"), ("fault_raises", "ok")]
    assert seen.held == [False, True, True]
    assert seen.running == [0, 1, 1]
    assert len({one.pid for one in seen.started}) == 3
    assert [one._process.poll() for one in seen.started] == [0, 0, 0]


def test_a_worker_that_dies_neither_uses_up_the_one_that_waits_nor_harms_it(seen, tmp_path):
    rows = list(records(plan("fault_dies", "fault_ok", tokens=(1, 2)), tmp_path, ahead=True))
    assert [row.status for row in rows] == ["crash", "crash", "ok", "ok"]
    assert seen.held == [False, True, False]  # the third is for the case after the first crash
    assert {row.facts["process"] for row in rows[2:]} == {seen.started[1].pid}


def test_a_run_that_is_left_early_leaves_nobody_waiting(seen, tmp_path):
    running = records(plan("fault_ok", "torch"), tmp_path, ahead=True)
    assert next(running).status == "ok"
    running.close()
    assert seen.held == [False, True]
    assert all(one._process.poll() is not None for one in seen.started)


def test_a_device_on_which_only_deaths_follow_each_other_is_quarantined_and_nobody_goes_on_waiting(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "MAX_DEVICE_DEATHS", 2)
    rows = list(records(plan("fault_dies", "fault_ok", tokens=(1, 2, 3)), tmp_path, ahead=True))
    assert [row.status for row in rows] == ["crash"] * 2 + ["failed"] * 4
    assert all("is quarantined, 2 workers in a row ended abnormally and no case was ok between" in row.reason for row in rows[2:])
    assert all(one._process.poll() is not None for one in seen.started)


def test_where_nothing_is_left_to_do_nobody_is_started(seen, tmp_path):
    assert [row.status for row in records(plan("fault_skips"), tmp_path, ahead=True)] == ["skipped"]
    assert seen.started == []


def test_a_cpu_is_what_is_timed_and_so_left_in_peace(seen, tmp_path):
    assert [row.status for row in records(plan("fault_ok", "torch"), tmp_path)] == ["ok"] * 2
    assert seen.held == [False, False]


WAITING = """
import sys, time
from moebench.child import Child
one = Child("moebench.worker", {"op": "measure", "cases": []}, {}, None, held=True)
print(one.pid, flush=True)
time.sleep(600)
"""


def test_one_that_waits_dies_with_a_supervisor_that_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=tmp_path,
        env={**ENVIRONMENT, "MOEBENCH_TEST": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    waiting = Path("/proc", parent.stdout.readline().strip())
    until = time.monotonic() + 120
    while b"libtorch" not in (waiting / "maps").read_bytes():  # it is well into its imports
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 10
    while left_over("MOEBENCH_TEST", str(tmp_path)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_secret_by_its_name_is_not_given_to_children(monkeypatch):
    secret = ("GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PGPASSWORD", "SSH_AUTH_SOCK", "DB_PASS", "api_key")
    kept = ("TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "KEYBOARD", "PATH", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    for name in (*secret, *kept):
        monkeypatch.setenv(name, "x")
    given = child.environment()
    assert not given.keys() & set(secret)
    assert given.keys() >= set(kept)
    assert given["PYTHONPATH"].startswith(str(child.ROOT))


@pytest.mark.gpu
def test_what_is_imported_ahead_opens_no_gpu():
    code = (
        "import io, os\nfrom moebench.worker import import_ahead\nimport_ahead(io.BytesIO())\nimport sys, torch\n"
        "held = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{fd}')]\n"
        "print('moebench.trial' in sys.modules, torch.cuda.is_initialized(), [path for path in held if path.startswith('/dev/nvidia')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False []"
