"""Triton's kernels are compiled on all cores before the first of them is launched; here with a driver that has no device."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
WARM_UP = """
import json, sys, threading
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(NoDevice())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from moebench.case import case
from moebench.kernels.triton_mxfp4_bf16_details import launch
from moebench.problem import make_layer

run, order, compiling = launch.run, [], set()
kernels = launch.gate_up_kernel, launch.down_kernel, launch.add_slots, launch.sort_pairs


def noted(layer, tokens, config=None, *, only_compile=False):
    order.append((len(tokens.topk_ids), only_compile))
    if only_compile:
        run(layer, tokens, config, only_compile=True)


launch.run = noted
for kernel in kernels:
    cache = kernel.device_caches[0]
    real = kernel.compile

    def compile(*arguments, real=real, **options):
        compiling.add(threading.current_thread().name)
        return real(*arguments, **options)

    kernel.compile = compile
layer = launch.prepare(make_layer(case("tiny", 1), "cpu"))
launch.warm_up(layer, 1)
found = {kernel.__name__: list(kernel.device_caches[0][0].values()) for kernel in kernels}
built = {name: [type(one).__name__ for one in ones] for name, ones in found.items()}
cubins = all(one.asm["cubin"] for ones in found.values() for one in ones)
json.dump({"order": order, "threads": sorted(compiling), "built": built, "cubins": cubins}, sys.stdout)
"""


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", WARM_UP], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_everything_is_compiled_before_anything_is_launched(warmed):
    half = len(warmed["order"]) // 2
    assert [only for _, only in warmed["order"]] == [True] * half + [False] * half
    compiled, launched = ([tokens for tokens, _ in part] for part in (warmed["order"][:half], warmed["order"][half:]))
    assert compiled == launched


def test_what_is_there_after_it_can_be_launched(warmed):
    assert set(warmed["built"]) == {"gate_up_kernel", "down_kernel", "add_slots", "sort_pairs"}
    assert all(kinds and set(kinds) == {"CompiledKernel"} for kinds in warmed["built"].values())
    assert warmed["cubins"]


def test_other_threads_than_the_main_one_compile(warmed):
    assert warmed["threads"]
    assert "MainThread" not in warmed["threads"]
