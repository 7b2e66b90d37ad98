"""`moebench gate`: whether a candidate may replace its base."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from moebench.baselines import BaselineError, is_baseline, is_store, load, matching
from moebench.commands.out_file import OutFile
from moebench.commands.outcome import NO_VERDICT, OK, REGRESSION, STORAGE, UNREADABLE, USAGE, fail
from moebench.commands.uncollected import kept, uncollected
from moebench.flags import FLAGS
from moebench.gate import Rule
from moebench.journal import Run, load_run
from moebench.record import RecordError
from moebench.reports import verdicts as pages
from moebench.verdict import Answer, Judgement, Options, Stored, judge

CODES: dict[Answer, int] = {"pass": OK, "fail": REGRESSION, "none": NO_VERDICT}


def rule_options(command: click.decorators.FC) -> click.decorators.FC:
    """What a change has to look like, the same for gate and ab."""
    rule = Rule()
    options = (
        click.option(
            "--threshold",
            type=click.FloatRange(0, 100, min_open=True, max_open=True),
            default=100 * rule.threshold,
            show_default=True,
            metavar="PERCENT",
            help="A slowdown that green rules out.",
        ),
        click.option(
            "--ignore",
            type=click.FloatRange(0, 100, max_open=True),
            default=100 * rule.ignore,
            show_default=True,
            metavar="PERCENT",
            help="A slowdown that is never red; red is estimated above halfway to the threshold.",
        ),
        click.option("--strict", is_flag=True, help="Another kernel, tactic or workspace is red as well."),
        click.option("--allow-missing", is_flag=True, help="A cell that only one side has does not keep the gate from being green."),
        click.option(
            "--allow-flag",
            "flags",
            multiple=True,
            type=click.Choice(tuple(FLAGS)),
            help="Use rows with this flag all the same; may be repeated.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def output_options(command: click.decorators.FC) -> click.decorators.FC:
    files = OutFile()
    options = (
        click.option("--format", "style", type=click.Choice(["table", "json", "md"]), default="table", show_default=True),
        click.option("--json-out", type=files, metavar="FILE", help="Write JSON as well."),
        click.option("--junit", type=files, metavar="FILE", help="Write JUnit XML as well."),
        click.option("--comment", type=files, metavar="FILE", help="Write Markdown as well, short enough for a GitHub comment."),
        click.option("--summary", type=files, metavar="FILE", help='Append Markdown to this file: "$GITHUB_STEP_SUMMARY".'),
        click.option("--annotate", is_flag=True, help="Print GitHub annotations on stderr."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--control", type=click.Path(path_type=Path), metavar="RUN", help="The base measured once more: how far it is from itself is noise."
)
@click.option("--trust-stored", is_flag=True, help="Let a stored baseline fail a change, by the band its own jobs calibrate.")
@rule_options
@output_options
@uncollected()
def gate(
    base: Path,
    candidate: Path,
    control: Path | None,
    trust_stored: bool,
    threshold: float,
    ignore: float,
    strict: bool,
    allow_missing: bool,
    flags: tuple[str, ...],
    style: str,
    json_out: Path | None,
    junit: Path | None,
    comment: Path | None,
    summary: Path | None,
    annotate: bool,
) -> None:
    """Say whether CANDIDATE is slower than BASE or broken, cell by cell, or that nobody can say.

    Both are runs of several rounds (moebench sweep --rounds 12); BASE may be a stored baseline, or a directory of them. A cell is a
    case and a backend. Exit status: 0 no cell is slower by its threshold, 1 a cell is slower or broken, 2 a mistake in the options,
    4 no verdict, 5 storage error, 6 unreadable run."""
    options = options_of(threshold, ignore, strict, allow_missing, flags)
    try:
        new = kept(load_run(candidate))
        stored: Stored | None = None
        if is_store(base):
            base = matching(base, new)
        if is_baseline(base):
            stored = load(base).stored(str(base), trust_stored)
        elif trust_stored:
            fail([f"--trust-stored is about stored baselines, and {base} is none (moebench baseline list)"], USAGE)
        old, again = kept((load_run(base), load_run(control) if control else None))
    except RecordError as error:
        fail([str(error)], UNREADABLE)
    except BaselineError as error:
        fail([str(error)], NO_VERDICT)
    for run in (old, new, *([again] if again else [])):
        if run.torn:
            click.echo(f"note: {run.path}: the journal's last line was cut off and is left out", err=True)
    found = judge(old, new, options, control=again, stored=stored)
    tell(found, (old, new), style, json_out=json_out, junit=junit, comment=comment, summary=summary, annotate=annotate)


def options_of(threshold: float, ignore: float, strict: bool, allow_missing: bool, flags: tuple[str, ...]) -> Options:
    try:
        rule = Rule(threshold=threshold / 100, ignore=ignore / 100)
    except ValueError:
        fail([f"--threshold {threshold:g} --ignore {ignore:g}: the threshold must be above what is ignored"], USAGE)
    return Options(rule=rule, strict=strict, allow_missing=allow_missing, allowed_flags=frozenset(flags))


def tell(
    found: Judgement,
    runs: tuple[Run, Run],
    style: str,
    *,
    json_out: Path | None,
    junit: Path | None,
    comment: Path | None,
    summary: Path | None,
    annotate: bool,
    pythons: tuple[str, str] | None = None,
) -> None:
    """Everywhere it is wanted; ends the program with the answer's exit status."""
    names = str(runs[0].path), str(runs[1].path)
    code = CODES[found.answer]
    if style == "json":
        click.echo(pages.to_json(found, names, code))
    elif style == "md":
        click.echo(pages.markdown(found, names, pages.SUMMARY_BYTES), nl=False)
    else:
        console = Console(highlight=False)
        console.print(pages.table(found, names))
        if commands := pages.explain(found, pythons):
            click.echo("\nwhat makes it slower, kernel by kernel:")
            click.echo("\n".join(f"  {line}" for line in commands))
        console.print()
        console.print(pages.answer(found), soft_wrap=True)
    if annotate:
        for line in pages.workflow_commands(found):
            click.echo(line, err=True)
    try:
        if json_out:
            json_out.write_text(pages.to_json(found, names, code) + "\n", encoding="utf-8")
        if junit:
            junit.write_bytes(pages.junit(found, f"{names[1]} against {names[0]}"))
        if comment:
            comment.write_text(pages.markdown(found, names), encoding="utf-8")
        if summary:
            with summary.open("a", encoding="utf-8") as file:
                file.write(pages.markdown(found, names, pages.SUMMARY_BYTES))
    except OSError as error:
        fail([f"{error.filename}: {error.strerror}"], STORAGE)
    sys.exit(code)
