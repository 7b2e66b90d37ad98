"""What ptxas makes of every shipped Triton kernel, compiled here for GPUs that are not here, against the numbers in tests/compiled.

After a change that is meant: `moebench compile triton_mxfp4_bf16 --json > tests/compiled/triton_mxfp4_bf16.json`."""

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
STORED = ROOT / "tests" / "compiled" / "triton_mxfp4_bf16.json"
ARCHS = ("sm90", "sm100")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Of each architecture, one command for each, beside each other. A cache of its own: this is to see the compiler run."""
    folder = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "1"}  # compiled all the same
    command = [sys.executable, "-m", "moebench", "compile", "triton_mxfp4_bf16", "--json", "--against", str(STORED), "--out", str(folder)]
    running = [
        subprocess.Popen([*command, "--arch", arch], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for arch in ARCHS
    ]
    done = [process.communicate() for process in running]
    assert all(out for out, _ in done), [errors[-2000:] for _, errors in done]
    return folder, {arch: json.loads(out) for arch, (out, _) in zip(ARCHS, done, strict=True)}


@pytest.fixture(params=ARCHS)
def document(documents, request):
    return documents[1][request.param]


@pytest.fixture
def kernels(document):
    return document["kernels"]


def named(kernel):
    return f"{kernel['kernel']} ({kernel['config']}) for {kernel['arch']}: {kernel}"


def is_gemm(kernel):
    return kernel["kernel"] in ("gate_up_kernel", "down_kernel")


def test_no_kernel_is_worse_than_its_stored_numbers(document):
    assert (document["worse"], document["cannot"], document["failed"], document["exit_code"]) == ([], [], [], 0)


def test_every_kernel_is_compiled_and_its_cubin_kept(documents, kernels):
    names = {"gate_up_kernel", "down_kernel", "sort_pairs", "count_pairs", "place_pairs", "add_slots"}
    assert {kernel["kernel"] for kernel in kernels} == names
    cubins = list((documents[0] / kernels[0]["arch"]).glob("*.cubin"))
    assert len(cubins) == len(kernels)
    assert all(cubin.read_bytes().startswith(b"\x7fELF") for cubin in cubins)


def test_nothing_spills_or_uses_local_memory(kernels):
    for kernel in kernels:
        assert (kernel["stack_bytes"], kernel["spills"], kernel["loop_spills"]) == (0, 0, 0), named(kernel)


def test_gemms_use_the_tensor_cores_of_their_architecture(kernels):
    for kernel in kernels:
        kind = {"sm90": "HGMMA", "sm100": "UTCHMMA"}[kernel["arch"]]
        assert set(kernel["tensor_cores"]) == ({kind} if is_gemm(kernel) else set()), named(kernel)


def test_programs_fit_on_a_multiprocessor(kernels):
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 227 * 1024, named(kernel)


def test_main_loops_stay_as_short_as_they_are(kernels):
    """Dequantizing takes 15 instructions for 8 weights, scales 2, so 2.1 a weight; the rest is loads, addresses and the matrix unit."""
    for kernel in filter(is_gemm, kernels):
        limit = 6.0 if "wide" in kernel["config"] else 5.5
        assert 2.1 < kernel["loop_instructions_per_weight"] < limit, named(kernel)


def test_tiles_fit_where_a_block_has_99_kib():
    """On sm86, sm89, sm120 and sm121, where the 115712 bytes of sm90's widest tiles would not launch."""
    code = (
        "from moebench.kernels.triton_mxfp4_bf16_details import aot, configs\n"
        "for kernel in aot.gemms(configs.shipped('sm120')[-1], False, False, 'ptx'):\n"
        "    built = aot.compile_one(kernel, 'sm120')\n"
        "    print(built.shared_bytes, built.spills, *built.tensor_cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(spills, kind) for _, spills, kind in rows] == [("0", "HMMA")] * 2
    assert all(48 * 1024 < int(shared) <= 99 * 1024 for shared, _, _ in rows)
