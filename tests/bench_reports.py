"""Prints how long reports, compare and policy take for 1,000 and for 100,000 records: python tests/bench_reports.py [RECORDS ...]."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moebench.journal import load_run, merge  # noqa: E402
from moebench.reports import figures, json_rows, markdown, render, table_csv  # noqa: E402
from moebench.reports.markup import Html  # noqa: E402
from moebench.reports.page import page  # noqa: E402
from tests.bench_compare import BACKENDS, KERNELS, TOKENS, called, say, told, write  # noqa: E402
from tests.full_records import full  # noqa: E402


def records(count):
    """Every field that a row of a GPU has: 9 KB of them, 60 samples a row; a layer for each seed."""
    for number in range(count):
        rest, backend = divmod(number, len(BACKENDS))
        seed, tokens = divmod(rest, len(TOKENS))
        median_us = (50 + TOKENS[tokens] / 4) * (1 + backend / 20)
        yield full(BACKENDS[backend], TOKENS[tokens], median_us, how={"samples": 61}, record={"kernels": KERNELS}, seed=seed)


def took(what, count, call):
    started, used = time.perf_counter(), time.process_time()
    made = call()
    say(f"    {what:<24} {told(time.perf_counter() - started, time.process_time() - used, count)}")
    return made


def bench(count):
    with tempfile.TemporaryDirectory() as directory:
        run = write(Path(directory) / "run", records(count))
        base, candidate = (write(Path(directory) / name, records(count // 2)) for name in ("base", "candidate"))
        say(f"{count} records, {(run / 'journal.jsonl').stat().st_size / 1e6:.1f} MB of journal")
        say("  commands, start of Python and reading included")
        for ending in ("md", "html", "csv", "json"):
            say(f"    {f'report --format {ending}':<24} {called(count, 'report', run, '--out', f'{directory}/report.{ending}')}")
        say(f"    {'policy':<24} {called(count, 'policy', run)}")
        say(f"    {'compare':<24} {called(count, 'compare', base, candidate)}")
        say(f"    page of {Path(f'{directory}/report.html').stat().st_size / 1e6:.1f} MB")
        gc.disable()  # as the commands do while they have records
        say("  of that")
        runs = [took("load", count, lambda: load_run(run))]
        found = took("merge", count, lambda: merge(runs))
        took("markdown", count, lambda: markdown.report(runs))
        took("html", count, lambda: page(runs))
        took("html without figures", count, lambda: page(runs, draw=lambda figure: Html("")))
        took("csv", count, lambda: sum(map(len, table_csv.lines(found))))
        took("json", count, lambda: sum(map(len, json_rows.parts(runs))))
        first, *_ = figures.album(found).figures
        took("one figure, both widths", count, lambda: render.inline(first))


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["1000", "100000"]:
        bench(int(argument))
