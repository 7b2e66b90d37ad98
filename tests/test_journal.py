"""Journals keep what they acknowledged, and say what they cannot read."""

import json
import os
import random
import resource
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from zlib import crc32

import pytest
from click.testing import CliRunner

from moebench import conform
from moebench.case import case
from moebench.cli import main
from moebench.device import Device
from moebench.failure import shortage
from moebench.journal import InUse, Journal, RunLock, load_run, merge, problems, settled, write_manifest
from moebench.lines import SHARED
from moebench.realized import Realized
from moebench.record import Error, Manifest, Record, RecordError, Timing, record_from_dict, to_json
from tests import rounds
from tests.running import ENVIRONMENT, ROOT

GOLDEN = Path(__file__).parent / "golden"
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


def checked(text: str) -> str:
    return f"{crc32(text.encode()):08x} {text}"


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
        (checked(to_json(RECORD).replace('"ok"', '"fine"')), "status 'fine'"),
        (checked(to_json(replace(RECORD, schema="2.0"))), r"schema 2\.0.*a moebench that writes 2\.0 is needed"),
        (checked(to_json(RECORD).replace('"backend":"b",', "")), "backend"),
        (checked(to_json(RECORD).replace('"backend":"b"', '"backend":7')), r"record\.backend is 7, not str"),
        (checked(to_json(RECORD).replace("[1.0,2.0,4.0]", "[1.0,1e999]")), r"samples_us\[1\] is inf, not a finite number"),
        (checked(to_json(RECORD).replace("[1.0,2.0,4.0]", "[]")), "samples_us is empty"),
        (checked(to_json(RECORD).replace("[1.0,2.0,4.0]", "[NaN]")), "NaN is not JSON"),
        (checked(to_json(RECORD).replace('"num_experts":8', '"num_experts":1000000000000')), "num_experts"),
        (checked(to_json(RECORD).replace('"num_tokens":4', '"num_tokens":"four"')), "line 2"),
        (checked("[" * 100_000), "nested too deeply"),
        (checked(to_json(RECORD))[:-1] + " ", "checksum"),
        (to_json(replace(RECORD, schema="1.7")), "no checksum"),
        ("", "is no record"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, part):
    path = run_directory(tmp_path / "run", RECORD)
    with (path / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=part):
        load_run(path)


def test_a_case_of_too_many_experts_is_refused_before_anything_counts_them(tmp_path):
    text = to_json(RECORD).replace('"num_experts":8', '"num_experts":1000000000000000').replace('"ep_size":1', '"ep_size":7')
    path = run_directory(tmp_path / "run", RECORD)
    with (path / "journal.jsonl").open("a") as file:
        file.write(checked(text) + "\n")
    with pytest.raises(RecordError, match=r"case\.num_experts is 1000000000000000; the limit is 65536"):
        load_run(path)  # its error would name all numbers that divide the number of experts


def test_a_manifest_of_a_newer_minor_schema_is_read_without_what_it_added(tmp_path):
    path = run_directory(tmp_path / "run", RECORD)
    row = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**row, "schema": "1.999", "surprise": 1, "device": {**row["device"], "surprise": 2}}))
    assert load_run(path).manifest.device == DEVICE
    (path / "run.json").write_text(json.dumps({**row, "surprise": 1}))
    with pytest.raises(RecordError, match="surprise"):
        load_run(path)


def test_every_bit_of_a_line_counts(tmp_path):
    path = run_directory(tmp_path / "run", RECORD, replace(RECORD, backend="c"))
    journal = path / "journal.jsonl"
    good = journal.read_bytes()
    second = good.index(b"\n") + 1
    for place in range(second, len(good) - 1, 61):
        for bit in (0, 5):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            journal.write_bytes(bad)
            (problem, *_) = problems(path)
            assert (problem.line, problem.offset) == (2, second)
            with pytest.raises(RecordError, match=rf"line 2 \(byte {second}\)"):
                load_run(path)


