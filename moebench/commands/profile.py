"""`moebench profile`: where the time of one case goes, kernel by kernel."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.text import Text

from moebench.case import Case
from moebench.commands.axes import axis_options, build_plan
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import INTERRUPTED, OK, POINTS_FAILED, STORAGE, UNREADABLE, USAGE, fail
from moebench.journal import RUNS
from moebench.profile import CALLS, Request, Tool, capture, command, load, perfetto, read_ncu, read_nsys, run_tool, view
from moebench.reports import breakdown
from moebench.reports.text import clean
from moebench.timeline import Counters, ProfileError, View, diff, to_json

MOST_CALLS = 1000


@dataclass(kw_only=True)
class Found:
    """What was profiled, and what was not."""

    views: list[View] = field(default_factory=list)
    counters: dict[str, list[Counters]] = field(default_factory=dict)  # backend -> its kernels, from ncu
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@click.command()
@axis_options
@click.option("--tool", type=click.Choice(["nsys", "ncu"]), help="Record with NVIDIA's profiler instead of torch's Kineto.")
@click.option("--print-command", is_flag=True, help="With --tool: print its command line and run nothing.")
@click.option("--calls", type=click.IntRange(1, MOST_CALLS), help="Calls to profile.  [default: 10; 1 for ncu]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where nsys and ncu leave their reports.  [default: runs/profile-<time>]",
)
@click.option(
    "--from-nsys", type=click.Path(path_type=Path), metavar="FILE", help="Read an SQLite export of nsys, of a sweep for instance."
)
@click.option(
    "--load", "loaded", type=click.Path(path_type=Path), multiple=True, metavar="FILE", help="Show a saved profile; may be repeated."
)
@click.option(
    "--diff", "sides", nargs=2, metavar="A B", help="What makes B slower or faster than A: two saved profiles, or two backends of the case."
)
@click.option("--save", type=OutFile(), metavar="FILE", help="Write the profile as JSON, for --load and --diff.")
@click.option("--perfetto", "trace", type=OutFile(), metavar="FILE", help="Write a trace for ui.perfetto.dev.")
@click.option("--figure", type=OutFile(), metavar="FILE", help="Draw the kernels of a call as SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def profile(
    tool: Tool | None,
    print_command: bool,
    calls: int | None,
    out: Path | None,
    from_nsys: Path | None,
    loaded: tuple[Path, ...],
    sides: tuple[str, str] | None,
    save: Path | None,
    trace: Path | None,
    figure: Path | None,
    as_json: bool,
    **axes: str | None,
) -> None:
    """Show where the time of one case goes: phases, kernels, gaps, and how far each GEMM is above its floor.

    Needs nothing beside torch: moebench profile --model gpt-oss-20b --tokens 64 --backend triton_mxfp4_bf16. Several backends are shown
    one after another. Exit status: 0 profiled, by torch where nsys or ncu cannot; 2 a mistake in the options, 3 a backend could not be
    profiled, 5 storage error, 6 unreadable file, 130 interrupted."""
    console = Console(stderr=as_json, highlight=False)
    files = [Path(side) for side in sides or () if Path(side).is_file()]
    _check(axes, tool, print_command, from_nsys, loaded, sides, files)
    try:
        if from_nsys or loaded or len(files) == 2:
            found = _read(from_nsys, [*loaded, *files])
        else:
            case, backends = _case(axes | ({"backend": ",".join(sides)} if sides else {}))
            if sides and set(backends) != set(sides):
                fail([f"--diff compares two backends, and {' '.join(sides)} are {', '.join(backends)}; give two names"], USAGE)
            backends = list(sides) if sides else backends
            if save and len(backends) > 1:
                fail([f"--save writes one profile, and these are {len(backends)} backends; name one with --backend"], USAGE)
            directory = out or RUNS / f"profile-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            requests = [Request(case=case, backend=name, calls=calls or CALLS[tool], tool=tool) for name in backends]
            if tool and print_command:
                for request in requests:
                    click.echo(shlex.join(command(tool, request, directory / request.backend)))
                return
            found = _profile(requests, calls or CALLS[None], directory, Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        sys.exit(INTERRUPTED)
    for shown in found.views:
        console.print(breakdown.table(shown, console.width), "", soft_wrap=False)
    for name, kernels in found.counters.items():
        title = Text.assemble((clean(name), "bold"), "  each kernel alone, by ncu, its L2 emptied before")
        console.print(title, breakdown.counters(kernels), "")
    compared = _compare(found.views, sides, console) if sides else None
    _write(found.views, save, trace, figure, console)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for error in found.errors:
        click.echo(f"error: {error}", err=True)
    code = POINTS_FAILED if found.errors else OK
    if as_json:
        click.echo(json.dumps(_document(found, compared, code), allow_nan=False))
    sys.exit(code)


def _check(
    axes: dict[str, str | None],
    tool: Tool | None,
    print_command: bool,
    from_nsys: Path | None,
    loaded: tuple[Path, ...],
    sides: tuple[str, str] | None,
    files: list[Path],
) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in axes.items() if value]
    reads = from_nsys or loaded or len(files) == 2
    errors = []
    if axes["arch"]:
        errors.append("--arch says what a run is for, and a profile is of this machine; leave it out")
    if print_command and not tool:
        errors.append("--print-command prints the command line of a tool; add --tool nsys or --tool ncu")
    if reads and named:
        errors.append(f"{' and '.join(named)} say what to profile, and the files hold profiles already; leave one of the two out")
    if reads and tool:
        errors.append(f"--tool {tool} records a new profile, and the files hold profiles already; leave one of the two out")
    if sides and (from_nsys or loaded):
        errors.append("--diff names both profiles itself; leave --load and --from-nsys out")
    if sides and tool == "ncu":
        errors.append("--diff compares timelines, and ncu runs kernels one by one; leave --tool out, or take --tool nsys")
    if sides and len(files) == 1:
        errors.append(f"--diff {' '.join(sides)}: {files[0]} is a file and the other is not; name two saved profiles or two backends")
    if sides and not files and axes["backend"]:
        errors.append("--diff names both backends itself; leave --backend out")
    if sides and not files and not named:
        errors.append(
            f"--diff {' '.join(sides)}: no such files; name two saved profiles, or the case beside two backends: "
            f"moebench profile --model gpt-oss-20b --tokens 64 --diff {' '.join(sides)}"
        )
    elif not reads and not named:
        errors.append("which case? moebench profile --model gpt-oss-20b --tokens 64 --backend triton_mxfp4_bf16")
    if errors:
        fail(errors, USAGE)


def _case(axes: dict[str, str | None]) -> tuple[Case, list[str]]:
    plan = build_plan(axes, None)
    cases = list(dict.fromkeys(point.case for point in plan.points))
    if len(cases) != 1:
        differ = ", ".join(case.label for case in cases[:3]) + (", ..." if len(cases) > 3 else "")
        fail(
            [f"these are {len(cases)} cases ({differ}), and profile takes one; give one value to each of --model, --tokens, --ep-ranks"],
            USAGE,
        )
    return cases[0], list(dict.fromkeys(point.backend for point in plan.points))


def _read(from_nsys: Path | None, files: Sequence[Path]) -> Found:
    try:
        return Found(views=[view(profile) for profile in [*(read_nsys(from_nsys) if from_nsys else []), *map(load, files)]])
    except ProfileError as error:
        fail([str(error)], UNREADABLE)


def _profile(requests: Sequence[Request], calls: int, directory: Path, console: Console) -> Found:
    """One process after another. A tool that cannot is told of, and torch's profiler takes its place."""
    found = Found()
    for request in requests:
        if request.tool:
            try:
                with console.status(f"{request.backend}: recording with {request.tool}"):
                    _record(request, request.tool, directory, found)
                continue
            except ProfileError as error:
                found.notes.append(f"{error}; profiled with torch's own profiler instead")
            except OSError as error:
                _storage(error, directory)
        with tempfile.TemporaryDirectory() as scratch, console.status(request.backend) as status:
            kineto = replace(request, calls=calls, tool=None)
            try:
                for step in capture(kineto, Path(scratch) / "log"):
                    if isinstance(step, str):
                        status.update(f"{request.backend}: {step}")
                    else:
                        found.views.append(view(step))
            except ProfileError as error:
                found.errors.append(f"{request.backend}: {error}")
    return found


