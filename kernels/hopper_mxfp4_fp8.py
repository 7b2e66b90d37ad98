"""Our own CUDA kernel for Hopper with FP8 activations (W4A8): half the products of hopper_mxfp4_bf16's exact pair, and less exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebench.case import MODELS
from moebench.kernels.hopper_mxfp4_bf16_details.needs import missing
from moebench.kernels.hopper_mxfp4_bf16_details.shape import h_scale

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moebench.backend import ActDtype, Experts
    from moebench.case import Case
    from moebench.compiled import Compiled
    from moebench.device import Device
    from moebench.problem import Layer


class HopperMxfp4Fp8:
    """prefill.cu at every token count. A row of hidden states has a power of two of its own; h has one for the layer, since its row is
    spread over blocks, and none has seen its largest element when it stores its part."""

    name = "hopper_mxfp4_fp8"
    act_dtype: ActDtype = "fp8_pow2"
    kernel_pattern = r"^hopper_mxfp4_prefill$"

    def unsupported(self, case: Case, device: Device) -> str | None:
        if problem := missing(case, device):
            return problem
        model = MODELS[case.model]
        return _unbounded(model.alpha, model.beta, model.limit)

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.hopper_mxfp4_bf16_details import launch, prefill

        if problem := _unbounded(layer.swiglu.alpha, layer.swiglu.beta, layer.swiglu.limit):
            raise ValueError(problem)
        return launch.load(launch.prepare_format(layer, max_num_tokens, prefill.E4M3))

    def compiled(self, arch: str) -> Iterator[Compiled]:
        from moebench.kernels.hopper_mxfp4_bf16_details import aot

        return aot.compiled(self.name, aot.fp8_variants(), arch)


def _unbounded(alpha: float, beta: float, limit: float | None) -> str | None:
    if h_scale(alpha, beta, limit) is not None:
        return None
    return (
        f"swiglu with alpha={alpha:g}, beta={beta:g}, limit={limit} does not bound h, so that no power of two is sure to bring it within "
        "E4M3's 448; use hopper_mxfp4_bf16, or a model with a limit, such as gpt-oss-20b"
    )


BACKENDS = (HopperMxfp4Fp8(),)
