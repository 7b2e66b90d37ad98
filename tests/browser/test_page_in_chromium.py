"""The HTML report in a real browser: nothing loaded, nothing refused, nothing cut off, and the table works."""

import shutil
from dataclasses import dataclass

import pytest

from moebench.reports.page import page
from tests.full_records import HOSTILE, hostile_run, whole_run
from tests.made_runs import run, timed

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
WIDTHS = (1280, 768, 400, 320)
SCHEMES = ("light", "dark")


def cpu_run():
    rows = [
        timed(name, m, us * m, how={"clock": "wall", "l2": None, "spread": 0.3}, model=model, record={"arch": "cpu", "device": "AMD EPYC"})
        for model in ("gpt-oss-20b", "tiny")
        for name, us in (("torch", 9e2), ("numpy", 1e3))
        for m in (1, 4, 16)
    ]
    doubtful = {"clock": "wall", "l2": None, "comparable": False, "note": "ran in Triton's interpreter"}
    return [*rows, timed("triton_mxfp4_bf16", 4, 2e6, how=doubtful, model="tiny", record={"arch": "cpu", "device": "AMD EPYC"})]


RUNS = {"gpu": whole_run, "cpu": cpu_run, "hostile": hostile_run}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    for name, records in RUNS.items():
        told = HOSTILE if name == "hostile" else "moebench sweep --model gpt-oss-20b"
        made = run(*records(), command=("moebench", told), run_id=told if name == "hostile" else "r1")
        (directory / f"{name}.html").write_text(page([made]), encoding="utf-8")
    return {name: (directory / f"{name}.html").as_uri() for name in RUNS}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI is root, and opens only its own pages
        yield started
        started.close()


@dataclass
class Visit:
    page: object
    complaints: list
    requests: list


@pytest.fixture
def visit(browser, pages):
    """Opens one of the pages without a network, and keeps whatever the browser says of it."""
    contexts = []

    def open_page(name, *, width=1280, scheme="light", script=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, java_script_enabled=script, accept_downloads=False
        )
        contexts.append(context)
        seen = Visit(page=context.new_page(), complaints=[], requests=[])
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.goto(pages[name])
        return seen

    yield open_page
    for context in contexts:
        context.close()


def backends_shown(seen):
    return seen.page.locator("#all-rows tbody tr:visible th").all_text_contents()


def column(seen, number):
    return seen.page.locator(f"#all-rows tbody tr:visible td:nth-child({number})").all_text_contents()


