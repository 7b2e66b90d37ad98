"""Compile the kernels of every configuration without a GPU, to read what ptxas made of them.

Run it in a process in which triton was not imported to interpret."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime import JITFunction

from moebench.backend import BuildFailed, CannotBuild
from moebench.compiled import Compiled
from moebench.cubin import NoTool, read
from moebench.kernels.triton_mxfp4_bf16_details.configs import Config, Configs, Tile, shipped
from moebench.kernels.triton_mxfp4_bf16_details.gemm import down_kernel, gate_up_kernel
from moebench.kernels.triton_mxfp4_bf16_details.launch import (
    ADD_COLUMNS,
    COUNT_BLOCK,
    DENSE_PAIRS,
    MAX_TOP_K,
    PLACE_CHUNK,
    SORT_BLOCK,
    SORT_CHUNK,
    mode_of,
)
from moebench.kernels.triton_mxfp4_bf16_details.route import add_slots, count_pairs, place_pairs, sort_pairs

OLDEST = 80  # of the architectures
HIDDEN = INTERMEDIATE = 2880  # gpt-oss
EXPERTS = 32

# Types of the parameters that are no constexpr; what is not listed is an int32 that Triton does not specialize.
POINTERS = {
    "h_ptr": "*bf16",
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "codes_ptr": "*i16",
    "scales_ptr": "*i32",
    "ids_ptr": "*i32",
    "tiles_ptr": "*i32",
    "order_ptr": "*i32",
    "counts_ptr": "*i32",
    "weights_ptr": "*fp32",
    "alpha": "fp32",
    "beta": "fp32",
    "limit": "fp32",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with all its constants."""

    kernel: str
    config: str  # for people
    constants: dict[str, object] = field(hash=False)
    z: str  # type of z_ptr
    warps: int = 4


def compile_all(arch: str) -> Iterator[Compiled]:
    """For "sm90" and any other architecture that Triton compiles for."""
    if not arch.startswith("sm") or int(arch[2:]) < OLDEST:
        raise CannotBuild(f"needs bf16 tensor cores, sm{OLDEST} or later; {arch} has none")
    seen: set[Variant] = set()
    for variant in variants(shipped(arch), mode_of(int(arch[2:]))):
        if variant not in seen:  # regimes may share their tiles
            yield compile_one(variant, arch)
        seen.add(variant)


def variants(configs: Configs, mode: str) -> Iterator[Variant]:
    """Everything that `launch.run` can launch for a gpt-oss layer, and the GEMMs once more for scales above 2."""
    for config in configs:
        for dense in (False, True) if config.dense_up_to else (False,):
            for wide in (False, True):
                yield from gemms(config, dense, wide, mode)
            yield Variant(kernel="add_slots", config=_label(config, dense), constants=_adding(config, dense, mode), z=_z(config))
        sorting = {"EXPERTS": EXPERTS, "BINS": EXPERTS, "BM": config.tokens}
        name = f"{config.tokens} tokens"
        yield Variant(kernel="sort_pairs", config=name, constants={**sorting, "BLOCK": SORT_BLOCK, "CHUNK": SORT_CHUNK}, z="", warps=8)
        yield Variant(kernel="place_pairs", config=name, constants={**sorting, "BLOCK": COUNT_BLOCK, "CHUNK": PLACE_CHUNK}, z="", warps=8)
    yield Variant(kernel="count_pairs", config="", constants={"EXPERTS": EXPERTS, "BINS": EXPERTS, "BLOCK": COUNT_BLOCK}, z="")


def gemms(config: Config, dense: bool, wide: bool, mode: str) -> Iterator[Variant]:
    shared: dict[str, object] = {"EXPERTS": EXPERTS, "PAIRS": DENSE_PAIRS, "DENSE": dense, "BM": config.tokens, "MODE": mode, "WIDE": wide}
    label = _label(config, dense) + (", wide" if wide else "")
    up, down = config.gate_up, config.down
    yield Variant(
        kernel="gate_up_kernel",
        config=f"{label}, {up.label}",
        constants={**shared, **_tile(up), "K": HIDDEN, "N": INTERMEDIATE, "LIMITED": True},
        z="",
        warps=up.warps,
    )
    yield Variant(
        kernel="down_kernel",
        config=f"{label}, {down.label}",
        constants={**shared, **_tile(down), "K": INTERMEDIATE, "N": HIDDEN, "SPLITS": down.splits},
        z=_z(config),
        warps=down.warps,
    )


def compile_one(variant: Variant, arch: str) -> Compiled:
    kernels = (gate_up_kernel, down_kernel, sort_pairs, count_pairs, place_pairs, add_slots)
    kernel = next(kernel for kernel in kernels if kernel.__name__ == variant.kernel)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("triton was imported with TRITON_INTERPRET=1 and cannot compile; start a process without it")
    types = {"z_ptr": variant.z, **POINTERS}
    signature = {name: "constexpr" if name in variant.constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm")), 32)
    try:
        built: Any = triton.compile(source, target=target, options={"num_warps": variant.warps})
    except (TritonError, RuntimeError) as error:  # RuntimeError: a pass of MLIR that fails
        raise BuildFailed(f"{variant.kernel} ({variant.config}) for {arch}: {type(error).__name__}: {error}") from error
    try:
        reading = read(built.asm["cubin"])
    except NoTool as error:
        raise CannotBuild(str(error)) from error
    return Compiled(
        kernel=variant.kernel,
        config=variant.config,
        arch=arch,
        compiler=f"triton {triton.__version__}",
        registers=reading.registers,
        stack_bytes=reading.stack_bytes,
        spills=reading.spills,
        loop_spills=reading.loop_spills,
        shared_bytes=int(built.metadata.shared),
        tensor_cores=reading.tensor_cores,
        loop_instructions_per_weight=_per_weight(reading.loop_instructions, variant),
        cubin=built.asm["cubin"],
    )


def _per_weight(loop: int | None, variant: Variant) -> float | None:
    """Instructions of the main loop over the weights that a thread takes in one turn of it."""
    if loop is None or "STEPS" not in variant.constants:
        return None
    blocks, steps = variant.constants["BLOCKS"], variant.constants["STEPS"]
    assert isinstance(blocks, int)
    assert isinstance(steps, int)
    return loop * variant.warps * 32 / (64 * blocks * 64 * steps)


def _tile(tile: Tile) -> dict[str, object]:
    return {"BLOCKS": tile.blocks, "STEPS": tile.steps, "RASTER": tile.raster, "STAGES": tile.stages}


def _adding(config: Config, dense: bool, mode: str) -> dict[str, object]:
    constants = {"H": HIDDEN, "EXPERTS": EXPERTS, "PAIRS": DENSE_PAIRS, "DENSE": dense, "BM": config.tokens, "SPLITS": config.down.splits}
    return {**constants, "MAX_TOP_K": MAX_TOP_K, "MODE": mode, "BLOCK": ADD_COLUMNS}


def _z(config: Config) -> str:
    return "*fp32" if config.fp32_z else "*bf16"


def _label(config: Config, dense: bool) -> str:
    return f"{config.tokens} tokens" + (", dense" if dense else "")
