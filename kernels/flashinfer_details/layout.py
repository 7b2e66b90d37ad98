"""Where FlashInfer's CUTLASS kernels look for weights and scales, as plain torch.

Each function is a rearrangement of bytes on the tensor's own device. tests/test_cutlass_mxfp4_mxfp8.py and
tests/test_cutlass_mxfp4_bf16.py compare them with the byte addresses written beside them, computed one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_size(size: int, multiple: int) -> int:
    """The smallest multiple that holds size."""
    return -(-size // multiple) * multiple


def halves(pairs: Tensor, rows: int) -> Tensor:
    """[E, 2 I, ...] with gate in row 2j and up in row 2j + 1 -> [E, 2 rows, ...]: the ups, zeros to rows, the gates, zeros to rows.

    cutlass_fused_moe_kernels.cuh, doGatedActivationKernel: the linear half comes first, the gate I columns later."""
    num_experts, twice, *rest = pairs.shape
    out = pairs.new_zeros(num_experts, 2 * rows, *rest)
    out[:, : twice // 2] = pairs[:, 1::2]
    out[:, rows : rows + twice // 2] = pairs[:, 0::2]
    return out


def zero_padded(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor with zeros behind it in its last len(sizes) dimensions, contiguous."""
    shape = (*tensor.shape[: tensor.ndim - len(sizes)], *sizes)
    out = tensor.new_zeros(shape)
    out[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return out


def fold_sm90_scales(scales: Tensor) -> Tensor:
    """uint8 [E, N, K/32] -> [E, N/64, K/128, 16, 16], contiguous: what FlashInfer >= 0.6.16 reads on sm90 with bf16 activations.

    Scale (n, g) of an expert is at byte [n // 64][g // 4][n % 16][n // 16 % 4 * 4 + g % 4]. N % 64 and K % 128 must be 0."""
    num_experts, n, groups = scales.shape
    if n % 64 or groups % 4:
        raise ValueError(f"{n} rows of {groups} scales do not fold: rows must be a multiple of 64, scales of 4 (K of 128); pad them")
    patches = scales.reshape(num_experts, n // 64, 4, 16, groups // 4, 4)
    return patches.permute(0, 1, 4, 3, 2, 5).reshape(num_experts, n // 64, groups // 4, 16, 16)


def unfold_sm90_scales(folded: Tensor) -> Tensor:
    """The inverse of fold_sm90_scales."""
    num_experts, n64, k128 = folded.shape[:3]
    patches = folded.reshape(num_experts, n64, k128, 16, 4, 4).permute(0, 1, 4, 3, 2, 5)
    return patches.reshape(num_experts, n64 * 64, k128 * 4)


def swizzle_128x4(scales: Tensor) -> Tensor:
    """[E, N, G] -> the same bytes and shape, N padded to a multiple of 128 and G of 4 with zeros: block scales of sm100 and newer.

    Scale (n, g) of an expert with P = ceil(G / 4) is at byte n // 128 * P * 512 + g // 4 * 512 + n % 32 * 16 + n % 128 // 32 * 4 + g % 4
    (CUTLASS, Sm1xxBlockScaledConfig; FlashInfer, block_scale_interleave)."""
    num_experts, n, g = scales.shape
    n_padded, g_padded = padded_size(n, 128), padded_size(g, 4)
    full = zero_padded(scales, n_padded, g_padded)
    tiles = full.reshape(num_experts, n_padded // 128, 4, 32, g_padded // 4, 4).permute(0, 1, 4, 3, 2, 5)
    return tiles.reshape(num_experts, n_padded, g_padded)


def unswizzle_128x4(swizzled: Tensor) -> Tensor:
    """The inverse of swizzle_128x4; padding stays."""
    num_experts, n, g = swizzled.shape
    tiles = swizzled.reshape(num_experts, n // 128, g // 4, 32, 4, 4).permute(0, 1, 4, 3, 2, 5)
    return tiles.reshape(num_experts, n, g)


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it is what the kernel will take it for: FlashInfer passes some on as bare pointers."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "strided"
        raise RuntimeError(
            f"{name} is {kind} {tensor.dtype} {tuple(tensor.shape)}, but the kernel reads contiguous {dtype} {shape}; "
            "this FlashInfer lays it out differently, install one that is listed as supported"
        )
    return tensor
