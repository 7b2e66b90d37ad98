"""The Hopper kernels' numbers against those in tests/compiled, by nvcc: NVRTC's differ from release to release (8 or 16 bytes of stack).

After a change that is meant: `moebench compile hopper_mxfp4_bf16 --arch sm90 --json > tests/compiled/hopper_mxfp4_bf16.json`, and the same
for hopper_mxfp4_fp8."""

import json
import shutil

import pytest

from moebench.kernels.hopper_mxfp4_bf16_details.aot import disassembler
from tests.running import ROOT, moebench

if not shutil.which("nvcc"):
    pytest.skip("nvcc is not installed", allow_module_level=True)
if disassembler() is None:
    pytest.skip("no nvdisasm: neither a CUDA toolkit nor triton is installed", allow_module_level=True)


@pytest.mark.parametrize("backend", ["hopper_mxfp4_bf16", "hopper_mxfp4_fp8"])
def test_no_variant_is_worse_than_its_stored_numbers(backend, tmp_path):
    stored = ROOT / "tests" / "compiled" / f"{backend}.json"
    document = moebench("compile", backend, "--json", "--against", stored, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path)).stdout
    found = json.loads(document)
    assert (found["worse"], found["failed"], found["exit_code"]) == ([], [], 0)
    assert found["cannot"] == ["sm100: uses Hopper's warpgroup instructions, which only sm90 has; it is not for sm100"]
    assert {row["compiler"] for row in json.loads(stored.read_text())["kernels"]} == {"nvcc"}
    assert {row["arch"] for row in found["kernels"]} == {"sm90"}
