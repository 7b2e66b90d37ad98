"""`prefill.cu`: its constants for a layer, its workspace, and the one launch of a call of any size."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebench.kernels.hopper_mxfp4_bf16_details.shape import MAX_TOP_K, SHARED_BYTES, Sizes

if TYPE_CHECKING:
    from moebench.kernels.hopper_mxfp4_bf16_details.weights import PackedLayer

SOURCE = "prefill.cu"
KERNEL = b"hopper_mxfp4_prefill"
WARPS = 12
THREADS = 32 * WARPS
WARPGROUPS, WARPGROUP_TILES = 2, 2
MOST_EXPERTS = 1024  # of a rank
COUNTERS = 5  # besides one for each pass
STATE_BYTES = 5120


LEAST_COLUMNS = 32
MOST_LINES = 12
# What a pass takes besides, in columns: at 1024 tokens of gpt-oss-20b two passes of 96 took 1.08 times as long as two of 80.
PASS_COST = 110
DEVIATIONS = (-1.2, -0.4, 0.4, 1.2)  # of an expert's pairs from their mean, in standard deviations; equally likely


@dataclass(frozen=True, kw_only=True)
class Format:
    """How activations are kept."""

    name: str
    bf16: bool
    parts: int  # columns of the product for a pair: a high and a low one, or one
    weight_slots: int  # ring of stages, of each warpgroup
    columns: tuple[int, ...]  # that a product may have; each is a kernel of its own, see prefill.cu

    @property
    def number_bytes(self) -> int:
        return 2 if self.bf16 else 1

    def columns_for(self, pairs: float) -> int:
        """For so many pairs an expert on average: those with which all passes together should take least."""
        counts = [max(1.0, pairs + deviation * pairs**0.5) for deviation in DEVIATIONS]
        return min(self.columns, key=lambda columns: (columns + PASS_COST) * sum(ceil(count * self.parts / columns) for count in counts))

    def columns_up_to(self, pairs: float) -> tuple[int, ...]:
        """All that calls of up to so many pairs an expert use."""
        counts = {self.columns_for(pairs * step / 256) for step in range(1, 257)} | {self.columns_for(1.0)}
        return tuple(sorted(counts))


# With 128 columns of e4m3 the compiler finds too few registers and waits for every product; with 160 of bf16 it spills in the main loop.
BF16 = Format(name="bf16", bf16=True, parts=1, weight_slots=2, columns=(LEAST_COLUMNS, 64, 80, 96, 112, 128, 144))
E4M3_PAIR = Format(name="e4m3 pair", bf16=False, parts=2, weight_slots=3, columns=(LEAST_COLUMNS, 64, 80, 96, 112))
E4M3 = Format(name="e4m3", bf16=False, parts=1, weight_slots=3, columns=(LEAST_COLUMNS, 64, 80, 96, 112))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation of the kernel."""

    sizes: Sizes
    format: Format
    columns: int
    outliers: bool

    @property
    def label(self) -> str:
        layer = f"{self.sizes.hidden} x {self.sizes.intermediate}, {self.format.name}, {self.columns} columns"
        return layer + (", outliers" if self.outliers else "")

    @property
    def line_bytes(self) -> int:
        """128 bytes of each column's row."""
        return 128 * self.columns

    @property
    def weight_bytes(self) -> int:
        return WARPGROUPS * self.format.weight_slots * WARPGROUP_TILES * self.sizes.stage.bytes

    @property
    def lines(self) -> int:
        """Of the ring: as many as shared memory holds."""
        return min(MOST_LINES, (SHARED_BYTES - STATE_BYTES - self.weight_bytes) // self.line_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.lines * self.line_bytes + self.weight_bytes + STATE_BYTES

    @property
    def pass_tokens(self) -> int:
        return self.columns // self.format.parts

    @property
    def defines(self) -> dict[str, int]:
        stage, used = self.sizes.stage, self.format
        return {
            "HIDDEN": self.sizes.hidden,
            "INTERMEDIATE": self.sizes.intermediate,
            "STAGE_CHUNKS": stage.chunks,
            "STAGE_HALF": stage.half,
            "MAX_TOP_K": MAX_TOP_K,
            "COLUMNS": self.columns,
            "BF16": int(used.bf16),
            "PARTS": used.parts,
            "LINES": self.lines,
            "WEIGHT_SLOTS": used.weight_slots,
            "OUTLIERS": int(self.outliers),
            "STATE_BYTES": STATE_BYTES,
        }


class Weights(ctypes.Structure):
    """`struct Weights` of layer.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("stages", "row_factor", "bias", "outlier_starts", "outliers")]


class Arguments(ctypes.Structure):
    """`struct Arguments` of prefill.cu."""

    _fields_ = [
        ("up", Weights),
        ("down", Weights),
        *((name, ctypes.c_void_p) for name in ("x_high", "x_low", "x_factor", "h_high", "h_low", "z", "counters", "routing", "list")),
        *((name, ctypes.c_void_p) for name in ("hidden", "ids", "weights", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "top_k", "first_expert", "experts", "split_items", "sum_items", "max_passes")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit", "h_scale")),
    ]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What a launch writes besides its output. One launch at a time: two streams need two of these."""

    x: Tensor  # uint8 [parts, tokens, bytes of a padded row]
    x_factor: Tensor  # float32 [tokens]
    h: Tensor  # uint8 [parts, pairs, bytes of a padded row]; the padding is 0 and stays so
    z: Tensor  # uint8 [pairs, bytes of a row of bf16, or of float32 where a pair has two columns]
    counters: Tensor  # int32, zeros between launches
    routing: Tensor  # int32
    list: Tensor  # int32 [pairs]
    max_passes: int


def workspace(sizes: Sizes, used: Format, tokens: int, device: torch.device) -> Workspace:
    pairs = tokens * MAX_TOP_K
    row_bytes = [sizes.stage.padded(k) * used.number_bytes for k in (sizes.hidden, sizes.intermediate)]
    if pairs * max(row_bytes) >= 1 << 32:
        most = (1 << 32) // (MAX_TOP_K * max(row_bytes)) - 1
        raise ValueError(f"max_num_tokens={tokens} is more than the {most} whose rows of h can be told apart; prepare for fewer")
    passes = sizes.local_experts + pairs * used.parts // LEAST_COLUMNS
    z_bytes = 4 if used.parts == 2 else 2

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return Workspace(
        x=zeros(used.parts, tokens, row_bytes[0], dtype=torch.uint8),
        x_factor=zeros(tokens, dtype=torch.float32),
        h=zeros(used.parts, pairs, row_bytes[1], dtype=torch.uint8),
        z=zeros(pairs, sizes.hidden * z_bytes, dtype=torch.uint8),
        counters=zeros(COUNTERS + passes),
        routing=zeros(sizes.local_experts + 2 + 3 * passes),
        list=zeros(pairs),
        max_passes=passes,
    )


def arguments(layer: PackedLayer, work: Workspace, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, blocks: int) -> Arguments:
    """Of contiguous tensors; they must outlive the launch, or belong to torch's allocator and its stream."""
    tokens, top_k = ids.shape
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is more than the {MAX_TOP_K} slots that the kernel is written for")
    swiglu = layer.swiglu
    return Arguments(
        up=Weights(*layer.w13_pointers),
        down=Weights(*layer.w2_pointers),
        x_high=work.x[0].data_ptr(),
        x_low=work.x[-1].data_ptr(),
        x_factor=work.x_factor.data_ptr(),
        h_high=work.h[0].data_ptr(),
        h_low=work.h[-1].data_ptr(),
        z=work.z.data_ptr(),
        counters=work.counters.data_ptr(),
        routing=work.routing.data_ptr(),
        list=work.list.data_ptr(),
        hidden=x.data_ptr(),
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
        out=out.data_ptr(),
        tokens=tokens,
        top_k=top_k,
        first_expert=layer.first_expert,
        experts=layer.sizes.local_experts,
        split_items=max(1, min(-(-tokens // WARPS), 3 * blocks)),  # a token a warp, and a few items for each block
        sum_items=min(tokens, 4 * blocks),
        max_passes=work.max_passes,
        alpha=swiglu.alpha,
        beta=swiglu.beta,
        limit=float("inf") if swiglu.limit is None else swiglu.limit,
        h_scale=layer.h_scale or 0.0,
    )
