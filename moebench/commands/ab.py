"""`moebench ab`: measure two installations in turns, and let the gate decide."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from moebench.ab import AGAIN_ROUNDS, FIRST_ROUNDS, ArmError, Turn, collect, decide, judged, open_cells, plan_of, take, turns
from moebench.commands.axes import axis_options
from moebench.commands.gate import options_of, output_options, rule_options, tell
from moebench.commands.outcome import INTERRUPTED, NO_VERDICT, STORAGE, UNREADABLE, USAGE, fail
from moebench.gate import Rule
from moebench.journal import RUNS
from moebench.record import SCOPES, RecordError
from moebench.reports.text import clean, count
from moebench.sweep import now_id

LEAST_ROUNDS = Rule().least_rounds


@click.command()
@click.argument("plan", required=False)
@click.option("--base", required=True, metavar="PYTHON", help="Interpreter of the base's virtual environment.")
@click.option("--cand", required=True, metavar="PYTHON", help="Interpreter of the candidate's.")
@axis_options
@click.option("--scope", type=click.Choice(SCOPES), help="From ids and weights, or from router logits.  [default: experts]")
@click.option("--first", type=click.IntRange(LEAST_ROUNDS, 100), default=FIRST_ROUNDS, show_default=True, help="Rounds over all cells.")
@click.option(
    "--again",
    type=click.IntRange(LEAST_ROUNDS, 100),
    default=AGAIN_ROUNDS,
    show_default=True,
    help="Fresh rounds over what those leave open.",
)
@click.option("--order-seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True, help="Of the order of the turns.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where all sweeps go; one that exists is gone on with.")
@rule_options
@output_options
def ab(
    plan: str | None,
    base: str,
    cand: str,
    scope: str | None,
    first: int,
    again: int,
    order_seed: int,
    out: Path | None,
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
    **axes: str | None,
) -> None:
    """Measure two installations on this GPU in turns, and say whether the candidate is slower or broken.

    PLAN is a shipped plan or a TOML file, or the axes are given as for sweep. Each turn is a sweep in fresh processes; the base has
    two turns a round, so that how far it is from itself is known. A first look goes over all cells, a second one with fresh rounds over
    those it leaves open, and alone decides on them. Exit status as for gate, and 130 interrupted."""
    options = options_of(threshold, ignore, strict, allow_missing, flags)
    pythons = _interpreter("--base", base), _interpreter("--cand", cand)
    directory = out or RUNS / f"ab-{now_id()}"
    given = [word for name, value in axes.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    scoped = ["--scope", scope] if scope else []
    console = Console(stderr=True, highlight=False)
    try:
        taken = _stage(console, directory / "first", pythons, first, order_seed, [*(["--plan", plan] if plan else []), *given, *scoped])
        found = judged(taken, options)
        if left := open_cells(found):
            file = directory / "again.toml"
            file.write_text(plan_of(left), encoding="utf-8")
            console.print(f"{count(len(left), 'cell')} of {len(found.verdicts)} again, in fresh rounds", markup=False)
            more = _stage(console, directory / "again", pythons, again, order_seed + 1, ["--plan", str(file), *scoped])
            found = decide(found, judged(more, options))
        runs = collect(taken, "base"), collect(taken, "cand")
    except KeyboardInterrupt:
        words = [*sys.argv[1:], *(["--out", str(directory)] if out is None else [])]
        console.print(f"\ninterrupted; go on with: moebench {shlex.join(words)}", soft_wrap=True, markup=False)
        sys.exit(INTERRUPTED)
    except ArmError as error:
        fail([clean(str(error))], NO_VERDICT)
    except RecordError as error:
        fail([clean(str(error))], UNREADABLE)
    except OSError as error:
        fail([f"{error.filename or directory}: {error.strerror or error}"], STORAGE)
    tell(found, runs, style, json_out=json_out, junit=junit, comment=comment, summary=summary, annotate=annotate, pythons=pythons)


def _interpreter(option: str, name: str) -> str:
    found = shutil.which(name)
    if found is None:
        fail([f"{option} {name}: no such program; give the python of a virtual environment, such as .venv-base/bin/python"], USAGE)
    return str(Path(found).absolute())


def _stage(console: Console, directory: Path, pythons: tuple[str, str], rounds: int, seed: int, sweep_options: Sequence[str]) -> list[Turn]:
    order = list(turns(directory, pythons, rounds, seed))
    for number, turn in enumerate(order, 1):
        console.print(f"{directory.name} {number} of {len(order)}: round {turn.round} {turn.arm}", markup=False)
        take(turn, sweep_options)
    return order
