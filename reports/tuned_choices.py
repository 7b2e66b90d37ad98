"""What tuning found, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from moebench.reports.text import clean, us
from moebench.tuning import Outcome


def tuned_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each regime; a gain is the share of the time that is saved, so what is slower has a negative one."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("regime", "choice"):
        table.add_column(head)
    table.add_column("tokens: before -> after, us")
    for head in ("gain, 95 % interval", "tried"):
        table.add_column(head, justify="right", no_wrap=head == "tried")
    for outcome in outcomes:
        taken = outcome.after != outcome.before
        choice = f"{outcome.after} instead of {outcome.before}" if taken else f"stays {outcome.before}"
        best = f"; best of the others: {outcome.candidate}" if outcome.candidate else ""
        table.add_row(
            Text(clean(outcome.regime)),
            Text(clean(f"{choice}{best}{f'; {outcome.reason}' if outcome.reason else ''}"), style="green" if taken else ""),
            Text(_times(outcome)),
            Text(_gain(outcome)),
            f"{outcome.tried}" + (f" ({len(outcome.rejected)} rejected)" if outcome.rejected else ""),
        )
    return table


def _times(outcome: Outcome) -> str:
    gain = outcome.gain
    if gain is None:
        return ""
    return "\n".join(f"{count}: {us(gain.before_us[count])} -> {us(gain.after_us[count])}" for count in gain.before_us)


def _gain(outcome: Outcome) -> str:
    gain = outcome.gain
    if gain is None:
        return ""
    share, low, high = (100 * (1 - ratio) for ratio in (gain.ratio, gain.high, gain.low))
    return f"{share:.1f} % ({low:.1f} to {high:.1f})"
