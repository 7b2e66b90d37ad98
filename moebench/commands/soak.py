"""`moebench soak`: launch one backend for minutes and count the launches whose output differs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from moebench import registry
from moebench.case import MODELS, case
from moebench.child import Halt, spawn
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import OK, POINTS_FAILED, USAGE, fail
from moebench.reports.text import clean
from moebench.sweep import DEADLINES_S


@click.command()
@click.argument("backend")
@click.option("--minutes", type=click.FloatRange(min=0, max=7 * 24 * 60, min_open=True), default=10.0, show_default=True)
@click.option("--model", type=click.Choice(list(MODELS)), default="gpt-oss-20b", show_default=True)
@click.option("--tokens", type=click.IntRange(0, 1 << 20), default=256, show_default=True)
@click.option("--log", type=OutFile(), help="Keep what the backend prints in this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def soak(backend: str, minutes: float, model: str, tokens: int, log: Path | None, as_json: bool) -> None:
    """Launch BACKEND for minutes on a few inputs and compare every output, on the device, with the first of its input.

    For kernels that are wrong once in many launches. A backend that says its bits may differ is held to its tolerance instead.
    Exit status: 0 no launch differed, 3 some did or it failed, 130 interrupted."""
    console = Console(stderr=as_json, highlight=False)
    try:
        if backend not in registry.names():
            fail([registry.unknown(backend)], USAGE)
    except registry.RegistryError as error:
        fail([str(error)], USAGE)
    request = {"backend": backend, "case": asdict(case(model, tokens)), "seconds": minutes * 60}
    launches = mismatches = 0
    status, reason = "", ""
    with Halt(patient=True) as halt, spawn("moebench.soak", request, {**DEADLINES_S, "interrupt": 0}, log) as child:
        for frame in child.frames(halt):
            if "launches" in frame:
                launches, mismatches = int(str(frame["launches"])), int(str(frame["mismatches"]))
                console.print(f"{launches} launches, {mismatches} different", markup=False)
            status = str(frame.get("status", status))
            reason = str(frame.get("reason", reason))
    if child.failure:
        status, reason = child.failure.status, child.failure.reason
    code = OK if status == "ok" else POINTS_FAILED
    if child.interrupted and halt.signal:
        status, reason = "interrupted", f"after {launches} launches, {mismatches} of them different"
        code = POINTS_FAILED if mismatches else halt.exit_code
    if as_json:
        told = {"backend": backend, "status": status, "reason": reason, "launches": launches, "mismatches": mismatches, "exit_code": code}
        click.echo(json.dumps(told))
    elif reason:
        console.print(clean(f"{status}: {reason}"), markup=False, soft_wrap=True)
    sys.exit(code)
