"""The command line: the names of the commands, each imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

from moebench import __version__

# In the order of a first acquaintance; `moebench X` is the function X in moebench/commands/X.py.
COMMANDS = (
    *("sweep", "report", "compare", "policy", "export", "backends", "profile"),
    *("gate", "ab", "baseline"),
    *("doctor", "selfcheck", "calibrate", "prebuild", "soak", "fsck"),
)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        found = getattr(import_module(f"moebench.commands.{name}"), name)
        assert isinstance(found, click.Command)
        return found


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moebench")
def main() -> None:
    """Check and time MoE expert kernels with MXFP4 weights.

    Start with `moebench sweep`: it runs a small plan on this machine, prints a table and leaves a report."""
