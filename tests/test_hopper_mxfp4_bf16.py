"""The Hopper kernel without a GPU: its layout byte by byte, its constants, its cache, and its own source run on this CPU."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moebench.case import MODELS, case
from moebench.check import compare
from moebench.device import Device
from moebench.kernels.hopper_mxfp4_bf16 import HopperMxfp4Bf16
from moebench.kernels.hopper_mxfp4_bf16_details import compiler, launch, prefill
from moebench.kernels.hopper_mxfp4_bf16_details.layout import gate_up_rows, pack
from moebench.kernels.hopper_mxfp4_bf16_details.shape import (
    SHARED_BYTES,
    STAGES,
    TIERS,
    WARPGROUPS,
    Sizes,
    h_scale,
    tier_of,
    variant,
)
from moebench.kernels.hopper_mxfp4_bf16_details.weights import pack_layer
from moebench.mx import Mxfp4, dequantize_mxfp4
from moebench.problem import Swiglu, Tokens, make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from tests.hopper_on_cpu import MISSING, KernelOnCpu, PrefillOnCpu

BACKEND = HopperMxfp4Bf16()
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=1 << 37, num_sms=132)
GPT_OSS_120B = Sizes(hidden=2880, intermediate=2880, num_experts=128, local_experts=128)
GPT_OSS_20B = Sizes(hidden=2880, intermediate=2880, num_experts=32, local_experts=32)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
runs_on_cpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def weight(experts, rows, columns, lowest=112, highest=123, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    return Mxfp4(codes, torch.randint(lowest, highest + 1, (experts, rows, columns // 32), generator=generator).to(torch.uint8))


# --- layout


CPU = torch.device("cpu")


def unpacked(packed, stage, columns, order=None):
    """float64 [E, rows, columns] of packed bytes, found thread by thread as layout.py's docstring says, and by its list of outliers."""
    experts, tiles, stages, size = packed.stages.shape
    assert size == stage.bytes
    codes = torch.full((experts, tiles, 64, stages * stage.columns), -1, dtype=torch.int64)
    d = torch.zeros(experts, tiles, 64, stages * stage.columns, dtype=torch.float64)
    data = packed.stages.long()
    chunk_scales = 32 * stage.columns  # where they begin: after 64 rows of half a byte a column
    half_scales = chunk_scales + 256 * stage.chunks
    for thread in range(128):
        w, g, c = thread // 32, thread // 4 % 8, thread % 4
        for half in range(2):
            row = 16 * w + 8 * half + g
            words = [
                ((2 * chunk + half) * 2048 + 16 * thread + 4 * j, 128 * chunk + 32 * c + 8 * j)
                for chunk in range(stage.chunks)
                for j in range(4)
            ]
            if stage.half:
                words += [(2 * stage.chunks * 2048 + 16 * thread + 8 * half + 4 * j, 128 * stage.chunks + 16 * c + 8 * j) for j in range(2)]
            for at, column in words:
                word = sum(data[..., at + i] << (8 * i) for i in range(4))
                for i in range(8):
                    sign = word >> (8 * i + 7 if i < 4 else 8 * (i - 4) + 3) & 1
                    codes.view(experts, tiles, 64, stages, -1)[:, :, row, :, column + i] = (word >> (4 * i) & 7) | sign << 3
            scales = [
                (chunk_scales + 2 * stage.chunks * thread + 2 * chunk + half, 128 * chunk + 32 * c, 32) for chunk in range(stage.chunks)
            ]
            if stage.half:
                scales.append((half_scales + thread // 2 * 2 + half, 128 * stage.chunks + 16 * c, 16))
            for at, column, count in scales:
                d.view(experts, tiles, 64, stages, -1)[:, :, row, :, column : column + count] = data[..., at, None].double()
    assert codes.min() >= 0
    assert d.min() >= 1
    assert d.max() <= 12
    values = E2M1[codes] * torch.exp2(d - 6)
    assert not values[..., columns:].any()
    assert torch.equal(values, values.float().to(torch.float8_e4m3fn).double())  # each is an e4m3 number
    values = values[..., :columns] * packed.row_factor.double().view(experts, tiles, 64, 1)
    add_outliers(values, packed)
    values = values.view(experts, -1, columns)
    if order is None:
        return values
    assert not values[:, order < 0].any()
    result = torch.empty(experts, int((order >= 0).sum()), columns, dtype=torch.float64)
    result[:, order[order >= 0]] = values[:, order >= 0]
    return result


def add_outliers(values, packed):
    experts, tiles = values.shape[:2]
    factors = packed.row_factor.view(experts * tiles, 64)
    for tile in range(experts * tiles):
        for outlier in packed.outliers[packed.outlier_starts[tile] : packed.outlier_starts[tile + 1]]:
            place, scale = int(outlier[:4].view(torch.int32)), float(outlier[4:8].view(torch.float32))
            row, block = place % 64, place // 64
            codes = torch.stack((outlier[16:] & 15, outlier[16:] >> 4), -1).flatten().long()
            into = values.view(experts * tiles, 64, -1)[tile, row, 32 * block : 32 * block + 32]
            assert not into.any()
            into += E2M1[codes] * scale * float(factors[tile, row])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.columns} columns")
@pytest.mark.parametrize("gates_and_ups", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (128, 480), (704, 64)])
def test_packed_bytes_hold_every_weight_exactly(stage, gates_and_ups, rows, columns):
    given = weight(2, rows, columns)
    order = gate_up_rows(rows // 2, stage, CPU) if gates_and_ups else None
    packed = pack(given, stage, order)
    assert packed.outliers.shape[0] == 0
    assert torch.equal(unpacked(packed, stage, columns, order), dequantize_mxfp4(given, torch.float64))


@pytest.mark.parametrize(
    ("lowest", "highest", "some"), [(116, 127, False), (115, 127, True), (0, 11, False), (243, 254, False), (60, 180, True)]
)
def test_a_row_holds_twelve_block_scales_and_lists_the_rest(lowest, highest, some):
    given = weight(1, 128, 640, lowest, highest, seed=3)
    given.scales[:, :, 0] = highest
    packed = pack(given, STAGES[0])
    outside = highest - given.scales.int() >= 12
    assert packed.outliers.shape[0] == int(outside.sum())
    assert bool(outside.any()) == some
    assert torch.equal(packed.outlier_starts, torch.cat((torch.zeros(1), outside.view(2, -1).sum(1).cumsum(0))).int())
    assert torch.equal(unpacked(packed, STAGES[0], 640), dequantize_mxfp4(given, torch.float64))


def test_blocks_of_zeros_and_rows_of_zeros_need_no_scale():
    given = weight(1, 64, 320)
    given.codes[0, 3] = 0x80  # a row of zeros of both signs
    given.codes[0, 5, :16] = 0
    given.scales[0, 5, 0] = 0  # what a quantizer gives a block of zeros
    given.codes[0, 7, 16:32] = 0x08
    given.scales[0, 7, 1] = 254
    packed = pack(given, STAGES[0])
    assert packed.outliers.shape[0] == 0
    assert torch.equal(unpacked(packed, STAGES[0], 320), dequantize_mxfp4(given, torch.float64))


def test_a_row_with_a_nan_scale_has_a_nan_factor_and_no_other_row_has():
    given = weight(1, 64, 320)
    given.scales[0, 9, 4] = 255
    factor = pack(given, STAGES[0]).row_factor
    assert factor.isnan().nonzero().tolist() == [[0, 9]]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.columns} columns")
