"""Prints how long a gate over 1,000 cells and 12 rounds takes; with --table also that of docs/ci.md: python tests/bench_gate.py."""

from __future__ import annotations

import gc
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
from moebench.journal import JOURNAL, Run, load_run  # noqa: E402
from moebench.verdict import judge  # noqa: E402
from tests import rounds  # noqa: E402
from tests.bench_compare import say, told  # noqa: E402

CELLS, ROUNDS = 1000, 12
TARGET_S = 3.0
IMPORTED = 77  # an exit status that no command has
COMMAND = f"""
import sys
from moebench.commands.gate import gate
try:
    gate()
finally:
    if "torch" in sys.modules:
        sys.exit({IMPORTED})
"""


def table() -> None:
    for noise, slowdown, rates in survey():
        found = f"{rates.found:.1%}" if slowdown else ""
        shares = (found, f"{rates.false_alarm:.1%}", f"{rates.green:.1%}", f"{rates.no_verdict:.1%}")
        row = (noise.name, f"{100 * slowdown:g} %" if slowdown else "none", *(share.replace("%", " %") for share in shares))
        say("| " + " | ".join(row) + " |")


def made(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    rounds.run(path, rounds.rows(CELLS, ROUNDS, lambda c, n: (50 + c) * draw.gauss(1, 0.002), run_id=path.name, samples=60))
    return path


def seconds_of_a_gate(home: Path) -> None:
    paths = made(home / "base", 1), made(home / "candidate", 2)
    count = 2 * CELLS * ROUNDS
    say(f"{CELLS} cells, {ROUNDS} rounds, {count} records, {sum((path / JOURNAL).stat().st_size for path in paths) / 1e6:.0f} MB")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, paths)], cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, check=False
    )
    wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    say(f"  gate, start of Python included {told(wall_s, cpu_s, count, TARGET_S)}")
    say(f"  exit status {done.returncode}, torch {'was' if done.returncode == IMPORTED else 'was not'} imported")
    gc.disable()  # as the command does
    start = time.perf_counter(), time.process_time()
    runs: list[Run] = [load_run(path) for path in paths]
    loaded = time.perf_counter(), time.process_time()
    judge(*runs)
    judged = time.perf_counter(), time.process_time()
    for what, (a, b) in {"load two runs": (start, loaded), "judge": (loaded, judged)}.items():
        say(f"  {what:<30} {told(b[0] - a[0], b[1] - a[1], count)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        table()
    with tempfile.TemporaryDirectory() as directory:
        seconds_of_a_gate(Path(directory))
