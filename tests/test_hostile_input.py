"""Whatever a plan, a journal, a trace, a name or a path holds: a clean error and a documented exit code, no traceback, no hang."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from zlib import crc32

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moebench.case import case
from moebench.cli import main
from moebench.journal import Journal, load_run, problems, write_manifest
from moebench.plan import MAX_ERRORS, MAX_POINTS, PlanError, build
from moebench.record import Manifest, RecordError
from moebench.routing import assign, routing_error
from tests.running import ENVIRONMENT, moebench
from tests.test_journal import DEVICE, RECORD

CORPUS = Path(__file__).parent / "corpus"
# a busy machine takes a minute to find all characters for the first time, in a fresh checkout
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
BACKENDS = ["torch", "numpy", "triton_mxfp4_bf16"]

words = st.one_of(
    st.text(max_size=20), st.sampled_from(["tiny", "uniform", "zipf:1.2", "hotspot:0.5@2", "all", "worst", "sm90", "*", "1:9:x2"])
)
leaves = st.one_of(words, st.integers(), st.booleans(), st.floats(), st.none())
anything = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4))
)


def plan_of(file):
    return build({}, str(file), {}, BACKENDS, lambda name: f"unknown backend {name!r}")


def attempt(file):
    """(plan, []) or (None, errors)."""
    try:
        return plan_of(file), []
    except PlanError as error:
        return None, error.errors


def toml(value):
    """As TOML writes it; what TOML has no word for as a string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value)).replace("\x7f", "\\u007f")


def report_of(path):
    """Exit codes of what reads a run; nothing but SystemExit may end a command."""
    codes = set()
    reports = (["report", path, "--format", style] for style in ("md", "csv", "html", "json"))
    for arguments in (*reports, ["fsck", path], ["fsck", path, "--json"]):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        codes.add(done.exit_code)
    return codes


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    write_manifest(path, Manifest(run_id="r", started="now", command=("moebench",), device=DEVICE, plan={}, plan_hash="h"))
    journal = Journal(path)
    journal.append(RECORD)
    journal.append(replace(RECORD, backend="c"))
    journal.close()
    return path


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["model", "tokens", "top_k", "ep", "ep_ranks", "tp", "routing", "backend", "seed", "arch", "x"]), anything
    )
)
@example({"tokens": "0:1000000000000:1", "model": "tiny"})
@example({"tokens": ["1:1000000:1"] * 1000, "model": "tiny"})
@example({"ep_ranks": "9" * 5000})
@example({"tokens": "9" * 5000})
@example({"routing": "trace:a\0b"})
@example({"routing": "hotspot:0.5@" + "9" * 4500})
@example({"model": "x" * 500_000})
@example({"backend": ",".join(f"b{i}" for i in range(50_000))})
@example({f"axis{i}": 1 for i in range(3000)})
@example({"model": "deepseek-v3", "tokens": "1:2000:1", "ep": "1,2,4,8,16,32,64,128,256", "tp": "1,2,4,8", "tp_ranks": "all"})
def test_a_plan_is_points_or_sentences(tmp_path, axes):
    file = tmp_path / "plan.toml"
    text = "[[sweep]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in axes.items())
    file.write_text(text, encoding="utf-8", errors="replace")
    plan, errors = attempt(file)
    if plan is None:
        assert 1 <= len(errors) <= 4 * MAX_ERRORS
        assert all(len(sentence) < 6000 for sentence in errors)
    else:
        assert 1 <= len(plan.points) <= MAX_POINTS


@FEW
@given(st.binary(max_size=400))
@example(b"a = " + b"[" * 50_000)
@example(b"a = " + b"{b=" * 50_000)
@example(b"\xff\xfe[[sweep]]")
@example(b"a.b" * 10_000 + b" = 1")
@example(b"[[sweep]]\n" * 100_000)
@example(b"x" * (1 << 20) + b"x")
def test_a_file_that_is_no_plan_is_an_error(tmp_path, content):
    file = tmp_path / "plan.toml"
    file.write_bytes(content)
    with pytest.raises(PlanError):
        plan_of(file)


