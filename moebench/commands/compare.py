"""`moebench compare`: what is faster, what is slower, and what nobody can say."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from moebench.commands.outcome import NO_VERDICT, UNREADABLE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.compare import Comparison, environment
from moebench.compare import compare as compare_records
from moebench.journal import Run, load_run, merge
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
    try:
        runs = kept((load_run(base), load_run(candidate)))
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    for run in runs:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    found = compare_records(merge(runs[:1]), merge(runs[1:]), across)
    if not found.cells:
        fail([_why_nothing(found, runs)], NO_VERDICT)
    told = found, environment(*runs), (str(base), str(candidate))
    if style == "json":
        click.echo(pages.to_json(*told))
    elif style == "md":
        click.echo(pages.markdown(*told), nl=False)
    else:
        Console(highlight=False).print(pages.table(*told))


def _why_nothing(found: Comparison, runs: tuple[Run, Run]) -> str:
    base, candidate = (str(run.path) for run in runs)
    if found.mismatched:
        reasons = list(dict.fromkeys(row.reason for row in found.mismatched))
        told = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        return (
            f"nothing to compare: the times of {base} and {candidate} mean different things ({told}); --across compares them all the same"
        )
    timed = [str(run.path) for run in runs if not any(record.timing for record in run.records)]
    if timed:
        return f"nothing to compare: {' and '.join(timed)} has no times"
    return f"nothing to compare: {base} and {candidate} have no case and backend in common that was timed in both"
