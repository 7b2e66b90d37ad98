"""The tensors of a case: a layer's weights as a checkpoint stores them, with the tokens it is given.

Every byte is a pure function of (seed, expert, tensor, element), in 32-bit integer arithmetic that is the same on a CPU and on a
GPU; docs/tensors.md writes it down and tests/test_problem.py recomputes some of it in Python integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebench.case import MODELS, Case
from moebench.mx import BLOCK, Mxfp4
from moebench.routing import Assignment, assign

# Of 256 random bytes, how many give each E2M1 magnitude 0, 0.5, 1, 1.5, 2, 3, 4, 6 of each sign (a zero may be -0):
# a Gaussian of standard deviation 2.6 scales, rounded to E2M1. Mean square 6.5078125.
CODE_COUNTS = (10, 19, 18, 17, 21, 20, 16, 7)
CODE_MEAN_SQUARE = 6.5078125
# Scale byte = 120 + a row's offset + a block's jitter, so 116..124: away from the codes on whose meaning backends differ.
SCALE_BASE = 120
ROW_OFFSET_COUNTS = (2, 14, 62, 100, 62, 14, 2)  # of 256 bytes, for offsets -3..+3; mean of 4^offset 2.7984619140625
JITTER_COUNTS = (64, 128, 64)  # for -1, 0, +1; mean of 4^jitter 1.5625
WEIGHT_STD = sqrt(CODE_MEAN_SQUARE * 2.7984619140625 * 1.5625) * 2.0 ** (SCALE_BASE - 127)  # 0.0417

PRE_ACTIVATION_STD = 1.5  # of x @ W13.T + b13: clamps at 7 are reached by a few in a thousand and hide nothing else
B13_STD = 0.75  # where the model has biases; then x @ W13.T gets the rest of PRE_ACTIVATION_STD
B2_STD = 2.0 * WEIGHT_STD  # times sqrt(I): about the size of h @ W2.T
BYTE_SUM_STD = sqrt(21845)  # of the sum of four random bytes, (256^2 - 1) / 12 each

# Words that tell the streams of a seed apart.
_W13, _W13_ROW, _W13_BLOCK, _W2, _W2_ROW, _W2_BLOCK, _B13, _B2, _HIDDEN = range(9)
_ALL_EXPERTS = 0xFFFFFFFF  # stands for the expert where a tensor belongs to none


@dataclass(frozen=True, kw_only=True)
class Swiglu:
    """gate = min(gate, limit); up = clamp(up, -limit, limit); gate * sigmoid(alpha * gate) * (up + beta)."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The experts, or their shards, that one rank holds. Backends convert it; nobody modifies it."""

    num_experts: int  # over all ranks
    ep_size: int
    ep_rank: int
    tp_size: int
    tp_rank: int
    hidden_size: int
    intermediate_size: int  # of this rank's shard
    w13: Mxfp4  # [E_local, 2 I, H]; row 2j gates row 2j + 1, as in the checkpoint
    w2: Mxfp4  # [E_local, H, I]
    b13: Tensor | None  # bf16 [E_local, 2 I]
    b2: Tensor | None  # bf16 [E_local, H]; zero on every tensor-parallel rank but the first, so that ranks add it once
    swiglu: Swiglu

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def local_expert_start(self) -> int:
        return self.ep_rank * self.num_local_experts

    def checksum(self) -> int:
        """64 bits over all bytes, where they are: any one changed 8-byte word changes it, any other change all but surely."""
        tensors = [self.w13.codes, self.w13.scales, self.w2.codes, self.w2.scales]
        tensors += [bias for bias in (self.b13, self.b2) if bias is not None]
        with _one_thread():
            return int(torch.stack([_checksum(tensor) * (2 * i + 1) for i, tensor in enumerate(tensors)]).sum().item())


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch after the router. Every rank of a case sees the same tokens."""

    hidden_states: Tensor  # bf16 [M, H]
    topk_ids: Tensor  # int32 [M, top_k], over all experts
    topk_weights: Tensor  # fp32 [M, top_k]

    @property
    def num_tokens(self) -> int:
        return int(self.hidden_states.shape[0])


def make_layer(case: Case, device: str) -> Layer:
    """The rank's slice of a layer that depends on the seed and the sizes only: slices of one layer agree where they overlap."""
    model = MODELS[case.model]
    h, i = case.hidden_size, case.intermediate_size
    start, stop = case.shard
    b2 = _biases(case, device, _B2, (0, h), B2_STD * sqrt(i)) if model.bias else None
    if b2 is not None and case.tp_rank:
        b2.zero_()
    with _one_thread():
        w13 = _weights(case, device, (_W13, _W13_ROW, _W13_BLOCK), rows=(2 * start, 2 * stop), columns=(0, h), full_columns=h)
        w2 = _weights(case, device, (_W2, _W2_ROW, _W2_BLOCK), rows=(0, h), columns=(start, stop), full_columns=i)
    return Layer(
        num_experts=case.num_experts,
        ep_size=case.ep_size,
        ep_rank=case.ep_rank,
        tp_size=case.tp_size,
        tp_rank=case.tp_rank,
        hidden_size=h,
        intermediate_size=stop - start,
        w13=w13,
        w2=w2,
        b13=_biases(case, device, _B13, (2 * start, 2 * stop), B13_STD) if model.bias else None,
        b2=b2,
        swiglu=Swiglu(alpha=model.alpha, beta=model.beta, limit=model.limit),
    )


