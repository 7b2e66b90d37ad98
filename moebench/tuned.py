"""Where the table of a backend lies that `moebench tune` made for this user, apart from the one it ships with."""

import os
from pathlib import Path


def tuned_path(backend: str) -> Path:
    """$XDG_CACHE_HOME/moebench/tuned/BACKEND.toml, ~/.cache for the first where it is not set; the file need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebench" / "tuned" / f"{backend}.toml"
