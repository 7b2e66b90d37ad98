"""The two grouped GEMMs of the layer: dequantized weights from registers times tokens from shared memory.

Weights are the M operand of the tensor core and tokens the N operand (swap-AB), so that 16 tokens cost 16 columns and not 64 rows.
The weights of a thread come out of shared memory in the order in which the tensor core wants them (`layout.py`), and `reshape` and
`permute` only rename registers. Correctness does not depend on that: every step is elementwise or a Triton shape operation, so a
compiler that picks another register layout makes it slower, not wrong."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_pairs", "first_expert", "top_k"])
def gate_up_kernel(
    h_ptr,  # bf16 [rows, I], a row per (token, expert) in the order that `_find_tile` explains
    x_ptr,  # bf16 [M, H]
    codes_ptr,
    scales_ptr,
    bias_ptr,  # bf16 [E_local, 2I] in checkpoint order, or None
    ids_ptr,
    tiles_ptr,
    order_ptr,
    num_tokens,
    num_pairs,
    first_expert,
    top_k,
    alpha,
    beta,
    limit,
    K: tl.constexpr,
    N: tl.constexpr,  # I: rows of h, half the rows of W13
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    DENSE: tl.constexpr,
    LIMITED: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    STEPS: tl.constexpr,
    RASTER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h = swiglu(x @ W13^T + b13), written as bf16."""
    ROW_BLOCKS: tl.constexpr = 2 * N // 64
    N_TILES: tl.constexpr = (ROW_BLOCKS + BLOCKS - 1) // BLOCKS
    tile, n_tile = _raster(tl.program_id(0), tl.num_programs(0) // N_TILES, N_TILES, RASTER)
    expert, source, target, valid = _find_tile(
        tile, ids_ptr, tiles_ptr, order_ptr, num_tokens, num_pairs, first_expert, top_k, EXPERTS, PAIRS, DENSE, BM, True
    )
    if expert < 0:
        return
    block = n_tile * BLOCKS
    x_rows = x_ptr + source.to(tl.int64) * K
    acc = _multiply(x_rows, valid, codes_ptr, scales_ptr, expert, block, 0, K, K, ROW_BLOCKS, WIDE, MODE, BLOCKS, BM, STEPS, STAGES)

    # Row 16w + r of a block is gate 8w + r and row 16w + 8 + r its up: both belong to one thread.
    pairs = tl.permute(tl.reshape(acc, (BLOCKS, 4, 2, 8, BM)), (0, 1, 3, 4, 2))
    gate, up = tl.split(tl.reshape(pairs, (BLOCKS * 32, BM, 2)))
    column = block * 32 + tl.arange(0, BLOCKS * 32)
    inside = column < N
    if bias_ptr is not None:
        bias_column = bias_ptr + expert * (2 * N) + 2 * column
        gate += tl.load(bias_column, mask=inside, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_column + 1, mask=inside, other=0.0).to(tl.float32)[:, None]
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    h = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    h_ptrs = h_ptr + target.to(tl.int64)[None, :] * N + column[:, None]
    tl.store(h_ptrs, to_bf16(h, MODE), mask=inside[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_pairs", "first_expert", "top_k", "num_rows"])
def down_kernel(
    z_ptr,  # fp32 or bf16 [SPLITS, rows, H]
    h_ptr,  # bf16 [rows, I]
    codes_ptr,
    scales_ptr,
    bias_ptr,  # bf16 [E_local, H] or None
    ids_ptr,
    tiles_ptr,
    order_ptr,
    num_tokens,
    num_pairs,
    first_expert,
    top_k,
    num_rows,
    K: tl.constexpr,  # I
    N: tl.constexpr,  # H
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    RASTER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """z = h @ W2^T + b2 per (token, expert); with SPLITS > 1 each split of K writes its own part of the sum."""
    ROW_BLOCKS: tl.constexpr = (N + 63) // 64
    N_TILES: tl.constexpr = (ROW_BLOCKS + BLOCKS - 1) // BLOCKS
    BK: tl.constexpr = 64 * STEPS
    SPLIT_K: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS) * BK
    split = tl.program_id(1)
    tile, n_tile = _raster(tl.program_id(0), tl.num_programs(0) // N_TILES, N_TILES, RASTER)
    expert, source, target, valid = _find_tile(
        tile, ids_ptr, tiles_ptr, order_ptr, num_tokens, num_pairs, first_expert, top_k, EXPERTS, PAIRS, DENSE, BM, False
    )
    if expert < 0:
        return
    block = n_tile * BLOCKS
    k_begin = split * SPLIT_K
    k_end = tl.minimum(k_begin + SPLIT_K, K)
    h_rows = h_ptr + source.to(tl.int64) * K
    z = _multiply(h_rows, valid, codes_ptr, scales_ptr, expert, block, k_begin, k_end, K, ROW_BLOCKS, WIDE, MODE, BLOCKS, BM, STEPS, STAGES)

    column = block * 64 + tl.arange(0, BLOCKS * 64)
    inside = column < N
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * N + column, mask=inside & (split == 0), other=0.0)
        z += bias.to(tl.float32)[:, None]
    z_rows = (split * num_rows + target).to(tl.int64)
    z_ptrs = z_ptr + z_rows[None, :] * N + column[:, None]
    z = to_bf16(z, MODE) if z_ptr.dtype.element_ty == tl.bfloat16 else z
    tl.store(z_ptrs, z, mask=inside[:, None] & valid[None, :])


@triton.jit
def _raster(program, num_tiles, N_TILES: tl.constexpr, RASTER: tl.constexpr):
    """Program -> (token tile, row tile), in bands of RASTER token tiles, so that programs running together share weights."""
    if RASTER == 1:
        tile = program // N_TILES
        n_tile = program % N_TILES
    else:
        first = program // (RASTER * N_TILES) * RASTER
        height = tl.minimum(num_tiles - first, RASTER)
        inside = program % (RASTER * N_TILES)
        tile = first + inside % height
        n_tile = inside // height
    return tile, n_tile


@triton.jit
def _find_tile(
    tile,
    ids_ptr,
    tiles_ptr,
    order_ptr,
    num_tokens,
    num_pairs,
    first_expert,
    top_k,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
):
    """Local expert of a tile (-1: none), and for each of its BM columns the row it reads, the row it writes, whether it exists.

    DENSE, for at most BM tokens and PAIRS pairs: tile t belongs to pair t, and to the expert of it if no earlier pair has the same;
    all tokens are columns, and the ones that did not choose the expert are not written. Rows are t * BM + token.
    Else the routing kernels have sorted the pairs by expert: h rows are sorted positions, z rows are pairs."""
    column = tl.arange(0, BM)
    if DENSE:
        pair = tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        mine = tl.load(ids_ptr + tile)
        earlier = tl.sum(((ids == mine) & (pair < tile)).to(tl.int32), 0)
        expert = mine - first_expert
        expert = tl.where((earlier == 0) & (expert < EXPERTS), expert, -1)
        slot = tl.arange(0, 8)
        slots = column[:, None] * top_k + slot[None, :]
        exists = (slot < top_k)[None, :] & (column < num_tokens)[:, None]
        chosen = tl.load(ids_ptr + slots, mask=exists, other=-1)
        valid = tl.sum(((chosen == mine) & exists).to(tl.int32), 1) > 0
        target = tile * BM + column
        source = column if FROM_TOKENS else target
    else:
        expert = tl.load(tiles_ptr + 3 * tile)
        begin = tl.load(tiles_ptr + 3 * tile + 1)
        end = tl.load(tiles_ptr + 3 * tile + 2)
        position = tl.minimum(begin + column, end - 1)
        valid = begin + column < end
        pair = tl.load(order_ptr + position, mask=expert >= 0, other=0)
        source = pair // top_k if FROM_TOKENS else position
        target = position if FROM_TOKENS else pair
    return expert, source, target, valid


@triton.jit
def _multiply(
    x_rows,  # pointers [BM]
    valid,  # [BM]; other columns may come out as anything
    codes_ptr,
    scales_ptr,
    expert,
    block,
    k_begin,
    k_end,
    K: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 [BLOCKS * 64, BM]: weight rows of row blocks block.. times tokens, over k_begin <= k < k_end."""
    WHOLE_COLUMNS: tl.constexpr = BM > 32  # reading rows that do not exist (the last one instead) costs less than masking wide tiles
    GROUP: tl.constexpr = 32  # K of a code tile
    STEP: tl.constexpr = 64  # K of a scale block
    QUADS: tl.constexpr = 512  # 16-bit quads in a code tile of 64 rows
    WORDS: tl.constexpr = 32  # 32-bit words of 4 scales in a scale block of 64 rows
    BK: tl.constexpr = STEP * STEPS
    K_GROUPS: tl.constexpr = K // GROUP
    K_STEPS: tl.constexpr = (K + STEP - 1) // STEP
    GROUPS: tl.constexpr = BK // GROUP

    row_block = tl.minimum(block + tl.arange(0, BLOCKS), ROW_BLOCKS - 1)  # what is computed twice is not written
    first = (expert * ROW_BLOCKS).to(tl.int64) + row_block  # int64: 256 experts of 4096 x 7168 are 3.8e9 bytes
    quad = tl.arange(0, GROUPS * QUADS)
    k = tl.arange(0, BK)
    word = tl.arange(0, STEPS * WORDS)
    code_ptrs = codes_ptr + (first * (K_GROUPS * QUADS))[:, None] + quad[None, :]
    scale_ptrs = scales_ptr + (first * (K_STEPS * WORDS))[:, None] + word[None, :]
    x_ptrs = x_rows[:, None] + k[None, :]

    acc = tl.zeros((BLOCKS * 64, BM), tl.float32)
    for start in tl.range(k_begin, k_end, BK, num_stages=STAGES):
        # Beyond K the codes and x are zeros, and nothing is read: 2880 = 22.5 * 128 needs no padding.
        in_k = k < K - start
        if K % BK == 0 and WHOLE_COLUMNS:
            x = tl.load(x_ptrs + start)
        elif WHOLE_COLUMNS:
            x = tl.load(x_ptrs + start, mask=in_k[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs + start, mask=valid[:, None] & in_k[None, :], other=0.0)
        if K % BK == 0:
            codes = tl.load(code_ptrs + start * (QUADS // GROUP))
        else:
            codes = tl.load(code_ptrs + start * (QUADS // GROUP), mask=(quad // QUADS < K_GROUPS - start // GROUP)[None, :], other=0)
        if K_STEPS % STEPS == 0:
            scales = tl.load(scale_ptrs + start // (STEP // WORDS))
        else:
            scales = tl.load(scale_ptrs + start // (STEP // WORDS), mask=(word // WORDS < K_STEPS - start // STEP)[None, :], other=0)
        weights = dequantize(codes, scales, WIDE, MODE, BLOCKS, STEPS)
        if MODE == "interpreter":  # whose dot takes bf16 for integers
            acc = tl.dot(_to_fp32(weights), tl.trans(_to_fp32(x)), acc, input_precision="ieee")
        else:
            acc = tl.dot(weights, tl.trans(x), acc)
    return acc


@triton.jit
def dequantize(codes, scales, WIDE: tl.constexpr, MODE: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr):
    """bf16 [BLOCKS * 64, STEPS * 64] of codes int16 [BLOCKS, STEPS * 1024] and scales int32 [BLOCKS, STEPS * 32], exact."""
    GROUPS: tl.constexpr = 2 * STEPS
    if MODE == "ptx":
        g0h0, g0h1, g1h0, g1h1 = _scales_ptx(scales)
    else:
        g0h0, g0h1, g1h0, g1h1 = _scales_ops(scales)
    scale = tl.join(tl.join(g0h0, g0h1), tl.join(g1h0, g1h1))
    # step, w, r, row half, group -> group, w, r, c, row half, k parity, the order of the codes
    scale = tl.permute(tl.reshape(scale, (BLOCKS, STEPS, 4, 8, 2, 2)), (0, 1, 5, 2, 3, 4))
    scale = tl.reshape(scale, (BLOCKS, GROUPS, 4, 8, 1, 2, 1))
    scale = tl.reshape(tl.broadcast_to(scale, (BLOCKS, GROUPS, 4, 8, 4, 2, 2)), (BLOCKS, GROUPS * 512))
    if MODE == "ptx":
        a, b, c, d = _dequantize_ptx_wide(codes, scale) if WIDE else _dequantize_ptx(codes, scale)
    else:
        a, b, c, d = _dequantize_ops(codes, scale, WIDE, MODE)
    # a: k 0..7 of each 16, slice 0; b: k 8..15, slice 0; c, d: the same of slice 1
    quads = tl.join(tl.join(a, b), tl.join(c, d))
    quads = tl.reshape(quads, (BLOCKS, GROUPS, 4, 8, 4, 2, 2, 2, 2))  # block, group, w, r, c, row half, k parity, k half, slice
    return tl.reshape(tl.permute(quads, (0, 2, 5, 3, 1, 8, 7, 4, 6)), (BLOCKS * 64, GROUPS * 32))


# A quad holds four codes so that `& 0x81C0` leaves a bf16 with the code's sign, its two exponent bits at the bottom of the exponent
# field and its mantissa bit at the top of the mantissa: value * 2^-126, subnormals included. Shifted left by 3 and by 6 the same mask
# finds the second and the third code; the fourth has its sign in bit 14, exponent in bits 11 and 10, mantissa in bit 13.


@triton.jit
def _dequantize_ptx(codes, scale):
    """scale holds 2^(126 + s); one instruction multiplies two weights with it. pack=2 and elementwise: lane i of $4 and $5 alone
    makes lane i of each output, whatever elements the compiler puts there. "&": inputs are read after the first output is written."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, u;
        and.b32 t, $4, 0x81C081C0;
        mul.rn.bf16x2 $0, t, $5;
        shl.b32 t, $4, 3;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 $1, t, $5;
        shl.b32 t, $4, 6;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 $2, t, $5;
        shl.b32 t, $4, 1;
        and.b32 t, t, 0x80008000;
        shr.u32 u, $4, 3;
        lop3.b32 t, u, 0x01800180, t, 0xEA;
        shr.u32 u, $4, 7;
        lop3.b32 t, u, 0x00400040, t, 0xEA;
        mul.rn.bf16x2 $3, t, $5;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r",
        args=[codes, scale],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _dequantize_ptx_wide(codes, scale):
    """The same with 2^126 as a multiplication of its own, for layers with scales above 2."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, u, f;
        mov.b32 f, 0x7E807E80;
        and.b32 t, $4, 0x81C081C0;
        mul.rn.bf16x2 t, t, f;
        mul.rn.bf16x2 $0, t, $5;
        shl.b32 t, $4, 3;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, f;
        mul.rn.bf16x2 $1, t, $5;
        shl.b32 t, $4, 6;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, f;
        mul.rn.bf16x2 $2, t, $5;
        shl.b32 t, $4, 1;
        and.b32 t, t, 0x80008000;
        shr.u32 u, $4, 3;
        lop3.b32 t, u, 0x01800180, t, 0xEA;
        shr.u32 u, $4, 7;
        lop3.b32 t, u, 0x00400040, t, 0xEA;
        mul.rn.bf16x2 t, t, f;
        mul.rn.bf16x2 $3, t, $5;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r",
        args=[codes, scale],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _scales_ptx(words):
    """uint16 bits of the bf16 scales of the four bytes of each word. Bytes are rotated right by one (`layout.py`), so that the upper
    byte of a scale is the lower seven bits of its byte, and the lower byte of the scale the eighth bit where it is."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 h, l, t;
        and.b32 h, $4, 0x7F7F7F7F;
        and.b32 l, $4, 0x80808080;
        prmt.b32 t, l, h, 0x5140;
        mov.b32 {$0, $1}, t;
        prmt.b32 t, l, h, 0x7362;
        mov.b32 {$2, $3}, t;
        }
        """,
        "=h,=h,=h,=h,r",
        args=[words],
        dtype=(tl.uint16, tl.uint16, tl.uint16, tl.uint16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _scales_ops(words):
    return _scale_op(words), _scale_op(words >> 8), _scale_op(words >> 16), _scale_op(words >> 24)


@triton.jit
def _scale_op(byte):
    return (((byte & 0x7F) << 8) | (byte & 0x80)).to(tl.uint16)


@triton.jit
def _dequantize_ops(codes, scale, WIDE: tl.constexpr, MODE: tl.constexpr):
    """`_dequantize_ptx` in Triton's own operations, through fp32: a product has two significant bits, so nothing rounds."""
    bits = codes.to(tl.uint32)
    factor = (scale.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    a = _times(bits & 0x81C0, factor, WIDE, MODE)
    b = _times((bits << 3) & 0x81C0, factor, WIDE, MODE)
    c = _times((bits << 6) & 0x81C0, factor, WIDE, MODE)
    d = _times(((bits << 1) & 0x8000) | ((bits >> 3) & 0x0180) | ((bits >> 7) & 0x0040), factor, WIDE, MODE)
    return a, b, c, d


@triton.jit
def _times(bits, factor, WIDE: tl.constexpr, MODE: tl.constexpr):
    value = (bits << 16).to(tl.float32, bitcast=True)
    if WIDE:
        value *= 8.507059173023462e37  # 2^126
    return to_bf16(value * factor, MODE)


@triton.jit
def to_bf16(x, MODE: tl.constexpr):
    """Nearest, ties to even. Triton's interpreter (3.6, 3.7) cuts instead, and drops subnormals, so there it is done by hand."""
    if MODE == "interpreter":
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        y = (tl.where(x == x, rounded, 0x7FC00000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def _to_fp32(x):
    """bf16 to fp32 for the interpreter, whose own cast drops subnormals."""
    return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
