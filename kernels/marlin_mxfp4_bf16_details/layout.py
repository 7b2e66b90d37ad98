"""Where Marlin's threads look for weights, scales and biases, as plain torch.

Sources: vLLM 0.33.0, model_executor/layers/quantization/utils/{marlin_utils,marlin_utils_fp4}.py and marlin_moe.py around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from moebench.problem import Layer

HIDDEN_MULTIPLE, INTERMEDIATE_MULTIPLE = 256, 128  # oracle/mxfp4.py, mxfp4_round_up_hidden_size_and_intermediate_size
Repack = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """[E, N, K] as moe_wna16_marlin_gemm takes it."""

    codes: Tensor  # int32 [E, K / 16, 2 N]: tiles of 16 x 16, 8 codes a word, in the order in which a warp's threads use them
    scales: Tensor  # float8_e8m0fnu [E, K / 32, N], columns permuted
    bias: Tensor | None  # bf16 [E, N], permuted
    n: int
    k: int


def convert(layer: Layer, repack: Repack) -> tuple[Matrix, Matrix, bool]:
    """(w13, w2, whether gate and up stay in alternating rows; else all gates come first).

    Alternating is what swigluoai_and_mul reads; the plain and the general SwiGLU of vLLM read halves."""
    h = layer.hidden_size + -layer.hidden_size % HIDDEN_MULTIPLE
    i = layer.intermediate_size + -layer.intermediate_size % INTERMEDIATE_MULTIPLE
    alternating = layer.swiglu.beta == 1.0

    def rows(x: Tensor) -> Tensor:
        """[E, 2 I, ...] -> [E, 2 i, ...] in the activation's order."""
        pairs = _zero_rows(x.unflatten(1, (-1, 2)), i)  # [E, i, 2, ...]
        return (pairs if alternating else pairs.transpose(1, 2)).flatten(1, 2)

    w13 = _matrix(
        pad(rows(layer.w13.codes), (0, (h - layer.hidden_size) // 2)),
        pad(rows(layer.w13.scales), (0, (h - layer.hidden_size) // 32)),
        None if layer.b13 is None else rows(layer.b13),
        repack,
    )
    w2 = _matrix(
        pad(_zero_rows(layer.w2.codes, h), (0, (i - layer.intermediate_size) // 2)),
        pad(_zero_rows(layer.w2.scales, h), (0, (i - layer.intermediate_size) // 32)),
        None if layer.b2 is None else _zero_rows(layer.b2, h),
        repack,
    )
    return w13, w2, alternating


def permute_scales(scales: Tensor) -> Tensor:
    """uint8 [N, K / 32] -> float8_e8m0fnu [K / 32, N].

    vLLM goes through bf16, which holds every power of two that E8M0 does: the bytes only move. Of 64 columns, the first order gives
    column 8 a thread's 8 (i, i + 8, ...), the second swaps the middle two of four, as the two-at-a-time dequantization wants them."""
    order = torch.tensor(_scale_order(), device=scales.device)
    moved = scales.T.reshape(-1, 64)[:, order]
    return moved.reshape(scales.shape[1], scales.shape[0]).view(torch.float8_e8m0fnu)


def permute_bias(bias: Tensor) -> Tensor:
    """[..., N] -> the same shape; within 32 columns a thread gets those its accumulators hold."""
    order = torch.tensor(_bias_order(), device=bias.device)
    return bias.reshape(-1, 32)[:, order].reshape(bias.shape).contiguous()


def _matrix(codes: Tensor, scales: Tensor, bias: Tensor | None, repack: Repack) -> Matrix:
    """codes uint8 [E, N, K / 2]. One expert at a time, into one tensor."""
    num_experts, n, half_k = codes.shape
    k = 2 * half_k
    packed = torch.empty(num_experts, k // 16, 2 * n, dtype=torch.int32, device=codes.device)
    folded = torch.empty(num_experts, k // 32, n, dtype=torch.float8_e8m0fnu, device=codes.device)
    for expert in range(num_experts):
        words = codes[expert].contiguous().view(torch.int32).T.contiguous()  # [K / 8, N]: 8 codes of one row a word, as GPTQ has them
        packed[expert] = repack(words, k, n, 4, False)
        folded[expert] = permute_scales(scales[expert])
    return Matrix(codes=packed, scales=folded, bias=None if bias is None else permute_bias(bias.bfloat16()), n=n, k=k)


def _scale_order() -> list[int]:
    by_thread = [i + 8 * j for i in range(8) for j in range(8)]
    return [by_thread[4 * four + within] for four in range(16) for within in (0, 2, 1, 3)]


def _bias_order() -> list[int]:
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def _zero_rows(x: Tensor, rows: int) -> Tensor:
    """[E, n, ...] -> [E, rows, ...]."""
    if x.shape[1] == rows:
        return x
    out = x.new_zeros(x.shape[0], rows, *x.shape[2:])
    out[:, : x.shape[1]] = x
    return out