def test_fsck_names_line_byte_and_reason_of_all_that_is_wrong(tmp_path):
    path = run_directory(tmp_path / "run", RECORD, RECORD)
    journal = path / "journal.jsonl"
    size = len(journal.read_bytes()) // 2
    with journal.open("a") as file:
        file.write("nonsense\n" + checked(to_json(replace(RECORD, schema="2.0"))) + "\n" + checked(to_json(RECORD))[:100])
    (path / "run.json").write_text("{}")
    found = problems(path)
    assert [(p.file, p.line, p.offset) for p in found] == [
        ("run.json", 0, 0),
        ("journal.jsonl", 2, size),
        ("journal.jsonl", 3, 2 * size),
        ("journal.jsonl", 4, 2 * size + 9),
        ("journal.jsonl", 5, len(journal.read_bytes()) - 100),
    ]
    for problem, part in zip(found, ("schema", "line 1 has a result", "b'nonsense'", "schema 2.0", "cut off after 100 bytes"), strict=True):
        assert part in problem.reason
    shown = CliRunner().invoke(main, ["fsck", str(path)])
    assert shown.exit_code == 6
    assert f"journal.jsonl, line 3 (byte {2 * size}): is no record" in shown.output
    document = json.loads(CliRunner().invoke(main, ["fsck", str(path), "--json"]).output)
    assert document["exit_code"] == 6
    assert [problem["line"] for problem in document["problems"]] == [0, 2, 3, 4, 5]


def test_fsck_is_content_with_a_good_run_and_with_retries(tmp_path):
    failed = replace(RECORD, status="hang", timing=None)
    path = run_directory(tmp_path / "run", failed, replace(failed, status="interrupted"), RECORD)
    shown = CliRunner().invoke(main, ["fsck", str(path)])
    assert (shown.exit_code, shown.output) == (0, f"{path}: all is well\n")
    assert CliRunner().invoke(main, ["fsck", str(tmp_path / "none")]).exit_code == 6


@pytest.mark.parametrize("schema", sorted(path.name for path in GOLDEN.iterdir()))
def test_runs_of_every_schema_so_far_are_read(schema):
    run = load_run(GOLDEN / schema)
    rows = {(r.backend, r.case.num_tokens): r for r in run.records}
    assert {r.schema for r in run.records} == {run.manifest.schema} == {schema.split("-")[0]}
    assert len(rows) == 8
    assert [rows["torch", tokens].status for tokens in (2, 4)] == ["ok", "ok"]
    assert rows["torch", 2].timing is not None
    assert rows["torch", 2].timing.median_us > 0
    assert [rows["fault_raises", tokens].status for tokens in (2, 4)] == ["ok", "failed"]
    assert rows["fault_zeros", 2].status == "wrong"
    assert rows["fault_skips", 2].reason == "needs a quantum computer; none is known"
    assert problems(GOLDEN / schema) == []
    for style in ("md", "csv"):
        assert CliRunner().invoke(main, ["report", str(GOLDEN / schema), "--format", style]).exit_code == 0


def test_results_are_settled_and_failures_once_retried(tmp_path):
    wrong = replace(RECORD, backend="wrong", status="wrong")
    once = replace(RECORD, backend="once", status="crash")
    twice = replace(RECORD, backend="twice", status="hang")
    stopped = replace(RECORD, backend="stopped", status="interrupted")
    recovered = replace(RECORD, backend="recovered", status="oom")
    short = shortage(2, 1)
    assert short is not None
    untried = replace(RECORD, backend="untried", status=short.status, reason=short.reason)
    records = [RECORD, wrong, once, twice, twice, stopped, stopped, recovered, replace(recovered, status="ok"), replace(once, round=1)]
    records += [untried, untried]
    assert {(cell[1], cell[4]) for cell in settled(records)} == {("b", 0), ("wrong", 0), ("twice", 0), ("recovered", 0)}


def test_one_process_writes_a_run_and_the_next_learns_who(tmp_path):
    with RunLock(tmp_path):
        code = "import sys; from pathlib import Path; from moebench.journal import RunLock; RunLock(Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert other.returncode == 1
        assert f"is being written by process {os.getpid()}: moebench" in other.stderr
        with pytest.raises(InUse, match=f"process {os.getpid()}"):
            RunLock(tmp_path)
    with RunLock(tmp_path):
        pass


