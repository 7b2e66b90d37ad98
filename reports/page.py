"""Runs as one HTML page that needs nothing but itself."""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from shlex import join as shell

from moebench.flags import FLAGS
from moebench.journal import Run
from moebench.parts import RunFacts
from moebench.record import Record
from moebench.reports import answer, figures, render
from moebench.reports.all_rows import all_rows, commas, flag_links, pasteable
from moebench.reports.digest import MOST_LINES, Digest, Overview, overview_of
from moebench.reports.drawing import Figure, palettes
from moebench.reports.grid import (
    DAGGER,
    FLAGGED,
    TIE,
    Family,
    Grid,
    Point,
    rank_name,
)
from moebench.reports.layers import WHERE_ALL_ARE, Layers
from moebench.reports.markup import Child, Html, breakable, join, table, tag
from moebench.reports.ranks import Imbalance, balancedness
from moebench.reports.text import count, error, gib, listed, percent, ratio, slug, us
from moebench.reports.tuning import NOTABLE

Draw = Callable[[Figure], Html]
Show = Callable[[Figure], Html | None]  # None for a figure that is one too many

MANY = 4  # layers, beyond which each shows its first figure only until it is asked for the others
MOST_FIGURES = 12  # two layers have 10; a figure of the example is 19 KB for both widths
MOST_SENTENCES = 8  # of the answer, before the rest is folded


def page(runs: Sequence[Run], *, baseline: str | None = None, most_figures: int = MOST_FIGURES, draw: Draw = render.inline) -> str:
    """Everything the runs found, merged. The baseline is what speed-ups are over where it counts; `draw` makes a figure's SVG."""
    return page_of(overview_of(runs), baseline=baseline, most_figures=most_figures, draw=draw)


def page_of(found: Overview, *, baseline: str | None = None, most_figures: int = MOST_FIGURES, draw: Draw = render.inline) -> str:
    """The same, whoever read the runs."""
    whole, runs = found.digest, found.runs
    drawn = figures.album_of(found.layers.shown, whole.shares, baseline)
    groups = [(family, grid) for family, grid, _ in drawn.grids]
    few = {figure.name for figure in drawn.first(most_figures)}

    def show(figure: Figure) -> Html | None:
        return draw(figure) if figure.name in few else None

    sections = [
        _Section(id="answer", title="Which backend, when", body=_answer(groups, whole, found.layers)),
        _Section(id="what", title="What ran, and on what", body=[_run(run) for run in runs]),
        _Section(id="times", title="Times", body=_times(drawn.grids, baseline, show)),
        _Section(id="ep", title="Expert-parallel ranks", body=_ranks(drawn.ranks, show)),
        _Section(id="maps", title="Over two axes", body=_figures(drawn.maps, show)),
        _Section(id="numerics", title="Numerics", body=_numerics(whole, drawn.numerics, show)),
        _Section(id="flags", title="Reasons to doubt", body=[*_flags(whole), *_sensors(whole)]),
        _Section(id="left-out", title="Skipped and failed", body=_left_out(whole)),
        _Section(id="kernels", title="Kernels and tuning", body=[*_tuning(whole), *_what_ran(whole), *_phases(whole)]),
        _Section(id="provenance", title="Provenance", body=_provenance(runs, whole)),
        _Section(id="rows", title="All rows", body=all_rows(found.rows(), whole.number)),
    ]
    shown = [section for section in sections if section.body]
    title = _title(whole)
    header = tag("header", tag("h1", title), _summary(runs, whole), _contents(shown))
    body = [tag("section", tag("h2", section.title), section.body, id=section.id) for section in shown]
    return _document(f"moebench: {title}", tag("main", header, body))


@dataclass(frozen=True, kw_only=True)
class _Section:
    id: str
    title: str
    body: Sequence[Html]


