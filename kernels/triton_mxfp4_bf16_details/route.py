"""Kernels around the GEMMs: sort (token, slot) pairs by local expert before, add each token's slots after.

Nothing here uses atomics on memory: each pair computes its own place, so that a result depends on its inputs only."""

import triton
import triton.language as tl

from moebench.kernels.triton_mxfp4_bf16_details.gemm import to_bf16


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "num_tiles"])
def sort_pairs(
    order_ptr,  # int32 [pairs], out: pairs of local experts, by expert, then by pair; the rest is left as it is
    tiles_ptr,  # int32 [tiles, 3], out: local expert (-1: none), first position, one past the expert's last
    ids_ptr,  # int32 [pairs]
    num_pairs,
    first_expert,
    num_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For a few thousand pairs, in one launch: a pair's place is the number of pairs before it, counted by looking at all of them."""
    program = tl.program_id(0)
    if program == tl.num_programs(0) - 1:
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, num_pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            expert = _local(ids_ptr, pair, num_pairs, first_expert, EXPERTS)
            counts += tl.histogram(expert, BINS, mask=expert < EXPERTS)
        _write_tiles(tiles_ptr, counts, num_tiles, EXPERTS, BINS, BM)
    else:
        pair = program * BLOCK + tl.arange(0, BLOCK)
        expert = _local(ids_ptr, pair, num_pairs, first_expert, EXPERTS)
        place = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, num_pairs, CHUNK):
            other_pair = start + tl.arange(0, CHUNK)
            other = _local(ids_ptr, other_pair, num_pairs, first_expert, EXPERTS)
            before = (other[None, :] < expert[:, None]) | ((other[None, :] == expert[:, None]) & (other_pair[None, :] < pair[:, None]))
            place += tl.sum(before.to(tl.int32), 1)
        tl.store(order_ptr + place, pair, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def count_pairs(
    counts_ptr,  # int32 [blocks, BINS], out
    ids_ptr,
    num_pairs,
    first_expert,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First of two launches for many pairs: how often each expert occurs in each block of pairs."""
    program = tl.program_id(0)
    expert = _local(ids_ptr, program * BLOCK + tl.arange(0, BLOCK), num_pairs, first_expert, EXPERTS)
    tl.store(counts_ptr + program * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS, mask=expert < EXPERTS))


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "num_tiles"])
def place_pairs(
    order_ptr,
    tiles_ptr,
    counts_ptr,
    ids_ptr,
    num_pairs,
    first_expert,
    num_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Second launch: a pair's place is the number of pairs of lower experts, of its expert in earlier blocks, and before it in its own."""
    program = tl.program_id(0)
    blocks = tl.num_programs(0) - 1
    bin_ = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for start in range(0, blocks, 16):
        block = start + tl.arange(0, 16)
        counts = tl.load(counts_ptr + block[:, None] * BINS + bin_[None, :], mask=(block < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((block < program)[:, None], counts, 0), 0)
    if program == blocks:
        _write_tiles(tiles_ptr, total, num_tiles, EXPERTS, BINS, BM)
    else:
        base = tl.cumsum(total, 0) - total + earlier
        other_pair = program * BLOCK + tl.arange(0, BLOCK)
        other = _local(ids_ptr, other_pair, num_pairs, first_expert, EXPERTS)
        for start in range(0, BLOCK, CHUNK):
            pair = program * BLOCK + start + tl.arange(0, CHUNK)
            expert = _local(ids_ptr, pair, num_pairs, first_expert, EXPERTS)
            before = (other[None, :] == expert[:, None]) & (other_pair[None, :] < pair[:, None])
            place = tl.sum(before.to(tl.int32), 1) + _gather(base, expert, BINS)
            tl.store(order_ptr + place, pair, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "top_k", "num_rows"])
def add_slots(
    out_ptr,  # bf16 [M, H], out
    z_ptr,  # fp32 or bf16 [SPLITS, rows, H]
    ids_ptr,  # int32 [M, top_k]
    weights_ptr,  # fp32 [M, top_k]
    num_pairs,
    first_expert,
    top_k,
    num_rows,
    H: tl.constexpr,
    EXPERTS: tl.constexpr,
    MAX_TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] = sum over its local slots, in slot order and fp32, of router weight times z."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(MAX_TOP_K):  # unrolled, so that all loads are under way together
        pair = token * top_k + slot
        expert_id = tl.load(ids_ptr + pair, mask=slot < top_k, other=-1)
        local = (slot < top_k) & (expert_id >= first_expert) & (expert_id < first_expert + EXPERTS)
        if DENSE:  # the expert's tile belongs to the first pair that chose it
            other_pair = tl.arange(0, PAIRS)
            ids = tl.load(ids_ptr + other_pair, mask=other_pair < num_pairs, other=-1)
            row = tl.min(tl.where(ids == expert_id, other_pair, PAIRS), 0) * BM + token
        else:
            row = pair
        z = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            z_row = (split * num_rows + row).to(tl.int64)
            z += tl.load(z_ptr + z_row * H + column, mask=inside & local, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair, mask=local, other=0.0) * z
    tl.store(out_ptr + token.to(tl.int64) * H + column, to_bf16(total, MODE), mask=inside)


@triton.jit
def _local(ids_ptr, pair, num_pairs, first_expert, EXPERTS: tl.constexpr):
    """Local expert of each pair; EXPERTS, which sorts last, for one of another rank, an id out of range, a pair that does not exist."""
    expert = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) - first_expert
    return tl.where((expert >= 0) & (expert < EXPERTS) & (pair < num_pairs), expert, EXPERTS)


@triton.jit
def _write_tiles(tiles_ptr, counts, num_tiles, EXPERTS: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr):
    """Cut each expert's pairs in tiles of BM; the entries after the last tile say -1."""
    tiles = (counts + BM - 1) // BM
    end = tl.cumsum(counts, 0)
    last_tile = tl.cumsum(tiles, 0)
    for start in range(0, num_tiles, 32):
        tile = start + tl.arange(0, 32)
        expert = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), 1)  # BINS beyond the last tile
        begin = _gather(end - counts, expert, BINS) + (tile - _gather(last_tile - tiles, expert, BINS)) * BM
        exists = tile < num_tiles
        tl.store(tiles_ptr + 3 * tile, tl.where(expert < EXPERTS, expert, -1), mask=exists)
        tl.store(tiles_ptr + 3 * tile + 1, begin, mask=exists)
        tl.store(tiles_ptr + 3 * tile + 2, _gather(end, expert, BINS), mask=exists)


@triton.jit
def _gather(table, index, BINS: tl.constexpr):
    """table[index], and 0 where index is BINS or more; a small table in registers is searched faster than written and read back."""
    return tl.sum(tl.where(tl.arange(0, BINS)[None, :] == index[:, None], table[None, :], 0), 1)
