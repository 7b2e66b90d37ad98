"""Gates of the same code and of slower calls: on a simulated clock, in real processes with that clock, and what is made of them."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import groupby, islice

import pytest
import torch
from click.testing import CliRunner

import moebench.selfcheck
import moebench.timing
import moebench.trial
from moebench.case import case
from moebench.child import ROOT
from moebench.commands import gate_selfcheck as command
from moebench.commands.selfcheck import selfcheck
from moebench.device import Device
from moebench.gate_check import (
    SIMULATED,
    SLOWDOWNS,
    TOKENS,
    Cell,
    CheckError,
    Gate,
    NoGpuError,
    Plan,
    Simulated,
    Turn,
    _Group,
    broken_by_chance,
    judge_gates,
    judge_simulator,
    judged,
    on_simulated_clock,
    on_this_gpu,
    simulated_samples,
    simulator,
)
from moebench.gate_worker import Bench, WorkerError, followed_by_spin
from moebench.simulated import Scenario, SimulatedStopwatch
from moebench.worker import Request
from tests import running
from tests.test_architecture import sources

RATE = 1980.0  # cycles a us


def test_each_side_of_each_round_is_a_process_of_its_own_and_sides_swap_their_places():
    plan = Plan(gates=10, rounds=6)
    batches = list(plan.batches())
    assert plan.processes == 11 * 12
    assert [slowed for slowed, _ in batches] == [True] + [False] * 10
    for slowed, turns in batches:
        assert sorted((turn.round, turn.side) for turn in turns) == [(n, side) for n in range(6) for side in ("base", "cand")]
        pairs = [[turn.side for turn in group] for _, group in groupby(turns, lambda turn: turn.round)]
        assert all(pairs[n] == pairs[n + 1][::-1] for n in range(0, 6, 2))
        assert {turn.appended for turn in turns} == ({(0.0,) * (1 + len(SLOWDOWNS)), (0.0, *SLOWDOWNS)} if slowed else {()})
    assert len({tuple(turn.side for turn in turns) for _, turns in batches}) > 1
    assert list(Plan(seed=1).batches()) == list(Plan(seed=1).batches())


def test_on_the_simulated_clock_the_same_code_is_green_and_slower_calls_get_the_verdicts_that_were_promised():
    plan = Plan()
    gates = list(on_simulated_clock(plan))
    assert [gate.slowdown for gate in gates] == [*SLOWDOWNS, *[0.0] * 10]
    assert [gate.answer for gate in gates] == ["pass", "fail", "fail", "fail", *["pass"] * 10]
    for gate in gates:
        assert [cell.case for cell in gate.cells] == [f"gpt-oss-20b M={count}" for count in TOKENS]
        assert all(cell.kept for cell in gate.cells)
        assert all(cell.ratio == pytest.approx(1 + gate.slowdown, abs=0.005) for cell in gate.cells)
        expected = {0.0: "green", 0.02: ""}.get(gate.slowdown, "slower")
        assert {cell.promise for cell in gate.cells} == {expected}
    found = judge_gates(gates, plan.rounds)
    assert [(check.name, check.ok) for check in found] == [("same code", True), ("slower calls", True), ("reach", True)]
    assert found[0].text.startswith("10 of 10 gates of the same code are green")
    assert found[1].text.startswith("9 of 9 cells slowed by what they see or more were called slower")


def test_processes_that_differ_too_much_make_no_gate_green_and_the_way_out_is_named():
    plan = Plan(gates=3)
    same, _, reach = judge_gates(list(on_simulated_clock(plan, process_noise=0.04)), plan.rounds)
    assert not same.ok
    assert same.text.startswith("0 of 3 gates of the same code are green")
    assert "gate with more rounds" in same.do
    assert not reach.ok
    assert "Gate with more rounds than 8, or with --threshold" in reach.do


def cell(**changes):
    usual = {
        "case": "c",
        "base_us": 100.0,
        "slowdown": 0.05,
        "ratio": 1.05,
        "low": 1.04,
        "high": 1.06,
        "sees": 0.029,
        "threshold": 0.03,
        "outcome": "slower",
        "clears": False,
    }
    return Cell(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "promise", "kept"),
    [
        ({}, "slower", True),
        ({"outcome": "unclear"}, "slower", False),
        ({"slowdown": 0.029, "outcome": "unclear"}, "slower", False),
        ({"slowdown": 0.02, "outcome": "unclear"}, "", True),
        ({"slowdown": 0.02, "outcome": "same", "clears": True}, "", True),
        ({"slowdown": 0.02, "outcome": "faster", "clears": True}, "", False),
        ({"sees": 0.06, "outcome": "unclear"}, "not green", True),
        ({"sees": 0.06, "outcome": "same", "clears": True}, "not green", False),
        ({"sees": None, "outcome": "unclear"}, "not green", True),
        ({"slowdown": 0.0, "outcome": "same", "clears": True}, "green", True),
        ({"slowdown": 0.0, "outcome": "unclear"}, "green", False),
        ({"slowdown": 0.0, "outcome": "slower"}, "green", False),
    ],
)
def test_what_a_cell_sees_is_a_promise_that_its_verdict_keeps_or_breaks(changes, promise, kept):
    one = cell(**changes)
    assert (one.promise, one.kept) == (promise, kept)


def test_a_promise_of_nine_in_ten_may_be_broken_as_often_as_chance_breaks_it_once_in_a_hundred():
    assert [broken_by_chance(count, 0.1) for count in (0, 1, 9, 100)] == [0, 1, 3, 18]
    good, bad = cell(), cell(outcome="unclear")

    def ok(*cells):
        return judge_gates([Gate(slowdown=0.05, answer="fail", reasons=(), cells=cells)], 6)[0].ok

    assert ok(*[good] * 9, *[bad] * 3)
    assert not ok(*[good] * 8, *[bad] * 6)
    assert not ok(*[good] * 9, cell(outcome="same", clears=True))  # a slowdown above the threshold that is green
    assert not ok(*[good] * 9, cell(outcome="faster"))
    assert not ok(cell(sees=None, outcome="unclear"))  # nothing was promised, so nothing was tried


def test_a_red_gate_of_the_same_code_is_worse_than_one_without_a_verdict():
    red = Gate(slowdown=0.0, answer="fail", reasons=(), cells=(cell(slowdown=0.0, reason="it is slower"),))
    green = Gate(slowdown=0.0, answer="pass", reasons=(), cells=(cell(slowdown=0.0, outcome="same", clears=True),))
    same, _ = judge_gates([green, red], 6)
    assert same.text.startswith("1 of 2 gates of the same code are green")
    assert same.do.startswith("Do not let this machine fail a change")
    restless = replace(green, answer="none", reasons=("the SM clock moved",))
    same, _ = judge_gates([green, restless], 6)
    assert "the SM clock moved" in same.text
    assert same.do.startswith("End whatever else uses this machine")


def test_the_simulator_is_held_to_what_docs_promise_of_it():
    rows = list(simulator(families=40))
    assert [check.ok for check in judge_simulator(rows)] == [True, True, True]
    worse = [replace(row, rates=replace(row.rates, false_alarm=0.02, found=0.5, no_verdict=0.1)) for row in rows]
    assert isinstance(worse[0], Simulated)
    assert [check.ok for check in judge_simulator(worse)] == [False, False, False]


def _slower(sample, by):
    timing = sample.record.timing
    times = tuple(us * by for us in timing.samples_us)
    return replace(sample, record=replace(sample.record, timing=replace(timing, samples_us=times)))


def test_rounds_of_a_group_are_used_once_for_each_slowdown():
    _, turns = next(Plan(rounds=6, slowdowns=(0.1,)).batches())
    samples = [(turn, simulated_samples(turn, seed=number)) for number, turn in enumerate(turns)]
    (gate,) = judged(Plan(slowdowns=(0.1,)), True, samples, SIMULATED)
    assert (gate.slowdown, gate.answer) == (0.1, "fail")
    assert all(one.slowdown == 0.1 and one.outcome == "slower" for one in gate.cells)
    (none,) = judged(Plan(slowdowns=(0.1,)), True, samples[:8], SIMULATED)
    assert none.answer == "none"


def test_a_slower_call_is_compared_with_what_the_base_measured_at_the_same_place():
    _, turns = next(Plan(slowdowns=(0.02, 0.05)).batches())
    samples = [(turn, simulated_samples(turn, seed=number)) for number, turn in enumerate(turns)]
    usual = list(judged(Plan(slowdowns=(0.02, 0.05)), True, samples, SIMULATED))
    first_is_slow = [(turn, [_slower(one, 1.05) if one.place == 0 else one for one in seen]) for turn, seen in samples]
    assert list(judged(Plan(slowdowns=(0.02, 0.05)), True, first_is_slow, SIMULATED)) == usual
    second_is_slow = [(turn, [_slower(one, 1.05) if one.place == 1 else one for one in seen]) for turn, seen in samples]
    for before, after in zip(usual, judged(Plan(slowdowns=(0.02, 0.05)), True, second_is_slow, SIMULATED), strict=True):
        assert [cell.ratio for cell in after.cells] == pytest.approx([cell.ratio for cell in before.cells])


def test_processes_take_their_turns_and_none_is_left():
    said = []
    gates = list(on_this_gpu(Plan(gates=1, slowdowns=(0.05,)), "torch", said.append, simulated=True))
    assert [(gate.slowdown, gate.answer) for gate in gates] == [(0.05, "fail"), (0.0, "pass")]
    assert all(one.kept for gate in gates for one in gate.cells)
    assert [line.partition(": ")[2].partition(",")[0] for line in said[1:]] == ["1 of 2", "2 of 2", "done"]
    left = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False)
    assert "gate_worker" not in left.stdout


def test_processes_begin_to_import_before_anybody_listens_to_them(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nread request\ntouch {tmp_path}/asked-$$\nsleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with _Group([Turn(side="base", round=number) for number in range(3)], {"simulated": True}, tmp_path / "group"):
        until = time.monotonic() + 30
        while len(list(tmp_path.glob("asked-*"))) < 3 and time.monotonic() < until:
            time.sleep(0.05)
    assert len(list(tmp_path.glob("asked-*"))) == 3


def test_a_machine_without_a_gpu_says_so_before_anything_else():
    with pytest.raises(NoGpuError):
        list(on_this_gpu(Plan(gates=1), "torch", lambda _: None))


def test_a_process_that_dies_ends_the_check_with_its_last_words(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho out of luck\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(CheckError, match="out of luck"):
        list(on_this_gpu(Plan(gates=1), "torch", lambda _: None, simulated=True))


@pytest.fixture
def clock(monkeypatch):
    """A GPU whose calls take 100 us, and a spin kernel as long as it is told to."""
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(moebench.selfcheck, "cycles_per_us", lambda: RATE)
    monkeypatch.setattr(moebench.trial, "controls", lambda: moebench.trial.Control(copy_us=120.0, matmul_us=25.0))
    monkeypatch.setattr(moebench.trial, "copy_us", lambda: 120.0)

    def watch(calls, l2, flush_bytes, sm_mhz):
        assert l2 == "cold"
        slept.clear()
        calls[0]()
        return SimulatedStopwatch(Scenario(call_us=100.0 + sum(slept) / RATE, noise=0.0))

    monkeypatch.setattr(moebench.timing, "CudaStopwatch", watch)


CPU = Device(arch="cpu", name="stand-in", torch="cpu", memory_bytes=1 << 30)
CASES = [case("tiny", 2), case("tiny", 5)]


def test_a_process_appends_a_share_of_each_cells_own_median(clock):
    bench = Bench("torch", CASES, CPU)
    bench.prepare(check=True)
    plain = list(bench.measure(Turn(side="base", round=3)))
    assert [(s.record.case, s.place, s.record.round, s.record.run_id) for s in plain] == [(c, 0, 3, "base") for c in CASES]
    assert all(s.record.median_us == pytest.approx(100.0) and s.record.canary.after_us == 120.0 for s in plain)
    slowed = list(bench.measure(Turn(side="cand", round=0, appended=(0.0, 0.02, 0.1))))
    assert [s.place for s in slowed] == [0, 1, 2] * 2
    assert [s.record.median_us for s in slowed[:3]] == pytest.approx([100.0, 102.0, 110.0], rel=1e-4)
    assert [s.length for s in slowed[:3]] == pytest.approx([0.0, 0.02, 0.1], rel=1e-3)
    assert len({s.record.contract_id for s in (*plain, *slowed)}) == 1


def test_a_wrong_or_impossible_backend_is_not_measured(clock, monkeypatch):
    with pytest.raises(WorkerError, match=r"triton_mxfp4_bf16 on gpt-oss-20b M=1: "):
        Bench("triton_mxfp4_bf16", [case("gpt-oss-20b", 1)], CPU)
    bench = Bench("torch", CASES, CPU)
    real = bench._backend.prepare
    monkeypatch.setattr(type(bench._backend), "prepare", lambda self, layer, most: lambda tokens: real(layer, most)(tokens) * 1.1)
    with pytest.raises(WorkerError, match="is wrong: relative L2 error"):
        bench.prepare(check=True)


def test_the_spin_kernel_comes_after_the_call_and_its_output_stays(clock):
    order = []
    out = torch.ones(1)

    def call():
        order.append("call")
        return out

    torch.cuda._sleep = lambda cycles: order.append(cycles)
    assert followed_by_spin(call, 7)() is out
    assert order == ["call", 7]


def test_no_sweep_can_ask_for_a_spin_kernel():
    naming = [path.stem for _, path in sources() if "gate_worker" in path.read_text()]
    assert naming == ["gate_check"]  # which starts it as a process; nobody imports it
    assert not {"spin", "slowdown", "appended"} & set(Request.__dataclass_fields__)
    assert (ROOT / "moebench" / "gate_worker.py").exists()


def run(monkeypatch, *arguments):
    """The command with a tenth of the simulator's families, which take half a minute on a busy machine."""
    monkeypatch.setattr(command, "simulator", lambda: simulator(40))
    done = CliRunner().invoke(selfcheck, ["--gate", "--simulated", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_without_a_gpu_runs_the_simulator_and_says_so(monkeypatch):
    lines = run(monkeypatch, "--gates", "2").splitlines()
    for title in ("The simulator: 40 gates of 60 cells", "The same code on both sides", "A spin kernel after each call of the candidate"):
        assert title in map(str.strip, lines)
    assert [line.split(":")[0] for line in lines if line.startswith("ok ")] == [
        f"ok      {name}" for name in ("false alarms", "power", "no verdict", "same code", "slower calls", "reach")
    ]
    assert lines[-1] == "simulated clock: the gate is as exact as it says; this machine's own noise was not tried"


def test_json_has_what_each_cell_was_promised_and_whether_that_was_kept(monkeypatch):
    told = json.loads(run(monkeypatch, "--gates", "1", "--json"))
    assert (told["device"], told["rounds"], told["exit_code"]) == ("simulated clock", 8, 0)
    assert len(told["simulator"]) == 12
    assert [gate["slowdown"] for gate in told["gates"]] == [0.02, 0.03, 0.05, 0.1, 0.0]
    assert {one["kept"] for gate in told["gates"] for one in gate["cells"]} == {True}
    assert {one["promise"] for gate in told["gates"] for one in gate["cells"]} == {"", "slower", "green"}


def test_gates_that_were_finished_before_an_interrupt_are_shown(monkeypatch):
    def until_interrupted(plan, backend, tell):
        yield from islice(on_simulated_clock(plan), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "on_this_gpu", until_interrupted)
    done = CliRunner().invoke(selfcheck, ["--gate", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["exit_code"]) == (130, 130)
    assert [gate["slowdown"] for gate in told["gates"]] == [*SLOWDOWNS, 0.0]
    assert "not ok  gates: not measured to the end: interrupted with 5 of 14 done" in done.stderr
    assert "A spin kernel after each call of the candidate" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "--rounds", "5"], "--rounds 5: a gate decides nothing below 6 rounds"),
        (["--gates", "3"], "--gates 3 is for --gate, which was not given"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, arguments, message):
    assert message in running.moebench("selfcheck", *arguments, cwd=tmp_path, check=2).stderr


def test_a_gate_that_is_wrong_ends_the_command_with_3_and_says_what_to_do():
    code = (
        "import moebench.commands.gate_selfcheck as c; from moebench.gate_check import CheckError\n"
        "def broken(*_):\n    raise CheckError('out of luck')\n    yield\n"
        "c.on_this_gpu = broken\n"
        "from moebench.commands.selfcheck import selfcheck; selfcheck(['--gate'], prog_name='selfcheck')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "not ok  gates: not measured to the end: out of luck\n        → Ask `moebench doctor`" in done.stdout
    assert "no change is to be stopped by the gate before this is put right: gates" in done.stdout
