"""Compile every variant of the kernel without a GPU, to read what ptxas made of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moebench import compiled as compiled_kernels
from moebench.backend import CannotBuild
from moebench.kernels.hopper_mxfp4_bf16_details import prefill
from moebench.kernels.hopper_mxfp4_bf16_details.compiler import SOURCES, cubin, options
from moebench.kernels.hopper_mxfp4_bf16_details.launch import SOURCE
from moebench.kernels.hopper_mxfp4_bf16_details.needs import INSTALL, ONLY_SM90
from moebench.kernels.hopper_mxfp4_bf16_details.shape import TIERS, Sizes, Variant, variant

GPT_OSS_20B = Sizes(hidden=2880, intermediate=2880, num_experts=32, local_experts=32)
GPT_OSS_120B = Sizes(hidden=2880, intermediate=2880, num_experts=128, local_experts=128)

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*);")
_LOCAL = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    variant: Variant | prefill.Variant
    compiler: str
    cubin: bytes
    registers: int  # per thread
    stack_bytes: int  # per thread
    spill_instructions: int  # loads and stores of local memory, each counted once
    loop_spill_instructions: int  # of them in the main loop
    shared_bytes: int  # per block, all of it dynamic
    mma_kinds: dict[str, int]  # tensor-core instructions by name, "QGMMA": FP8 of a warpgroup
    waits: int  # for tensor cores; more than one a loop: the compiler took the instructions apart
    loop_instructions_per_weight: float  # of a warp, in the main loop, everything included


def compilers() -> list[str]:
    """What is here of "nvcc" and "nvrtc"."""
    found = ["nvcc"] if shutil.which("nvcc") else []
    try:
        return [*found, "nvrtc"] if find_spec("cuda.bindings") else found
    except ModuleNotFoundError:
        return found


def disassembler() -> str | None:
    """nvdisasm, of a CUDA toolkit or the one that triton's wheel brings; cuobjdump is beside it."""
    if path := shutil.which("nvdisasm"):
        return path
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.exists() else None


def variants() -> Iterator[Variant]:
    """Of gpt-oss, and what other layers need: rows of their own power of two for h, and scales outside of the window."""
    for tier in TIERS:
        yield _variant(GPT_OSS_20B, tier.max_tokens, h_static=True, outliers=False)
    yield _variant(GPT_OSS_120B, 64, h_static=True, outliers=False)
    yield _variant(GPT_OSS_20B, 8, h_static=False, outliers=False)
    yield _variant(GPT_OSS_20B, 64, h_static=False, outliers=True)
    yield _variant(Sizes(hidden=4096, intermediate=1536, num_experts=128, local_experts=128), 8, h_static=False, outliers=False)
    yield _variant(Sizes(hidden=2880, intermediate=736, num_experts=32, local_experts=32), 64, h_static=True, outliers=False)


def prefill_variants() -> Iterator[prefill.Variant]:
    """Of gpt-oss-20b, the columns between which the others lie."""
    for used, counts in ((prefill.BF16, (64, 80, 144)), (prefill.E4M3_PAIR, (32, 64, 96))):
        for columns in counts:
            yield prefill.Variant(sizes=GPT_OSS_20B, format=used, columns=columns, outliers=False)


def all_variants() -> Iterator[Variant | prefill.Variant]:
    """Of hopper_mxfp4_bf16."""
    yield from variants()
    yield from prefill_variants()


def fp8_variants() -> Iterator[prefill.Variant]:
    """Of hopper_mxfp4_fp8, as prefill_variants."""
    for columns in (64, 112):
        yield prefill.Variant(sizes=GPT_OSS_20B, format=prefill.E4M3, columns=columns, outliers=False)


