"""OCP MX formats in torch: E2M1 and E4M3 elements in blocks of 32 that share one E8M0 scale.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6. What it leaves open is decided here:
the scale rule ("ocp": floor, the largest values saturate; "round_up": the smallest scale with which none does), nearest-even
rounding, a block with a NaN gets the NaN scale 255, an all-zero block gets scale byte 0 (2^-127), zeros keep their sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of codes 0..7; bit 3 is the sign, code 8 is -0
E2M1_MAX = 6.0
E4M3_MAX = 448.0
LEAST_ROW_AMAX = E4M3_MAX / torch.finfo(torch.float32).max  # a smaller one would make the factor infinite
SCALE_NAN = 255

ScaleRule = Literal["ocp", "round_up"]


@dataclass(frozen=True)
class Mxfp4:
    """[..., N, K] numbers in natural order, never padded or swizzled."""

    codes: Tensor  # uint8 [..., N, K // 2]; the low nibble is the even k
    scales: Tensor  # uint8 [..., N, K // 32], E8M0


@dataclass(frozen=True)
class Mxfp8:
    codes: Tensor  # float8_e4m3fn [..., N, K]
    scales: Tensor  # uint8 [..., N, K // 32], E8M0


def dequantize_mxfp4(w: Mxfp4, dtype: torch.dtype = torch.float32, pairs: Tensor | None = None) -> Tensor:
    """[..., N, K], exact in float32 and float64, and in bfloat16 too: a value has two significant bits.

    Scale 255 gives NaN. 2^126 and above may exceed float32 and then give Inf.
    pairs: byte_values of the same device and dtype, for who has it already: making it waits for a GPU."""
    if pairs is None:
        pairs = byte_values(w.codes.device, dtype)
    # a byte's two values travel as one 8-byte (or wider, or narrower) unit: half the look-ups
    unit = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[pairs.element_size()]
    values = pairs.view(unit).index_select(0, w.codes.flatten().int()).view(dtype)
    blocks = values.view(*w.scales.shape, BLOCK)
    return blocks.mul_(decode_e8m0(w.scales, dtype).unsqueeze(-1)).flatten(-2)


def byte_values(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[512]: the low and the high value of each of 256 bytes of codes."""
    return decode_e2m1(torch.arange(256, device=device, dtype=torch.uint8), dtype).flatten()


