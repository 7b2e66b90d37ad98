"""A layer in our layout: what every kernel of ours reads, whatever the token count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebench.kernels.hopper_mxfp4_bf16_details.layout import Packed, gate_up_rows, pack
from moebench.kernels.hopper_mxfp4_bf16_details.shape import Sizes, h_scale

if TYPE_CHECKING:
    from moebench.problem import Layer, Swiglu


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    sizes: Sizes
    w13: Packed
    w2: Packed
    b13: Tensor  # float32 [E, rows], in the order of the accumulator; zeros for a layer without biases
    b2: Tensor  # float32 [E, H]
    first_expert: int
    swiglu: Swiglu
    h_scale: float | None  # None: nothing bounds h

    @property
    def num_outliers(self) -> int:
        return self.w13.outliers.shape[0] + self.w2.outliers.shape[0]

    @property
    def device(self) -> torch.device:
        return self.w2.stages.device

    @property
    def w13_pointers(self) -> tuple[int, int, int, int, int]:
        return _pointers(self.w13, self.b13)

    @property
    def w2_pointers(self) -> tuple[int, int, int, int, int]:
        return _pointers(self.w2, self.b2)


def pack_layer(layer: Layer) -> PackedLayer:
    """Copies the weights; the layer itself is not kept. Works on any device, and synchronizes: for `prepare` only."""
    sizes = Sizes(
        hidden=layer.hidden_size,
        intermediate=layer.intermediate_size,
        num_experts=layer.num_experts,
        local_experts=layer.num_local_experts,
    )
    device = layer.w2.codes.device
    order = gate_up_rows(sizes.intermediate, sizes.stage, device)
    return PackedLayer(
        sizes=sizes,
        w13=pack(layer.w13, sizes.stage, order),
        w2=pack(layer.w2, sizes.stage),
        b13=_bias(layer.b13, order, sizes.local_experts),
        b2=_bias(layer.b2, torch.arange(sizes.hidden, device=device), sizes.local_experts),
        first_expert=layer.local_expert_start,
        swiglu=layer.swiglu,
        h_scale=h_scale(layer.swiglu.alpha, layer.swiglu.beta, layer.swiglu.limit),
    )


def _bias(bias: Tensor | None, order: Tensor, experts: int) -> Tensor:
    if bias is None:
        return torch.zeros(experts, len(order), dtype=torch.float32, device=order.device)
    return bias[:, order.clamp_min(0)].float().masked_fill_(order < 0, 0)


def _pointers(packed: Packed, bias: Tensor) -> tuple[int, int, int, int, int]:
    """The members of `struct Weights` of layer.cuh, in their order."""
    return (
        packed.stages.data_ptr(),
        packed.row_factor.data_ptr(),
        bias.data_ptr(),
        packed.outlier_starts.data_ptr(),
        packed.outliers.data_ptr(),
    )