def _document(title: str, body: Html) -> str:
    """Nothing is loaded, and nothing runs or styles the page but the two texts whose hashes the policy names."""
    here = files("moebench.reports")
    css = palettes() + here.joinpath("page.css").read_text("utf-8")
    js = here.joinpath("page.js").read_text("utf-8")
    policy = f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(js)}; img-src data:; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        Html(f"<style>{css}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body, Html(f'<script>{js}</script>')), lang='en').markup}\n"


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _title(found: Digest) -> str:
    if not found.number:
        return "no records"
    models, devices = ([name for name, _ in names.in_order()] for names in (found.models, found.devices))
    return f"{listed(models)} experts on {listed(devices)}"


def _summary(runs: Sequence[RunFacts], found: Digest) -> Html:
    days = sorted({run.manifest.started[:10] for run in runs})
    drivers = list(dict.fromkeys(run.manifest.device.driver for run in runs if run.manifest.device.driver))
    torches = list(dict.fromkeys(torch for run in runs if (torch := run.manifest.device.versions.get("torch"))))
    facts = [listed(days), *([f"driver {listed(drivers)}"] if drivers else []), *([f"torch {listed(torches)}"] if torches else [])]
    statuses = ", ".join(f"{group.number} {status}" for status, group in found.statuses.largest_first())
    doubted = found.doubted
    flags: Child = ["; ", tag("a", f"{count(doubted, 'row')} with a reason to doubt", href="#flags")] if doubted else None
    told = f"{', '.join(facts)}. {count(found.number, 'row')}{': ' if found.number else ''}{statuses}"
    return tag("p", told, flags, ".", class_="lead")


def _contents(shown: Iterable[_Section]) -> Html:
    links = [tag("li", tag("a", section.title, href=f"#{section.id}")) for section in shown]
    return tag("nav", tag("ul", links), aria_label="Contents")


def _run(run: RunFacts) -> Html:
    manifest, device = run.manifest, run.manifest.device
    versions = {**device.versions, **manifest.versions}
    facts = [device.arch, gib(device.memory_bytes)] if device.memory_bytes else [device.arch]
    facts += [f"{device.num_sms} SMs"] if device.num_sms else []
    facts += [f"up to {device.clock_mhz} MHz"] if device.clock_mhz else []
    cut = "; the journal's last line was cut off and is left out" if run.torn else ""
    rows: list[tuple[str, Child]] = [
        ("device", f"{device.name} ({', '.join(facts)})"),
        ("driver", device.driver or "none"),
        ("started", f"{manifest.started.replace('T', ' ')}; {count(run.number, 'record')}{cut}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("command", pasteable(shell(manifest.command))),
    ]
    return tag("div", tag("h3", "run ", manifest.run_id), tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in rows]))


def _answer(groups: Sequence[tuple[Family, Grid]], whole: Digest, found: Layers) -> list[Html]:
    """Sentences where backends were compared, then a table of every layer; before both what many layers say together."""
    if not groups:
        return [tag("p", "No row has a time.")] if whole.number else []
    told = [
        tag("p", tag("strong", f"{family.name} on {family.device}"), f" ({grid.title}): {answer.sentence(grid)}", class_="answer")
        for family, grid in groups
        if answer.contested(grid)
    ]
    if not told:
        told = [tag("p", "In no layer were two backends timed under one contract, so there is nothing to choose between.", class_="answer")]
    hows = {(grid.title, family.device) for family, grid in groups}
    compared = any(answer.contested(grid) for _, grid in groups)
    head = ["layer", *(["how, where"] if len(hows) > 1 else []), "tokens", "fastest", "us a call"]
    head += ["times as fast as the next", "next"] if compared else []
    roofs = any(point.roofline for _, grid in groups for point in grid.points)
    head += ["of the roof", "limit"] if roofs else []
    head += ["doubts"] if any(point.flags for _, grid in groups for point in grid.points) else []
    rows: list[list[Child]] = []
    for family, grid in groups:
        for stretch in answer.stretches(grid):
            times = [win.best.slowest_us for win in stretch.wins]
            row: list[Child] = [_layer(family)]
            row += [f"{grid.title}, {family.device}"] if len(hows) > 1 else []
            names = [tag("strong", name) for name in stretch.names]
            alone = not stretch.tie and not stretch.runners_up
            fastest: Child = [f"{TIE} tie: ", commas(names)] if stretch.tie else f"{stretch.names[0]} (alone)" if alone else names
            row += [stretch.tokens, fastest, _span(times, us)]
            row += [stretch.lead, listed(stretch.runners_up) if stretch.runners_up else ""] if compared else []
            row += [_span(stretch.roof_shares, percent), listed(stretch.limiters) if stretch.limiters else ""] if roofs else []
            row += [flag_links(stretch.flags)] if "doubts" in head else []
            rows.append(row)
    left = [column for column, name in enumerate(head) if name in ("layer", "how, where", "fastest", "next", "limit", "doubts")]
    note = (
        "A tie: the 95 % intervals of the medians overlap, so this run does not tell the backends apart. "
        "Neighbouring token counts with one outcome are one line; between them nothing was measured."
    )
    single = not whole.repeated
    within = " Intervals are of one process; fresh processes of the same code differ by a little more (sweep --rounds)." if single else ""
    dagger = f" Rows marked {DAGGER} below do not describe a kernel and are not compared." if _daggers(groups) else ""
    if len(told) > MOST_SENTENCES:
        more = tag("summary", f"{len(told) - MOST_SENTENCES} more sentences like these; the table has them all")
        told = [*told[:MOST_SENTENCES], tag("details", more, told[MOST_SENTENCES:])]
    return [
        *_together(found),
        *told,
        table(head, rows, caption="The fastest backend of each layer", left=left, class_="wrap"),
        tag("p", note, within, dagger, class_="note"),
    ]


