"""Two runs beside each other, as a table, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.case import CASE_FIELDS, Case
from moebench.compare import Cell, Comparison, Difference, Tally, Uncompared
from moebench.record import Scope
from moebench.reports.text import clean, count, escape, us

SCHEMA = "1.0"
TIE = "~"
NO_INTERVAL = "?"
FLAGGED = "!"
LISTED = 20  # of each kind that is not compared; Markdown and JSON have all
CELLS = 200  # in a table: the rest is closest to 1, and rich takes 1.4 ms for a row
KINDS = (
    ("changed", "Another status"),
    ("mismatched", "Not compared: their times mean different things"),
    ("alone", "On one side only"),
)


def table(comparison: Comparison, environment: Sequence[Difference], names: tuple[str, str]) -> RenderableType:
    """What differs around the runs, then every cell, then what was not compared."""
    parts: list[RenderableType] = [Text.assemble(("base ", "dim"), clean(names[0]), ("  candidate ", "dim"), clean(names[1]))]
    if environment:
        shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for title in ("differs", "base", "candidate"):
            shown.add_column(title, overflow="fold")
        for difference in environment:
            shown.add_row(*(Text(clean(text) or "-") for text in (difference.what, difference.base, difference.candidate)))
        parts += [shown, Text()]
    else:
        parts += [Text("same device, driver and versions", style="dim"), Text()]
    parts += [Text(f"compared across: {clean(sentence)}", style="yellow") for sentence in comparison.across]
    if comparison.cells:
        parts.append(_cells(comparison.cells[:CELLS], comparison.tally))
        parts += [_more(comparison.tally.cells - CELLS)] if comparison.tally.cells > CELLS else []
        parts += [*(Text(line, style="dim") for line in _legend(comparison.tally)), Text()]
    parts += [part for title, found in _uncompared(comparison) for part in _listed(title, found, _common_model(comparison))]
    return Group(*parts, Text(_counts(comparison)))


def markdown(comparison: Comparison, environment: Sequence[Difference], names: tuple[str, str]) -> str:
    """The same as one Markdown page, with everything listed."""
    blocks = ["# moebench compare", f"Base {escape(names[0])}, candidate {escape(names[1])}. {_counts(comparison)}"]
    if environment:
        blocks += [
            "## What differs around the runs",
            _rows(("", "base", "candidate"), ((d.what, d.base, d.candidate) for d in environment)),
        ]
    else:
        blocks += ["Same device, driver and versions."]
    blocks += [f"**Compared across:** {escape(sentence)}" for sentence in comparison.across]
    if comparison.cells:
        across = bool(comparison.across)
        head = ("case", "backend", "base us", "candidate us", "ratio", "95 %", "flags", *(["across"] if across else []))
        rows = (
            (
                _label(cell.case, cell.scope, None),
                cell.backend,
                us(cell.base_us),
                us(cell.candidate_us),
                _ratio(cell),
                _interval(cell),
                ", ".join(cell.flags),
                *([", ".join(cell.across)] if across else []),
            )
            for cell in comparison.cells
        )
        blocks += ["## Cells", _rows(head, rows, right=(2, 3, 4)), "\n".join(f"- {escape(line)}" for line in _legend(comparison.tally))]
    for title, found in _uncompared(comparison):
        lines = ((_label(row.case, row.scope, None), row.backend, row.base or "", row.candidate or "", row.reason) for row in found)
        blocks += [f"## {title}", _rows(("case", "backend", "base", "candidate", "why"), lines)]
    return "\n\n".join(blocks) + "\n"


def to_json(comparison: Comparison, environment: Sequence[Difference], names: tuple[str, str]) -> str:
    """Everything, numbers in full."""
    return json.dumps(
        {
            "schema": SCHEMA,
            "base": names[0],
            "candidate": names[1],
            "environment": [asdict(difference) for difference in environment],
            "across": list(comparison.across),
            "cells": [_cell_json(cell) for cell in comparison.cells],
            **{kind: [asdict(row) | {"label": row.case.label} for row in getattr(comparison, kind)] for kind, _ in KINDS},
        },
        allow_nan=False,
        indent=1,
    )


def _cell_json(cell: Cell) -> dict[str, object]:
    found = cell.ratio
    return {
        **vars(cell),
        "case": {name: getattr(cell.case, name) for name in CASE_FIELDS},  # vars would have its hash as well
        "label": cell.case.label,
        "ratio": found.value,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "decided": found.decided,
        "within_process": found.within_process,
        "rounds": list(found.rounds),
    }


def _cells(cells: Sequence[Cell], tally: Tally) -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    model = tally.models[0] if len(tally.models) == 1 else None
    across = any(cell.across for cell in cells)
    shown.add_column(model or "case", overflow="fold")
    shown.add_column("backend", overflow="fold")
    for title in ("base us", "cand. us", "ratio", "95 %"):
        shown.add_column(title, justify="right", no_wrap=True)
    if across:
        shown.add_column("across", overflow="fold")
    for cell in cells:
        style = "" if not cell.ratio.decided else "green" if cell.ratio.value < 1 else "red"
        shown.add_row(
            Text(clean(_label(cell.case, cell.scope, model))),
            Text(clean(cell.backend)),
            us(cell.base_us),
            us(cell.candidate_us),
            Text(_ratio(cell), style=style),
            _interval(cell),
            *([Text(", ".join(cell.across), style="yellow")] if across else []),
        )
    return shown


def _ratio(cell: Cell) -> str:
    mark = NO_INTERVAL if cell.ratio.low is None else "" if cell.ratio.decided else TIE
    return f"{FLAGGED if cell.flags else ''}{mark} {cell.ratio.value:.3f}".strip()


def _interval(cell: Cell) -> str:
    found = cell.ratio
    return "none" if found.low is None or found.high is None else f"{found.low:.3f}-{found.high:.3f}"


def _legend(tally: Tally) -> Iterator[str]:
    """Explains what was used, nothing else."""
    yield "ratio: candidate over base, below 1 the candidate is faster; decided ones first, the largest change first"
    if tally.ties:
        yield f"{TIE} the 95 % interval includes 1"
    if tally.unknown:
        yield f"{NO_INTERVAL} too few samples for an interval"
    if tally.flags:
        yield f"{FLAGGED} a time is in doubt: {clean(', '.join(tally.flags))}"
    if tally.within_process:
        which = "" if tally.within_process == tally.cells else f"{count(tally.within_process, 'cell')}: "
        yield f"{which}one round on a side, so intervals are within one process; fresh processes differ by more (sweep --rounds)"
    if tally.cells >= 20:
        yield f"by chance alone about {tally.cells * 0.05:.0f} of {tally.cells} intervals exclude 1 where nothing changed"


def _uncompared(comparison: Comparison) -> Iterator[tuple[str, tuple[Uncompared, ...]]]:
    found = {"changed": comparison.changed, "mismatched": comparison.mismatched, "alone": comparison.alone}
    return ((title, found[kind]) for kind, title in KINDS if found[kind])


def _listed(title: str, found: Sequence[Uncompared], model: str | None) -> Iterator[RenderableType]:
    yield Text(title, style="bold")
    shown = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        shown.add_column(overflow="fold")
    for row in found[:LISTED]:
        change = f"{row.base} -> {row.candidate}" if row.base and row.candidate and row.base != row.candidate else ""
        told = ": ".join(part for part in (change, clean(row.reason)) if part)
        shown.add_row(Text(clean(_label(row.case, row.scope, model))), Text(clean(row.backend)), Text(told, style="dim"))
    yield shown
    if len(found) > LISTED:
        yield _more(len(found) - LISTED)
    yield Text()


def _more(number: int) -> Text:
    return Text(f"and {number} more; --format md or json has them all", style="dim")


def _counts(comparison: Comparison) -> str:
    tally = comparison.tally
    told = f"{count(tally.cells, 'cell')}: {tally.faster} faster, {tally.slower} slower, {tally.undecided} undecided"
    left = len(comparison.changed) + len(comparison.mismatched) + len(comparison.alone)
    return f"{told}; {left} not compared." if left else f"{told}."


def _label(case: Case, scope: Scope, model: str | None) -> str:
    """A case without the model's name where the table has it already."""
    label = case.label.removeprefix(f"{model} ") if model else case.label
    return label if scope == "experts" else f"{label} {scope}"


def _common_model(comparison: Comparison) -> str | None:
    names = {*comparison.tally.models, *(row.case.model for _, found in _uncompared(comparison) for row in found)}
    return names.pop() if len(names) == 1 else None


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], right: tuple[int, ...] = ()) -> str:
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    lines = [list(head), rule, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
