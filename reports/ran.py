"""What calls launched and what backends say of themselves, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from moebench.record import Kernel
from moebench.reports.text import kernel_name


def kernels_text(kernels: Sequence[Kernel]) -> str:
    """`name x2, other` of the kernels of one call."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts[kernel_name(kernel.name)] += kernel.count
    return ", ".join(name + (f" x{number}" if number > 1 else "") for name, number in counts.items())


def facts_text(facts: Mapping[str, str | int | float]) -> str:
    """`padded_hidden=2944, ...` of what a backend says of itself."""
    return ", ".join([f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in facts.items()])