def compiled(kernel: str, wanted: Iterable[Variant | prefill.Variant], arch: str) -> Iterator[compiled_kernels.Compiled]:
    """For `moebench compile`. By every compiler that is here, NVRTC and nvcc, since they differ; the backends themselves use NVRTC."""
    if arch != "sm90":
        raise CannotBuild(f"{ONLY_SM90}; it is not for {arch}")
    if disassembler() is None:
        raise CannotBuild("nvdisasm is not here, which reads what was compiled; a CUDA toolkit has it, and so has pip install triton")
    if not compilers():
        raise CannotBuild(f"neither NVRTC nor nvcc is here; {INSTALL}")
    wanted = tuple(wanted)
    for compiler in compilers():
        for one in wanted:
            found = compile_one(one, compiler)
            yield compiled_kernels.Compiled(
                kernel=kernel,
                config=one.label,
                arch=arch,
                compiler=compiler,
                registers=found.registers,
                stack_bytes=found.stack_bytes,
                spills=found.spill_instructions,
                loop_spills=found.loop_spill_instructions,
                shared_bytes=found.shared_bytes,
                tensor_cores=found.mma_kinds,
                loop_instructions_per_weight=found.loop_instructions_per_weight,
                cubin=found.cubin,
            )


def compile_one(wanted: Variant | prefill.Variant, compiler: str) -> Compiled:
    tool = disassembler()
    assert tool is not None
    many = isinstance(wanted, prefill.Variant)
    source = prefill.SOURCE if many else SOURCE
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        if compiler == "nvrtc":
            path.write_bytes(cubin(source, wanted.defines).code)
        else:
            arch = "-gencode=arch=compute_90a,code=sm_90a"  # -arch=sm_90a makes nvcc 13.0 compile for sm_90 first
            given = [option for option in options(wanted.defines) if not option.startswith("-arch")]
            subprocess.run(["nvcc", "-cubin", "-O3", arch, *given, f"-I{SOURCES}", str(SOURCES / source), "-o", str(path)], check=True)
        code = path.read_bytes()
        sass = _output(tool, "-c", str(path))
        usage = _output(str(Path(tool).with_name("cuobjdump")), "-res-usage", str(path))
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.partition("Function hopper_mxfp4_")[2].partition("Function ")[0]))
    lines = _instructions(sass)
    loop = _main_loop(lines)
    operations = Counter(operation.partition(".")[0] for _, operation in lines)
    # a turn of moe.cu's loop is a stage of one tile, of prefill.cu's a stage of two; of 128 threads either way
    weights_of_a_turn = (prefill.WARPGROUP_TILES if many else 1) * 64 * wanted.sizes.stage.columns
    return Compiled(
        variant=wanted,
        compiler=compiler,
        cubin=code,
        registers=int(numbers["REG"]),
        stack_bytes=int(numbers["STACK"]) + int(numbers["LOCAL"]),
        spill_instructions=sum(1 for _, operation in lines if _LOCAL.match(operation)),
        loop_spill_instructions=sum(1 for _, operation in loop if _LOCAL.match(operation)),
        shared_bytes=wanted.shared_bytes,
        mma_kinds={name: count for name, count in sorted(operations.items()) if name.endswith("MMA")},
        waits=sum(1 for _, operation in loop if operation.startswith("WARPGROUP.DEPBAR")),
        loop_instructions_per_weight=len(loop) * 128 / weights_of_a_turn,
    )


def _variant(sizes: Sizes, tokens: int, *, h_static: bool, outliers: bool) -> Variant:
    tier = next(tier for tier in TIERS if tier.max_tokens == tokens)
    found = variant(sizes, tier, h_static=h_static, outliers=outliers)
    assert found is not None
    return found


def _main_loop(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The shortest loop that multiplies on tensor cores."""
    starts = {label: i for i, (label, _) in enumerate(lines) if label}
    loops = []
    for end, (_, operation) in enumerate(lines):
        begin = starts.get(operation.partition("@")[2], end + 1)
        if begin < end and any("GMMA" in op for _, op in lines[begin:end]):
            loops.append(lines[begin : end + 1])
    return min(loops, key=len)


def _instructions(sass: str) -> list[tuple[str, str]]:
    """(label before it or "", operation) of each instruction; a branch's operation is "BRA@" and where to."""
    found, label = [], ""
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            label = match[1]
        elif match := _LINE.match(line):
            target = re.search(r"`\((\.L_\w+)\)", match[2])
            found.append((label, f"{match[1]}@{target[1]}" if target else match[1]))
            label = ""
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