def _together(found: Layers) -> list[Html]:
    """One table over all layers; nothing where each of them is shown."""
    if not found.note:
        return []
    rows: list[list[Child]] = [
        [one.layer, f"{one.how}, {one.device}", tag("strong", one.backend), str(one.compared), percent(one.share), ratio(one.mean_ratio)]
        for one in found.standings
    ]
    head = ["layers", "how, where", "backend", "points compared", "lowest median in", "time over the lowest, mean"]
    together = (
        [table(head, rows, caption="All layers together, whatever their routing and seed", left=(0, 1, 2), class_="wrap")] if rows else []
    )
    return [tag("p", found.note, class_="answer"), *together]


def _times(grids: Sequence[tuple[Family, Grid, Sequence[Figure]]], baseline: str | None, show: Show) -> list[Html]:
    blocks = [_legend()]
    for family, grid, drawn in grids:
        shown = _figures(drawn, show)
        how = "; ".join(grid.l2_methods)
        cell = f" Each cell: {family.which_rank}." if family.which_rank else ""
        subtitle = f"{family.device} ({family.arch}); {grid.title}{f' ({how})' if how else ''}.{cell}"
        blocks += [tag("h3", family.name), tag("p", subtitle, class_="how")]
        blocks += _folded(shown, fold=len(grids) > MANY)
        notes = [tag("li", f"{backend}: {note}") for backend, note in grid.notes]
        blocks += [tag("ul", notes, class_="note")] if notes else []
        tables = [_time_table(grid), *_speed_ups(grid, baseline), *_roof_shares(grid), *_stages(grid), *_routing(family)]
        blocks.append(tag("details", tag("summary", "The numbers"), tables, open=not drawn))
    return blocks if grids else []


def _folded(shown: Sequence[Html], *, fold: bool) -> list[Html]:
    """All of them, or the first and the others behind a word."""
    if not fold or len(shown) < 2:
        return list(shown)
    return [shown[0], tag("details", tag("summary", "More figures"), shown[1:])]


def _legend() -> Html:
    return tag(
        "p",
        "Microseconds, median of all samples. ",
        tag("strong", "Bold", class_="best"),
        f" is fastest; {TIE} ties with it, their 95 % intervals overlap; {DAGGER} does not describe the kernel, so it is never called "
        f"fastest; {FLAGGED} has a reason to doubt it, below.",
        class_="note",
    )


def _figures(drawn: Sequence[Figure], show: Show) -> list[Html]:
    """Those that are among the first of the page, and a sentence that says how many are not."""
    made = [(figure, svg) for figure in drawn if (svg := show(figure)) is not None]
    blocks = [_figure(figure, svg) for figure, svg in made]
    if missing := len(drawn) - len(made):
        words = "has" if missing == 1 else "have"
        told = f"{count(missing, 'figure')} of this {words} no place on a page of so many layers: "
        ways = tag("code", "moebench report RUN --out page.html --figures 99"), " draws more, ", tag("code", "--plots DIR"), " all of them"
        blocks.append(tag("p", told, *ways, " as files. The tables are complete.", class_="note"))
    return blocks


def _figure(figure: Figure, svg: Html) -> Html:
    notes = [tag("span", note, class_="note") for note in figure.notes]
    caption = tag("figcaption", tag("strong", figure.title), tag("span", figure.finding), notes)
    return tag("figure", caption, svg, id=f"figure-{figure.name}")


def _time_table(grid: Grid) -> Html:
    floors = any(point.roofline for point in grid.points)
    head: list[Child] = ["tokens", *map(breakable, grid.backends), *(["floor"] if floors else [])]
    rows: list[list[Child]] = []
    for tokens, row in grid.rows.items():
        least = [point.roofline.floor_us for point in row.values() if point.roofline]
        rows.append([str(tokens), *(_cell(row[name]) for name in grid.backends), *([us(min(least)) if least else ""] if floors else [])])
    return table(head, rows, caption=f"Microseconds a call, {grid.title}")


