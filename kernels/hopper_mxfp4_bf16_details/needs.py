"""What our Hopper kernels need of a machine and of a case, in sentences where it is missing; no torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from moebench.kernels.hopper_mxfp4_bf16_details.shape import MAX_TOP_K, TILE_ROWS

if TYPE_CHECKING:
    from moebench.case import Case
    from moebench.device import Device

INSTALL = "pip install 'moebench[hopper]', or pip install cuda-bindings nvidia-cuda-nvrtc"
ONLY_SM90 = "uses Hopper's warpgroup instructions, which only sm90 has"


def missing(case: Case, device: Device) -> str | None:
    """Of what every kernel of ours needs."""
    if device.arch != "sm90":
        return f"{ONLY_SM90}; this is {device.arch}"
    if not installed("cuda.bindings"):
        return f"cuda-bindings, which compiles and launches the kernel, is not installed; {INSTALL}"
    if case.top_k > MAX_TOP_K:
        return f"top_k={case.top_k} is more than the {MAX_TOP_K} slots the kernel is written for; give at most {MAX_TOP_K}"
    if case.hidden_size % TILE_ROWS:
        return f"hidden_size={case.hidden_size} is not a multiple of {TILE_ROWS}, the rows of a tile; use triton_mxfp4_bf16"
    return None


def installed(module: str) -> bool:
    """find_spec imports the parent, which may not be there."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