@pytest.mark.parametrize("intermediate", [32, 96, 320, 736, 2880])
def test_gates_and_ups_are_eight_rows_apart_and_a_tile_writes_neighbours(stage, intermediate):
    """As bf16_place of layer.cuh puts the columns of h: 16 of them an instruction, two pairs of each thread of a quad, 8 apart."""
    rows = gate_up_rows(intermediate, stage, CPU)
    assert sorted(rows[rows >= 0].tolist()) == list(range(2 * intermediate))
    rows = rows.view(-1, 4, 2, 8)  # tile, w, gate or up, g
    there = rows >= 0
    assert torch.equal(rows[:, :, 1][there[:, :, 1]], rows[:, :, 0][there[:, :, 0]] + 1)
    column = rows[:, :, 0].flatten() // 2
    place = torch.arange(len(column))[column >= 0]
    k = column[column >= 0]
    rest = k % stage.columns
    half = rest >= 128 * stage.chunks
    chunk = torch.where(half, 128 * stage.chunks, rest & ~127)
    c, j = torch.where(half, (rest - chunk) >> 4, rest >> 5) & 3, torch.where(half, rest >> 3 & 1, rest >> 3 & 3)
    e = rest & 3
    assert torch.equal(place, k - rest + chunk + 32 * j + 16 * (rest >> 2 & 1) + 8 * (e >> 1) + 2 * c + (e & 1))


# --- arithmetic


