"""FlashInfer's CUTLASS fused MoE with MXFP4 weights and FP8 activations, quantized row by row inside the call (Hopper)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moebench.kernels.flashinfer_details import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moebench.backend import ActDtype, BuildState, BuildStep, Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.kernels.cutlass_mxfp4_fp8_details.module import Preprocess
    from moebench.kernels.flashinfer_details.fused_moe import FusedMoe, Weights
    from moebench.problem import Layer

PAD = 128  # the binding checks hidden and intermediate sizes
COMPENSATION = 64.0  # 2^6: E4M3's exponent bias minus E2M1's; the caller's to apply (prepare_cutlass_humming_weights)


class CutlassMxfp4Fp8:
    """FlashInfer's use_wfp4afp8_humming: weights become E4M3 with their scale's exponent added, before the MMA.

    That holds scales within 2^11 of an expert's largest; FlashInfer rewrites codes of smaller ones, which costs accuracy. Ours span 2^8."""

    name = "cutlass_mxfp4_fp8"
    act_dtype: ActDtype = "fp8"
    kernel_pattern = r"cutlass::device_kernel.*float_e2m1_t.*float_e4m3_t"  # as cutlass_mxfp4_bf16's, with E4M3 activations

    def unsupported(self, case: Case, device: Device) -> str | None:
        from moebench.kernels.cutlass_mxfp4_fp8_details.module import lacking

        if device.arch != "sm90":
            return f"FlashInfer has its FP8 x MXFP4 path for sm90 (H100, H200) only, this is {device.arch}; take cutlass_mxfp4_mxfp8 there"
        return versions.unusable() or lacking()

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        from moebench.kernels.flashinfer_details.fused_moe import tuned

        call = self.build(versions.load(), layer, max_num_tokens)
        # a FusedMoe's act_dtype is what it hands over, bf16 here; tactics are kept under what the GEMMs read
        return replace(tuned(replace(call, act_dtype=self.act_dtype)), act_dtype=call.act_dtype)

    def prebuild(self, archs: Sequence[str], jobs: int | None, dry_run: bool) -> Iterator[BuildStep | BuildState]:
        from moebench.backend import CannotBuild
        from moebench.kernels.cutlass_mxfp4_fp8_details.module import lacking
        from moebench.kernels.flashinfer_details.building import SM90_MODULES, prebuild

        if problem := lacking():
            raise CannotBuild(problem)
        return prebuild(SM90_MODULES, archs, jobs, dry_run)

    def build(self, vendor: versions.FlashInfer, layer: Layer, max_num_tokens: int) -> FusedMoe:
        """The call, untuned."""
        from moebench.kernels.cutlass_mxfp4_fp8_details.module import vendor_preprocess
        from moebench.kernels.flashinfer_details.fused_moe import fused_moe, noted

        weights, span = self.convert(layer, vendor_preprocess(vendor.version))
        call = fused_moe(
            vendor,
            layer,
            weights,
            max_num_tokens,
            "bf16",  # the fused call quantizes
            activations=lambda x: (x, None),
            flags={"use_w4_group_scaling": True, "use_mxfp8_act_scaling": False, "use_wfp4afp8_humming": True},
        )
        return noted(call, weight_scale_span=span)

    def convert(self, layer: Layer, preprocess: Preprocess) -> tuple[Weights, int]:
        """(weights, the largest span of an expert's scale bytes: above 11, codes were rewritten)."""
        import torch

        from moebench.kernels.flashinfer_details import layout
        from moebench.kernels.flashinfer_details.fused_moe import Weights, vectors

        h, i = layout.padded_size(layer.hidden_size, PAD), layout.padded_size(layer.intermediate_size, PAD)
        count = layer.num_local_experts
        alpha, beta, limit = vectors(layer)

        def matrix(name: str, codes: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
            """uint8 [E, n, k/2], int32 [E, n/64, k/128, 16, 4], fp32 [E]."""
            # one expert at a time: FlashInfer looks codes up by int64 indices, 35 GB of them for all of gpt-oss-120b's w13
            parts = [preprocess(codes[e : e + 1], scales[e : e + 1]) for e in range(count)]
            packed, folded, residual = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            layout.check(f"{name} weights", packed, torch.uint8, (count, n, k // 2))
            layout.check(f"{name} scales", folded, torch.uint8, (count, n // 64, k // 128, 16, 16))
            layout.check(f"{name} residual", residual, torch.float32, (count,))
            return packed, folded.view(torch.int32), (residual * COMPENSATION).contiguous()

        # Zero scale bytes of the padding widen an expert's span, but then only their own codes, zeros, are rewritten.
        w13, s13, r13 = matrix(
            "w13",
            layout.halves(layout.zero_padded(layer.w13.codes, h // 2), i),
            layout.halves(layout.zero_padded(layer.w13.scales, h // 32), i),
            2 * i,
            h,
        )
        w2, s2, r2 = matrix(
            "w2",
            layout.zero_padded(layer.w2.codes, h, i // 2),
            layout.zero_padded(layer.w2.scales, h, i // 32),
            h,
            i,
        )
        spans = [scales.flatten(1).amax(1).int() - scales.flatten(1).amin(1).int() for scales in (layer.w13.scales, layer.w2.scales)]
        weights = Weights(
            w13=w13,
            w2=w2,
            b13=None if layer.b13 is None else layout.halves(layer.b13, i),
            b2=None if layer.b2 is None else layout.zero_padded(layer.b2, h),
            quant_scales=(s13, r13, torch.ones((), dtype=torch.float32, device=w13.device), s2, r2),  # the third is reserved
            alpha=alpha,
            beta=beta,
            limit=limit,
            hidden_size=h,
            intermediate_size=i,
        )
        return weights, int(torch.cat(spans).max())


BACKENDS = (CutlassMxfp4Fp8(),)
