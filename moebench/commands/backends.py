"""`moebench backends`: what can run here, and what would change that."""

from __future__ import annotations

import json
from typing import Literal

import click
from rich.console import Console

from moebench import registry
from moebench.case import Case, case
from moebench.commands.axes import plugins
from moebench.commands.outcome import USAGE, fail
from moebench.plan import Point
from moebench.reports import terminal
from moebench.sweep import Survey, SweepError
from moebench.sweep import survey as survey_machine


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(as_json: bool) -> None:
    """List every backend, whether it can run here, and what would change that."""
    try:
        listed = registry.names()
        large, small = case("gpt-oss-20b", 1), case("tiny", 1)
        found = survey_machine([Point(case=c, backend=name) for name in listed for c in (large, small)], plugins(listed))
    except (registry.RegistryError, SweepError) as error:
        fail([str(error)], USAGE)
    rows = [_backend_row(name, found, large, small) for name in listed]
    if as_json:
        click.echo(json.dumps({"device": {"name": found.device.name, "arch": found.device.arch}, "backends": rows}))
        return
    console = Console(highlight=False)
    console.print(f"{found.device.name} ({found.device.arch})")
    console.print(terminal.backends_table(rows))


def _backend_row(name: str, found: Survey, large: Case, small: Case) -> dict[str, str]:
    broken = found.broken.get(name)
    large_reason, small_reason = (found.reasons.get((c.key, name)) for c in (large, small))
    runs: Literal["yes", "small cases", "no"] = "yes" if not large_reason else "small cases" if not small_reason else "no"
    return {
        "name": name,
        "source": registry.source(name),
        "act_dtype": found.act_dtypes.get(name, ""),
        "runs_here": "no" if broken else runs,
        "reason": broken or large_reason or "",
    }
