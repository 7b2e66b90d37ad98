"""The command line: the names of the commands, each imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

from moebench import __version__
from moebench.case import did_you_mean

# `moebench X` is the function X in moebench/commands/X.py; the words are those of the first screen, which imports none of them.
COMMANDS = {
    "Measure": {
        "sweep": "check and time backends over the points of a plan",
        "backends": "what can run here, and what would change that",
    },
    "Understand": {
        "report": "tables, figures and one HTML page of recorded runs",
        "compare": "two runs cell by cell, with intervals",
        "policy": "which backend to use for which token counts",
        "profile": "where the time of one case goes, kernel by kernel",
        "export": "a run in the format of another tool",
    },
    "Guard": {
        "gate": "slower, broken, fine, or no verdict",
        "ab": "measure two installations in turns, then ask the gate",
        "baseline": "keep runs to compare later ones with",
        "soak": "launch a backend for minutes and compare every output",
    },
    "The machine": {
        "doctor": "what stands in the way of measuring here",
        "selfcheck": "how far this machine's times can be trusted",
        "calibrate": "its roofs: how fast it copies, reads and multiplies",
        "tune": "measure which tiles are fastest here, and keep them",
        "compile": "what a compiler makes of our own kernels, without a GPU",
        "prebuild": "compile what a vendor library would at its first call",
        "fsck": "what is wrong with a run directory",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return NAMES

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NAMES:
            return None
        name = cmd_name.replace("-", "_")
        found = getattr(import_module(f"moebench.commands.{name}"), name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in NAMES:
            ctx.fail(f"no such command: {args[0][:60]!r}{did_you_mean(args[0], NAMES)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(list(group.items()), col_max=9)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moebench")
def main() -> None:
    """Check and time MoE expert kernels with MXFP4 weights.

    Start with `moebench sweep`: it runs a small plan on this machine, prints a table and leaves a report."""
