"""`moebench compare`: what is faster, what is slower, and what nobody can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click
from rich.console import Console

from moebench.brief import Brief, placed_briefs
from moebench.commands.outcome import NO_VERDICT, UNREADABLE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.compare import Comparison, Sensed, environment, joined, of_briefs
from moebench.parts import Placed, made_of
from moebench.record import RecordError
from moebench.reports import comparison as pages


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--across", is_flag=True, help="Also compare other devices and contracts, and say so on every line.")
@click.option("--format", "style", type=click.Choice(["table", "json", "md"]), default="table", show_default=True)
@uncollected()
def compare(base: Path, candidate: Path, across: bool, style: str) -> None:
    """Compare two run directories cell by cell.

    A report, not a gate: it exits 0 whatever it finds, and 4 where nothing can be compared."""
    most = pages.CELLS if style == "table" else None
    try:
        parts, whole = made_of([base, candidate], lambda placed: _found(placed, across, most), apart=True, keep=kept)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    for run in whole.runs:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    found = joined([part.comparison for part in parts])
    if not found.cells:
        fail([_why_nothing(found, parts, (str(base), str(candidate)))], NO_VERDICT)
    sensed = [sum((part.sensed[side] for part in parts), Sensed()) for side in (0, 1)]
    around = environment((whole.runs[0].manifest, sensed[0]), (whole.runs[1].manifest, sensed[1]))
    told = found, around, (str(base), str(candidate))
    if style == "json":
        click.echo(pages.to_json(*told))
    elif style == "md":
        click.echo(pages.markdown(*told), nl=False)
    else:
        Console(highlight=False).print(pages.table(*told))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a share of the records says."""

    comparison: Comparison
    sensed: tuple[Sensed, Sensed]
    timed: tuple[bool, bool]


def _found(placed: Placed, across: bool, most: int | None) -> _Found:
    sensed = Sensed(), Sensed()
    rows: tuple[list[Brief], list[Brief]] = [], []
    for side, group in groupby(placed, key=lambda one: one[0][1]):
        rows[side].extend(row for _, row in placed_briefs(_watched(group, sensed[side])))
    timed = any(row.timed for row in rows[0]), any(row.timed for row in rows[1])
    return _Found(comparison=of_briefs(*rows, across, most), sensed=sensed, timed=timed)


def _watched(placed: Placed, sensed: Sensed) -> Placed:
    for place, record in placed:
        if record.telemetry is not None:
            sensed.add(record.telemetry)
        yield place, record


def _why_nothing(found: Comparison, parts: Sequence[_Found], names: tuple[str, str]) -> str:
    base, candidate = names
    if found.mismatched:
        reasons = list(dict.fromkeys(row.reason for row in found.mismatched))
        told = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        return (
            f"nothing to compare: the times of {base} and {candidate} mean different things ({told}); --across compares them all the same"
        )
    untimed = [name for side, name in enumerate(names) if not any(part.timed[side] for part in parts)]
    if untimed:
        return f"nothing to compare: {' and '.join(untimed)} has no times"
    return f"nothing to compare: {base} and {candidate} have no case and backend in common that was timed in both"