def make_tokens(case: Case, device: str, assignment: Assignment | None = None) -> Tokens:
    """Hidden states depend on (seed, token, column) and the model's sizes, so a longer batch begins with a shorter one.

    assignment: routing.assign(case), for who has it already."""
    routed = assignment or assign(case)
    key = _key(case.seed, _ALL_EXPERTS, _HIDDEN)
    hidden = torch.empty(case.num_tokens, case.hidden_size, dtype=torch.bfloat16, device=device)
    with _one_thread():
        for first, last in _chunks(case.num_tokens, case.hidden_size, device):
            hidden[first:last] = _gaussian(_grid(first, last, 0, case.hidden_size, case.hidden_size, device), key, _hidden_std(case))
    return Tokens(
        hidden_states=hidden,
        topk_ids=torch.from_numpy(routed.topk_ids.copy()).to(device),
        topk_weights=torch.from_numpy(routed.topk_weights.copy()).to(device),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small in-cache operations gain nothing from a second thread, and wait for it where other programs hold its core: on two
    busy cores, 8 experts of gpt-oss-20b took 0.32 s with one thread and 1.8 to 6.7 s with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _hidden_std(case: Case) -> float:
    """What gives the pre-activations PRE_ACTIVATION_STD."""
    signal = sqrt(PRE_ACTIVATION_STD**2 - B13_STD**2) if MODELS[case.model].bias else PRE_ACTIVATION_STD
    return signal / (WEIGHT_STD * sqrt(case.hidden_size))


def _weights(
    case: Case, device: str, streams: tuple[int, int, int], rows: tuple[int, int], columns: tuple[int, int], full_columns: int
) -> Mxfp4:
    """[E_local, rows, columns] of a matrix with full_columns; one expert after another, chunks of rows within it."""
    (row0, row1), (column0, column1) = rows, columns
    n, k = row1 - row0, column1 - column0
    codes = torch.empty(case.num_local_experts, n, k // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(case.num_local_experts, n, k // BLOCK, dtype=torch.uint8, device=device)
    pairs = torch.from_numpy(_code_pairs()).to(device)
    offsets = torch.tensor(_spread(ROW_OFFSET_COUNTS, SCALE_BASE - 3), dtype=torch.uint8, device=device)
    jitters = torch.tensor(_spread(JITTER_COUNTS, -1), dtype=torch.int8, device=device)
    for local in range(case.num_local_experts):
        code_key, row_key, block_key = (_key(case.seed, case.local_expert_start + local, stream) for stream in streams)
        for first, last in _chunks(n, k // 4, device):
            hashes = _hash(_grid(row0 + first, row0 + last, column0 // 4, column1 // 4, full_columns // 4, device), code_key)
            halves = hashes.view(torch.int16).flatten().int().bitwise_and_(0xFFFF)  # the low half first: little-endian
            torch.index_select(pairs, 0, halves, out=codes[local, first:last].view(-1))
        row = _hash(_grid(row0, row1, 0, 1, 1, device), row_key)
        block = _hash(_grid(row0, row1, column0 // BLOCK, column1 // BLOCK, full_columns // BLOCK, device), block_key)
        scales[local] = offsets[(row & 255).long()] + jitters[(block & 255).long()]
    return Mxfp4(codes, scales)


def _biases(case: Case, device: str, stream: int, columns: tuple[int, int], std: float) -> Tensor:
    """bf16 [E_local, columns]."""
    experts = range(case.local_expert_start, case.local_expert_start + case.num_local_experts)
    return torch.stack([_gaussian(_grid(0, 1, *columns, 0, device), _key(case.seed, expert, stream), std)[0] for expert in experts])


def _gaussian(index: Tensor, key: tuple[int, int], std: float) -> Tensor:
    """bf16: the sum of a hash's four bytes, centred and scaled, which is Gaussian up to its cut at 3.45 standard deviations."""
    hashes = _hash(index, key)
    pairs = (hashes & 0x00FF00FF) + ((hashes >> 8) & 0x00FF00FF)
    centred = (pairs + (pairs >> 16)).bitwise_and_(0xFFFF).sub_(510)
    return (centred.float() * float(np.float32(std / BYTE_SUM_STD))).bfloat16()


def _grid(row0: int, row1: int, column0: int, column1: int, stride: int, device: str) -> Tensor:
    """int32 [rows, columns]: row * stride + column modulo 2^32."""
    row = torch.arange(row0, row1, dtype=torch.int32, device=device).mul_(stride)
    return row[:, None] + torch.arange(column0, column1, dtype=torch.int32, device=device)


def _chunks(rows: int, columns: int, device: str) -> list[tuple[int, int]]:
    """Row ranges that fit a CPU's L2 cache, or keep a GPU's temporaries below half a GiB."""
    size = max(1, (2**17 if device == "cpu" else 2**24) // columns)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def _hash(index: Tensor, key: tuple[int, int]) -> Tensor:
    """mix(mix(index ^ a) + b), in place. Two keys: with one, streams would be reorderings of each other's neighbourhoods."""
    return _mix(_mix(index.bitwise_xor_(_signed(key[0]))).add_(_signed(key[1])))


def _mix(x: Tensor) -> Tensor:
    """_mix_int on int32, in place; products wrap, and a mask makes torch's arithmetic shift a logical one."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _mix_int(x: int) -> int:
    """lowbias32 (Chris Wellons, hash-prospector): a bijection of 32 bits in which each input bit flips half of the output."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _key(seed: int, expert: int, stream: int) -> tuple[int, int]:
    def chain(last: int) -> int:
        state = 0
        for word in (seed, seed >> 32, expert, stream, last):
            state = _mix_int(state + (word & 0xFFFFFFFF) + 0x9E3779B9 & 0xFFFFFFFF)
        return state

    return chain(0), chain(1)


def _signed(word: int) -> int:
    """The int32 with these 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def _code_pairs() -> NDArray[np.uint8]:
    """[65536]: 16 random bits to a byte of two codes, the low 8 bits to the low nibble."""
    code = np.array(_spread(CODE_COUNTS, 0) + _spread(CODE_COUNTS, 8), np.uint8)
    pairs: NDArray[np.uint8] = code[None, :] | code[:, None] << np.uint8(4)
    return pairs.reshape(-1)


def _spread(counts: tuple[int, ...], first: int) -> list[int]:
    """counts[0] times first, then counts[1] times first + 1, ..."""
    return [first + step for step, count in enumerate(counts) for _ in range(count)]


def _checksum(tensor: Tensor) -> Tensor:
    """int64 sum, wrapping, of the tensor's 8-byte words, each moved by its place and sent through a bijection of 64 bits."""
    data = tensor.contiguous().view(torch.uint8).flatten()
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first, last in _chunks(words.numel(), 1, tensor.device.type):
        x = torch.arange(first, last, dtype=torch.int64, device=tensor.device).mul_(0x1E3779B97F4A7C15).add_(words[first:last])
        x ^= (x >> 32).bitwise_and_(0xFFFFFFFF)
        x *= 0x6A09E667F3BCC909
        x ^= (x >> 29).bitwise_and_(0x7FFFFFFFF)
        total += x.sum()
    return total
