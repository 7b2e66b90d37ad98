"""Runs as one Markdown page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict
from shlex import join

from moebench.flags import FLAGS
from moebench.journal import Run, merge
from moebench.record import Record
from moebench.reports.answer import contested, sentence
from moebench.reports.grid import (
    DAGGER,
    FLAGGED,
    TIE,
    Family,
    Grid,
    Point,
    by_reason,
    contracts,
    flagged,
    median_us,
    method_name,
    not_ok,
    rank_name,
    skipped,
)
from moebench.reports.layers import WHERE_ALL_ARE, Layers, layers, standings
from moebench.reports.ran import launched, said
from moebench.reports.text import count, error, escape, gib, listed, percent, ratio, us
from moebench.reports.tuning import NOTABLE, setbacks

LEGEND = (
    f"Microseconds, median of all samples. **Bold** is fastest; `{TIE}` ties with it, their 95 % intervals overlap; "
    f"{DAGGER} does not describe the kernel, so it is never called fastest."
)
DOUBTED = f" {FLAGGED} has a reason to doubt it, see below."
MOST_LINES = 200  # of a table that lists rows or reasons one by one


def report(runs: Sequence[Run], baseline: str | None = None) -> str:
    """Everything the runs found, merged: one row per case, backend and architecture. Speed-ups are over the baseline where it counts."""
    records = merge(runs)
    blocks = ["# moebench report", _counts(records), "## Runs", *(_environment(run) for run in runs)]
    found = layers(records)
    sections = [(family, family.grids()) for family in found.shown]
    answers = _answers(sections)
    blocks += ["## Which backend, when", *_together(found), *answers] if answers else []
    doubted = flagged(records)
    blocks += ["## Times", LEGEND + (DOUBTED if doubted else "")] if sections else []
    for family, grids in sections:
        blocks += _family(family, grids, baseline)
    for title, lines in (
        ("Tuning", _tuning(records)),
        ("Reasons to doubt", _flags(doubted)),
        ("Numerics", _numerics(records)),
        ("What ran", _what_ran(records)),
        ("Skipped", _skips(records)),
        ("Not ok", _not_ok(records)),
        ("Contracts", _contracts(records)),
    ):
        blocks += [f"## {title}", *lines] if lines else []
    return "\n\n".join(blocks) + "\n"


def _counts(records: Sequence[Record]) -> str:
    if not records:
        return "No records."
    counts = Counter(record.status for record in records)
    return f"{count(len(records), 'record')}: " + ", ".join(f"{number} {status}" for status, number in counts.most_common()) + "."


def _environment(run: Run) -> str:
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
        f"- started: {escape(manifest.started)}; {count(len(run.records), 'record')}"
        + (", and a last line that was cut off and is left out" if run.torn else ""),
    ]
    return "\n".join(lines)


def _together(found: Layers) -> list[str]:
    """What all layers say together; nothing where each of them is shown."""
    if not found.left_out:
        return []
    rows = [
        [
            *(escape(text) for text in (one.layer, f"{one.how}, {one.device}", one.backend)),
            str(one.compared),
            percent(one.share),
            ratio(one.mean_ratio),
        ]
        for one in standings([*found.shown, *found.left_out])
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


def _tuning(records: Iterable[Record]) -> list[str]:
    """Nothing where tuning did no harm."""
    rows = []
    found = setbacks(records)
    for setback in found[:MOST_LINES]:
        tuned, timing = setback.tuned, setback.tuned.timing
        assert timing is not None  # a setback is of two times
        rows.append(
            [
                escape(tuned.backend),
                escape(tuned.case.label),
                escape(tuned.arch),
                escape(method_name((timing.clock, timing.l2))),
                us(median_us(tuned)),
                us(median_us(setback.untuned)),
                ratio(setback.ratio),
            ]
        )
    note = f"Slower tuned than untuned, by more than {(NOTABLE - 1) * 100:.0f} %: here the tactics that tuning chose are not the best ones."
    head = ["backend", "case", "arch", "timing", "tuned us", "untuned us", "tuned / untuned"]
    return [note, _table(head, rows, left=range(4)), *_cut(rows, found)] if rows else []


def _flags(doubted: Mapping[str, Sequence[Record]]) -> list[str]:
    """Each flag once: what it means, how many rows have it, and what it says of one of them."""
    rows = []
    for name, group in doubted.items():
        meaning = FLAGS[name].meaning if name in FLAGS else ""
        example = f"{group[0].backend} {group[0].case.label}: {group[0].flags[name]}"
        rows.append([escape(name), str(len(group)), escape(meaning), escape(example)])
    return [_table(["flag", "rows", "meaning", "such as"], rows, left=(0, 2, 3))] if rows else []


def _contracts(records: Iterable[Record]) -> list[str]:
    """What each contract says; records of schema 1.0 have none."""
    rows = []
    for contract_id, group in contracts(records).items():
        contract = group[0].contract
        if contract is not None:
            told = "; ".join(f"{name}: {value}" for name, value in asdict(contract).items() if value is not None)
            rows.append([contract_id, str(len(group)), escape(told)])
    note = "What a time means. Times under two contracts are never in one table."
    return [note, _table(["contract", "rows", "meaning"], rows, left=(0, 2))] if rows else []


def _numerics(records: Iterable[Record]) -> list[str]:
    """Worst error of each backend over all its cases, and where it was."""
    found: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.error is not None:
            found[record.backend, record.act_dtype, record.arch].append(record)
    rows = []
    for (backend, act_dtype, arch), group in found.items():
        rel = max(group, key=lambda r: r.error.rel_l2 if r.error else 0.0)
        worst = max(group, key=lambda r: r.error.worst if r.error else 0.0)
        assert rel.error is not None  # grouped above
        assert worst.error is not None
        rows.append(
            [
                escape(backend),
                escape(act_dtype),
                escape(arch),
                str(len(group)),
                f"{error(rel.error.rel_l2)} / {error(rel.error.rel_l2_tolerance)}",
                escape(rel.case.label),
                f"{error(worst.error.worst)} / {error(worst.error.worst_tolerance)}",
                f"{escape(worst.case.label)}, token {worst.error.worst_token}, column {worst.error.worst_column}",
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


def _what_ran(records: Sequence[Record]) -> list[str]:
    """The kernels that calls really launched, then what backends say of themselves, each once for all cases that share it."""
    blocks = []
    for what, found in (("kernels of one call", launched(records)), ("what it says of itself", said(records))):
        rows = [
            [escape(backend), escape(arch), escape(text), str(len(group)), escape(group[0].case.label)]
            for (backend, arch, text), group in list(found.items())[:MOST_LINES]
        ]
        blocks += [_table(["backend", "arch", what, "cases", "such as"], rows, left=(0, 1, 2, 4)), *_cut(rows, found)] if rows else []
    return blocks


def _skips(records: Iterable[Record]) -> list[str]:
    found = by_reason(skipped(records))
    rows = [
        [str(len(group)), escape(group[0].reason), escape(_backends(group)), escape(group[0].case.label)] for group in found[:MOST_LINES]
    ]
    return [_table(["points", "reason", "backends", "such as"], rows, left=(1, 2, 3)), *_cut(rows, found)] if rows else []


def _not_ok(records: Iterable[Record]) -> list[str]:
    found = not_ok(records)
    rows = [[r.status, escape(r.backend), escape(r.case.label), escape(r.arch), escape(r.reason)] for r in found[:MOST_LINES]]
    return [_table(["status", "backend", "case", "arch", "reason"], rows, left=range(5)), *_cut(rows, found)] if rows else []


def _cut(rows: Sequence[object], found: Sized) -> list[str]:
    """A sentence where a table does not hold all that was found."""
    return [f"The first {len(rows)} of {len(found)}; {WHERE_ALL_ARE}."] if len(rows) < len(found) else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = ()) -> str:
    """Columns are right-aligned except those in `left`."""
    ruler = [":--" if column in left else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def _backends(records: Iterable[Record]) -> str:
    return ", ".join(dict.fromkeys(record.backend for record in records))


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
