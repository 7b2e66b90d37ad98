"""Records, backends and plans as a person at a terminal wants to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.record import Record
from moebench.reports.grid import DAGGER, FASTEST, FLAGGED, TIE, Family, Grid, Point, by_reason, families, flagged, not_ok, skipped
from moebench.reports.text import clean, count, error, ratio, us
from moebench.reports.tuning import NOTABLE, setbacks

COLUMNS = 5  # backends side by side: what 80 characters hold
NAME_WIDTH = 11
STATUS_STYLES = {"ok": "green", "skipped": "dim"}  # any other is bad
MEASURING = ("time", "check", "trace")  # phases of a worker
LISTED = 20  # reasons shown; the report has all


def summary(records: Sequence[Record]) -> RenderableType:
    """The end of a sweep: times side by side, what tuning made slower, then what was skipped, then what went wrong."""
    parts: list[RenderableType] = []
    marks: set[str] = set()
    for family in families(records):
        for grid in family.grids():
            parts += _tables(family, grid)
            marks |= _marks(grid)
    parts += [_legend(marks), Text()] if marks else []
    parts += _flags(records)
    parts += _tuning(records)
    parts += _listed(Text("skipped", style="bold"), skipped(records))
    parts += [*_listed(Text("not ok", style="bold red"), not_ok(records)), _counts(records)]
    return Group(*parts)


def line(record: Record) -> Text:
    """One record on one line; its str() is plain."""
    status = (f"{record.status:<8}", STATUS_STYLES.get(record.status, "red"))
    told = f" {clean(record.backend):<22} {clean(record.case.label)}  {_outcome(record)}"
    return Text.assemble(status, (told, "dim" if record.status == "skipped" else ""))


def time_line(records: Sequence[Record], wall_s: float) -> str:
    """Where the time went: measuring, which is checking, timing and tracing, and the rest; what no worker spent is processes and files."""
    spent: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.phases_s.items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    overhead = {phase: seconds for phase, seconds in spent.items() if phase not in MEASURING}
    overhead["processes and files"] = max(wall_s - sum(spent.values()), 0.0)
    measuring = {phase: spent[phase] for phase in MEASURING if phase in spent}
    total = sum(measuring.values())
    share = f" ({total / wall_s:.0%})" if wall_s else ""
    return f"{wall_s:.0f} s: {total:.0f}{share} measuring{_spent(measuring, ' (', ')')}, {_spent(overhead) or 'no other second'}"


def _spent(seconds: Mapping[str, float], before: str = "", after: str = "") -> str:
    """The largest first; nothing of what rounds to none."""
    parts = [f"{name} {spent:.0f}" for name, spent in sorted(seconds.items(), key=lambda item: -item[1]) if spent >= 0.5]
    return f"{before}{', '.join(parts)}{after}" if parts else ""


def backends_table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Rows of name, source, act_dtype, runs_here, reason."""
    rows = list(rows)
    foreign = any(row["source"] != "moebench" for row in rows)
    table = _table("backend", "activations", "can run here", *(["from"] if foreign else []), "why not")
    for row in rows:
        able = Text(row["runs_here"], style={"yes": "green", "no": "red"}.get(row["runs_here"], "yellow"))
        origin = [Text(clean(row["source"]))] if foreign else []
        table.add_row(Text(clean(row["name"])), Text(clean(row["act_dtype"])), able, *origin, Text(clean(row["reason"])))
    return table


def plan_table(rows: Iterable[Mapping[str, str | None]]) -> Table:
    """Rows of backend, arch, label, skip (a reason, or None where the point will run)."""
    table = _table("backend", "arch", "case", "")
    for row in rows:
        todo = Text("run", style="green") if row["skip"] is None else Text(f"skip: {clean(row['skip'])}", style="dim")
        table.add_row(*(Text(clean(row[name] or "")) for name in ("backend", "arch", "label")), todo)
    return table


def _tables(family: Family, grid: Grid) -> Iterator[RenderableType]:
    """One grid, in as many tables of about equal width as it takes."""
    yield Text.assemble((clean(family.title), "bold"), f"  {clean(family.device)} ({clean(family.arch)})")
    which = f"; {family.which_rank}" if family.which_rank else ""
    yield Text(f"median us, {grid.title}{which}", style="dim")
    width = ceil(len(grid.backends) / ceil(len(grid.backends) / COLUMNS))
    for start in range(0, len(grid.backends), width):
        shown = grid.backends[start : start + width]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("tokens", justify="right", vertical="bottom")
        for name in shown:
            table.add_column(Text(_stacked(clean(name))), justify="right", no_wrap=True)
        for tokens, row in grid.rows.items():
            table.add_row(str(tokens), *(_cell(row[name]) for name in shown))
        yield table
    for backend, note in grid.notes:
        yield Text(f"{clean(backend)}: {clean(note)}", style="dim")
    yield Text()


