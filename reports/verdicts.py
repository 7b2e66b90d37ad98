"""What a gate found, as a table, Markdown, GitHub annotations, JUnit and JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from shlex import join
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.case import MODELS, Case
from moebench.gate import Outcome
from moebench.reports.text import clean, count, escape, short, us
from moebench.verdict import ORDER, Judgement, Verdict

SCHEMA = "1.0"
STYLES: dict[Outcome, str] = {
    "broken": "bold red",
    "slower": "red",
    "missing": "yellow",
    "unclear": "yellow",
    "faster": "green",
    "same": "",
}
COMMENT_BYTES = 65_000  # GitHub takes comments of 65,536 characters, GitLab of 1,000,000
SUMMARY_BYTES = 1_000_000  # GitHub takes step summaries of 1 MiB
ANNOTATIONS = 10  # of each level; GitHub shows no more of a step
LISTED = 20
EXPLAINED = 3  # red cells whose commands are printed
REASON_LENGTH = 300
HEAD = ("verdict", "case", "backend", "base us", "cand. us", "change", "95 %", "sees", "rounds")


def table(judgement: Judgement, names: tuple[str, str]) -> RenderableType:
    """Every cell that is not the same, why, and which cells cannot see what they should."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column, title in enumerate(HEAD):
        shown.add_column(title, justify="right" if column > 2 else "left", overflow="fold", no_wrap=column > 2)
    rows = [verdict for verdict in judgement.verdicts if verdict.outcome != "same"]
    for verdict in rows[:LISTED]:
        first, *cells = _row(verdict)
        shown.add_row(Text(first, style=STYLES[verdict.outcome]), *(Text(clean(cell)) for cell in cells))
    parts: list[RenderableType] = [Text.assemble(("base ", "dim"), clean(names[0]), ("  candidate ", "dim"), clean(names[1])), Text()]
    parts += [shown, Text()] if rows else []
    parts += [Text(f"and {count(len(rows) - LISTED, 'more cell')}; --format json has all")] if len(rows) > LISTED else []
    for told, who in _told(rows, judgement).items():
        parts.append(Text(f"{name(who[0]) if len(who) == 1 else count(len(who), 'cell')}: {told}", style="dim"))
    parts += [Text(clean(line), style="yellow") for line in (*_blind(judgement), *(f"note: {note}" for note in judgement.notes))]
    return Group(*parts)


def markdown(judgement: Judgement, names: tuple[str, str], limit_bytes: int = COMMENT_BYTES) -> str:
    """A comment or a summary, the most important first, cut at a row so that it fits."""
    title = {"pass": "green", "fail": "red", "none": "no verdict"}[judgement.answer]
    blocks = [f"## moebench gate: {title}", escape(headline(judgement)), f"Base {escape(names[0])}, candidate {escape(names[1])}."]
    if lines := [*_blind(judgement), *judgement.notes]:
        blocks.append("\n".join(f"- {escape(line)}" for line in lines))
    if commands := explain(judgement, None):
        blocks.append("What makes it slower, kernel by kernel:\n\n```sh\n" + "\n".join(commands) + "\n```")
    text = "\n\n".join(blocks)
    ruler = ["---" if column < 3 else "---:" for column in range(len(HEAD))]
    rows = ["| " + " | ".join((*HEAD, "why")) + " |", "| " + " | ".join((*ruler, "---")) + " |"]
    room = limit_bytes - len(text.encode()) - len("".join(rows).encode()) - 200  # 200: the line that says what is left out
    for number, verdict in enumerate(judgement.verdicts):
        why = "; ".join([*([verdict.reason] if verdict.reason else []), *verdict.changes])
        row = "| " + " | ".join(escape(cell) for cell in (*_row(verdict), short(clean(why), REASON_LENGTH))) + " |"
        room -= len(row.encode()) + 1
        if room < 0:
            left = len(judgement.verdicts) - number
            return "\n\n".join([text, "\n".join(rows), f"And {count(left, 'more cell')} that did not fit here; the JSON has all.\n"])
        rows.append(row)
    return "\n\n".join([text, "\n".join(rows)]) + "\n" if judgement.verdicts else f"{text}\n"


