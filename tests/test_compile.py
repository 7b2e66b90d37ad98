"""`moebench compile`, its numbers and their comparison; the kernels themselves are in the compile gates."""

import json
from dataclasses import replace

import pytest

from moebench.compiled import Compiled, from_dict, kinds, to_dict, unjudged, worse
from moebench.cubin import instructions, summed
from tests.running import FOUND_FIRST, moebench

ACME = """
import os
from moebench.backend import BuildFailed, CannotBuild
from moebench.compiled import Compiled


class Acme:
    name, act_dtype = "acme", "bf16"

    def compiled(self, arch):
        if arch == "sm100":
            raise CannotBuild("is written for sm90")
        if arch == "sm80":
            raise OSError(2, "no such file", "acmecc")
        if arch == "sm120":
            raise BuildFailed("gemm (wide): ptxas error: too much shared data")
        assert "TRITON_INTERPRET" not in os.environ
        row = dict(arch=arch, compiler="acmecc 1.2", stack_bytes=0, loop_spills=0, shared_bytes=4096)
        registers = int(os.environ.get("ACME_REGISTERS", "96"))
        yield Compiled(kernel="gemm", config="64 tokens", registers=registers, spills=0, tensor_cores={"HGMMA": 8},
                       loop_instructions_per_weight=2.5, cubin=b"ELF", **row)
        yield Compiled(kernel="sum", config="", registers=20, spills=3, tensor_cores={}, loop_instructions_per_weight=None, **row)


backend = Acme()
"""
ROW = Compiled(
    kernel="gemm",
    config="64 tokens",
    arch="sm90",
    compiler="acmecc 1.2",
    registers=96,
    stack_bytes=0,
    spills=0,
    loop_spills=0,
    shared_bytes=4096,
    tensor_cores={"HGMMA": 8},
    loop_instructions_per_weight=2.5,
)


@pytest.fixture
def acme(tmp_path):
    """The environment in which a backend of another distribution, which can be compiled, is installed."""
    site = tmp_path / "site"
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme.py").write_text(ACME)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moebench.backends]\nacme = acme:backend\n")
    return {"PYTHONPATH": ":".join([*FOUND_FIRST, str(site)]), "TRITON_INTERPRET": "1", "COLUMNS": "120"}


def test_a_third_partys_kernels_are_a_table_and_what_is_for_another_gpu_a_sentence(acme, tmp_path):
    done = moebench("compile", "acme", "--out", "kept", cwd=tmp_path, check=0, **acme)
    assert "sm90, acmecc 1.2" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(" gemm"))
    assert line.split() == ["gemm:", "64", "tokens", "96", "0", "0", "4096", "8", "HGMMA", "2.50"]
    assert "sm100: is written for sm90" in done.stdout
    assert (tmp_path / "kept" / "sm90" / "gemm-64-tokens-acmecc.cubin").read_bytes() == b"ELF"
    assert "1 kernel without one" in done.stdout


def test_a_document_of_one_day_judges_the_next(acme, tmp_path):
    before = moebench("compile", "acme", "--arch", "sm90", "--json", cwd=tmp_path, check=0, **acme).stdout
    (tmp_path / "before.json").write_text(before)
    moebench("compile", "acme", "--arch", "sm90", "--against", "before.json", cwd=tmp_path, check=0, **acme)
    after = moebench("compile", "acme", "--against", "before.json", "--json", cwd=tmp_path, check=1, ACME_REGISTERS="168", **acme)
    assert json.loads(after.stdout)["worse"] == ["gemm (64 tokens) for sm90 by acmecc 1.2: 168 registers, were 96"]


