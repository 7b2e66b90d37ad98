"""vLLM's Marlin MoE: MXFP4 weights dequantized in registers, bf16 activations (Ampere and newer)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebench.backend import ActDtype, Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.problem import Layer


class MarlinMxfp4Bf16:
    """The operators of vLLM's compiled libraries, called as vLLM 0.33.0 calls them, without vLLM's Python.

    Inside the call: hidden states padded to a multiple of 256, alignment of the pairs, two GEMMs, the activation between them, the
    sum over a token's experts."""

    name = "marlin_mxfp4_bf16"
    act_dtype: ActDtype = "bf16"
    kernel_pattern = r"marlin_moe_wna16"
    # Thread blocks that share a tile along K add their fp32 partial sums in the order in which they finish: on an H200 1 of
    # 2,949,120 elements differed between two runs of 1024 tokens, by one bf16 step.
    deterministic = False

    def unsupported(self, case: Case, device: Device) -> str | None:
        from moebench.kernels.marlin_mxfp4_bf16_details.library import find

        if not device.is_gpu:
            return "its kernels are CUDA code; it needs an NVIDIA GPU, sm80 or later"
        if int(device.arch.removeprefix("sm")) < 80:
            return f"needs bf16 tensor cores, sm80 or later; this is {device.arch}"
        found = find()
        return found if isinstance(found, str) else None

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.marlin_mxfp4_bf16_details.forward import prepare
        from moebench.kernels.marlin_mxfp4_bf16_details.library import find, load

        found = find()
        if isinstance(found, str):
            raise RuntimeError(found)
        return prepare(layer, max_num_tokens, load(found))


BACKENDS = (MarlinMxfp4Bf16(),)
