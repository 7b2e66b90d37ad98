"""OpenAI's triton_kernels, as vLLM ships them: MXFP4 weights, bf16 activations (Hopper, Blackwell)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from moebench.case import MODELS

if TYPE_CHECKING:
    from moebench.backend import ActDtype, Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.problem import Layer

ARCHS = ("sm90", "sm100", "sm103")


class OpenaiTritonKernels:
    """Routing data are built from ids and weights inside the call, as vLLM's modular experts do; gate weights become bf16 there."""

    name = "openai_triton_kernels"
    act_dtype: ActDtype = "bf16"
    kernel_pattern = r"matmul_ogs"

    def unsupported(self, case: Case, device: Device) -> str | None:
        from moebench.kernels.openai_triton_kernels_details.package import find

        if device.arch not in ARCHS:
            return f"its MXFP4 layouts are for {', '.join(ARCHS)}; this is {device.arch}"
        model = MODELS[case.model]
        if model.beta != 1.0:
            return f"its SwiGLU adds 1 to up and {case.model} has beta={model.beta:g}; use a gpt-oss model"
        if case.top_k & (case.top_k - 1):
            return f"its routing kernels sort 32 * top_k ids in a power of two of lanes, so top_k={case.top_k} cannot be; give 1, 2, 4 or 8"
        if find_spec("triton") is None:
            return "triton is not installed; pip install triton (Linux only)"
        found = find()
        return found if isinstance(found, str) else None

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.openai_triton_kernels_details.forward import prepare
        from moebench.kernels.openai_triton_kernels_details.package import find

        found = find()
        if isinstance(found, str):
            raise RuntimeError(found)
        return prepare(layer, max_num_tokens, found)


BACKENDS = (OpenaiTritonKernels(),)
