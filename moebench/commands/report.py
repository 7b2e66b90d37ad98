"""`moebench report`: tables and pages from recorded runs."""

from __future__ import annotations

from pathlib import Path

import click

from moebench.commands.outcome import STORAGE, UNREADABLE, USAGE, fail
from moebench.journal import RUNS, Run, load_run, merge
from moebench.record import RecordError
from moebench.reports import markdown, table_csv


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["md", "csv"]), default="md", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of stdout.")
def report(runs: tuple[Path, ...], style: str, out: Path | None) -> None:
    """Report on run directories, merged; the newest under runs/ without an argument."""
    try:
        loaded = [load_run(path) for path in runs or (_newest(),)]
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    for run in loaded:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    text = _render(loaded, style)
    if out is None:
        click.echo(text, nl=not text.endswith("\n"))
        return
    try:
        out.write_text(text)
    except OSError as error:
        fail([f"{out}: {error.strerror}"], STORAGE)
    click.echo(str(out))


def _render(runs: list[Run], style: str) -> str:
    return markdown.report(runs) if style == "md" else table_csv.rows(merge(runs))


def _newest() -> Path:
    found = sorted(RUNS.glob("*/run.json"))
    if not found:
        fail([f"no run under {RUNS}/; make one with moebench sweep, or name a run directory"], USAGE)
    return found[-1].parent