def test_a_kernel_that_does_not_compile_is_said_and_the_rest_is_shown(acme, tmp_path):
    done = moebench("compile", "acme", "--arch", "sm120,sm90", cwd=tmp_path, check=3, **acme)
    assert "sm120: gemm (wide): ptxas error" in done.stdout
    assert "HGMMA" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("acme", "--arch", "sm100"), 2, "is written for sm90"),
        (("cutlass_mxfp4_bf16",), 2, "moebench prebuild cutlass_mxfp4_bf16"),
        (("torch",), 2, "these have: hopper_mxfp4_bf16, hopper_mxfp4_fp8, triton_mxfp4_bf16"),
        (("acme", "--arch", "sm900"), 2, "did you mean 'sm90'?"),
        (("acne",), 2, "did you mean 'acme'?"),
        (("acme", "--arch", "sm80", "--out", "x"), 3, "sm80: FileNotFoundError: [Errno 2] no such file: 'acmecc'"),
        (("acme", "--arch", "sm90", "--out", "file/x"), 5, "give another --out"),
        (("acme", "--against", "none.json"), 6, "none.json cannot be read"),
        (("acme", "--against", "file"), 6, "file: Expecting value"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(arguments, code, told, acme, tmp_path):
    (tmp_path / "file").write_text("")
    done = moebench("compile", *arguments, cwd=tmp_path, check=code, **acme)
    assert told in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"registers": 97}, "97 registers, were 96"),
        ({"registers": 90}, ""),
        ({"stack_bytes": 16}, "16 bytes of stack, were 0"),
        ({"spills": 2, "loop_spills": 1}, "2 spills, were 0; 1 spills in the main loop, were 0"),
        ({"shared_bytes": 4097}, "4097 bytes of shared memory, were 4096"),
        ({"tensor_cores": {"HMMA": 8}}, "tensor-core instructions are 8 HMMA, were 8 HGMMA"),
        ({"loop_instructions_per_weight": 2.54}, ""),
        ({"loop_instructions_per_weight": 2.6}, "2.60 loop instructions a weight, were 2.50"),
        ({"loop_instructions_per_weight": None}, "a main loop is no longer found"),
        ({"compiler": "acmecc 1.3", "spills": 1}, "1 spills, were 0"),
    ],
)
def test_what_hurts_is_told_and_what_does_not_is_not(change, told):
    new = replace(ROW, **change)
    assert list(worse([ROW], [new])) == ([f"gemm (64 tokens) for sm90 by {new.compiler}: {told}"] if told else [])


def test_registers_count_as_they_are_given_out():
    assert list(worse([replace(ROW, registers=89)], [ROW])) == []


def test_kernels_that_come_and_go_are_told_and_other_compilers_are_not_judged():
    other = replace(ROW, config="128 tokens")
    assert list(worse([ROW, other], [ROW])) == ["gemm (128 tokens) for sm90 by acmecc 1.2 is in the stored numbers and was not compiled"]
    assert list(worse([ROW], [ROW, other])) == ["gemm (128 tokens) for sm90 by acmecc 1.2 is not in the stored numbers"]
    foreign = replace(ROW, compiler="nvcc 13.0", spills=9)
    assert list(worse([ROW], [ROW, foreign])) == []
    assert unjudged([ROW], [ROW, foreign, replace(ROW, arch="sm100")]) == ["sm90 by nvcc", "sm100 by acmecc"]


def test_numbers_survive_json_and_odd_ones_are_refused():
    row = json.loads(json.dumps(to_dict(ROW)))
    assert from_dict(row, "x") == ROW
    for odd, told in (
        (3, "x is no object"),
        ({**row, "speed": 1}, "other fields than it should: speed"),
        ({**row, "registers": "96"}, "registers is '96'"),
        ({**row, "tensor_cores": {"HGMMA": 1.5}}, "HGMMA is 1.5"),
    ):
        with pytest.raises(ValueError, match=told):
            from_dict(odd, "x")


SASS = """
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDL R4, [R1] ;
        /*0020*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   STL.64 [R1+0x8], R6 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   EXIT ;
"""


def test_a_main_loop_is_the_shortest_that_multiplies_on_tensor_cores():
    found = summed("Function k:\n REG:90 STACK:16 SHARED:0 LOCAL:8", instructions(SASS))
    assert (found.registers, found.stack_bytes, found.spills, found.loop_spills) == (90, 24, 2, 1)
    assert (found.tensor_cores, found.loop_instructions) == ({"HGMMA": 1}, 4)
    assert kinds(found.tensor_cores) == "1 HGMMA"


def test_code_without_tensor_cores_has_no_main_loop():
    found = summed("REG:8 STACK:0 LOCAL:0", [("a", "IADD3"), ("", "BRA@a")])
    assert (found.loop_instructions, found.tensor_cores, kinds(found.tensor_cores)) == (None, {}, "none")
