"""The one interface a kernel implements to be benchmarked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:  # this module is imported where torch is not installed
    from torch import Tensor

    from moebench.case import Case
    from moebench.device import Device
    from moebench.problem import Layer, Tokens

# What the inputs of both GEMMs are rounded to. mxfp8: E4M3 in blocks of 32 whose E8M0 scale is rounded up, so that nothing
# saturates (FlashInfer, TensorRT-LLM); mxfp8_ocp: scale rounded down as OCP MX v1.0 says, values above 448 saturate; fp8: E4M3 with
# one float32 scale a row, taken from the row's largest element at run time (W4A8 on Hopper).
ActDtype = Literal["bf16", "mxfp8", "mxfp8_ocp", "fp8"]
ACT_DTYPES: tuple[ActDtype, ...] = get_args(ActDtype)

Experts = Callable[["Tokens"], "Tensor"]  # what prepare returns


class Backend(Protocol):
    """One way to compute the local experts of an MoE layer."""

    @property
    def name(self) -> str: ...  # "cutlass_mxfp4_bf16"; unique and stable, baselines use it

    @property
    def act_dtype(self) -> ActDtype: ...

    def unsupported(self, case: Case, device: Device) -> str | None:
        """The reason this backend cannot run `case` on `device`, with what would change that, or None if it can.

        Called where torch may not be installed: it looks at facts and imports no vendor library."""
        ...

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        """Convert weights, size workspaces and tune up to max_num_tokens, as a server does at start; the weight layout may
        not depend on it.

        Returns the call that is checked and timed: it enqueues on the current stream, never synchronizes, leaves its tokens
        alone, and returns bf16 [M, H], the weighted sum over this rank's experts only."""
        ...
