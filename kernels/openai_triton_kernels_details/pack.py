# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Ids and weights of the router in the form from which triton_kernels makes its routing data, in one launch."""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    ids_ptr,  # int32 [M, TOP_K], over all experts
    weights_ptr,  # fp32 [M, TOP_K]
    local_ids_ptr,  # int16 [M, TOP_K], -1 where the expert is another rank's
    local_weights_ptr,  # bf16 [M, TOP_K], -1 there
    words_ptr,  # int32 [M, WORDS]: bit e % 32 of word e // 32 says whether the token goes to local expert e
    num_tokens,
    first_expert,
    num_experts,  # local ones
    TOP_K: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens a program packs
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, TOP_K)
    inside = token < num_tokens
    at = token[:, None] * TOP_K + slot[None, :]
    ids = tl.load(ids_ptr + at, mask=inside[:, None], other=-1) - first_expert
    mine = (ids >= 0) & (ids < num_experts) & inside[:, None]
    ids = tl.where(mine, ids, -1)
    weights = tl.load(weights_ptr + at, mask=inside[:, None], other=0.0)
    tl.store(local_ids_ptr + at, ids.to(tl.int16), mask=inside[:, None])
    tl.store(local_weights_ptr + at, tl.where(mine, weights, -1.0).to(tl.bfloat16), mask=inside[:, None])
    bits = tl.where(mine, 1 << (ids & 31), 0)
    for word in tl.static_range(WORDS):
        packed = tl.reduce(tl.where((ids >> 5) == word, bits, 0), 1, _or)
        tl.store(words_ptr + token * WORDS + word, packed, mask=inside)


@triton.jit
def _or(a, b):
    return a | b
