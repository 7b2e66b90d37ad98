"""What several processes say of large journals is what one says, to the last byte, or is left to one."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import count
from random import Random
from zlib import crc32

import pytest

from moebench import parts
from moebench.journal import JOURNAL
from moebench.parts import in_memory
from moebench.record import to_json
from moebench.reports import markdown
from moebench.reports.digest import digest, overview, overview_of_records
from moebench.reports.page import page_of
from tests.bench_compare import write
from tests.full_records import TELEMETRY, full, whole_run
from tests.made_runs import untimed
from tests.running import ENVIRONMENT

# The command with three processes for however little there is, and a word on stderr about who read the runs.
SEVERAL = """
import os, sys
from moebench.cli import main
from moebench import forked, parts
from moebench.reports import readers
forked.WORTH, forked.SHARE, parts.ENOUGH, several = 0, 1, 1, parts._made_by_several
os.sched_getaffinity = lambda process: {0, 1, 2}
readers.write = lambda *arguments: False
def made(paths, make, apart):
    found = several(paths, make, apart)
    print("left to one" if found is None else f"read by {len(found[0])}", file=sys.stderr)
    return found
parts._made_by_several = made
main()
"""


def rows(seeds, factor=1.0):
    """Layers that differ in their seed, in the order in which a random plan does them; every time is another."""
    found = []
    for seed in seeds:
        for number, row in enumerate(whole_run()):
            scale = factor * (1 + 0.01 * seed + 0.001 * ((number * 7 + seed) % 5))
            timing = row.timing and replace(row.timing, samples_us=tuple(scale * sample for sample in row.timing.samples_us))
            error = row.error and replace(row.error, rel_l2=row.error.rel_l2 * (1 + 0.1 * seed), worst=row.error.worst * (1 + number % 3))
            phases_s = {"check": 0.05 * number, "time": 0.35 * seed}
            phases_s = {"jit": 0.15} | phases_s if number % 3 else phases_s | {"last": 0.1}
            found.append(replace(row, case=replace(row.case, seed=seed), timing=timing, error=error, phases_s=phases_s))
    found.append(full("a", 4, 50.0, seed=40, flags={"unsettled": "<b>", "own": "x"}, record={"facts": {"padded_hidden": 2944, "x": 1.25}}))
    Random(1).shuffle(found)
    return timed(found)


def timed(found):
    clock = count()
    return [
        replace(row, time=f"2026-11-29T00:{number // 60:02d}:{number % 60:02d}+00:00") for row, number in zip(found, clock, strict=False)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two of the same layers, the second with another backend, a failure and a layer of its own, and slower."""
    there = tmp_path_factory.mktemp("runs")
    base = write(there / "base", rows(range(6)))
    more = [*rows(range(7), 1.2), *timed([full("new", 4, 40.0, seed=3), untimed("new", 8, "crash", "signal 11", seed=3)])]
    return base, write(there / "candidate", timed(more))


def called(code, cwd, *words):
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def alone(cwd, *words):
    return called("from moebench.cli import main\nmain()", cwd, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("report", "--format", "html", 0),
        ("report", "--format", "html", "--baseline", "openai_triton_kernels", 0),
        ("report", "--format", "md", 0),
        ("policy", 0),
        ("policy", "--format", "md", 0),
        ("policy", "--format", "json", 0),
        ("policy", "--format", "vllm", 0),
        ("policy", "--format", "sglang", 0),
        ("compare", 0, 1),
        ("compare", "--format", "md", 0, 1),
        ("compare", "--format", "json", 0, 1),
        ("compare", "--across", "--format", "json", 1, 0),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_three_processes_say_is_what_one_says(tmp_path, runs, words):
    words = [runs[word] if isinstance(word, int) else word for word in words]
    one, three = alone(tmp_path, *words), called(SEVERAL, tmp_path, *words)
    assert (three.returncode, three.stderr) == (one.returncode, f"{one.stderr}read by 3\n")
    assert three.stdout == one.stdout
    assert len(one.stdout) > 500


def test_several_runs_are_merged(tmp_path):
    other = [row for row in rows(range(50, 54)) if row.case.seed >= 50]
    pair = write(tmp_path / "a", rows(range(4))), write(tmp_path / "b", [replace(row, time=f"2026-11-28{row.time[10:]}") for row in other])
    for words in (("report", "--format", "html"), ("report", "--format", "md"), ("policy", "--format", "json")):
        one, three = alone(tmp_path, *words, *pair), called(SEVERAL, tmp_path, *words, *pair)
        assert (three.returncode, three.stderr, three.stdout) == (0, "read by 3\n", one.stdout)


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path, runs):
    for words in (("report", "--format", "html", 0, 1), ("report", "--format", "html", 1, 0), ("policy", "--format", "json", 1, 0)):
        words = [runs[word] if isinstance(word, int) else word for word in words]
        one, three = alone(tmp_path, *words), called(SEVERAL, tmp_path, *words)
        assert (three.returncode, three.stderr, three.stdout) == (0, "read by 3\n", one.stdout)


