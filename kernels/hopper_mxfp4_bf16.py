"""Our own CUDA kernels for Hopper: a layer in one launch, MXFP4 weights as FP8 and bf16 activations as two FP8 numbers, or all in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebench.kernels.hopper_mxfp4_bf16_details.needs import missing
from moebench.kernels.hopper_mxfp4_bf16_details.shape import Sizes, tier_of, variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moebench.backend import ActDtype, Experts
    from moebench.case import Case
    from moebench.compiled import Compiled
    from moebench.device import Device
    from moebench.problem import Layer


class HopperMxfp4Bf16:
    name = "hopper_mxfp4_bf16"
    act_dtype: ActDtype = "bf16"
    kernel_pattern = r"^hopper_mxfp4_(bf16|prefill)$"

    def unsupported(self, case: Case, device: Device) -> str | None:
        if problem := missing(case, device):
            return problem
        sizes = Sizes(
            hidden=case.hidden_size,
            intermediate=case.local_intermediate_size,
            num_experts=case.num_experts,
            local_experts=case.num_local_experts,
        )
        if variant(sizes, tier_of(min(case.num_tokens, sizes.few_up_to)), h_static=True, outliers=False) is None:
            return (
                f"a row of hidden_size={sizes.hidden} or intermediate_size={sizes.intermediate} leaves no room for weights "
                "in shared memory; use triton_mxfp4_bf16"
            )
        return None

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.hopper_mxfp4_bf16_details import launch

        return launch.load(launch.prepare(layer, max_num_tokens))

    def compiled(self, arch: str) -> Iterator[Compiled]:
        from moebench.kernels.hopper_mxfp4_bf16_details import aot

        return aot.compiled(self.name, aot.all_variants(), arch)


BACKENDS = (HopperMxfp4Bf16(),)
