"""The Triton kernels in Triton's interpreter, against a few lines of torch that share nothing with them."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moebench.case import case
from moebench.device import Device
from moebench.kernels.triton_mxfp4_bf16 import TritonMxfp4Bf16
from moebench.mx import Mxfp4
from moebench.problem import Layer, Swiglu, Tokens

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules:
    pytest.skip("something imported triton before, to compile for a GPU; run this file alone", allow_module_level=True)
# Triton looks at this when it decorates, as it imports itself and our kernels; workers of other tests must not inherit it.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    import triton
    import triton.language as tl

    from moebench.kernels.triton_mxfp4_bf16_details import gemm, launch
    from moebench.kernels.triton_mxfp4_bf16_details.configs import Config, Tile, choose, shipped
    from moebench.kernels.triton_mxfp4_bf16_details.layout import pack

    @triton.jit
    def dequantize_kernel(out_ptr, codes_ptr, scales_ptr, WIDE: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr):
        codes = tl.load(codes_ptr + tl.arange(0, STEPS * 1024))[None, :]
        scales = tl.load(scales_ptr + tl.arange(0, STEPS * 32))[None, :]
        weights = gemm.dequantize(codes, scales, WIDE, MODE, 1, STEPS)
        row, k = tl.arange(0, 64), tl.arange(0, STEPS * 64)
        tl.store(out_ptr + row[:, None] * (STEPS * 64) + k[None, :], weights)


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """triton 3.7 imports a part of itself at the first call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


CONFIGS = shipped("sm90")
GPT_OSS = Swiglu(alpha=1.702, beta=1.0, limit=7.0)
PLAIN = Swiglu()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SORTED = replace(CONFIGS[0], dense_up_to=0)  # the same tiles after sorting


def dequantized(weight):
    """fp32 [E, N, K]."""
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(-2)
    scales = torch.exp2(weight.scales.double() - 127).repeat_interleave(32, -1)
    return (E2M1[codes.long()].double() * scales).float()


def expected(layer, tokens):
    """fp32 [M, H]."""
    w13, w2 = dequantized(layer.w13), dequantized(layer.w2)
    x = tokens.hidden_states.float()
    out = torch.zeros(x.shape)
    for token, (ids, weights) in enumerate(zip(tokens.topk_ids.tolist(), tokens.topk_weights.tolist(), strict=True)):
        for expert_id, weight in zip(ids, weights, strict=True):
            e = expert_id - layer.local_expert_start
            if not 0 <= e < layer.num_local_experts:
                continue
            y = w13[e] @ x[token] + (0 if layer.b13 is None else layer.b13[e].float())
            gate, up = y[0::2], y[1::2]
            if layer.swiglu.limit is not None:
                gate, up = gate.clamp(max=layer.swiglu.limit), up.clamp(-layer.swiglu.limit, layer.swiglu.limit)
            h = (gate * torch.sigmoid(layer.swiglu.alpha * gate) * (up + layer.swiglu.beta)).bfloat16().float()
            out[token] += weight * (w2[e] @ h + (0 if layer.b2 is None else layer.b2[e].float()))
    return out


