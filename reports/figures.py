"""Which figures records make: what each shows, and what it says in words."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moebench.record import Record
from moebench.reports.answer import contested, sentence, wins
from moebench.reports.digest import overview_of_records
from moebench.reports.drawing import (
    Axis,
    End,
    Figure,
    Look,
    Sheet,
    Value,
    areas,
    ends_of,
    legend,
    line,
    linear_axis,
    lines,
    log_axis,
    names_axis,
    panel,
    ratio_axis,
    token_axis,
    width_of,
    write,
)
from moebench.reports.grid import Family, Grid, Point
from moebench.reports.ranks import Imbalance, balancedness, imbalances
from moebench.reports.sums import Shares
from moebench.reports.text import clean, label, listed, percent, ratio, slug, us

MOST_MAP_ROWS = 12  # layers; a cell has a text, and more rows than these nobody reads


@dataclass(frozen=True, kw_only=True)
class Album:
    """Every figure of a set of records, beside what it is of."""

    grids: tuple[tuple[Family, Grid, tuple[Figure, ...]], ...]  # of the layers that are shown
    ranks: tuple[tuple[Imbalance, tuple[Figure, ...]], ...]
    maps: tuple[Figure, ...]
    numerics: tuple[Figure, ...]

    @property
    def figures(self) -> list[Figure]:
        of_grids = [figure for _, _, figures in self.grids for figure in figures]
        return [*of_grids, *(figure for _, figures in self.ranks for figure in figures), *self.maps, *self.numerics]

    def first(self, most: int) -> list[Figure]:
        """So many at most: what shows all rows together, then the first figure of each layer, the second of each, and so on."""
        of_ranks = [figure for _, figures in self.ranks for figure in figures]
        of_grids = [figures for _, _, figures in sorted(self.grids, key=lambda drawn: drawn[0].case.seed)]
        turns = [figures[turn] for turn in range(max(map(len, of_grids), default=0)) for figures in of_grids if turn < len(figures)]
        firsts = sum(bool(figures) for figures in of_grids)
        return [*self.maps, *self.numerics, *turns[:firsts], *of_ranks, *turns[firsts:]][:most]


def album(records: Sequence[Record], baseline: str | None = None) -> Album:
    """Of records that were merged."""
    found = overview_of_records(records)
    return album_of(found.layers.shown, found.digest.shares, baseline)


def album_of(shown: Sequence[Family], shares: Mapping[str, Shares], baseline: str | None = None) -> Album:
    """Nothing is drawn yet. Speed-ups are over the baseline where it counts."""
    groups = [(family, grid) for family in shown for grid in family.grids()]
    used: Counter[str] = Counter()
    grids = []
    for family, grid in groups:
        name = slug(f"{family.name}{' layer' if grid.scope == 'layer' else ''}")
        used[name] += 1
        grids.append((family, grid, tuple(of_grid(family, grid, f"{name}-{used[name]}" if used[name] > 1 else name, baseline))))
    ranks = [(found, tuple(of_imbalance(found, f"{slug(found.family.case.model)}-{n}"))) for n, found in enumerate(imbalances(groups), 1)]
    return Album(grids=tuple(grids), ranks=tuple(ranks), maps=tuple(heat_maps(groups)), numerics=tuple(numerics(shares)))


def of_grid(family: Family, grid: Grid, name: str, baseline: str | None) -> list[Figure]:
    """What one grid can show: nothing where fewer than two token counts have a time that counts."""
    if len({win.num_tokens for win in wins(grid) if win.num_tokens}) < 2:
        return []
    found = [_latency(family, grid, name)]
    base = grid.base(baseline)
    others = [name for name in grid.backends if name != base]
    if base is not None and any(tokens and grid.times_as_fast(tokens, other, base) for tokens in grid.rows for other in others):
        found.append(_speed_up(family, grid, name, base))
    if any(point.roof_share is not None and point.counts for point in grid.points):
        found.append(_roof_share(family, grid, name))
        if grid.method[1] == "cold":
            found.append(_roofline(family, grid, name))
    return found


def of_imbalance(imbalance: Imbalance, name: str) -> list[Figure]:
    """Nothing where fewer than two token counts were timed."""
    sizes = {size: {tokens: point for tokens, point in row.items() if tokens} for size, row in imbalance.sizes.items()}
    if max(len(row) for row in sizes.values()) < 2:
        return []
    labels = {size: f"EP {size}" for size in sizes}
    slowest = {labels[s]: [Value(tokens=t, y=p.slowest_us) for t, p in row.items()] for s, row in sizes.items()}
    mean = {labels[s]: [Value(tokens=t, y=p.mean_us) for t, p in row.items()] for s, row in sizes.items()}
    balance = {labels[s]: [Value(tokens=t, y=balancedness(p)) for t, p in row.items()] if s > 1 else [] for s, row in sizes.items()}

    def draw(sheet: Sheet) -> None:
        look, half = sheet.look, (sheet.width / 2 if sheet.look.wide else sheet.height / 2)
        first = (0, half - 8, 0, sheet.height) if look.wide else (0, sheet.width, half + 4, sheet.height)
        second = (half + 8, sheet.width, 0, sheet.height) if look.wide else (0, sheet.width, 0, half - 4)
        tokens = token_axis(_all_tokens(slowest))
        times = [value.y for part in (slowest, mean) for values in part.values() for value in values]
        ends = ends_of(slowest, look)
        title = "us: slowest rank (line), mean (dashed)"
        above = panel(sheet, tokens, log_axis(times), title=title, xlabel="tokens", ends=ends, names_at_ends=True, box=first)
        lines(above, mean, band=False, dashed=True)
        lines(above, slowest, band=False)
        title = "mean / slowest: 1 is balanced"
        ends = ends_of(balance, look)
        below = panel(sheet, tokens, linear_axis(1.06, 0.2), title=title, xlabel="tokens", ends=ends, names_at_ends=True, box=second)
        line(sheet, [below.at(tokens.low, 1.0), below.at(tokens.high, 1.0)], look.muted, 1, dashes=(4, 3))
        lines(below, balance, band=False)

    low, size, tokens = imbalance.worst
    where = f"EP {size} at {_tokens(tokens)}"
    finding = f"Least balanced: {where}, where the mean of the ranks is {low:.2f} of the slowest. Communication is not in it."
    return [
        Figure(
            name=f"ep-{name}",
            title=f"Expert-parallel ranks of {imbalance.title}, {imbalance.backend}, {imbalance.grid.title}",
            finding=finding,
            height=lambda look: 380 if look.wide else 560,
            draw=draw,
        )
    ]


def heat_maps(groups: Sequence[tuple[Family, Grid]]) -> list[Figure]:
    """One per device, contract and activation format in which two axes vary: who is fastest, or where one backend is alone, its time."""
    alike: dict[tuple[str, ...], list[tuple[Family, Grid]]] = defaultdict(list)
    for family, grid in groups:
        alike[family.device, family.arch, grid.scope, grid.contract_id, grid.act_dtype].append((family, grid))
    found = []
    for number, here in enumerate(alike.values(), 1):
        cells, rows, columns, across = _cells(sorted(here, key=lambda group: group[0].case.seed)[:MOST_MAP_ROWS])
        if len(rows) < 2 or len(columns) < 2:
            continue
        names = list(dict.fromkeys(name for _, grid in here for name in grid.backends))
        if any(contested(grid) for _, grid in here):
            drawn = _winner_map(here[0], names, cells, rows, columns, across, number)
        else:
            drawn = _time_map(here[0], cells, rows, columns, across, number)
        left = len(here) - MOST_MAP_ROWS
        found.append(replace(drawn, notes=(f"Only {MOST_MAP_ROWS} of {len(here)} layers, lowest seeds first.",)) if left > 0 else drawn)
    return found


def numerics(shares: Mapping[str, Shares]) -> list[Figure]:
    """Every checked row's error as a share of its tolerance."""
    if not shares:
        return []
    marks: dict[str, tuple[list[float], list[float]]] = {}
    for backend, found in sorted(shares.items()):
        rel_l2, worst = marks.setdefault(label(backend), ([], []))  # long names may look alike
        rel_l2 += sorted(found.rel_l2.values())
        worst += sorted(found.worst.values())
    drawn = [value for pair in marks.values() for part in pair for value in part]

    def draw(sheet: Sheet) -> None:
        look = sheet.look
        top = legend(sheet, [("o", look.colour(0), "relative L2"), ("D", look.colour(1), "worst element")])
        across = log_axis([min(min(drawn, default=0.1) / 1.4, 0.05), max(max(drawn, default=0.1) * 1.4, 1.5)], spare=1)
        names = names_axis([name if look.wide else "" for name in marks])
        words = "error / its tolerance; right of the line at 1 a row is wrong"
        made = panel(sheet, across, _reversed(names), title="", xlabel=words, box=(0, sheet.width, top, sheet.height))
        line(sheet, [made.at(1.0, made.y.low), made.at(1.0, made.y.high)], look.ink, 1.4)
        for row, (backend, pair) in enumerate(marks.items()):
            for offset, marker, colour, values in ((-0.14, "o", look.colour(0), pair[0]), (0.14, "D", look.colour(1), pair[1])):
                if places := [made.at(value, row + offset) for value in values]:
                    line(sheet, places, colour, 0, marker=marker, size=5.5, alpha=0.55)
            if not look.wide:
                write(sheet, (made.left, made.at(1.0, row - 0.45)[1]), backend, va="top")

    name, nearest = max(shares.items(), key=lambda item: (_nan_first(item[1].largest), item[0]))
    name = label(name)
    finding = f"The error nearest to its tolerance is of {name}: {percent(nearest.largest)} of it."
    if above := sum(found.above for found in shares.values()):
        number = sum(found.number for found in shares.values())
        finding = f"{above} of {number} errors are above their tolerance; the largest is of {name}, {ratio(nearest.largest)} of it."
    return [
        Figure(
            name="numerics",
            title="Errors as shares of their tolerances, a mark a row",
            finding=finding,
            height=lambda look: 110 + len(marks) * (34 if look.wide else 46),
            draw=draw,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    best: str
    time_us: float
    lead: float | None  # None: a tie, or nobody else
    tie: bool


def _latency(family: Family, grid: Grid, name: str) -> Figure:
    """Time against tokens."""
    series = _series(grid, lambda point: (point.slowest_us, *point.interval_us))
    floors = _floors(grid)
    left_out = [backend for backend in grid.backends if backend not in series]

    def draw(sheet: Sheet) -> None:
        look, dashed = sheet.look, [(tokens, value) for tokens, value, _ in floors] if len(floors) > 1 else []
        times = [end for values in series.values() for value in values for end in (value.y, value.low or value.y, value.high)]
        ends = ends_of(series, look)
        ends += [End(text="floor", y=dashed[-1][1], colour=look.muted, dashed=True)] if dashed else []
        up = log_axis([*times, *(value for _, value in dashed)])
        made = panel(sheet, token_axis(_all_tokens(series)), up, title="microseconds a call", xlabel="tokens", ends=ends)
        if dashed:
            line(sheet, [made.at(*place) for place in dashed], look.muted, 1.4, dashes=(4, 3))
        lines(made, series)

    drawn = sentence(grid)
    if len(floors) > 1:
        (first, _, limit), (last, _, last_limit) = floors[0], floors[-1]
        drawn += f" The dashed floor is the least time the roofs allow ({limit} at {first}, {last_limit} at {last} tokens)."
    notes = (f"Not drawn, without a time that counts: {listed([clean(n) for n in left_out])}.",) if left_out else ()
    return Figure(
        name=f"latency-{name}",
        title=f"Time of a call of {_what(family, grid)}",
        finding=drawn,
        height=lambda look: _height(look, len(series)),
        draw=draw,
        notes=notes,
    )


def _speed_up(family: Family, grid: Grid, name: str, base: str) -> Figure:
    series: dict[str, list[Value]] = {}
    for backend in grid.backends:
        values = []
        for tokens, row in grid.rows.items():
            value = grid.times_as_fast(tokens, backend, base)
            if value is not None and tokens:
                (base_low, base_high), (low, high) = row[base].interval_us, row[backend].interval_us
                values.append(Value(tokens=tokens, y=value, low=base_low / high, high=base_high / low))
        if values:
            series[backend] = values

    def draw(sheet: Sheet) -> None:
        look = sheet.look
        others = {backend: values if backend != base else [] for backend, values in series.items()}
        ends = [*ends_of(others, look), End(text=f"1x is {label(base)}", y=1.0, colour=look.muted)]
        up = ratio_axis([end for values in series.values() for value in values for end in (value.low, value.high)])
        title = f"times as fast as {label(base)}"
        made = panel(sheet, token_axis(_all_tokens(series)), up, title=title, xlabel="tokens", ends=ends)
        line(sheet, [made.at(made.x.low, 1.0), made.at(made.x.high, 1.0)], look.muted, 1)
        lines(made, others)

    others = [(value.y, backend, value.tokens) for backend, values in series.items() if backend != base for value in values]
    (low, slowest, there), (high, fastest, here) = min(others), max(others)
    finding = (
        f"Against {base}: at most {ratio(high)} ({fastest} at {_tokens(here)}), at least {ratio(low)} ({slowest} at {_tokens(there)})."
    )
    return Figure(
        name=f"speed-up-{name}",
        title=f"Speed-up over {base}, {_what(family, grid)}",
        finding=finding,
        height=lambda look: _height(look, len(series)),
        draw=draw,
    )


def _roof_share(family: Family, grid: Grid, name: str) -> Figure:
    """How near to the roof, and which roof it is."""
    series = _series(grid, lambda point: None if point.roof_share is None else _share(point))
    floors = _floors(grid)
    turn = next((tokens for tokens, _, limiter in floors if limiter == "compute"), None)
    before = [tokens for tokens, _, limiter in floors if limiter == "memory"]

    def draw(sheet: Sheet) -> None:
        look = sheet.look
        top = max(105.0, *(1.08 * value.high for values in series.values() for value in values))
        up = linear_axis(top, 20 if top < 250 else 100)
        ends = ends_of(series, look)
        made = panel(sheet, token_axis(_all_tokens(series)), up, title="% of the roof", xlabel="tokens", ends=ends)
        line(sheet, [made.at(made.x.low, 100.0), made.at(made.x.high, 100.0)], look.muted, 1, dashes=(4, 3))
        if turn and before:
            border = math.sqrt(turn * before[-1])
            line(sheet, [made.at(border, 0.0), made.at(border, top)], look.muted, 1, dashes=(1, 2))
        parts = [(before, "memory is the limit"), ([t for t, _, limiter in floors if limiter == "compute"], "compute is the limit")]
        for tokens, words in parts:
            if tokens and made.at(tokens[-1], 0.0)[0] - made.at(tokens[0], 0.0)[0] > width_of(words, look.font - 1):
                place = made.at(math.sqrt(tokens[0] * tokens[-1]), 0.02 * top)
                write(sheet, place, words, colour=look.muted, size=look.font - 1, ha="center")
        lines(made, series)

    shares = [(value.y, backend, value.tokens) for backend, values in series.items() for value in values]
    high, best, at = max(shares)
    told = [f"memory limits up to {_tokens(before[-1])}" if before else "", f"compute from {_tokens(turn)} on" if turn else ""]
    finding = f"Nearest to the roof: {best} with {high:.0f} % at {_tokens(at)}. {_sentence(listed([part for part in told if part]))}."
    return Figure(
        name=f"roof-share-{name}",
        title=f"Share of the roof, {_what(family, grid)}",
        finding=finding,
        height=lambda look: _height(look, len(series)),
        draw=draw,
    )


def _roofline(family: Family, grid: Grid, name: str) -> Figure:
    """Achieved FLOP/s over the least bytes."""
    series: dict[str, list[Value]] = {}
    roofs: set[tuple[float, float]] = set()
    for backend in grid.backends:
        for tokens, row in grid.rows.items():
            point, roof = row[backend], row[backend].roofline
            if roof is None or not point.counts or not roof.flop or not tokens or not point.slowest_us:
                continue
            roofs.add((roof.bandwidth_bytes_s, roof.flop_s))
            rate = roof.flop / point.slowest_us / 1e6  # TFLOP/s
            value = Value(tokens=tokens, x=roof.flop / (roof.weight_bytes + roof.activation_bytes), y=rate, low=rate, high=rate)
            series.setdefault(backend, []).append(value)
    intensities = [value.x for values in series.values() for value in values]

    def draw(sheet: Sheet) -> None:
        look, rates = sheet.look, [value.y for values in series.values() for value in values]
        across = log_axis(intensities, spare=1.6)
        low, high = across.low, across.high
        roof = [min(bandwidth * x, flop_s) / 1e12 for bandwidth, flop_s in roofs for x in (low, high)]
        up = log_axis([*rates, *roof], spare=1.5)
        words = "FLOP per byte that must be moved"
        made = panel(sheet, across, up, title="TFLOP/s, useful", xlabel=words, ends=ends_of(series, look))
        for bandwidth, flop_s in sorted(roofs):
            ridge = flop_s / bandwidth
            xs = sorted({low, high, *([ridge] if low < ridge < high else [])})
            line(sheet, [made.at(x, min(bandwidth * x, flop_s) / 1e12) for x in xs], look.ink, 1.6)
            if low < ridge:
                middle = math.sqrt(low * min(ridge, high))
                x, y = made.at(middle, bandwidth * middle / 1e12)
                write(sheet, (x - 6, y + 6), f"{bandwidth / 1e12:.1f} TB/s", ha="right")
            if ridge < high:
                x, y = made.at(high, flop_s / 1e12)
                write(sheet, (x - 4, y + 6), f"{flop_s / 1e12:.0f} TFLOP/s", ha="right")
        lines(made, series, band=False)

    rates = [(value.y, backend, value.tokens) for backend, values in series.items() for value in values]
    high, best, at = max(rates)
    finding = (
        f"Most useful work per second: {best} with {high:.3g} TFLOP/s at {_tokens(at)}, under a roof of {max(roofs)[1] / 1e12:.0f} TFLOP/s."
    )
    return Figure(
        name=f"roofline-{name}",
        title=f"Roofline, {_what(family, grid)}",
        finding=finding,
        height=lambda look: _height(look, len(series)) + (40 if look.wide else 0),
        draw=draw,
    )


def _series(grid: Grid, value: Callable[[Point], tuple[float, float, float] | None]) -> dict[str, list[Value]]:
    """Backends that count somewhere, with what `value` makes of their points: y, low, high."""
    found: dict[str, list[Value]] = {}
    for tokens, row in grid.rows.items():
        for backend in grid.backends:
            made = value(row[backend]) if row[backend].counts and tokens else None  # a logarithmic axis has no 0
            if made is not None and made[0] > 0:
                found.setdefault(backend, []).append(Value(tokens=tokens, y=made[0], low=made[1], high=made[2]))
    return {backend: found[backend] for backend in grid.backends if backend in found}


def _share(point: Point) -> tuple[float, float, float]:
    assert point.roofline is not None  # callers look at points with a share
    low, high = point.interval_us
    floor_us = 100 * point.roofline.floor_us
    return floor_us / point.slowest_us, floor_us / high, floor_us / low if low else 0.0


def _floors(grid: Grid) -> list[tuple[int, float, str]]:
    """Token count, least time, limiter: of the backends that have a roofline, the lowest."""
    found = []
    for tokens, row in grid.rows.items():
        roofs = [point.roofline for point in row.values() if point.counts and point.roofline and tokens]
        if roofs:
            least = min(roofs, key=lambda roof: roof.floor_us)
            found.append((tokens, least.floor_us, str(least.limiter)))
    return [floor for floor in found if floor[1] > 0]


def _cells(here: Sequence[tuple[Family, Grid]]) -> tuple[dict[tuple[str, str], _Cell], list[str], list[str], str]:
    """Cells by row and column, the names of both, and what the columns are."""
    tokens = sorted({win.num_tokens for _, grid in here for win in wins(grid)})
    axes = ("model", "top_k", "ep_size", "tp_size", "routing", "seed")
    values = {axis: list(dict.fromkeys(getattr(family.case, axis) for family, _ in here)) for axis in axes}
    across = "num_tokens" if len(tokens) > 1 else max(axes, key=lambda axis: len(values[axis]))
    varying = [axis for axis in axes if len(values[axis]) > 1 and axis != across]
    short = {"ep_size": "EP ", "tp_size": "TP ", "top_k": "top_k ", "seed": "seed ", "model": "", "routing": ""}
    cells: dict[tuple[str, str], _Cell] = {}
    rows: dict[str, None] = {}
    for family, grid in here:
        row = ", ".join(f"{short[axis]}{clean(str(getattr(family.case, axis)))}" for axis in varying) or clean(family.title)
        rows[row] = None
        for win in wins(grid):
            column = str(win.num_tokens if across == "num_tokens" else getattr(family.case, across))
            cells[row, clean(column)] = _Cell(best=win.best.backend, time_us=win.best.slowest_us, lead=win.lead, tie=bool(win.ties))
    columns = [str(number) for number in tokens] if across == "num_tokens" else [clean(str(value)) for value in values[across]]
    return cells, list(rows), columns, {"num_tokens": "tokens"}.get(across, across)


def _winner_map(
    group: tuple[Family, Grid],
    names: list[str],
    cells: Mapping[tuple[str, str], _Cell],
    rows: list[str],
    columns: list[str],
    across: str,
    number: int,
) -> Figure:
    decided = [cell for cell in cells.values() if cell.tie or cell.lead is not None]
    leaders = [name for name in names if any(cell.best == name for cell in decided)]

    def paint(cell: _Cell, look: Look) -> tuple[str, str, str, float]:
        if not cell.tie and cell.lead is None:
            return look.rule, look.muted, "alone", 0.35
        return look.colour(names.index(cell.best)), look.ink, "~" if cell.tie or cell.lead is None else ratio(cell.lead), 0.3

    def entries(look: Look) -> list[tuple[str, str, str]]:
        return [("s", look.colour(names.index(name)), label(name)) for name in leaders]

    counted = Counter(cell.best for cell in decided)
    most = max(leaders, key=lambda name: counted[name])
    ties = sum(cell.tie for cell in decided)
    alone = len(cells) - len(decided)
    return Figure(
        name=f"winners-{number}",
        title=f"Fastest backend on {group[0].device}, and how many times as fast as the next, {group[1].title}",
        finding=f"{most} has the lowest median in {counted[most]} of the {len(decided)} cells in which backends were compared; "
        f"{ties} are ties (~)" + (f", and in {alone} one backend is alone." if alone else "."),
        height=lambda look: _map_height(rows, columns, look, len(leaders)),
        draw=lambda sheet: _map(sheet, cells, rows, columns, across, paint, entries(sheet.look)),
    )


def _time_map(
    group: tuple[Family, Grid], cells: Mapping[tuple[str, str], _Cell], rows: list[str], columns: list[str], across: str, number: int
) -> Figure:
    times = [cell.time_us for cell in cells.values()]
    low, high = math.log(max(min(times), 1e-3)), math.log(max(*times, 2e-3))

    def paint(cell: _Cell, look: Look) -> tuple[str, str, str, float]:
        place = (math.log(max(cell.time_us, 1e-3)) - low) / (high - low) if high > low else 0.0
        step = min(int(place * len(look.heat)), len(look.heat) - 1)
        return look.heat[step], look.heat_ink[step], us(cell.time_us), 1.0

    (row, column), longest = max(cells.items(), key=lambda item: item[1].time_us)
    what = (
        ", slowest of the ranks" if any(family.case.ep_size * family.case.tp_size > 1 for family, _ in [group]) or "EP" in rows[-1] else ""
    )
    return Figure(
        name=f"times-{number}",
        title=f"Microseconds a call of {clean(longest.best)} on {clean(group[0].device)}{what}, {group[1].title}",
        finding=f"From {us(min(times))} to {us(longest.time_us)} us, the longest for {row} at {column} {across}.",
        height=lambda look: _map_height(rows, columns, look, 0),
        draw=lambda sheet: _map(sheet, cells, rows, columns, across, paint, []),
    )


def _map(
    sheet: Sheet,
    cells: Mapping[tuple[str, str], _Cell],
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    paint: Callable[[_Cell, Look], tuple[str, str, str, float]],
    entries: list[tuple[str, str, str]],
) -> None:
    """Wide: rows down and columns across; narrow: the other way round, since there are more columns than fit."""
    look = sheet.look
    down, over = (rows, columns) if look.wide else (columns, rows)
    low = legend(sheet, entries) if entries else 0.0
    turned = not look.wide and any(width_of(label(name), look.font) > (sheet.width - 60) / len(over) for name in over)
    under = max(width_of(label(name), look.font - 1) for name in over) if turned else 0.0
    names = names_axis([" " if turned else label(name) for name in over])
    box = (0, sheet.width, low + under, sheet.height)
    made = panel(
        sheet,
        names,
        _reversed(names_axis([label(name) for name in down])),
        title="" if look.wide else across,
        xlabel=across * look.wide,
        box=box,
    )
    for index, name in enumerate(over) if turned else ():
        x, _ = made.at(index, 0)
        write(sheet, (x, made.bottom - 6), label(name), colour=look.muted, size=look.font - 1, ha="center", va="top", rotation=90)
    painted: dict[tuple[str, float], list[list[tuple[float, float]]]] = defaultdict(list)
    written = []
    for (row, column), cell in cells.items():
        x, y = (columns.index(column), rows.index(row)) if look.wide else (rows.index(row), columns.index(column))
        face, ink, text, alpha = paint(cell, look)
        painted[face, alpha].append([made.at(x + dx, y + dy) for dx, dy in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))])
        written.append((made.at(x, y), text, ink))
    for (face, alpha), corners in painted.items():
        areas(sheet, corners, face, alpha, look.surface)
    for place, text, ink in written:
        write(sheet, place, text, colour=ink, size=look.font - (1.5 if look.wide else 2), ha="center", va="center")


def _map_height(rows: Sequence[str], columns: Sequence[str], look: Look, legend: int) -> float:
    if look.wide:
        return 70 + 34 * len(rows) + 23 * math.ceil(legend / 3)
    return 80 + 26 * len(columns) + 7 * max(len(label(row)) for row in rows) + 19 * legend


def _reversed(axis: Axis) -> Axis:
    """The first at the top."""
    return replace(axis, low=axis.high, high=axis.low)


def _all_tokens(series: Mapping[str, Sequence[Value]]) -> list[int]:
    return sorted({value.tokens for values in series.values() for value in values})


def _height(look: Look, count: int) -> float:
    return max(400.0, 120.0 + 20 * count) if look.wide else 300.0 + 19 * count


def _what(family: Family, grid: Grid) -> str:
    ranks = f" ({family.which_rank})" if family.which_rank else ""
    return f"{family.name}{ranks} on {family.device}, {grid.title}"


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value