def quantize_mxfp4(x: Tensor, scale_rule: ScaleRule = "ocp") -> Mxfp4:
    """Nearest code, ties to the even one; values past +-6 scales saturate. x is any float [..., N, K]."""
    blocks = _blocks(x)
    scales = _scale_bytes(blocks, scale_rule, emax=2, full_mantissa=0x400000)  # 6 = 1.5 * 2^2
    codes = encode_e2m1(blocks * _inverse_scale(scales).unsqueeze(-1)).flatten(-2)
    return Mxfp4(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def quantize_mxfp8(x: Tensor, scale_rule: ScaleRule = "round_up") -> Mxfp8:
    """Nearest E4M3, ties to even; values past +-448 scales saturate, as "ocp" has them. x is any float [..., N, K]."""
    blocks = _blocks(x)
    scales = _scale_bytes(blocks, scale_rule, emax=8, full_mantissa=0x600000)  # 448 = 1.75 * 2^8
    return Mxfp8(encode_e4m3(blocks * _inverse_scale(scales).unsqueeze(-1)).flatten(-2), scales)


def dequantize_mxfp8(x: Mxfp8) -> Tensor:
    """float32 [..., N, K]; exact below 2^128."""
    blocks = x.codes.float().view(*x.scales.shape, BLOCK)
    return (blocks * decode_e8m0(x.scales).unsqueeze(-1)).flatten(-2)


def round_mxfp8(x: Tensor, scale_rule: ScaleRule = "round_up") -> Tensor:
    """float32 [..., N, K]: x as MXFP8 holds it."""
    return dequantize_mxfp8(quantize_mxfp8(x, scale_rule))


def round_fp8_per_token(x: Tensor) -> Tensor:
    """float32 [..., K]: x as FP8 holds it, each row (last dimension) with its own float32 factor 448 / max |x|, rows of zeros with 1.

    Elements are E4M3, nearest-even, saturating at 448; the GEMM's result is multiplied by 1 / factor. Both GEMMs read such rows: the
    hidden states (bf16, so a row's copies for several experts are the same), then the activation's float32 result, which is *not*
    rounded to bf16 before. Zero columns that pad a row change nothing.
    Source: flashinfer 0.7.2.post1, csrc/fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh, computeSafeFP8QuantScale,
    expandInputRowsKernel (need_per_token_fp8_quant) and doActivationKernel (use_per_token_fp8_quant)."""
    rows = x.float()
    amax = rows.abs().amax(-1, keepdim=True)
    largest = torch.full_like(amax, E4M3_MAX)  # a tensor: torch computes number / tensor as a rounded reciprocal times number
    factor = torch.where(amax > 0, largest / amax.clamp(min=LEAST_ROW_AMAX), 1.0)
    return encode_e4m3(rows * factor).float() * (1.0 / factor)


def round_fp8_pow2(x: Tensor, factor: float | None = None) -> Tensor:
    """float32 [..., K]: x as FP8 holds it after a product with a power of two, which the GEMM's result is divided by.

    The given one; without it each row (last dimension) has its own, the largest that brings nothing above 448, and 2^126 at most, so that
    it and its inverse are normal numbers. Elements are E4M3, nearest-even, saturating at 448. A power of two loses nothing, so but for what
    saturates and for what falls below 2^-6 any other would round alike.
    Source: kernels/hopper_mxfp4_bf16_details/prefill.cu, split and finish_up; layer.cuh, row_exponent."""
    rows = x.float()
    if factor is not None:
        return encode_e4m3(rows * factor).float() / factor
    scales = _scale_bytes(rows, "round_up", emax=8, full_mantissa=0x600000).clamp_(min=1)  # of the inverse
    return encode_e4m3(rows * _inverse_scale(scales).unsqueeze(-1)).float() * decode_e8m0(scales).unsqueeze(-1)


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes, one an element, of float32 values; NaN, which E2M1 lacks, becomes code 0 (its block's scale says NaN)."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint, upper_is_even in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += (magnitude >= midpoint) if upper_is_even else (magnitude > midpoint)
    return (code | torch.signbit(x).to(torch.uint8) << 3).masked_fill_(x.isnan(), 0)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., 2]: the low and the high nibble of each byte."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype, device=codes.device)
    return table[torch.stack((codes & 15, codes >> 4), -1).long()]


def encode_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn, nearest-even; saturates at +-448 (as Inf does), NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e8m0(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^(byte - 127); byte 0 is a float32 subnormal, byte 255 NaN. Built from bits, so no libm rounds it."""
    byte = scales.int()
    bits = (byte << 23).masked_fill_(byte == 0, 0x00400000).masked_fill_(byte == SCALE_NAN, 0x7FC00000)
    return bits.view(torch.float32).to(dtype)


def _inverse_scale(scales: Tensor) -> Tensor:
    """2^(127 - byte), exact; a NaN scale keeps NaN."""
    return decode_e8m0((254 - scales.int()).masked_fill_(scales == SCALE_NAN, SCALE_NAN))


def _scale_bytes(blocks: Tensor, rule: ScaleRule, emax: int, full_mantissa: int) -> Tensor:
    """uint8, one a block. The largest element is (1 + full_mantissa / 2^23) * 2^emax; amax is compared with it by its bits.

    A subnormal amax has exponent field 0, which any rule turns into byte 0, as it should: its scale is below 2^-127."""
    amax = blocks.abs().amax(-1)
    bits = amax.view(torch.int32)
    byte = (bits >> 23) - emax
    if rule == "round_up":
        byte += (bits & 0x7FFFFF) > full_mantissa
    return byte.clamp_(0, 254).masked_fill_(amax.isnan(), SCALE_NAN).to(torch.uint8)


def _blocks(x: Tensor) -> Tensor:
    """float32 [..., K // 32, 32]."""
    if x.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension, {x.shape[-1]}, is not a multiple of {BLOCK}, the MX block; pad it with zeros")
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
