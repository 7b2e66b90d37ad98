"""First screens: help, errors, listings."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from moebench.cli import NAMES, main
from moebench.commands.out_file import OutFile
from tests.made_runs import timed, write_run
from tests.running import ROOT, moebench


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_help_names_every_command_and_where_to_start():
    shown = run("--help").output
    assert all(command in shown for command in ("sweep", "backends", "report"))
    assert "Start with" in shown


@pytest.mark.parametrize("command", ["sweep", "backends", "report"])
def test_every_command_has_help(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 4


def test_six_mistakes_are_six_errors_and_torch_is_not_imported():
    code = (
        "import sys; from moebench.cli import main\n"
        "line = 'sweep --model gpt-oss-20b,gpt-oss-20 --tokens -1,foo --top-k 99 --ep 3 --backend tritn'\n"
        "try: main(line.split())\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "2"]
    assert done.stderr.count("error: ") == len(done.stderr.splitlines()) == 6
    assert "did you mean 'triton_mxfp4_bf16'" in done.stderr


def test_backends_lists_each_with_a_reason(tmp_path):
    done = moebench("backends", "--json", cwd=tmp_path, check=0)
    document = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["backends"]}
    assert {"torch", "numpy", "triton_mxfp4_bf16", "fault_ok"} <= set(rows)
    assert all(row["reason"] or row["runs_here"] == "yes" for row in rows.values())
    assert rows["fault_ok"]["source"] == "moebench-faults 1.0"
    assert "ModuleNotFoundError" in rows["fault_import"]["reason"]
    assert rows["torch"]["source"] == "moebench"
    if document["device"]["arch"] == "cpu":
        assert rows["triton_mxfp4_bf16"]["runs_here"] == "small cases"
    table = moebench("backends", cwd=tmp_path, check=0, PYTHONPATH=str(ROOT)).stdout  # each fault is a process more
    assert "triton_mxfp4_bf16" in table


def test_report_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = run("report")
    assert (nothing.exit_code, "no run under runs" in nothing.output) == (2, True)
    (tmp_path / "empty").mkdir()
    wrong = run("report", "empty")
    assert (wrong.exit_code, "no run.json" in wrong.output) == (6, True)


def test_report_renders_and_writes(tmp_path):
    moebench("sweep", "--model", "tiny", "--tokens", "1,2", "--backend", "torch", cwd=tmp_path, check=0)
    assert "tiny" in moebench("report", cwd=tmp_path, check=0).stdout
    assert moebench("report", "--format", "csv", "--out", "a.csv", cwd=tmp_path, check=0).stdout.strip() == "a.csv"
    assert (tmp_path / "a.csv").read_text().count("\n") == 3
    assert "No such file" in moebench("report", "--out", "none/a.md", cwd=tmp_path, check=5).stderr


@pytest.mark.parametrize("file", ["journal.jsonl", "run.json", "link"])
def test_no_report_takes_the_place_of_what_was_measured(tmp_path, file):
    path = write_run(tmp_path / "run", timed("torch", 1, 50.0))
    (path / "link").symlink_to("journal.jsonl")
    before = {name: (path / name).read_bytes() for name in ("journal.jsonl", "run.json")}
    for words in (["report", "--out"], ["report", "--format", "csv", "--out"], ["export", "--format", "nvbench", "--out"]):
        done = run(*words, str(path / file), str(path))
        assert done.exit_code == 2
        assert "what a run has measured" in done.output
        assert "choose another file" in done.output
    assert {name: (path / name).read_bytes() for name in before} == before
    assert run("report", "--out", str(tmp_path / "journal.jsonl"), str(path)).exit_code == 0  # no run there


def test_an_output_that_is_a_link_to_itself_is_a_storage_error(tmp_path):
    path = write_run(tmp_path / "run", timed("torch", 1, 50.0))
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    done = run("report", "--out", str(tmp_path / "loop.csv"), str(path))
    assert (done.exit_code, done.output) == (5, f"error: {tmp_path / 'loop.csv'}: Too many levels of symbolic links\n")


def test_every_file_that_a_command_writes_is_kept_off_runs():
    read = {("compile", "against")}
    files = {
        (name, option.name): option.type
        for name in NAMES
        for option in main.get_command(click.Context(main), name).params
        if isinstance(option.type, click.Path) and not option.type.dir_okay
    }
    assert len(files) > 8
    assert {key for key, kind in files.items() if not isinstance(kind, OutFile)} == read


def test_an_unwritable_run_directory_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    done = moebench("sweep", "--model", "tiny", "--tokens", "1", "--backend", "torch", "--out", "file/run", cwd=tmp_path, check=5)
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_backends_of_one_name_are_refused_and_both_named(tmp_path):
    info = tmp_path / "clash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moebench.backends]\ntorch = clash:backend\n")
    done = subprocess.run(
        [sys.executable, "-m", "moebench", "backends"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "clash:backend" in done.stderr
    assert "moebench.reference.torch_experts" in done.stderr


def test_the_first_screen_names_every_command_and_imports_none():
    code = (
        "import sys; from click.testing import CliRunner; from moebench.cli import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "print([name for name in sys.modules if name.startswith('moebench.commands')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")
    files = {path.stem for path in (ROOT / "moebench" / "commands").glob("*.py")} - {
        "__init__",
        "axes",
        "outcome",
        "uncollected",
        "gate_selfcheck",
        "out_file",
    }
    assert {line.split()[0] for line in shown.splitlines() if line.startswith("  ")} >= files
    assert all(main.get_command(None, name).name == name for name in files)


def test_an_unknown_command_is_answered_with_the_nearest():
    result = CliRunner().invoke(main, ["swep"])
    assert result.exit_code == 2
    assert "no such command: 'swep'; did you mean 'sweep'?" in result.output
