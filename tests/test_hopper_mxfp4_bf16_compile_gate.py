"""What ptxas makes of every variant of the Hopper kernel, compiled here for a GPU that is not here, against the numbers in tests/compiled.

After a change that is meant: `moebench compile hopper_mxfp4_bf16 --arch sm90 --json > tests/compiled/hopper_mxfp4_bf16.json`, and the
same for hopper_mxfp4_fp8."""

import json
import shutil
from functools import cache

import pytest

from moebench.backend import CannotBuild
from moebench.compiled import from_dict, unjudged, worse
from moebench.kernels.hopper_mxfp4_bf16 import HopperMxfp4Bf16
from moebench.kernels.hopper_mxfp4_bf16_details import aot
from moebench.kernels.hopper_mxfp4_bf16_details.aot import compilers, disassembler, fp8_variants, prefill_variants, variants
from moebench.kernels.hopper_mxfp4_bf16_details.shape import SHARED_BYTES
from moebench.kernels.hopper_mxfp4_fp8 import HopperMxfp4Fp8
from tests.running import ROOT

if not compilers():
    pytest.skip("no CUDA compiler: neither nvcc nor cuda-bindings with NVRTC is installed", allow_module_level=True)
if disassembler() is None:
    pytest.skip("no nvdisasm: neither a CUDA toolkit nor triton is installed", allow_module_level=True)

REGISTERS = 128  # 65536 over 416 threads, of which each quarter of a multiprocessor has up to 4 warps
LOOP_LIMIT = 2.1  # instructions for a weight: 10 of every 8 weights expand them, scales take 2, the rest loads, waits and multiplies
compiled_once = cache(aot.compile_one)  # 2 to 5 s each


@pytest.fixture(scope="module", autouse=True)
def no_earlier_cubins(tmp_path_factory):
    """This is to see the compiler run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cubins")))
        yield


@pytest.fixture(params=compilers())
def compiled(request):
    return [compiled_once(variant, request.param) for variant in variants()]


def test_no_main_loop_spills_and_elsewhere_it_is_little(compiled):
    for kernel in compiled:
        assert kernel.registers <= REGISTERS, kernel
        assert kernel.loop_spill_instructions == 0, kernel
        if not kernel.variant.outliers:  # their function takes its sums by address
            assert kernel.stack_bytes <= (32 if kernel.variant.columns == 32 else 0), kernel


def test_blocks_fit_on_a_multiprocessor(compiled):
    for kernel in compiled:
        assert kernel.shared_bytes <= SHARED_BYTES, kernel


def test_products_are_fp8_of_a_warpgroup_and_wait_once_a_stage(compiled):
    for kernel in compiled:
        assert kernel.mma_kinds == {"QGMMA": kernel.variant.sizes.stage.columns // 32}, kernel
        assert kernel.waits == 1, kernel


def test_main_loops_stay_as_short_as_they_are(compiled):
    for kernel in compiled:
        narrow = kernel.variant.sizes.stage.columns < 320  # the same waits for fewer weights
        assert 1.5 < kernel.loop_instructions_per_weight < (2.6 if narrow else LOOP_LIMIT), kernel


# --- prefill.cu

LAUNCHED_REGISTERS = 168  # 65536 over 384 threads; consumers take 232 of their own once they run
PREFILL_LOOP_LIMIT = {"bf16": 3.15, "e4m3 pair": 2.2, "e4m3": 2.2}
PREFILL_WAITS = {"bf16": 11, "e4m3 pair": 12, "e4m3": 12}  # units of a stage of two tiles; for each e4m3 unit one of two waits runs
MOST_LOOP_SPILLS = {144: 4}  # by columns: a few addresses read back in a stage of 986 instructions, and 144 columns are still the fastest


@pytest.fixture(params=compilers())
def compiled_prefill(request):
    return [compiled_once(variant, request.param) for variant in (*prefill_variants(), *fp8_variants())]


def test_no_main_loop_of_prefill_spills_or_waits_for_single_products(compiled_prefill):
    """Where ptxas finds too few registers, or cannot see that no fragment in use is written, it waits after every product."""
    for kernel in compiled_prefill:
        assert kernel.registers <= LAUNCHED_REGISTERS, kernel.variant
        assert kernel.loop_spill_instructions <= MOST_LOOP_SPILLS.get(kernel.variant.columns, 0), kernel.variant
        assert 1 <= kernel.waits <= PREFILL_WAITS[kernel.variant.format.name], kernel.variant
        assert kernel.shared_bytes <= SHARED_BYTES, kernel.variant


def test_products_of_prefill_are_of_its_format_and_its_main_loops_stay_short(compiled_prefill):
    for kernel in compiled_prefill:
        used = kernel.variant.format
        assert kernel.mma_kinds == ({"HGMMA": 40} if used.bf16 else {"QGMMA": 20}), kernel.variant
        assert 1.5 < kernel.loop_instructions_per_weight < PREFILL_LOOP_LIMIT[used.name], kernel.variant


# --- the stored numbers


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("backend", [HopperMxfp4Bf16(), HopperMxfp4Fp8()], ids=lambda backend: backend.name)
def test_no_variant_is_worse_than_its_stored_numbers(backend, monkeypatch):
    """By nvcc: NVRTC's differ from release to release (8 or 16 bytes of stack)."""
    monkeypatch.setattr(aot, "compilers", lambda: ["nvcc"])
    monkeypatch.setattr(aot, "compile_one", compiled_once)
    found = list(backend.compiled("sm90"))
    path = ROOT / "tests" / "compiled" / f"{backend.name}.json"
    stored = [from_dict(row, str(path)) for row in json.loads(path.read_text())["kernels"]]
    assert {(row.compiler, row.arch) for row in stored} == {("nvcc", "sm90")}
    assert (list(worse(stored, found)), unjudged(stored, found)) == ([], [])


def test_for_another_gpu_there_is_a_sentence():
    with pytest.raises(CannotBuild, match="uses Hopper's warpgroup instructions, which only sm90 has; it is not for sm100"):
        list(HopperMxfp4Bf16().compiled("sm100"))