def workflow_commands(judgement: Judgement) -> list[str]:
    """GitHub workflow commands: errors for red cells and warnings for those without a verdict, the largest effect first."""
    errors = [verdict for verdict in judgement.verdicts if verdict.outcome in ("broken", "slower")]
    warnings = [verdict for verdict in judgement.verdicts if verdict not in errors and judgement.blocks(verdict)]
    found = []
    for level, rows in (
        ("error", errors if judgement.may_fail else []),
        ("warning", warnings if judgement.may_fail else errors + warnings),
    ):
        kept = rows if len(rows) <= ANNOTATIONS else rows[: ANNOTATIONS - 1]
        found += [f"::{level} title={_property(name(row))}::{_message(_sentence(row))}" for row in kept]
        if len(rows) > len(kept):
            more = count(len(rows) - len(kept), "more cell")
            found.append(f"::{level} title=moebench gate::and {more}")
    if not found and judgement.reasons:
        found.append(f"::warning title=moebench gate::{_message(headline(judgement))}")
    return found


def junit(judgement: Judgement, suite_name: str) -> bytes:
    """A test case for each cell: failures are red, errors have no verdict. An unclear cell that keeps nothing from being green passes."""
    root = ElementTree.Element("testsuites", name="moebench gate")
    suite = ElementTree.SubElement(root, "testsuite", name=clean(suite_name))
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for verdict in judgement.verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", name=clean(_label(verdict)), classname=f"moebench.gate.{clean(verdict.backend)}", time="0"
        )
        counts["tests"] += 1
        red = verdict.outcome in ("broken", "slower") and judgement.may_fail
        if red or judgement.blocks(verdict):
            counts["failures" if red else "errors"] += 1
            told = ElementTree.SubElement(case, "failure" if red else "error", type=verdict.outcome, message=clean(_sentence(verdict)))
            told.text = "\n".join(_profile(verdict, None)) if verdict.outcome == "slower" else ""
        elif verdict.outcome == "missing":
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=clean(verdict.reason))
    if judgement.reasons or not judgement.verdicts:  # a file without a failing test reads as green
        whole = ElementTree.SubElement(suite, "testcase", name="the runs can be compared", classname="moebench.gate", time="0")
        counts["tests"] += 1
        counts["errors"] += 1
        ElementTree.SubElement(whole, "error", type="none", message=clean(headline(judgement)))
    for element in (root, suite):
        for what, number in counts.items():
            element.set(what, str(number))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def to_json(judgement: Judgement, names: tuple[str, str], code: int) -> str:
    """Everything, numbers in full."""
    rows = [asdict(verdict) | {"label": verdict.case.label, "blocks": judgement.blocks(verdict)} for verdict in judgement.verdicts]
    document = {
        "schema": SCHEMA,
        "base": names[0],
        "candidate": names[1],
        "answer": judgement.answer,
        "exit_code": code,
        "rule": asdict(judgement.options.rule),
        "reasons": list(judgement.reasons),
        "notes": list(judgement.notes),
        "counts": {outcome: judgement.count(outcome) for outcome in ORDER},
        "explain": explain(judgement, None),
        "cells": rows,
    }
    return json.dumps(document, allow_nan=False, indent=1)


def answer(judgement: Judgement) -> Text:
    style = {"pass": "green", "fail": "bold red", "none": "yellow"}[judgement.answer]
    return Text(clean(headline(judgement)), style=style)


def headline(judgement: Judgement) -> str:
    """The answer in a sentence."""
    counts = {outcome: judgement.count(outcome) for outcome in ORDER}
    cells = count(len(judgement.verdicts), "cell")
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    threshold = f"{100 * judgement.options.rule.threshold:g} %"
    if judgement.answer == "fail":
        return f"red: {told} of {cells}"
    if judgement.answer == "pass":
        own = sum(bool(v.threshold and v.threshold > judgement.options.rule.threshold + 1e-9) for v in judgement.verdicts)
        limit = f"{threshold}, or by its own higher threshold in {own}" if own else threshold
        return f"green: no cell is slower by {limit}: {told} of {cells}"
    reasons = list(judgement.reasons)
    if not judgement.may_fail and counts["broken"] + counts["slower"]:
        reasons.append("a stored baseline cannot fail a change; measure base and candidate in turns: moebench ab")
    return f"no verdict: {'; '.join(reasons)}{' (' if reasons else ''}{told or 'no cells'} of {cells}{')' if reasons else ''}"


def explain(judgement: Judgement, pythons: tuple[str, str] | None) -> list[str]:
    """Commands that show what makes the slowest cells slower; empty where none is. pythons: of base and candidate, where known."""
    slower = [verdict for verdict in judgement.verdicts if verdict.outcome == "slower"]
    return [line for number, verdict in enumerate(slower[:EXPLAINED]) for line in _profile(verdict, pythons, number)]


