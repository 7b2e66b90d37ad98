"""Journals keep what they acknowledged, and say what they cannot read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moebench.case import case
from moebench.device import Device
from moebench.journal import Journal, load_run, merge, write_manifest
from moebench.record import Error, Manifest, Record, RecordError, Timing, record_from_dict, to_json
from moebench.routing import Realized

DEVICE = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=1)
RECORD = Record(
    case=case("tiny", 4),
    backend="b",
    act_dtype="bf16",
    arch="sm90",
    device="NVIDIA H200",
    status="ok",
    error=Error(rel_l2=1e-3, worst=0.01, worst_token=0, worst_column=1, max_abs=0.1, rel_l2_tolerance=5e-3, worst_tolerance=0.05),
    timing=Timing(samples_us=(1.0, 2.0, 4.0), clock="cuda_graph", l2="cold", l2_method="read", warmup_calls=3),
    routing=Realized(active_experts=4, empty_experts=4, local_pairs=16, load_max_over_mean=2.0, pairs_per_rank=(16,), sha256="ab"),
    prepare_s=0.5,
    time="2026-01-01T00:00:00",
)


def run_directory(path: Path, *records: Record) -> Path:
    path.mkdir(exist_ok=True)
    write_manifest(path, Manifest(run_id="r", started="now", command=("moebench",), device=DEVICE, plan={}, plan_hash="h"))
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    return path


def test_a_record_survives_its_journal(tmp_path):
    bare = replace(RECORD, status="skipped", error=None, timing=None, routing=None, reason="needs sm100")
    run = load_run(run_directory(tmp_path / "run", RECORD, bare))
    assert run.records == (RECORD, bare)
    assert run.manifest.device == DEVICE
    assert not run.torn


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    path = run_directory(tmp_path / "run", RECORD, replace(RECORD, backend="c"))
    journal = path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    run = load_run(path)
    assert run.torn
    assert run.records == (RECORD,)
    again = Journal(path)  # a writer that goes on cuts the torn line first
    again.append(replace(RECORD, backend="d"))
    again.close()
    assert [r.backend for r in load_run(path).records] == ["b", "d"]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{}", "schema"),
        ("not json", "line 2"),
        (to_json(RECORD).replace('"ok"', '"fine"'), "status 'fine'"),
        (to_json(replace(RECORD, schema="2.0")), "schema 2.0"),
        (to_json(RECORD).replace('"backend":"b",', ""), "backend"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, part):
    path = run_directory(tmp_path / "run", RECORD)
    with (path / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=part):
        load_run(path)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"no run\.json"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": "9.0"}')
    with pytest.raises(RecordError, match=r"schema 9\.0"):
        load_run(tmp_path)


def test_nothing_that_is_not_a_number_is_ever_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(replace(RECORD, prepare_s=float("nan")))


def test_samples_are_kept_and_statistics_computed():
    timing = RECORD.timing
    assert timing is not None
    assert timing.median_us == 2.0
    assert timing.quartiles_us == (1.5, 3.0)
    assert timing.interval_us == (1.0, 4.0)
    hundred = replace(timing, samples_us=tuple(float(i * 37 % 100) for i in range(100)))
    assert hundred.interval_us == (40.0, 59.0)
    ramp = replace(timing, samples_us=tuple(float(i) for i in range(100)))
    assert ramp.effective_samples < 5  # neighbours resemble each other, so a hundred samples say little
    assert ramp.interval_us == (0.0, 99.0)
    assert replace(timing, samples_us=(3.0,)).quartiles_us == (3.0, 3.0)
    assert json.loads(to_json(RECORD))["timing"]["samples_us"] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("rel_l2", "worst", "ok"), [(1e-3, 0.01, True), (6e-3, 0.01, False), (1e-3, 0.06, False), (float("nan"), 0.0, False)]
)
def test_an_error_is_ok_within_both_tolerances(rel_l2, worst, ok):
    assert RECORD.error is not None
    assert replace(RECORD.error, rel_l2=rel_l2, worst=worst).ok is ok


def test_merging_prefers_measured_rows_then_later_ones(tmp_path):
    skipped = replace(RECORD, status="skipped", timing=None, time="2026-02-01")
    later = replace(RECORD, prepare_s=9.0, time="2026-03-01")
    first, second = run_directory(tmp_path / "a", RECORD, later), run_directory(tmp_path / "b", skipped, replace(skipped, backend="c"))
    assert {r.backend: r for r in merge([load_run(first), load_run(second)])} == {"b": later, "c": replace(skipped, backend="c")}


def test_a_record_of_unknown_fields_is_refused():
    row = json.loads(to_json(RECORD))
    with pytest.raises(TypeError):
        record_from_dict({**row, "surprise": 1})


def test_a_newer_minor_schema_is_read_without_what_it_added():
    row = json.loads(to_json(RECORD))
    row |= {"schema": "1.999", "surprise": 1, "timing": {**row["timing"], "surprise": 2}}
    assert record_from_dict(row) == replace(RECORD, schema="1.999")
