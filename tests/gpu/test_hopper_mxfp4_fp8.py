"""The Hopper kernel with FP8 activations on a GPU: right by the reference of its format, the same bits each time, capturable."""

import re
from dataclasses import replace

import pytest
import torch

from moebench.case import case
from moebench.check import compare
from moebench.device import detect
from moebench.kernels.hopper_mxfp4_bf16_details import launch
from moebench.kernels.hopper_mxfp4_fp8 import HopperMxfp4Fp8
from moebench.problem import Layer, Swiglu, Tokens, make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference

pytestmark = pytest.mark.gpu
BACKEND = HopperMxfp4Fp8()
FORMAT = BACKEND.act_dtype
MAX_TOKENS = 3000
COUNTS = (1, 2, 3, 8, 33, 64, 65, 129, 320, 1025, 2881)
# Sums in the tensor cores' 14 bits move some values of h by a step of E4M3. Emulated on a CPU: 0.0042 over 8192 pairs of gpt-oss, 0.0054 of
# a quarter of its columns, 0.007 of 64 columns, up to 0.015 in one pair. Where there are few only the format's tolerance holds.
MANY_PAIRS, REL_L2, REL_L2_WHOLE = 128, 0.01, 0.006


@pytest.fixture(autouse=True, scope="module")
def _supported():
    if reason := BACKEND.unsupported(case("gpt-oss-20b", 1), detect()):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def whole():
    layer = make_layer(case("gpt-oss-20b", 1), "cuda")
    return layer, BACKEND.prepare(layer, MAX_TOKENS)


def batch(num_tokens, model="gpt-oss-20b", **fields):
    return make_tokens(case(model, num_tokens, **fields), "cuda")


def assert_right(call: launch.Loaded, layer: Layer, tokens: Tokens, at_most: float = REL_L2) -> torch.Tensor:
    for size in (2**12, 2**16, 2**20, 2**24):  # NaN in the memory that the output comes from
        torch.full((size,), torch.nan, device="cuda")
    out = call(tokens)
    torch.cuda.synchronize()
    error = compare(out, reference(layer, tokens, FORMAT), FORMAT)
    assert error.ok, (tokens.num_tokens, error)
    local = tokens.topk_ids - layer.local_expert_start
    pairs = int(((local >= 0) & (local < layer.num_local_experts)).sum())
    assert pairs < MANY_PAIRS or error.rel_l2 <= at_most, (tokens.num_tokens, error)
    (many,) = call.prepared.many
    assert not many.workspace.counters.any(), "the launch left its counters changed: the next one would wait for ever or not at all"
    return out


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_a_gpt_oss_20b_layer_is_right(whole, num_tokens):
    layer, call = whole
    assert_right(call, layer, batch(num_tokens), REL_L2_WHOLE)


@pytest.mark.parametrize("num_tokens", [33, 1025])
def test_its_distance_from_bf16_activations_is_what_its_format_costs(whole, num_tokens):
    layer, call = whole
    tokens = batch(num_tokens)
    assert 0.022 < compare(call(tokens), reference(layer, tokens, "bf16"), FORMAT).rel_l2 < 0.032


@pytest.mark.parametrize("routing", ["zipf:1.2", "hotspot:0.5@2"])
def test_skewed_routing_is_right(whole, routing):
    layer, call = whole
    for num_tokens in (8, 128, 2881):
        assert_right(call, layer, batch(num_tokens, routing=routing))


def test_no_tokens_give_an_empty_output(whole):
    _, call = whole
    assert call(batch(0)).shape == (0, 2880)


def test_a_gpt_oss_120b_layer_is_right():
    layer = make_layer(case("gpt-oss-120b", 1), "cuda")
    call = BACKEND.prepare(layer, 1025)
    for num_tokens in (1, 33, 129, 1025):
        assert_right(call, layer, batch(num_tokens, "gpt-oss-120b"))


@pytest.mark.parametrize(("axis", "size"), [("ep", 4), ("ep", 8), ("tp", 2), ("tp", 4)])
def test_slices_are_right_and_add_up_to_the_whole(whole, axis, size):
    layer, _ = whole
    batches = {num_tokens: batch(num_tokens) for num_tokens in (1, 33, 129)}
    sums = {num_tokens: torch.zeros(num_tokens, 2880, device="cuda") for num_tokens in batches}
    for rank in range(size):
        part = make_layer(case("gpt-oss-20b", 1, **{f"{axis}_size": size, f"{axis}_rank": rank}), "cuda")
        call = BACKEND.prepare(part, 129)
        for num_tokens, tokens in batches.items():
            sums[num_tokens] += assert_right(call, part, tokens).float()
    for num_tokens, tokens in batches.items():
        error = compare(sums[num_tokens].bfloat16(), reference(layer, tokens, FORMAT), FORMAT)
        assert error.ok, (num_tokens, error)


