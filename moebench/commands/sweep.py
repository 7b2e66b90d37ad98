"""`moebench sweep`: check and time backends over the points of a plan."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from moebench import __version__
from moebench.calibrate import roofs_of_this_machine
from moebench.case import Case, did_you_mean
from moebench.child import Halt
from moebench.commands.axes import axis_options, build_plan, survey_plan, timing_options
from moebench.commands.outcome import OK, POINTS_FAILED, STORAGE, UNREADABLE, USAGE, fail
from moebench.device import Device
from moebench.journal import JOURNAL, MANIFEST, RUNS, InUse, Journal, Run, RunLock, load_manifest, load_run, merge, settled, write_manifest
from moebench.plan import Plan
from moebench.record import SCHEMA, Manifest, Record, RecordError
from moebench.reports import markdown, table_csv, terminal
from moebench.reports.page import page
from moebench.reports.text import clean
from moebench.roofline import Roofs, RoofsError, best_roof, save_roofs
from moebench.sweep import DEADLINES_S, REPEAT_CHECK, Rules, Survey, now_id
from moebench.sweep import run as run_sweep
from moebench.telemetry import Sensors

REPORT = "report.html"


@click.command()
@axis_options
@timing_options
@click.option(
    "--plan", "plan_file", metavar="NAME|FILE", help="A shipped plan (quick, gpt-oss, ep) or a TOML file; axes given here replace its own."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory.  [default: runs/<id>]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (or the newest of the same plan): do only what is missing.")
@click.option(
    "--deadline", "deadlines", multiple=True, metavar="PHASE=SECONDS", help=f"Longest silence of a worker: {', '.join(DEADLINES_S)}."
)
@click.option(
    "--repeat-check",
    type=click.IntRange(0, 1_000_000),
    default=REPEAT_CHECK,
    show_default=True,
    help="Launches of each point whose outputs are compared, as far as about 0.4 s allow.",
)
@click.option("--dry-run", is_flag=True, help="Print the expanded plan, its skips and the memory it needs; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def sweep(
    plan_file: str | None,
    out: Path | None,
    resume: bool,
    deadlines: tuple[str, ...],
    repeat_check: int,
    dry_run: bool,
    as_json: bool,
    **options: str | int | None,
) -> None:
    """Check and time backends over the points of a plan.

    Without options it runs the shipped plan `quick`. Every row is checked against a reference first; a row whose output is wrong
    has no time. Ctrl-C finishes the point in progress and stops; a second one stops at once. Exit status: 0 all rows ok or skipped,
    2 plan error, 3 some rows wrong or failed, 5 storage error, 6 unreadable run, 130 interrupted, 143 terminated."""
    rules = Rules(deadlines_s=_deadlines(deadlines), repeat_check=repeat_check)
    plan = build_plan(options, plan_file)
    console = Console(stderr=as_json, highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if dry_run:
        _dry_run(plan, survey_plan(plan, None), console, as_json)
        return
    directory = _run_directory(plan, out, resume)
    records: list[Record] = []
    try:
        with Halt() as halt, _claim(directory):
            try:
                run = _sweep(plan, directory, resume, rules, console, halt, records)
                stopped = halt()
            except KeyboardInterrupt:
                stopped = True
    except OSError as error:
        if records:
            console.print(terminal.summary(records))
        fail([clean(f"{error.filename or directory}: {error.strerror or error}; what was written before is intact")], STORAGE)
    if stopped:
        again = [*sys.argv[1:], *(["--out", str(directory)] if out is None else []), *([] if resume else ["--resume"])]
        console.print()
        console.print(clean(f"interrupted; go on with: moebench {shlex.join(again)}"), soft_wrap=True, markup=False)
        sys.exit(halt.exit_code)
    records = merge([run])
    console.print(terminal.summary(records))
    report_path = directory / REPORT
    for name, path in (("report", report_path), ("journal", directory / JOURNAL)):
        console.print(clean(f"{name}: {path}"), soft_wrap=True, markup=False)
    bad = [record for record in records if record.status not in ("ok", "skipped")]
    code = POINTS_FAILED if bad else OK
    if as_json:
        click.echo(json.dumps(_summary(run.manifest.run_id, directory, report_path, records, code, rules)))
    sys.exit(code)


def _sweep(plan: Plan, directory: Path, resume: bool, rules: Rules, console: Console, halt: Halt, records: list[Record]) -> Run:
    """Fills `records` as they come, each in the journal before the next begins; returns the run as it is stored."""
    started_s = time.monotonic()
    (directory / "logs").mkdir(exist_ok=True)
    known: tuple[Record, ...] = ()
    resume = resume and (directory / MANIFEST).exists()  # a run that was killed before it stored anything begins anew
    if resume:
        before = _load(directory)
        known, run_id = before.records, before.manifest.run_id
        if before.torn:
            console.print("note: the journal's last line was cut off, as a killed writer leaves it; that point is done again", markup=False)
    else:
        run_id = directory.name if directory.parent == RUNS else now_id()
    with console.status("looking at this machine"):
        found = survey_plan(plan, directory / "logs" / "survey.log")
    if not resume:
        write_manifest(directory, _manifest(run_id, plan, found))
    done = settled(known)
    total = len(plan.points) * len(plan.archs or (found.device.arch,)) * plan.rounds
    where = f"{found.device.name} ({found.device.arch}), {total - len(done)} points to do, run directory {directory}"
    console.print(clean(where), markup=False, soft_wrap=True)
    records += known
    journal = Journal(directory)
    _know_roofs(found.device, console)
    with _sensors(found.device, console) as sensors, _display(console, total, len(done)) as show:
        halt.patient = True
        for record in run_sweep(plan, found, run_id, done, directory / "logs", show.watch, rules, halt, sensors):
            records.append(record)
            journal.append(record)
            show.add(record)
        halt.patient = False
    journal.close()
    run = _load(directory)
    _write(directory / "report.md", markdown.report([run]))
    _write(directory / REPORT, page([run]))
    _write(directory / "results.csv", table_csv.rows(merge([run])))
    console.print(terminal.time_line(records[len(known) :], time.monotonic() - started_s), soft_wrap=True, markup=False)
    return run


def _know_roofs(device: Device, console: Console) -> None:
    """Once for a device that no data sheet here describes: then its rows have a share of the roof, too."""
    if device.torch is None:
        return
    try:
        if best_roof(device.name) is None:
            with console.status("measuring what this machine can do at most, once; see moebench calibrate"):
                for news in roofs_of_this_machine():
                    if isinstance(news, Roofs):
                        save_roofs(news)
    except (RoofsError, OSError) as error:
        console.print(clean(f"note: rows have no share of the roof: {error}"), soft_wrap=True, markup=False)


@contextmanager
def _sensors(device: Device, console: Console) -> Iterator[Sensors | None]:
    if not device.is_gpu:
        yield None
        return
    with Sensors(device.uuid) as sensors:
        yield sensors
    if sensors.problem:
        console.print(clean(f"note: no clocks, power or temperatures were recorded: {sensors.problem}"), soft_wrap=True, markup=False)


def _deadlines(given: tuple[str, ...]) -> dict[str, float]:
    found = dict(DEADLINES_S)
    errors = []
    for text in given:
        phase, _, seconds = text.partition("=")
        if phase not in DEADLINES_S:
            errors.append(f"--deadline {text!r}: unknown phase{did_you_mean(phase[:60], DEADLINES_S)}; known: {', '.join(DEADLINES_S)}")
        elif not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", seconds):
            errors.append(f"--deadline {text!r}: give PHASE=SECONDS, such as jit=3600")
        else:
            found[phase] = float(seconds)
    if errors:
        fail(errors, USAGE)
    return found


def _run_directory(plan: Plan, out: Path | None, resume: bool) -> Path:
    if not resume:
        directory = out or RUNS / now_id()
        if (directory / MANIFEST).exists():
            fail([f"{directory} already holds a run; add --resume to go on with it, or choose another --out"], USAGE)
        return directory
    if out and not (out / MANIFEST).exists() and not (out / JOURNAL).exists():
        return out
    try:
        candidates = [out] if out else sorted((p.parent for p in RUNS.glob(f"*/{MANIFEST}")), reverse=True)
        manifests = [(path, load_manifest(path)) for path in candidates]
    except RecordError as error:
        fail([clean(str(error))], UNREADABLE)
    same = [path for path, manifest in manifests if manifest.plan_hash == plan.hash]
    if same:
        return same[0]
    if out:
        other = manifests[0][1]
        told = f"{out} holds a run of another plan ({other.plan_hash}, this is {plan.hash}); repeat its command: {' '.join(other.command)}"
        fail([clean(told)], USAGE)
    fail([f"no run of this plan under {RUNS}/ to resume; name one with --out, or leave --resume out"], USAGE)


@contextmanager
def _claim(directory: Path) -> Iterator[None]:
    """Makes the run directory ours alone."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(directory)
    except InUse as error:
        fail([clean(str(error))], USAGE)
    with lock:
        yield


