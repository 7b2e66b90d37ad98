"""Launches of one layer call; grids come from shapes alone, so that a CUDA graph can hold them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from moebench.kernels.triton_mxfp4_bf16_details.configs import Config, Configs, choose, configs_for
from moebench.kernels.triton_mxfp4_bf16_details.gemm import down_kernel, gate_up_kernel
from moebench.kernels.triton_mxfp4_bf16_details.layout import Packed, pack
from moebench.kernels.triton_mxfp4_bf16_details.route import add_slots, count_pairs, place_pairs, sort_pairs

if TYPE_CHECKING:
    from moebench.problem import Layer, Tokens

INTERPRETED = not isinstance(gate_up_kernel, JITFunction)
MAX_TOP_K = 8
DENSE_TOKENS = 16  # columns of the narrowest tile
DENSE_PAIRS = DENSE_TOKENS * MAX_TOP_K
SORT_AT_ONCE = 4096  # pairs; above, counting them by blocks first is less work than each looking at all
SORT_BLOCK, SORT_CHUNK = 16, 512  # pairs that a program places, pairs that it looks at in one turn
COUNT_BLOCK, PLACE_CHUNK = 512, 32  # above: pairs of a program, pairs that it places in one turn
ADD_COLUMNS = 512  # of the output, added up by one program


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A layer's weights in our layout, and what the kernels have to know about it."""

    w13: Packed
    w2: Packed
    b13: Tensor | None  # bf16 [E_local, 2I], checkpoint order
    b2: Tensor | None  # bf16 [E_local, H]
    hidden_size: int
    intermediate_size: int
    num_experts: int  # over all ranks
    num_local_experts: int
    first_expert: int
    alpha: float
    beta: float
    limit: float | None
    configs: Configs
    configs_from: str  # "shipped", or the file
    mode: str  # "ptx" from sm90 on, "ops" before, "interpreter" on a CPU


def prepare(layer: Layer) -> Prepared:
    """Copy the weights into our layout; the layer itself is not kept."""
    sm = _sm(layer.w13.codes.device)
    chosen = configs_for(f"sm{sm}")
    return Prepared(
        w13=pack(layer.w13, interleaved=True),
        w2=pack(layer.w2, interleaved=False),
        b13=layer.b13,
        b2=layer.b2,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_experts=layer.num_experts,
        num_local_experts=layer.num_local_experts,
        first_expert=layer.local_expert_start,
        alpha=layer.swiglu.alpha,
        beta=layer.swiglu.beta,
        limit=layer.swiglu.limit,
        configs=chosen.configs,
        configs_from=chosen.source,
        mode=mode_of(sm) if sm else "interpreter",
    )


def run(layer: Prepared, tokens: Tokens, config: Config | None = None, *, only_compile: bool = False) -> Tensor:
    """bf16 [M, H], every element written. Without a config, the table's for this many pairs.

    only_compile: compile what would be launched, and launch nothing; the output is what memory held."""
    x, ids, weights = tokens.hidden_states.contiguous(), tokens.topk_ids.contiguous(), tokens.topk_weights.contiguous()
    num_tokens, top_k = ids.shape
    num_pairs = num_tokens * top_k
    out = torch.empty(num_tokens, layer.hidden_size, dtype=torch.bfloat16, device=x.device)
    if num_tokens == 0:
        return out
    config = config or choose(layer.configs, num_pairs, layer.num_experts)
    dense = num_tokens <= min(config.dense_up_to, config.tokens, DENSE_TOKENS)
    num_tiles = num_pairs if dense else most_tiles(num_pairs, layer.num_local_experts, config.tokens)
    num_rows = num_pairs * config.tokens if dense else num_pairs
    tiles, order = (ids, ids) if dense else sort(layer, ids, num_tiles, config.tokens, only_compile)
    splits = config.down.splits
    h = torch.empty(num_rows, layer.intermediate_size, dtype=torch.bfloat16, device=x.device)
    z = torch.empty(splits, num_rows, layer.hidden_size, dtype=torch.float32 if config.fp32_z else torch.bfloat16, device=x.device)
    first, experts = layer.first_expert, layer.num_local_experts
    up, down = config.gate_up, config.down
    shared = {"EXPERTS": experts, "PAIRS": DENSE_PAIRS, "DENSE": dense, "BM": config.tokens, "MODE": layer.mode}

    _on(gate_up_kernel, (num_tiles * _row_tiles(2 * layer.intermediate_size, up.blocks),), only_compile)(
        h, x, layer.w13.codes, layer.w13.scales, layer.b13, ids, tiles, order,
        num_tokens, num_pairs, first, top_k, layer.alpha, layer.beta, layer.limit or 0.0,
        K=layer.hidden_size, N=layer.intermediate_size, LIMITED=layer.limit is not None, WIDE=layer.w13.wide,
        BLOCKS=up.blocks, STEPS=up.steps, RASTER=up.raster, STAGES=up.stages, num_warps=up.warps, **shared,
    )  # fmt: skip
    _on(down_kernel, (num_tiles * _row_tiles(layer.hidden_size, down.blocks), splits), only_compile)(
        z, h, layer.w2.codes, layer.w2.scales, layer.b2, ids, tiles, order,
        num_tokens, num_pairs, first, top_k, num_rows,
        K=layer.intermediate_size, N=layer.hidden_size, WIDE=layer.w2.wide,
        BLOCKS=down.blocks, STEPS=down.steps, SPLITS=splits, RASTER=down.raster, STAGES=down.stages, num_warps=down.warps, **shared,
    )  # fmt: skip
    _on(add_slots, (num_tokens, triton.cdiv(layer.hidden_size, ADD_COLUMNS)), only_compile)(
        out, z, ids, weights, num_pairs, first, top_k, num_rows,
        H=layer.hidden_size, MAX_TOP_K=MAX_TOP_K, SPLITS=splits, BLOCK=ADD_COLUMNS, **shared,
    )  # fmt: skip
    return out


