"""The two matmul_ogs calls around a fused SwiGLU, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moebench.kernels.openai_triton_kernels_details.package import Package, load
from moebench.problem import Tokens

if TYPE_CHECKING:
    from types import ModuleType

    from moebench.mx import Mxfp4
    from moebench.problem import Layer

INTERMEDIATE_MULTIPLE = 64  # vLLM pads so; 2880 needs nothing, a tensor-parallel half of it, 1440, becomes 1472
SCALE_GROUPS_MULTIPLE = 4  # Hopper's kernel reads its scales in fours: past the end at 2880 / 32 = 90 (vLLM #47303, triton #10190)
NUM_WARPS = 8  # what Hopper's scale layout is made for; the matmul takes it from there
PACK_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The prepared call."""

    run: Callable[[Tokens], Tensor]
    facts: dict[str, str | int | float] = field(default_factory=dict)

    def __call__(self, tokens: Tokens) -> Tensor:
        return self.run(tokens)


def prepare(layer: Layer, max_num_tokens: int, package: Package) -> Forward:
    library = load(package)
    set_options(library)
    matmul, i = library.matmul_ogs, layer.intermediate_size
    extra = -i % INTERMEDIATE_MULTIPLE
    w13, w13_precision = weight(library, layer.w13, more_rows=2 * extra)  # rows stay interleaved; added ones give h = 0
    w2, w2_precision = weight(library, layer.w2, more_columns=extra)
    b13 = None if layer.b13 is None else pad(layer.b13.float(), (0, 2 * extra))  # fp32 [E_local, 2 I]
    b2 = None if layer.b2 is None else layer.b2.float()  # fp32 [E_local, H]
    activation = fused_swiglu(library, package, layer.swiglu.alpha, layer.swiglu.limit)
    route = _route_3_5 if package.generation == "3.5" else _route_3_6
    first, count = layer.local_expert_start, layer.num_local_experts
    h = layer.hidden_size

    def run(tokens: Tokens) -> Tensor:
        x = tokens.hidden_states
        if tokens.num_tokens == 0:
            return x.new_empty(0, h)
        routing, gather, scatter = route(library, *pack(tokens, first, count), count)
        y = matmul.matmul_ogs(x, w13, b13, routing, gather_indx=gather, precision_config=w13_precision, fused_activation=activation)
        out = None
        if layer.ep_size > 1 and tokens.topk_ids.shape[1] == 1:
            # With one slot a token the rows are written in place and not summed: nobody writes a token of another rank.
            out = x.new_zeros(1, tokens.num_tokens, h)
        z: Tensor = matmul.matmul_ogs(
            y, w2, b2, routing, scatter_indx=scatter, precision_config=w2_precision, gammas=routing.gate_scal, y=out
        )
        return z.view(tokens.num_tokens, h)

    facts: dict[str, str | int | float] = {
        "triton_kernels": package.source,
        "triton_kernels_generation": package.generation,
        "padded_intermediate_size": i + extra,
    }
    forward = Forward(run=run, facts=facts)
    _warm_up(forward, layer, max_num_tokens)
    return forward


def set_options(library: ModuleType) -> None:
    """What vLLM 0.33.0 sets (quantization/utils/mxfp4_utils.py, _swizzle_mxfp4): no split along K on Hopper; on Blackwell, whose
    MXFP4 is native, the persistent kernel. The options are the process's, so they are set anew."""
    options = library.matmul_ogs_details.opt_flags
    options.reset_opt_flags_constraints()
    options.update_opt_flags_constraints({"is_persistent": True, "epilogue_subtile": 1} if _blackwell(library) else {"split_k": 1})


