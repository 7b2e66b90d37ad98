"""`moebench policy`: which backend to use for how many tokens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click
from rich.console import Console

from moebench import serving_flags
from moebench.case import Case
from moebench.commands.outcome import NO_VERDICT, UNREADABLE, USAGE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.crossover import crossovers, one_by_one
from moebench.journal import load_run, merge
from moebench.record import Record, RecordError
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
    try:
        loaded = kept([load_run(path) for path in runs])
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    for run in loaded:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    records = merge(loaded)
    server: Server | None = "vllm" if style == "vllm" else "sglang" if style == "sglang" else None
    if server:
        _print_server(records, server, server_version or serving_flags.versions(server)[-1])
        return
    tables = one_by_one(records)
    found = list(islice(tables, MOST_TABLES) if style == "table" else tables)
    if not found:
        fail(["no backend can win: no row is ok, timed and without flags"], NO_VERDICT)
    if style == "json":
        click.echo(pages.to_json(found))
    elif style == "md":
        click.echo(pages.markdown(found), nl=False)
    else:
        Console(highlight=False).print(pages.table(found))
        if next(tables, None):
            click.echo(f"\nonly the first {MOST_TABLES} tables; --format md or json has all of them")


def _print_server(records: list[Record], server: Server, version: str) -> None:
    if version not in serving_flags.versions(server):
        known = ", ".join(serving_flags.versions(server))
        fail([f"no flag rather than a wrong one: {pages.NAMES[server]} {version} was not read; --server-version takes {known}"], NO_VERDICT)

    def allowed(backend: str, case: Case, arch: str) -> bool:
        return bool(serving_flags.setting(server, version, backend, model=case.model, arch=arch, ep_size=case.ep_size).flags)

    found = crossovers(records, allowed)
    if not found:
        why = {
            record.backend: serving_flags.setting(
                server, version, record.backend, model=record.case.model, arch=record.arch, ep_size=record.case.ep_size
            ).why
            for record in records
        }
        told = [f"{backend}: {reason}" for backend, reason in why.items() if reason]
        fail(["no flag to set: no backend that can win has one", *told], NO_VERDICT)
    shown = {backend for table in found for row in table.measured for backend in row.times_us}
    left_out = sorted({record.backend for record in records if record.timing} - shown)
    Console(highlight=False).print(pages.server_table(found, server, version, left_out))
