"""`moebench export`: a run in another tool's format."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click

from moebench.commands.out_file import OutFile
from moebench.commands.outcome import STORAGE, UNREADABLE, USAGE, fail
from moebench.journal import Run, load_run
from moebench.record import RecordError
from moebench.reports.parquet import NotInstalled

# name: module in reports/
FORMATS = {
    "nvbench": "nvbench",
    "googlebench": "google_benchmark",
    "flashinfer": "flashinfer_csv",
    "parquet": "parquet",
    "junit": "junit",
}
TIMES_ONLY = ("googlebench", "flashinfer")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(list(FORMATS)), required=True, help="Whose format.")
@click.option("--out", type=OutFile(), required=True, help="File to write; nvbench adds OUT-bin/ beside it.")
def export(run: Path, style: str, out: Path) -> None:
    """Write a run directory in the format of another tool.

    nvbench for nvbench-compare, googlebench for Google Benchmark's compare.py, flashinfer for the CSV of FlashInfer's benchmarks,
    parquet for pandas and DuckDB, junit for CI servers."""
    try:
        loaded = load_run(run)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    if loaded.torn:
        click.echo(f"note: {run}: the journal's last line was cut off and is left out", err=True)
    files = _files(loaded, style, out.name)
    try:
        for name, content in files.items():
            path = out.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        fail([f"{error.filename or out}: {error.strerror}"], STORAGE)
    without = sum(record.status != "ok" or record.timing is None for record in loaded.records)
    if style in TIMES_ONLY and without:
        click.echo(f"note: {without} of {len(loaded.records)} records have no time and are left out", err=True)
    click.echo(str(out))


def _files(run: Run, style: str, name: str) -> dict[str, bytes]:
    write: Callable[[Run, str], dict[str, bytes]] = import_module(f"moebench.reports.{FORMATS[style]}").export
    try:
        return write(run, name)
    except NotInstalled as error:
        fail([str(error)], USAGE)
