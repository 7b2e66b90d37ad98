"""What figures are made of which records, what they say, and what their SVG may hold."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.markers import MarkerStyle

from moebench.reports import drawing, figures, render
from moebench.reports.canvas import drawn_on_canvas
from moebench.reports.drawing import DARK, LIGHT, MARKERS, NARROW, WIDE
from moebench.reports.svg import CORNERS
from tests.full_records import full, hostile_run, whole_run
from tests.made_runs import ERROR, timed

ROOT = Path(__file__).parents[1]
WHOLE = figures.album(whole_run())


def named(album):
    return [figure.name for figure in album.figures]


@cache
def markup(figure, width):
    return render.svg(figure, width).markup


def svg(figure, width=WIDE):
    return ElementTree.fromstring(markup(figure, width))


def texts(figure, width=WIDE):
    return ["".join(node.itertext()) for node in svg(figure, width).iter("text")]


def figure_of(album, name):
    (found,) = [figure for figure in album.figures if figure.name == name]
    return found


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_gpu_run_has_every_figure():
    assert named(WHOLE) == [
        *(f"{kind}-gpt-oss-20b" for kind in ("latency", "speed-up", "roof-share", "roofline")),
        *(f"{kind}-gpt-oss-20b-ep-{size}" for size in (2, 4) for kind in ("latency", "roof-share", "roofline")),
        "ep-gpt-oss-20b-1",
        "winners-1",
        "numerics",
    ]


def test_a_single_token_count_is_a_table_and_no_line():
    assert named(figures.album([timed("a", 4, 10.0), timed("b", 4, 20.0)])) == ["numerics"]


def test_no_records_make_no_figures():
    assert named(figures.album([])) == []


def test_without_roofs_there_is_no_figure_of_them():
    records = [timed(name, m, us * m) for name, us in (("a", 10.0), ("b", 20.0)) for m in (1, 2)]
    assert named(figures.album(records)) == ["latency-gpt-oss-20b", "speed-up-gpt-oss-20b", "numerics"]


def test_zero_tokens_have_no_place_on_a_logarithmic_axis():
    records = [full(name, m, us + m) for name, us in (("a", 10.0), ("b", 20.0)) for m in (0, 1, 2)]
    assert texts(figures.album(records).figures[0])[:2] == ["1", "2"]


def test_the_token_axis_shows_powers_of_two_as_plain_numbers():
    shown = texts(figure_of(WHOLE, "latency-gpt-oss-20b"))
    assert shown[:6] == ["1", "4", "16", "64", "256", "1024"]
    assert "tokens" in shown


def test_every_line_is_named_in_both_widths():
    names = {"triton_mxfp4_bf16", "openai_triton_kernels", "cutlass_mxfp4_bf16", "cutlass_mxfp4_bf16@untuned", "floor"}
    for width in (WIDE, NARROW):
        assert names <= set(texts(figure_of(WHOLE, "latency-gpt-oss-20b"), width))


def test_findings_say_what_is_seen():
    assert figure_of(WHOLE, "latency-gpt-oss-20b").finding == (
        "At 1 to 16 tokens triton_mxfp4_bf16 is fastest (1.19x to 1.47x as fast as the next); "
        "at 64 to 1024 tokens openai_triton_kernels is fastest (1.14x to 1.71x as fast as the next). "
        "The dashed floor is the least time the roofs allow (memory at 1, compute at 1024 tokens)."
    )
    assert figure_of(WHOLE, "roof-share-gpt-oss-20b").finding == (
        "Nearest to the roof: openai_triton_kernels with 46 % at 1024 tokens. Memory limits up to 64 tokens and compute from 256 tokens on."
    )
    assert "EP 4 at 1 token, where the mean of the ranks is 0.85 of the slowest" in figure_of(WHOLE, "ep-gpt-oss-20b-1").finding


def test_a_map_of_winners_counts_where_somebody_was_beaten():
    assert figure_of(WHOLE, "winners-1").finding == (
        "triton_mxfp4_bf16 has the lowest median in 3 of the 6 cells in which backends were compared; 0 are ties (~), "
        "and in 12 one backend is alone."
    )
    assert texts(figure_of(WHOLE, "winners-1")).count("alone") == 12


def test_a_map_of_one_backend_shows_its_times():
    (figure,) = figures.album([timed("a", m, 10.0 * m, ep_size=size) for size in (1, 2) for m in (1, 2)]).maps
    assert figure.finding == "From 10.0 to 20.0 us, the longest for EP 1 at 2 tokens."
    assert {"10.0", "20.0", "EP 1", "EP 2"} <= set(texts(figure))


def test_axes_other_than_tokens_make_a_map_too():
    routings = ("uniform", "zipf:1.2")
    records = [timed("a", 4, 10.0 + size, routing=routing, ep_size=size) for size in (1, 2, 4) for routing in routings]
    (figure,) = figures.album(records).maps
    assert {"1", "2", "4", *routings} <= set(texts(figure))


def test_speed_ups_are_over_the_baseline_that_is_asked_for():
    found = figures.album(whole_run(), "openai_triton_kernels")
    assert "1x is openai_triton_kernels" in texts(figure_of(found, "speed-up-gpt-oss-20b"))
    assert "1x is triton_mxfp4_bf16" in texts(figure_of(WHOLE, "speed-up-gpt-oss-20b"))


def test_errors_above_their_tolerance_are_counted():
    wrong = replace(timed("a", 1, 10.0), error=replace(ERROR, rel_l2=2e-2), status="wrong", timing=None)
    (figure,) = figures.album([wrong, timed("b", 1, 10.0)]).numerics
    assert figure.finding == "1 of 4 errors are above their tolerance; the largest is of a, 4.00x of it."


def test_an_error_that_is_no_number_is_above_its_tolerance():
    lost = replace(timed("a", 1, 10.0), error=replace(ERROR, rel_l2=float("nan")), status="nonfinite", timing=None)
    (figure,) = figures.album([lost]).numerics
    assert figure.finding.startswith("1 of 2 errors are above their tolerance")
    assert len(texts(figure)) > 3


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("figure", WHOLE.figures, ids=named(WHOLE))
def test_the_svg_needs_no_style_and_nothing_from_elsewhere(figure, width):
    root = svg(figure, width)
    assert not [node for node in root.iter() if node.tag in ("style", "script", "image", "foreignObject", "metadata")]
    assert not [node for node in root.iter() if {"style", "class"} & set(node.attrib) and node is not root]
    links = [node.get("href") for node in root.iter() if node.get("href")]
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert len(set(ids)) == len(ids)
    assert all(name.startswith(f"{figure.name}-{width}-") for name in ids)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("figure", WHOLE.figures, ids=named(WHOLE))
def test_every_colour_is_one_that_the_page_defines(figure, width):
    drawn = markup(figure, width)
    assert not re.search(r'="#[0-9a-f]{3,6}"', drawn)
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert used <= set(re.findall(r"--(\w+):", drawing.palettes()))
    assert {"muted"} <= used


@pytest.mark.parametrize("figure", WHOLE.figures, ids=named(WHOLE))
def test_the_svg_tells_its_finding_to_who_cannot_see_it(figure):
    root = svg(figure)
    found = {node.get("id"): node.text for node in root if node.tag in ("title", "desc")}
    assert root.get("role") == "img"
    assert found[root.get("aria-labelledby")] == figure.title
    assert found[root.get("aria-describedby")] == figure.finding


def test_hostile_names_are_text_in_a_figure():
    for figure in figures.album(hostile_run()).figures:
        drawn = markup(figure, WIDE)
        assert "<script" not in drawn
        assert "<img" not in drawn
        assert "\u2028" not in drawn
        assert re.fullmatch(r"[a-z0-9-]+", figure.name)
    latency = figures.album(hostile_run()).figures[0]
    assert any("$x$" in text for text in texts(latency)), "a dollar is a dollar, not mathematics"
    assert "bad</script><scri…m$x$&amp;{{7*7}}" in texts(latency), "as text, its middle left out"


def drawn_by_matplotlib(figure):
    """Its own SVG of the figure, which is drawn for a picture file otherwise."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), drawn_on_canvas(figure, LIGHT) as canvas:
        canvas.savefig(text, format="svg", transparent=True)
    return ElementTree.fromstring(re.sub(r' xmlns(:xlink)?="[^"]*"|(?<= )xlink:', "", text.getvalue()))