def test_rows_whose_order_is_not_that_of_time_are_reported_in_that_of_time(tmp_path):
    found = rows(range(5))
    run = write(tmp_path / "run", [*found[100:], *found[:100]])
    for words in (("report", "--format", "html"), ("report", "--format", "md"), ("policy", "--format", "json")):
        one, three = alone(tmp_path, *words, run), called(SEVERAL, tmp_path, *words, run)
        assert (three.stderr, three.stdout) == ("read by 3\n", one.stdout)


def test_figures_of_several_are_those_of_one(tmp_path):
    run = write(tmp_path / "run", timed([full("a", tokens, 50.0 + tokens, seed=seed) for seed in (0, 1) for tokens in (1, 4)]))
    for code, name in (("from moebench.cli import main\nmain()", "one"), (SEVERAL, "two")):
        done = called(code, tmp_path, "report", run, "--format", "md", "--plots", name)
        assert done.returncode == 0, done.stderr
    assert "read by 2" in done.stderr
    drawn = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")}
    assert drawn["one"] == drawn["two"]
    assert len(drawn["one"]) > 5


ROWS = rows(range(4))


@pytest.mark.parametrize(
    ("why", "changed"),
    [
        ("a row was done again", [*ROWS, replace(ROWS[3], time="2026-11-30", reason="again")]),
        ("a failure came before its time", [untimed("triton_mxfp4_bf16", 1, "oom", "", seed=3, record={"time": "2026-11-28"}), *ROWS]),
        (
            "another machine skipped what this one measured",
            [replace(next(row for row in ROWS if row.timing), status="skipped", timing=None, round=7, time="2026-11-28"), *ROWS],
        ),
    ],
)
def test_rows_that_take_the_place_of_others_do(tmp_path, why, changed):
    run = write(tmp_path / "run", changed)
    for words in (("report", "--format", "html", run), ("policy", run), ("compare", "--format", "json", run, run)):
        one, three = alone(tmp_path, *words), called(SEVERAL, tmp_path, *words)
        assert (three.returncode, three.stderr, three.stdout) == (0, "read by 3\n", one.stdout), why


def to_text(row):
    return json.dumps(row, separators=(",", ":")).encode()


def written_as(run, number, change):
    """A run with one line that somebody else wrote, checksum and all."""
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    body = change(lines[number][9:-1])
    lines[number] = b"%08x %s\n" % (crc32(body), body)
    (run / JOURNAL).write_bytes(b"".join(lines))
    return run


@pytest.mark.parametrize(
    ("why", "change"),
    [
        (
            "its fields have another order",
            lambda body: json.dumps(dict(reversed(json.loads(body).items())), separators=(",", ":")).encode(),
        ),
        ("it has spaces", lambda body: json.dumps(json.loads(body)).encode()),
        ("it has two cases, of which the last counts", lambda body: body.replace(b'"seed":1', b'"seed":0', 1)[:-1] + b"," + body[1:]),
    ],
)
def test_a_line_that_may_be_of_another_layer_is_left_to_one_process(tmp_path, why, change):
    run = write(tmp_path / "run", ROWS)
    number = next(number for number, row in enumerate(ROWS) if row.case.seed == 1 and row.case.model == "gpt-oss-20b")
    one = alone(tmp_path, "report", "--format", "md", run)
    three = called(SEVERAL, tmp_path, "report", "--format", "md", written_as(run, number, change))
    assert (three.returncode, three.stderr, three.stdout) == (0, "left to one\n", one.stdout), why


