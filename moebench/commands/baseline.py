"""`moebench baseline`: keep runs to compare later ones with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebench.baselines import STORE, BaselineError, listed, load
from moebench.baselines import save as store_runs
from moebench.commands.outcome import STORAGE, UNREADABLE, USAGE, fail
from moebench.gate import Rule
from moebench.journal import Run, load_run
from moebench.record import RecordError
from moebench.reports.text import clean, count, us
from moebench.verdict import LEAST_JOBS, foresee

LISTED = 20


@click.group()
def baseline() -> None:
    """Keep runs to compare later ones with.

    A baseline belongs to a device, its power limit, its driver and the contract of its times. moebench gate takes it, or the directory
    of all of them, as its BASE; alone it can only ask for base and candidate to be measured in turns."""


def store_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--store", type=click.Path(path_type=Path, file_okay=False), default=STORE, show_default=True, help="Directory of all baselines."
    )(command)


@baseline.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reason", default="the first baseline", show_default=True, help="Why this run is the baseline.")
@store_option
def save(runs: tuple[Path, ...], reason: str, store: Path) -> None:
    """Store the last of RUNS as the first baseline of its conditions.

    All of RUNS are the same code measured in jobs of their own: five or more calibrate the band that --trust-stored needs. Exit
    status: 0 stored, 2 not possible, 5 storage error, 6 unreadable run."""
    _store(store, runs, reason, replaces=False)


@baseline.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reason", required=True, help="Why the new times are right; kept in the baseline's history.")
@store_option
def accept(runs: tuple[Path, ...], reason: str, store: Path) -> None:
    """Replace the baseline of these conditions by the last of RUNS.

    Nothing else ever does. Exit status: 0 stored, 2 not possible, 5 storage error, 6 unreadable run."""
    if not reason.strip():
        fail(["--reason is empty; say why the new times are right"], USAGE)
    _store(store, runs, reason, replaces=True)


@baseline.command("list")
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(store: Path, as_json: bool) -> None:
    """List the baselines."""
    try:
        found = [(place, load(place)) for place in listed(store)]
    except BaselineError as error:
        fail([str(error)], UNREADABLE)
    if as_json:
        rows = [{"path": str(place), **asdict(one.conditions), **asdict(one.history[-1])} for place, one in found]
        click.echo(json.dumps(rows))
        return
    if not found:
        click.echo(f"no baselines in {store}; moebench baseline save RUN makes one")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("baseline", "run", "since", "cells", "jobs", "why"):
        table.add_column(title, overflow="fold")
    for place, one in found:
        last = one.history[-1]
        jobs = max((len(cell.centers_us) for cell in one.jobs), default=0)
        cells = (place.name, last.run_id, last.time, str(last.cells), str(jobs), last.reason)
        table.add_row(*(Text(clean(cell)) for cell in cells))
    Console(highlight=False).print(table)


@baseline.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(place: Path, as_json: bool) -> None:
    """Show one baseline: its conditions, its times and why it was accepted."""
    try:
        found = load(place)
        run = load_run(place)
    except BaselineError as error:
        fail([str(error)], UNREADABLE)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    console = Console(highlight=False)
    told = found.conditions
    power = f"{told.power_limit_w} W" if told.power_limit_w else "power limit not known"
    console.print(Text(clean(f"{told.device}, {power}, driver {told.driver or 'none'}, contract {', '.join(told.contracts)}")))
    for accepted in found.history:
        console.print(
            Text(clean(f"{accepted.time}  run {accepted.run_id}, {count(accepted.cells, 'cell')}: {accepted.reason}")), soft_wrap=True
        )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("case", "backend", "us in each job"):
        table.add_column(title, overflow="fold")
    for cell in found.jobs:
        table.add_row(Text(clean(cell.case.label)), Text(clean(cell.backend)), ", ".join(us(center) for center in cell.centers_us))
    console.print(table)
    _warn(run)


def _store(store: Path, paths: Sequence[Path], reason: str, replaces: bool) -> None:
    try:
        runs = [load_run(path) for path in paths]
        place = store_runs(store, runs, reason=reason, time=datetime.now(UTC).isoformat(timespec="seconds"), replaces=replaces)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    except BaselineError as error:
        fail([str(error)], USAGE)
    except OSError as error:
        fail([f"{error.filename or store}: {error.strerror or error}"], STORAGE)
    click.echo(f"stored in {place}")
    if len(runs) < LEAST_JOBS:
        click.echo(f"{count(len(runs), 'job')}: --trust-stored needs {LEAST_JOBS} of the same code, each on an occasion of its own")
    _warn(runs[-1])


def _warn(run: Run) -> None:
    """Names the cells that a gate with as many rounds could not rely on."""
    blind = [told for told in foresee(run) if told.blind]
    for told in blind[:LISTED]:
        sees = f"sees {100 * told.sees:.1f} %" if told.sees is not None else "has too few rounds to see anything"
        more = f"; {told.needs} rounds would" if told.needs else ""
        name = clean(f"{told.case.label} {told.backend}")
        click.echo(f"a gate could not be relied on to see {100 * Rule().threshold:g} % in {name}: it {sees} in {told.rounds} rounds{more}")
    if len(blind) > LISTED:
        click.echo(f"and {count(len(blind) - LISTED, 'more cell')}")
