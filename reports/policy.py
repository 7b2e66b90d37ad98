"""Which backend to use when, as a table, as JSON and as the flags of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebench import serving_flags
from moebench.crossover import Crossover, Excluded, Measured, OneForAll, Stretch
from moebench.reports.text import clean, count, escape, listed
from moebench.serving_flags import Server, Setting

SCHEMA = "1.0"  # moebench/policy.schema.json
NAMES: dict[Server, str] = {"vllm": "vLLM", "sglang": "SGLang"}


def table(crossovers: Sequence[Crossover]) -> RenderableType:
    """One table for each model, device, spread, scope and activation format."""
    parts = [part for found in crossovers for part in _section(found)]
    return Group(*parts, *(Text(line, style="dim") for line in _legend(crossovers)))


def markdown(crossovers: Sequence[Crossover]) -> str:
    """The same, to be pasted into a page."""
    blocks = []
    for found in crossovers:
        rows = [
            [
                _tokens(stretch),
                escape(stretch.backend) + (f" ({stretch.act_dtype})" if found.act_dtype is None else ""),
                escape(", ".join(_ties(found, stretch))),
                *(escape(str(cell)) for cell in _costs(stretch)),
            ]
            for stretch in found.stretches
        ]
        head = ["| tokens | use | ties with it | runner-up | which costs |", "| --: | :-- | :-- | :-- | --: |"]
        blocks += [f"**{escape(_title(found))}** on {escape(found.device)} ({escape(found.arch)}), {_subtitle(found)}"]
        blocks += ["\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])]
        if found.one_for_all and len(found.stretches) > 1:
            blocks.append(f"For all of them: {escape(found.one_for_all.backend)}, {_loss(found.one_for_all)}.")
        if told := list(_cannot_win(found.excluded)):
            blocks.append("\n".join(f"- {escape(line)}" for line in told))
    return "\n\n".join([*blocks, "\n".join(f"- {escape(line)}" for line in _legend(crossovers))]) + "\n"


def server_table(crossovers: Sequence[Crossover], server: Server, version: str, left_out: Sequence[str]) -> RenderableType:
    """The same among the backends that this release runs, with its flags."""
    name = f"{NAMES[server]} {version}"
    parts: list[RenderableType] = []
    settings: dict[str, Setting] = {}
    for found in crossovers:
        parts += _section(found)
        for backend in dict.fromkeys([*(s.backend for s in found.stretches), *([found.one_for_all.backend] if found.one_for_all else [])]):
            settings[backend] = _setting(found, server, version, backend)
            parts.append(Text.assemble((f"{clean(backend)}: ", "bold"), (settings[backend].flags, "green")))
        parts.append(Text())
    parts.append(Text(f"{name} takes one set of flags for all batch sizes."))
    if left_out:
        parts.append(Text(f"not in {name} on this device, so not in the tables: {clean(', '.join(left_out))}", style="dim"))
    parts += [Text(f"{clean(backend)}: {told.note}", style="dim") for backend, told in settings.items() if told.note]
    parts += [Text(f"read in {name}: {source}", style="dim") for source in dict.fromkeys(told.source for told in settings.values())]
    return Group(*parts, *(Text(line, style="dim") for line in _legend(crossovers)))


def to_json(crossovers: Sequence[Crossover]) -> str:
    """As moebench/policy.schema.json says; moebench/policy_lookup.py answers from it."""
    return json.dumps({"schema": SCHEMA, "tables": [_table_json(found) for found in crossovers]}, allow_nan=False, indent=1)


def _section(found: Crossover) -> Iterator[RenderableType]:
    yield Text.assemble((clean(_title(found)), "bold"), f"  {clean(found.device)} ({clean(found.arch)})")
    yield Text(_subtitle(found), style="dim" if found.act_dtype else "yellow")
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("tokens", no_wrap=True)
    for title in ("use", "runner-up"):
        shown.add_column(title, overflow="fold")
    shown.add_column("costs", justify="right", no_wrap=True)
    for stretch in found.stretches:
        use = Text(clean(stretch.backend), style="green")
        if found.act_dtype is None:
            use.append(f" {stretch.act_dtype}", style="yellow")
        if ties := _ties(found, stretch):
            use.append(f" ~ {clean(', '.join(ties))}", style="dim")
        shown.add_row(_tokens(stretch), use, *_costs(stretch))
    yield shown
    if found.one_for_all and len(found.stretches) > 1:
        yield Text.assemble("for all of them: ", (clean(found.one_for_all.backend), "green"), f", {_loss(found.one_for_all)}")
    for line in _cannot_win(found.excluded):
        yield Text(line, style="yellow")
    yield Text()


def _ties(found: Crossover, stretch: Stretch) -> list[str]:
    """Whoever ties with the backend, and at which counts where not at all of the stretch."""
    rows = [row for row in found.measured if stretch.from_tokens <= row.num_tokens <= stretch.to_tokens]
    told = []
    for name in dict.fromkeys(name for row in rows for name in row.ties if name != stretch.backend):
        counts = [f"{part[0]} to {part[-1]}" if part[1:] else str(part[0]) for part in _runs(rows, name)]
        told.append(name if all(name in row.ties for row in rows) else f"{name} at {listed(counts)}")
    return told


def _runs(rows: Sequence[Measured], name: str) -> list[list[int]]:
    """The counts at which it ties, neighbours together."""
    grouped = groupby(rows, key=lambda row: name in row.ties)
    return [[row.num_tokens for row in group] for tie, group in grouped if tie]


def _title(found: Crossover) -> str:
    case = found.case
    parts = [case.model, f"top_k={case.top_k}", f"ep={case.ep_size}", f"tp={case.tp_size}", case.routing]
    return " ".join([*parts, *([f"seed={case.seed}"] if case.seed else []), *([found.scope] if found.scope != "experts" else [])])


def _subtitle(found: Crossover) -> str:
    formats = (
        f"{found.act_dtype} activations" if found.act_dtype else "all activation formats: not the same arithmetic, look at accuracy first"
    )
    ranks = f"; slowest of {found.num_ranks} ranks" if found.num_ranks > 1 else ""
    total = found.case.ep_size * found.case.tp_size
    ranks += f", of {total} that there are" if found.num_ranks < total else ""
    return formats + (ranks if found.num_ranks > 1 else "; one rank only" if total > 1 else "")


def _tokens(stretch: Stretch) -> str:
    return str(stretch.from_tokens) if stretch.from_tokens == stretch.to_tokens else f"{stretch.from_tokens} to {stretch.to_tokens}"


def _costs(stretch: Stretch) -> tuple[Text, str]:
    if stretch.runner_up is None or stretch.regret is None or stretch.worst_regret is None:
        return Text("no other was measured", style="dim"), ""
    worst = "" if stretch.from_tokens == stretch.to_tokens else f" (to {_percent(stretch.worst_regret)})"
    return Text(clean(stretch.runner_up)), _percent(stretch.regret) + worst


def _loss(found: OneForAll) -> str:
    if found.worst_loss < 0.0005:  # what would be shown as 0.0 %
        return "fastest at all of them"
    return f"{_percent(found.loss)} on average, {_percent(found.worst_loss)} at worst, at {found.worst_tokens}"


def _percent(share: float) -> str:
    return f"{share * 100:+.1f} %" if abs(share) < 0.1 else f"{share * 100:+.0f} %"


def _cannot_win(excluded: Sequence[Excluded]) -> Iterator[str]:
    """Backends of one reason at the same counts together; not what was skipped, which the report lists."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in excluded:
        if row.reason != "skipped":
            reasons.setdefault((row.backend, row.reason), []).append(row.num_tokens)
    alike: dict[tuple[str, str], list[str]] = {}
    for (backend, reason), tokens in reasons.items():
        alike.setdefault((", ".join(map(str, sorted(tokens))), reason), []).append(backend)
    for (where, reason), backends in alike.items():
        yield f"cannot win: {clean(', '.join(backends))} at {where}: {clean(reason)}"