@FEW
@given(st.data())
def test_a_damaged_journal_is_an_error_that_names_the_place(run, data):
    """Bytes changed, cut, repeated or put in."""
    journal = run / "journal.jsonl"
    good = b"".join(b"%08x %s\n" % (crc32(body), body) for body in (json.dumps(asdict(RECORD)).encode(),) * 2)
    place = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(place, min(len(good), place + 50)))
    journal.write_bytes(good[:place] + data.draw(st.binary(max_size=50)) + good[end:])
    if bad := [problem for problem in problems(run) if "cut off" not in problem.reason and "has a result" not in problem.reason]:
        with pytest.raises(RecordError, match=f"line {bad[0].line} "):
            load_run(run)
    else:
        assert all(record == RECORD for record in load_run(run).records)  # what is read is what was written


@FEW
@given(
    st.dictionaries(st.sampled_from([*asdict(RECORD), "x"]), anything),
    st.dictionaries(st.sampled_from(list(asdict(RECORD.case))), anything),
)
def test_a_record_of_strange_values_is_refused_or_reported_on(run, changed, changed_case):
    row = asdict(RECORD) | {"case": asdict(RECORD.case) | changed_case} | changed
    body = json.dumps(row).encode()
    (run / "journal.jsonl").write_bytes(b"%08x %s\n" % (crc32(body), body))
    codes = report_of(run)
    assert codes in ({0}, {6})


@FEW
@given(
    st.dictionaries(st.sampled_from(["run_id", "started", "command", "device", "plan", "plan_hash", "versions", "schema", "x"]), anything)
)
def test_a_strange_manifest_is_refused_or_reported_on(run, changed):
    manifest = json.loads((run / "run.json").read_text()) | changed
    (run / "run.json").write_text(json.dumps(manifest))
    assert report_of(run) in ({0}, {6})


@FEW
@given(st.one_of(st.binary(max_size=300), st.lists(anything, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())))
@example(b'{"ids": [0, 1], "weights": [1e999, 1]}\n')
@example(b'{"ids": [0, 1], "weights": [NaN, 1]}\n')
@example(b'{"ids": [true, 1], "weights": [0.5, 0.5]}\n')
@example(b'{"ids": [' + b"9" * 5000 + b', 1], "weights": [0.5, 0.5]}\n')
@example(b"[" * 100_000)
def test_a_trace_is_read_or_refused_with_its_line(tmp_path, content):
    file = tmp_path / "trace.jsonl"
    file.write_bytes(content)
    problem = routing_error(f"trace:{file}", num_experts=8, top_k=2, num_tokens=1)
    if problem is None:
        assigned = assign(replace(case("tiny", 1, top_k=2), routing=f"trace:{file}"))
        assert assigned.topk_ids.shape == (1, 2)
    else:
        assert str(file) in problem
        assert len(problem) < 1000


@FEW
@given(words)
@example("zipf:1e308")
@example("zipf:" + "9" * 4900)
@example("hotspot:1e-320@1")
@example("trace:/dev/zero")
@example("trace:/dev/stdin")
@example("trace:" + "x" * 5000)
@example("trace:" + "x" * 300)
def test_a_routing_works_or_is_refused(spec):
    if routing_error(spec, num_experts=8, top_k=4, num_tokens=3) is None:
        assert assign(replace(case("tiny", 3), routing=spec)).topk_ids.shape == (3, 4)


@pytest.mark.parametrize("path", sorted((CORPUS / "plans").iterdir()), ids=lambda path: path.name)
def test_each_plan_of_the_corpus_is_a_usage_error(path):
    done = CliRunner().invoke(main, ["sweep", "--plan", str(path), "--dry-run"])
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("error: ")
    assert all(char.isprintable() or char == "\n" for char in done.stderr)


@pytest.mark.parametrize("path", sorted((CORPUS / "journals").iterdir()), ids=lambda path: path.name)
def test_each_journal_of_the_corpus_is_unreadable(run, path):
    (run / "journal.jsonl").write_bytes(path.read_bytes())
    assert report_of(run) == {6}


