"""The Hopper kernel's own source, compiled for this CPU by tests/cuda_on_cpu/run.cpp."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from moebench.kernels.hopper_mxfp4_bf16_details import launch
from moebench.kernels.hopper_mxfp4_bf16_details.compiler import SOURCES

HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
MISSING = "needs g++ or clang++" if COMPILER is None else "its stack switch is written for x86-64" if platform.machine() != "x86_64" else ""
SECONDS = 120.0  # until a run counts as stuck


class KernelOnCpu:
    """One variant. The library is kept in the directory, under the constants it was compiled with."""

    def __init__(self, variant, directory):
        self.variant = variant
        defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
        library = Path(directory, "_".join(str(value) for value in variant.defines.values()) + ".so")
        if not library.exists():
            includes = [f"-I{HERE}", f"-I{SOURCES}"]  # HERE first: its ptx.cuh
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
            subprocess.run([COMPILER, *flags, *includes, *defines, str(HERE / "run.cpp"), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_double]

    def sizes(self):
        names = ("arguments", "stage", "counters", "shared", "state", "padded_hidden", "padded_intermediate", "passes")
        return {name: self.library.size_of(i) for i, name in enumerate(names)}

    def run(self, prepared, tokens, blocks=2, seed=0):
        """bf16 [M, H]; elements that the kernel does not write are NaN. seed: uneven speeds, and copies that arrive late."""
        out = torch.full((tokens.num_tokens, prepared.hidden_size), torch.nan, dtype=torch.bfloat16)
        given = launch.arguments(prepared, tokens.hidden_states, tokens.topk_ids, tokens.topk_weights, out)
        if self.library.run(ctypes.addressof(given), blocks, seed, SECONDS):
            raise TimeoutError(f"the kernel waits for ever: {blocks} blocks, seed {seed}, {self.variant}")
        assert not prepared.workspace.counters.any(), "the launch left its counters changed"
        return out
