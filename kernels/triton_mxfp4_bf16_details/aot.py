"""Compile the kernels of every configuration without a GPU, to read what ptxas made of them.

Run it in a process in which triton was not imported to interpret."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from moebench.kernels.triton_mxfp4_bf16_details.configs import CONFIGS, Config, Tile
from moebench.kernels.triton_mxfp4_bf16_details.gemm import down_kernel, gate_up_kernel
from moebench.kernels.triton_mxfp4_bf16_details.launch import (
    ADD_COLUMNS,
    COUNT_BLOCK,
    DENSE_PAIRS,
    MAX_TOP_K,
    PLACE_CHUNK,
    SORT_BLOCK,
    SORT_CHUNK,
)
from moebench.kernels.triton_mxfp4_bf16_details.route import add_slots, count_pairs, place_pairs, sort_pairs

Arch = Literal["sm90a", "sm100a"]
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

_TENSOR_CORE = re.compile(r"(?:HGMMA|UTC[HQO]MMA|HMMA)\b")  # sm90, sm100, and the warp's own of sm80
_LOCAL = re.compile(r"(?:LDL|STL)(?:\.\w+)*?(?:\.(8|16|U8|S8|U16|S16|64|128))?\b")
_LOCAL_BYTES = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with all its constants."""

    kernel: str
    config: str  # for people
    constants: dict[str, object]
    z: str  # type of z_ptr
    warps: int = 4


@dataclass(frozen=True, kw_only=True)
class Compiled:
    kernel: str
    config: str
    arch: Arch
    registers: int  # per thread
    stack_bytes: int  # per thread
    spill_bytes: int  # per thread: what the local-memory instructions move, each counted once
    shared_bytes: int  # per block
    tensor_core_instructions: int
    loop_instructions_per_weight: float | None  # of a thread, in the GEMM's main loop, everything included


def compile_all(arch: Arch) -> Iterator[Compiled]:
    for variant in variants():
        yield compile_one(variant, arch)


def variants() -> Iterator[Variant]:
    """Everything that `launch.run` can launch for a gpt-oss layer, and the GEMMs once more for scales above 2."""
    for config in CONFIGS:
        for dense in (False, True) if config.dense_up_to else (False,):
            for wide in (False, True):
                yield from gemms(config, dense, wide)
            yield Variant(kernel="add_slots", config=_label(config, dense), constants=_adding(config, dense), z=_z(config))
        sorting = {"EXPERTS": EXPERTS, "BINS": EXPERTS, "BM": config.tokens}
        name = f"{config.tokens} tokens"
        yield Variant(kernel="sort_pairs", config=name, constants={**sorting, "BLOCK": SORT_BLOCK, "CHUNK": SORT_CHUNK}, z="", warps=8)
        yield Variant(kernel="place_pairs", config=name, constants={**sorting, "BLOCK": COUNT_BLOCK, "CHUNK": PLACE_CHUNK}, z="", warps=8)
    yield Variant(kernel="count_pairs", config="", constants={"EXPERTS": EXPERTS, "BINS": EXPERTS, "BLOCK": COUNT_BLOCK}, z="")


def gemms(config: Config, dense: bool, wide: bool) -> Iterator[Variant]:
    shared: dict[str, object] = {"EXPERTS": EXPERTS, "PAIRS": DENSE_PAIRS, "DENSE": dense, "BM": config.tokens, "MODE": "ptx", "WIDE": wide}
    label = _label(config, dense) + (", wide" if wide else "")
    up, down = config.gate_up, config.down
    yield Variant(
        kernel="gate_up_kernel",
        config=f"{label}, {up}",
        constants={**shared, **_tile(up), "K": HIDDEN, "N": INTERMEDIATE, "LIMITED": True},
        z="",
        warps=up.warps,
    )
    yield Variant(
        kernel="down_kernel",
        config=f"{label}, {down}",
        constants={**shared, **_tile(down), "K": INTERMEDIATE, "N": HIDDEN, "SPLITS": down.splits},
        z=_z(config),
        warps=down.warps,
    )


def compile_one(variant: Variant, arch: Arch) -> Compiled:
    kernels = (gate_up_kernel, down_kernel, sort_pairs, count_pairs, place_pairs, add_slots)
    kernel = next(kernel for kernel in kernels if kernel.__name__ == variant.kernel)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("triton was imported with TRITON_INTERPRET=1 and cannot compile; start a process without it")
    types = {"z_ptr": variant.z, **POINTERS}
    signature = {name: "constexpr" if name in variant.constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", int(arch[2:-1]), 32), options={"num_warps": variant.warps})
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    lines = _instructions(sass)
    operations = Counter(operation for _, operation in lines)
    local = sum(
        count * _LOCAL_BYTES.get(match[1] or "", 4) for operation, count in operations.items() if (match := _LOCAL.fullmatch(operation))
    )
    return Compiled(
        kernel=variant.kernel,
        config=variant.config,
        arch=arch,
        registers=int(numbers["REG"]),
        stack_bytes=int(numbers["STACK"]) + int(numbers["LOCAL"]),
        spill_bytes=local,
        shared_bytes=int(compiled.metadata.shared),
        tensor_core_instructions=sum(count for operation, count in operations.items() if _TENSOR_CORE.match(operation)),
        loop_instructions_per_weight=_per_weight(lines, variant),
    )


def _per_weight(lines: list[tuple[str, str]], variant: Variant) -> float | None:
    """Instructions of the shortest loop that multiplies on tensor cores, over the weights a thread takes in one turn of it."""
    if "STEPS" not in variant.constants:
        return None
    starts = {label: i for i, (label, _) in enumerate(lines) if label}
    lengths = []
    for end, (_, operation) in enumerate(lines):
        target = operation.partition("@")[2]
        if target in starts and starts[target] < end:
            loop = lines[starts[target] : end + 1]
            lengths += [len(loop)] if any(_TENSOR_CORE.match(op) for _, op in loop) else []
    blocks, steps = variant.constants["BLOCKS"], variant.constants["STEPS"]
    assert isinstance(blocks, int)
    assert isinstance(steps, int)
    return min(lengths) * variant.warps * 32 / (64 * blocks * 64 * steps) if lengths else None


def _instructions(sass: str) -> list[tuple[str, str]]:
    """(label before it or "", operation) of each instruction; a branch's operation is "BRA@" and where to."""
    found, label = [], ""
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            label = match[1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*);", line):
            target = re.search(r"`\((\.L_\w+)\)", match[2])
            found.append((label, f"{match[1]}@{target[1]}" if target else match[1]))
            label = ""
    return found


def _tool(path: str, option: str, cubin: Path) -> str:
    done = subprocess.run([path, option, str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _tile(tile: Tile) -> dict[str, object]:
    return {"BLOCKS": tile.blocks, "STEPS": tile.steps, "RASTER": tile.raster, "STAGES": tile.stages}


def _adding(config: Config, dense: bool) -> dict[str, object]:
    constants = {"H": HIDDEN, "EXPERTS": EXPERTS, "PAIRS": DENSE_PAIRS, "DENSE": dense, "BM": config.tokens, "SPLITS": config.down.splits}
    return {**constants, "MAX_TOP_K": MAX_TOP_K, "MODE": "ptx", "BLOCK": ADD_COLUMNS}


def _z(config: Config) -> str:
    return "*fp32" if config.fp32_z else "*bf16"


def _label(config: Config, dense: bool) -> str:
    return f"{config.tokens} tokens" + (", dense" if dense else "")
