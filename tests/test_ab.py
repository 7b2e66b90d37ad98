"""Two installations in turns: the order of the turns, what two looks decide, and what goes wrong with an arm. The sweeps are stand-ins."""

import random
import re
import shutil
import stat
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby
from math import exp

import pytest
from click.testing import CliRunner

from moebench.ab import ArmError, Turn, collect, plan_of, take, turns
from moebench.case import case
from moebench.commands import ab as command
from moebench.plan import build
from moebench.record import RecordError
from moebench.verdict import Verdict
from tests import rounds
from tests.running import ROOT
from tests.test_architecture import INSTALLED_INSIDE

PYTHONS = ("/base/python", "/cand/python")


def test_base_and_candidate_swap_places_from_round_to_round_and_lie_beside_each_other(tmp_path):
    for seed in range(20):
        order = list(turns(tmp_path, PYTHONS, 8, seed))
        by_round = [[turn.arm for turn in group] for _, group in groupby(order, lambda turn: turn.round)]
        assert all(sorted(arms) == ["base", "cand", "control"] and arms[1] != "control" for arms in by_round)
        pairs = [[arm for arm in arms if arm != "control"] for arms in by_round]
        assert all(pairs[n] == pairs[n + 1][::-1] for n in range(0, 8, 2))
    assert list(turns(tmp_path, PYTHONS, 8, 1)) == list(turns(tmp_path, PYTHONS, 8, 1))
    starts = Counter(next(t.arm for t in turns(tmp_path, PYTHONS, 1, seed) if t.arm != "control") for seed in range(200))
    assert min(starts.values()) > 60


def test_only_the_candidates_turns_use_its_interpreter(tmp_path):
    assert {(turn.arm, turn.python) for turn in turns(tmp_path, PYTHONS, 4, 0)} == {
        ("base", "/base/python"),
        ("control", "/base/python"),
        ("cand", "/cand/python"),
    }


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def turn_of(tmp_path, python):
    return Turn(arm="base", round=0, python=python, directory=tmp_path / "first" / "000-base")


def test_an_arm_is_a_sweep_of_one_round_that_does_not_see_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    take(turn_of(tmp_path, script(tmp_path / "python", f'echo "$@ [$PYTHONPATH]" > {tmp_path}/said')), ["--plan", "quick"])
    where = tmp_path / "first" / "000-base"
    assert (tmp_path / "said").read_text() == f"-P -m moebench sweep --plan quick --rounds 1 --resume --out {where} []\n"


def test_rows_that_went_wrong_are_an_answer_and_other_ends_are_not(tmp_path):
    take(turn_of(tmp_path, script(tmp_path / "three", "exit 3")), [])
    with pytest.raises(KeyboardInterrupt):
        take(turn_of(tmp_path, script(tmp_path / "stopped", "exit 130")), [])
    with pytest.raises(ArmError, match=r"sweep .* ended with exit status 2: error: no such plan"):
        take(turn_of(tmp_path, script(tmp_path / "two", "echo error: no such plan; exit 2")), [])
    with pytest.raises(ArmError, match="give the python of a virtual environment"):
        take(turn_of(tmp_path, str(tmp_path / "none")), [])


def test_rounds_of_an_arm_become_one_run_unless_its_installation_changed(tmp_path):
    order = list(turns(tmp_path, PYTHONS, 3, 0))
    for turn in order:
        rounds.run(turn.directory, rounds.rows(2, 1, lambda c, n: 100.0), device=rounds.DEVICE)
    found = collect(order, "cand")
    assert sorted((row.case.num_tokens, row.round) for row in found.records) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    odd = replace(order[0], directory=tmp_path / "odd", arm="cand")
    rounds.run(odd.directory, rounds.rows(2, 1, lambda c, n: 100.0), device=replace(rounds.DEVICE, driver="1.0"))
    with pytest.raises(RecordError, match="differ in device or versions"):
        collect([*order, odd], "cand")