def split(x):
    """High, low and factor of bf16 rows as `split_8` of moe.cu makes them."""
    scale = torch.exp2((448 / x.float().abs().amax(-1, keepdim=True)).log2().floor())
    high = (x.float() * scale).to(torch.float8_e4m3fn)
    low = ((x.float() * scale - high.float()) * 16).to(torch.float8_e4m3fn)
    return high.float(), low.float(), 1 / scale


def test_a_bf16_number_is_the_sum_of_two_e4m3_numbers_down_to_an_8192nd_of_its_row():
    every = torch.arange(0x0080, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all positive normal numbers
    for largest in (1.0, 1.4375, 1.9921875):
        row = every[(every <= largest) & (every >= largest * 2.0**-13)]
        high, low, factor = split(torch.cat((row, -row)).view(1, -1))
        assert torch.equal((high + low / 16) * factor, torch.cat((row, -row)).view(1, -1).float())
        rest = every[every < largest * 2.0**-13]
        high, low, factor = split(torch.cat((row[-1:], rest)).view(1, -1))
        assert ((high + low / 16) * factor - torch.cat((row[-1:], rest)).float()).abs().max() < 3e-7 * largest


@pytest.mark.parametrize(
    ("alpha", "beta", "limit", "scale"),
    [
        (1.702, 1.0, 7.0, 8.0),
        (1.702, 1.0, None, None),
        (1.0, 0.0, 20.0, 1.0),
        (1.0, 0.0, 30.0, 0.25),
        (0.0, 1.0, 7.0, None),
        (0.01, 1.0, 7.0, 2.0),
    ],
)
def test_h_has_a_static_scale_where_the_limits_bound_it(alpha, beta, limit, scale):
    assert h_scale(alpha, beta, limit) == scale


@pytest.mark.parametrize(("alpha", "beta", "limit"), [(1.702, 1.0, 7.0), (1.0, 0.0, 20.0), (0.01, 1.0, 7.0)])
def test_no_h_is_above_the_largest_e4m3_number(alpha, beta, limit):
    gate = torch.linspace(-1000, limit, 200_001, dtype=torch.float64)
    largest = (gate * (alpha * gate).sigmoid()).abs().max() * (limit + abs(beta))
    assert 112 <= float(largest) * h_scale(alpha, beta, limit) <= 448


# --- constants


def test_gpt_oss_20b_gets_the_measured_variants():
    found = [variant(GPT_OSS_20B, tier, h_static=True, outliers=False) for tier in TIERS]
    assert GPT_OSS_20B.stage.columns == 320
    assert [(v.tier.max_tokens, v.columns, v.ring_stages) for v in found][:4] == [(2, 8, 15), (8, 8, 18), (32, 16, 15), (64, 32, 9)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_preset_has_a_variant_that_fits_and_deals_slots_evenly(model, tp):
    point = case(model, 1, tp_size=tp) if model != "tiny" or tp < 4 else case(model, 1)
    sizes = Sizes(
        hidden=point.hidden_size, intermediate=point.local_intermediate_size, num_experts=point.num_experts, local_experts=point.num_experts
    )
    for tier in TIERS:
        found = variant(sizes, tier, h_static=True, outliers=True)
        assert found is not None
        assert found.shared_bytes <= SHARED_BYTES
        assert found.ring_stages % WARPGROUPS == 0
        assert found.defines["STATE_BYTES"] % 16 == 0


def test_the_layout_does_not_depend_on_the_batch():
    layer = make_layer(case("tiny", 1), "cpu")
    small, large = launch.prepare(layer, 1), launch.prepare(layer, 300)
    packed = [prepared.layer.w13 + prepared.layer.w2 for prepared in (small, large)]
    assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True))
    assert [v.tier.max_tokens for v in small.variants] == [2]
    assert small.many == ()
    assert [v.tier.max_tokens for v in large.variants] == [2, 8, 32, 64]
    assert [(many.max_tokens, many.format.name) for many in large.many] == [(80, "e4m3 pair"), (300, "bf16")]


def test_a_gpu_with_fewer_multiprocessors_than_tokens_gets_the_other_kernel():
    """gpt-oss-120b has moe.cu up to 128 tokens, and an H100 PCIe has 114 multiprocessors."""
    layer = make_layer(case("tiny", 1, num_experts=64), "cpu")
    prepared = launch.prepare(layer, 128)
    assert prepared.layer.sizes.few_up_to == 128
    assert [v.tier.max_tokens for v in prepared.variants] == [2, 8, 32, 64, 128]
    assert [(many.max_tokens, many.format.name) for many in prepared.many] == [(128, "e4m3 pair")]


