"""Where the time of a call goes, as tables for a terminal or a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.reports.text import clean, count, kernel_name, listed, percent, ratio, us
from moebench.timeline import (
    GAPS,
    UNKNOWN,
    Breakdown,
    Change,
    Counters,
    Event,
    Part,
    View,
    classify,
    median_call,
    phase_order,
)

BAR_FROM = 110  # columns of a terminal that has room for bars
BAR = 24
LISTED = 12  # unclassified kernels named; of changes, twice as many
BUSY_ENOUGH = 0.1  # of a call on a CPU: NumPy and Triton's interpreter leave torch below 1 %, the torch reference gives it most
SLOWED = 1.25  # by the profiler: worth a sentence
COLORS = {
    "route": "#4c78a8",
    "quantize": "#3a9a94",
    "dequantize": "#54a24b",
    "permute": "#9d755d",
    "gemm1": "#d1495b",
    "activation": "#c9a227",
    "gemm2": "#ee8f2d",
    "finalize": "#9467a8",
    "other": "#8c8c8c",
    UNKNOWN: "#333333",
}
GAP_COLOR = "#e4e4e7"
SOURCES = {"kineto": "traced by Kineto", "nsys": "traced by nsys", "cpu": "traced by torch's CPU profiler"}
LAUNCHES = {"cuda_graph": "as a CUDA graph", "eager": "eagerly", "": ""}


def table(view: View, width: int) -> RenderableType:
    """Phases with their kernels, their share and their floors; what is not known about them below."""
    profile, found = view.profile, view.breakdown
    parts: list[RenderableType] = [
        Text.assemble((clean(profile.backend), "bold"), f"  {clean(profile.case.label)}  {clean(profile.device.name)}"),
        Text(_how(view), style="dim"),
    ]
    if not found.parts:
        nothing = "no torch operations" if profile.source == "cpu" else "no kernels"
        return Group(*parts, Text(f"the call launched {nothing}: there is nothing to break down"))
    if profile.source == "cpu" and found.busy_us < BUSY_ENOUGH * found.span_us:
        told = f"{_share(found.busy_us / found.span_us)} of that is in torch operations, the rest in Python, NumPy or Triton's interpreter:"
        return Group(*parts, Text(f"{told} there is nothing to break down. On a GPU a backend has kernels, which can be."))
    return Group(*parts, _phases(view, width), *(Text(sentence) for sentence in sentences(view)))


def sentences(view: View) -> Iterator[str]:
    """What the table shows, and what it does not, in words."""
    found, profile = view.breakdown, view.profile
    over = [
        f"{phase} is {ratio(value / view.floors[phase].us)} over its {view.floors[phase].limiter} floor"
        for phase, value in found.phases_us.items()
        if phase in view.floors
    ]
    yield f"{listed(over)}. Roofs: {clean(view.roof)}." if over else f"{_sentence(view.roof)}."
    things = "operations" if profile.source == "cpu" else "kernels"
    told = f"{_share(found.coverage)} of the busy time is in {things} whose phase is known"
    if unknown := _unknown(found):
        names = [f"{name} {us(value)} us" for name, value in unknown[:LISTED]]
        more = f", and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        told += f"; not known: {', '.join(names)}{more}"
    yield f"{told}."
    plain = _median(profile.untraced_us) if profile.untraced_us else 0.0
    if plain and found.span_us > SLOWED * plain:
        yield f"With the profiler the call takes {ratio(found.span_us / plain)} as long as without: what is short shows too long."
    if found.overlap_us >= 0.05:
        yield f"For {us(found.overlap_us)} us several kernels ran at once; that is counted once, for the one that began first."
    yield from (f"{_sentence(note)}." for note in profile.notes)


def counters(found: Sequence[Counters]) -> Table:
    """What ncu measured of each kernel."""
    shown = _Sheet("phase", ">us", ">DRAM", ">SM", "kernel")
    for one in found:
        shares = ["" if share is None else _share(share) for share in (one.dram_share, one.sm_share)]
        shown.add([one.phase, us(one.us), *shares, kernel_name(clean(one.name))])
    return shown.table()


def difference(before: View, after: View, changes: Sequence[Change]) -> RenderableType:
    """Which kernels made the difference, largest effect first; the deltas add up to that of the span."""
    a, b = before.breakdown.span_us, after.breakdown.span_us
    digits = _digits(max(a, b))
    told = Text(f"before: {_title(before)} {a:.{digits}f} us; after: {_title(after)} {b:.{digits}f} us: ")
    told.append(f"{b - a:+.{digits}f} us ({_signed_percent(b, a)})", style="bold")
    shown = _Sheet(">delta us", ">before", ">after", "", "phase", "kernel")
    for change in changes[: 2 * LISTED]:
        style = "dim" if change.what == "same" else "red" if change.delta_us > 0 else "green"
        sides = [
            f"{value:.{digits}f}" if name else "" for name, value in ((change.before, change.before_us), (change.after, change.after_us))
        ]
        what = "" if change.phase == GAPS else change.what
        shown.add([f"{change.delta_us:+.{digits}f}", *sides, what, change.phase, _both(change)], style)
    if rest := changes[2 * LISTED :]:
        shown.add([f"{sum(change.delta_us for change in rest):+.{digits}f}", "", "", "", "", f"{len(rest)} more"], "dim")
    shown.rule()
    shown.add([f"{b - a:+.{digits}f}", f"{a:.{digits}f}", f"{b:.{digits}f}", "", "span", ""], "bold")
    notes = [Text(f"note: {problem}", style="yellow") for problem in incomparable(before, after)]
    return Group(told, *notes, shown.table(), Text(_largest(changes, digits)))


def incomparable(before: View, after: View) -> Iterator[str]:
    """Why a difference may not be the kernels'."""
    a, b = before.profile, after.profile
    for what, one, other in (
        ("the cases differ", a.case.label, b.case.label),
        ("the devices differ", a.device.name, b.device.name),
        ("they were launched differently", LAUNCHES[a.launch], LAUNCHES[b.launch]),
        ("they were traced differently", SOURCES[a.source], SOURCES[b.source]),
    ):
        if one != other:
            yield f"{what}: {clean(one) or 'not known'}, {clean(other) or 'not known'}"


