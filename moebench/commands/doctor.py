"""`moebench doctor`: what of this machine stands in the way of measuring, and what to do about it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebench.commands.outcome import OK, POINTS_FAILED
from moebench.doctor import STATUSES, TOPICS, Finding, Status, findings, foremost, gather
from moebench.reports.text import clean

STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(as_json: bool) -> None:
    """Look at the GPU, its driver, profilers, compilers and caches, and say what to do where something is wrong.

    Nothing is changed: clocks, power, ECC and the rest are read only. Exit status: 0 nothing fails, 3 something does."""
    console = Console(highlight=False)
    if as_json:
        found = findings(gather())
    else:
        with console.status("looking at this machine"):
            found = findings(gather())
    first = foremost(found)
    code = POINTS_FAILED if first and first.status == "fail" else OK
    counts = Counter(finding.status for finding in found)
    if as_json:
        document = {
            "findings": [asdict(finding) for finding in found],
            "counts": {status: counts[status] for status in STATUSES},
            "first": asdict(first) if first else None,
            "exit_code": code,
        }
        click.echo(json.dumps(document, allow_nan=False))
        sys.exit(code)
    width = max(len(finding.check) for finding in found)
    for topic in TOPICS:
        if group := [finding for finding in found if finding.topic == topic]:
            console.print(Text(topic, style="bold"))
            console.print(_table(group, width))
            console.print()
    console.print(_last_line(counts, first))
    sys.exit(code)


def _table(found: Sequence[Finding], width: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=4)
    table.add_column(width=width)
    table.add_column(overflow="fold")
    for finding in found:
        told = Text(clean(finding.text))
        if finding.status != "ok" and finding.do:
            told.append(f"\n→ {clean(finding.do)}")
        table.add_row(Text(finding.status, style=STYLES[finding.status]), finding.check, told)
    return table


def _last_line(counts: Counter[Status], first: Finding | None) -> Text:
    told = Text(", ").join(Text(f"{counts[status]} {status}", style=STYLES[status]) for status in STATUSES if counts[status])
    if first:
        told.append(f"; start with {first.check}: {clean(first.do or first.text)}")
    return told
