"""FlashInfer's CUTLASS fused MoE with MXFP4 weights and MXFP8 activations (Blackwell).

No Blackwell was at hand: the layouts are tested against the documented byte addresses and the call against a stand-in that enforces
FlashInfer's checks and computes from the bytes it is given (tests/test_cutlass_mxfp4_mxfp8.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from moebench.kernels.flashinfer_details import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moebench.backend import ActDtype, BuildState, BuildStep, Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.kernels.flashinfer_details.fused_moe import FusedMoe, Weights
    from moebench.problem import Layer

ARCHITECTURES = ("sm100", "sm103", "sm120", "sm121")
PAD = 128  # FlashInfer checks that both sizes are multiples of it


@dataclass(frozen=True, kw_only=True)
class CutlassMxfp4Mxfp8:
    """Quantizing the activations is part of the call, as it is part of a layer."""

    tuned: bool = True

    act_dtype: ClassVar[ActDtype] = "mxfp8"
    # From the sources (moe_gemm_tma_ws_launcher.inl, cutlass/gemm/dispatch_policy.hpp), not yet from a trace: block-scaled grouped
    # GEMMs of sm10x or sm12x whose operands are E4M3 and E2M1, in either order since tactics may swap them.
    kernel_pattern: ClassVar[str] = r"MainloopSm1[02]0ArrayTma\w*WarpSpecializedBlockScaled(?=.*float_e4m3)(?=.*float_e2m1).*float_ue8m0_t"
    # On Blackwell the second GEMM's epilogue adds its rows to the output with atomics, in the order in which tiles finish
    # (use_fused_finalize, FlashInfer's default). Also from the sources.
    deterministic: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "cutlass_mxfp4_mxfp8" + ("" if self.tuned else "@untuned")

    def unsupported(self, case: Case, device: Device) -> str | None:
        if device.arch == "sm90":
            return (
                "MXFP4 x MXFP8 does not exist on Hopper (FlashInfer compiles it for sm100 and newer); "
                "take cutlass_mxfp4_bf16, the same weights with bf16 activations"
            )
        if device.arch == "sm110":
            return "FlashInfer's MXFP4 x MXFP8 is known to be wrong on sm110 (flashinfer-ai/flashinfer#3134); take an sm100 or sm120 device"
        if device.arch not in ARCHITECTURES:
            return f"its block-scaled GEMM is compiled for {', '.join(ARCHITECTURES)}, this is {device.arch}"
        return versions.unusable()

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.flashinfer_details.fused_moe import noted, tuned
        from moebench.kernels.flashinfer_details.self_test import self_test

        vendor = versions.load()
        error = self_test(replace(self, tuned=False), vendor, str(layer.w13.codes.device))
        call = noted(self.build(vendor, layer, max_num_tokens), self_test_rel_l2=error)
        return tuned(call) if self.tuned else call

    def prebuild(self, archs: Sequence[str], jobs: int | None, dry_run: bool) -> Iterator[BuildStep | BuildState]:
        from moebench.kernels.flashinfer_details.building import MXFP8_MODULES, prebuild

        return prebuild(MXFP8_MODULES, archs, jobs, dry_run)

    def build(self, vendor: versions.FlashInfer, layer: Layer, max_num_tokens: int) -> FusedMoe:
        """The call, untuned and untested."""
        from moebench.kernels.flashinfer_details.fused_moe import fused_moe

        return fused_moe(
            vendor,
            layer,
            self.convert(layer),
            max_num_tokens,
            self.act_dtype,
            activations=lambda x: self.quantize(vendor, x),
            flags={"use_w4_group_scaling": False, "use_mxfp8_act_scaling": True, "swizzled_input_sf": True},
        )

    def quantize(self, vendor: versions.FlashInfer, x: Tensor) -> tuple[Tensor, Tensor]:
        """bf16 [M, H] -> E4M3 [M, H] and the 128 x 4-swizzled scales, uint8 and flat, that the grouped GEMM reads.

        FlashInfer does not look at what it gets as input_sf; row-major scales there are wrong numbers without an error.
        alignment is what K is padded to, not the block, which is 32."""
        import torch

        from moebench.kernels.flashinfer_details import layout

        codes, scales = vendor.mxfp8_quantize(x, is_sf_swizzled_layout=True, alignment=32)
        rows, groups = layout.padded_size(x.shape[0], 128), layout.padded_size(x.shape[1] // 32, 4)
        flat = scales.view(torch.uint8).flatten()
        return codes, layout.check("input_sf", flat, torch.uint8, (rows * groups,))

    def convert(self, layer: Layer) -> Weights:
        """Halves and padding first, then the swizzle: its tiles span 128 rows, so halves swapped afterwards would tear them."""
        import torch

        from moebench.kernels.flashinfer_details import layout
        from moebench.kernels.flashinfer_details.fused_moe import Weights, vectors

        h, i = layout.padded_size(layer.hidden_size, PAD), layout.padded_size(layer.intermediate_size, PAD)
        num_experts = layer.num_local_experts
        alpha, beta, limit = vectors(layer)
        ones = torch.ones(num_experts, dtype=torch.float32, device=layer.w13.codes.device)

        def scales(name: str, natural: Tensor, n: int, k: int) -> Tensor:
            words = layout.swizzle_128x4(natural).view(torch.int32)
            return layout.check(name, words, torch.int32, (num_experts, n, k // 128))

        return Weights(
            w13=layout.halves(layout.zero_padded(layer.w13.codes, h // 2), i).view(torch.int64),  # 16 codes a word; checked by type
            w2=layout.zero_padded(layer.w2.codes, h, i // 2).view(torch.int64),
            b13=None if layer.b13 is None else layout.halves(layer.b13, i),
            b2=None if layer.b2 is None else layout.zero_padded(layer.b2, h),
            quant_scales=(
                scales("quant_scales[0]", layout.halves(layout.zero_padded(layer.w13.scales, h // 32), i), 2 * i, h),
                ones,
                scales("quant_scales[2]", layout.zero_padded(layer.w2.scales, h, i // 32), h, i),
                ones,
            ),
            alpha=alpha,
            beta=beta,
            limit=limit,
            hidden_size=h,
            intermediate_size=i,
        )


BACKENDS = (CutlassMxfp4Mxfp8(), CutlassMxfp4Mxfp8(tuned=False))
