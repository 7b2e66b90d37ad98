"""`moebench tune`: which of a backend's choices are fastest on this device, checked before they are timed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from moebench import registry
from moebench.case import MODELS, case
from moebench.child import Halt, spawn
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import OK, POINTS_FAILED, STORAGE, USAGE, fail
from moebench.reports.text import clean, count
from moebench.reports.tuned_choices import tuned_table
from moebench.sweep import DEADLINES_S
from moebench.tuned import tuned_path
from moebench.tuning import Outcome, outcome_of

MOST_PROCESSES = 8  # each after the first goes on without the choice that ended the one before


@click.command()
@click.argument("backend")
@click.option("--model", type=click.Choice(list(MODELS)), default="gpt-oss-20b", show_default=True, help="Whose layer is timed.")
@click.option("--tokens", metavar="LIST", help="Only regimes that are judged by these token counts, and by these alone.")
@click.option("--out", type=OutFile(), help="Write the table here.  [default: where the backend looks]")
@click.option("--write", is_flag=True, help="Write the table that the backend ships; in a checkout only.")
@click.option("--log", type=OutFile(), help="Keep what the backend prints in this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def tune(backend: str, model: str, tokens: str | None, out: Path | None, write: bool, log: Path | None, as_json: bool) -> None:
    """Try other choices in each regime of BACKEND's table, here and now, and keep those that are clearly faster.

    A choice is compared with the reference before it is timed. All are timed in turns with the present one, with a cold L2; the best
    is timed again, and taken if the 95 % interval of those times holds nothing but gain and the gain is at least 0.5 %. Without --out
    the table is kept for this user, and the backend uses it from then on. Exit status: 0 done, 2 it cannot be tuned here and why, 3 it
    failed, 5 the table cannot be written, 130 interrupted."""
    console = Console(stderr=as_json, highlight=False)
    wrong = ["--out and --write name two tables; give one of them"] if out and write else []
    try:
        wrong += [] if backend in registry.names() else [registry.unknown(backend)]
    except registry.RegistryError as error:
        wrong.append(str(error))
    counts = _counts(tokens) if tokens else []
    if counts is None:
        wrong.append(f"--tokens {tokens!r} is no list of whole numbers, such as 1024,4096")
    if wrong:
        fail(wrong, USAGE)
    target = out or tuned_path(backend)
    request = {"backend": backend, "case": asdict(case(model, 1)), "tokens": counts, "out": str(target.resolve()), "write": write}
    outcomes: list[Outcome] = []
    rejected: dict[str, str] = {}
    table = path = problem = ""
    for _ in range(MOST_PROCESSES):
        problem = choice = ""
        sofar = {
            "done": [outcome.regime for outcome in outcomes],
            "chosen": {outcome.regime: outcome.after for outcome in outcomes if outcome.after != outcome.before},
            "rejected": rejected,
        }
        with Halt(patient=True) as halt, spawn("moebench.tune", {**request, **sofar}, {**DEADLINES_S, "interrupt": 0}, log) as child:
            for frame in child.frames(halt):
                choice = str(frame.get("choice", choice))
                if "cannot" in frame:
                    fail([str(frame["cannot"])], USAGE)
                if "device" in frame and not rejected:
                    console.print(clean(f"{frame['device']} ({frame['arch']})"), markup=False)
                if isinstance(row := frame.get("outcome"), dict):
                    outcomes.append(outcome_of(row))
                    console.print(clean(f"{outcomes[-1].regime}: {count(outcomes[-1].tried, 'choice')} timed"), markup=False)
                if "status" in frame:
                    problem = f"{frame['status']}: {frame['reason']}"
                table, path = str(frame.get("table", table)), str(frame.get("path", path))
        if child.interrupted and halt.signal:
            console.print("interrupted; nothing was written")
            sys.exit(halt.exit_code)
        if child.failure:
            problem = f"{child.failure.status}: {child.failure.reason}{child.last_words()}"
        if not problem or not choice or choice in rejected:
            break
        rejected[choice] = problem
        console.print(clean(f"{choice} is left out: {problem}"), markup=False, soft_wrap=True)
    if outcomes:
        console.print(tuned_table(outcomes))
    for reason in dict.fromkeys(f"{choice}: {why}" for outcome in outcomes for choice, why in outcome.rejected.items()):
        console.print(clean(f"not timed: {reason}"), markup=False, soft_wrap=True)
    written = ""
    if problem:
        console.print(clean(f"not all regimes were tuned: {problem}"), markup=False, soft_wrap=True)
    elif table:
        written = _write(Path(path), table)
    elif outcomes:
        console.print("nothing else was clearly faster; no table was written")
    if written:
        console.print(clean(f"written to {written}"), markup=False, soft_wrap=True)
    code = POINTS_FAILED if problem else OK
    if as_json:
        told = {"regimes": [asdict(outcome) for outcome in outcomes], "written": written, "reason": problem, "exit_code": code}
        click.echo(json.dumps({"backend": backend, "model": model, **told}))
    sys.exit(code)


def _counts(text: str) -> Sequence[int] | None:
    words = [word.strip() for word in text.split(",")]
    return [int(word) for word in words] if all(word.isascii() and word.isdigit() for word in words) else None


def _write(path: Path, text: str) -> str:
    """All of it or nothing: another process may be reading the table."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        fail([f"{path} cannot be written: {error.strerror}; give another --out"], STORAGE)
    return str(path)