def figure(views: Sequence[View]) -> str:
    """An SVG picture: for each profile the kernels of its median call on one scale, with the floors of its GEMMs."""
    width, left, right, top, lane = 1000, 20, 20, 64, 104
    longest = max((view.breakdown.span_us for view in views), default=0.0) or 1.0
    longest = max([longest, *(_length(median_call(view.profile.calls)) for view in views)])
    scale = (width - left - right) / longest
    used: list[str] = []
    body: list[str] = []
    for number, view in enumerate(views):
        body += _lane(view, left, top + number * lane, scale, named=len({view.profile.case for view in views}) > 1)
        used += [_main(phase) for phase in view.breakdown.phases_us]
    bottom = top + len(views) * lane
    body += _axis(left, bottom - 4, longest, scale)
    phases = sorted(dict.fromkeys(used), key=phase_order)
    x = float(left)
    for phase in [*phases, GAPS]:
        body.append(f'<rect x="{x:.1f}" y="{bottom + 32}" width="11" height="11" fill="{COLORS.get(phase, GAP_COLOR)}"/>')
        body.append(_words(x + 16, bottom + 42, phase, size=12))
        x += 40 + 7 * len(phase)
    title = f"{views[0].profile.case.label} on {views[0].profile.device.name}" if views else ""
    told = [
        "the kernels of one call in the order in which they began",
        *dict.fromkeys(note for view in views for note in view.profile.notes),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 56}" font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{bottom + 56}" fill="#ffffff"/>\n'
        + _words(left, 28, title, size=17, weight="bold")
        + "\n"
        + _words(left, 47, _sentence("; ".join(told)), size=12, color="#555555")
        + "\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _how(view: View) -> str:
    profile, found = view.profile, view.breakdown
    cold = ", L2 cold" if profile.source != "cpu" else ""
    how = f"{count(len(profile.calls), 'call')} {LAUNCHES[profile.launch]}".strip()
    span = f"{us(found.span_us)} us from first start to last end"
    if len(found.spans_us) > 1:
        span += f" ({us(min(found.spans_us))} to {us(max(found.spans_us))})"
    plain = f"; {us(_median(profile.untraced_us))} us untraced" if profile.untraced_us else ""
    return f"{how}{cold}, {SOURCES[profile.source]}: {span}{plain}"