@pytest.mark.parametrize("path", sorted((CORPUS / "traces").iterdir()), ids=lambda path: path.name)
def test_each_trace_of_the_corpus_is_refused(path):
    problem = routing_error(f"trace:{path}", num_experts=8, top_k=2, num_tokens=2)
    assert problem is not None
    assert path.name in problem


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", ".", "a\0b", "x" * 5000])
def test_a_plan_that_is_no_file_is_an_error_and_nothing_waits_for_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(PlanError):
        plan_of(name)


def test_control_characters_in_a_journal_do_not_reach_the_terminal(run):
    hostile = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202e\u2066<script>alert(1)</script>=cmd|' /C calc'!A0"
    journal = Journal(run)
    journal.append(replace(RECORD, backend=hostile, status="failed", reason=hostile, device=hostile, timing=None, arch=hostile))
    journal.close()
    for style in ("md", "csv", "html"):
        shown = CliRunner().invoke(main, ["report", str(run), "--format", style]).stdout
        assert "title" in shown
        assert all(char.isprintable() or char == "\n" for char in shown), [char for char in shown if not char.isprintable()]
    for style in ("md", "html"):
        assert "<script>alert" not in CliRunner().invoke(main, ["report", str(run), "--format", style]).stdout


def test_a_csv_cell_never_begins_a_formula(run):
    for start in "=+-@\t\r":
        journal = Journal(run)
        journal.append(replace(RECORD, backend=f"{start}HYPERLINK(1)", time=start))
        journal.close()
    shown = CliRunner().invoke(main, ["report", str(run), "--format", "csv"]).stdout
    assert "HYPERLINK" in shown
    cells = [cell.strip('"') for line in shown.splitlines() for cell in line.split(",")]
    assert not [cell for cell in cells if "HYPERLINK" in cell and cell.startswith(tuple("=+-@\t\r"))]


def test_a_plugin_is_imported_in_a_worker_only_and_only_when_it_is_named(tmp_path):
    info = tmp_path / "told-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: told\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moebench.backends]\ntold = told:backend\n")
    (tmp_path / "told.py").write_text("import os, sys\nopen('imported', 'a').write(' '.join(sys.orig_argv) + '\\n')\nbackend = None\n")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    command = ("sweep", "--model", "tiny", "--tokens", "1", "--repeat-check", "1", "--backend")
    moebench(*command, "torch", cwd=tmp_path, check=0, PYTHONPATH=path)
    assert not (tmp_path / "imported").exists()
    moebench(*command, "told", "--out", "run", cwd=tmp_path, check=3, PYTHONPATH=path)
    assert {line.split()[2] for line in (tmp_path / "imported").read_text().splitlines()} == {"moebench.worker"}


def test_a_plugin_cannot_choose_where_its_log_goes(tmp_path):
    info = tmp_path / "climber-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: climber\nVersion: 1.0\n")
    name = "../../../climber"
    (info / "entry_points.txt").write_text(f"[moebench.backends]\n{name} = climber:backend\n")
    (tmp_path / "climber.py").write_text(
        f"class B:\n    name = {name!r}\n    act_dtype = 'bf16'\n"
        "    def unsupported(self, case, device): return None\n"
        "    def prepare(self, layer, n): raise RuntimeError('up')\nbackend = B()\n"
    )
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    moebench("sweep", "--model", "tiny", "--tokens", "1", "--backend", name, "--out", "run", cwd=deep, check=3, PYTHONPATH=path)
    outside = {file for file in set(tmp_path.rglob("*")) - before if deep / "run" not in (file, *file.parents)}
    assert {file for file in outside if "__pycache__" not in file.parts} == set()


@pytest.mark.parametrize("variable", ["COLUMNS", "TRITON_INTERPRET", "XDG_CACHE_HOME", "HOME", "NO_COLOR", "TERM", "LANG"])
def test_a_strange_environment_is_no_traceback(tmp_path, variable):
    environment = {**ENVIRONMENT, variable: "\x1b[2J=" + "9" * 5000}
    command = [sys.executable, "-m", "moebench", "sweep", "--model", "nonsense", "--tokens", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_output_path_with_control_characters_is_printed_without(tmp_path):
    command = ("sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--repeat-check", "1", "--out", "a\x1b[2Jb")
    done = moebench(*command, cwd=tmp_path, check=0)
    assert "\x1b" not in done.stdout + done.stderr