@pytest.mark.parametrize("name", RUNS)
def test_the_page_loads_alone_and_without_complaint(visit, name):
    seen = visit(name)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    assert seen.page.title().startswith("moebench: ")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_wider_than_the_window(visit, name, scheme):
    seen = visit(name, scheme=scheme)
    for width in WIDTHS:
        seen.page.set_viewport_size({"width": width, "height": 900})
        outside = seen.page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest(".scroll");
            }).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert (width, outside) == (width, [])
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", RUNS)
def test_no_label_of_a_figure_is_cut_off_or_lies_on_another(visit, name, width):
    seen = visit(name, width=width)
    found = seen.page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            const labels = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
            const cut = labels.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1
                || b.bottom > frame.bottom + 1).map(([text]) => `cut: ${text}`);
            const meets = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
            const over = labels.flatMap(([text, a], i) => labels.slice(i + 1).filter(([, b]) => meets(a, b))
                .map(([other]) => `overlap: ${text} / ${other}`));
            return [...cut, ...over].map(told => `${svg.querySelector("title").textContent}: ${told}`);
        })"""
    )
    assert found == []


@pytest.mark.parametrize("width", [1280, 400])
def test_the_labels_of_a_figure_are_large_enough_to_read(visit, width):
    seen = visit("gpu", width=width)
    smallest = seen.page.evaluate(
        """() => Math.min(...[...document.querySelectorAll("figure svg text")].filter(t => t.getBoundingClientRect().width)
            .map(t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
                / t.ownerSVGElement.viewBox.baseVal.width))"""
    )
    assert smallest >= 8


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_has_a_text_for_who_cannot_see_it(visit, name, width):
    seen = visit(name, width=width)
    figures, images = seen.page.locator("figure"), seen.page.get_by_role("img")
    assert figures.count() == images.count() > 0
    for image in images.all():
        told = image.evaluate(
            "e => ['labelledby', 'describedby'].map(n => document.getElementById(e.getAttribute(`aria-${n}`)).textContent)"
        )
        assert min(map(len, told)) > 10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_take_the_colours_of_the_page(visit, scheme):
    seen = visit("gpu", scheme=scheme)
    text, lines, surface = seen.page.evaluate(
        """() => {
            const svg = document.querySelector("figure svg.wide");
            const strokes = [...svg.querySelectorAll("path")].map(p => getComputedStyle(p).stroke);
            const line = strokes.find(stroke => stroke.startsWith("rgb("));
            return [getComputedStyle(svg.querySelector("text")).fill, line, getComputedStyle(document.body).backgroundColor];
        }"""
    )
    assert (text, surface) == {
        "light": ("rgb(87, 96, 106)", "rgb(255, 255, 255)"),
        "dark": ("rgb(157, 167, 179)", "rgb(13, 17, 23)"),
    }[scheme]
    assert lines not in (surface, "rgb(0, 0, 0)")


def test_filters_leave_the_rows_that_fit(visit):
    from playwright.sync_api import expect

    seen = visit("gpu")
    everything = len(backends_shown(seen))
    assert everything == len(whole_run())
    seen.page.locator("select[data-column=backend]").select_option("openai_triton_kernels")
    assert backends_shown(seen) == ["openai_triton_kernels"] * 6
    assert seen.page.locator(".filters output").text_content() == f"6 of {everything} rows"
    seen.page.get_by_label("find").fill("1024 throttled")
    assert backends_shown(seen) == ["openai_triton_kernels"]
    seen.page.get_by_role("button", name="show all").click()
    # not wait_for_function: where it has to wait it evaluates text in the page, which the page's policy forbids
    expect(seen.page.locator("#all-rows tbody tr:not([hidden])")).to_have_count(everything)
    seen.page.locator("select[data-column=status]").select_option("cuda_error")
    assert backends_shown(seen) == ["marlin_mxfp4_bf16"]


def test_sorting_is_by_number_both_ways_with_the_empty_last(visit):
    seen = visit("gpu")
    button = seen.page.locator("#all-rows thead").get_by_role("button", name="us a call")
    button.click()
    header = seen.page.locator("#all-rows th[aria-sort]")
    assert (header.text_content(), header.get_attribute("aria-sort")) == ("us a call", "ascending")
    up = column(seen, 6)
    assert up[-2:] == ["", ""]
    assert [float(text) for text in up[:-2]] == sorted(float(text) for text in up[:-2])
    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    down = column(seen, 6)
    assert (down[0], down[-2:]) == (up[-3], ["", ""])


def test_sorting_works_from_the_keyboard(visit):
    seen = visit("gpu")
    seen.page.locator("#all-rows thead").get_by_role("button", name="backend").focus()
    seen.page.keyboard.press("Enter")
    assert backends_shown(seen) == sorted(backends_shown(seen))


def test_a_command_is_copied(visit):
    seen = visit("gpu")
    seen.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row = seen.page.locator("#all-rows tbody tr").first
    row.locator("summary").click()
    row.get_by_role("button", name="copy").click()
    row.get_by_text("copied").wait_for()
    assert (
        seen.page.evaluate("navigator.clipboard.readText()") == "moebench sweep --model gpt-oss-20b --tokens 1 --backend triton_mxfp4_bf16"
    )
    assert seen.complaints == []


def test_hostile_names_are_inert_and_can_be_filtered_for(visit):
    seen = visit("hostile")
    assert seen.page.locator("script").count() == 1
    assert seen.page.locator("img").count() == 0
    seen.page.locator("select[data-column=backend]").select_option(index=1)
    shown = backends_shown(seen)
    assert len(shown) == 6
    assert all(name.startswith("bad</script><script>alert(1)</script>") for name in shown)
    seen.page.locator("#all-rows thead").get_by_role("button", name="layer").click()
    assert seen.complaints == []


def test_without_scripts_everything_is_there_to_read(visit):
    seen = visit("gpu", script=False)
    assert seen.page.locator("#all-rows tbody tr").count() == len(whole_run())
    assert not seen.page.locator(".filters").is_visible()
    assert seen.page.get_by_role("img").count() == seen.page.locator("figure").count()


def test_on_paper_the_page_is_light_and_has_no_controls(visit):
    seen = visit("gpu", scheme="dark")
    seen.page.emulate_media(media="print", color_scheme="dark")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert seen.page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert not seen.page.locator(".filters").is_visible()
    assert not seen.page.locator("nav").is_visible()
