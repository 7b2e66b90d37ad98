"""Two installations measured in turns: rounds in random ABBA order, each a sweep of its own by its own interpreter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

from moebench.compare import Key
from moebench.journal import Run, load_run, merge
from moebench.record import Manifest, RecordError
from moebench.verdict import Judgement, Options, Verdict, judge

Arm = Literal["base", "cand", "control"]
FIRST_ROUNDS, AGAIN_ROUNDS = 6, 12  # find 3 % in one of 60 cells in more than 90 % of simulated runs with an H200's noise
FINISHED = (0, 3)  # exit statuses of a sweep that has a result for every point, right or wrong


class ArmError(Exception):
    """An arm's sweep that did not end as it should; the message names its command."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One arm's sweep in one round."""

    arm: Arm
    round: int
    python: str
    directory: Path

    def command(self, sweep_options: Sequence[str]) -> list[str]:
        # -P: a checkout in the working directory would be imported by both arms, and compared with itself.
        return [self.python, "-P", "-m", "moebench", "sweep", *sweep_options, "--rounds", "1", "--resume", "--out", str(self.directory)]


def turns(directory: Path, pythons: tuple[str, str], rounds: int, seed: int) -> Iterator[Turn]:
    """The order of a stage. Base and candidate swap their places from one round to the next, which of them begins is drawn for every
    two rounds, and the base once more, the control, is before or after both."""
    order = Random(seed)
    for number, swapped in enumerate(swaps(rounds, order)):
        arms: list[Arm] = ["cand", "base"] if swapped else ["base", "cand"]
        arms.insert(order.choice((0, 2)), "control")
        for arm in arms:
            python = pythons[1] if arm == "cand" else pythons[0]
            yield Turn(arm=arm, round=number, python=python, directory=directory / f"{number:03}-{arm}")


def swaps(rounds: int, order: Random) -> Iterator[bool]:
    """Whether the candidate goes before the base, round by round."""
    swapped = False
    for number in range(rounds):
        swapped = order.random() < 0.5 if number % 2 == 0 else not swapped
        yield swapped


def take(turn: Turn, sweep_options: Sequence[str]) -> None:
    """Run it; what was finished before is left alone. Raises ArmError or KeyboardInterrupt."""
    command = turn.command(sweep_options)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # as -P
    turn.directory.parent.mkdir(parents=True, exist_ok=True)
    with turn.directory.with_suffix(".log").open("ab") as log:
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False).returncode
        except OSError as error:
            raise ArmError(f"{turn.python}: {error.strerror}; give the python of a virtual environment with moebench in it") from None
    if code == 130:
        raise KeyboardInterrupt
    if code not in FINISHED:
        last = turn.directory.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
        raise ArmError(f"{' '.join(command)} ended with exit status {code}{': ' + last[0] if last else ''}")


def collect(taken: Iterable[Turn], arm: Arm) -> Run:
    """All rounds of an arm as one run. Raises RecordError."""
    own = [turn for turn in taken if turn.arm == arm]
    runs = [load_run(turn.directory) for turn in own]
    records = [replace(record, round=turn.round) for turn, run in zip(own, runs, strict=True) for record in merge([run])]
    path = own[0].directory.parent / arm
    return Run(path=path, manifest=_manifest(runs, path), records=tuple(replace(record, run_id=arm) for record in records))


def open_cells(found: Judgement) -> list[Verdict]:
    """What the first look leaves open and a second can decide: suspects by the numbers, not what is broken or missing."""
    return [
        verdict for verdict in found.verdicts if verdict.ratio and (not verdict.clears or verdict.ratio - 1 >= (verdict.threshold or 0) / 2)
    ]


def decide(first: Judgement, second: Judgement | None) -> Judgement:
    """The second look's word on the cells it looked at, the first's on all others."""
    if second is None:
        return first
    again = {_key(verdict): verdict for verdict in second.verdicts}
    kept = [verdict for verdict in first.verdicts if _key(verdict) not in again]
    merged = replace(second, verdicts=(*second.verdicts, *kept), reasons=tuple(dict.fromkeys((*first.reasons, *second.reasons))))
    return replace(merged, notes=tuple(dict.fromkeys((*first.notes, *second.notes))))


def judged(taken: Sequence[Turn], options: Options) -> Judgement:
    base, candidate, control = (collect(taken, arm) for arm in ("base", "cand", "control"))
    return judge(base, candidate, options, control=control)


def plan_of(cells: Iterable[Verdict]) -> str:
    """A plan in TOML of these cells alone."""
    tables = []
    for verdict in cells:
        case = verdict.case
        told: dict[str, str | int] = {
            "model": case.model,
            "tokens": case.num_tokens,
            "top_k": case.top_k,
            "ep": case.ep_size,
            "ep_ranks": case.ep_rank,
            "tp": case.tp_size,
            "tp_ranks": case.tp_rank,
            "routing": case.routing,
            "seed": case.seed,
            "backend": verdict.backend,
        }
        lines = [f"{name} = {_toml(value)}" for name, value in told.items()]
        tables.append("\n".join(["[[sweep]]", *lines]))
    return "\n\n".join(tables) + "\n"


def _key(verdict: Verdict) -> Key:
    return verdict.case, verdict.backend, verdict.scope


def _toml(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _manifest(runs: Sequence[Run], path: Path) -> Manifest:
    """Of the first round. Raises RecordError where the rounds were not measured by the same installation."""
    for run in runs[1:]:
        if run.manifest.versions != runs[0].manifest.versions or run.manifest.device != runs[0].manifest.device:
            raise RecordError(f"{run.path} and {runs[0].path} differ in device or versions; start again with another --out")
    return replace(runs[0].manifest, run_id=path.name)