def warm_up(layer: Prepared, max_num_tokens: int) -> None:
    """Compile what batches of up to max_num_tokens can need, with ids that all name the first local expert."""
    from moebench.problem import Tokens

    def batch(num_tokens: int) -> Tokens:
        device = layer.w2.codes.device
        return Tokens(
            hidden_states=torch.zeros(num_tokens, layer.hidden_size, dtype=torch.bfloat16, device=device),
            topk_ids=torch.full((num_tokens, MAX_TOP_K), layer.first_expert, dtype=torch.int32, device=device),
            topk_weights=torch.zeros(num_tokens, MAX_TOP_K, dtype=torch.float32, device=device),
        )

    batches: list[tuple[int, Config | None]] = []
    from_pairs = 0.0
    for config in layer.configs:
        if max_num_tokens * MAX_TOP_K > from_pairs:
            batches += [(num_tokens, config) for num_tokens in (1, config.dense_up_to + 1)]  # without and with sorting
        from_pairs = config.up_to * layer.num_experts
    if max_num_tokens * MAX_TOP_K > SORT_AT_ONCE:
        batches.append((SORT_AT_ONCE // MAX_TOP_K + 1, None))
    batches = list(dict.fromkeys(batches))
    with _compiling_at_once():
        for num_tokens, chosen in batches:
            run(layer, batch(num_tokens), chosen, only_compile=True)
    for num_tokens, chosen in batches:
        run(layer, batch(num_tokens), chosen)


def sort(layer: Prepared, ids: Tensor, num_tiles: int, tokens: int, only_compile: bool = False) -> tuple[Tensor, Tensor]:
    """Tiles and order as `route.py` describes them."""
    num_pairs, experts = ids.numel(), layer.num_local_experts
    bins = triton.next_power_of_2(experts)
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=ids.device)
    order = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    if num_pairs <= SORT_AT_ONCE:
        _on(sort_pairs, (triton.cdiv(num_pairs, SORT_BLOCK) + 1,), only_compile)(
            order, tiles, ids, num_pairs, layer.first_expert, num_tiles,
            EXPERTS=experts, BINS=bins, BM=tokens, BLOCK=SORT_BLOCK, CHUNK=SORT_CHUNK, num_warps=8,
        )  # fmt: skip
        return tiles, order
    blocks = triton.cdiv(num_pairs, COUNT_BLOCK)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=ids.device)
    _on(count_pairs, (blocks,), only_compile)(counts, ids, num_pairs, layer.first_expert, EXPERTS=experts, BINS=bins, BLOCK=COUNT_BLOCK)
    _on(place_pairs, (blocks + 1,), only_compile)(
        order, tiles, counts, ids, num_pairs, layer.first_expert, num_tiles,
        EXPERTS=experts, BINS=bins, BM=tokens, BLOCK=COUNT_BLOCK, CHUNK=PLACE_CHUNK, num_warps=8,
    )  # fmt: skip
    return tiles, order


def most_tiles(num_pairs: int, experts: int, tokens: int) -> int:
    """Tiles if every pair is local and they are spread as badly as possible: each expert but one has one pair too many for its tiles."""
    return num_pairs if num_pairs <= experts else experts + (num_pairs - experts) // tokens


def _on(kernel: Any, grid: tuple[int, ...], only_compile: bool) -> Callable[..., object]:  # Triton types neither way
    return partial(kernel.warmup, grid=grid) if only_compile else kernel[grid]


@contextmanager
def _compiling_at_once() -> Iterator[None]:
    """What is only compiled meanwhile is compiled by all cores; one after the other where this Triton cannot."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode  # in 3.6.0 and 3.7.1
    except ImportError:
        yield
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, AsyncCompileMode(pool):
        yield


def _row_tiles(rows: int, blocks: int) -> int:
    return -(-rows // (64 * blocks))


def mode_of(sm: int) -> str:
    """How weights are dequantized on such a GPU; multiplying pairs of bf16 came with sm90."""
    return "ptx" if sm >= 90 else "ops"


def _sm(device: torch.device) -> int:
    """90 for sm90; 0 where Triton interprets."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
