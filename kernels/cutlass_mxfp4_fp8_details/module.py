"""What the FP8 x MXFP4 path needs of the installed FlashInfer beyond what the other paths need."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# codes uint8 [E, N, K/2], scales uint8 [E, N, K/32] -> (codes, folded scale offsets, residual fp32 [E])
Preprocess = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor", "Tensor"]]
# A grouped GEMM of this path, as the compiler mangles its name: E2M1 weights and E4M3 activations in one kernel.
KERNEL = re.compile(rb"_ZN7cutlass13device_kernel[A-Za-z0-9_]*12float_e2m1_t[A-Za-z0-9_]*12float_e4m3_t")


def lacking() -> str | None:
    """Why this path cannot run although FlashInfer is usable, or None. A module built ahead of time may leave kernels out, and then
    a call dies of an illegal instruction or does not link; one that is not built yet will be complete."""
    spec = find_spec("flashinfer")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    for location in locations:
        module = Path(location) / "data" / "aot" / "fused_moe_90" / "fused_moe_90.so"
        if module.is_file() and not _holds(module):
            return (
                f"{module} was built without the FP8 x MXFP4 kernels (as shared/gpu/flashinfer_sm90.py does); "
                "build all of gen_cutlass_fused_moe_sm90_module, or remove that file and FlashInfer compiles its own at the first call"
            )
    return None


def vendor_preprocess(version: str) -> Preprocess:
    """Raises RuntimeError where this FlashInfer has no such path."""
    try:
        from flashinfer.fused_moe import cutlass_fused_moe, preprocess_moe_weights_for_sm90_mixed_gemm_humming
    except ImportError as error:
        raise RuntimeError(f"flashinfer {version} has no FP8 x MXFP4 path ({error}); 0.6.16 and newer do") from error
    if "use_wfp4afp8_humming" not in signature(cutlass_fused_moe).parameters:
        raise RuntimeError(f"flashinfer {version}: cutlass_fused_moe takes no use_wfp4afp8_humming; 0.6.16 and newer do")
    return preprocess_moe_weights_for_sm90_mixed_gemm_humming  # type: ignore[no-any-return]  # untyped


def _holds(module: Path) -> bool:
    with module.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return KERNEL.search(content) is not None
