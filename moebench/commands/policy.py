"""`moebench policy`: which backend to use for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import click
from rich.console import Console

from moebench import serving_flags
from moebench.brief import placed_briefs
from moebench.case import Case
from moebench.commands.outcome import NO_VERDICT, UNREADABLE, USAGE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.crossover import Crossover, of_spread, spreads
from moebench.parts import Place, Placed, made_of
from moebench.record import RecordError
from moebench.reports import policy as pages
from moebench.serving_flags import Server

MOST_TABLES = 60  # more lines than anybody reads on a terminal, and rich takes 10 ms for each


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["table", "md", "json", "vllm", "sglang"]), default="table", show_default=True)
@click.option(
    "--server-version", metavar="VERSION", help="Release of vLLM or SGLang to print flags for. [default: the newest that was read]"
)
@uncollected()
def policy(runs: tuple[Path, ...], style: str, server_version: str | None) -> None:
    """Say which backend to use for which token counts, and what the runner-up costs.

    With --format vllm or sglang: among the backends which that server has, and with its flags."""
    if server_version and style not in pages.NAMES:
        fail([f"--server-version {server_version}: only with --format vllm or sglang"], USAGE)
    server: Server | None = "vllm" if style == "vllm" else "sglang" if style == "sglang" else None
    version = server_version or serving_flags.versions(server)[-1] if server else ""
    if server and version not in serving_flags.versions(server):
        known = ", ".join(serving_flags.versions(server))
        fail([f"no flag rather than a wrong one: {pages.NAMES[server]} {version} was not read; --server-version takes {known}"], NO_VERDICT)
    try:
        parts, whole = made_of(runs, lambda placed: _found(placed, server, version, MOST_TABLES if style == "table" else None), keep=kept)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    for run in whole.runs:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    found = [table for _, tables in sorted((one for part in parts for one in part.tables), key=itemgetter(0)) for table in tables]
    if server:
        _print_server(found, parts, server, version)
    elif not found:
        fail(["no backend can win: no row is ok, timed and without flags"], NO_VERDICT)
    elif style == "json":
        click.echo(pages.to_json(found))
    elif style == "md":
        click.echo(pages.markdown(found), nl=False)
    else:
        Console(highlight=False).print(pages.table(found[:MOST_TABLES]))
        if len(found) > MOST_TABLES:
            click.echo(f"\nonly the first {MOST_TABLES} tables; --format md or json has all of them")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a part of the records says."""

    tables: list[tuple[Place, list[Crossover]]]  # of a layer each, with where its first record is
    timed: set[str]  # backends
    tried: set[tuple[str, str, str, int]]  # backend, model, arch, EP size


def _found(placed: Placed, server: Server | None, version: str, most: int | None) -> _Found:
    """All tables, or a few more than `most`."""

    def allowed(backend: str, case: Case, arch: str) -> bool:
        assert server is not None  # else it is not asked
        return bool(serving_flags.setting(server, version, backend, model=case.model, arch=arch, ep_size=case.ep_size).flags)

    rows = placed_briefs(placed, later=most is not None)
    first = {id(row): place for place, row in rows}
    tables: list[tuple[Place, list[Crossover]]] = []
    for spread in spreads((row for _, row in rows), allowed if server else None):
        tables.append((first[id(spread[0])], of_spread(spread)))
        if most is not None and sum(len(found) for _, found in tables) > most:
            break
    return _Found(
        tables=tables,
        timed={row.backend for _, row in rows if row.timed},
        tried={(row.backend, row.case.model, row.arch, row.case.ep_size) for _, row in rows},
    )


def _print_server(found: Sequence[Crossover], parts: Sequence[_Found], server: Server, version: str) -> None:
    if not found:
        tried = sorted({one for part in parts for one in part.tried})
        why = {
            backend: serving_flags.setting(server, version, backend, model=model, arch=arch, ep_size=ep_size).why
            for backend, model, arch, ep_size in tried
        }
        told = [f"{backend}: {reason}" for backend, reason in why.items() if reason]
        fail(["no flag to set: no backend that can win has one", *told], NO_VERDICT)
    shown = {backend for table in found for row in table.measured for backend in row.times_us}
    left_out = sorted({backend for part in parts for backend in part.timed} - shown)
    Console(highlight=False).print(pages.server_table(found, server, version, left_out))
