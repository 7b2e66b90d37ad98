"""Tile sizes by regime, a fixed table: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One GEMM's program: 64 * blocks weight rows and 64 * steps of K in each turn of the loop."""

    blocks: int
    warps: int
    stages: int
    steps: int = 2
    splits: int = 1  # of K, each by a program of its own
    raster: int = 1  # token tiles that share a band of weights

    @property
    def label(self) -> str:
        """For people: 128 rows x 128 k, 8 warps, 3 stages."""
        parts = [f"{64 * self.blocks} rows x {64 * self.steps} k, {self.warps} warps, {self.stages} stages"]
        parts += [f"{self.splits} splits"] if self.splits > 1 else []
        parts += [f"bands of {self.raster}"] if self.raster > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a layer runs in one regime."""

    up_to: float  # pairs per expert, on average
    tokens: int  # columns of a tile
    gate_up: Tile
    down: Tile
    dense_up_to: int = 0  # batches of at most so many tokens need no sorting: every token is a column of every tile
    fp32_z: bool = False  # w2's outputs; bf16 halves the traffic of large batches and adds 1e-3 of relative error


CONFIGS = (
    Config(
        up_to=12,
        tokens=16,
        gate_up=Tile(blocks=1, warps=4, stages=4),
        down=Tile(blocks=1, warps=4, stages=4, splits=2),
        dense_up_to=8,
        fp32_z=True,
    ),
    Config(up_to=24, tokens=32, gate_up=Tile(blocks=2, warps=8, stages=4), down=Tile(blocks=2, warps=8, stages=4), fp32_z=True),
    Config(up_to=64, tokens=64, gate_up=Tile(blocks=2, warps=8, stages=3), down=Tile(blocks=2, warps=8, stages=3)),
    Config(
        up_to=float("inf"),
        tokens=128,
        gate_up=Tile(blocks=2, warps=8, stages=3, raster=8),
        down=Tile(blocks=2, warps=8, stages=3, raster=8),
    ),
)


def choose(num_pairs: int, num_experts: int) -> Config:
    """The regime of a batch; num_experts over all ranks, since pairs spread over all of them."""
    return next(config for config in CONFIGS if num_pairs <= config.up_to * num_experts)