def _legend(crossovers: Sequence[Crossover]) -> Iterator[str]:
    stretches = [stretch for found in crossovers for stretch in found.stretches]
    if any(stretch.runner_up for stretch in stretches):
        yield "costs: what the runner-up takes longer, on geometric average (and at most)"
    if any(_ties(found, stretch) for found in crossovers for stretch in found.stretches):
        yield "~ ties: the 95 % interval of the ratio includes 1, at all counts or those named"
    if any(len(found.stretches) > 1 for found in crossovers):
        yield "between two ranges the upper one holds, as servers pad a batch to the next captured size"
    single = [found for found in crossovers if found.rounds < 2]
    if single:
        which = "" if len(single) == len(crossovers) else f"{count(len(single), 'table')}: "
        yield f"{which}one round, so ties are judged within one process; fresh processes differ by more (sweep --rounds)"


def _setting(found: Crossover, server: Server, version: str, backend: str) -> Setting:
    case = found.case
    return serving_flags.setting(server, version, backend, model=case.model, arch=found.arch, ep_size=case.ep_size)


def _table_json(found: Crossover) -> dict[str, object]:
    case = found.case
    return {
        "model": case.model,
        "device": found.device,
        "arch": found.arch,
        "ep_size": case.ep_size,
        "tp_size": case.tp_size,
        "top_k": case.top_k,
        "routing": case.routing,
        "seed": case.seed,
        "scope": found.scope,
        "contract": found.contract_id,
        "act_dtype": found.act_dtype,
        "num_ranks": found.num_ranks,
        "rounds": found.rounds,
        "stretches": [
            {**asdict(stretch), "ties": list(stretch.ties), "flags": _flags_json(found, stretch.backend)} for stretch in found.stretches
        ],
        "one_for_all": asdict(found.one_for_all) | {"flags": _flags_json(found, found.one_for_all.backend)} if found.one_for_all else None,
        "measured": [{"num_tokens": row.num_tokens, "times_us": dict(row.times_us), "ties": list(row.ties)} for row in found.measured],
        "excluded": [asdict(row) for row in found.excluded],
    }


def _flags_json(found: Crossover, backend: str) -> dict[str, dict[str, str | None]]:
    """Server -> release -> flags, None where there are none."""
    return {
        server: {version: _setting(found, server, version, backend).flags or None for version in serving_flags.versions(server)}
        for server in NAMES
    }
