"""The weights as both kernels read them: the checkpoint's 4.25 bits per weight in the register order of an FP8 tensor core.

A stage is 64 rows of one expert and `Stage.columns` columns, contiguous: planes of codes, then scales. Stages follow each other along
the columns, then along the rows. Rows are padded to whole stages with codes 0.

Thread t = 32w + 4g + c of a warpgroup has rows r = 16w + g and r + 8 (`half` 0 and 1) of a stage, and of each chunk of 128 columns one
block of 32, number c, so that it needs one scale byte for each row and chunk:

    plane 2 * chunk + half      16 bytes for each t: words j = 0..3, which are columns 32c + 8j + 0..7 of the chunk
    a plane for half a chunk    16 bytes for each t: words (half, j = 0..1), which are columns 16c + 8j + 0..7
    scales                      2 * chunks bytes for each t: (chunk, half)
    scales of half a chunk      2 bytes for each t // 2: half

A word has 8 codes: magnitude i in bits 4i..4i+2, the sign of i < 4 in bit 8i + 7, the sign of i >= 4 in bit 8(i - 4) + 3.

Scales. e4m3 has 4 bits of exponent, of which e2m1's own magnitudes (0.5 to 6) need four steps, so a row has room for 12 different block
scales: a block's byte is d = 12 - (the row's largest scale byte - its own), 1 <= d <= 12, its weights become code * 2^(d - 6) exactly, and
2^(largest - 133) is the row's factor, a float32. Blocks of zeros have no scale worth keeping and do not count. A block that is smaller
than that is an *outlier*: its codes in the stage are 0, and it goes to a list that the kernel adds in float32; exactly, while it is not
below 2^-143 of the row's largest, where float32 has nothing left of it. A row with scale byte 255 (NaN) has the factor NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebench.kernels.hopper_mxfp4_bf16_details.shape import OUTLIER_BYTES, TILE_ROWS, Stage

if TYPE_CHECKING:
    from moebench.mx import Mxfp4

GROUP = 32  # weights along k with one scale
WINDOW = 12  # scale bytes that fit a row
FACTOR_BIAS = 133  # of a row: E8M0's 127, and the 6 by which the smallest e4m3 exponent is lower
NAN_BYTE = 255


class Packed(NamedTuple):
    stages: Tensor  # uint8 [E, tiles, stages, Stage.bytes]
    row_factor: Tensor  # float32 [E, tiles * 64], rows in the order of the accumulator
    outlier_starts: Tensor  # int32 [E * tiles + 1]: a tile's outliers are those from here to the next one's
    outliers: Tensor  # uint8 [n, 32]: int32 row of the tile + 64 * block, float32 scale over row factor, 8 unused, 16 bytes of codes


def pack(weight: Mxfp4, stage: Stage, order: Tensor | None = None) -> Packed:
    """Both halves of an Mxfp4 [E, N, K]. order: the row at each place of the accumulator's order, -1 for zeros; its length is a multiple
    of 64. None: as they are.

    Counts outliers, which synchronizes: for `prepare` only."""
    experts, rows, groups = weight.scales.shape
    device = weight.codes.device
    order = torch.arange(rows, device=device) if order is None else order
    rows = len(order)
    empty = (order < 0).view(-1, 1)  # bool [rows, 1]
    tiles, stages = rows // TILE_ROWS, stage.count(groups * GROUP)
    packed = torch.empty(experts, tiles, stages, stage.bytes, dtype=torch.uint8, device=device)
    factor = torch.empty(experts, rows, dtype=torch.float32, device=device)
    counts, outliers = [], []
    for expert in range(experts):  # one by one: unpacked codes take several times their bytes, for a moment
        codes = weight.codes[expert][order.clamp_min(0)].masked_fill_(empty, 0)
        scales = weight.scales[expert][order.clamp_min(0)].int().masked_fill_(empty, 0)
        blocks = codes.view(rows, groups, GROUP // 2)
        nothing = ((blocks & 0x77) == 0).all(-1)  # [rows, groups]: codes 0 and 8 only
        largest = torch.where(nothing | (scales == NAN_BYTE), 0, scales).amax(1, keepdim=True)  # [rows, 1]
        byte = scales - largest + WINDOW
        outside = (byte < 1) & ~nothing
        factor[expert] = _row_factor(largest[:, 0]).masked_fill_((scales == NAN_BYTE).any(1), torch.nan)
        inside = blocks.masked_fill(outside.unsqueeze(-1), 0).view(rows, groups * GROUP // 2)
        packed[expert] = _stages(inside, byte.clamp(1, WINDOW).to(torch.uint8), stage)
        counts.append(outside.view(tiles, -1).sum(1))
        outliers.append(_outliers(blocks, scales - largest, outside))
    starts = torch.cat((torch.zeros(1, dtype=torch.int64, device=device), torch.cat(counts).cumsum(0))).int()
    return Packed(packed, factor, starts, torch.cat(outliers))


def gate_up_rows(intermediate: int, stage: Stage, device: torch.device) -> Tensor:
    """int64: the row of W13 at each place of the accumulator's order, -1 for zeros at the end. Rows 2i and 2i + 1 (gate and up) become
    r = 16w + g and r + 8 of a tile, and the 32 columns i of a tile are those whose places in a row of bf16 numbers follow each other:
    tile 32t + 8w + g, see `bf16_place` of layer.cuh."""
    place = torch.arange(stage.filled(intermediate), device=device)
    rest = place % stage.columns
    half = rest >= 128 * stage.chunks
    inside = torch.where(half, rest - 128 * stage.chunks, rest % 128)
    c, j = inside >> 1 & 3, inside >> 5
    column = place - inside + torch.where(half, 16, 32) * c + 8 * j + 2 * (inside >> 3 & 3) + (inside & 1)
    row = 2 * column.view(-1, 4, 1, 8) + torch.arange(2, device=device).view(2, 1)  # tile, w, gate or up, g
    return torch.where(column.view(-1, 4, 1, 8) < intermediate, row, -1).reshape(-1)


def _row_factor(largest: Tensor) -> Tensor:
    return torch.exp2((largest - FACTOR_BIAS).double()).float()


def _stages(codes: Tensor, scales: Tensor, stage: Stage) -> Tensor:
    """uint8 [tiles, stages, bytes] of codes [rows, K / 2] (low nibble first) and bytes d [rows, K / 32], rows as in the accumulator."""
    rows, half_k = codes.shape
    count = stage.count(2 * half_k)
    codes = torch.nn.functional.pad(codes, (0, count * stage.columns // 2 - half_k))
    scales = torch.nn.functional.pad(scales, (0, count * stage.columns // GROUP - scales.shape[1]), value=1)
    words = _words(codes.view(rows, -1, 4)).view(-1, 4, 2, 8, count, stage.columns // 2)  # tile, w, half, g, stage, bytes
    scales = scales.view(-1, 4, 2, 8, count, stage.columns // GROUP)
    tiles, whole = words.shape[0], stage.chunks * 64
    chunks = words[..., :whole].reshape(tiles, 4, 2, 8, count, stage.chunks, 4, 16)  # tile, w, half, g, stage, chunk, c, bytes of j
    parts = [chunks.permute(0, 4, 5, 2, 1, 3, 6, 7)]
    if stage.half:
        parts.append(words[..., whole:].reshape(tiles, 4, 2, 8, count, 4, 8).permute(0, 4, 1, 3, 5, 2, 6))
    groups = stage.chunks * 4
    parts.append(scales[..., :groups].reshape(tiles, 4, 2, 8, count, stage.chunks, 4).permute(0, 4, 1, 3, 6, 5, 2))
    if stage.half:
        parts.append(scales[..., groups:].permute(0, 4, 1, 3, 5, 2))
    return torch.cat([part.reshape(tiles, count, -1) for part in parts], 2)


def _words(codes: Tensor) -> Tensor:
    """The docstring's words, uint8 [..., 4], of 8 codes in checkpoint order [..., 4]."""
    low, high = codes & 15, codes >> 4  # codes 0 2 4 6, codes 1 3 5 7
    signs = torch.stack((low[..., 0], high[..., 0], low[..., 1], high[..., 1]), -1) & 8  # of codes 0 to 3
    later = torch.stack((low[..., 2], high[..., 2], low[..., 3], high[..., 3]), -1) & 8  # of codes 4 to 7
    return low & 7 | later | (high & 7) << 4 | signs << 4


def _outliers(blocks: Tensor, relative: Tensor, outside: Tensor) -> Tensor:
    """uint8 [n, 32], ordered by row and thus by tile; relative is a scale byte less the row's largest."""
    row, group = outside.nonzero(as_tuple=True)
    place = (row % TILE_ROWS + TILE_ROWS * group).int()
    scale = torch.exp2((relative[row, group] + FACTOR_BIAS - 127).double()).float()
    unused = torch.zeros(len(row), OUTLIER_BYTES // 4 - 6, dtype=torch.int32, device=blocks.device)
    head = torch.cat((place.view(-1, 1), scale.view(torch.int32).view(-1, 1), unused), 1)  # int32 [n, 4]
    return torch.cat((head.view(torch.uint8), blocks[row, group]), 1)
