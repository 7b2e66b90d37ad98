"""`moebench selfcheck`: can the times of this machine be trusted, and how exactly."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebench import registry
from moebench.case import case
from moebench.commands.axes import plugins
from moebench.commands.gate_selfcheck import check_the_gate
from moebench.commands.outcome import INTERRUPTED, OK, POINTS_FAILED, USAGE, fail
from moebench.device import Device
from moebench.gate import Rule
from moebench.gate_check import GATES, ROUNDS
from moebench.gate_check import Plan as GatePlan
from moebench.plan import Plan, Point
from moebench.record import Record
from moebench.reports.text import clean, us
from moebench.selfcheck import Bias, Check, Cold, Cost, Noise, Part, Row, Tried, judge, noise, on_simulated_clock, on_this_gpu
from moebench.sweep import SweepError, now_id, run, survey

TOKENS = (1, 64, 1024)
LEAST_ROUNDS = Rule().least_rounds
SIMULATED = "simulated clock"
TITLES = {
    "bias": "Calls of known length",
    "cold": "What a cold L2 costs",
    "nvtx": "What NVTX ranges cost without a profiler",
    "telemetry": "What reading the sensors costs",
    "noise": "The same in fresh processes",
    "flags": "Simulated disturbances",
    "order": "Two equal backends, the first of each round favoured",
}


@click.command()
@click.option(
    "--rounds", type=click.IntRange(0, 100), metavar="N", help="Fresh processes for the noise; 0: none.  [default: 5; with --gate 8 a side]"
)
@click.option("--backend", help="Whose noise.  [default: triton_mxfp4_bf16 on sm80 and later, else torch]")
@click.option("--gate", is_flag=True, help="Check the regression gate instead: the same code, and slower calls, as it sees them.")
@click.option("--gates", type=click.IntRange(1, 100), metavar="N", help=f"With --gate: gates of the same code.  [default: {GATES}]")
@click.option("--simulated", is_flag=True, help="Check against the simulated clock, as on a machine without a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout; everything else goes to stderr.")
def selfcheck(rounds: int | None, backend: str | None, gate: bool, gates: int | None, simulated: bool, as_json: bool) -> None:
    """Time what is known and say whether the times of this machine can be trusted, and how exactly.

    On a GPU: what the timer adds, what a cold L2, NVTX ranges and telemetry cost, and how fresh processes differ. With --gate: what
    `moebench gate` says here of the same code in fresh processes, and of calls with a spin kernel of 2, 3, 5 and 10 % of their time
    appended. Run it while nothing else uses the GPU. Without one the same is tried on a simulated clock. Exit status: 0 all is well, 3
    something is not, 130 interrupted."""
    if rounds == 1 and not gate:
        fail(["--rounds 1: one process cannot show how processes differ; give 0 or at least 2"], USAGE)
    if gate and rounds is not None and rounds < LEAST_ROUNDS:
        fail([f"--rounds {rounds}: a gate decides nothing below {LEAST_ROUNDS} rounds"], USAGE)
    if gates is not None and not gate:
        fail([f"--gates {gates} is for --gate, which was not given"], USAGE)
    try:
        if backend is not None and backend not in registry.names():
            fail([f"--backend: {registry.unknown(backend)}"], USAGE)
    except registry.RegistryError as error:
        fail([str(error)], USAGE)
    if gate:
        check_the_gate(GatePlan(gates=gates or GATES, rounds=rounds or ROUNDS), backend or "triton_mxfp4_bf16", simulated, as_json)
    rounds = 5 if rounds is None else rounds
    console = Console(stderr=as_json, highlight=False)
    name = "this machine"
    parts: list[Part] = []
    interrupted = False
    try:
        for news in _news(rounds, backend, simulated, console):
            if isinstance(news, Part):
                parts.append(news)
                console.print(_table(news))
                console.print()
            else:
                name = news
    except KeyboardInterrupt:
        interrupted = True
        console.print("\ninterrupted")
    checks = [check for part in parts for check in judge(part)]
    code = INTERRUPTED if interrupted else OK if all(check.ok for check in checks) else POINTS_FAILED
    if as_json:
        told = {part.name: {"failure": part.failure, "rows": [_document(row) for row in part.rows]} for part in parts}
        click.echo(json.dumps({"device": name, "parts": told, "checks": [asdict(check) for check in checks], "exit_code": code}))
    elif not interrupted:
        console.print(_verdict(name, checks))
    sys.exit(code)


def _news(rounds: int, backend: str | None, simulated: bool, console: Console) -> Iterator[str | Part]:
    """Parts, and the name of what they are about before the first."""
    device: Device | None = None
    if not simulated:
        for news in on_this_gpu():
            if isinstance(news, str):
                console.print(f"{news} ...", markup=False)
                continue
            if isinstance(news, Part):
                yield news
            elif news.is_gpu:
                device = news
                console.print(clean(f"{news.name} ({news.arch})"), markup=False)
                yield clean(news.name)
            else:
                simulated = True
                console.print("no GPU here")
    if simulated:
        console.print("checking against the simulated clock ...")
        yield SIMULATED
        yield from on_simulated_clock(rounds)
    elif rounds and device:
        yield _noise_part(device, rounds, backend or _usual_backend(device), console)


def _usual_backend(device: Device) -> str:
    return "triton_mxfp4_bf16" if int(device.arch.removeprefix("sm")) >= 80 else "torch"


def _noise_part(device: Device, rounds: int, backend: str, console: Console) -> Part:
    plan = Plan(points=tuple(Point(case=case("gpt-oss-20b", tokens), backend=backend) for tokens in TOKENS))
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="moebench-selfcheck-") as folder:
        try:
            found = survey(plan.points, plugins(plan.backends))
        except SweepError as error:
            return Part(name="noise", failure=str(error))
        run_id = now_id()
        for number in range(rounds):  # a run each, and so fresh processes
            console.print(f"{backend}, round {number + 1} of {rounds} ...", markup=False)
            for record in run(plan, found, run_id, (), Path(folder) / str(number), lambda *_: None):
                records.append(replace(record, round=number))
    bad = [record for record in records if record.status != "ok"]
    failure = f"{backend} on {bad[0].case.label}: {bad[0].status}: {bad[0].reason}" if bad else ""
    return Part(name="noise", rows=tuple(noise(records)), failure=failure)


def _table(part: Part) -> Table | Text:
    if not part.rows:
        return Text(f"{TITLES[part.name]}: not measured: {clean(part.failure)}")
    table = Table(title=TITLES[part.name], title_justify="left")
    heads, rows = _cells(part.rows)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number and part.name != "flags" else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads, and the texts below them."""
    first = rows[0]
    if isinstance(first, Bias):
        heads = ["method", "length us", "time us", "excess us", "empty kernel us", "beyond it us"]
    elif isinstance(first, Cold):
        heads = ["method", "time us", "TB/s", "to rotation us", "ratio", "empty kernel us"]
    elif isinstance(first, Cost):
        heads = ["with", "without us", "ratio of medians", "95 % interval", "pairs"]
    elif isinstance(first, Noise):
        heads = [
            "case",
            "backend",
            "median us",
            "CV within",
            "CV of processes",
            "range",
            "one run shows",
            f"{len(first.medians_us)} rounds show",
        ]
    elif isinstance(first, Tried):
        heads = ["scenario", "expected flag", "flags raised"]
    else:
        heads = ["order", "rounds", "second over first", "95 % interval"]
    rotation = first.time_us if isinstance(first, Cold) else 0.0
    return heads, [_line(row, rotation) for row in rows]