def _phases(view: View, width: int) -> Table:
    found, on_cpu = view.breakdown, view.profile.source == "cpu"
    digits = _digits(found.span_us)
    columns = ["phase", ">us", ">share", *([">floor", ">over"] if view.floors else []), *([""] if width >= BAR_FROM else [])]
    shown = _Sheet(*columns, "operations" if on_cpu else "kernel")

    def add(phase: str, value: float, kernel: str, least: float = 0.0, style: str = "") -> None:
        share = value / found.span_us if found.span_us else 0.0
        cells: list[str | Text] = [phase, f"{value:.{digits}f}", _share(share)]
        if view.floors:
            cells += [f"{least:.{digits}f}", ratio(value / least)] if least else ["", ""]
        if width >= BAR_FROM:
            cells.append(Text(_bar(share) if phase not in ("", "span") else "", style=COLORS.get(_main(phase), "#b0b0b0")))
        shown.add([*cells, kernel], style)

    for phase, total in found.phases_us.items():
        inside = [part for part in found.parts if part.phase == phase]
        least = view.floors[phase].us if phase in view.floors else 0.0
        if on_cpu:  # hundreds
            add(phase, total, count(round(sum(part.launches for part in inside)), "operation"), least)
            continue
        add(phase, total, _kernel(inside[0]) if len(inside) == 1 else f"{len(inside)} kernels", least)
        for part in inside if len(inside) > 1 else ():
            add("", part.us, f"  {_kernel(part)}", style="dim")
    launches = sum(part.launches for part in found.parts)
    add(GAPS, found.gaps_us, "Python between them" if on_cpu else f"between {launches:.3g} launches")
    shown.rule()
    add("span", found.span_us, "", sum(one.us for one in view.floors.values()), "bold")
    return shown.table()


def _unknown(found: Breakdown) -> list[tuple[str, float]]:
    """Largest first; operations of torch without their shapes."""
    total: dict[str, float] = {}
    for part in found.parts:
        if part.phase == UNKNOWN:
            name = _name(part).split(" [")[0]
            total[name] = total.get(name, 0.0) + part.us
    return sorted(total.items(), key=lambda item: -item[1])


def _main(phase: str) -> str:
    """Of a fused phase, the GEMM: what it is drawn as."""
    return next((part for part in phase.split("+") if part.startswith("gemm")), phase.split("+")[0])


def _digits(span_us: float) -> int:
    """After the point, so that numbers stand below each other."""
    return 2 if span_us < 20 else 1 if span_us < 10_000 else 0


def _sentence(text: str) -> str:
    return clean(text)[:1].upper() + clean(text)[1:]


def _share(share: float) -> str:
    return "100 %" if share > 0.9995 else f"{100 * share:.1f} %" if share >= 0.0005 or not share else "<0.1 %"


def _bar(share: float) -> str:
    """In eighths of a character."""
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _kernel(part: Part) -> str:
    times = f" x{part.launches:.3g}" if part.launches != 1 else ""
    return _name(part) + times


def _name(part: Part) -> str:
    return _short(part.name)


def _short(name: str) -> str:
    """Torch's own kernels are named after how they loop; what they compute is in a template argument."""
    if name.startswith("aten::"):
        return clean(name)
    own = kernel_name(clean(name))
    inside = re.search(r"::(\w+?)_kernel_cuda|(\w+?)_?[Ff]unctor", name) if "at::native::" in name else None
    return f"{own} ({inside[1] or inside[2]})" if inside else own


def _title(view: View) -> str:
    return clean(view.profile.backend)


def _both(change: Change) -> str:
    if change.phase == GAPS:
        return ""
    names = [_short(name) for name in (change.before, change.after) if name]
    if len(names) == 2 and names[0] == names[1]:
        return names[0] + (" (another variant)" if change.before != change.after else "")
    return " -> ".join(names)


def _largest(changes: Sequence[Change], digits: int) -> str:
    moved = [change for change in changes if change.what != "same"]
    if not moved:
        return "No kernel made a difference."
    return f"Largest: {listed([f'{change.phase} {change.delta_us:+.{digits}f} us' for change in moved[:3]])}."


def _signed_percent(after: float, before: float) -> str:
    if not before:
        return "no time before"
    return ("+" if after >= before else "-") + percent(abs(after / before - 1))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


