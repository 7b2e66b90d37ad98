"""Prints how long the reports take for 1,000 records: python tests/bench_reports.py [RECORDS ...]."""

from __future__ import annotations

import subprocess
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
from tests.full_records import full  # noqa: E402
from tests.made_runs import write_run  # noqa: E402

BACKENDS = ("cutlass_mxfp4_bf16", "marlin_mxfp4_bf16", "openai_triton_kernels", "triton_mxfp4_bf16")
TOKENS = tuple(2**exponent for exponent in range(15))


def records(count):
    for number in range(count):
        rest, backend = divmod(number, len(BACKENDS))
        seed, tokens = divmod(rest, len(TOKENS))
        yield full(BACKENDS[backend], TOKENS[tokens], (50 + TOKENS[tokens] / 4) * (1 + backend / 20), how={"samples": 61}, seed=seed)


def took(what, call):
    started = time.perf_counter()
    call()
    sys.stdout.write(f"  {what:<32} {time.perf_counter() - started:7.2f} s\n")


def bench(count):
    with tempfile.TemporaryDirectory() as directory:
        path = write_run(Path(directory) / "run", *records(count))
        sys.stdout.write(f"{count} records, {(path / 'journal.jsonl').stat().st_size / 1e6:.1f} MB of journal\n")
        took("load", lambda: load_run(path))
        runs = [load_run(path)]
        took("markdown", lambda: markdown.report(runs))
        took("csv", lambda: table_csv.rows(merge(runs)))
        took("json", lambda: json_rows.document(runs))
        took("html without figures", lambda: page(runs, draw=lambda figure: Html("")))
        command = [sys.executable, "-m", "moebench", "report", str(path), "--out", f"{directory}/report.md"]
        took("moebench report --out report.md", lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))
        first, *_ = figures.album(merge(runs)).figures
        took("one figure, both widths", lambda: render.inline(first))


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["1000"]:
        bench(int(argument))
