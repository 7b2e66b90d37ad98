"""The weights as the GEMM kernels read them: the checkpoint's 4.25 bits per weight in the register order of a tensor core.

A code tile is 64 weight rows x 32 k = 512 quads of 16 bits = 1 KB, contiguous; tiles follow each other along k, then along rows.
wgmma m64k16 gives thread (warp w, row r, column c) of a warpgroup rows 16w + r and 16w + 8 + r (row half h) and, in a slice of 16 k,
k = 2c + e and 8 + 2c + e (k half j, parity e). So tile[w, r, c, h, e] is a quad of the four codes of one row that have slice s and
k half j, and a thread reads its 8 bytes of each tile in one piece. Two quads that differ in e become one 32-bit register of bf16 pairs.
K of any multiple of 32 needs no padding, rows are padded to a multiple of 64, with zeros.

A scale block is 64 rows x 64 k: byte [w, r, group, h] is an E8M0 scale; an odd last group gets a partner of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moebench.mx import Mxfp4

GROUP = 32  # weights along k with one scale
ROWS = 64  # of a tile
FAST_SCALE_MAX = 128  # up to 2^1, a scale times 2^126 is still a bf16


class Packed(NamedTuple):
    codes: Tensor  # int16 [E, row blocks, K / 32, 512]
    scales: Tensor  # int32 [E, row blocks, ceil(K / 64), 32]
    wide: bool  # scales are 2^s, and not 2^(s + 126) that makes a bf16 of a code's bits in one multiplication


def pack(weight: Mxfp4, interleaved: bool) -> Packed:
    """Both halves of an Mxfp4 [E, N, K]. interleaved: rows 2j and 2j + 1 (gate and up) become the two row halves of a thread.

    Looks at the scales, which synchronizes: for `prepare` only. A layer with a scale byte above 128 takes the wide path, where byte 0
    (2^-127, which a bf16 exponent does not hold) counts as zero and byte 255 (NaN) as infinity."""
    experts, rows, half_k = weight.codes.shape
    blocks, groups = -(-rows // ROWS), half_k * 2 // GROUP
    steps = -(-groups // 2)
    wide = bool((weight.scales > FAST_SCALE_MAX).any())
    codes = torch.empty(experts, blocks, groups, 512, dtype=torch.int16, device=weight.codes.device)
    scales = torch.empty(experts, blocks, steps, 32, dtype=torch.int32, device=weight.codes.device)
    for expert in range(experts):  # one by one: unpacked codes take 8 times their bytes, for a moment
        codes[expert] = _quads(_block_rows(weight.codes[expert], interleaved), groups)
        scales[expert] = _scale_words(_block_rows(weight.scales[expert], interleaved), steps, wide)
    return Packed(codes, scales, wide)


def _block_rows(x: Tensor, interleaved: bool) -> Tensor:
    """[N, bytes] -> [blocks, w, r, h, bytes]."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % ROWS))
    if interleaved:
        return x.view(-1, 4, 8, 2, x.shape[1])
    return x.view(-1, 4, 2, 8, x.shape[1]).transpose(2, 3)


def _quads(x: Tensor, groups: int) -> Tensor:
    """int16 [blocks, groups, 512] of bytes [blocks, w, r, h, K / 2] (low nibble first)."""
    x = x.reshape(-1, 4, 8, 2, groups, 2, 2, 4)  # block, w, r, h, group, slice, k half, c; k parity is the nibble
    fields = torch.stack((_field(x & 15), _field(x >> 4)), -1)  # [..., slice, k half, c, e]
    last = torch.stack((_last_field(x & 15), _last_field(x >> 4)), -1)
    quad = fields[..., 0, 0, :, :] | fields[..., 0, 1, :, :] >> 3 | fields[..., 1, 0, :, :] >> 6 | last[..., 1, 1, :, :]
    quad = quad.permute(0, 4, 1, 2, 5, 3, 6)  # block, group, w, r, c, h, e
    return torch.where(quad >= 1 << 15, quad - (1 << 16), quad).to(torch.int16).reshape(quad.shape[0], groups, 512)


def _field(code: Tensor) -> Tensor:
    """Sign, exponent and mantissa of E2M1 codes where bf16 has its sign, its lowest exponent bits and its highest mantissa bit."""
    code = code.int()
    return (code & 8) << 12 | (code & 7) << 6


def _last_field(code: Tensor) -> Tensor:
    """The same in the four bits that a field and its copies shifted by 3 and 6 leave free."""
    code = code.int()
    return (code & 8) << 11 | (code & 6) << 9 | (code & 1) << 13


def _scale_words(x: Tensor, steps: int, wide: bool) -> Tensor:
    """int32 [blocks, steps, 32] of bytes [blocks, w, r, h, groups]. A byte is rotated right by one, which puts the exponent's low bit
    where bf16 has it in its lower byte and the other seven where bf16 has them in its upper byte."""
    byte = x.int() if wide else x.int() + 126
    byte = (byte >> 1 | byte << 7).to(torch.uint8)
    byte = torch.nn.functional.pad(byte, (0, steps * 2 - byte.shape[-1]))
    byte = byte.view(-1, 4, 8, 2, steps, 2).permute(0, 4, 1, 2, 5, 3)  # block, step, w, r, group, h
    return byte.reshape(byte.shape[0], steps, 128).view(torch.int32)
