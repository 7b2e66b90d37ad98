"""The Hopper kernel's own source, compiled for this CPU by tests/cuda_on_cpu/run.cpp."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from moebench.kernels.hopper_mxfp4_bf16_details import launch, prefill
from moebench.kernels.hopper_mxfp4_bf16_details.compiler import SOURCES

HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
MISSING = "needs g++ or clang++" if COMPILER is None else "its stack switch is written for x86-64" if platform.machine() != "x86_64" else ""
SECONDS = 200.0  # until a run counts as stuck
HEADERS = sorted({line for file in HERE.iterdir() for line in file.read_text().splitlines() if line.startswith("#include <")})
BASE = ("-std=c++20", "-O1", "-fPIC", "-pthread", "-w")


def compiled(directory, defines, *flags):
    """The library for these constants, which the directory keeps."""
    library = Path(directory, "_".join([*flags, *(str(value) for value in defines.values())]) + ".so")
    if not library.exists():
        given = [*flags, *(f"-D{name}={value}" for name, value in defines.items())]
        includes = [f"-I{HERE}", f"-I{SOURCES}"]  # HERE first: its ptx.cuh
        command = [COMPILER, *BASE, "-shared", *included_first(directory), *includes, *given]
        subprocess.run([*command, str(HERE / "run.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_double]
    return loaded


def included_first(directory):
    """The standard headers, which are 40 % of a library's compilation, compiled once for all; only g++ finds the result by `-include`."""
    header = Path(directory, "standard.h")
    if not header.exists():
        header.write_text("\n".join(HEADERS))
        if Path(COMPILER).name == "g++":
            subprocess.run([COMPILER, *BASE, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return "-include", str(header)


class KernelOnCpu:
    """One variant of moe.cu."""

    def __init__(self, variant, directory):
        self.variant = variant
        self.library = compiled(directory, variant.defines)

    def sizes(self):
        names = ("arguments", "stage", "counters", "shared", "state", "padded_hidden", "padded_intermediate", "passes")
        return {name: self.library.size_of(i) for i, name in enumerate(names)}

    def run(self, prepared, tokens, blocks=2, seed=0):
        """bf16 [M, H]; elements that the kernel does not write are NaN. seed: uneven speeds, and copies that arrive late."""
        out = torch.full((tokens.num_tokens, prepared.layer.sizes.hidden), torch.nan, dtype=torch.bfloat16)
        given = launch.arguments(prepared, tokens.hidden_states, tokens.topk_ids, tokens.topk_weights, out)
        if self.library.run(ctypes.addressof(given), blocks, seed, SECONDS):
            raise TimeoutError(f"the kernel waits for ever: {blocks} blocks, seed {seed}, {self.variant}")
        assert not prepared.workspace.counters.any(), "the launch left its counters changed"
        return out


class PrefillOnCpu:
    """One variant of prefill.cu, with a workspace for so many tokens."""

    def __init__(self, layer, used, columns, tokens, directory):
        self.layer = layer
        self.variant = prefill.Variant(sizes=layer.sizes, format=used, columns=columns, outliers=layer.num_outliers > 0)
        self.workspace = prefill.workspace(layer.sizes, used, tokens, torch.device("cpu"))
        self.library = compiled(directory, self.variant.defines, "-DPREFILL")

    def sizes(self):
        names = ("arguments", "stage", "counters", "shared", "state", "padded_hidden", "padded_intermediate", "up_tiles")
        return {name: self.library.size_of(i) for i, name in enumerate(names)}

    def run(self, tokens, blocks=2, seed=0):
        out = torch.full((tokens.num_tokens, self.layer.sizes.hidden), torch.nan, dtype=torch.bfloat16)
        given = prefill.arguments(self.layer, self.workspace, tokens.hidden_states, tokens.topk_ids, tokens.topk_weights, out, blocks)
        if self.library.run(ctypes.addressof(given), blocks, seed, SECONDS):
            raise TimeoutError(f"the kernel waits for ever: {blocks} blocks, seed {seed}, {self.variant}")
        assert not self.workspace.counters.any(), "the launch left its counters changed"
        return out