def _record(request: Request, tool: Tool, directory: Path, found: Found) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    left = run_tool(tool, request, directory / request.backend)
    if tool == "ncu":
        found.counters[request.backend] = read_ncu(left)
        found.notes.append(f"the whole report: ncu-ui {left}")
    else:
        found.views += [view(profile) for profile in read_nsys(left)]
        found.notes.append(f"the whole timeline: nsys-ui {left.with_suffix('.nsys-rep')}")


def _compare(views: Sequence[View], sides: tuple[str, str], console: Console) -> dict[str, object] | None:
    if len(views) != 2:
        return None  # what is missing is among the errors
    changes = diff(views[0].breakdown, views[1].breakdown)
    console.print(breakdown.difference(views[0], views[1], changes))
    delta_us = views[1].breakdown.span_us - views[0].breakdown.span_us
    rows = [asdict(change) | {"what": change.what, "delta_us": change.delta_us} for change in changes]
    return {"before": sides[0], "after": sides[1], "delta_us": delta_us, "changes": rows}


def _write(views: Sequence[View], save: Path | None, trace: Path | None, figure: Path | None, console: Console) -> None:
    if not views:
        return
    texts: list[tuple[Path | None, Callable[[], str]]] = [
        (save, lambda: to_json(views[0].profile) + "\n"),
        (trace, lambda: perfetto(views) + "\n"),
        (figure, lambda: breakdown.figure(views)),
    ]
    for path, text in texts:
        if path:
            try:
                path.write_text(text(), encoding="utf-8")
            except OSError as error:
                _storage(error, path)
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _storage(error: OSError, path: Path) -> NoReturn:
    fail([f"{error.filename or path}: {error.strerror or error}"], STORAGE)


def _document(found: Found, compared: dict[str, object] | None, code: int) -> dict[str, object]:
    kernels = {name: [asdict(one) for one in counters] for name, counters in found.counters.items()}
    profiles = [_row(shown) for shown in found.views]
    return {"profiles": profiles, "counters": kernels, "diff": compared, "notes": found.notes, "errors": found.errors, "exit_code": code}


def _row(shown: View) -> dict[str, object]:
    profile, found = shown.profile, shown.breakdown
    phases = []
    for phase, us in found.phases_us.items():
        least = shown.floors.get(phase)
        over = {"floor_us": least.us, "limiter": least.limiter, "over": us / least.us} if least else {}
        phases.append({"phase": phase, "us": us, "share": us / found.span_us if found.span_us else 0.0, **over})
    return {
        "case": profile.case.key,
        "backend": profile.backend,
        "device": asdict(profile.device),
        "source": profile.source,
        "launch": profile.launch,
        "calls": len(profile.calls),
        "span_us": found.span_us,
        "spans_us": found.spans_us,
        "untraced_us": profile.untraced_us,
        "phases": phases,
        "gaps_us": found.gaps_us,
        "overlap_us": found.overlap_us,
        "coverage": found.coverage,
        "kernels": [asdict(part) for part in found.parts],
        "roof": shown.roof,
        "notes": profile.notes,
    }