def _cell(point: Point) -> Text:
    if point.mark == "fastest":
        return Text(f"{FASTEST} {point.text}", style="bold green")
    if point.mark == "tie":
        return Text(f"{TIE} {point.text}", style="green")
    return Text(point.text, style="default" if point.counts else "dim")


def _marks(grid: Grid) -> set[str]:
    points = [point for row in grid.rows.values() for point in row.values()]
    marks: set[str] = {point.mark for point in points if point.mark}
    marks |= {mark for mark in (DAGGER, FLAGGED) if any(mark in point.text for point in points)}
    return marks | ({"partial"} if any(point.timed and "/" in point.text for point in points) else set())


def _legend(marks: set[str]) -> Text:
    """Explains the marks that were used, no others."""
    words = {
        "fastest": Text(f"{FASTEST} fastest", style="bold green"),
        "tie": Text(f"{TIE} tie: 95 % intervals overlap", style="green"),
        DAGGER: Text(f"{DAGGER} not comparable"),
        FLAGGED: Text(f"{FLAGGED} doubtful", style="yellow"),
        "partial": Text("(n/m) ranks timed"),
    }
    return Text("   ").join(text for name, text in words.items() if name in marks)


def _flags(records: Sequence[Record]) -> Iterator[RenderableType]:
    """How many rows have which reason to doubt them, and what it says of one; nothing where no row has any."""
    found = flagged(records)
    for name, group in found.items():
        first = group[0]
        where = f"{clean(first.backend)} {clean(first.case.label)}: {clean(first.flags[name])}"
        yield Text.assemble((f"{FLAGGED} {clean(name)}", "yellow"), f" {count(len(group), 'row')}, such as {where}")
    if found:
        yield Text()


def _tuning(records: Sequence[Record]) -> Iterator[RenderableType]:
    """How often tuning did harm, and where most; nothing where it never did."""
    found = setbacks(records, most=1)
    for worst in found.shown:
        where = f"{clean(worst.backend)} {clean(worst.case.label)}, {ratio(worst.ratio)}"
        yield Text(
            f"tuned slower than untuned by more than {(NOTABLE - 1) * 100:.0f} %: {count(found.number, 'point')}, worst {where}",
            style="yellow",
        )
        yield Text()


def _listed(title: Text, records: Iterable[Record]) -> Iterator[RenderableType]:
    """Each reason once: how many records have it, from which backends, and one of them."""
    groups = by_reason(records)
    if not groups:
        return
    yield title
    table = Table.grid(padding=(0, 1))  # a hanging indent: the count, the sentence beside it
    table.add_column(justify="right", min_width=3)
    table.add_column(overflow="fold")
    for group in groups[:LISTED]:
        first = group[0]
        status = Text() if first.status == "skipped" else Text(f"{first.status}: ", style="red")
        names = ", ".join(dict.fromkeys(clean(record.backend) for record in group))
        example = f"such as {clean(first.case.label)}" if len(group) > 1 else clean(first.case.label)
        table.add_row(str(len(group)), Text.assemble(status, clean(first.reason), (f"  ({names}; {example})", "dim")))
    yield table
    if len(groups) > LISTED:
        yield Text(f"    and {count(len(groups) - LISTED, 'more reason')}; the report has them all", style="dim")
    yield Text()


def _counts(records: Sequence[Record]) -> Text:
    counts = Counter(record.status for record in records)
    parts = [Text(f"{number} {status}", style=STATUS_STYLES.get(status, "red")) for status, number in counts.most_common()]
    return Text(f"{count(len(records), 'record')}: ").append(Text(", ").join(parts)) if parts else Text("no records")


def _outcome(record: Record) -> str:
    if record.status != "ok":
        return clean(record.reason)
    if record.timing is None:
        return ""
    low, high = record.timing.interval_us
    off = f", relative L2 {error(record.error.rel_l2)}" if record.error else ""
    return f"{us(record.timing.median_us)}{'' if record.timing.comparable else DAGGER} us ({us(low)} to {us(high)}){off}"


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _stacked(name: str) -> str:
    """A backend's name broken after underscores, so that columns stay narrow."""
    lines = [""]
    for part in name.replace("_", "_\n").split("\n"):
        if lines[-1] and len(lines[-1] + part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
