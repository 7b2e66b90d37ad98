"""A known answer, asked before any measurement: a library whose weight layout changed computes garbage and reports no error.

(FlashInfer 0.6.10 did so to vLLM: GPQA 0.0 on Hopper, flashinfer-ai/flashinfer#3334.)"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from moebench.backend import ActDtype
from moebench.kernels.flashinfer_details.fused_moe import FusedMoe
from moebench.kernels.flashinfer_details.versions import FlashInfer
from moebench.mx import Mxfp4, round_mxfp8
from moebench.problem import Layer, Swiglu, Tokens

SIZE = 256  # H and I: two K blocks of 128, four N blocks of 64; with one of each, most layouts are the same
TOKENS, TOP_K, EXPERTS, EP_SIZE = 6, 2, 4, 2
TOLERANCE = {"bf16": 0.01, "mxfp8": 0.04}  # both 0.0018 in the stand-in; a changed layout gives 1.3 and more


class Buildable(Protocol):
    """A backend that is hashable, so that its test runs once."""

    @property
    def act_dtype(self) -> ActDtype: ...
    def build(self, vendor: FlashInfer, layer: Layer, max_num_tokens: int) -> FusedMoe: ...


@cache  # once a process, backend and device
def self_test(backend: Buildable, vendor: FlashInfer, device: str) -> float:
    """The relative L2 error of the second of two expert-parallel ranks; raises RuntimeError where it is not small."""
    layer, tokens = _problem(device)
    got = backend.build(vendor, layer, TOKENS)(tokens).float()
    want = _answer(layer, tokens, backend.act_dtype)
    error = float((torch.linalg.norm(got - want) / torch.linalg.norm(want)).item())
    if not error <= TOLERANCE[backend.act_dtype]:
        raise RuntimeError(
            f"FlashInfer {vendor.version} changed the weight or scale layout of cutlass_fused_moe: self-test relative error {error:.2g}, "
            f"at most {TOLERANCE[backend.act_dtype]} expected; install a version that is listed as supported"
        )
    return error


def _problem(device: str) -> tuple[Layer, Tokens]:
    random = torch.Generator().manual_seed(34542)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.uint8).to(device)

    def normal(std: float, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=random) * std).bfloat16().to(device)

    local = EXPERTS // EP_SIZE
    layer = Layer(
        num_experts=EXPERTS,
        ep_size=EP_SIZE,
        ep_rank=EP_SIZE - 1,
        tp_size=1,
        tp_rank=0,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        w13=Mxfp4(integers(0, 256, local, 2 * SIZE, SIZE // 2), integers(117, 124, local, 2 * SIZE, SIZE // 32)),
        w2=Mxfp4(integers(0, 256, local, SIZE, SIZE // 2), integers(117, 124, local, SIZE, SIZE // 32)),
        b13=normal(0.75, local, 2 * SIZE),
        b2=normal(0.75, local, SIZE),
        swiglu=Swiglu(alpha=1.702, beta=1.0, limit=7.0),
    )
    order = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(TOKENS)])
    order[0] = torch.arange(EXPERTS)[-TOP_K:]  # one token that has all its experts here
    weights = torch.rand(TOKENS, TOP_K, generator=random) + 0.1
    return layer, Tokens(hidden_states=normal(3.0, TOKENS, SIZE), topk_ids=order.int().to(device), topk_weights=weights.to(device))


def _answer(layer: Layer, tokens: Tokens, act_dtype: ActDtype) -> Tensor:
    """fp32 [M, H], every local expert for every token and then the router's choice: nothing of the adapter is used."""

    def rounded(x: Tensor) -> Tensor:
        return x if act_dtype == "bf16" else round_mxfp8(x, "round_up" if act_dtype == "mxfp8" else "ocp")

    x = rounded(tokens.hidden_states.float())
    out = torch.zeros_like(x)
    constants = layer.swiglu
    for local in range(layer.num_local_experts):
        share = (tokens.topk_weights * (tokens.topk_ids == layer.local_expert_start + local)).sum(1, keepdim=True)
        y = x.double() @ _numbers(layer.w13, local).T
        y = y.bfloat16().float() + (0 if layer.b13 is None else layer.b13[local].float())
        gate, up = y[:, 0::2].clamp(max=constants.limit), y[:, 1::2].clamp(-(constants.limit or 0), constants.limit)
        h = rounded((gate * torch.sigmoid(constants.alpha * gate) * (up + constants.beta)).bfloat16().float())
        z = h.double() @ _numbers(layer.w2, local).T
        out += share * (z.bfloat16().float() + (0 if layer.b2 is None else layer.b2[local].float()))
    return out


def _numbers(weights: Mxfp4, expert: int) -> Tensor:
    """float64 [N, K] of one expert, from nibbles and exponents."""
    codes, scales = weights.codes[expert], weights.scales[expert]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=codes.device)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()  # [N, K]
    signs = 1.0 - 2.0 * (nibbles >> 3)
    powers = torch.pow(2.0, scales.double() - 127).repeat_interleave(32, -1)
    return signs * table[nibbles & 7] * powers
