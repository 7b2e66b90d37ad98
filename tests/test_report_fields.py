"""What schema 1.1 adds to a record, in the reports that are text."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from moebench.reports import json_rows, markdown, table_csv, terminal
from tests.full_records import CONTRACT, HOSTILE, TELEMETRY, full
from tests.made_runs import rounds, run, timed, untimed

FLAGS = {"throttled": "SM clock 1830 of 1980 MHz"}


def lines(*records, baseline=None):
    return markdown.report([run(*records)], baseline).splitlines()


def screen(*records):
    console = Console(width=120, file=io.StringIO(), highlight=False, color_system=None)
    console.print(terminal.summary(records))
    return console.file.getvalue()


def cells(record):
    (row,) = csv.DictReader(io.StringIO(table_csv.rows([record])))
    return row


def test_markdown_answers_before_it_lists():
    shown = lines(full("a", 1, 20.0), full("b", 1, 30.0))
    where = "gpt-oss-20b top_k=4 ep=1 tp=1 uniform on NVIDIA H200, CUDA graph replay, cold L2"
    assert f"- {where}: At 1 token a is fastest (1.50x as fast as the next)." in shown
    assert shown.index("## Which backend, when") < shown.index("## Times")


def test_markdown_marks_flags_and_explains_each_once():
    shown = lines(full("a", 1, 20.0, flags=FLAGS), full("a", 4, 20.0, flags=FLAGS))
    assert "| 1 | 20.0! |" in shown
    row = "| throttled | 2 | The GPU ran slower than it can, or its protection was active. | a gpt-oss-20b M=1: SM clock 1830 of 1980 MHz |"
    assert row in shown
    assert "reason to doubt" not in "\n".join(lines(full("a", 1, 20.0))).lower()


def test_markdown_shows_the_share_of_the_roof_and_its_limit():
    shown = lines(full("a", 16, 24.0), full("a", 256, 128.0), timed("b", 16, 30.0, record={"contract": CONTRACT}))
    assert "| 16 | 50 % |  | memory |" in shown
    assert "| 256 | 50 % |  | compute |" in shown


def test_markdown_explains_contracts_and_keeps_them_apart():
    other = replace(CONTRACT, warmup="none at all")
    shown = lines(full("a", 1, 20.0), full("b", 1, 10.0, record={"contract": other}))
    assert any(line.startswith(f"| {CONTRACT.id} | 1 | scope: experts; inside: from ids") for line in shown)
    assert any(line.startswith("**CUDA graph replay, cold L2 (warmup: none at all)**") for line in shown)
    assert "| 1 | 20.0 |" in shown
    assert "| 1 | 10.0 |" in shown


def test_a_scope_is_never_compared_with_another():
    whole = replace(CONTRACT, scope="layer")
    shown = lines(full("a", 1, 20.0), full("b", 1, 10.0, record={"contract": whole, "scope": "layer"}))
    assert "**CUDA graph replay, cold L2, whole layer from router logits**" in "\n".join(shown)
    assert "## Which backend, when" not in shown


def test_markdown_divides_by_the_wanted_baseline():
    records = timed("torch", 1, 30.0), timed("a", 1, 20.0), timed("b", 1, 10.0)
    assert "Times as fast as torch:" in lines(*records)
    shown = lines(*records, baseline="a")
    assert "Times as fast as a:" in shown
    assert "| 1 | 0.67x | 2.00x |" in shown


def test_rounds_are_one_cell():
    assert "| 1 | 10.0 |" in lines(*rounds("a", 1, (9.0, 10.0, 12.0)))


def test_a_token_count_that_lacks_a_rank_does_not_pass_for_a_whole_layer():
    whole = [timed("a", 1, 10.0 + rank, ep_size=2, ep_rank=rank) for rank in (0, 1)]
    shown = lines(*whole, timed("a", 2, 20.0, ep_size=2, ep_rank=0))
    assert "| 1 | 11.0 |" in shown
    assert "| 2 | 20.0 (1/2) |" in shown


def test_a_rank_that_changes_with_the_token_count_is_one_rank():
    shown = lines(*(timed("a", m, 10.0 * m, ep_size=4, ep_rank=m) for m in (1, 2)))
    assert "| 2 | 20.0 |" in shown
    assert "Each cell: one rank, not the same at every token count." in "\n".join(shown)


def test_the_terminal_marks_flags_and_says_what_they_are():
    shown = screen(full("a", 1, 20.0, flags=FLAGS), full("a", 4, 30.0))
    assert "20.0!" in shown
    assert "! doubtful" in shown
    assert "! throttled 1 row, such as a gpt-oss-20b M=1: SM clock 1830 of 1980 MHz" in shown


def test_csv_has_what_a_trusted_time_needs():
    row = cells(full("a", 256, 128.0, flags=FLAGS, how={"host_us": 3.5, "stop_reason": "interval", "stages_us": {"route": 1.5}}))
    assert (row["scope"], row["round"], row["contract_id"]) == ("experts", "0", CONTRACT.id)
    assert (row["roof_share"], row["roof_limiter"], row["roof_floor_us"]) == ("0.5", "compute", "64.0")
    assert (row["flags"], row["stages_us"], row["host_us"]) == ("throttled=SM clock 1830 of 1980 MHz", "route=1.5", "3.5")
    assert (row["gpu_sm_mhz"], row["gpu_power_w"], row["clock_reasons"]) == ("1965.0 1980.0 1980.0", "420.0", "sw_power_cap=0.1")
    assert (row["canary_before_us"], row["settled"], row["host_bound"]) == ("31.0", "true", "false")


def test_csv_leaves_empty_what_was_not_measured():
    row = cells(untimed("a", 1, "skipped", "why"))
    assert {row[name] for name in ("contract_id", "roof_share", "flags", "host_us", "gpu_power_w", "canary_after_us")} == {""}


def test_csv_is_what_the_standard_library_would_have_written():
    records = [full(name, 4, 128.0, flags={name: HOSTILE}) for name in ("plain", "a,b", 'say "x"', "=1+1", HOSTILE)]
    records += [untimed("b", 1, "failed", 'one\ntwo\r, "three"')]
    text = table_csv.rows(records)
    assert text == "".join(table_csv.lines(records))
    again = io.StringIO()
    csv.writer(again, lineterminator="\n").writerows(csv.reader(io.StringIO(text)))
    assert again.getvalue() == text
    assert {len(row) for row in csv.reader(io.StringIO(text))} == {len(table_csv.HEADER)}


@pytest.mark.parametrize(
    "changes", [{"reason": "half a pair \ud800"}, {"reason": "\x9b31m"}, {"facts": {"large": 10**30}}, {"backend": "b\u202e"}]
)
def test_json_is_ascii_whatever_a_record_says(changes):
    text = json_rows.document([run(replace(full("a", 4, 128.0), **changes))])
    assert text.isascii()
    assert "\x1b" not in text
    (record,) = json.loads(text)["records"]
    assert {name: record[name] for name in changes} == changes


def test_json_has_records_in_full_and_what_follows_from_them():
    found = json.loads(json_rows.document([run(full("a", 256, 128.0), untimed("b", 1, "failed", "out of memory"))]))
    first, second = found["records"]
    assert found["runs"][0]["device"]["name"] == "NVIDIA H200"
    assert first["telemetry"]["power_w"] == TELEMETRY.power_w
    assert len(first["timing"]["samples_us"]) == 21
    derived = first["derived"]
    assert (derived["median_us"], derived["roof_share"], derived["contract_id"]) == (128.0, 0.5, CONTRACT.id)
    assert derived["interval_us"][0] < 128.0 < derived["interval_us"][1]
    assert second["derived"]["median_us"] is None
    assert second["derived"]["command"] == "moebench sweep --model gpt-oss-20b --tokens 1 --backend b"
