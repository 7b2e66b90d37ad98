"""docs/example, once it is there, is whole, and README says and shows what its journal makes; and the script that makes both works."""

import importlib.util
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner

import moebench
from moebench.cli import main
from tests.made_runs import timed, write_run

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("make_example", ROOT / "docs" / "make_example.py")
make_example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_example)
FILES = ["journal.jsonl", "latency.svg", "report.html", "run.json"]


ROWS = [timed(name, m, us + m) for name, us in (("triton_mxfp4_bf16", 30.0), ("marlin_mxfp4_bf16", 40.0)) for m in (1, 16, 1024)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    shutil.copy(ROOT / "README.md", root / "README.md")
    assert make_example.main(write_run(root / "run", *ROWS), root) == 0
    return root


@pytest.fixture
def root(tmp_path, made):
    """A repository with README and an example of its own."""
    return Path(shutil.copytree(made, tmp_path / "root"))


def shown(root):
    readme = (root / "README.md").read_text()
    return readme.split(make_example.BEGIN)[1].split(make_example.END)[0]


def test_the_example_of_this_repository_is_whole_and_up_to_date():
    assert make_example.stale(ROOT) == []


def test_an_example_is_a_run_with_its_page_and_plot(root):
    example = root / make_example.EXAMPLE
    assert sorted(path.name for path in example.iterdir()) == FILES
    assert len(moebench.load(example).records) == len(ROWS)
    assert make_example.stale(root) == []


def test_readme_says_what_the_policy_command_says(root):
    said = CliRunner().invoke(main, ["policy", str(root / make_example.EXAMPLE), "--format", "md"])
    assert said.exit_code == 0
    assert said.output.strip() in shown(root)
    assert "| 1 to 1024 | triton_mxfp4_bf16 |" in shown(root)


def test_readme_says_when_and_on_what(root):
    assert "NVIDIA H200, 2026-11-22, driver 580.159.04, moebench 0.1.0, torch 2.13.0; " in shown(root)


def test_readme_shows_the_plot_with_words_for_who_cannot_see_it(root):
    words, target = re.search(r"!\[(.*)\]\((.*)\)", shown(root)).groups()
    assert "triton_mxfp4_bf16 is fastest" in words
    drawn = ElementTree.fromstring((root / target).read_text())
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in "".join(drawn.itertext())
    assert {"1", "1024", "triton_mxfp4_bf16"} <= {"".join(node.itertext()) for node in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_the_rest_of_readme_stays(root):
    before, after = (
        [part for n, part in enumerate(re.split(f"{re.escape(make_example.BEGIN)}|{re.escape(make_example.END)}", text)) if n != 1]
        for text in ((ROOT / "README.md").read_text(), (root / "README.md").read_text())
    )
    assert before == after


@pytest.mark.parametrize("name", FILES)
def test_an_example_that_lacks_a_file_is_found_out(root, name):
    (root / make_example.EXAMPLE / name).unlink()
    assert make_example.stale(root) != []


@pytest.mark.parametrize("name", ["docs/example/report.html", "docs/example/latency.svg", "README.md"])
def test_an_example_that_its_journal_does_not_make_is_found_out_and_mended_without_a_gpu(root, name):
    text = (root / name).read_text()
    (root / name).write_text(text.replace("is fastest", "is slow"))
    assert make_example.stale(root) == [f"{name} is not what docs/example makes; make example"]
    assert make_example.main(root / make_example.EXAMPLE, root) == 0
    assert (root / name).read_text() == text


def test_what_does_not_belong_to_an_example_is_found_out(root):
    (root / make_example.EXAMPLE / "stderr.log").write_text("x")
    assert make_example.stale(root) == ["docs/example/stderr.log does not belong there"]


@pytest.mark.parametrize(
    ("records", "command", "told"),
    [
        ([], (), "has no records"),
        ([timed("a", 4, 10.0)], (), "has no plot of time against tokens, or nothing that can win"),
        (ROWS, ("moebench", "sweep", "--out", "/home/x/run"), "names places of the machine that made it, such as /home/x/run"),
    ],
)
def test_a_run_that_is_no_example_is_refused_in_words(tmp_path, capsys, records, command, told):
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    run = write_run(tmp_path / "run", *records, command=command)
    assert make_example.main(run, tmp_path) == 2
    assert told in capsys.readouterr().err
