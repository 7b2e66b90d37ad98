"""Which processes a command left behind."""

from pathlib import Path


def left_over(variable, value):
    """Processes whose environment has that variable with that value: what a command started, where it set it, wherever it went."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{variable}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found