def _line(row: Row, rotation_us: float) -> list[str]:
    if isinstance(row, Bias):
        return [
            row.method,
            f"{row.length_us:.2f}",
            f"{row.time_us:.2f}",
            f"{row.excess_us:+.2f}",
            f"{row.empty_us:.2f}",
            f"{row.beyond_us:+.2f}",
        ]
    if isinstance(row, Cold):
        same = row.empty_us > 0  # the large read is another question
        against = [f"{row.time_us - rotation_us:+.2f}", f"{row.time_us / rotation_us:.2f}", f"{row.empty_us:.2f}"] if same else ["", "", ""]
        return [row.method, us(row.time_us), f"{row.bytes_s / 1e12:.2f}", *against]
    if isinstance(row, Cost):
        return [row.what, us(row.without_us), f"{row.ratio:.4f}", f"{row.low:.4f} to {row.high:.4f}", str(len(row.ratios))]
    if isinstance(row, Noise):
        shares = (row.within, row.cv, row.range, row.resolves(), row.resolves(len(row.medians_us)))
        return [row.case, row.backend, us(sum(row.medians_us) / len(row.medians_us)), *(f"{share:.2%}" for share in shares)]
    if isinstance(row, Tried):
        return [row.scenario, row.expected or "none", "\n".join(f"{flag}: {why}" for flag, why in row.flags.items()) or "none"]
    return [row.order, str(row.rounds), f"{row.ratio:.4f}", f"{row.low:.4f} to {row.high:.4f}"]


def _document(row: Row) -> dict[str, object]:
    """With what is computed from it."""
    derived = {name: getattr(row, name) for name, value in vars(type(row)).items() if isinstance(value, property)}
    if isinstance(row, Noise):
        derived |= {"one_run_shows": row.resolves(), "all_rounds_show": row.resolves(len(row.medians_us))}
    return asdict(row) | derived


def _verdict(name: str, checks: Sequence[Check]) -> Text:
    told = Text()
    for check in checks:
        told.append("ok      " if check.ok else "not ok  ", style="green" if check.ok else "bold red")
        told.append(f"{check.name}: {clean(check.text)}\n")
        if not check.ok:
            told.append(f"        → {check.do}\n")
    if bad := [check.name for check in checks if not check.ok]:
        told.append(f"{name}: no time is to be trusted before this is put right: {', '.join(bad)}")
    elif name == SIMULATED:
        told.append(f"{name}: all is well; this machine's own times were not tried")
    else:
        told.append(f"{name}: its times can be trusted, as exactly as the lines above say")
    return told
