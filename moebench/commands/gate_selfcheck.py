"""`moebench selfcheck --gate`: what the regression gate finds, and how often it is wrong, here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebench.commands.outcome import INTERRUPTED, OK, POINTS_FAILED
from moebench.gate_check import (
    MODEL,
    Cell,
    CheckError,
    Finding,
    Gate,
    NoGpuError,
    Plan,
    Simulated,
    judge_gates,
    judge_simulator,
    on_simulated_clock,
    on_this_gpu,
    simulator,
)
from moebench.reports.text import clean, us

SIMULATED = "simulated clock"


def check_the_gate(plan: Plan, backend: str, simulated: bool, as_json: bool) -> None:
    """Prints what was found and ends the program: 0 all is well, 3 something is not, 130 interrupted."""
    console = Console(stderr=as_json, highlight=False)
    table: list[Simulated] = []
    gates: list[Gate] = []
    cut_short: Finding | None = None
    interrupted = False
    try:
        try:
            if not simulated:
                for gate in on_this_gpu(plan, backend, lambda what: console.print(f"{what} ...", markup=False)):
                    gates.append(gate)
        except NoGpuError:
            console.print("no GPU here")
            simulated = True
        except CheckError as error:
            cut_short = _not_to_the_end(str(error), "Ask `moebench doctor` what is wrong.")
        if simulated:
            console.print("checking on simulated machines and the simulated clock ...")
            table = list(simulator())
            gates.extend(on_simulated_clock(plan))
    except KeyboardInterrupt:
        interrupted = True
        console.print()
        cut_short = _not_to_the_end(
            f"interrupted with {len(gates)} of {len(plan.slowdowns) + plan.gates} done", "Run it again, to its end."
        )
    name = SIMULATED if simulated else "this machine"
    findings = [*(judge_simulator(table) if table else []), *(judge_gates(gates, plan.rounds) if gates else [])]
    findings += [cut_short] if cut_short else []
    code = INTERRUPTED if interrupted else OK if all(found.ok for found in findings) else POINTS_FAILED
    if table:
        console.print(_simulator_table(table))
        console.print()
    if any(not gate.slowdown for gate in gates):
        console.print(_same_table(gates))
        console.print()
    if any(gate.slowdown for gate in gates):
        console.print(_slower_table(gates))
        console.print()
    console.print(_verdict(name, findings), soft_wrap=True)
    if as_json:
        told = {
            "device": name,
            "rounds": plan.rounds,
            "simulator": [asdict(row) for row in table],
            "gates": [_document(gate) for gate in gates],
            "checks": [asdict(found) for found in findings],
            "exit_code": code,
        }
        click.echo(json.dumps(told))
    sys.exit(code)


def _not_to_the_end(why: str, do: str) -> Finding:
    return Finding(name="gates", ok=False, text=f"not measured to the end: {why}", do=do)


def _simulator_table(rows: Sequence[Simulated]) -> Table:
    table = Table(title=f"The simulator: {rows[0].rates.families} gates of 60 cells", title_justify="left")
    for number, head in enumerate(("noise", "one cell slower by", "called slower", "another called slower", "green", "no verdict")):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        rates = row.rates
        shares = (
            "" if not row.slowdown else f"{rates.found:.1%}",
            *(f"{x:.1%}" for x in (rates.false_alarm, rates.green, rates.no_verdict)),
        )
        table.add_row(row.noise, f"{100 * row.slowdown:g} %" if row.slowdown else "none", *shares)
    return table


def _same_table(gates: Sequence[Gate]) -> Table:
    table = Table(title="The same code on both sides", title_justify="left")
    for head in ("gate", "answer", "cells", "largest difference", "sees at worst"):
        table.add_column(head, justify="left" if head == "answer" else "right")
    for number, gate in enumerate((gate for gate in gates if not gate.slowdown), 1):
        apart = max((cell.ratio - 1 for cell in gate.cells if cell.ratio), key=abs, default=0.0)
        blind = any(cell.sees is None for cell in gate.cells)
        sees = "nothing" if blind else f"{max(cell.sees or 0.0 for cell in gate.cells):.1%}"
        table.add_row(str(number), _ANSWERS[gate.answer], str(len(gate.cells)), f"{apart:+.2%}", sees)
    return table


def _slower_table(gates: Sequence[Gate]) -> Table:
    table = Table(title="A spin kernel after each call of the candidate", title_justify="left", box=None, pad_edge=False)
    for head in ("case", "us", "appended", "measured", "interval", "sees", "promised", "verdict", ""):
        table.add_column(head, justify="left" if head in ("case", "promised", "verdict", "") else "right", no_wrap=True)
    for gate in gates:
        for cell in gate.cells if gate.slowdown else ():
            table.add_row(*map(Text, _line(cell)))
    return table


def _line(cell: Cell) -> list[str]:
    return [
        cell.case.removeprefix(f"{MODEL} "),
        us(cell.base_us),
        f"{cell.slowdown:.2%}",
        f"{cell.ratio - 1:+.2%}" if cell.ratio else "",
        f"{100 * (cell.low - 1):.1f}..{100 * (cell.high - 1):.1f}%" if cell.low and cell.high else "",
        f"{cell.sees:.1%}" if cell.sees is not None else "nothing",
        cell.promise or "-",
        cell.outcome,
        "kept" if cell.kept else "broken",
    ]


_ANSWERS = {"pass": "green", "fail": "red", "none": "no verdict"}


def _document(gate: Gate) -> dict[str, object]:
    """With what is computed from it."""
    cells = [asdict(cell) | {"promise": cell.promise, "kept": cell.kept} for cell in gate.cells]
    return asdict(gate) | {"cells": cells}


def _verdict(name: str, findings: Sequence[Finding]) -> Text:
    told = Text()
    for found in findings:
        told.append("ok      " if found.ok else "not ok  ", style="green" if found.ok else "bold red")
        told.append(f"{found.name}: {clean(found.text)}\n")
        if not found.ok:
            told.append(f"        → {found.do}\n")
    if bad := [found.name for found in findings if not found.ok]:
        told.append(f"{name}: no change is to be stopped by the gate before this is put right: {', '.join(bad)}")
    elif name == SIMULATED:
        told.append(f"{name}: the gate is as exact as it says; this machine's own noise was not tried")
    else:
        told.append(f"{name}: the gate may decide here, as exactly as the lines above say")
    return told
