"""Prints the table of docs/ci.md, and how long a gate over 1,000 cells and 12 rounds takes: python tests/bench_gate.py."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moebench.gate_simulation import survey  # noqa: E402
from moebench.journal import Run, load_run  # noqa: E402
from moebench.verdict import judge  # noqa: E402
from tests import rounds  # noqa: E402

CELLS, ROUNDS = 1000, 12


def table() -> None:
    for noise, slowdown, rates in survey():
        found = f"{rates.found:.1%}" if slowdown else ""
        shares = (found, f"{rates.false_alarm:.1%}", f"{rates.green:.1%}", f"{rates.no_verdict:.1%}")
        row = (noise.name, f"{100 * slowdown:g} %" if slowdown else "none", *(share.replace("%", " %") for share in shares))
        sys.stdout.write("| " + " | ".join(row) + " |\n")


def made(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    rounds.run(path, rounds.rows(CELLS, ROUNDS, lambda c, n: (50 + c) * draw.gauss(1, 0.002), run_id=path.name, samples=60))
    return path


def seconds_of_a_gate(home: Path) -> None:
    paths = made(home / "base", 1), made(home / "candidate", 2)
    start = time.perf_counter(), time.process_time()
    runs: list[Run] = [load_run(path) for path in paths]
    loaded = time.perf_counter(), time.process_time()
    judge(*runs)
    judged = time.perf_counter(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from moebench.commands.gate import gate; gate()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, check=False
    ).returncode
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    load, judging = (f"{b[0] - a[0]:.2f} s ({b[1] - a[1]:.2f} of CPU)" for a, b in ((start, loaded), (loaded, judged)))
    sys.stdout.write(f"{CELLS} cells, {ROUNDS} rounds, {2 * CELLS * ROUNDS} records: {load} to load two runs, {judging} to judge, ")
    sys.stdout.write(f"{ended - judged[0]:.2f} s ({cpu_s:.2f} of CPU) for the command (exit status {done})\n")


if __name__ == "__main__":
    table()
    with tempfile.TemporaryDirectory() as directory:
        seconds_of_a_gate(Path(directory))