def test_the_regimes_of_both_models_are_those_that_were_measured():
    assert (GPT_OSS_20B.few_up_to, GPT_OSS_20B.pair_up_to) == (64, 320)
    assert (GPT_OSS_120B.few_up_to, GPT_OSS_120B.pair_up_to) == (128, 1280)


# --- what is refused


@pytest.mark.parametrize(
    ("point", "device", "words"),
    [
        (case("gpt-oss-20b", 1), replace(H200, arch="sm100"), "only sm90 has; this is sm100"),
        (case("gpt-oss-20b", 1), replace(H200, arch="cpu"), "this is cpu"),
        (case("tiny", 1, hidden_size=352), H200, "hidden_size=352 is not a multiple of 64"),
        (case("deepseek-v3", 1, top_k=9), H200, "top_k=9 is more than the 8 slots"),
        (case("tiny", 1, hidden_size=32768), H200, "a row of hidden_size=32768 or intermediate_size=192 leaves no room"),
    ],
    ids=lambda value: value.label if hasattr(value, "label") else "",
)
def test_what_cannot_run_is_refused_with_a_sentence(point, device, words, monkeypatch):
    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", lambda module: module)
    assert words in BACKEND.unsupported(point, device)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", lambda module: None)
    assert "pip install 'moebench[hopper]'" in BACKEND.unsupported(case("gpt-oss-20b", 1), H200)

    def no_parent(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", no_parent)
    assert "cuda-bindings" in BACKEND.unsupported(case("gpt-oss-20b", 1), H200)


def test_every_supported_case_says_none(monkeypatch):
    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", lambda module: module)
    for model in ("gpt-oss-20b", "gpt-oss-120b", "deepseek-v3", "qwen3-235b-a22b"):
        for tokens in (0, 1, 64, 128, 129, 16384):
            for ep in (1, 4):
                assert BACKEND.unsupported(case(model, tokens, ep_size=ep), H200) is None


def test_the_backend_is_found_without_torch_or_cuda():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'cuda')))\n"
    code = blocked + "from moebench.registry import builtin; print('hopper_mxfp4_bf16' in [backend.name for backend in builtin()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_launch_whose_blocks_do_not_fit_at_once_is_refused():
    wanted = variant(GPT_OSS_20B, TIERS[0], h_static=True, outliers=False)
    assert launch.residency_error(132, 132, wanted) is None
    assert "needs 132 blocks of 416 threads" in launch.residency_error(132, 131, wanted)


def test_calls_that_the_layer_was_not_prepared_for_are_refused():
    point = case("tiny", 9)
    prepared = launch.prepare(make_layer(point, "cpu"), 8)
    kernels = tuple(launch.Kernel(variant=v, module=None, function=None, blocks=4) for v in prepared.variants)
    with pytest.raises(ValueError, match="num_tokens=9 is more than the 8 this layer was prepared for"):
        launch.run(launch.Loaded(prepared=prepared, kernels=kernels, facts={}), make_tokens(point, "cpu"))
    many = launch.prepare(make_layer(point, "cpu"), 9)
    kernels = tuple(launch.Kernel(variant=v, module=None, function=None, blocks=4) for v in many.variants)
    with pytest.raises(ValueError, match="num_tokens=9 needs as many blocks to split them, and this GPU runs 4"):
        launch.run(launch.Loaded(prepared=many, kernels=kernels, facts={}), make_tokens(point, "cpu"))


def test_no_tokens_need_no_launch():
    prepared = launch.prepare(make_layer(case("tiny", 0), "cpu"), 0)
    out = launch.run(launch.Loaded(prepared=prepared, kernels=(), facts={}), make_tokens(case("tiny", 0), "cpu"))
    assert (out.shape, out.dtype) == ((0, 320), torch.bfloat16)