def test_a_plan_of_cells_is_read_back_as_these_cells(tmp_path):
    cases = [
        case("gpt-oss-120b", 7, top_k=2, ep_size=4, ep_rank=3, tp_size=2, tp_rank=1, routing="zipf:1.1", seed=5),
        case("tiny", 1, routing='trace:a"b.txt'),
        case("gpt-oss-20b", 64),
    ]
    file = tmp_path / "again.toml"
    cells = [Verdict(case=one, backend=f"b{number}", scope="experts", outcome="unclear") for number, one in enumerate(cases) if number != 1]
    file.write_text(plan_of(cells))
    plan = build({}, str(file), {}, ["b0", "b2"], lambda name: f"unknown {name}")
    assert [(point.case, point.backend) for point in plan.points] == [(cell.case, cell.backend) for cell in cells]
    assert 'routing = "trace:a\\"b.txt"' in plan_of([replace(cells[0], case=cases[1])])


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Stands in for the arms' sweeps; returns what was taken. Cell 1 of the candidate is slower by a factor."""
    taken = []
    factor = {"first": 1.0, "again": 1.0}

    def stand_in(turn, options):
        stage = turn.directory.parent.name
        taken.append((stage, turn.arm, turn.round, tuple(options)))
        draw = random.Random(str(turn.directory.name) + stage)
        slower = factor[stage] if turn.arm == "cand" else 1.0
        rounds.run(turn.directory, rounds.rows(4, 1, lambda c, n: 100.0 * (slower if c == 1 else 1.0) * exp(draw.gauss(0, 0.001))))

    monkeypatch.setattr(command, "take", stand_in)
    for name in ("base", "cand"):
        script(tmp_path / name, "exit 9")
    return taken, factor


def run_ab(tmp_path, *words):
    given = ["quick", "--base", tmp_path / "base", "--cand", tmp_path / "cand", "--out", tmp_path / "out", *words]
    done = CliRunner().invoke(command.ab, [str(word) for word in given])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_quiet_first_look_is_enough(measured, tmp_path):
    taken, _ = measured
    done = run_ab(tmp_path)
    assert done.exit_code == 0, done.output
    assert Counter(stage for stage, *_ in taken) == {"first": 18}
    assert taken[0][3] == ("--plan", "quick")


def test_a_suspect_is_measured_again_alone_and_the_second_look_decides(measured, tmp_path):
    taken, factor = measured
    factor |= {"first": 1.05, "again": 1.05}
    done = run_ab(tmp_path)
    assert done.exit_code == 1
    assert Counter(stage for stage, *_ in taken) == {"first": 18, "again": 36}
    assert taken[-1][3] == ("--plan", str(tmp_path / "out" / "again.toml"))
    assert (tmp_path / "out" / "again.toml").read_text().count("[[sweep]]") == 1
    assert f"{tmp_path}/cand -m moebench profile --diff base.profile.json candidate.profile.json" in done.stdout


def test_what_the_second_look_clears_is_green(measured, tmp_path):
    taken, factor = measured
    factor |= {"first": 1.05, "again": 1.0}
    assert run_ab(tmp_path).exit_code == 0
    assert len(taken) == 54


def test_an_arm_that_fails_is_no_verdict_and_an_interrupt_says_how_to_go_on(measured, tmp_path, monkeypatch):
    def broken(turn, options):
        raise ArmError("it ended with exit status 2")

    monkeypatch.setattr(command, "take", broken)
    assert run_ab(tmp_path).exit_code == 4

    def stopped(turn, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "take", stopped)
    done = run_ab(tmp_path)
    assert done.exit_code == 130
    assert "go on with: moebench" in done.stderr


def test_an_interpreter_that_does_not_exist_is_a_mistake_in_the_options(tmp_path):
    done = run_ab(tmp_path)
    assert done.exit_code == 2
    assert "no such program" in done.stderr


def test_each_arm_runs_the_tree_that_its_own_interpreter_finds(tmp_path, monkeypatch):
    """Real sweeps by two interpreters, each with a copy of the tree; the working directory holds a third."""
    monkeypatch.chdir(ROOT)
    pythons = []
    for name, version in (("base", "0.1.0"), ("cand", "0.2.0")):
        tree = tmp_path / name
        for directory in ("moebench", *INSTALLED_INSIDE, "plans"):
            shutil.copytree(ROOT / directory, tree / directory, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        start = tree / "moebench" / "__init__.py"
        start.write_text(re.sub('__version__ = ".*"', f'__version__ = "{version}"', start.read_text()))
        pythons.append(script(tmp_path / f"python-{name}", f'PYTHONPATH={tree} exec {sys.executable} "$@"'))
    order = [turn for turn in turns(tmp_path / "first", (pythons[0], pythons[1]), 1, 0) if turn.arm != "control"]
    for turn in order:
        take(turn, ["--model", "tiny", "--tokens", "1", "--backend", "torch", "--repeat-check", "2"])
    runs = [collect(order, arm) for arm in ("base", "cand")]
    assert [run.manifest.versions["moebench"] for run in runs] == ["0.1.0", "0.2.0"]
    assert [[record.status for record in run.records] for run in runs] == [["ok"], ["ok"]]
