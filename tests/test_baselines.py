"""Stored baselines: what they are kept under, that only a reason replaces one, and how much one alone may say."""

import json
import random
from dataclasses import replace
from math import exp

import pytest
from click.testing import CliRunner

from moebench.baselines import FILE, BaselineError, conditions, is_baseline, is_store, listed, load, matching, save
from moebench.commands.baseline import baseline
from moebench.commands.gate import gate
from moebench.journal import load_run
from moebench.verdict import LEAST_JOBS, judge
from tests import rounds

TIME = "2026-01-01T00:00:00+00:00"


def made(path, *, factor=1.0, cells=4, noise=0.002, change=None, device=rounds.DEVICE, job=0.0):
    """A run on disk, loaded; job: standard deviation of the job as a whole."""
    draw = random.Random(path.name)
    speed = [exp(draw.gauss(0, job)) for _ in range(cells)]
    rows = rounds.rows(cells, 12, lambda c, n: 100.0 * (factor if c == 1 else 1.0) * speed[c] * exp(draw.gauss(0, noise)), run_id=path.name)
    rounds.run(path, [change(row) if change else row for row in rows], device)
    return load_run(path)


def run_command(command, *words):
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture
def store(tmp_path):
    """With one baseline, of the run `base`."""
    save(tmp_path / "store", [made(tmp_path / "base")], reason="first", time=TIME)
    return tmp_path / "store"


def test_a_baseline_is_kept_under_its_device_power_limit_driver_and_contract(store):
    (place,) = listed(store)
    assert place.name == f"NVIDIA-H200_700W_driver-580.159_{rounds.CONTRACT.id}"
    assert is_baseline(place)
    assert is_store(store)
    assert not is_store(place)


def test_a_baseline_is_a_run_of_its_medians(store, tmp_path):
    (place,) = listed(store)
    whole, kept = load_run(tmp_path / "base"), load_run(place)
    assert [row.timing.median_us for row in kept.records] == [row.timing.median_us for row in whole.records]
    assert {len(row.timing.samples_us) for row in kept.records} == {1}
    assert kept.manifest == whole.manifest


@pytest.mark.parametrize(
    ("field", "change", "device"),
    [
        ("power limit w", lambda row: replace(row, telemetry=replace(row.telemetry, power_limit_w=600.0)), rounds.DEVICE),
        ("contracts", lambda row: replace(row, contract=replace(row.contract, warmup="other")), rounds.DEVICE),
        ("driver", None, replace(rounds.DEVICE, driver="590.1")),
    ],
)
def test_a_run_under_other_conditions_has_no_baseline_and_is_told_what_differs(store, tmp_path, field, change, device):
    other = made(tmp_path / "other", change=change, device=device)
    with pytest.raises(BaselineError, match=f"has no baseline for .* differs in {field}"):
        matching(store, other)
    assert run_command(gate, store, tmp_path / "other").exit_code == 4


def test_a_run_under_the_same_conditions_finds_its_baseline(store, tmp_path):
    assert matching(store, made(tmp_path / "again")) == listed(store)[0]
    assert run_command(gate, store, tmp_path / "again").exit_code == 0


def test_no_baseline_is_replaced_without_a_reason(store, tmp_path):
    made(tmp_path / "new", factor=1.1)
    before = load_run(listed(store)[0]).records
    refused = run_command(baseline, "save", tmp_path / "new", "--store", store)
    assert refused.exit_code == 2
    assert "holds a baseline already (run base); moebench baseline accept" in refused.stderr
    assert run_command(baseline, "accept", tmp_path / "new", "--store", store).exit_code == 2
    assert run_command(baseline, "accept", tmp_path / "new", "--store", store, "--reason", " ").exit_code == 2
    assert load_run(listed(store)[0]).records == before
    assert run_command(baseline, "accept", tmp_path / "new", "--store", store, "--reason", "a new algorithm").exit_code == 0
    history = load(listed(store)[0]).history
    assert [(one.run_id, one.reason) for one in history] == [("base", "first"), ("new", "a new algorithm")]
    assert load_run(listed(store)[0]).records != before
    assert sorted(path.name for path in store.iterdir()) == [listed(store)[0].name]


def test_there_is_nothing_to_accept_where_nothing_is_stored(tmp_path):
    made(tmp_path / "run")
    done = run_command(baseline, "accept", tmp_path / "run", "--store", tmp_path / "store", "--reason", "x")
    assert done.exit_code == 2
    assert "baseline save" in done.stderr


def test_a_stored_baseline_asks_for_both_sides_and_never_fails_a_change(store, tmp_path):
    made(tmp_path / "slow", factor=1.5)
    done = run_command(gate, store, tmp_path / "slow")
    assert done.exit_code == 4
    assert "moebench ab" in done.stdout
    assert run_command(gate, store, tmp_path / "slow", "--trust-stored").exit_code == 4  # it has no band