def test_a_record_that_does_not_fit_on_the_disk_leaves_those_before_it(tmp_path):
    code = (
        "import sys, resource; from pathlib import Path; from moebench.journal import Journal, load_run\n"
        "path = Path(sys.argv[1]); record = load_run(path).records[0]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "journal = Journal(path)\n"
        "journal.append(record)\n"
        "try: journal.append(record)\n"
        "except OSError as error: print(error.strerror, error.filename)"
    )
    path = run_directory(tmp_path / "run", RECORD)
    size = (path / "journal.jsonl").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(2 * size + size // 2)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"File too large {path / 'journal.jsonl'}\n"
    assert load_run(path).records == (RECORD, RECORD)
    assert not load_run(path).torn
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # the limit was the child's


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json"])
def test_a_link_or_a_pipe_in_a_run_directory_is_not_followed(tmp_path, name):
    path = run_directory(tmp_path / "run", RECORD)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="symbolic link"):
        load_run(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(RecordError, match="not a regular file"):
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


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("size_us", [1e-3, 50.0, 1e6])
def test_effective_samples_are_what_the_correlation_of_neighbours_leaves_of_them(alike, size_us):
    assert RECORD.timing is not None
    draw, level, samples = random.Random(1), 0.0, []
    for _ in range(200):
        level = alike * level + draw.gauss(0, 1)
        samples.append(size_us * (1 + level / 100))
    off = [sample - fmean(samples) for sample in samples]
    lag1 = max(sum(a * b for a, b in pairwise(off)) / sum(a * a for a in off), 0.0)
    found = replace(RECORD.timing, samples_us=tuple(samples)).effective_samples
    assert found == pytest.approx(200 * (1 - lag1) / (1 + lag1), rel=1e-9)


@pytest.mark.parametrize("samples_us", [(1e200, 2e200) * 30, (1e308,) * 60, (1e-200, 2e-200) * 30, (0.0,) * 60, (5.1,) * 60])
def test_samples_that_are_no_times_have_an_interval_too(samples_us):
    assert RECORD.timing is not None
    low, high = replace(RECORD.timing, samples_us=samples_us).interval_us
    assert (low, high) == (min(samples_us), max(samples_us))


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


def test_a_whole_record_is_known_to_be_good_without_looking_for_a_sentence(monkeypatch):
    (row,) = list(rounds.rows(1, 1, lambda cell, number: 50.0, run_id="r", samples=60))
    assert None not in (row.telemetry, row.timing.proof, row.contract)  # it has every part there is
    monkeypatch.setattr(conform, "_misfit", lambda value, annotation, where: f"{where} was looked at")  # 20 times as slow
    assert conform.misfit(row, Record, "record") == ""
    assert conform.misfit(replace(row, round="1"), Record, "record") == "record was looked at"


@pytest.mark.parametrize("row", [RECORD, rounds.rows(1, 1, lambda cell, number: 50.0, run_id="r")[0], replace(RECORD, timing=None)])
def test_what_lines_have_in_common_is_made_once_for_all_of_them(tmp_path, row):
    more = replace(
        row, backend="c", round=1, reason='{"case":{},"backend":"b"},"kernels":[],"launches_compared":0', facts={"kernels": "none"}
    )
    first, second = load_run(run_directory(tmp_path / "run", row, more)).records
    assert (first, second) == (row, more)
    for name in SHARED[Record] - {"facts"}:
        assert getattr(first, name) is getattr(second, name), name
    if row.timing is not None:
        assert first.timing.proof is second.timing.proof


def test_backends_say_of_themselves_what_they_said_before(tmp_path):
    rows = [replace(RECORD, round=number, facts={"tactic": "73"} if number < 2 else {}) for number in range(4)]
    found = load_run(run_directory(tmp_path / "run", *rows)).records
    assert [record.facts for record in found] == [{"tactic": "73"}, {"tactic": "73"}, {}, {}]
    assert found[0].facts is found[1].facts


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"kernels":[]', '"kernels":[{"name":"k"}]', "count"),
        ('"top_k":4', '"top_k":"4"', "line 2"),
        ('"top_k":4', '"top_k":4,"top_l":4', "top_l"),
        ('"num_experts":8', '"num_experts":1000000000000', "the limit is"),
        ('"load_max_over_mean":2.0', '"load_max_over_mean":1e999', r"load_max_over_mean is inf, not a finite number"),
        ('"contract":null', '"contract":7', "contract"),
        ('"kernels":[]', '"kernels":7', "line 2"),
        ('"proof":null', '"proof":{"token_sets":1}', "weight_copies"),
        ('"facts":{}', '"facts":{"x":1,"kernels":[],"launches_compared":0}', "kernels"),
        ('"contract":null', '"contract":null]', "line 2"),
        ('"reason":""', '"reason":","routing":null,"prepare_s":""', "line 2"),
    ],
)
def test_what_lines_have_in_common_is_judged_as_strictly_as_the_rest(tmp_path, old, new, part):
    text = to_json(RECORD)
    assert old in text
    path = run_directory(tmp_path / "run", RECORD)
    bad = checked(text.replace(old, new))
    for _ in range(2):  # a text that was refused is refused again
        with (path / "journal.jsonl").open("a") as file:
            file.write(bad + "\n")
        with pytest.raises(RecordError, match=part):
            load_run(path)
    assert [problem.line for problem in problems(path)] == [2, 3]