def make_weight(experts, rows, columns, generator, scale_bytes):
    scales = torch.randint(scale_bytes[0], scale_bytes[1] + 1, (experts, rows, columns // 32), generator=generator)
    codes = torch.randint(256, (experts, rows, columns // 2), generator=generator)
    return Mxfp4(codes.to(torch.uint8), scales.to(torch.uint8))


def make_layer(hidden=64, intermediate=64, experts=4, swiglu=GPT_OSS, bias=True, scale_bytes=(117, 123), scale_bytes_w2=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Layer(
        num_experts=experts,
        ep_size=1,
        ep_rank=0,
        tp_size=1,
        tp_rank=0,
        hidden_size=hidden,
        intermediate_size=intermediate,
        w13=make_weight(experts, 2 * intermediate, hidden, generator, scale_bytes),
        w2=make_weight(experts, hidden, intermediate, generator, scale_bytes_w2 or scale_bytes),
        b13=torch.randn(experts, 2 * intermediate, generator=generator).bfloat16() if bias else None,
        b2=torch.randn(experts, hidden, generator=generator).bfloat16() if bias else None,
        swiglu=swiglu,
    )


def make_tokens(layer, num_tokens, top_k=2, ids=None, seed=1, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.rand(num_tokens, layer.num_experts, generator=generator).argsort(1)[:, :top_k]
    ids = torch.as_tensor(ids, dtype=torch.int32)
    return Tokens(
        hidden_states=(size * torch.randn(num_tokens, layer.hidden_size, generator=generator)).bfloat16(),
        topk_ids=ids,
        topk_weights=torch.rand(ids.shape, generator=generator) + 0.1,
    )


def rank_of(layer, ep_rank, ep_size):
    size = layer.num_experts // ep_size
    mine = slice(ep_rank * size, (ep_rank + 1) * size)
    return replace(
        layer,
        ep_size=ep_size,
        ep_rank=ep_rank,
        w13=Mxfp4(layer.w13.codes[mine], layer.w13.scales[mine]),
        w2=Mxfp4(layer.w2.codes[mine], layer.w2.scales[mine]),
        b13=None if layer.b13 is None else layer.b13[mine],
        b2=None if layer.b2 is None else layer.b2[mine],
    )


def computed(layer, tokens, config=None):
    out = launch.run(launch.prepare(layer), tokens, config)
    assert out.dtype == torch.bfloat16
    return out.float()


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


# Rounding z-sums to bf16 alone gives 1.7e-3; h is rounded at the same point on both sides, but from differently ordered sums.
TOLERANCE = 3e-3


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize("config", [CONFIGS[0], SORTED, CONFIGS[1]], ids=["as the table says", "sorted", "32 tokens"])
def test_output_is_that_of_a_loop_over_tokens_and_slots(num_tokens, config):
    layer = make_layer(hidden=160, intermediate=96, experts=4)
    tokens = make_tokens(layer, num_tokens)
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize("config", [*CONFIGS[:4], replace(CONFIGS[0], fp32_z=False)], ids=lambda c: f"{c.tokens} tokens, fp32 {c.fp32_z}")
def test_every_shipped_configuration_computes_the_same_layer(config):
    layer = make_layer(hidden=160, intermediate=96, experts=2)
    tokens = make_tokens(layer, 20)
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    "tile",
    [
        Tile(blocks=1, warps=4, stages=2),
        Tile(blocks=2, warps=4, stages=2),
        Tile(blocks=1, warps=4, stages=2, steps=4),
        Tile(blocks=2, warps=4, stages=2, splits=3),
        Tile(blocks=1, warps=4, stages=2, steps=1, splits=2),
        Tile(blocks=2, warps=4, stages=2, raster=2),
    ],
    ids=repr,
)
def test_tiles_of_any_shape_compute_the_same_layer(tile):
    layer = make_layer(hidden=288, intermediate=160, experts=2)
    tokens = make_tokens(layer, 18, ids=[[0]] * 17 + [[1]])
    config = Config(up_to=0, tokens=16, gate_up=replace(tile, splits=1), down=tile, fp32_z=True)
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [CONFIGS[0], SORTED], ids=["dense", "sorted"])
def test_any_number_of_slots_works(top_k, config):
    layer = make_layer(experts=8)
    tokens = make_tokens(layer, 5, top_k)
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


def test_no_tokens_give_no_rows():
    layer = make_layer(hidden=96)
    out = computed(layer, make_tokens(layer, 0))
    assert out.shape == (0, 96)


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 32), (32, 96), (160, 160), (224, 96), (128, 128)])
def test_sizes_need_only_be_multiples_of_32(hidden, intermediate):
    layer = make_layer(hidden=hidden, intermediate=intermediate)
    tokens = make_tokens(layer, 6)
    assert error(computed(layer, tokens), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize("swiglu", [PLAIN, GPT_OSS, Swiglu(alpha=0.5, beta=-1.0, limit=0.25)], ids=["plain", "gpt-oss", "other"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_swiglu_and_biases_follow_the_layer(swiglu, bias):
    layer = make_layer(swiglu=swiglu, bias=bias, scale_bytes=(120, 126), scale_bytes_w2=(116, 120))
    tokens = make_tokens(layer, 6)
    assert error(computed(layer, tokens), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    ("scale_bytes", "scale_bytes_w2", "wide"),
    [((100, 128), (90, 110), False), ((110, 140), (90, 110), True), ((0, 3), (126, 128), False), ((1, 60), (130, 190), True)],
)
def test_scales_may_lie_anywhere(scale_bytes, scale_bytes_w2, wide):
    layer = make_layer(scale_bytes=scale_bytes, scale_bytes_w2=scale_bytes_w2, bias=False, swiglu=Swiglu(beta=1.0))
    prepared = launch.prepare(layer)
    assert (prepared.w13.wide or prepared.w2.wide) == wide
    # rows of x that bring x @ W13 near 1, so that W2 gets something
    tokens = make_tokens(layer, 4, size=2.0 ** (127 - scale_bytes[1]) / 16)
    want = expected(layer, tokens)
    assert want.norm() > 0
    assert want.isfinite().all()
    assert error(computed(layer, tokens), want) < TOLERANCE


@pytest.mark.parametrize("config", [CONFIGS[0], SORTED], ids=["dense", "sorted"])
def test_ranks_sum_to_the_whole(config):
    layer = make_layer(experts=8)
    tokens = make_tokens(layer, 7, top_k=4)
    parts = [computed(rank_of(layer, rank, 4), tokens, config) for rank in range(4)]
    assert error(torch.stack(parts).sum(0), expected(layer, tokens)) < TOLERANCE
    for rank, part in enumerate(parts):
        assert error(part, expected(rank_of(layer, rank, 4), tokens)) < TOLERANCE


@pytest.mark.parametrize("config", [CONFIGS[0], SORTED], ids=["dense", "sorted"])
def test_ids_that_name_no_local_expert_are_skipped(config):
    layer = rank_of(make_layer(experts=4), 1, 2)  # experts 2 and 3
    tokens = make_tokens(layer, 5, ids=[[2, 0], [-1, 3], [1, 0], [-7, 4], [99, 2]])
    out = computed(layer, tokens, config)
    assert error(out, expected(layer, tokens)) < TOLERANCE
    assert (out[[2, 3]] == 0).all()


@pytest.mark.parametrize("config", [CONFIGS[0], SORTED], ids=["dense", "sorted"])
def test_an_expert_named_twice_counts_twice(config):
    layer = make_layer(experts=4)
    tokens = make_tokens(layer, 4, ids=[[1, 1, 1], [0, 1, 0], [3, 1, 3], [3, 3, 2]])
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


@pytest.mark.parametrize("config", [CONFIGS[0], SORTED, CONFIGS[1]], ids=["dense", "sorted", "32 tokens"])
def test_all_tokens_may_go_to_one_expert_and_the_last_may_get_none(config):
    layer = make_layer(experts=3)  # not a power of two
    tokens = make_tokens(layer, 37, ids=[[1]] * 37)
    if config.dense_up_to:
        tokens = make_tokens(layer, 8, ids=[[1]] * 8)
    assert error(computed(layer, tokens, config), expected(layer, tokens)) < TOLERANCE


def test_a_token_does_not_feel_its_neighbours():
    layer = make_layer()
    tokens = make_tokens(layer, 20)
    tokens.hidden_states[3] = float("nan")
    out, want = computed(layer, tokens, SORTED), expected(layer, tokens)
    others = [i for i in range(20) if i != 3]
    assert out[3].isnan().all()
    assert error(out[others], want[others]) < TOLERANCE


def test_the_same_input_gives_the_same_bits():
    layer = make_layer()
    tokens = make_tokens(layer, 9)
    assert torch.equal(computed(layer, tokens), computed(layer, tokens))


def test_prepare_and_call_leave_layer_and_tokens_alone():
    layer = make_layer()
    tokens = make_tokens(layer, 3)
    before = [t.clone() for t in (layer.w13.codes, layer.w13.scales, tokens.hidden_states, tokens.topk_ids, tokens.topk_weights)]
    TritonMxfp4Bf16().prepare(layer, 3)(tokens)
    after = (layer.w13.codes, layer.w13.scales, tokens.hidden_states, tokens.topk_ids, tokens.topk_weights)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("num_pairs", [1, 300, 1100])
def test_sorting_in_two_launches_gives_what_one_launch_gives(num_pairs, monkeypatch):
    layer = launch.prepare(rank_of(make_layer(hidden=32, intermediate=32, experts=10), 1, 2))
    ids = torch.randint(-1, 11, (num_pairs, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    num_tiles = launch.most_tiles(num_pairs, 5, 16)
    tiles, order = launch.sort(layer, ids, num_tiles, 16)
    monkeypatch.setattr(launch, "SORT_AT_ONCE", 0)
    tiles_too, order_too = launch.sort(layer, ids, num_tiles, 16)
    local = (ids.flatten() - 5)[(ids.flatten() >= 5) & (ids.flatten() < 10)]
    by_expert = [torch.nonzero(ids.flatten() == 5 + e).flatten() for e in range(5)]
    assert torch.equal(order[: len(local)].long(), torch.cat(by_expert))
    assert torch.equal(order[: len(local)], order_too[: len(local)])
    assert torch.equal(tiles, tiles_too)
    begins = [0, *torch.tensor([len(pairs) for pairs in by_expert]).cumsum(0).tolist()]
    want = [[e, b, begins[e + 1]] for e in range(5) for b in range(begins[e], begins[e + 1], 16)]
    assert tiles[: len(want)].tolist() == want
    assert (tiles[len(want) :, 0] == -1).all()


@pytest.mark.parametrize(("num_pairs", "experts", "tokens"), [(1, 4, 16), (4, 4, 16), (5, 4, 2), (33, 4, 16), (1000, 7, 16)])
def test_no_routing_needs_more_tiles_than_are_launched(num_pairs, experts, tokens):
    def tiles_when(counts):
        return sum(-(-count // tokens) for count in counts)

    worst = max(
        tiles_when([num_pairs - used * (1 + extra * tokens), *[1 + extra * tokens] * used])
        for used in range(experts)
        for extra in range(num_pairs)
        if used * (1 + extra * tokens) <= num_pairs
    )
    assert launch.most_tiles(num_pairs, experts, tokens) >= worst
    assert launch.most_tiles(num_pairs, 1, tokens) == -(-num_pairs // tokens)


@pytest.mark.parametrize("wide", [False, True], ids=["fast", "wide"])
def test_dequantizing_is_exact_for_every_byte_and_scale(wide):
    scales = torch.tensor([1, 2, 64, 126, 127, 128] if not wide else [1, 2, 64, 127, 129, 200, 251, 252], dtype=torch.uint8)
    rows = 64 * len(scales)
    codes = torch.arange(256, dtype=torch.uint8).repeat(rows // 2)  # a row of 128 bytes holds half of all bytes, in k order
    codes = codes.view(1, rows, 128)
    weight = Mxfp4(codes, scales.repeat_interleave(64)[None, :, None].expand(1, rows, 8).contiguous())
    packed = pack(Mxfp4(weight.codes, weight.scales.clone()), interleaved=False)
    assert packed.wide == wide
    want = dequantized(weight)[0]
    for block in range(len(scales)):
        out = torch.empty(64, 256, dtype=torch.bfloat16)
        dequantize_kernel[(1,)](out, packed.codes[0, block], packed.scales[0, block], WIDE=wide, MODE="interpreter", STEPS=4)
        assert torch.equal(out.float(), want[64 * block : 64 * block + 64])


def test_scale_byte_zero_is_two_to_the_minus_127_where_no_scale_is_large():
    weight = Mxfp4(torch.arange(256, dtype=torch.uint8).view(1, 4, 64).repeat(1, 16, 1), torch.zeros(1, 64, 4, dtype=torch.uint8))
    packed = pack(weight, interleaved=False)
    out = torch.empty(64, 128, dtype=torch.bfloat16)
    dequantize_kernel[(1,)](out, packed.codes, packed.scales, WIDE=False, MODE="interpreter", STEPS=2)
    assert torch.equal(out.float(), dequantized(weight)[0])
    assert out.float().abs().max() == 6 * 2.0**-127


def test_packed_weights_take_no_more_bytes_than_the_checkpoint():
    weight = make_weight(1, 128, 2880, torch.Generator().manual_seed(0), (120, 124))
    packed = pack(weight, interleaved=True)
    assert packed.codes.nbytes == weight.codes.nbytes
    assert packed.scales.nbytes == weight.scales.nbytes


@pytest.mark.parametrize(("pairs", "experts", "tokens"), [(4, 32, 16), (256, 32, 16), (4096, 32, 128), (4096, 128, 64), (65536, 128, 128)])
def test_tiles_grow_with_the_pairs_of_an_expert(pairs, experts, tokens):
    config = choose(CONFIGS, pairs, experts)
    assert config.up_to >= pairs / experts
    assert [c.tokens for c in CONFIGS] == sorted(c.tokens for c in CONFIGS)


CPU = Device(arch="cpu", name="cpu", torch="cpu", memory_bytes=2**34)
GPU = Device(arch="sm90", name="gpu", torch="cuda:0", memory_bytes=2**34)


@pytest.mark.parametrize(
    ("case_", "device", "reason"),
    [
        (case("tiny", 8), CPU, None),
        (case("gpt-oss-20b", 8), CPU, "too many for Triton's interpreter"),
        (case("tiny", 65), CPU, "give at most 64"),
        (case("gpt-oss-20b", 16384), GPU, None),
        (case("tiny", 8), replace(GPU, arch="sm75"), "this is sm75"),
        (case("gpt-oss-120b", 8, top_k=9), GPU, "give at most 8"),
    ],
)
def test_what_cannot_run_is_said_in_a_sentence(case_, device, reason):
    said = TritonMxfp4Bf16().unsupported(case_, device)
    assert (said is None) if reason is None else (reason in said)


def test_kernels_compiled_for_a_gpu_refuse_a_layer_on_the_cpu():
    code = (
        "import triton, torch\n"
        "from moebench.case import case\n"
        "from moebench.problem import make_layer\n"
        "from moebench.kernels.triton_mxfp4_bf16 import BACKENDS\n"
        "BACKENDS[0].prepare(make_layer(case('tiny', 1), 'cpu'), 1)\n"
    )
    assert "start a new process" in fresh_process(code).stderr


def test_a_process_without_triton_gets_the_interpreter_by_itself():
    code = (
        "from moebench.case import case\n"
        "from moebench.problem import make_layer, make_tokens\n"
        "from moebench.kernels.triton_mxfp4_bf16 import BACKENDS\n"
        "c = case('tiny', 1)\n"
        "experts = BACKENDS[0].prepare(make_layer(c, 'cpu'), 1)\n"
        "print(tuple(experts(make_tokens(c, 'cpu')).shape), experts.facts)\n"
    )
    done = fresh_process(code)
    assert done.stdout == "(1, 320) {'tiles': 'shipped'}\n", done.stderr


def fresh_process(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False)
