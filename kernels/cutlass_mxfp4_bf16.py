"""FlashInfer's CUTLASS fused MoE with MXFP4 weights and bf16 activations (Hopper)."""

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


@dataclass(frozen=True, kw_only=True)
class CutlassMxfp4Bf16:
    """A GEMM tactic needs K % tile_k == 0 and N % tile_m == 0. Padding to 128, the least that the scale layout takes, makes 2944 =
    23 x 128 of 2880 and so excludes tile_k 256 and 512, and tile_m 256 in the second GEMM; 512, the largest tile, makes 3072 and
    excludes none."""

    tuned: bool = True
    pad: int = 128  # hidden and intermediate sizes are zero-padded to a multiple of it

    act_dtype: ClassVar[ActDtype] = "bf16"
    # The grouped GEMMs: cutlass::device_kernel<GemmUniversal...<MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInput<...>, ...,
    # tuple<float_e2m1_t, float_ue8m0_t>, ..., MMA_64x..x16_F32BF16BF16_RS...>> in cutlass_kernel_file_gemm_grouped_sm90_*_Mixed_*.
    # The other mixed-input paths of the module have another weight type (int4) or another MMA (E4M3, for fp8 activations).
    kernel_pattern: ClassVar[str] = r"MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInput.*float_e2m1_t.*float_ue8m0_t.*F32BF16BF16_RS"

    @property
    def name(self) -> str:
        return "cutlass_mxfp4_bf16" + ("" if self.pad == 128 else "@pad3072") + ("" if self.tuned else "@untuned")

    def unsupported(self, case: Case, device: Device) -> str | None:
        if device.arch != "sm90":
            return (
                f"its mixed-input GEMM is compiled for sm90 (H100, H200) only, this is {device.arch}; "
                "take cutlass_mxfp4_mxfp8 on sm100 and newer"
            )
        return versions.unusable()

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.flashinfer_details.fused_moe import noted, tuned
        from moebench.kernels.flashinfer_details.self_test import self_test

        vendor = versions.load()
        error = self_test(replace(self, tuned=False), vendor, str(layer.w13.codes.device))
        call = noted(self.build(vendor, layer, max_num_tokens), self_test_rel_l2=error)
        return tuned(call) if self.tuned else call

    def prebuild(self, archs: Sequence[str], jobs: int | None, dry_run: bool) -> Iterator[BuildStep | BuildState]:
        from moebench.kernels.flashinfer_details.building import SM90_MODULES, prebuild

        return prebuild(SM90_MODULES, archs, jobs, dry_run)

    def build(self, vendor: versions.FlashInfer, layer: Layer, max_num_tokens: int) -> FusedMoe:
        """The call, untuned and untested."""
        from moebench.kernels.flashinfer_details.fused_moe import fused_moe

        return fused_moe(
            vendor,
            layer,
            self.convert(vendor, layer),
            max_num_tokens,
            self.act_dtype,
            activations=lambda x: (x, None),
            flags={"use_w4_group_scaling": True, "use_mxfp8_act_scaling": False},
        )

    def convert(self, vendor: versions.FlashInfer, layer: Layer) -> Weights:
        """Halves, padding, then the installed version's own helpers. Weights stay uint8: int64 would select the NVFP4 kernel."""
        import torch

        from moebench.kernels.flashinfer_details import layout
        from moebench.kernels.flashinfer_details.fused_moe import Weights, vectors

        h, i = layout.padded_size(layer.hidden_size, self.pad), layout.padded_size(layer.intermediate_size, self.pad)
        num_experts = layer.num_local_experts
        alpha, beta, limit = vectors(layer)

        def scales(name: str, natural: Tensor, n: int, k: int) -> Tensor:
            folded = vendor.interleave_scales(natural, 32)
            # FlashInfer hands the kernel this tensor's address, whatever it is
            return layout.check(name, folded, torch.uint8, (num_experts, n // 64, k // 128, 16, 16))

        return Weights(
            w13=vendor.interleave_weights(layout.halves(layout.zero_padded(layer.w13.codes, h // 2), i), "fp4"),
            w2=vendor.interleave_weights(layout.zero_padded(layer.w2.codes, h, i // 2), "fp4"),
            b13=None if layer.b13 is None else layout.halves(layer.b13, i),
            b2=None if layer.b2 is None else layout.zero_padded(layer.b2, h),
            quant_scales=(
                scales("quant_scales[0]", layout.halves(layout.zero_padded(layer.w13.scales, h // 32), i), 2 * i, h),
                scales("quant_scales[1]", layout.zero_padded(layer.w2.scales, h, i // 32), h, i),
            ),
            alpha=alpha,
            beta=beta,
            limit=limit,
            hidden_size=h,
            intermediate_size=i,
        )


BACKENDS = (CutlassMxfp4Bf16(), CutlassMxfp4Bf16(tuned=False), CutlassMxfp4Bf16(pad=512))
