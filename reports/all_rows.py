"""The table of every row of a page, with what sorts and filters it, and the command that does a row again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from moebench.case import Case
from moebench.record import Record, Scope
from moebench.reports.grid import DAGGER, rank_name
from moebench.reports.layers import WHERE_ALL_ARE
from moebench.reports.markup import Child, Html, join, tag
from moebench.reports.reproduce import command
from moebench.reports.text import count, percent, slug, us

WORDS = frozenset(("backend", "layer", "rank", "status", "limit", "doubts", "contract", "do it again"))


def all_rows(kept: Sequence[Record], number: int) -> list[Html]:
    """Of so many rows, those that are kept. Columns that would be empty are left out. Without a script the table is as complete, in the
    order of the journal."""
    if not kept:
        return []
    columns = ["backend", "layer", "tokens"]
    columns += ["rank"] if any(record.case.ep_size * record.case.tp_size > 1 for record in kept) else []
    columns += ["status", "us a call", "95 % interval"]
    columns += ["of the roof", "limit"] if any(record.roofline for record in kept) else []
    columns += ["error / tolerance"]
    columns += ["doubts"] if any(record.flags for record in kept) else []
    columns += ["round"] if len({record.round for record in kept}) > 1 else []
    columns += ["contract"] if len({record.contract_id for record in kept if record.timing}) > 1 else []
    columns += ["do it again"]
    titles = [tag("th", name, scope="col", class_=_align(name), data_sort="text" if name in WORDS else "number") for name in columns]
    inner = tag(
        "table",
        tag("caption", "All rows"),
        tag("thead", tag("tr", titles)),
        tag("tbody", [_row(record, columns) for record in kept]),
        id="all-rows",
    )
    blocks = [_filters(kept), tag("div", inner, class_="scroll", role="region", aria_label="All rows", tabindex=0)]
    if number > len(kept):
        told = f"The first {len(kept)} of {number} rows; {WHERE_ALL_ARE}."
        blocks.append(tag("p", told, class_="note"))
    return blocks


def pasteable(text: str) -> Html:
    """A command, which the page's script gives a button that copies it."""
    return tag("code", text, class_="command")


def flag_links(flags: Iterable[str]) -> list[Child]:
    """To where each is explained."""
    return commas([tag("a", flag, href=f"#flag-{slug(flag)}") for flag in flags])


def commas(items: Sequence[Html]) -> list[Child]:
    return [join(", " if index else "", item) for index, item in enumerate(items)]


def _filters(records: Sequence[Record]) -> Html:
    """Hidden until the script that makes it work shows it."""
    choices = (
        ("backend", dict.fromkeys(record.backend for record in records)),
        ("layer", dict.fromkeys(_layer(record) for record in records)),
        ("status", dict.fromkeys(record.status for record in records)),
    )
    selects = []
    for name, values in choices:
        options = [tag("option", "all", value=""), *(tag("option", value, value=value) for value in values)]
        selects.append(tag("label", f"{name} ", tag("select", options, data_column=name)))
    search = tag("label", "find ", tag("input", type="search", placeholder="any words", data_find=True))
    shown = tag("output", count(len(records), "row"), aria_live="polite")
    return tag("form", search, selects, tag("button", "show all", type="reset"), shown, class_="filters", hidden=True)


def _row(record: Record, columns: Sequence[str]) -> Html:
    cells = {name: _cell(record, name) for name in columns[1:]}
    first = tag("th", record.backend, scope="row", class_="w")
    rest = [tag("td", shown, data_v=None if value is None else repr(value), class_=_align(name)) for name, (shown, value) in cells.items()]
    return tag("tr", first, rest, data_backend=record.backend, data_layer=_layer(record), data_status=record.status)


def _cell(record: Record, column: str) -> tuple[Child, float | None]:
    """What is shown, and the number to sort by."""
    case, timing, off = record.case, record.timing, record.error
    if column == "layer":
        return _layer(record), None
    if column == "tokens":
        return str(case.num_tokens), case.num_tokens
    if column == "rank":
        return rank_name(case, case.tp_rank, case.ep_rank), None
    if column == "status":
        good = record.status in ("ok", "skipped")
        return [tag("span", record.status, class_=None if good else "bad"), tag("small", record.reason) if record.reason else None], None
    if column == "us a call" and timing:
        return f"{us(timing.median_us)}{'' if timing.comparable else DAGGER}", timing.median_us
    if column == "95 % interval" and timing:
        low, high = timing.interval_us
        return f"{us(low)} to {us(high)}", (high - low) / timing.median_us if timing.median_us else 0.0
    if column == "of the roof" and record.roof_share is not None:
        return percent(record.roof_share), record.roof_share
    if column == "limit":
        return str(record.roofline.limiter) if record.roofline else "", None
    if column == "error / tolerance" and off and off.rel_l2_tolerance and off.worst_tolerance:
        share = max(off.rel_l2 / off.rel_l2_tolerance, off.worst / off.worst_tolerance)
        return percent(share), share
    if column == "doubts":
        return flag_links(record.flags), None
    if column == "round":
        return str(record.round), record.round
    if column == "contract":
        return tag("code", record.contract_id), None
    if column == "do it again":
        return tag("details", tag("summary", "command"), pasteable(command(record))), None
    return "", None


def _align(column: str) -> str | None:
    return "w" if column in WORDS else None


def _layer(record: Record) -> str:
    """What differs from a plain layer of its model, but for tokens and rank, which have columns of their own."""
    return _layer_of(record.case, record.scope)


@lru_cache(maxsize=4096)  # asked for three times a row
def _layer_of(case: Case, scope: Scope) -> str:
    words = [word for word in case.label.split(" ") if not word.startswith(("M=", "ep=", "tp="))]
    words += [f"EP {case.ep_size}"] if case.ep_size > 1 else []
    words += [f"TP {case.tp_size}"] if case.tp_size > 1 else []
    words += ["from router logits"] if scope == "layer" else []
    return " ".join(words)