def places(root, of):
    """Where lines and areas go, a number a coordinate, and where markers are; each list in its order of drawing."""
    shapes = {id(node) for defs in root.iter("defs") for node in defs}
    paths = [node.get("d") for node in root.iter("path") if id(node) not in shapes]
    found = [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in paths]
    return found[1:] if of == "matplotlib" else found, [(float(node.get("x")), float(node.get("y"))) for node in root.iter("use")]


@pytest.mark.parametrize("figure", WHOLE.figures, ids=named(WHOLE))
def test_the_page_has_the_figure_that_matplotlib_draws(figure):
    """Its first path is the ground, which the page has already; it writes the closing point of an area, and we a z."""
    ours, our_marks = places(svg(figure), of="us")
    theirs, their_marks = places(drawn_by_matplotlib(figure), of="matplotlib")
    assert len(ours) == len(theirs) > 1
    for our_path, their_path in zip(ours, theirs, strict=True):
        corners = their_path if len(their_path) == len(our_path) else without_closing_points(their_path)
        assert our_path == pytest.approx(corners, abs=0.06)
    assert our_marks == [pytest.approx(mark, abs=0.06) for mark in their_marks]


def without_closing_points(path):
    """Of areas one after the other: each ends where it starts."""
    points, kept = list(zip(path[::2], path[1::2], strict=True)), []
    while points:
        end = points.index(points[0], 1)
        kept += points[:end]
        points = points[end + 1 :]
    return [number for point in kept for number in point]


