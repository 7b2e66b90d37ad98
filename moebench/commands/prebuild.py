"""`moebench prebuild`: compile a backend's vendor library before its first call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moebench import registry
from moebench.backend import BuildFailed, BuildState, BuildStep, CannotBuild
from moebench.case import did_you_mean
from moebench.commands.outcome import INTERRUPTED, POINTS_FAILED, USAGE, fail
from moebench.plan import ARCHS
from moebench.prebuild import prebuild as run_prebuild


@click.command()
@click.argument("backend")
@click.option("--arch", metavar="LIST", help="Architectures, such as sm90,sm100.  [default: the only one there is, or this machine's]")
@click.option("--jobs", type=click.IntRange(min=1), help="Units at once; each takes about 6 GiB of memory.  [default: the vendor's]")
@click.option("--dry-run", is_flag=True, help="Print how much there is to compile and where it goes; compile nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def prebuild(backend: str, arch: str | None, jobs: int | None, dry_run: bool, as_json: bool) -> None:
    """Compile now what BACKEND's vendor library would compile at its first call.

    It takes hours on a few cores and needs no GPU; interrupted or failed, the same command goes on where it stopped. It ends by
    saying where the result is and how another machine gets it. Exit status: 0 it is there, 2 nothing was compiled and why, 3 a
    unit does not compile, 130 interrupted."""
    archs = list(dict.fromkeys(word.strip() for word in arch.split(","))) if arch is not None else []
    try:
        wrong = [] if backend in registry.names() else [registry.unknown(backend)]
    except registry.RegistryError as error:
        wrong = [str(error)]
    wrong += [
        f"unknown architecture {name!r}{did_you_mean(name, ARCHS)} (known: {', '.join(ARCHS)})" for name in archs if name not in ARCHS
    ]
    if wrong:
        fail(wrong, USAGE)
    console = Console(stderr=as_json, highlight=False)
    states: dict[tuple[str, str], BuildState] = {}
    try:
        with _building(console) as show:
            for news in run_prebuild(backend, archs, jobs, dry_run):
                show(news)
                if isinstance(news, BuildState):
                    states[news.arch, news.module] = news
    except CannotBuild as error:
        fail([str(error)], USAGE)
    except BuildFailed as error:
        fail([str(error)], POINTS_FAILED)
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted; what was compiled is kept, go on with: moebench {' '.join(sys.argv[1:])}", soft_wrap=True, markup=False
        )
        sys.exit(INTERRUPTED)
    for state in states.values():
        if state.done == state.total:
            size = f"{Path(state.path).stat().st_size / 2**20:.1f} MiB"
            told = [f"{state.module} ({state.arch}): {state.path}, {size}", *(f"  {text}" for text in state.ship)]
            console.print("\n".join(told), soft_wrap=True, markup=False)
    if as_json:
        click.echo(json.dumps({"backend": backend, "modules": [asdict(state) for state in states.values()]}))


@contextmanager
def _building(console: Console) -> Iterator[Callable[[BuildStep | BuildState], None]]:
    """Live progress on a terminal; elsewhere a plain line for each twentieth of a module."""
    columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def show(news: BuildStep | BuildState) -> None:
            if isinstance(news, BuildState):
                progress.reset(task, total=news.total, completed=news.done, description=news.module)
                if news.done < news.total:
                    text = f"{news.module} ({news.arch}): {news.done} of {news.total} steps are done, in {Path(news.path).parent}"
                    console.print(text, soft_wrap=True, markup=False)
                return
            progress.update(task, completed=news.done, description=news.what)
            if not console.is_terminal and (news.done == news.total or news.done % max(news.total // 20, 1) == 0):
                console.print(f"[{news.done}/{news.total}] {news.module} {news.what}", soft_wrap=True, markup=False)

        yield show
