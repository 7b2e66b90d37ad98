"""The experts again, in float64 NumPy, from the same packed bytes: a second opinion that shares no formula with the first.

Rounding points are those of torch_experts.py: x as bf16 gives it, h to bf16, and both to MXFP8 or FP8 where the format says so; all
else in float64. The formats are written out here anew (OCP MX v1.0, section 5.3), so that a slip in mx.py cannot hide."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moebench.backend import ActDtype
from moebench.reference.torch_experts import too_slow

if TYPE_CHECKING:
    from torch import Tensor

    from moebench.backend import Experts
    from moebench.case import Case
    from moebench.device import Device
    from moebench.problem import Layer, Swiglu, Tokens

Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]

ROWS = 16  # of a weight matrix at a time: they stay in cache from unpacking to product, which is too small for BLAS threads to wait on


def experts(layer: Layer, tokens: Tokens, act_dtype: ActDtype | None) -> Doubles:
    """float64 [M, H], on the host wherever the tensors are. Ids of other ranks, or of no expert, are ignored."""
    w13, s13, w2, s2 = (_host(t) for t in (layer.w13.codes, layer.w13.scales, layer.w2.codes, layer.w2.scales))
    b13 = None if layer.b13 is None else _from_bf16(layer.b13)
    b2 = None if layer.b2 is None else _from_bf16(layer.b2)
    ids, router = tokens.topk_ids.cpu().numpy(), tokens.topk_weights.cpu().numpy()
    x = _gemm_input(_from_bf16(tokens.hidden_states), act_dtype)  # [M, H]
    out = np.zeros(x.shape)
    first = layer.local_expert_start
    for expert in sorted(set(ids.ravel().tolist()) & set(range(first, first + layer.num_local_experts))):
        e = expert - first
        share = np.where(ids == expert, router, 0).sum(1, dtype=np.float64)  # [M], the expert's weight in each token
        mine = np.flatnonzero((ids == expert).any(1))
        y = _times_transposed(x[mine], w13[e], s13[e])
        if b13 is not None:
            y = y + b13[e]
        h = _activate(y, layer.swiglu)
        if act_dtype is not None:
            h = _gemm_input(h if act_dtype in ("fp8", "fp8_pow2") else _nearest_bf16(h), act_dtype, _largest_h(layer.swiglu))
        z = _times_transposed(h, w2[e], s2[e])
        if b2 is not None:
            z = z + b2[e]
        out[mine] += share[mine, None] * z
    return out


class NumpyExperts:
    """Computes on the CPU and moves its tensors there and back: a check on the others, not a competitor."""

    name = "numpy"
    act_dtype: ActDtype = "bf16"
    computes_on_cpu = True  # whatever the device of its tensors: the clock is the wall's

    def unsupported(self, case: Case, device: Device) -> str | None:
        if find_spec("torch") is None:
            return "torch, which holds the tensors, is not installed; pip install torch"
        # a few times what a core that other programs share took: 2 ns a weight to unpack, 0.1 ns a FLOP
        return too_slow(case, "numpy", seconds_per_weight=1e-8, seconds_per_flop=3e-10)

    def prepare(self, layer: Layer, max_num_tokens: int) -> Experts:
        import torch

        def call(tokens: Tokens) -> Tensor:
            return torch.from_numpy(experts(layer, tokens, self.act_dtype)).to(tokens.hidden_states.device).bfloat16()

        return call


def _activate(y: Doubles, constants: Swiglu) -> Doubles:
    pairs = y.reshape(len(y), -1, 2)
    gate, up = pairs[..., 0], pairs[..., 1]
    if constants.limit is not None:
        gate = np.minimum(gate, constants.limit)
        up = np.maximum(np.minimum(up, constants.limit), -constants.limit)
    with np.errstate(over="ignore"):  # exp of a large number gives Inf, and gate / Inf the right 0
        h: Doubles = gate / (1 + np.exp(-constants.alpha * gate)) * (constants.beta + up)
    return h


def _times_transposed(x: Doubles, codes: Bytes, scales: Bytes) -> Doubles:
    """x [n, K] times a packed [N, K] matrix, transposed."""
    product = np.empty((len(x), len(codes)))
    for row in range(0, len(codes), ROWS):
        product[:, row : row + ROWS] = x @ _unpack(codes[row : row + ROWS], scales[row : row + ROWS]).T
    return product


def _unpack(codes: Bytes, scales: Bytes) -> Doubles:
    """[N, K]. One look-up a byte: a complex number carries the even element and the odd one, in that order."""
    sign_and_magnitude = np.arange(16)
    exponent, mantissa = sign_and_magnitude >> 1 & 3, sign_and_magnitude & 1
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    value = np.where(sign_and_magnitude < 8, magnitude, -magnitude)
    pair = value[np.arange(256) % 16] + 1j * value[np.arange(256) // 16]
    power = np.ldexp(1.0, np.arange(256) - 127)
    power[255] = np.nan
    blocks = pair[codes].view(np.float64).reshape(*scales.shape, 32)
    blocks *= power[scales][..., None]
    return blocks.reshape(len(codes), -1)


def _largest_h(constants: Swiglu) -> float | None:
    """No |h| is above it; None where there is no such number, 0 where h is 0."""
    if constants.limit is None or constants.alpha <= 0:
        return None
    lowest = 0.2785 / constants.alpha  # x * sigmoid(x) is at least -0.27847
    return max(constants.limit, lowest) * (constants.limit + abs(constants.beta))


def _gemm_input(x: Doubles, act_dtype: ActDtype | None, bound: float | None = None) -> Doubles:
    """MXFP8 or FP8 values of x [n, K] for the formats that have them, else x. bound: of |x|, where the format may use one."""
    if act_dtype == "fp8_pow2":
        largest = np.full((1, 1), bound) if bound else np.abs(x).max(-1, keepdims=True, initial=0)
        factor = np.ldexp(1.0, np.minimum(-_least_exponent(largest), 126))
        return _nearest_e4m3(x * factor) / factor
    if act_dtype == "fp8":
        single = x.astype(np.float32)  # as the kernel multiplies: bf16 values are often ties, and float32 says which way each goes
        largest = np.abs(single).max(-1, keepdims=True, initial=0)
        factor = np.where(largest > 0, np.float32(448) / np.maximum(largest, np.float32(1e-30)), np.float32(1))
        return _nearest_e4m3((single * factor).astype(np.float64)) / factor
    if act_dtype not in ("mxfp8", "mxfp8_ocp"):
        return x
    blocks = x.reshape(len(x), x.shape[1] // 32, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    exponent = _least_exponent(largest) if act_dtype == "mxfp8" else _exponent(largest) - 8
    scale = np.ldexp(1.0, np.maximum(exponent, -127))
    return (_nearest_e4m3(blocks / scale) * scale).reshape(x.shape)


def _least_exponent(largest: Doubles) -> NDArray[np.int32]:
    """Least n with largest <= 448 * 2^n. 448 * 2^n divides to 2^n exactly, so the ceiling is exact too."""
    exponent = _exponent(largest / 448)
    return exponent + (largest > np.ldexp(448.0, exponent))


def _nearest_e4m3(x: Doubles) -> Doubles:
    """Three mantissa bits, subnormals below 2^-6, saturating at 448, ties to even."""
    clipped = np.clip(x, -448, 448)
    step = np.ldexp(1.0, np.maximum(_exponent(clipped), -6) - 3)
    rounded: Doubles = np.rint(clipped / step) * step
    return rounded


def _exponent(x: Doubles) -> NDArray[np.int32]:
    """floor(log2 |x|), and a very small number for 0."""
    mantissa, exponent = np.frexp(np.abs(x))
    return np.where(mantissa == 0, -1000, exponent - 1).astype(np.int32)


def _nearest_bf16(x: Doubles) -> Doubles:
    """Rounded from float64 at once: eight significant bits, ties to even."""
    step = np.ldexp(1.0, np.maximum(_exponent(x), -126) - 7)
    rounded: Doubles = np.rint(x / step) * step
    return rounded


def _from_bf16(tensor: Tensor) -> Doubles:
    import torch

    bits = tensor.contiguous().view(torch.int16).cpu().numpy().view(np.uint16).astype(np.uint32)
    return (bits << 16).view(np.float32).astype(np.float64)


def _host(tensor: Tensor) -> Bytes:
    array: Bytes = tensor.cpu().numpy()
    return array


BACKENDS = (NumpyExperts(),)
