"""`moebench sweep`: check and time backends over the points of a plan."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from moebench import __version__
from moebench.case import Case
from moebench.commands.axes import axis_options, build_plan, survey_plan
from moebench.commands.outcome import INTERRUPTED, OK, POINTS_FAILED, STORAGE, UNREADABLE, USAGE, fail
from moebench.journal import RUNS, Journal, load_manifest, load_run, write_manifest
from moebench.plan import Plan
from moebench.record import SCHEMA, Manifest, Record, RecordError
from moebench.reports import markdown, table_csv, terminal
from moebench.sweep import Survey, now_id
from moebench.sweep import run as run_sweep


@click.command()
@axis_options
@click.option("--l2", type=click.Choice(["cold", "hot"]), help="State of the L2 cache before each sample.  [default: cold]")
@click.option(
    "--plan", "plan_file", metavar="NAME|FILE", help="A shipped plan (quick, gpt-oss, ep) or a TOML file; axes given here replace its own."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory.  [default: runs/<id>]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (or the newest of the same plan): do only what is missing.")
@click.option("--dry-run", is_flag=True, help="Print the expanded plan, its skips and the memory it needs; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def sweep(
    l2: Literal["cold", "hot"] | None,
    plan_file: str | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **axes: str | None,
) -> None:
    """Check and time backends over the points of a plan.

    Without options it runs the shipped plan `quick`. Every row is checked against a reference first; a row whose output is wrong
    has no time. Exit status: 0 all rows ok or skipped, 2 plan error, 3 some rows wrong or failed, 5 storage error, 130 interrupted."""
    plan = build_plan(axes, plan_file, l2)
    console = Console(stderr=as_json, highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}")
    if dry_run:
        _dry_run(plan, survey_plan(plan, None), console, as_json)
        return
    directory = _run_directory(plan, out, resume)
    run_id = load_manifest(directory).run_id if resume else directory.name if out is None else now_id()
    try:
        known = load_run(directory).records if resume else ()
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        with console.status("looking at this machine"):
            found = survey_plan(plan, directory / "logs" / "survey.log")
        if not resume:
            write_manifest(directory, _manifest(run_id, plan, found))
        journal = Journal(directory)
        done = {record.key for record in known}
        total = len(plan.points) * len(plan.archs or (found.device.arch,))
        console.print(f"{found.device.name} ({found.device.arch}), {total - len(done)} points to do, run directory {directory}")
        records = list(known)
        with _display(console, total, len(done)) as show:
            for record in run_sweep(plan, found, run_id, done, directory / "logs", show.watch):
                journal.append(record)
                records.append(record)
                show.add(record)
        journal.close()
        report_path = _leave_report(directory)
    except OSError as error:
        fail([f"{error.filename or directory}: {error.strerror or error}; what was written before is intact"], STORAGE)
    except KeyboardInterrupt:
        again = [*sys.argv[1:], *(["--out", str(directory)] if out is None else []), *([] if resume else ["--resume"])]
        console.print(f"\ninterrupted; go on with: moebench {shlex.join(again)}", soft_wrap=True, markup=False)
        sys.exit(INTERRUPTED)
    console.print(terminal.summary(records))
    console.print(f"report: {report_path}\njournal: {directory / 'journal.jsonl'}", soft_wrap=True)
    bad = [record for record in records if record.status not in ("ok", "skipped")]
    code = POINTS_FAILED if bad else OK
    if as_json:
        click.echo(json.dumps(_summary(run_id, directory, report_path, records, code)))
    sys.exit(code)


def _run_directory(plan: Plan, out: Path | None, resume: bool) -> Path:
    if not resume:
        directory = out or RUNS / now_id()
        if (directory / "run.json").exists():
            fail([f"{directory} already holds a run; add --resume to go on with it, or choose another --out"], USAGE)
        return directory
    try:
        candidates = [out] if out else sorted((p.parent for p in RUNS.glob("*/run.json")), reverse=True)
        manifests = [(path, load_manifest(path)) for path in candidates]
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    same = [path for path, manifest in manifests if manifest.plan_hash == plan.hash]
    if same:
        return same[0]
    if out:
        fail(
            [
                f"{out} holds a run of another plan ({manifests[0][1].plan_hash}, this is {plan.hash}); "
                f"repeat its command: {' '.join(manifests[0][1].command)}"
            ],
            USAGE,
        )
    fail([f"no run of this plan under {RUNS}/ to resume; name one with --out, or leave --resume out"], USAGE)


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


def _summary(run_id: str, directory: Path, report_path: Path, records: list[Record], code: int) -> dict[str, object]:
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
        "counts": counts,
        "records": rows,
    }


def _leave_report(directory: Path) -> Path:
    run = load_run(directory)
    path = directory / "report.md"
    path.write_text(markdown.report([run]))
    (directory / "results.csv").write_text(table_csv.rows(list(run.records)))
    return path


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
            self.progress.update(self.task, description=f"{self._counted()}{escape(f'{phase} {backend} {current.label}')}")

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
