"""`moebench fsck`: what is wrong with a run directory, to the byte."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from moebench.commands.outcome import OK, UNREADABLE, fail
from moebench.journal import problems
from moebench.record import RecordError
from moebench.reports.text import clean, count


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def fsck(run: Path, as_json: bool) -> None:
    """Check a run directory: run.json and every line of the journal, checksums and repeated points included.

    Names line, byte offset and reason of each thing that is wrong, and changes nothing. Exit status: 0 all is well, 6 something is not."""
    try:
        found = problems(run)
    except RecordError as error:
        fail([clean(str(error))], UNREADABLE)
    code = UNREADABLE if found else OK
    if as_json:
        click.echo(json.dumps({"run": str(run), "exit_code": code, "problems": [asdict(problem) for problem in found]}))
        sys.exit(code)
    for problem in found:
        where = f"{problem.file}, line {problem.line} (byte {problem.offset}): " if problem.line else ""
        click.echo(clean(f"{where}{problem.reason}"))
    click.echo(clean(f"{run}: {count(len(found), 'problem') if found else 'all is well'}"))
    sys.exit(code)
