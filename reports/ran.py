"""What calls launched and what backends say of themselves, each text once with the records that share it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from moebench.record import Kernel, Record
from moebench.reports.text import kernel_name

Shared: TypeAlias = "dict[tuple[str, str, str], list[Record]]"  # backend, arch, text


def launched(records: Iterable[Record]) -> Shared:
    """`name x2, other` of the kernels of one call."""
    found: Shared = defaultdict(list)
    texts: dict[int, str] = {}  # by identity: records of one run share their kernels, 10 names of 600 characters each
    for record in records:
        if record.kernels:
            text = texts.get(id(record.kernels))
            if text is None:
                text = texts[id(record.kernels)] = _kernels(record.kernels)  # found keeps the record, so the number stays its own
            found[record.backend, record.arch, text].append(record)
    return found


def said(records: Iterable[Record]) -> Shared:
    """`padded_hidden=2944, ...` of what a backend says of itself."""
    found: Shared = defaultdict(list)
    for record in records:
        if record.facts:
            found[record.backend, record.arch, _facts(record.facts)].append(record)
    return found


def _kernels(kernels: Sequence[Kernel]) -> str:
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts[kernel_name(kernel.name)] += kernel.count
    return ", ".join(name + (f" x{number}" if number > 1 else "") for name, number in counts.items())


def _facts(facts: Mapping[str, str | int | float]) -> str:
    return ", ".join([f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in facts.items()])
