"""Runs as one Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from shlex import join

from moebench.flags import FLAGS
from moebench.journal import Run
from moebench.parts import RunFacts
from moebench.reports.answer import contested, sentence
from moebench.reports.digest import MOST_LINES, Digest, Overview, overview_of
from moebench.reports.grid import DAGGER, FLAGGED, TIE, Family, Grid, Point, method_name, rank_name
from moebench.reports.layers import WHERE_ALL_ARE, Layers
from moebench.reports.text import count, error, escape, gib, listed, percent, ratio, us
from moebench.reports.tuning import NOTABLE

LEGEND = (
    f"Microseconds, median of all samples. **Bold** is fastest; `{TIE}` ties with it, their 95 % intervals overlap; "
    f"{DAGGER} does not describe the kernel, so it is never called fastest."
)
DOUBTED = f" {FLAGGED} has a reason to doubt it, see below."


def report(runs: Sequence[Run], baseline: str | None = None) -> str:
    """Everything the runs found, merged: one row per case, backend and architecture. Speed-ups are over the baseline where it counts."""
    return report_of(overview_of(runs), baseline)


def report_of(found: Overview, baseline: str | None = None) -> str:
    """The same, whoever read the runs."""
    whole = found.digest
    blocks = ["# moebench report", _counts(whole), "## Runs", *(_environment(run) for run in found.runs)]
    sections = [(family, family.grids()) for family in found.layers.shown]
    answers = _answers(sections)
    blocks += ["## Which backend, when", *_together(found.layers), *answers] if answers else []
    blocks += ["## Times", LEGEND + (DOUBTED if whole.flags else "")] if sections else []
    for family, grids in sections:
        blocks += _family(family, grids, baseline)
    for title, lines in (
        ("Tuning", _tuning(whole)),
        ("Reasons to doubt", _flags(whole)),
        ("Numerics", _numerics(whole)),
        ("What ran", _what_ran(whole)),
        ("Skipped", _skips(whole)),
        ("Not ok", _not_ok(whole)),
        ("Contracts", _contracts(whole)),
    ):
        blocks += [f"## {title}", *lines] if lines else []
    return "\n\n".join(blocks) + "\n"


def _counts(found: Digest) -> str:
    if not found.number:
        return "No records."
    statuses = found.statuses.largest_first()
    return f"{count(found.number, 'record')}: " + ", ".join(f"{group.number} {status}" for status, group in statuses) + "."


def _environment(run: RunFacts) -> str:
    manifest, device = run.manifest, run.manifest.device
    facts = [device.arch, *([gib(device.memory_bytes)] if device.memory_bytes else [])]
    facts += [f"{device.num_sms} SMs"] if device.num_sms else []
    facts += [f"driver {device.driver}"] if device.driver else []
    versions = {**device.versions, **manifest.versions}
    lines = [
        f"### {escape(manifest.run_id)}",
        "",
        f"- device: {escape(device.name)} ({escape(', '.join(facts))})",
        f"- versions: {escape(', '.join(f'{name} {version}' for name, version in versions.items() if version))}",
        f"- command: {escape(join(manifest.command))}",
        f"- plan: {escape(manifest.plan_hash)}",
        f"- started: {escape(manifest.started)}; {count(run.number, 'record')}"
        + (", and a last line that was cut off and is left out" if run.torn else ""),
    ]
    return "\n".join(lines)


def _together(found: Layers) -> list[str]:
    """What all layers say together; nothing where each of them is shown."""
    if not found.note:
        return []
    rows = [
        [
            *(escape(text) for text in (one.layer, f"{one.how}, {one.device}", one.backend)),
            str(one.compared),
            percent(one.share),
            ratio(one.mean_ratio),
        ]
        for one in found.standings
    ]
    head = ["layers", "how, where", "backend", "points compared", "lowest median in", "time over the lowest, mean"]
    return [escape(found.note), *([_table(head, rows, left=(0, 1, 2))] if rows else [])]


def _answers(sections: Sequence[tuple[Family, Sequence[Grid]]]) -> list[str]:
    """Who is fastest where; nothing where nobody was compared."""
    told = [
        f"- {escape(family.title)} on {escape(family.device)}, {escape(grid.title)}: {escape(sentence(grid))}"
        for family, grids in sections
        for grid in grids
        if contested(grid)
    ]
    return ["\n".join(told)] if told else []


def _family(family: Family, grids: Sequence[Grid], baseline: str | None) -> list[str]:
    title = f"### {escape(family.title)} on {escape(family.device)} ({escape(family.arch)})"
    blocks = [title]
    for grid in grids:
        how = "; ".join(escape(method) for method in grid.l2_methods)
        cell = f" Each cell: {family.which_rank}." if family.which_rank else ""
        name = escape(f"{grid.title[0].upper()}{grid.title[1:]}")
        blocks += [f"**{name}**" + (f" ({how})." if how else ".") + cell, _times(grid)]
        blocks += ["\n".join(f"- {escape(backend)}: {escape(note)}" for backend, note in grid.notes)] if grid.notes else []
        if speed_ups := _speed_ups(grid, baseline):
            blocks += [f"Times as fast as {escape(str(grid.base(baseline)))}:", speed_ups]
        if shares := _roof_shares(grid):
            blocks += ["Share of the roof, the least time over the measured one:", shares]
        if len(family.ranks) > 1:
            blocks += ["Ranks: the layer waits for the slowest.", _ranks(family, grid)]
    return [*blocks, *_routing(family)]


def _times(grid: Grid) -> str:
    head = ["tokens", *(escape(name) for name in grid.backends)]
    return _table(head, [[str(tokens), *(_cell(row[name]) for name in grid.backends)] for tokens, row in grid.rows.items()])


def _cell(point: Point) -> str:
    if point.mark == "fastest":
        return f"**{point.text}**"
    return f"{TIE} {point.text}" if point.mark == "tie" else point.text


def _roof_shares(grid: Grid) -> str:
    """With what limits each row; nothing where no row has a roofline."""
    rows = []
    for tokens, row in grid.rows.items():
        shares = [percent(share) if (share := row[name].roof_share) is not None else "" for name in grid.backends]
        limits = dict.fromkeys(str(point.roofline.limiter) for point in row.values() if point.roofline)
        rows += [[str(tokens), *shares, listed(list(limits))]] if any(shares) else []
    return _table(["tokens", *(escape(name) for name in grid.backends), "limit"], rows, left=[len(grid.backends) + 1]) if rows else ""


def _speed_ups(grid: Grid, baseline: str | None) -> str:
    """Nothing where there is nothing to divide."""
    base = grid.base(baseline)
    found = {(tokens, name): grid.speed_up(tokens, name, base) for tokens in grid.rows for name in grid.backends if name != base}
    shown = [name for name in grid.backends if any(found.get((tokens, name)) for tokens in grid.rows)]
    rows = [[str(tokens), *(found[tokens, name] for name in shown)] for tokens in grid.rows]
    return _table(["tokens", *(escape(name) for name in shown)], [row for row in rows if any(row[1:])]) if shown else ""


def _ranks(family: Family, grid: Grid) -> str:
    rows = [
        [
            str(tokens),
            escape(point.backend),
            f"{len(point.timed)}/{point.num_ranks}",
            us(point.slowest_us),
            rank_name(family.case, point.slowest.case.tp_rank, point.slowest.case.ep_rank),
            us(point.mean_us),
            ratio(point.slowest_us / point.mean_us) if point.mean_us else "",
        ]
        for tokens, row in grid.rows.items()
        for point in row.values()
        if point.slowest
    ]
    return _table(["tokens", "backend", "ranks timed", "slowest us", "which", "mean us", "slowest / mean"], rows, left=(1, 4))


def _routing(family: Family) -> list[str]:
    """What the cases really routed; the same for every backend, so it is shown once."""
    found = {(r.case.num_tokens, r.case.tp_rank, r.case.ep_rank): r.routing for r in family.records if r.routing is not None}
    rows = []
    for tokens in sorted({key[0] for key in found}):
        here = [routing for key, routing in found.items() if key[0] == tokens]
        active, pairs = ([getattr(routing, name) for routing in here] for name in ("active_experts", "local_pairs"))
        rows.append([str(tokens), _span(active), _span(pairs), f"{here[0].load_max_over_mean:.2f}"])
    note = f"Routing over {count(family.case.num_local_experts, 'local expert')}:"
    return [note, _table(["tokens", "active experts", "local pairs", "load max / mean"], rows)] if rows else []


def _tuning(whole: Digest) -> list[str]:
    """Nothing where tuning did no harm."""
    found = whole.setbacks
    rows = [
        [
            escape(setback.backend),
            escape(setback.case.label),
            escape(setback.arch),
            escape(method_name(setback.method)),
            us(setback.tuned_us),
            us(setback.untuned_us),
            ratio(setback.ratio),
        ]
        for setback in found.shown
    ]
    note = f"Slower tuned than untuned, by more than {(NOTABLE - 1) * 100:.0f} %: here the tactics that tuning chose are not the best ones."
    head = ["backend", "case", "arch", "timing", "tuned us", "untuned us", "tuned / untuned"]
    return [note, _table(head, rows, left=range(4)), *_cut(rows, found.number)] if rows else []


def _flags(found: Digest) -> list[str]:
    """Each flag once: what it means, how many rows have it, and what it says of one of them."""
    rows = []
    for name, group in found.flags.largest_first():
        meaning = FLAGS[name].meaning if name in FLAGS else ""
        first = found.doubts[name].shown[0]
        example = f"{first.backend} {first.case.label}: {first.sentence}"
        rows.append([escape(name), str(group.number), escape(meaning), escape(example)])
    return [_table(["flag", "rows", "meaning", "such as"], rows, left=(0, 2, 3))] if rows else []


def _contracts(found: Digest) -> list[str]:
    """What each contract says; records of schema 1.0 have none."""
    rows = []
    for contract_id, group in found.contracts.in_order():
        contract = group.such_as.contract
        if contract is not None:
            told = "; ".join(f"{name}: {value}" for name, value in asdict(contract).items() if value is not None)
            rows.append([contract_id, str(group.number), escape(told)])
    note = "What a time means. Times under two contracts are never in one table."
    return [note, _table(["contract", "rows", "meaning"], rows, left=(0, 2))] if rows else []


def _numerics(found: Digest) -> list[str]:
    """Worst error of each backend over all its cases, and where it was."""
    rows = []
    for (backend, act_dtype, arch), errors in found.errors.in_order():
        (_, _, rel, rel_at), (_, _, worst, worst_at) = errors.rel_l2, errors.worst
        rows.append(
            [
                escape(backend),
                escape(act_dtype),
                escape(arch),
                str(errors.number),
                f"{error(rel.rel_l2)} / {error(rel.rel_l2_tolerance)}",
                escape(rel_at.label),
                f"{error(worst.worst)} / {error(worst.worst_tolerance)}",
                f"{escape(worst_at.label)}, token {worst.worst_token}, column {worst.worst_column}",
            ]
        )
    if not rows:
        return []
    head = ["backend", "activations", "arch", "cases", "relative L2 / tolerance", "at", "worst element / tolerance", "at"]
    note = (
        "Distance from the reference of the same activation format, largest over all cases. "
        "An element's error is relative to its own size, the rms of its token or the rms of its column, whichever is largest."
    )
    return [note, _table(head, rows, left=(0, 1, 2, 5, 7))]


def _what_ran(found: Digest) -> list[str]:
    """The kernels that calls really launched, then what backends say of themselves, each once for all cases that share it."""
    blocks = []
    for what, texts in (("kernels of one call", found.launched), ("what it says of itself", found.said)):
        rows = [
            [escape(backend), escape(arch), escape(text), str(group.number), escape(group.such_as.label)]
            for (backend, arch, text), group in texts.in_order()[:MOST_LINES]
        ]
        blocks += [_table(["backend", "arch", what, "cases", "such as"], rows, left=(0, 1, 2, 4)), *_cut(rows, len(texts))] if rows else []
    return blocks


def _skips(found: Digest) -> list[str]:
    skips = found.without_result(skipped=True)
    rows = [
        [str(excuse.number), escape(reason), escape(", ".join(excuse.names)), escape(excuse.case.label)]
        for (_, reason), excuse in skips[:MOST_LINES]
    ]
    return [_table(["points", "reason", "backends", "such as"], rows, left=(1, 2, 3)), *_cut(rows, len(skips))] if rows else []


def _not_ok(found: Digest) -> list[str]:
    rows = [[r.status, escape(r.backend), escape(r.case.label), escape(r.arch), escape(r.reason)] for r in found.not_ok.shown]
    head = ["status", "backend", "case", "arch", "reason"]
    return [_table(head, rows, left=range(5)), *_cut(rows, found.not_ok.number)] if rows else []


def _cut(rows: Sequence[object], number: int) -> list[str]:
    """A sentence where a table does not hold all that was found."""
    return [f"The first {len(rows)} of {number}; {WHERE_ALL_ARE}."] if len(rows) < number else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = ()) -> str:
    """Columns are right-aligned except those in `left`."""
    ruler = [":--" if column in left else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
