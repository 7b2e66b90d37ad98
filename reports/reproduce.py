"""The command that does one row again."""

from __future__ import annotations

from functools import lru_cache
from shlex import join, quote

from moebench.case import MODELS, Case
from moebench.record import Record


def command(record: Record) -> str:
    """`moebench sweep` of one case and backend, fit to be pasted into a shell; what is a default is left out."""
    told = f"{_of_case(record.case)} --backend {_quoted(record.backend)}"
    told += f" --scope {record.scope}" if record.scope != "experts" else ""
    return f"{told} --l2 hot" if record.timing and record.timing.l2 == "hot" else told


@lru_cache(maxsize=4096)  # the same for all backends and rounds; 10 us for one of 100,000 rows
def _of_case(case: Case) -> str:
    words = ["moebench", "sweep", "--model", case.model, "--tokens", str(case.num_tokens)]
    words += ["--top-k", str(case.top_k)] if case.top_k != MODELS[case.model].top_k else []
    words += ["--ep", str(case.ep_size), "--ep-ranks", str(case.ep_rank)] if case.ep_size > 1 else []
    words += ["--tp", str(case.tp_size), "--tp-ranks", str(case.tp_rank)] if case.tp_size > 1 else []
    words += ["--routing", case.routing] if case.routing != "uniform" else []
    words += ["--seed", str(case.seed)] if case.seed else []
    return join(words)


@lru_cache(maxsize=256)
def _quoted(name: str) -> str:
    return quote(name)
