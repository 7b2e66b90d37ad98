"""Runs from Python: what load gives, what the frames hold, and what importing moebench costs."""

import doctest
import subprocess
import sys

import pandas
import pytest

import moebench
from moebench import api
from moebench.record import RecordError
from moebench.reports import frame
from tests.made_runs import rounds, timed, timing, untimed, write_run
from tests.running import ROOT


def test_the_example_of_the_docstring_gives_what_it_says(tmp_path, monkeypatch):
    rows = [
        timed("marlin_mxfp4_bf16", 1, 56.0),
        timed("marlin_mxfp4_bf16", 64, 228.0),
        timed("openai_triton_kernels", 1, 61.0),
        untimed("openai_triton_kernels", 64, "crash", "signal 11"),
    ]
    write_run(tmp_path / "runs" / "example", *rows)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(api, optionflags=doctest.NORMALIZE_WHITESPACE) == (0, 6)


def test_of_several_attempts_load_keeps_the_last(tmp_path):
    crashed = untimed("a", 1, "crash", "signal 11", record={"time": "2026-11-22T00:00:00+00:00"})
    again = timed("a", 1, 30.0, record={"time": "2026-11-22T00:00:01+00:00"})
    results = moebench.load(str(write_run(tmp_path / "r", crashed, again)))
    assert [record.status for record in results.records] == ["ok"]
    assert (results.manifest.run_id, results.path, results.torn) == ("r1", tmp_path / "r", False)


def test_a_torn_journal_is_said_to_be_one(tmp_path):
    path = write_run(tmp_path / "r", timed("a", 1, 30.0))
    with (path / "journal.jsonl").open("ab") as file:
        file.write(b'{"half')
    assert moebench.load(path).torn


def test_what_is_no_run_is_refused_in_words(tmp_path):
    with pytest.raises(RecordError, match="is not a run directory"):
        moebench.load(tmp_path)


def test_the_frame_has_one_row_a_record_and_types_that_know_missing_values(tmp_path):
    rows = [timed("a", 1, 30.0, record={"flags": {"throttled": "slow"}}), untimed("a", 2, "crash", "signal 11")]
    found = moebench.load(write_run(tmp_path / "r", *rows)).to_pandas()
    assert list(found.columns) == list(frame.COLUMNS)
    first, second = (found.loc[row] for row in (0, 1))
    interval = timing(30.0).interval_us
    assert (first.median_us, first.low_us, first.high_us, first.num_samples) == (pytest.approx(30.0), *map(pytest.approx, interval), 21)
    assert (first["flags"], first.comparable, first.num_tokens, first.rel_l2) == ("throttled", True, 1, 1.8e-3)
    assert (second.status, second.reason, second.contract) == ("crash", "signal 11", "")
    assert all(
        second[name] is pandas.NA for name in ("median_us", "low_us", "num_samples", "clock", "comparable", "active_experts", "roof_share")
    )
    assert [str(found[name].dtype) for name in ("num_tokens", "median_us", "comparable", "model")] == [
        "Int64",
        "Float64",
        "boolean",
        "string",
    ]


def test_the_frame_of_samples_has_one_row_a_sample_in_order(tmp_path):
    rows = [*rounds("a", 1, (30.0, 31.0)), untimed("a", 2, "crash", "signal 11")]
    found = moebench.load(write_run(tmp_path / "r", *rows)).samples_to_pandas()
    assert list(found.columns) == [*frame.IDENTITY, "sample", "sample_us"]
    assert len(found) == 42
    second = found[found["round"] == 1]
    assert second["sample"].tolist() == list(range(21))
    assert second["sample_us"].tolist() == pytest.approx(list(timing(31.0).samples_us))


def test_frames_of_nothing_have_their_columns():
    assert (list(frame.records([]).columns), len(frame.records([]))) == (list(frame.COLUMNS), 0)
    assert len(frame.samples([])) == 0


def test_importing_moebench_imports_none_of_it():
    code = "import moebench, sys; print(*sorted(name for name in sys.modules if name.split('.')[0] in ('moebench', 'pandas', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("moebench\n", "")


def test_loading_and_comparing_need_neither_torch_nor_pandas(tmp_path):
    path = write_run(tmp_path / "r", timed("a", 1, 30.0), timed("b", 1, 40.0))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'pandas', 'pyarrow', 'matplotlib')))\n"
        "from importlib import import_module\n"
        "import moebench; print(len(moebench.load(sys.argv[1]).records), flush=True)\n"
        "def call(name, *words): import_module(f'moebench.commands.{name}').__dict__[name].main(words, standalone_mode=False)\n"
        "call('compare', sys.argv[1], sys.argv[1])\n"
        "call('policy', sys.argv[1])\n"
        "call('export', sys.argv[1], '--format', 'junit', '--out', sys.argv[1] + '.xml')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2\n")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moebench' has no attribute 'lode'"):
        _ = moebench.lode
