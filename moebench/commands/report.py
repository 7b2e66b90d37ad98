"""`moebench report`: tables, pages and figures from recorded runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from moebench.case import did_you_mean
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import STORAGE, UNREADABLE, USAGE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.journal import RUNS, Run, is_torn, load_manifest, load_run, merge, whole_journal
from moebench.parts import made_of
from moebench.record import RecordError
from moebench.reports import json_rows, markdown, table_csv
from moebench.reports.digest import Overview, digest, overview, overview_of

FORMATS = ("html", "md", "csv", "json")
TABLES = ("csv", "json")  # of all records


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(FORMATS), help="What to write.  [default: by the ending of --out, else md]")
@click.option("--out", type=OutFile(), help="Write to this file instead of stdout.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Also write every figure here: NAME.png and NAME-dark.png.")
@click.option(
    "--baseline",
    metavar="BACKEND",
    help="What speed-ups are over.  [default: torch where it was timed, else what was at the most token counts]",
)
@click.option(
    "--figures", type=click.IntRange(min=0), default=12, show_default=True, help="At most so many on an html page; --plots has no limit."
)
@uncollected()
def report(runs: tuple[Path, ...], style: str | None, out: Path | None, plots: Path | None, baseline: str | None, figures: int) -> None:
    """Report on run directories, merged; the newest under runs/ without an argument.

    An html report is one page that needs nothing else: no server, no network."""
    paths = runs or (_newest(),)
    ending = out.suffix.lower().removeprefix(".") if out else ""
    style = style or (ending if ending in FORMATS else "md")
    loaded: list[Run] = []
    found: Overview | None = None  # a table of all records alone needs none
    try:
        if style not in TABLES:
            found = overview(*made_of(paths, digest, keep=kept))
        elif plots is None and baseline is None and out is not None and _by_many(paths, style, out):
            click.echo(str(out))
            return
        else:
            loaded = kept([load_run(path) for path in paths])
            found = overview_of(loaded) if plots is not None or baseline is not None else None
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    except OSError as error:
        fail([f"{error.filename or out}: {error.strerror}"], STORAGE)
    for run in found.runs if found else loaded:
        _note_torn(run.path, run.torn)
    if found and baseline is not None:
        _check_baseline(found, baseline)
    try:
        if found and plots is not None:
            for path in _draw(found, plots, baseline):
                click.echo(f"figure: {path}", err=True)
        _write([_page(found, style, baseline, figures)] if found and not loaded else _table(loaded, style), out)
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    except OSError as error:
        fail([f"{error.filename}: {error.strerror}"], STORAGE)
    if out is not None:
        click.echo(str(out))


def _check_baseline(found: Overview, baseline: str) -> None:
    known = [name for name, _ in found.digest.backends.in_order()]
    if baseline not in known:
        there = f"these runs have {', '.join(known)}" if known else "these runs have no records"
        fail([f"--baseline {baseline!r} is in no record{did_you_mean(baseline, known)}; {there}"], USAGE)


def _by_many(paths: Sequence[Path], style: str, out: Path) -> bool:
    """Whether a table of all records of large journals was written by several processes."""
    if out.exists() and not out.is_file():  # a pipe has no places to write to
        return False
    runs = [(load_manifest(path), whole_journal(path)) for path in paths]
    journals = [journal for _, journal in runs]
    if not (table_csv.write(journals, out) if style == "csv" else json_rows.write(runs, out)):
        return False
    for journal in journals:
        _note_torn(journal.path, is_torn(journal))
    return True


def _note_torn(path: Path, torn: bool) -> None:
    if torn:
        click.echo(f"note: {path}: the journal's last line was cut off and is left out", err=True)


def _page(found: Overview, style: str, baseline: str | None, most_figures: int) -> str:
    if style == "html":
        from moebench.reports.page import page_of

        return page_of(found, baseline=baseline, most_figures=most_figures)
    return markdown.report_of(found, baseline)


def _table(runs: list[Run], style: str) -> Iterable[str]:
    """In parts: of 100,000 rows it is a gigabyte."""
    return json_rows.parts(runs) if style == "json" else table_csv.lines(merge(runs))


def _write(parts: Iterable[str], out: Path | None) -> None:
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        return
    last = ""
    for last in parts:
        click.echo(last, nl=False)
    if not last.endswith("\n"):
        click.echo()


def _draw(found: Overview, directory: Path, baseline: str | None) -> list[Path]:
    from moebench.reports.figures import album_of
    from moebench.reports.render import png

    directory.mkdir(parents=True, exist_ok=True)
    drawn = album_of(found.layers.shown, found.digest.shares, baseline)
    return [path for figure in drawn.figures for path in png(figure, directory)]


def _newest() -> Path:
    found = sorted(RUNS.glob("*/run.json"))
    if not found:
        fail([f"no run under {RUNS}/; make one with moebench sweep, or name a run directory"], USAGE)
    return found[-1].parent
