"""The command line: parse, call, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from moebench import __version__, registry
from moebench.backend import BuildFailed, BuildState, BuildStep, CannotBuild
from moebench.case import Case, case, did_you_mean
from moebench.plan import ARCHS, Plan, PlanError, Point, build
from moebench.prebuild import prebuild as run_prebuild
from moebench.record import SCHEMA, Journal, Manifest, Record, RecordError, Run, load_manifest, load_run, write_manifest
from moebench.reports import markdown, table_csv, terminal
from moebench.sweep import Survey, SweepError, now_id
from moebench.sweep import run as run_sweep
from moebench.sweep import survey as survey_machine

RUNS = Path("runs")
OK, USAGE, POINTS_FAILED, STORAGE, UNREADABLE, INTERRUPTED = 0, 2, 3, 5, 6, 130

AXIS_HELP = {
    "model": "Models, such as gpt-oss-20b,gpt-oss-120b.",
    "tokens": "Token counts: 1,4,16 or 0:64:8 or 1:8192:x2 (ends included).",
    "top_k": "Experts per token; the model's own by default.",
    "ep": "Expert-parallel sizes; each rank's slice is one row.",
    "ep_ranks": "Which of those ranks: all, worst (most pairs) or a number.  [default: all]",
    "tp": "Tensor-parallel sizes, sharding the intermediate size in blocks of 32.",
    "tp_ranks": "Which of those ranks: all, worst (largest shard) or a number.  [default: worst]",
    "arch": "Architectures the run is for, such as sm90,sm100; rows of others than this machine's are skipped.",
    "routing": "uniform, balanced, zipf:S, hotspot:SHARE@N or trace:FILE.",
    "backend": "Backends or patterns, such as cutlass*; moebench backends lists them. All but the variants (name@variant) by default.",
    "seed": "Seeds of weights, tokens and routing.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moebench")
def main() -> None:
    """Check and time MoE expert kernels with MXFP4 weights.

    Start with `moebench sweep`: it runs a small plan on this machine, prints a table and leaves a report."""


def _axes(command: click.decorators.FC) -> click.decorators.FC:
    for name, text in reversed(AXIS_HELP.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar="LIST", help=text)(command)
    return command


@main.command()
@_axes
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
    plan = _plan(axes, plan_file, l2)
    console = Console(stderr=as_json, highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}")
    if dry_run:
        _dry_run(plan, _survey(plan, None), console, as_json)
        return
    directory = _run_directory(plan, out, resume)
    run_id = load_manifest(directory).run_id if resume else directory.name if out is None else now_id()
    try:
        known = load_run(directory).records if resume else ()
    except RecordError as error:
        _fail([str(error)], UNREADABLE)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        with console.status("looking at this machine"):
            found = _survey(plan, directory / "logs" / "survey.log")
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
        _fail([f"{error.filename or directory}: {error.strerror or error}; what was written before is intact"], STORAGE)
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


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(as_json: bool) -> None:
    """List every backend, whether it can run here, and what would change that."""
    try:
        listed = registry.names()
        large, small = case("gpt-oss-20b", 1), case("tiny", 1)
        found = survey_machine([Point(case=c, backend=name) for name in listed for c in (large, small)], _plugins(listed))
    except (registry.RegistryError, SweepError) as error:
        _fail([str(error)], USAGE)
    rows = [_backend_row(name, found, large, small) for name in listed]
    if as_json:
        click.echo(json.dumps({"device": {"name": found.device.name, "arch": found.device.arch}, "backends": rows}))
        return
    console = Console(highlight=False)
    console.print(f"{found.device.name} ({found.device.arch})")
    console.print(terminal.backends_table(rows))


@main.command()
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
        _fail(wrong, USAGE)
    console = Console(stderr=as_json, highlight=False)
    states: dict[tuple[str, str], BuildState] = {}
    try:
        with _building(console) as show:
            for news in run_prebuild(backend, archs, jobs, dry_run):
                show(news)
                if isinstance(news, BuildState):
                    states[news.arch, news.module] = news
    except CannotBuild as error:
        _fail([str(error)], USAGE)
    except BuildFailed as error:
        _fail([str(error)], POINTS_FAILED)
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


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["md", "csv"]), default="md", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of stdout.")
def report(runs: tuple[Path, ...], style: str, out: Path | None) -> None:
    """Report on run directories, merged; the newest under runs/ without an argument."""
    try:
        loaded = [load_run(path) for path in runs or (_newest(),)]
    except RecordError as error:
        _fail([str(error)], UNREADABLE)
    for run in loaded:
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    text = _render(loaded, style)
    if out is None:
        click.echo(text, nl=not text.endswith("\n"))
        return
    try:
        out.write_text(text)
    except OSError as error:
        _fail([f"{out}: {error.strerror}"], STORAGE)
    click.echo(str(out))


def _render(runs: list[Run], style: str) -> str:
    from moebench.record import merge

    return markdown.report(runs) if style == "md" else table_csv.rows(merge(runs))


def _plan(axes: dict[str, str | None], plan_file: str | None, l2: Literal["cold", "hot"] | None) -> Plan:
    if plan_file is None and not any(axes.values()):
        plan_file = "quick"
    try:
        return build(axes, plan_file, l2, registry.names(), registry.unknown)
    except PlanError as error:
        _fail(error.errors, USAGE)
    except registry.RegistryError as error:
        _fail([str(error)], USAGE)


def _survey(plan: Plan, log: Path | None) -> Survey:
    try:
        return survey_machine(plan.points, _plugins(plan.backends), log)
    except SweepError as error:
        _fail([str(error)], USAGE)


def _plugins(names: list[str] | tuple[str, ...]) -> set[str]:
    return {name for name in names if registry.source(name) != "moebench"}


def _run_directory(plan: Plan, out: Path | None, resume: bool) -> Path:
    if not resume:
        directory = out or RUNS / now_id()
        if (directory / "run.json").exists():
            _fail([f"{directory} already holds a run; add --resume to go on with it, or choose another --out"], USAGE)
        return directory
    try:
        candidates = [out] if out else sorted((p.parent for p in RUNS.glob("*/run.json")), reverse=True)
        manifests = [(path, load_manifest(path)) for path in candidates]
    except RecordError as error:
        _fail([str(error)], UNREADABLE)
    same = [path for path, manifest in manifests if manifest.plan_hash == plan.hash]
    if same:
        return same[0]
    if out:
        _fail(
            [
                f"{out} holds a run of another plan ({manifests[0][1].plan_hash}, this is {plan.hash}); "
                f"repeat its command: {' '.join(manifests[0][1].command)}"
            ],
            USAGE,
        )
    _fail([f"no run of this plan under {RUNS}/ to resume; name one with --out, or leave --resume out"], USAGE)


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


def _newest() -> Path:
    found = sorted(RUNS.glob("*/run.json"))
    if not found:
        _fail([f"no run under {RUNS}/; make one with moebench sweep, or name a run directory"], USAGE)
    return found[-1].parent


def _fail(errors: list[str], code: int) -> NoReturn:
    for error in errors:
        click.echo(f"error: {error}", err=True)
    sys.exit(code)


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


@contextmanager
def _display(console: Console, total: int, done: int) -> Iterator[_Display]:
    display = _Display(console, total, done)
    if display.progress is None:
        yield display
        return
    with display.progress:
        yield display