def name(verdict: Verdict) -> str:
    return clean(f"{_label(verdict)} {verdict.backend}")


def _profile(verdict: Verdict, pythons: tuple[str, str] | None, number: int = 0) -> list[str]:
    """Profile both sides, each with its own installation, then compare."""
    files = [f"{side}{number or ''}.profile.json" for side in ("base", "candidate")]
    words = [*_axes(verdict.case), "--backend", verdict.backend]
    started = [[python, "-m", "moebench"] for python in pythons] if pythons else [["moebench"], ["moebench"]]
    lines = [join([*start, "profile", *words, "--save", file]) for start, file in zip(started, files, strict=True)]
    if pythons is None:
        lines = [f"{line}  # with the {side} installed" for line, side in zip(lines, ("base", "candidate"), strict=True)]
    return [*lines, join([*started[1], "profile", "--diff", *files])]


def _axes(case: Case) -> list[str]:
    """The options that name a case; what is a default is left out."""
    words = ["--model", case.model, "--tokens", str(case.num_tokens)]
    words += ["--top-k", str(case.top_k)] if case.top_k != MODELS[case.model].top_k else []
    words += ["--ep", str(case.ep_size), "--ep-ranks", str(case.ep_rank)] if case.ep_size > 1 else []
    words += ["--tp", str(case.tp_size), "--tp-ranks", str(case.tp_rank)] if case.tp_size > 1 else []
    words += ["--routing", case.routing] if case.routing != "uniform" else []
    return words + (["--seed", str(case.seed)] if case.seed else [])


def _row(verdict: Verdict) -> Sequence[str]:
    low, high = verdict.low, verdict.high
    return (
        verdict.outcome,
        _label(verdict),
        verdict.backend,
        us(verdict.base_us) if verdict.base_us else "",
        us(verdict.candidate_us) if verdict.candidate_us else "",
        change(verdict.ratio) if verdict.ratio else "",
        f"{change(low)} to {change(high)}" if low and high else "",
        f"{100 * verdict.sees:.1f} %" if verdict.sees is not None else "",
        str(verdict.rounds) if verdict.rounds else "",
    )


def change(ratio: float) -> str:
    """+3.1 %."""
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"  # + 0.0: no -0.0


def _sentence(verdict: Verdict) -> str:
    times = ""
    if verdict.outcome in ("slower", "faster", "unclear") and verdict.ratio and verdict.base_us and verdict.candidate_us:
        times = f"{change(verdict.ratio)}, {us(verdict.base_us)} -> {us(verdict.candidate_us)} us in {count(verdict.rounds, 'round')}"
    return ": ".join([verdict.outcome, *filter(None, [times, short(verdict.reason, REASON_LENGTH)])])


def _label(verdict: Verdict) -> str:
    return verdict.case.label + ("" if verdict.scope == "experts" else f" {verdict.scope}")


def _told(verdicts: Sequence[Verdict], judgement: Judgement) -> dict[str, list[Verdict]]:
    """What there is to say of cells beside their numbers, each sentence once; what is said of all of them is in the headline."""
    found: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        reason = [verdict.reason] if verdict.reason and verdict.reason != "; ".join(judgement.reasons) else []
        if told := "; ".join([*reason, *(f"changed: {change}" for change in verdict.changes)]):
            found[short(clean(told), REASON_LENGTH)].append(verdict)
    return dict(list(found.items())[:LISTED])


def _blind(judgement: Judgement) -> Iterator[str]:
    """Cells that may miss what they are there to find, named before anyone relies on them."""
    found = [verdict for verdict in judgement.verdicts if verdict.blind and verdict.sees is not None]
    for verdict in found[:LISTED]:
        more = f"{verdict.needs} rounds would" if verdict.needs else "more rounds do not help"
        limit = f"{100 * judgement.options.rule.threshold:g} %"
        sees = f"{100 * (verdict.sees or 0):.1f} % in {verdict.rounds} rounds"
        yield f"cannot be relied on to see {limit}: {name(verdict)} sees {sees}; {more}"
    if len(found) > LISTED:
        yield f"and {count(len(found) - LISTED, 'more cell')}"


def _message(text: str) -> str:
    return clean(text).replace("%", "%25")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
