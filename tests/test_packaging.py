"""What gets installed, and that a backend from another distribution is found beside ours."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from moebench import __version__
from moebench.cli import main

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
SHIPPED = ("kernels", "reference", "reports", "plans")
INFO = f"moebench-{__version__}.dist-info"
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "runs", "__pycache__", ".*_cache", ".coverage*", ".hypothesis"
)


def checked(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def build(source, out):
    """Builds in a copy, since setuptools leaves build/ behind; the index is not asked for anything."""
    checked(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".", cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["links", "links lost"])
def wheel(request, tmp_path_factory):
    """Built from a checkout, and from a copy that went through something without symbolic links."""
    source = tmp_path_factory.mktemp("source") / "moebench"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    if request.param == "links lost":
        for name in SHIPPED:
            (source / "moebench" / name).unlink()
    return build(source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_source_file_inside_moebench_and_nothing_else(wheel):
    names = set(ZipFile(wheel).namelist())
    code = {f"moebench/{path.name}" for path in (ROOT / "moebench").glob("*.py")}
    code |= {
        f"moebench/{path.relative_to(ROOT)}"
        for name in SHIPPED
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"moebench/py.typed", "moebench/plans/quick.toml", "moebench/reports/markdown.py"} <= names
    assert code <= names, f"missing from the wheel: {sorted(code - names)}; see packages and package-data in pyproject.toml"
    assert {name.split("/")[0] for name in names} == {"moebench", INFO}
    assert ZipFile(wheel).read(f"{INFO}/top_level.txt").decode().split() == ["moebench"]


def test_base_install_brings_no_vendor_kernels(wheel):
    metadata = HeaderParser().parsestr(ZipFile(wheel).read(f"{INFO}/METADATA").decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(";")[0].strip() for line in required) == [
        "click",
        "matplotlib",
        "msgspec",
        "numpy",
        "nvtx",
        "pandas",
        "rich",
        "torch",
        "triton",
    ]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "moebench = moebench.cli:main" in ZipFile(wheel).read(f"{INFO}/entry_points.txt").decode()


def test_installed_moebench_works_away_from_the_checkout(wheel, tmp_path):
    checked(*PIP, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    code = (
        "import moebench, moebench.plan, moebench.registry; print(moebench.__file__, *moebench.plan.shipped(), *moebench.registry.names())"
    )
    file, *found = checked(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(file).is_relative_to(tmp_path)
    assert {"quick", "gpt-oss", "torch", "numpy"} <= set(found)


def test_every_pinned_tool_is_the_one_the_settings_name():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert f"ruff{settings['tool']['ruff']['required-version']}" in pins
    assert len({line.split("==")[0].lower() for line in pins}) == len(pins)


COMMANDS = {name: main.get_command(None, name) for name in main.list_commands(None)}


def options(command):
    """Of a command, and of those below it."""
    below = [name for one in getattr(command, "commands", {}).values() for name in options(one)]
    return {"--help", *(text for option in command.params for text in option.opts), *below}


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_a_document_shows_no_option_that_is_not_there(document):
    for line in document.read_text().splitlines():
        if shown := re.match(r"\s+moebench ([a-z]+) ([^#|;&]*)", line):
            wrong = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", shown[2])) - options(COMMANDS[shown[1]])
            assert not wrong, line


def test_the_readme_shows_every_command():
    shown = set(re.findall(r"\bmoebench ([a-z]+)", (ROOT / "README.md").read_text()))
    assert set(COMMANDS) <= shown


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory):
    """A PYTHONPATH that holds the demo distribution as installed, and this checkout."""
    source = tmp_path_factory.mktemp("demo") / "plugin"
    shutil.copytree(ROOT / "tests" / "plugin", source, ignore=NOT_SOURCE)
    site = tmp_path_factory.mktemp("site")
    checked(*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(build(source, source / "wheel")), cwd=source)
    return os.pathsep.join([str(site), str(ROOT)])


def test_a_third_party_backend_is_listed_without_importing_it(with_plugin, tmp_path):
    code = "import sys; from moebench.registry import names; print('demo_bf16' in names(), 'moebench_plugin_demo' in sys.modules)"
    assert checked(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=with_plugin).split() == ["True", "False"]


def test_a_third_party_backend_says_where_it_comes_from(with_plugin, tmp_path):
    listed = json.loads(checked(sys.executable, "-m", "moebench", "backends", "--json", cwd=tmp_path, PYTHONPATH=with_plugin))
    (row,) = (row for row in listed["backends"] if row["name"] == "demo_bf16")
    assert (row["source"], row["act_dtype"], row["runs_here"]) == ("moebench-plugin-demo 0.1.0", "bf16", "yes")


def test_a_third_party_backend_is_checked_and_timed_like_ours(with_plugin, tmp_path):
    command = ["sweep", "--model", "tiny", "--tokens", "1,4", "--ep", "1,2", "--backend", "demo_bf16", "--json", "--out", "run"]
    shown = checked(sys.executable, "-m", "moebench", *command, cwd=tmp_path, PYTHONPATH=with_plugin)
    rows = json.loads(shown.splitlines()[-1])["records"]
    assert [(row["backend"], row["status"]) for row in rows] == [("demo_bf16", "ok")] * 6
    assert all(row["median_us"] > 0 for row in rows)