def _cell(point: Point) -> Html | str:
    if point.mark == "fastest":
        return tag("strong", point.text, class_="best")
    return tag("span", f"{TIE} {point.text}", class_="tie") if point.mark == "tie" else point.text


def _speed_ups(grid: Grid, baseline: str | None) -> list[Html]:
    base = grid.base(baseline)
    names = [name for name in grid.backends if name != base]
    rows = [[str(tokens), *(grid.speed_up(tokens, name, base) for name in names)] for tokens in grid.rows]
    kept = [row for row in rows if any(row[1:])]
    return [table(["tokens", *map(breakable, names)], kept, caption=f"Times as fast as {base}")] if kept else []


def _roof_shares(grid: Grid) -> list[Html]:
    """Share of the roof by backend, and which roof it is."""
    rows = []
    for tokens, row in grid.rows.items():
        limits = dict.fromkeys(str(point.roofline.limiter) for point in row.values() if point.roofline)
        shares = [percent(share) if (share := row[name].roof_share) is not None else "" for name in grid.backends]
        if any(shares):
            rows.append([str(tokens), *shares, listed(list(limits))])
    head: list[Child] = ["tokens", *map(breakable, grid.backends), "limit"]
    return [table(head, rows, caption="Share of the roof: least time over measured time", left=[len(head) - 1])] if rows else []


def _stages(grid: Grid) -> list[Html]:
    """Where a call's time goes, for those whose stages were timed one by one: the slowest rank of each point."""
    timed = [(tokens, point.backend, stages) for tokens, row in grid.rows.items() for point in row.values() if (stages := point.stages_us)]
    names = list(dict.fromkeys(name for _, _, stages in timed for name in stages))
    rows = [[str(tokens), backend, *(us(stages[name]) if name in stages else "" for name in names)] for tokens, backend, stages in timed]
    return [table(["tokens", "backend", *names], rows, caption="Microseconds of each stage of a call", left=[1])] if rows else []


def _routing(family: Family) -> list[Html]:
    """What the cases really routed; the same for every backend, so it is shown once."""
    found: dict[int, dict[tuple[int, int], Record]] = defaultdict(dict)
    for record in family.records:
        if record.routing is not None:
            found[record.case.num_tokens].setdefault((record.case.tp_rank, record.case.ep_rank), record)
    rows = []
    for tokens, ranks in sorted(found.items()):
        routings = [record.routing for record in ranks.values() if record.routing]
        active, pairs = [float(r.active_experts) for r in routings], [float(r.local_pairs) for r in routings]
        rows.append([str(tokens), _span(active, _whole), _span(pairs, _whole), f"{routings[0].load_max_over_mean:.2f}"])
    caption = f"Routing over {count(family.case.num_local_experts, 'local expert')}"
    return [table(["tokens", "active experts", "token-expert pairs", "load, max / mean"], rows, caption=caption)] if rows else []


def _ranks(ranks: Sequence[tuple[Imbalance, Sequence[Figure]]], show: Show) -> list[Html]:
    blocks: list[Html] = []
    for found, drawn in ranks:
        blocks += [tag("h3", f"{found.title}, {found.backend}"), tag("p", f"{found.family.device}; {found.grid.title}.", class_="how")]
        blocks += _figures(drawn, show)
        rows: list[list[Child]] = []
        for size, points in found.sizes.items():
            for tokens, point in points.items():
                slowest = point.timed[0].case
                routing = point.timed[0].rounds[0].routing
                work: Sequence[int] = routing.pairs_per_rank if routing else ()
                rows.append(
                    [
                        f"EP {size}",
                        str(tokens),
                        us(point.slowest_us),
                        rank_name(slowest, slowest.tp_rank, slowest.ep_rank),
                        us(point.mean_us),
                        f"{balancedness(point):.2f}",
                        f"{sum(work) / len(work) / max(work):.2f}" if work and max(work) else "",
                        str(sum(not pairs for pairs in work)) if work else "",
                    ]
                )
        head = [
            "EP size",
            "tokens",
            "slowest us",
            "which",
            "mean us",
            "balancedness of time",
            "of token-expert pairs",
            "ranks without work",
        ]
        tables = table(head, rows, caption="Ranks: the layer waits for the slowest", left=(0, 3))
        blocks.append(tag("details", tag("summary", "The numbers"), tables, open=not drawn))
    note = (
        "Balancedness is the mean of the ranks over the slowest: 1 where all take equally long. Each rank's slice was computed with the "
        "tokens it really gets; communication between ranks is not in these times."
    )
    return [*blocks, tag("p", note, class_="note")] if blocks else []