class _Sheet:
    """A table whose last column gives way where the terminal is narrow."""

    def __init__(self, *titles: str) -> None:
        """A title that begins with > stands over numbers."""
        self._titles = titles
        self._rows: list[tuple[list[str | Text], str]] = []
        self._rules: set[int] = set()

    def add(self, cells: Sequence[str | Text], style: str = "") -> None:
        self._rows.append((list(cells), style))

    def rule(self) -> None:
        self._rules.add(len(self._rows))

    def table(self) -> Table:
        made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for number, title in enumerate(self._titles):
            widest = max(len(str(text)) for text in (title.lstrip(">"), *(row[number] for row, _ in self._rows)))
            last = number == len(self._titles) - 1
            side: Literal["left", "right"] = "right" if title.startswith(">") else "left"
            # rich narrows only columns that may wrap
            made.add_column(title.lstrip(">"), justify=side, no_wrap=not last, min_width=None if last else widest)
        for number, (row, style) in enumerate(self._rows):
            if number in self._rules:
                made.add_section()
            cells = (cell if isinstance(cell, Text) else Text(cell, no_wrap=True, overflow="ellipsis") for cell in row)
            made.add_row(*cells, style=style or None)
        return made


def _length(call: Sequence[Event]) -> float:
    return (max(event.end_ns for event in call) - min(event.start_ns for event in call)) / 1e3 if call else 0.0


def _lane(view: View, left: float, top: float, scale: float, named: bool) -> Iterator[str]:
    """Title, the kernels as bars, and under each GEMM the floor."""
    call = median_call(view.profile.calls)
    found: Breakdown = view.breakdown
    least = sum(one.us for one in view.floors.values())
    told = f"{us(found.span_us)} us" + (f", {ratio(found.span_us / least)} the floor of its GEMMs" if least else "")
    title = view.profile.backend + (f", {view.profile.case.label}" if named else "")
    yield _words(left, top + 14, title, size=14, weight="bold")
    yield _words(980, top + 14, told, size=13, anchor="end")
    if not call:
        return
    begin = until = call[0].start_ns
    marked: set[str] = set()
    yield f'<rect x="{left}" y="{top + 22}" width="{_length(call) * scale:.1f}" height="34" fill="{GAP_COLOR}"/>'
    for event, phase in zip(call, classify(call, view.profile.case), strict=True):
        start = max(event.start_ns, until)
        length = max(0, event.end_ns - start) / 1e3
        until = max(until, event.end_ns)
        x, wide = left + (start - begin) / 1e3 * scale, length * scale
        main = _main(phase)
        tip = escape(f"{phase}: {kernel_name(clean(event.name))}, {us(length)} us" if length else phase)
        box = f'x="{x:.1f}" y="{top + 22}" width="{max(wide, 0.6):.1f}" height="34" fill="{COLORS[main]}"'
        yield f'<rect {box} stroke="#ffffff" stroke-width="0.6"><title>{tip}</title></rect>'
        for size, text in ((12, f"{phase} {us(length)}" if length else ""), (12, phase), (11, main)):
            if text and 0.56 * size * len(text) < wide - 6:
                yield _words(x + wide / 2, top + 43, text, size=size, anchor="middle", color="#ffffff")
                break
        if phase in view.floors and phase not in marked:
            marked.add(phase)
            yield from _floor_mark(view, phase, x, top + 62, scale)


def _floor_mark(view: View, phase: str, x: float, y: float, scale: float) -> Iterator[str]:
    least = view.floors[phase]
    end = x + least.us * scale
    yield f'<path d="M{x:.1f} {y} v6 M{x:.1f} {y + 3} H{end:.1f} M{end:.1f} {y} v6" stroke="#222222" stroke-width="1.2" fill="none"/>'
    told = f"floor {us(least.us)} us, {ratio(view.breakdown.phases_us[phase] / least.us)}"
    yield _words(x, y + 19, told, size=11, color="#444444")


def _axis(left: float, y: float, longest: float, scale: float) -> Iterator[str]:
    step = next(size * 10**power for power in range(-1, 9) for size in (1, 2, 5) if longest / (size * 10**power) <= 10)
    yield f'<path d="M{left} {y} H{left + longest * scale:.1f}" stroke="#999999" stroke-width="1"/>'
    for number in range(int(longest / step) + 1):
        x = left + number * step * scale
        yield f'<path d="M{x:.1f} {y} v4" stroke="#999999" stroke-width="1"/>'
        yield _words(
            x,
            y + 17,
            f"{number * step:g}" + (" us" if number == 0 else ""),
            size=11,
            anchor="middle" if number else "start",
            color="#666666",
        )


def _words(x: float, y: float, text: str, size: int, weight: str = "normal", anchor: str = "start", color: str = "#111111") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(clean(text))}</text>'