def test_duplicates_count_twice_foreign_ids_are_skipped_and_unserved_tokens_are_zero(whole):
    layer, call = whole
    tokens = batch(40)
    tokens.topk_ids[0] = 3
    tokens.topk_ids[1] = torch.tensor([7, 7, -1, 32], dtype=torch.int32)
    tokens.topk_ids[2] = torch.tensor([-1, 1 << 30, 32, 99], dtype=torch.int32)
    assert not assert_right(call, layer, tokens)[2].any()
    nobody = replace(tokens, topk_ids=torch.full_like(tokens.topk_ids, -5))
    assert not call(nobody).any()
    assert_right(call, layer, replace(tokens, topk_ids=torch.full_like(tokens.topk_ids, 31)))


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
def test_other_top_k_are_right(whole, top_k):
    layer, call = whole
    for num_tokens in (3, 129):
        assert_right(call, layer, batch(num_tokens, top_k=top_k))


@pytest.mark.parametrize(
    "fields", [{}, {"hidden_size": 64, "intermediate_size": 64}, {"hidden_size": 448, "intermediate_size": 96}], ids=str
)
def test_other_sizes_are_right(fields):
    layer = make_layer(case("tiny", 1, **fields), "cuda")
    call = BACKEND.prepare(layer, 129)
    for num_tokens in (33, 129):
        assert_right(call, layer, batch(num_tokens, "tiny", **fields))


def test_other_limits_and_a_layer_without_biases_are_right(whole):
    layer, _ = whole
    changed = replace(layer, swiglu=Swiglu(alpha=0.5, beta=-0.25, limit=2.0), b13=None, b2=None)
    call = BACKEND.prepare(changed, 129)
    assert call.facts["h_scale"] == 64.0  # |h| is at most 2 * 2.25
    for num_tokens in (33, 129):
        assert_right(call, changed, batch(num_tokens))


def test_a_layer_without_a_limit_is_refused_before_anything_is_packed(whole):
    layer, _ = whole
    before = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match="limit=None does not bound h"):
        BACKEND.prepare(replace(layer, swiglu=Swiglu()), 8)
    assert torch.cuda.memory_allocated() == before


def test_scales_outside_of_a_rows_window_are_added():
    point = case("tiny", 1, hidden_size=640, intermediate_size=320)
    layer = replace(make_layer(point, "cuda"), b13=None, b2=None)
    layer.w13.scales[:, ::3, 0] = 133
    layer.w13.scales[:, ::3, 1:] -= 6
    layer.w2.scales[:, 1::5, 2] = 100
    call = BACKEND.prepare(layer, 64)
    assert call.facts["outlier_blocks"] > 100
    tokens = make_tokens(replace(point, num_tokens=40), "cuda")
    tokens.hidden_states[:, :32] /= 1024  # so that small blocks add as much as large ones
    assert_right(call, layer, tokens)


@pytest.mark.parametrize("num_tokens", [1, 33, 129, 2881])
def test_300_launches_give_the_same_bits(whole, num_tokens):
    _, call = whole
    tokens = batch(num_tokens)
    first = call(tokens)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(299):
        differing += (call(tokens).view(torch.int16) != first.view(torch.int16)).any()
    assert int(differing) == 0


def test_calls_of_all_sizes_in_turn_leave_no_trace_in_the_workspace(whole):
    _, call = whole
    batches = [batch(num_tokens) for num_tokens in (2881, 1, 64, 8, 1025, 33)]
    first = [call(tokens) for tokens in batches]
    for _ in range(5):
        for tokens, out in zip(batches, first, strict=True):
            assert torch.equal(call(tokens), out), tokens.num_tokens


def test_a_captured_graph_gives_the_bits_of_the_eager_call_for_new_tokens(whole):
    _, call = whole
    tokens = batch(129)
    fixed = replace(tokens, hidden_states=torch.zeros_like(tokens.hidden_states), topk_ids=torch.zeros_like(tokens.topk_ids))
    call(fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(fixed)
    for seed in (0, 1):
        new = batch(129, seed=seed)
        fixed.hidden_states.copy_(new.hidden_states)
        fixed.topk_ids.copy_(new.topk_ids)
        fixed.topk_weights.copy_(new.topk_weights)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call(new)), seed


def test_the_kernel_that_ran_is_the_only_one_and_matches_the_declared_pattern(whole):
    _, call = whole
    tokens = batch(64)
    call(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(tokens)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in names if re.search(BACKEND.kernel_pattern, name)] == names != []