def test_a_stored_baseline_does_not_wake_anyone_for_what_differs_from_job_to_job(store, tmp_path):
    made(tmp_path / "warm", factor=1.05)
    done = run_command(gate, store, tmp_path / "warm", "--format", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["rule"]["threshold"] == 0.1


def test_a_wrong_result_against_a_stored_baseline_is_no_verdict_either(store, tmp_path):
    made(tmp_path / "bad", change=lambda row: replace(row, status="wrong", timing=None) if row.round == 1 else row)
    assert run_command(gate, store, tmp_path / "bad").exit_code == 4


def test_a_trusted_baseline_with_a_band_of_jobs_fails_what_is_outside_it(tmp_path):
    jobs = [made(tmp_path / f"job{number}", job=0.002) for number in range(8)]
    place = save(tmp_path / "store", jobs, reason="calibrated", time=TIME)
    assert {len(cell.centers_us) for cell in load(place).jobs} == {8}
    known = load(place).stored("baseline", trusted=True)
    assert known.calibrated
    assert judge(load_run(place), made(tmp_path / "fine", job=0.002), stored=known).answer == "pass"
    slow = judge(load_run(place), made(tmp_path / "slow", factor=1.2), stored=known)
    assert slow.answer == "fail"
    assert (slow.verdicts[0].outcome, slow.verdicts[0].case.num_tokens) == ("slower", 2)
    assert judge(load_run(place), made(tmp_path / "slow2", factor=1.2), stored=load(place).stored("b", trusted=False)).answer == "none"
    assert run_command(gate, place, tmp_path / "slow", "--trust-stored").exit_code == 1


def test_jobs_that_differ_much_make_a_wide_band(tmp_path):
    jobs = [made(tmp_path / f"job{number}", job=0.04) for number in range(LEAST_JOBS)]
    place = save(tmp_path / "store", jobs, reason="x", time=TIME)
    found = judge(load_run(place), made(tmp_path / "slow", factor=1.05), stored=load(place).stored("b", trusted=True))
    assert found.answer == "none"
    assert all(verdict.blind for verdict in found.verdicts)


def test_runs_of_other_conditions_and_the_same_run_twice_calibrate_nothing(tmp_path):
    one, other = made(tmp_path / "one"), made(tmp_path / "other", device=replace(rounds.DEVICE, driver="1.2"))
    with pytest.raises(BaselineError, match="not measured under the same conditions"):
        save(tmp_path / "store", [other, one], reason="x", time=TIME)
    with pytest.raises(BaselineError, match="given twice"):
        save(tmp_path / "store", [one, one], reason="x", time=TIME)
    assert not (tmp_path / "store").exists()


def test_a_run_without_times_is_no_baseline(tmp_path):
    empty = made(tmp_path / "empty", change=lambda row: replace(row, timing=None, status="skipped"))
    with pytest.raises(BaselineError, match="has no times"):
        conditions(empty)
    assert run_command(baseline, "save", tmp_path / "empty", "--store", tmp_path / "store").exit_code == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema": "2.0"}', '{"schema": "1.0", "conditions": 3}', "[" * 100_000, '{"schema": "1.0", "x": NaN}'],
)
def test_a_damaged_baseline_is_unreadable_in_words(store, content):
    file = listed(store)[0] / FILE
    file.write_text(content)
    with pytest.raises(BaselineError, match=r"baseline\.json"):
        load(file.parent)
    assert run_command(baseline, "list", "--store", store).exit_code == 6
    assert run_command(baseline, "show", file.parent).exit_code == 6


def test_times_that_are_none_are_refused(store):
    file = listed(store)[0] / FILE
    row = json.loads(file.read_text())
    row["jobs"][0]["centers_us"] = [-1.0]
    file.write_text(json.dumps(row))
    with pytest.raises(BaselineError, match="times that are none"):
        load(file.parent)


def test_saving_names_the_cells_that_a_gate_could_not_rely_on(tmp_path):
    made(tmp_path / "loud", noise=0.03)
    done = run_command(baseline, "save", tmp_path / "loud", "--store", tmp_path / "store")
    assert done.exit_code == 0
    assert done.stdout.count("could not be relied on to see 3 %") == 4


def test_list_and_show_say_what_is_stored(store):
    assert "base" in run_command(baseline, "list", "--store", store).stdout
    (row,) = json.loads(run_command(baseline, "list", "--store", store, "--json").stdout)
    assert (row["run_id"], row["reason"], row["cells"]) == ("base", "first", 4)
    shown = run_command(baseline, "show", listed(store)[0]).stdout
    assert "NVIDIA H200, 700 W, driver 580.159" in shown
    assert "first" in shown
    assert json.loads(run_command(baseline, "show", listed(store)[0], "--json").stdout)["conditions"]["power_limit_w"] == 700
    assert "no baselines in" in run_command(baseline, "list", "--store", store / "none").stdout
