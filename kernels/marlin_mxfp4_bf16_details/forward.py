"""One MoE layer through Marlin: alignment, GEMM, activation, GEMM, sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor

from moebench.kernels.marlin_mxfp4_bf16_details.layout import Matrix, convert
from moebench.kernels.marlin_mxfp4_bf16_details.library import Ops
from moebench.problem import Layer, Swiglu, Tokens

# vLLM's scalar_types.float4_e2m1f.id: exponent bits 2, mantissa bits << 8, signed << 16, finite values only << 49
FLOAT4_E2M1F = 2 | 1 << 8 | 1 << 16 | 1 << 49
BLOCKS_PER_SM = 4  # locks: as many as thread blocks can run
Activation = Callable[[Tensor, Tensor], None]  # (out [n, I], y [n, 2 I])


@dataclass(frozen=True, kw_only=True)
class Forward:
    """tokens -> bf16 [M, H]."""

    ops: Ops
    layer: Layer
    w13: Matrix
    w2: Matrix
    activation: Activation
    expert_map: Tensor | None  # int32 [E], local index or -1; None where all experts are here
    locks: Tensor  # int32, zero between calls: Marlin resets them
    padded: Tensor | None  # bf16 [max_num_tokens, H padded], zero right of H and never written there
    facts: dict[str, str | int | float]

    def __call__(self, tokens: Tokens) -> Tensor:
        m, h = tokens.hidden_states.shape
        if m == 0:
            return tokens.hidden_states.new_empty(0, h)
        ids, k = tokens.topk_ids, tokens.topk_ids.shape[1]
        block = block_size(m, k, self.layer)
        aligned = self._align(ids, block)
        y = tokens.hidden_states.new_empty(m * k, self.w13.n)
        self._gemm(self._padded(tokens.hidden_states), y, self.w13, aligned, tokens.topk_weights, block, top_k=k, weigh=False)
        act = y.new_empty(m * k, self.w2.k)
        self.activation(act, y)
        z = y.new_empty(m * k, self.w2.n)
        self._gemm(act, z, self.w2, aligned, tokens.topk_weights, block, top_k=1, weigh=True)
        rows = z.view(m, k, self.w2.n)
        if self.expert_map is None:
            out = y.new_empty(m, h)
            return torch.sum(rows[:, :, :h], dim=1, out=out)
        out = y.new_empty(m, self.w2.n)
        self.ops.moe_sum(rows, out, ids, self.expert_map)  # rows of other ranks' pairs were never written
        return out[:, :h]

    def _padded(self, hidden_states: Tensor) -> Tensor:
        """One copy kernel; torch.nn.functional.pad would fill with zeros again each call."""
        if self.padded is None:
            return hidden_states.contiguous()
        m, h = hidden_states.shape
        if m > self.padded.shape[0]:
            raise ValueError(f"{m} tokens are more than the {self.padded.shape[0]} that buffers were prepared for")
        rows = self.padded[:m]
        rows[:, :h].copy_(hidden_states)
        return rows

    def _align(self, ids: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs in order of their experts, each expert's padded to whole blocks; the expert of each block; how many there are."""
        num_experts, pairs = self.layer.num_experts, ids.numel()
        room = pairs + num_experts * (block - 1)
        if pairs < num_experts:
            room = min(room, pairs * block)
        order = torch.empty(room, dtype=torch.int32, device=ids.device)
        experts = torch.empty(-(-room // block), dtype=torch.int32, device=ids.device)
        count = torch.empty(1, dtype=torch.int32, device=ids.device)
        # without the map, blocks of other ranks would be -1 and Marlin, compiled for the case without, would read there (sglang #33396)
        self.ops.align(ids, num_experts, block, order, experts, count, self.expert_map)
        return order, experts, count

    def _gemm(
        self,
        a: Tensor,
        c: Tensor,
        b: Matrix,
        aligned: tuple[Tensor, Tensor, Tensor],
        topk_weights: Tensor,
        block: int,
        top_k: int,
        weigh: bool,
    ) -> None:
        """c[pair] = a[pair // top_k] @ b[expert].T + bias, times the pair's weight where weigh."""
        none = None
        self.ops.gemm(
            a, c, b.codes, b.bias, b.scales, none, none, none, self.locks, *aligned, topk_weights,
            block, top_k, weigh, FLOAT4_E2M1F, a.shape[0], b.n, b.k,
            False, True, False, -1, -1, -1,  # atomic add, reduction in fp32, floating zero points; tile sizes left to Marlin
        )  # fmt: skip


def prepare(layer: Layer, max_num_tokens: int, ops: Ops) -> Forward:
    device = layer.w13.codes.device
    w13, w2, alternating = convert(layer, ops.repack)
    padded = None
    if w13.k != layer.hidden_size:
        padded = torch.zeros(max(max_num_tokens, 1), w13.k, dtype=torch.bfloat16, device=device)
    expert_map = None
    if layer.ep_size > 1:
        expert_map = torch.full((layer.num_experts,), -1, dtype=torch.int32, device=device)
        first, count = layer.local_expert_start, layer.num_local_experts
        expert_map[first : first + count] = torch.arange(count, dtype=torch.int32, device=device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    forward = Forward(
        ops=ops,
        layer=layer,
        w13=w13,
        w2=w2,
        activation=activation(ops, layer.swiglu, alternating),
        expert_map=expert_map,
        locks=torch.zeros(num_sms * BLOCKS_PER_SM, dtype=torch.int32, device=device),
        padded=padded,
        facts={"vllm": ops.version, "padded_hidden": w13.k, "padded_intermediate": w2.k},
    )
    _warm_up(forward, max_num_tokens)
    return forward


def block_size(num_tokens: int, top_k: int, layer: Layer) -> int:
    """Rows of a block: vLLM's rule (fused_marlin_moe), about one block an expert as long as that is at most 64."""
    here = ceil(num_tokens * layer.num_local_experts / layer.num_experts)
    return next((b for b in (8, 16, 32, 48) if here * top_k / layer.num_local_experts / b < 0.9), 64)


def activation(ops: Ops, swiglu: Swiglu, alternating: bool) -> Activation:
    """alpha and limit are arguments of the operator, whose defaults are gpt-oss's; beta is 1 where gate and up alternate."""
    limit = inf if swiglu.limit is None else swiglu.limit
    if alternating:
        return lambda out, y: ops.swigluoai_and_mul(out, y, swiglu.alpha, limit)
    if swiglu == Swiglu():
        return lambda out, y: ops.silu_and_mul(out, y)
    return lambda out, y: ops.silu_and_mul_with_clamp(out, y, limit, swiglu.alpha, swiglu.beta)


def _warm_up(forward: Forward, max_num_tokens: int) -> None:
    """Load every kernel before the first call: vLLM has Marlin as PTX for sm80, which the driver compiles on newer devices, once
    for all block sizes."""
    layer = forward.layer
    device = layer.w13.codes.device
    for count in {1, min(8, max_num_tokens), max_num_tokens} if max_num_tokens else ():
        ids = torch.arange(count, dtype=torch.int32, device=device)[:, None] % layer.num_experts
        forward(
            Tokens(
                hidden_states=torch.zeros(count, layer.hidden_size, dtype=torch.bfloat16, device=device),
                topk_ids=ids,
                topk_weights=torch.ones(count, 1, device=device),
            )
        )