def weight(library: ModuleType, matrix: Mxfp4, more_rows: int = 0, more_columns: int = 0) -> tuple[object, object]:
    """(weight, PrecisionConfig) of [E, N, K]: K first, as the library has it, in its layout for this device."""
    tensor, layouts = library.tensor, library.tensor_details.layout
    codes = _padded(matrix.codes, more_rows, more_columns // 2)
    scales = _padded(matrix.scales, more_rows, more_columns // 32)
    if not _blackwell(library):
        scales = _padded(scales, 0, -scales.shape[-1] % SCALE_GROUPS_MULTIPLE)
    value_layout, value_options = layouts.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = layouts.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=NUM_WARPS)
    values = tensor.convert_layout(tensor.wrap_torch_tensor(codes.mT, dtype=tensor.FP4), value_layout, **value_options)
    folded = tensor.convert_layout(tensor.wrap_torch_tensor(scales.mT), scale_layout, **scale_options)
    matmul = library.matmul_ogs
    flex = matmul.FlexCtx(rhs_data=library.numerics.InFlexData())
    return values, matmul.PrecisionConfig(weight_scale=folded, flex_ctx=flex)


def fused_swiglu(library: ModuleType, package: Package, alpha: float, limit: float | None) -> object:
    """gate * sigmoid(alpha * gate) * (up + 1) of interleaved columns, after the clamps."""
    matmul, function, names = library.matmul_ogs, library.swiglu.swiglu_fn, ("alpha", "limit")
    constants = (alpha, inf if limit is None else limit)
    if package.generation == "3.5":
        return matmul.FusedActivation(matmul.FnSpecs("swiglu", function, names), constants, 2)
    return matmul.FusedActivation(matmul.FnSpecs("swiglu", function, names, reduction_n=2), constants)


def pack(tokens: Tokens, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(local ids int16 [M, k], weights bf16 [M, k], bit matrix uint32 [M, ceil(count / 32)]); -1 where an expert is not ours."""
    from moebench.kernels.openai_triton_kernels_details.pack import pack_kernel

    ids = tokens.topk_ids
    m, k = ids.shape
    words = torch.empty(m, -(-count // 32), dtype=torch.int32, device=ids.device)
    local_ids = torch.empty(m, k, dtype=torch.int16, device=ids.device)
    local_weights = torch.empty(m, k, dtype=torch.bfloat16, device=ids.device)
    pack_kernel[(-(-m // PACK_BLOCK),)](
        ids, tokens.topk_weights, local_ids, local_weights, words, m, first, count, TOP_K=k, WORDS=words.shape[1], BLOCK=PACK_BLOCK
    )
    return local_ids, local_weights, words.view(torch.uint32)


def _route_3_5(library: ModuleType, ids: Tensor, weights: Tensor, words: Tensor, count: int) -> tuple[Any, Any, Any]:
    m, k = ids.shape
    bits = library.tensor.Bitmatrix(words, shape=[m, 32 * words.shape[1]], shape_max=[m, None], scratchpad=None)
    return library.routing.routing_from_bitmatrix(bits, weights, ids, count, k)  # type: ignore[no-any-return]


def _route_3_6(library: ModuleType, ids: Tensor, weights: Tensor, words: Tensor, count: int) -> tuple[Any, Any, Any]:
    tensor, matmul = library.tensor, library.matmul_ogs
    m, k = ids.shape
    bits = tensor.Bitmatrix(words, dtype=tensor.BIT, shape=[m, 32 * words.shape[1]], shape_max=[m, None])
    sparse = tensor.SparseMatrix(indx=ids, vals=weights, mask=bits)
    to_sorted, to_slot = sparse.mask_metadata.row_sorted_indx, sparse.mask_metadata.col_sorted_indx
    sizes = sparse.mask_metadata.col_sum[:count]
    ragged = tensor.make_ragged_tensor_metadata(sizes, to_sorted.shape[0])
    gates = sparse.vals.flatten()[to_slot]  # -1, where a slot is not ours, takes the last one; nothing reads it
    data = matmul.RoutingData(gates, ragged.slice_sizes, count, k, ragged)
    return data, matmul.GatherIndx(to_slot, to_sorted), matmul.ScatterIndx(to_sorted, to_slot)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _blackwell(library: ModuleType) -> bool:
    return bool(library.target_info.cuda_capability_geq(10, 0))


def _warm_up(forward: Forward, layer: Layer, max_num_tokens: int) -> None:
    """Compile what a batch of up to max_num_tokens may ask for: tiles depend on the tokens an expert gets, in powers of two."""
    device = layer.w13.codes.device
    top_k = min(4, layer.num_experts)
    count = 1
    while count <= max_num_tokens:
        ids = torch.arange(count * top_k, dtype=torch.int32, device=device).view(count, top_k) % layer.num_experts
        forward(
            Tokens(
                hidden_states=torch.zeros(count, layer.hidden_size, dtype=torch.bfloat16, device=device),
                topk_ids=ids,
                topk_weights=torch.full((count, top_k), 1 / top_k, device=device),
            )
        )
        count *= 2
