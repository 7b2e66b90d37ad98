"""What ptxas makes of every shipped kernel, compiled here for GPUs that are not here."""

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
ARCHS = ("sm90a", "sm100a")
COMPILE = """
import json, sys
from dataclasses import asdict
from moebench.kernels.triton_mxfp4_bf16_details.aot import compile_all
json.dump([asdict(compiled) for compiled in compile_all(sys.argv[1])], sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The list of each architecture, one process for each, beside each other. A cache of its own: this is to see the compiler run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    commands = {arch: [sys.executable, "-c", COMPILE, arch] for arch in ARCHS}
    running = {
        arch: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for arch, command in commands.items()
    }
    done = {arch: process.communicate()[0] for arch, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return {arch: json.loads(text) for arch, text in done.items()}


@pytest.fixture(params=ARCHS)
def kernels(compiled, request):
    return compiled[request.param]


def named(kernel):
    return f"{kernel['kernel']} ({kernel['config']}) for {kernel['arch']}: {kernel}"


def test_every_kernel_is_compiled(kernels):
    assert {kernel["kernel"] for kernel in kernels} == {
        "gate_up_kernel",
        "down_kernel",
        "sort_pairs",
        "count_pairs",
        "place_pairs",
        "add_slots",
    }


def test_nothing_spills_or_uses_local_memory(kernels):
    for kernel in kernels:
        assert kernel["stack_bytes"] == 0, named(kernel)
        assert kernel["spill_bytes"] == 0, named(kernel)


def test_gemms_use_tensor_cores(kernels):
    for kernel in kernels:
        assert (kernel["tensor_core_instructions"] > 0) == kernel["kernel"].endswith(("gate_up_kernel", "down_kernel")), named(kernel)


def test_programs_fit_on_a_multiprocessor(kernels):
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 227 * 1024, named(kernel)


def test_main_loops_stay_as_short_as_they_are(kernels):
    """Dequantizing takes 15 instructions for 8 weights, scales 2, so 2.1 a weight; the rest is loads, addresses and the matrix unit."""
    for kernel in kernels:
        if kernel["kernel"].endswith(("gate_up_kernel", "down_kernel")):
            limit = 6.0 if "wide" in kernel["config"] else 5.5
            assert 2.1 < kernel["loop_instructions_per_weight"] < limit, named(kernel)