@pytest.mark.parametrize("marker", MARKERS.replace("o", ""))
def test_a_marker_has_the_corners_that_matplotlib_gives_it(marker):
    style = MarkerStyle(marker)
    theirs = style.get_path().transformed(style.get_transform()).vertices[: len(CORNERS[marker])]
    assert rounded(CORNERS[marker]) == rounded((x, -y) for x, y in theirs)


def rounded(points):
    return {(round(x, 6) + 0.0, round(y, 6) + 0.0) for x, y in points}


def test_every_marker_has_a_shape():
    assert set(CORNERS) | {"o"} == set(MARKERS)


def test_the_texts_of_a_map_lie_on_its_cells():
    order = [node.tag for node in svg(figure_of(WHOLE, "winners-1"))]
    assert order.index("text") > max(at for at, name in enumerate(order) if name == "path")


def test_a_page_and_its_figures_do_without_matplotlib():
    code = (
        "import sys, moebench.cli, moebench.commands.report\n"
        "from moebench.reports import figures, render\n"
        "from tests.full_records import whole_run\n"
        "drawn = [render.inline(figure) for figure in figures.album(whole_run()).figures]\n"
        "print(len(drawn), sorted({'matplotlib', 'numpy', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("13 []", "")


def test_png_files_are_light_and_dark(tmp_path):
    light, dark = render.png(figure_of(WHOLE, "latency-gpt-oss-20b"), tmp_path)
    assert (light.name, dark.name) == ("latency-gpt-oss-20b.png", "latency-gpt-oss-20b-dark.png")
    assert light.read_bytes().startswith(b"\x89PNG")
    assert light.read_bytes() != dark.read_bytes()


def test_the_same_records_make_the_same_svg():
    figure = figure_of(WHOLE, "latency-gpt-oss-20b")
    assert render.svg(figure, WIDE) == render.svg(figure, WIDE)


@pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(look):
    assert min(contrast(colour, look.surface) for colour in (look.ink, look.muted, *look.series)) >= 4.5
    assert min(contrast(ink, heat) for ink, heat in zip(look.heat_ink, look.heat, strict=True)) >= 4.5


def test_labels_that_would_touch_are_pushed_apart_in_order():
    assert drawing.spread([100.0, 101.0, 200.0], 16, 0) == [92.5, 108.5, 200.0]
    assert drawing.spread([1.0, 2.0], 16, 0) == [0, 16]
    assert drawing.spread([10.0, 20.0, 30.0], 16, 0) == [4.0, 20.0, 36.0]
    assert drawing.spread([80.0, 99.0, 100.0], 16, 0, 100) == [68.0, 84.0, 100.0]


def test_ticks_that_would_touch_are_left_out_and_the_last_one_stays():
    crowded = [full(name, m, us + m) for name, us in (("a", 10.0), ("b", 20.0)) for m in range(1, 41)]
    shown = [text for text in texts(figures.album(crowded).figures[0], NARROW) if text.isdigit()]
    assert shown[shown.index("40") - 1] == "30"
    assert "39" not in shown


def test_a_baseline_that_nobody_was_timed_beside_has_no_speed_ups():
    records = [timed("a", m, 10.0) for m in (1, 2, 4)] + [timed(name, m, us) for m in (8, 16) for name, us in (("b", 10.0), ("c", 20.0))]
    assert named(figures.album(records)) == ["latency-gpt-oss-20b", "numerics"]
