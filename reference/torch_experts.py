"""The experts in float32 torch, one at a time: the truth that outputs are checked against.

    x  = round(hidden_states)                     bf16 as given; "mxfp8", "mxfp8_ocp": MXFP8 of it; "fp8", "fp8_pow2": E4M3 of it
    y  = x @ W13.T + b13                          W13 exact from its packed bytes, products and sums in float32
    g  = min(y[0::2], limit), u = clamp(y[1::2], -limit, limit)
    h  = round(g * sigmoid(alpha * g) * (u + beta))    to bf16; then, for mxfp8, MXFP8 of that; for fp8, fp8_pow2 E4M3 at once
    z  = h @ W2.T + b2
    out = sum over local experts of weight * z    float32; the last rounding to bf16 is the caller's

Source of the formula: openai/gpt-oss, gpt_oss/torch/model.py (swiglu, MLPBlock). x and h are the inputs of the two GEMMs, so every
kernel of a format rounds them; y is left in float32, as fused kernels do. act_dtype=None rounds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import floor, log2
from typing import TYPE_CHECKING

from moebench.backend import ActDtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moebench.backend import Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.problem import Layer, Swiglu, Tokens

SECONDS_LIMIT = 60  # of one call; a slower reference would look like a hang


def experts(
    layer: Layer, tokens: Tokens, act_dtype: ActDtype | None, activation: Callable[[Tensor, Swiglu], Tensor] | None = None
) -> Tensor:
    """float32 [M, H]. Ids of other ranks, or of no expert, are ignored. activation maps y [n, 2 I] to h [n, I] (default swiglu).

    Looks at the ids on the host, once, so on a GPU it synchronizes and cannot be captured in a graph."""
    import torch

    from moebench.mx import Mxfp4, byte_values, dequantize_mxfp4, round_fp8_pow2

    x = _round(tokens.hidden_states.float(), act_dtype)
    out = torch.zeros_like(x)  # float32 [M, H]
    local_ids = tokens.topk_ids.flatten().long() - layer.local_expert_start  # [M * top_k]
    pairs = local_ids.argsort(stable=True)  # by expert, within one by token
    token, weight = pairs // tokens.topk_ids.shape[1], tokens.topk_weights.flatten()[pairs]
    numbers = torch.arange(layer.num_local_experts + 1, device=x.device)
    first = torch.searchsorted(local_ids[pairs], numbers).tolist()
    values = byte_values(x.device)
    with plain_float32():
        for expert in range(layer.num_local_experts):
            mine = slice(first[expert], first[expert + 1])
            if mine.start == mine.stop:
                continue
            w13 = dequantize_mxfp4(Mxfp4(layer.w13.codes[expert], layer.w13.scales[expert]), pairs=values)  # float32 [2 I, H]
            y = x[token[mine]] @ w13.T
            if layer.b13 is not None:
                y += layer.b13[expert]
            h = (activation or swiglu)(y, layer.swiglu)
            if act_dtype == "fp8_pow2":
                h = round_fp8_pow2(h, h_factor(layer.swiglu))
            elif act_dtype is not None:
                h = _round(h if act_dtype == "fp8" else h.bfloat16().float(), act_dtype)
            w2 = dequantize_mxfp4(Mxfp4(layer.w2.codes[expert], layer.w2.scales[expert]), pairs=values)  # float32 [H, I]
            z = h @ w2.T
            if layer.b2 is not None:
                z += layer.b2[expert]
            out.index_add_(0, token[mine], z * weight[mine, None])
    return out


def swiglu(y: Tensor, constants: Swiglu) -> Tensor:
    """[n, I] from interleaved gate and up columns [n, 2 I]; the gate has no lower limit."""
    gate, up = y[:, 0::2], y[:, 1::2]
    if constants.limit is not None:
        gate, up = gate.clamp(max=constants.limit), up.clamp(-constants.limit, constants.limit)
    return gate * (constants.alpha * gate).sigmoid() * (up + constants.beta)


def h_factor(constants: Swiglu) -> float | None:
    """Of fp8_pow2: the largest power of two that brings no |h| above 448; None where nothing bounds h, and each row has its own.

    Up is within the limit. The gate is at most the limit, and its product with the sigmoid at least -0.2785 / alpha."""
    if constants.limit is None or constants.alpha <= 0:
        return None
    bound = max(constants.limit, 0.2785 / constants.alpha) * (constants.limit + abs(constants.beta))
    return 2.0 ** floor(log2(448 / bound)) if bound else None  # else h is 0


class TorchExperts:
    """Plain torch on any device; on a GPU it synchronizes, see experts."""

    name = "torch"
    act_dtype: ActDtype = "bf16"

    def unsupported(self, case: Case, device: Device) -> str | None:
        if find_spec("torch") is None:
            return "torch is not installed; pip install torch"
        if device.is_gpu:
            return None
        # about twice what a core that other programs share took: 3 ns a weight to unpack, 0.05 ns a FLOP
        return too_slow(case, "torch on a CPU", seconds_per_weight=6e-9, seconds_per_flop=1e-10)

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        return lambda tokens: experts(layer, tokens, self.act_dtype).bfloat16()


def too_slow(case: Case, what: str, *, seconds_per_weight: float, seconds_per_flop: float) -> str | None:
    """A sentence if one call would take longer than SECONDS_LIMIT, by the pairs a rank expects and the experts they can touch."""
    weights = 3 * case.hidden_size * case.local_intermediate_size  # of an expert
    pairs = case.num_tokens * min(case.top_k, case.num_local_experts)  # at most: every slot may name a local expert
    seconds = min(case.num_local_experts, pairs) * weights * seconds_per_weight + 2 * pairs * weights * seconds_per_flop
    if seconds <= SECONDS_LIMIT:
        return None
    return f"{what} would take about {seconds:.0f} s a call, more than {SECONDS_LIMIT} s; use fewer tokens, a smaller model, or a GPU"


@contextmanager
def plain_float32() -> Iterator[None]:
    """TF32 and bf16 products off, and one CPU thread: unpacking weights is most of the work, and a second thread waits wherever
    another program holds its core (gpt-oss-20b, 16 tokens, two busy cores: 2.1 s with one thread, 7 to 10 s with two)."""
    import torch

    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def _round(x: Tensor, act_dtype: ActDtype | None) -> Tensor:
    """float32 values as the format's GEMM reads them; what comes in is bf16 already, but for fp8."""
    from moebench.mx import round_fp8_per_token, round_fp8_pow2, round_mxfp8

    if act_dtype == "mxfp8":
        return round_mxfp8(x, "round_up")
    if act_dtype == "mxfp8_ocp":
        return round_mxfp8(x, "ocp")
    if act_dtype == "fp8_pow2":
        return round_fp8_pow2(x)
    return round_fp8_per_token(x) if act_dtype == "fp8" else x


BACKENDS = (TorchExperts(),)
