"""What a gate tells people and machines: within the limits of where it goes, and nothing it is told steers them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from moebench.case import case
from moebench.commands.ab import ab
from moebench.commands.baseline import baseline
from moebench.commands.gate import gate
from moebench.reports import verdicts as pages
from moebench.verdict import Judgement, Options, Verdict

ROOT = Path(__file__).parents[1]
NAMES = ("runs/base", "runs/candidate")
CI = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def verdict(outcome, tokens=64, ratio=1.0, **changes):
    told = {
        "case": case("gpt-oss-20b", tokens),
        "backend": "triton_mxfp4_bf16",
        "scope": "experts",
        "outcome": outcome,
        "base_us": 100.0,
        "candidate_us": 100.0 * ratio,
        "ratio": ratio,
        "low": ratio - 0.002,
        "high": ratio + 0.002,
        "sees": 0.029,
        "threshold": 0.03,
        "rounds": 12,
        "clears": outcome in ("same", "faster"),
    }
    return Verdict(**{**told, **changes})


SLOWER = verdict("slower", 1, 1.2)
BROKEN = verdict("broken", 2, reason="wrong in 1 of 12 rounds", base_us=None, candidate_us=None)
MISSING = Verdict(case=case("tiny", 4), backend="b", scope="experts", outcome="missing", reason="no time in the candidate run")
UNCLEAR = verdict("unclear", 8, 1.01, reason="between -1.0% and +4.0%", blind=True, sees=0.05, needs=24)
FASTER, SAME = verdict("faster", 16, 0.9), verdict("same", 32)
ALL = Judgement(verdicts=(BROKEN, SLOWER, MISSING, UNCLEAR, FASTER, SAME), options=Options())


def many(count, outcome="slower", **changes):
    rows = tuple(verdict(outcome, number + 1, 2 - number / count, **changes) for number in range(count))
    return Judgement(verdicts=rows, options=Options())


def plain(judgement):
    console = Console(width=150, file=StringIO())
    console.print(pages.table(judgement, NAMES))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("judgement", "answer", "headline"),
    [
        (ALL, "fail", "red: 1 broken, 1 slower, 1 missing, 1 unclear, 1 faster, 1 same of 6 cells"),
        (Judgement(verdicts=(FASTER, SAME), options=Options()), "pass", "green: no cell is slower by 3 %: 1 faster, 1 same of 2 cells"),
        (Judgement(verdicts=(UNCLEAR, SAME), options=Options()), "none", "no verdict: 1 unclear, 1 same of 2 cells"),
        (
            Judgement(verdicts=(), options=Options(), reasons=("nothing in common",)),
            "none",
            "no verdict: nothing in common (no cells of 0 cells)",
        ),
        (
            replace(ALL, may_fail=False),
            "none",
            "no verdict: a stored baseline cannot fail a change; measure base and candidate in turns: moebench ab",
        ),
    ],
)
def test_the_headline_is_the_answer(judgement, answer, headline):
    assert judgement.answer == answer
    assert pages.headline(judgement).startswith(headline)
    assert str(pages.answer(judgement)) == pages.headline(judgement)


def test_green_says_how_many_cells_have_a_threshold_of_their_own():
    found = Judgement(verdicts=(SAME, verdict("same", 1, threshold=0.05)), options=Options())
    assert pages.headline(found).startswith("green: no cell is slower by 3 %, or by its own higher threshold in 1:")


def test_the_table_leaves_out_what_is_the_same_and_names_the_blind():
    text = plain(ALL)
    assert "gpt-oss-20b M=32 " not in text
    assert re.search(r"slower +gpt-oss-20b M=1 +triton_mxfp4_bf16 +100\.0 +120\.0 +\+20\.0 % +\+19\.8 % to \+20\.2 % +2\.9 % +12", text)
    assert "cannot be relied on to see 3 %: gpt-oss-20b M=8 triton_mxfp4_bf16 sees 5.0 % in 12 rounds; 24 rounds would" in text
    assert "gpt-oss-20b M=2 triton_mxfp4_bf16: wrong in 1 of 12 rounds" in text


def test_a_reason_that_many_cells_share_is_told_once():
    assert "30 cells: too few" in plain(many(30, "unclear", reason="too few"))
    assert "and 10 more cells" in plain(many(30, "unclear", reason="too few"))


@pytest.mark.parametrize("count", [1, 100, 5000])
@pytest.mark.parametrize("limit", [pages.COMMENT_BYTES, pages.SUMMARY_BYTES])
def test_markdown_stays_within_its_limit_and_says_what_it_leaves_out(count, limit):
    text = pages.markdown(many(count, reason="é" * 5000), NAMES, limit)
    rows = text.count("\n| slower")
    assert len(text.encode()) <= limit
    assert rows == count or f"And {count - rows} more cells" in text or f"And {count - rows} more cell " in text
    assert rows > (0 if count == 1 else 50)


def test_markdown_shows_the_largest_effects_where_not_all_fit():
    text = pages.markdown(many(5000), NAMES)
    assert "| slower | gpt-oss-20b M=1 |" in text
    assert "M=5000 |" not in text


def test_annotations_are_sorted_by_effect_capped_and_escaped():
    lines = pages.workflow_commands(many(50))
    assert len(lines) == 10
    assert lines[0] == "::error title=gpt-oss-20b M=1 triton_mxfp4_bf16::slower: +100.0 %25, 100.0 -> 200.0 us in 12 rounds"
    assert lines[-1] == "::error title=moebench gate::and 41 more cells"
    assert len(pages.workflow_commands(many(10))) == 10
    both = pages.workflow_commands(ALL)
    assert [line.split(" ")[0] for line in both] == ["::error", "::error", "::warning", "::warning"]


def test_a_stored_baseline_warns_and_calls_nothing_an_error():
    assert {line.split(" ")[0] for line in pages.workflow_commands(replace(ALL, may_fail=False))} == {"::warning"}


def test_what_keeps_runs_from_being_compared_is_annotated():
    found = Judgement(verdicts=(), options=Options(), reasons=("the devices differ: A / B",))
    assert pages.workflow_commands(found) == ["::warning title=moebench gate::no verdict: the devices differ: A / B (no cells of 0 cells)"]


HOSTILE = "x\n::error::boo %0A, a:b \x1b[31m|`<script>\u202e"


def test_foreign_text_steers_neither_a_runner_nor_a_terminal_nor_a_page():
    bad = replace(BROKEN, backend=HOSTILE, reason=HOSTILE)
    found = Judgement(verdicts=(bad,), options=Options(), notes=(HOSTILE,))
    (line,) = pages.workflow_commands(found)
    assert "\n" not in line
    assert "%0A" not in line
    title = line.split("::")[1].removeprefix("error title=")
    assert ":" not in title
    assert "," not in title
    for text in (line, plain(found), pages.markdown(found, (HOSTILE, HOSTILE)), pages.junit(found, HOSTILE).decode()):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\n::error" not in text
    assert "<script>" not in pages.markdown(found, NAMES)


def test_junit_counts_failures_and_errors_and_reads_as_xml():
    root = ElementTree.fromstring(pages.junit(ALL, "gate"))
    suite = root[0]
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "2",
        "errors": "2",
        "skipped": "0",
    }
    assert [child.tag for test in suite for child in test] == ["failure", "failure", "error", "error"]
    assert "moebench profile --diff" in suite[1][0].text
    allowed = ElementTree.fromstring(pages.junit(replace(ALL, options=Options(allow_missing=True)), "gate"))
    assert allowed[0].get("skipped") == "1"


@pytest.mark.parametrize("reasons", [(), ("the devices differ",)])
def test_junit_is_never_green_without_a_verdict(reasons):
    root = ElementTree.fromstring(pages.junit(Judgement(verdicts=(), options=Options(), reasons=reasons), "gate"))
    assert root.get("errors") == "1"


def test_json_holds_every_cell_and_every_number():
    found = json.loads(pages.to_json(ALL, NAMES, 1))
    assert (found["answer"], found["exit_code"], found["base"]) == ("fail", 1, "runs/base")
    assert found["counts"] == {"broken": 1, "slower": 1, "missing": 1, "unclear": 1, "faster": 1, "same": 1}
    cells = {cell["outcome"]: cell for cell in found["cells"]}
    assert cells["slower"]["ratio"] == 1.2
    assert cells["unclear"]["needs"] == 24
    assert [cell["blocks"] for cell in found["cells"]] == [True, True, True, True, False, False]
    assert found["rule"]["threshold"] == 0.03


def test_commands_that_explain_name_the_case_and_the_interpreters():
    odd = replace(
        SLOWER,
        case=case("gpt-oss-120b", 7, top_k=2, ep_size=4, ep_rank=3, tp_size=2, tp_rank=1, routing="zipf:1.1", seed=5),
        backend="a@b c",
    )
    lines = pages.explain(Judgement(verdicts=(odd, *many(9).verdicts), options=Options()), ("/v/base/bin/python", "/v/cand/bin/python"))
    words = (
        "--model gpt-oss-120b --tokens 7 --top-k 2 --ep 4 --ep-ranks 3 --tp 2 --tp-ranks 1 --routing zipf:1.1 --seed 5 --backend 'a@b c'"
    )
    assert lines[0] == f"/v/base/bin/python -m moebench profile {words} --save base.profile.json"
    assert lines[2] == "/v/cand/bin/python -m moebench profile --diff base.profile.json candidate.profile.json"
    assert len(lines) == 3 * pages.EXPLAINED
    assert len(set(lines)) == len(lines)
    assert pages.explain(Judgement(verdicts=(BROKEN, SAME), options=Options()), None) == []


def example(language, title):
    """The code block of docs/ci.md that begins with this comment."""
    (found,) = re.findall(rf"```{language}\n(# {re.escape(title)}\n.*?)```", CI, re.DOTALL)
    return found


EXAMPLES = [(".github/workflows/moe-gate.yml", "vendor.github-workflows"), (".gitlab-ci.yml", "vendor.gitlab-ci")]


def misfits(path, schema):
    """What check-jsonschema says of a file; empty where it fits. The schemas come with it, nothing is fetched."""
    extra = ["--data-transform", "gitlab-ci"] if "gitlab" in schema else []
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *extra, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize(("title", "schema"), EXAMPLES)
def test_the_pipelines_in_the_guide_fit_the_published_schemas(tmp_path, title, schema):
    file = tmp_path / Path(title).name
    file.write_text(example("yaml", title))
    assert misfits(file, schema) == ""


@pytest.mark.parametrize(
    ("example_of", "right", "wrong"), [(EXAMPLES[0], "runs-on:", "runs_on:"), (EXAMPLES[1], "when: always", "when: sometimes")]
)
def test_the_schemas_find_mistakes(tmp_path, example_of, right, wrong):
    title, schema = example_of
    file = tmp_path / Path(title).name
    file.write_text(example("yaml", title).replace(right, wrong))
    assert wrong.split(":")[0] in misfits(file, schema)


def scripts():
    """Every shell script in the examples."""
    yaml = YAML(typ="safe")
    github, gitlab = (yaml.load(example("yaml", title)) for title, _ in EXAMPLES)
    yield from (step["run"] for step in github["jobs"]["gate"]["steps"] if "run" in step)
    yield "\n".join(gitlab["moe-gate"]["script"])


@pytest.mark.parametrize("script", list(scripts()))
def test_the_scripts_in_the_guide_are_shell(script):
    text = re.sub(r"\$\{\{.*?\}\}", "value", script)
    done = subprocess.run([which("sh"), "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_guide_uses_options_that_exist():
    known = {"ab": ab, "gate": gate, "save": baseline.commands["save"], "accept": baseline.commands["accept"]}
    texts = [*scripts(), *re.findall(r"^    (moebench .*)$", CI, re.MULTILINE)]
    used = set()
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            for command in re.findall(r"moebench (?:baseline )?(\w+)", line):
                options = {option for parameter in known[command].params for option in parameter.opts} if command in known else None
                if options is not None:
                    used.add(command)
                    given = {word for word in re.findall(r"\s(--[a-z-]+)", line)}
                    assert given <= options, given - options
    assert used == {"ab", "gate", "save", "accept"}