def _numerics(found: Digest, drawn: Sequence[Figure], show: Show) -> list[Html]:
    """Worst error of each backend over all its cases, and where it was."""
    rows = []
    for (backend, act_dtype, arch), errors in found.errors.in_order():
        (_, _, rel, rel_at), (_, _, worst, worst_at) = errors.rel_l2, errors.worst
        where = f"{worst_at.label}, token {worst.worst_token}, column {worst.worst_column}"
        shares = f"{error(rel.rel_l2)} / {error(rel.rel_l2_tolerance)}", f"{error(worst.worst)} / {error(worst.worst_tolerance)}"
        rows.append([backend, act_dtype, arch, str(errors.number), shares[0], rel_at.label, shares[1], where])
    if not rows:
        return []
    note = (
        "Distance of each output from the reference of the same activation format. An element's error is relative to its own size, "
        "the rms of its token or the rms of its column, whichever is largest. A row above a tolerance is wrong and has no time."
    )
    head = ["backend", "activations", "arch", "cases", "relative L2 / tolerance", "at", "worst element / tolerance", "at"]
    return [
        *_figures(drawn, show),
        table(head, rows, caption="Largest errors of each backend", left=(0, 1, 2, 5, 7)),
        tag("p", note, class_="note"),
    ]


def _flags(found: Digest) -> list[Html]:
    """Each flag once with its meaning, then what it says of each row."""
    blocks = []
    for name, group in found.flags.largest_first():
        known = FLAGS.get(name)
        told = [tag("p", known.meaning, " ", tag("em", known.remedy))] if known else []
        rows = [[row.backend, row.case.label, us(row.median_us) if row.median_us else "", row.sentence] for row in found.doubts[name].shown]
        inner = _capped(group.number, ["backend", "case", "us a call", "why"], rows, caption=f"Rows with the flag {name}", left=(0, 1, 3))
        shown = tag("details", tag("summary", count(group.number, "row")), inner, open=group.number <= 5)
        blocks.append(tag("div", tag("h3", name, " ", tag("span", FLAGGED, class_="mark")), told, shown, id=f"flag-{slug(name)}"))
    if blocks or not found.timed:
        return blocks
    if not found.checked:
        return [tag("p", "These records were written before rows were checked for reasons to doubt them.")]
    return [tag("p", f"None: no timed row carries a flag. Looked for: {', '.join(FLAGS)}.")]


def _sensors(found: Digest) -> list[Html]:
    """What the GPU's own sensors said over the rows of each backend; nothing where no row was watched."""
    rows = []
    for backend, seen in found.sensors.in_order():
        spans = [_span((one.low, one.high), _whole) for one in (seen.sm_mhz, seen.max_sm_mhz, seen.power_w)]
        limits = [_whole(seen.power_limit_w), _whole(seen.temperature_c.high)]
        rows.append([backend, str(seen.number), *spans, *limits, ", ".join(seen.names)])
    head = ["backend", "rows", "SM clock, MHz", "it may reach", "mean power, W", "limit, W", "highest, C", "clock event reasons"]
    return [table(head, rows, caption="What the GPU's sensors said while rows were timed", left=(0, 7))] if rows else []


def _phases(found: Digest) -> list[Html]:
    """Where the workers' time went, over all rows of a backend."""
    spent = [(backend, one.phases_s) for backend, one in found.spent.in_order()]
    names = list(dict.fromkeys(name for _, phases_s in spent for name in phases_s))
    rows = [[backend, *(f"{phases_s[name]:.1f}" if name in phases_s else "" for name in names)] for backend, phases_s in spent]
    inner = table(["backend", *names], rows, caption="Seconds that workers spent, by phase")
    return [tag("details", tag("summary", "Where the run's time went"), inner)] if rows else []


def _left_out(found: Digest) -> list[Html]:
    groups = [*found.without_result(skipped=False), *found.without_result(skipped=True)]
    rows = [
        [status, str(excuse.number), reason, listed(excuse.names), excuse.case.label] for (status, reason), excuse in groups[:MOST_LINES]
    ]
    head = ["status", "rows", "reason", "backends", "such as"]
    return [_capped(len(groups), head, rows, caption="Rows without a time, by reason", left=(0, 2, 3, 4))] if rows else []