def _load(directory: Path) -> Run:
    try:
        return load_run(directory)
    except RecordError as error:
        fail([clean(str(error))], UNREADABLE)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


def _manifest(run_id: str, plan: Plan, found: Survey) -> Manifest:
    return Manifest(
        run_id=run_id,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=("moebench", *sys.argv[1:]),
        device=found.device,
        plan=plan.to_dict(),
        plan_hash=plan.hash,
        versions={"moebench": __version__, **found.device.versions},
    )


def _dry_run(plan: Plan, found: Survey, console: Console, as_json: bool) -> None:
    archs = plan.archs or (found.device.arch,)
    rows = []
    for arch in archs:
        for point in plan.points:
            other = f"this machine is {found.device.arch}" if arch != found.device.arch else None
            reason = other or found.broken.get(point.backend) or found.reason(point)
            rows.append({"backend": point.backend, "arch": arch, "case": point.case.key, "label": point.case.label, "skip": reason})
    if as_json:
        click.echo(json.dumps({"plan_hash": plan.hash, "points": rows, "device_bytes": plan.device_bytes}))
        return
    console.print(terminal.plan_table(rows))
    runnable = sum(row["skip"] is None for row in rows)
    memory = f"{plan.device_bytes / 2**30:.1f} of {found.device.memory_bytes / 2**30:.0f} GiB"
    console.print(
        f"{len(rows)} points, {runnable} to run, {len(rows) - runnable} skipped; the largest needs about {memory} on {found.device.name}"
    )


