"""What a compiler made of a backend's kernels, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moebench.compiled import Compiled, kinds
from moebench.reports.text import clean


def compiled_tables(rows: Sequence[Compiled]) -> Group:
    """One for each architecture and compiler, in the order of the rows."""
    groups = groupby(rows, key=lambda row: (row.arch, row.compiler))
    return Group(*(_table(f"{arch}, {compiler}", list(some)) for (arch, compiler), some in groups))


def _table(title: str, rows: Sequence[Compiled]) -> Table:
    names = {row.kernel for row in rows}
    alone = f", {names.pop()}" if len(names) == 1 else ""  # a name that all rows have is said once
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(clean(title + alone), style="bold"), title_justify="left")
    table.add_column("configuration" if alone else "kernel and configuration")
    for head in ("regis-\nters", "stack\nbytes", "spills\n(in loop)", "shared\nbytes", "tensor\ncores", "loop instr.\na weight"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        loop = row.loop_instructions_per_weight
        table.add_row(
            Text(clean(row.config if alone else ": ".join(filter(None, (row.kernel, row.config))))),
            str(row.registers),
            Text(str(row.stack_bytes), style="red" if row.stack_bytes else ""),
            Text(f"{row.spills} ({row.loop_spills})" if row.spills else "0", style="red" if row.spills else ""),
            str(row.shared_bytes),
            Text(clean(kinds(row.tensor_cores)) if row.tensor_cores else ""),
            "" if loop is None else f"{loop:.2f}",
        )
    return table
