"""Benchmark and profile MoE expert kernels with MXFP4 weights."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebench.api import Results as Results
    from moebench.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """load and Results, imported when they are asked for: a worker that imports moebench pays for neither."""
    if name in ("load", "Results"):
        from moebench import api

        return getattr(api, name)
    raise AttributeError(f"module 'moebench' has no attribute {name!r}")