def _summary(run_id: str, directory: Path, report_path: Path, records: list[Record], code: int, rules: Rules) -> dict[str, object]:
    rows = [
        {
            "backend": r.backend,
            "arch": r.arch,
            "case": r.case.key,
            "status": r.status,
            "reason": r.reason,
            "median_us": r.median_us,
            "rel_l2": r.error.rel_l2 if r.error else None,
        }
        for r in records
    ]
    counts = dict(Counter(r.status for r in records))
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "run": str(directory),
        "report": str(report_path),
        "exit_code": code,
        "deadlines_s": dict(rules.deadlines_s),
        "counts": counts,
        "records": rows,
    }


class _Display:
    """Live progress on a terminal, one plain line a record elsewhere."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self.counts: Counter[str] = Counter()
        self.progress: Progress | None = None
        if console.is_terminal:
            bar = (
                SpinnerColumn(),
                BarColumn(16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            )
            self.progress = Progress(*bar, console=console, transient=True, expand=True)
            self.task = self.progress.add_task("starting", total=total, completed=done)

    def watch(self, phase: str, current: Case | None, backend: str) -> None:
        if self.progress and current:
            self.progress.update(self.task, description=f"{self._counted()}{escape(clean(f'{phase} {backend} {current.label}'))}")

    def add(self, record: Record) -> None:
        self.counts[record.status if record.status in ("ok", "skipped", "failed") else "wrong"] += 1
        if self.progress:
            self.progress.advance(self.task)
            if record.status not in ("ok", "skipped"):
                self.progress.console.print(terminal.line(record))
        else:
            self.console.print(terminal.line(record), soft_wrap=True)

    def _counted(self) -> str:
        styles = {"ok": "green", "skipped": "dim", "wrong": "red", "failed": "red"}
        return " ".join(f"[{styles[name]}]{count} {name}[/]" for name, count in self.counts.items()) + "  "


@contextmanager
def _display(console: Console, total: int, done: int) -> Iterator[_Display]:
    display = _Display(console, total, done)
    if display.progress is None:
        yield display
        return
    with display.progress:
        yield display
