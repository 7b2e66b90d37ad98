"""`moebench compile`: what a compiler makes of a backend's own kernels, for GPUs that need not be here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from moebench import registry
from moebench.case import did_you_mean
from moebench.child import Halt, spawn
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import OK, POINTS_FAILED, REGRESSION, STORAGE, UNREADABLE, USAGE, fail
from moebench.compiled import Compiled, from_dict, to_dict, unjudged, worse
from moebench.compiling import COMPILE_S
from moebench.plan import ARCHS
from moebench.reports.compiled_kernels import compiled_tables
from moebench.reports.text import clean, count, listed

DEADLINES_S = {"compile": COMPILE_S, "interrupt": 0.0}


@click.command()
@click.argument("backend")
@click.option("--arch", default="sm90,sm100", show_default=True, metavar="LIST", help="Architectures.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Keep the cubins in this directory.")
@click.option(
    "--against", type=click.Path(path_type=Path, dir_okay=False), help="A document of an earlier --json: name every kernel that got worse."
)
@click.option("--log", type=OutFile(), help="Keep what the compilers print in this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout; everything else goes to stderr.")
def compile(backend: str, arch: str, out: Path | None, against: Path | None, log: Path | None, as_json: bool) -> None:
    """Compile every configuration that BACKEND ships, without a GPU, and say what each needs.

    Registers, stack and spills of a thread, shared memory of a block, tensor-core instructions and the length of the main loop. A
    backend that runs a vendor's kernels is refused with the command that compiles those. Exit status: 0 compiled, 1 something is
    worse than in --against, 2 nothing was compiled and why, 3 a kernel does not compile, 5 --out cannot be written, 6 --against
    cannot be read, 130 interrupted."""
    archs = list(dict.fromkeys(word.strip() for word in arch.split(",")))
    try:
        wrong = [] if backend in registry.names() else [registry.unknown(backend)]
    except registry.RegistryError as error:
        wrong = [str(error)]
    wrong += [
        f"unknown architecture {name!r}{did_you_mean(name, ARCHS)} (known: {', '.join(ARCHS)})" for name in archs if name not in ARCHS
    ]
    if wrong:
        fail(wrong, USAGE)
    stored = _stored(against) if against else None
    console = Console(stderr=as_json, highlight=False)
    rows: list[Compiled] = []
    kept: list[str] = []
    cannot: list[str] = []
    failed: list[str] = []
    unwritten: list[str] = []
    request = {"backend": backend, "archs": ",".join(archs), "out": str(out.resolve()) if out else ""}
    with Halt(patient=True) as halt, spawn("moebench.compiling", request, DEADLINES_S, log) as child:
        for frame in child.frames(halt):
            if "compiled" in frame:
                rows.append(from_dict(frame["compiled"], "what the child sent"))
                kept.append(str(frame["cubin"]))
                if console.is_terminal:
                    console.print(clean(f"{rows[-1].arch} {rows[-1].kernel} {rows[-1].config}"), markup=False, style="dim")
            for key, sentences in (("cannot", cannot), ("failed", failed), ("unwritten", unwritten)):
                if key in frame:
                    sentences.append(f"{frame['arch']}: {frame[key]}")
    if child.interrupted and halt.signal:
        console.print(f"interrupted after {count(len(rows), 'kernel')}")
        sys.exit(halt.exit_code)
    if child.failure:
        failed.append(f"{child.failure.status}: {child.failure.reason}{child.last_words()}")
    if rows:
        console.print(compiled_tables(rows))
    for sentence in dict.fromkeys((*cannot, *failed, *unwritten)):
        console.print(clean(sentence), markup=False, soft_wrap=True)
    if out and rows:
        _say_kept(console, out, kept)
    problems = list(worse(stored, rows)) if stored is not None else []
    missing = unjudged(stored, rows) if stored is not None else []
    if missing:
        console.print(clean(f"no stored numbers for {listed(missing)}"), markup=False, soft_wrap=True)
    for problem in problems:
        console.print(clean(f"worse: {problem}"), markup=False, soft_wrap=True)
    code = STORAGE if unwritten else POINTS_FAILED if failed else USAGE if not rows else REGRESSION if problems else OK
    if as_json:
        told = {"cannot": cannot, "failed": failed + unwritten, "worse": problems, "exit_code": code}
        click.echo(json.dumps({"backend": backend, "kernels": [to_dict(row) for row in rows], **told}, indent=1))
    sys.exit(code)


def _stored(path: Path) -> list[Compiled]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not isinstance(document.get("kernels"), list):
            fail([f"{path} is no document of moebench compile --json"], UNREADABLE)
        return [from_dict(row, f"{path}: kernel {number}") for number, row in enumerate(document["kernels"])]
    except OSError as error:
        fail([f"{path} cannot be read: {error.strerror}"], UNREADABLE)
    except (ValueError, RecursionError) as error:
        fail([f"{path}: {error}" if str(path) not in str(error) else str(error)], UNREADABLE)


def _say_kept(console: Console, out: Path, kept: list[str]) -> None:
    written = sum(1 for path in kept if path)
    console.print(clean(f"{count(written, 'cubin')} in {out}"), markup=False, soft_wrap=True)
    if written < len(kept):
        console.print(f"{count(len(kept) - written, 'kernel')} without one: the backend does not give it", soft_wrap=True)
