"""The HTML page, read as a parser reads it: its order, its policy, its tables, and what foreign text can do to it."""

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import click
import pytest
from click.testing import CliRunner

from moebench.cli import main
from moebench.flags import FLAGS
from moebench.reports import drawing
from moebench.reports.layers import MOST_LAYERS
from moebench.reports.markup import Html, breakable, escape, table, tag
from moebench.reports.page import MOST_FIGURES, MOST_LINES, page
from moebench.reports.reproduce import command
from tests.full_records import CONTRACT, HOSTILE, full, hostile_run, whole_run
from tests.made_runs import run, timed, untimed, write_run

VOID = {"br", "input", "link", "meta", "wbr"}


class Parsed(HTMLParser):
    """Elements with their attributes, the text of the page and of each section; complains where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.sections = [], [], [], {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "section":
            self.section = dict(attributes)["id"]

    def handle_endtag(self, name):
        assert self.open.pop() == name
        self.section = "" if name == "section" else self.section

    def handle_data(self, text):
        if not {"style", "script"} & set(self.open):
            self.text.append(text)
            self.sections[self.section] = self.sections.get(self.section, "") + text

    def all(self, name):
        return [attributes for element, attributes in self.elements if element == name]


def undrawn(figure):
    """Figures take seconds; test_figures draws them."""
    return Html("<svg></svg>")


def shown(*records, **more):
    return Parsed(page([run(*records)], draw=undrawn, **more))


WHOLE = shown(*whole_run(), most_figures=99)


def test_the_page_tells_its_story_in_order():
    assert [section["id"] for section in WHOLE.all("section")] == [
        *("answer", "what", "times", "ep", "maps", "numerics", "flags", "left-out", "provenance", "rows")
    ]
    linked = [a["href"] for a in WHOLE.all("a") if not a["href"].startswith("#flag-")]
    assert linked == ["#flags", *(f"#{section['id']}" for section in WHOLE.all("section"))]


def test_what_ran_is_told():
    told = WHOLE.sections["what"]
    assert all(fact in told for fact in ("NVIDIA H200", "580.159.04", "2026-11-22", "torch 2.13.0", "moebench sweep"))
    assert "gpt-oss-20b experts on NVIDIA H200" in "".join(WHOLE.text)


def test_the_answer_is_a_sentence_and_a_table():
    told = WHOLE.sections["answer"]
    assert "At 1 to 16 tokens triton_mxfp4_bf16 is fastest (1.19x to 1.47x as fast as the next)" in told
    assert "64 to 1024" in told


def test_nothing_is_loaded_and_only_hashed_text_runs():
    text = page([run(*whole_run())], draw=undrawn)
    (policy,) = [meta["content"] for meta in WHOLE.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name in ("style", "script"):
        (inner,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert f"{name}-src 'sha256-{b64encode(sha256(inner.encode()).digest()).decode()}'" in policy
    assert not [attributes for _, attributes in WHOLE.elements if any(key.startswith("on") or key == "style" for key in attributes)]
    assert not re.search(r"https?://|url\((?!#)|@import", text)


def test_tables_have_captions_and_scoped_headers():
    assert len(WHOLE.all("caption")) == len(WHOLE.all("table"))
    assert {th.get("scope") for th in WHOLE.all("th")} == {"col", "row"}


def test_every_figure_is_captioned_with_its_finding():
    assert len(WHOLE.all("figcaption")) == len(WHOLE.all("figure")) == 13
    assert "Nearest to the roof: openai_triton_kernels with 46 % at 1024 tokens." in WHOLE.sections["times"]


def test_ids_are_unique():
    ids = [attributes["id"] for _, attributes in WHOLE.elements if attributes.get("id")]
    assert len(set(ids)) == len(ids)


def test_flags_are_marked_explained_and_linked():
    assert FLAGS["throttled"].meaning in WHOLE.sections["flags"]
    assert "SM clock 1830 of 1980 MHz" in WHOLE.sections["flags"]
    assert "!" in WHOLE.sections["times"]
    assert "#flag-throttled" in [a["href"] for a in WHOLE.all("a")]


def test_a_run_without_flags_says_what_was_looked_for():
    told = shown(full("a", 1, 20.0)).sections["flags"]
    assert "None: no timed row carries a flag" in told
    assert all(name in told for name in FLAGS)
    assert "before rows were checked" in shown(timed("a", 1, 20.0)).sections["flags"]


def test_sensors_are_summed_up_by_backend():
    told = WHOLE.sections["flags"]
    assert "What the GPU's sensors said while rows were timed" in told
    assert "openai_triton_kernels61965 to 1980198042070061sw_power_cap" in told
    assert "sensors" not in shown(timed("a", 1, 20.0)).sections["flags"]


def test_stages_and_phases_say_where_time_went():
    staged = full("a", 4, 20.0, how={"stages_us": {"route": 1.5, "experts": 18.25}}, record={"phases_s": {"import": 2.0, "time": 0.5}})
    told = shown(staged, full("a", 16, 30.0, record={"phases_s": {"time": 0.25}}))
    assert "Microseconds of each stage of a calltokensbackendrouteexperts4a1.5018.2" in told.sections["times"]
    assert "Seconds that workers spent, by phasebackendimporttimea2.00.8" in told.sections["kernels"]


def test_skips_and_failures_have_their_reasons():
    told = WHOLE.sections["left-out"]
    assert "needs sm100 for MXFP8 activations, this is sm90" in told
    assert "an illegal memory access was encountered" in told
    assert told.index("cuda_error") < told.index("skipped")


def test_contracts_are_told_with_their_ids_and_meaning():
    told = WHOLE.sections["provenance"]
    assert CONTRACT.id in told
    assert CONTRACT.inside in told
    assert "measured by moebench calibrate, 2026-11-22" in told


def test_every_row_is_in_the_table_with_the_command_that_does_it_again():
    rows = [tr for tr in WHOLE.all("tr") if "data-status" in tr]
    assert len(rows) == len(whole_run())
    told = WHOLE.sections["rows"]
    assert "moebench sweep --model gpt-oss-20b --tokens 1024 --ep 4 --ep-ranks 3 --backend triton_mxfp4_bf16" in told


def test_columns_that_would_be_empty_are_left_out():
    heads = shown(timed("a", 1, 10.0)).sections["rows"]
    assert "of the roof" not in heads
    assert "doubts" not in heads
    assert "of the roof" in WHOLE.sections["rows"]


def test_speed_ups_are_over_the_wanted_baseline_where_it_counts():
    assert "Times as fast as openai_triton_kernels" in shown(*whole_run(), baseline="openai_triton_kernels").sections["times"]
    assert "Times as fast as triton_mxfp4_bf16" in WHOLE.sections["times"]


def test_two_contracts_are_told_apart_and_never_in_one_table():
    other = replace(CONTRACT, warmup="none at all")
    told = shown(full("a", 1, 20.0), full("b", 1, 30.0, record={"contract": other}))
    assert "warmup: none at all" in told.sections["times"]
    assert "In no layer were two backends timed under one contract" in told.sections["answer"]


def test_a_run_on_a_cpu_is_worth_reading():
    slow = {"clock": "wall", "l2": None}
    rows = [
        timed(name, m, us * m, how=slow, record={"arch": "cpu", "device": "a laptop"})
        for name, us in (("torch", 9e2), ("numpy", 4e3))
        for m in (1, 4)
    ]
    rows.append(
        timed(
            "triton_mxfp4_bf16",
            1,
            1e6,
            how=slow | {"comparable": False, "note": "ran in Triton's interpreter"},
            record={"arch": "cpu", "device": "a laptop"},
        )
    )
    told = shown(*rows)
    assert "At 1 to 4 tokens torch is fastest (4.44x as fast as the next)." in told.sections["answer"]
    assert "1000000†" in told.sections["times"]
    assert "triton_mxfp4_bf16: ran in Triton's interpreter" in told.sections["times"]
    assert [section["id"] for section in told.all("section")] == ["answer", "what", "times", "numerics", "flags", "provenance", "rows"]


def test_many_layers_show_their_first_figure_and_fold_the_others():
    few, many = (
        [full(name, m, us + m, seed=s) for s in range(n) for name, us in (("a", 20.0), ("b", 30.0)) for m in (1, 4)] for n in (4, 5)
    )
    assert "More figures" not in shown(*few).sections["times"]
    assert shown(*many).sections["times"].count("More figures") == 5


def test_a_page_has_so_many_figures_and_says_so_of_the_others():
    told = shown(*(full(name, m, us + m, seed=s) for s in range(12) for name, us in (("a", 20.0), ("b", 30.0)) for m in (1, 4)))
    assert len(told.all("figure")) == MOST_FIGURES
    names = [figure["id"] for figure in told.all("figure")]
    assert [sum(name.startswith(f"figure-{kind}-") for name in names) for kind in ("latency", "winners")] == [10, 1]
    missing = 12 * 4 + 2 - MOST_FIGURES
    said = [int(number) for number in re.findall(r"(\d+) figures? of this ha(?:s|ve) no place on a page", told.sections["times"])]
    assert sum(said) == missing


def test_a_page_has_as_many_figures_as_are_asked_for(tmp_path):
    directory = write_run(tmp_path / "r", *(full(name, m, us + m) for name, us in (("a", 20.0), ("b", 30.0)) for m in (1, 4)))
    for most in (0, 2, 99):
        assert report(directory, "--out", tmp_path / f"{most}.html", "--figures", most).exit_code == 0
    assert [(tmp_path / f"{most}.html").read_text().count("<figure") for most in (0, 2, 99)] == [0, 2, 5]


def test_the_command_and_the_page_have_one_default():
    (option,) = [option for option in main.get_command(click.Context(main), "report").params if option.name == "figures"]
    assert option.default == MOST_FIGURES


def test_a_page_of_many_layers_shows_some_and_says_what_all_of_them_say():
    layers = MOST_LAYERS + 5
    rows = [
        full(name, m, us + m, seed=s)
        for s in range(layers)
        for name, us in (("a", 20.0), ("b", 30.0 if s < MOST_LAYERS else 10.0))
        for m in (1, 4)
    ]
    told = shown(*rows)
    assert told.sections["times"].count("The numbers") == MOST_LAYERS
    assert f"{layers} layers were timed. One by one the first {MOST_LAYERS} are shown" in told.sections["answer"]
    assert "gpt-oss-20bCUDA graph replay, cold L2, NVIDIA H200b1307.7 %" in told.sections["answer"]
    assert "All layers together" not in shown(*rows[: 4 * MOST_LAYERS]).sections["answer"]


def test_a_table_of_many_reasons_ends_with_where_the_others_are():
    told = shown(*(untimed("a", m, "failed", f"reason {m}") for m in range(MOST_LINES + 7)))
    assert f"reason {MOST_LINES - 1}" in told.sections["left-out"]
    assert f"reason {MOST_LINES}a" not in told.sections["left-out"]
    assert f"The first {MOST_LINES} of {MOST_LINES + 7}; results.csv" in told.sections["left-out"]


def test_a_page_without_records_still_says_what_ran():
    told = shown()
    assert "no records" in "".join(told.text)
    assert "NVIDIA H200" in told.sections["what"]


def test_a_page_of_failures_says_that_nothing_has_a_time():
    assert "No row has a time." in shown(untimed("a", 1, "failed", "out of memory")).sections["answer"]


def test_hostile_text_is_text():
    text = page([run(*hostile_run(), command=("moebench", HOSTILE), run_id=HOSTILE)], draw=undrawn)
    told = Parsed(text)
    assert len(told.all("script")) == 1
    assert told.all("img") == []
    assert not {"\u2028", "\x1b", "\x00"} & set(text)
    assert "alert(1)" in told.sections["rows"]
    assert HOSTILE.split("\u2028")[0] in "".join(told.text)


@pytest.mark.parametrize(
    ("told", "escaped"),
    [
        ("a & b", "a &amp; b"),
        ("</script>", "&lt;/script&gt;"),
        ("\"'", "&quot;&#39;"),
        ("a\u2028b\u2029c", "a b c"),
        ("a\x00\x1b[31m\u202eb", "a[31mb"),
        ("\ud800x", "x"),
        ("é ≥ 日本", "é ≥ 日本"),
    ],
)
def test_escaping(told, escaped):
    assert escape(told) == escaped


def test_markup_is_not_escaped_twice_and_text_is_not_trusted():
    assert tag("b", "<i>", tag("i", "&"), 3, None, ["x", tag("br")]).markup == "<b>&lt;i&gt;<i>&amp;</i>3x<br></b>"
    assert tag("input", type="search", hidden=True, value=None, data_x='"').markup == '<input type="search" hidden data-x="&quot;">'
    assert breakable("a_b").markup == "a_<wbr>b"
    inner = table(["x", "y"], [["1", "2"]], caption="c", left=[1]).markup
    assert '<th scope="row">1</th><td class="w">2</td>' in inner


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (timed("a", 4, 1.0), "moebench sweep --model gpt-oss-20b --tokens 4 --backend a"),
        (
            timed("a", 4, 1.0, how={"l2": "hot"}, record={"scope": "layer"}, model="tiny", top_k=2, tp_size=2, tp_rank=1, seed=3),
            "moebench sweep --model tiny --tokens 4 --top-k 2 --tp 2 --tp-ranks 1 --seed 3 --backend a --scope layer --l2 hot",
        ),
        (
            timed("a b;$(x)", 4, 1.0, routing="trace:a file.jsonl"),
            "moebench sweep --model gpt-oss-20b --tokens 4 --routing 'trace:a file.jsonl' --backend 'a b;$(x)'",
        ),
    ],
)
def test_the_command_of_a_row_can_be_pasted(record, told):
    assert command(record) == told


def test_the_commands_options_are_real_ones():
    written = set(re.findall(r" (--[a-z0-9-]+)", " ".join(command(record) for record in whole_run())))
    sweep = main.get_command(click.Context(main), "sweep")
    assert written == {"--model", "--tokens", "--ep", "--ep-ranks", "--backend"}
    assert written | {"--top-k", "--tp", "--tp-ranks", "--routing", "--seed", "--scope", "--l2"} <= {
        o for p in sweep.params for o in p.opts
    }


def report(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_format_follows_the_ending_of_the_file(tmp_path):
    directory = write_run(tmp_path / "r", timed("a", 1, 10.0), timed("b", 1, 20.0))
    for name, start in (
        ("x.html", "<!doctype html>"),
        ("x.csv", "run_id,"),
        ("x.json", "{"),
        ("x.md", "# moebench"),
        ("x.txt", "# moebench"),
    ):
        done = report(directory, "--out", tmp_path / name)
        assert (done.exit_code, done.output) == (0, f"{tmp_path / name}\n")
        assert (tmp_path / name).read_text().startswith(start)
    assert report(directory, "--format", "json").output.startswith("{")


def test_plots_are_files_beside_the_report(tmp_path):
    directory = write_run(tmp_path / "r", *(timed(name, m, us * m) for name, us in (("a", 10.0), ("b", 20.0)) for m in (1, 2)))
    done = report(directory, "--plots", tmp_path / "plots", "--out", tmp_path / "r.md", "--baseline", "b")
    assert done.exit_code == 0
    names = {"latency-gpt-oss-20b", "speed-up-gpt-oss-20b", "numerics"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}{ending}.png" for name in names for ending in ("", "-dark")}


def test_an_unknown_baseline_is_a_usage_error(tmp_path):
    directory = write_run(tmp_path / "r", timed("torch", 1, 10.0))
    done = report(directory, "--baseline", "torhc")
    assert done.exit_code == 2
    assert "--baseline 'torhc' is in no record; did you mean 'torch'?; these runs have torch" in done.output


def test_palettes_are_light_dark_and_light_on_paper():
    css = drawing.palettes()
    assert css.count(f"--surface:{drawing.LIGHT.surface}") == 2
    assert f"prefers-color-scheme:dark){{:root{{--ink:{drawing.DARK.ink}" in css