def test_a_line_that_is_wrong_is_named(tmp_path):
    run = write(tmp_path / "run", ROWS)
    text = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    (run / JOURNAL).write_bytes(b"".join([*text[:30], text[30].replace(b"cuda_graph", b"cuda_grape"), *text[31:]]))
    for words in (("policy", run), ("report", run), ("compare", run, run)):
        done = called(SEVERAL, tmp_path, *words)
        assert (done.returncode, done.stdout) == (6, "")
        assert f"{run / JOURNAL}, line 31" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_last_line_that_was_cut_off_is_left_out_and_noted(tmp_path):
    run = write(tmp_path / "run", ROWS)
    (run / JOURNAL).write_bytes((run / JOURNAL).read_bytes()[:-100])
    for words in (("report", "--format", "html", run), ("policy", run), ("compare", run, run)):
        one, three = alone(tmp_path, *words), called(SEVERAL, tmp_path, *words)
        assert three.stderr == f"read by 3\n{one.stderr}"
        assert f"{run}: the journal's last line was cut off" in one.stderr
        assert three.stdout == one.stdout


@pytest.mark.parametrize(
    "trouble",
    [
        "parts._Seen.add = lambda *arguments: os.kill(os.getpid(), 9)",
        "def no(*arguments): raise BlockingIOError(11, 'Resource temporarily unavailable')\nparts.Forked = no",
    ],
    ids=["killed", "not to be had"],
)
def test_a_process_that_is_gone_is_no_reason_to_have_no_report(tmp_path, runs, trouble):
    one = alone(tmp_path, "policy", runs[0])
    three = called(SEVERAL.replace("main()\n", f"{trouble}\nmain()\n"), tmp_path, "policy", runs[0])
    assert (three.returncode, three.stderr, three.stdout) == (0, "left to one\n", one.stdout)


def test_what_is_appended_while_a_journal_is_read_is_left_out(tmp_path):
    run = write(tmp_path / "run", ROWS[:-20])
    with (tmp_path / "more").open("wb") as file:
        file.writelines((write(tmp_path / "all", ROWS) / JOURNAL).read_bytes().splitlines(keepends=True)[-20:])
    growing = """
def grow(journal, count):
    with (journal.path / "journal.jsonl").open("ab") as file:
        file.write(open("more", "rb").read())
    return around(journal, count)
around, parts.lines_around = parts.lines_around, grow
"""
    for words in (("report", "--format", "md", run), ("policy", "--format", "json", run)):
        before = (run / JOURNAL).read_bytes()
        one, three = alone(tmp_path, *words), called(SEVERAL.replace("main()\n", f"{growing}main()\n"), tmp_path, *words)
        assert (three.returncode, three.stderr, three.stdout) == (0, "read by 3\n", one.stdout)
        assert len((run / JOURNAL).read_bytes()) > len(before)
        (run / JOURNAL).write_bytes(before)


@pytest.mark.parametrize("style", ["html", "md"])
def test_a_journal_that_is_changed_while_it_is_read_is_an_error_in_a_sentence(tmp_path, style):
    run = write(tmp_path / "run", ROWS)
    changing = f"""
def again(paths, places):
    os.truncate({str(run / JOURNAL)!r}, 5000)
    return read_again(paths, places)
read_again, parts._read_again = parts._read_again, again
"""
    done = called(SEVERAL.replace("main()\n", f"{changing}main()\n"), tmp_path, "report", "--format", style, run)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr == f"read by 3\nerror: {run / JOURNAL} was changed by somebody while it was read; try it again\n"


def test_a_journal_that_ends_in_anything_but_lines_is_left_to_one_process_at_once(tmp_path):
    run = write(tmp_path / "run", ROWS)
    with (run / JOURNAL).open("ab") as file:
        file.write(b"\0" * (40 << 20))
    one, three = alone(tmp_path, "policy", run), called(SEVERAL, tmp_path, "policy", run)
    assert (three.stderr, three.stdout) == (f"left to one\n{one.stderr}", one.stdout)


def test_two_contracts_of_one_cell_take_nobodys_place(tmp_path):
    twice = [replace(row, contract=replace(row.contract, l2="hot"), timing=replace(row.timing, l2="hot")) for row in ROWS if row.timing]
    run = write(tmp_path / "run", timed([*ROWS, *twice]))
    one, three = alone(tmp_path, "report", "--format", "md", run), called(SEVERAL, tmp_path, "report", "--format", "md", run)
    assert (three.stderr, three.stdout) == ("read by 3\n", one.stdout)