def _tuning(found: Digest) -> list[Html]:
    rows = [
        [setback.backend, setback.case.label, us(setback.tuned_us), us(setback.untuned_us), ratio(setback.ratio)]
        for setback in found.setbacks.shown
    ]
    caption = f"Slower tuned than untuned by more than {(NOTABLE - 1) * 100:.0f} %"
    head = ["backend", "case", "tuned us", "untuned us", "tuned / untuned"]
    return [_capped(found.setbacks.number, head, rows, caption=caption, left=(0, 1))] if rows else []


def _what_ran(found: Digest) -> list[Html]:
    """The kernels that calls really launched, then what backends say of themselves, each once for all cases that share it."""
    blocks = []
    for what, texts in (("Kernels that one call launched", found.launched), ("What backends say of themselves", found.said)):
        groups = texts.in_order()
        rows = [
            [backend, told, str(group.number), f"{group.such_as.label} on {arch}"] for (backend, arch, told), group in groups[:MOST_LINES]
        ]
        inner = _capped(len(groups), ["backend", "", "rows", "such as"], rows, caption=what, left=(0, 1, 3), class_="words")
        blocks += [tag("details", tag("summary", f"{what} ({len(groups)})"), inner)] if rows else []
    return blocks


def _provenance(runs: Sequence[RunFacts], found: Digest) -> list[Html]:
    """Which code and plan made the numbers, and what each contract means."""
    blocks = []
    rows: list[list[Child]] = []
    for run in runs:
        manifest = run.manifest
        schemas = ", ".join(run.schemas) or manifest.schema
        rows.append([manifest.run_id, manifest.plan_hash, schemas, manifest.versions.get("moebench", ""), str(run.number)])
    head = ["run", "plan", "schema", "moebench", "records"]
    blocks.append(table(head, rows, caption="Runs", left=(0, 1, 2, 3)))
    meanings: list[list[Child]] = []
    for contract_id, group in found.contracts.in_order():
        contract, clock, l2 = group.such_as
        if contract is not None:
            told = [
                ("scope", contract.scope),
                ("inside", contract.inside),
                ("clock", contract.clock),
                ("L2", contract.l2 or "no GPU cache involved"),
            ]
            told += [
                ("L2 by", contract.l2_method),
                ("warm-up", contract.warmup),
                ("ranks", contract.rank_aggregate),
                ("right if", contract.reference),
            ]
        else:
            told = [
                ("written by schema 1.0, without a contract; clock", clock),
                ("L2", l2),
            ]
        meanings.append([tag("code", contract_id), "; ".join(f"{name}: {value}" for name, value in told), str(group.number)])
    if meanings:
        caption = "Contracts: what a time means. Times under two contracts are never compared."
        blocks.append(table(["contract", "meaning", "rows"], meanings, caption=caption, left=(0, 1), class_="words"))
    shown = [
        [device, f"{bandwidth / 1e12:.2f}", f"{flop_s / 1e12:.0f}", act_dtype, source, str(group.number)]
        for (device, bandwidth, flop_s, act_dtype, source), group in found.roofs.in_order()
    ]
    if shown:
        blocks.append(table(["device", "TB/s", "TFLOP/s", "activations", "from", "rows"], shown, caption="Roofs", left=(0, 3, 4)))
    return blocks if runs else []


def _capped(
    number: int, head: Sequence[str], rows: Sequence[Sequence[Child]], *, caption: str, left: Sequence[int], class_: str = ""
) -> Html:
    """A table of the first of so many, with a sentence where that is not all."""
    shown = table(head, rows, caption=caption, left=left, class_=class_)
    if number <= len(rows):
        return shown
    return join(shown, tag("p", f"The first {len(rows)} of {number}; {WHERE_ALL_ARE}.", class_="note"))


def _layer(family: Family) -> str:
    return f"{family.name} ({family.which_rank})" if family.which_rank else family.name


def _span(values: Sequence[float] | None, text: Callable[[float], str]) -> str:
    """`3` or `3 to 5`; empty without values."""
    if not values:
        return ""
    low, high = text(min(values)), text(max(values))
    if low.endswith(" %"):
        return low if low == high else f"{low.removesuffix(' %')} to {high}"
    return low if low == high else f"{low} to {high}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _daggers(groups: Iterable[tuple[Family, Grid]]) -> bool:
    return any(point.timed and not point.describes_kernel for _, grid in groups for point in grid.points)
