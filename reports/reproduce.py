"""The command that does one row again."""

from __future__ import annotations

from shlex import join

from moebench.case import MODELS
from moebench.record import Record


def command(record: Record) -> str:
    """`moebench sweep` of one case and backend, fit to be pasted into a shell; what is a default is left out."""
    case = record.case
    words = ["moebench", "sweep", "--model", case.model, "--tokens", str(case.num_tokens)]
    words += ["--top-k", str(case.top_k)] if case.top_k != MODELS[case.model].top_k else []
    words += ["--ep", str(case.ep_size), "--ep-ranks", str(case.ep_rank)] if case.ep_size > 1 else []
    words += ["--tp", str(case.tp_size), "--tp-ranks", str(case.tp_rank)] if case.tp_size > 1 else []
    words += ["--routing", case.routing] if case.routing != "uniform" else []
    words += ["--seed", str(case.seed)] if case.seed else []
    words += ["--backend", record.backend]
    words += ["--scope", record.scope] if record.scope != "experts" else []
    words += ["--l2", "hot"] if record.timing and record.timing.l2 == "hot" else []
    return join(words)
