"""What nsys and ncu see of a sweep: the NVTX ranges of its workers, read by a library injected as theirs are."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moebench.case import case
from tests.running import ENVIRONMENT

SOURCE = Path(__file__).with_name("nvtx_injection.c")
FLAGS = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-cast-function-type")
ONCE, EACH_CASE = ("import", "alloc", "jit"), ("alloc", "check", "time")  # phases of a worker, then of a case, as they first come


@dataclass(frozen=True, kw_only=True)
class Event:
    pid: int
    thread: int
    what: str  # domain, string, push, pop
    domain: str
    registered: bool
    text: str


@pytest.fixture(scope="module")
def injection(tmp_path_factory):
    """The library, compiled here."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler, cc, on PATH")
    library = tmp_path_factory.mktemp("nvtx") / "injection.so"
    built = subprocess.run([compiler, *FLAGS, "-o", str(library), str(SOURCE)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return library


@pytest.fixture(scope="module")
def events(injection, tmp_path_factory):
    """Everything in the domain moebench during a sweep of two backends, one worker process each."""
    directory = tmp_path_factory.mktemp("sweep")
    log = directory / "nvtx.log"
    done = subprocess.run(
        [sys.executable, "-m", "moebench", "sweep", "--model", "tiny", "--tokens", "1,2", "--backend", "torch,numpy"],
        cwd=directory,
        env=ENVIRONMENT | {"NVTX_INJECTION64_PATH": str(injection), "NVTX_INJECTION_LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = [parse(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [event for event in found if event.domain == "moebench"]


def parse(line):
    pid, thread, what, domain, registered, text = line.split("\t")
    return Event(pid=int(pid), thread=int(thread), what=what, domain=domain, registered=registered == "1", text=text)


def stacks(events):
    """The open ranges, outermost first, after each push of one thread; none may be left open or closed twice."""
    opened, seen = [], []
    for event in events:
        if event.what == "push":
            opened.append(event.text)
            seen.append(tuple(opened))
        elif event.what == "pop":
            opened.pop()
    assert opened == []
    return seen


def workers(events):
    """The events of each worker, by the backend that its cases name."""
    by_pid = {pid: [event for event in events if event.pid == pid] for pid in {event.pid for event in events}}
    return {next(e.text for e in mine if e.text.startswith("case|")).split("|")[1]: mine for mine in by_pid.values()}


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_tool_sees_each_phase_in_its_case_in_its_run(events, backend):
    mine = workers(events)[backend]
    seen = stacks(mine)
    ((run,),) = {stack[:1] for stack in seen}
    assert run.startswith("run|")
    named = [f"case|{backend}|{case('tiny', tokens).key}" for tokens in (1, 2)]
    assert list(dict.fromkeys(stack for stack in seen if len(stack) <= 2)) == [
        (run,),
        *((run, f"phase|{phase}") for phase in ONCE),
        *((run, name) for name in named),
    ]
    phases = [(run, name, f"phase|{phase}") for name in named for phase in EACH_CASE]
    assert list(dict.fromkeys(stack for stack in seen if len(stack) == 3)) == phases


def test_all_workers_of_a_sweep_are_in_one_run(events):
    found = workers(events)
    assert sorted(found) == ["numpy", "torch"]
    assert len({stacks(mine)[0] for mine in found.values()}) == 1


def test_the_ranges_of_a_worker_are_on_one_thread(events):
    # ncu looks at the push/pop ranges of the thread that launches a kernel
    for mine in workers(events).values():
        assert len({event.thread for event in mine}) == 1


def test_every_range_is_a_registered_string(events):
    # nsys --capture-range=nvtx heeds no others unless NSYS_NVTX_PROFILER_REGISTER_ONLY=0 is set
    pushed = [event for event in events if event.what == "push"]
    assert pushed
    assert all(event.registered for event in pushed)