def test_few_layers_are_left_to_one_process(tmp_path):
    run = write(tmp_path / "run", [row for row in ROWS if row.case.ep_size == 1 and row.case.seed == 0])
    done = called(SEVERAL, tmp_path, "policy", run)
    assert (done.returncode, done.stderr) == (0, "left to one\n")


def test_digests_of_any_shares_of_the_layers_add_up(tmp_path):
    whole = markdown.report_of(overview_of_records(ROWS))
    for seed in range(5):
        random = Random(seed)
        share_of = {row.case.seed: random.randrange(4) for row in ROWS}
        placed = list(in_memory(ROWS))
        shares = [[one for one in placed if share_of[one[1].case.seed] == number] for number in range(4)]
        for share in shares:
            random.shuffle(share)
        runs = parts.Whole(runs=(), at=lambda places: [ROWS[number] for _, _, number in sorted(places)])
        found = overview([digest(iter(share)) for share in shares], runs)
        assert markdown.report_of(found) == whole
        assert page_of(found) == page_of(overview_of_records(ROWS))


def test_what_is_too_much_for_a_page_is_cut_at_the_same_place(monkeypatch):
    """More layers, reasons to doubt, failures and rows than are shown, and two backends that are as far from the fastest on average."""
    monkeypatch.setattr("moebench.reports.digest.MOST_LINES", 20)
    monkeypatch.setattr("moebench.reports.digest.MOST_ROWS", 50)
    monkeypatch.setattr("moebench.reports.page.MOST_LINES", 20)
    found = []
    for seed in range(70):
        lead, swapped = 1 + (seed % 7) / 10, 1 + (6 - seed % 7) / 10
        where = {"seed": (seed + 1) // 2, "top_k": 4 - seed % 2}
        seen = {"facts": {"tile": seed % 3}, "phases_s": {"check": 0.05 * seed, "time": 0.15} if seed % 3 else {"time": 0.05, "jit": 0.25}}
        seen["telemetry"] = replace(TELEMETRY, power_w=400.0 + seed, sm_mhz=(1900.0 - seed, 1950.0, 1980.0 + seed))
        for tokens in (1, 64):
            for name, slower in (("best", 1.0), ("one", lead), ("other", swapped)):
                found.append(full(name, tokens, 50.0 * slower, record=seen, **where))
        found.append(full("best@untuned", 1, 40.0 - seed // 4, flags={"unsettled": f"by {seed} %"}, **where))
        found.append(untimed(("one", "other")[seed % 2], 8, "crash", f"signal {seed % 29}", **where))
    wrong = replace(found[0].error, rel_l2=found[0].error.rel_l2_tolerance * 2)
    found.append(replace(untimed("best", 8, "wrong", "off", seed=1), error=wrong))
    Random(2).shuffle(found)
    found = timed(found)
    whole = page_of(overview_of_records(found)), markdown.report_of(overview_of_records(found))
    for told in ("70 layers were timed", "All layers together", "The first 20 of 70", "The first 20 of 30", "The first 50 of 561 rows"):
        assert told in whole[0]
    placed = list(in_memory(found))
    at = parts.Whole(runs=(), at=lambda places: [found[number] for _, _, number in sorted(places)])
    for seed in range(3):
        random = Random(seed)
        share_of = {(row.case.seed, row.case.top_k): random.randrange(5) for row in found}
        shares = [[one for one in placed if share_of[one[1].case.seed, one[1].case.top_k] == number] for number in range(5)]
        for share in shares:
            random.shuffle(share)
        joined = overview([digest(iter(share)) for share in shares], at)
        assert (page_of(joined), markdown.report_of(joined)) == whole


def test_the_text_of_a_case_as_it_is_written_says_its_layer():
    for row in ROWS:
        body = to_json(row).encode()
        line = b"%08x %s\n" % (crc32(body), body)
        model, sizes, ep, rest = parts._layer(line)
        assert json.loads(b"{%s}" % b",".join((model, sizes, ep, rest))).items() <= json.loads(body)["case"].items()
    assert parts._layer(line.replace(b'"model":"', b'"model":"\\u0041')) is None