# --- the cache of compiled kernels


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    """A stand-in that counts compilations, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = SimpleNamespace(compiled=[], version=(0, 13, 0), error=0)

    def compile_program(program, count, given):
        state.compiled.append(given)
        return (state.error,)

    def write(program, into):
        into[:] = b"code"
        return (0,)

    def write_log(program, into):
        into[:] = b"line 7\0"
        return (0,)

    fake = SimpleNamespace(
        nvrtcVersion=lambda: state.version,
        nvrtcCreateProgram=lambda source, name, count, headers, names: (0, (source, headers)),
        nvrtcCompileProgram=compile_program,
        nvrtcGetCUBINSize=lambda program: (0, 4),
        nvrtcGetCUBIN=write,
        nvrtcDestroyProgram=lambda program: (0,),
        nvrtcGetErrorString=lambda error: (0, b"NVRTC_ERROR_COMPILATION"),
        nvrtcGetProgramLogSize=lambda program: (0, 7),
        nvrtcGetProgramLog=write_log,
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", fake)
    return state


def test_a_kernel_is_compiled_once_for_its_constants_and_its_compiler(nvrtc):
    first = compiler.cubin("moe.cu", {"COLUMNS": 8})
    again = compiler.cubin("moe.cu", {"COLUMNS": 8})
    assert (first.code, first.cached, again.code, again.cached) == (b"code", False, b"code", True)
    assert nvrtc.compiled == [[b"-arch=sm_90a", b"-std=c++17", b"-DCOLUMNS=8"]]
    compiler.cubin("moe.cu", {"COLUMNS": 16})
    nvrtc.version = (0, 13, 1)
    assert compiler.cubin("moe.cu", {"COLUMNS": 8}).compiler == "nvrtc 13.1"
    assert len(nvrtc.compiled) == 3


def test_another_source_is_compiled_again(nvrtc, monkeypatch, tmp_path):
    compiler.cubin("moe.cu", {})
    for name in ("moe.cu", *compiler.HEADERS):
        (tmp_path / name).write_text((compiler.SOURCES / name).read_text())
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    assert compiler.cubin("moe.cu", {}).cached
    (tmp_path / compiler.HEADERS[0]).write_text("// changed")
    assert not compiler.cubin("moe.cu", {}).cached


def test_the_cache_holds_whole_files_only(nvrtc, monkeypatch):
    compiler.cubin("moe.cu", {})
    assert [path.suffix for path in compiler.cache_dir().iterdir()] == [".cubin"]

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert compiler.cubin("moe.cu", {"COLUMNS": 8}).code == b"code"
    assert [path.suffix for path in compiler.cache_dir().iterdir()] == [".cubin"]


def test_an_error_shows_the_compilers_log(nvrtc):
    nvrtc.error = 6
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION for moe\.cu\nline 7$"):
        compiler.cubin("moe.cu", {})


# --- the kernel's own source, on this CPU


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("hopper_on_cpu")


def on_cpu(libraries, prepared, tokens, blocks=None, seed=1):
    kernel = KernelOnCpu(next(v for v in prepared.variants if tokens.num_tokens <= v.tier.max_tokens), libraries)
    if blocks is None:
        blocks = tokens.num_tokens if tokens.num_tokens > 8 else 3  # as many as split a token
    return kernel.run(prepared, tokens, blocks=blocks, seed=seed)


def assert_right(libraries, layer, tokens, **options):
    out = on_cpu(libraries, launch.prepare(layer, tokens.num_tokens), tokens, **options)
    error = compare(out, reference(layer, tokens, "bf16"), "bf16")
    assert error.ok, error
    assert error.rel_l2 <= 0.0035
    return out


@runs_on_cpu
def test_python_and_the_source_agree_on_sizes(libraries):
    for tokens, hidden, intermediate in ((2, 320, 320), (8, 256, 768), (64, 320, 192), (128, 320, 192)):
        point = case("tiny", tokens, hidden_size=hidden, intermediate_size=intermediate)
        prepared = launch.prepare(make_layer(point, "cpu"), tokens)
        wanted = prepared.variants[-1]
        sizes = KernelOnCpu(wanted, libraries).sizes()
        stage = wanted.sizes.stage
        assert sizes["arguments"] == ctypes.sizeof(launch.Arguments)
        assert sizes["stage"] == stage.bytes == prepared.layer.w13.stages.shape[3]
        assert sizes["counters"] == wanted.counters
        assert sizes["passes"] == wanted.max_passes
        assert sizes["shared"] == wanted.shared_bytes
        assert sizes["state"] <= wanted.defines["STATE_BYTES"] <= sizes["state"] + 32
        assert (sizes["padded_hidden"], sizes["padded_intermediate"]) == (stage.padded(hidden), stage.padded(intermediate))


@runs_on_cpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 64])
def test_token_counts_around_every_tier_are_right(libraries, tokens):
    point = case("tiny", tokens)
    assert_right(libraries, make_layer(point, "cpu"), make_tokens(point, "cpu"))


@runs_on_cpu
@pytest.mark.parametrize(("hidden", "intermediate", "tokens"), [(64, 64, 5), (256, 768, 5), (448, 96, 20), (1024, 160, 20)])
def test_other_sizes_are_right(libraries, hidden, intermediate, tokens):
    point = case("tiny", tokens, hidden_size=hidden, intermediate_size=intermediate)
    assert_right(libraries, make_layer(point, "cpu"), make_tokens(point, "cpu"))


@runs_on_cpu
@pytest.mark.parametrize(("top_k", "tokens"), [(1, 40), (3, 7), (8, 40)])
def test_one_to_eight_experts_a_token_are_right(libraries, top_k, tokens):
    point = case("tiny", tokens, top_k=top_k)
    assert_right(libraries, make_layer(point, "cpu"), make_tokens(point, "cpu"))


@runs_on_cpu
@pytest.mark.parametrize(("axis", "size", "tokens"), [("ep", 4, 30), ("ep", 8, 3), ("tp", 2, 30), ("tp", 3, 3)])
def test_slices_add_up_to_the_whole(libraries, axis, size, tokens):
    whole = case("tiny", tokens)
    batch = make_tokens(whole, "cpu")
    total = torch.zeros(tokens, whole.hidden_size)
    for rank in range(size):
        layer = make_layer(case("tiny", tokens, **{f"{axis}_size": size, f"{axis}_rank": rank}), "cpu")
        total += assert_right(libraries, layer, batch).float()
    error = compare(total.bfloat16(), reference(make_layer(whole, "cpu"), batch, "bf16"), "bf16")
    assert error.ok, error


@runs_on_cpu
@pytest.mark.parametrize("tokens", [4, 12])
def test_foreign_ids_are_skipped_duplicates_count_twice_and_unserved_tokens_are_zero(libraries, tokens):
    point = case("tiny", tokens, ep_size=2, ep_rank=1)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    batch.topk_ids[0] = torch.tensor([5, 5, 5, 5])
    batch.topk_ids[1] = torch.tensor([0, 3, 1, 2])
    batch.topk_ids[2] = torch.tensor([-1, 8, 1 << 30, 4])
    out = assert_right(libraries, layer, batch)
    assert not out[1].any()


@runs_on_cpu
@pytest.mark.parametrize("tokens", [6, 64])
def test_all_tokens_may_go_to_one_expert_or_to_nobody(libraries, tokens):
    point = case("tiny", tokens)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    assert_right(libraries, layer, replace(batch, topk_ids=torch.full_like(batch.topk_ids, 6)))
    assert not on_cpu(libraries, launch.prepare(layer, tokens), replace(batch, topk_ids=torch.full_like(batch.topk_ids, -1))).any()


@runs_on_cpu
@pytest.mark.parametrize(
    ("swiglu", "tokens"),
    [(Swiglu(), 4), (Swiglu(alpha=1.702, beta=1.0), 10), (Swiglu(alpha=0.5, beta=-0.25, limit=2.0), 4)],
)
def test_swiglu_with_and_without_limits_and_no_biases_are_right(libraries, swiglu, tokens):
    point = case("tiny", tokens)
    layer = replace(make_layer(point, "cpu"), swiglu=swiglu, b13=None, b2=None)
    assert_right(libraries, layer, make_tokens(point, "cpu"))


@runs_on_cpu
@pytest.mark.parametrize("hidden", [320, 128])  # 128: a row is fewer units than a warp has lanes
def test_rows_of_very_different_sizes_are_split_each_by_its_own(libraries, hidden):
    point = case("tiny", 8, hidden_size=hidden)
    layer = replace(make_layer(point, "cpu"), b13=None, b2=None, swiglu=Swiglu())
    batch = make_tokens(point, "cpu")
    sizes = torch.tensor([1e-6, 1e-3, 0.1, 0.5, 1, 2, 0, 4]).view(8, 1)
    batch = replace(batch, hidden_states=(batch.hidden_states.float() * sizes).bfloat16())
    want = reference(layer, batch, "bf16")
    out = on_cpu(libraries, launch.prepare(layer, 8), batch)
    for token in range(8):
        distance = (out[token].double() - want[token].double()).norm()
        assert distance <= 0.004 * want[token].double().norm(), token


@runs_on_cpu
@pytest.mark.parametrize("tokens", [4, 10])
def test_scales_outside_of_a_rows_window_are_added_exactly(libraries, tokens):
    """x has its weight on the columns of small blocks, so that what they add is as large as the rest."""
    point = case("tiny", tokens, hidden_size=320, intermediate_size=320)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    layer = replace(layer, b13=None, b2=None, swiglu=Swiglu())
    layer.w13.scales[:, ::3, 0] = 133
    layer.w13.scales[:, ::3, 1:] -= 6
    layer.w2.scales[:, 1::5, 2] = 100
    hidden = batch.hidden_states.clone()
    hidden[:, :32] /= 1024
    batch = replace(batch, hidden_states=hidden)
    prepared = launch.prepare(layer, tokens)
    assert min(prepared.layer.w13.outliers.shape[0], prepared.layer.w2.outliers.shape[0]) > 100
    assert_right(libraries, layer, batch)
    none = torch.zeros_like(prepared.layer.w13.outlier_starts)
    blind = replace(prepared, layer=replace(prepared.layer, w13=prepared.layer.w13._replace(outlier_starts=none)))
    assert not compare(on_cpu(libraries, blind, batch), reference(layer, batch, "bf16"), "bf16").ok


@runs_on_cpu
def test_nan_weights_and_activations_reach_the_output(libraries):
    point = case("tiny", 4)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    layer.w2.scales[:, 17, 3] = 255
    batch.hidden_states[2, 100] = torch.nan
    out = on_cpu(libraries, launch.prepare(layer, 4), batch)
    assert torch.equal(out.isnan(), reference(layer, batch, "bf16").isnan())
    assert int(out.isnan().sum()) == 320 + 3


@runs_on_cpu
def test_a_nan_in_w13_is_not_clamped_away(libraries):
    point = case("tiny", 2)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    layer.w13.scales[int(batch.topk_ids[0, 0]), 10, 0] = 255
    assert on_cpu(libraries, launch.prepare(layer, 2), batch)[0].isnan().all()


@runs_on_cpu
@pytest.mark.parametrize(("tokens", "schedules"), [(8, 6), (48, 3)])
def test_bits_do_not_depend_on_speeds_or_on_the_number_of_blocks(libraries, tokens, schedules):
    """With warps at random speeds and late copies, a wait that is missing or too much shows."""
    point = case("tiny", tokens, hidden_size=640, intermediate_size=320)
    prepared, batch = launch.prepare(make_layer(point, "cpu"), tokens), make_tokens(point, "cpu")
    first = on_cpu(libraries, prepared, batch, seed=0)
    for seed in range(1, schedules + 1):
        blocks = (1 if tokens <= 8 else tokens) + seed % 5
        assert torch.equal(on_cpu(libraries, prepared, batch, blocks=blocks, seed=seed), first), (seed, blocks)


@runs_on_cpu
def test_one_workspace_serves_calls_of_all_sizes_in_turn(libraries):
    point = case("tiny", 40)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    prepared = launch.prepare(layer, 128)
    for tokens in (40, 1, 9, 8, 40, 3):
        part = Tokens(
            hidden_states=batch.hidden_states[:tokens], topk_ids=batch.topk_ids[:tokens], topk_weights=batch.topk_weights[:tokens]
        )
        assert compare(on_cpu(libraries, prepared, part), reference(layer, part, "bf16"), "bf16").ok, tokens


@runs_on_cpu
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_layer_of_the_width_of_gpt_oss_is_right(libraries, tokens):
    """As many columns, stages and ring slots as gpt-oss, and 2 of its experts."""
    point = case("gpt-oss-20b", tokens, num_experts=2, top_k=1)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    prepared = launch.prepare(layer, tokens)
    as_20b = variant(GPT_OSS_20B, tier_of(tokens), h_static=True, outliers=False)
    wanted = replace(as_20b, sizes=replace(as_20b.sizes, local_experts=2))
    out = KernelOnCpu(wanted, libraries).run(prepared, batch, blocks=max(tokens, 4), seed=1)
    error = compare(out, reference(layer, batch, "bf16"), "bf16")
    assert error.ok, error


# --- many tokens: prefill.cu

FORMATS = (prefill.BF16, prefill.E4M3_PAIR)


def prefill_on_cpu(libraries, layer, tokens, used, columns=64, **options):
    return PrefillOnCpu(pack_layer(layer), used, columns, tokens.num_tokens, libraries).run(tokens, **options)


@pytest.mark.parametrize(
    ("pairs", "bf16", "pair"),
    [(0.1, 32, 32), (4, 32, 32), (16, 32, 64), (32, 64, 80), (64, 80, 80), (128, 144, 96), (256, 144, 112), (4096, 144, 112)],
)
def test_columns_are_those_with_which_all_passes_take_least(pairs, bf16, pair):
    assert (prefill.BF16.columns_for(pairs), prefill.E4M3_PAIR.columns_for(pairs)) == (bf16, pair)


@pytest.mark.parametrize("used", FORMATS, ids=lambda used: used.name)
def test_every_number_of_columns_that_a_call_can_need_is_prepared(used):
    for most in (0.5, 3, 40, 128, 1000):
        ready = used.columns_up_to(most)
        assert {used.columns_for(most * part / 97) for part in range(1, 98)} <= set(ready)


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v3", "mixtral-8x7b", "tiny"])
def test_shared_memory_holds_every_variant(model):
    point = case(model, 1)
    sizes = Sizes(hidden=point.hidden_size, intermediate=point.intermediate_size, num_experts=8, local_experts=8)
    for used in (*FORMATS, prefill.E4M3):
        for columns in used.columns:
            found = prefill.Variant(sizes=sizes, format=used, columns=columns, outliers=False)
            assert found.shared_bytes <= SHARED_BYTES
            assert found.lines >= 4


def test_a_batch_whose_rows_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match=r"max_num_tokens=200000 is more than the \d+ whose rows"):
        prefill.workspace(GPT_OSS_20B, prefill.BF16, 200_000, torch.device("meta"))


@runs_on_cpu
@pytest.mark.parametrize("used", [*FORMATS, prefill.E4M3], ids=lambda used: used.name)
def test_the_constants_of_prefill_agree_with_its_source(libraries, used):
    packed = pack_layer(make_layer(case("tiny", 1), "cpu"))
    kernel = PrefillOnCpu(packed, used, 64, 20, libraries)
    found = kernel.sizes()
    assert found["arguments"] == ctypes.sizeof(prefill.Arguments)
    assert found["counters"] == prefill.COUNTERS
    assert found["shared"] == kernel.variant.shared_bytes
    assert found["state"] <= prefill.STATE_BYTES
    assert found["up_tiles"] * 64 == packed.w13.row_factor.shape[1]
    assert (found["padded_hidden"], found["padded_intermediate"]) == (packed.sizes.stage.padded(320), packed.sizes.stage.padded(192))


@runs_on_cpu
@pytest.mark.parametrize("used", FORMATS, ids=lambda used: used.name)
@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_a_layer_for_many_tokens_is_right(libraries, used, tokens):
    point = case("tiny", tokens)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    error = compare(prefill_on_cpu(libraries, layer, batch, used), reference(layer, batch, "bf16"), "bf16")
    assert error.ok, error
    assert error.rel_l2 <= 0.0025


@runs_on_cpu
@pytest.mark.parametrize("used", FORMATS, ids=lambda used: used.name)
def test_many_tokens_with_duplicate_foreign_and_no_ids_are_right(libraries, used):
    point = case("tiny", 30, ep_size=2, ep_rank=1)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    batch.topk_ids[0] = 5
    batch.topk_ids[1] = torch.tensor([-1, 0, 1 << 30, 8], dtype=torch.int32)
    out = prefill_on_cpu(libraries, layer, batch, used)
    assert not out[1].any()
    assert compare(out, reference(layer, batch, "bf16"), "bf16").ok
    nobody = replace(batch, topk_ids=torch.full_like(batch.topk_ids, -3))
    assert not prefill_on_cpu(libraries, layer, nobody, used).any()


@runs_on_cpu
@pytest.mark.parametrize("used", FORMATS, ids=lambda used: used.name)
def test_bits_for_many_tokens_do_not_depend_on_speeds_or_on_the_number_of_blocks(libraries, used):
    """Stages of 320 columns as gpt-oss has them; warps at random speeds and late copies."""
    point = case("tiny", 40, hidden_size=640, intermediate_size=320, num_experts=4)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    first = prefill_on_cpu(libraries, layer, batch, used)
    assert compare(first, reference(layer, batch, "bf16"), "bf16").ok
    for seed in (1, 2, 3):
        assert torch.equal(prefill_on_cpu(libraries, layer, batch, used, blocks=1 + seed, seed=seed), first), seed


@runs_on_cpu
@pytest.mark.parametrize("used", FORMATS, ids=lambda used: used.name)
def test_scales_outside_of_a_rows_window_are_added_for_many_tokens(libraries, used):
    point = case("tiny", 20, hidden_size=640, intermediate_size=320)
    layer = make_layer(point, "cpu")
    layer.w13.scales[:, ::3, 0] = 133
    layer.w13.scales[:, ::3, 1:] -= 6
    layer.w2.scales[:, 1::5, 2] = 100
    batch = make_tokens(point, "cpu")
    batch.hidden_states[:, :32] /= 1024
    assert pack_layer(layer).num_outliers > 100
    error = compare(prefill_on_cpu(libraries, layer, batch, used, columns=32), reference(layer, batch, "bf16"), "bf16")
    assert error.ok, error
