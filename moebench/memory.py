"""How many bytes are free where a case would run."""

from __future__ import annotations

from pathlib import Path


def free_bytes(on_gpu: bool) -> int:
    """Of the current GPU, what torch caches for reuse included, or of this machine; a very large number where nobody says."""
    if on_gpu:
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
