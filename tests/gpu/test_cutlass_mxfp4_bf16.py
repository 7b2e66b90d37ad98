"""FlashInfer's sm90 path at real sizes: right with biases, the same bits each time, slices that add up, and tuned when it says so."""

import json
import re
from dataclasses import replace

import pytest
import torch

from moebench.case import case
from moebench.check import compare
from moebench.device import detect
from moebench.kernels.cutlass_mxfp4_bf16 import CutlassMxfp4Bf16
from moebench.kernels.flashinfer_details import layout, tuning, versions
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from tests.flashinfer_standin import interleave

pytestmark = pytest.mark.gpu
UNTUNED = CutlassMxfp4Bf16(tuned=False)
BATCHES = (1, 64, 1024)


@pytest.fixture(autouse=True)
def device():
    device = detect()
    if reason := UNTUNED.unsupported(case("gpt-oss-20b", 1), device):
        pytest.skip(reason)
    return device


@pytest.fixture(scope="module")
def whole():
    """One gpt-oss-20b layer and its reference outputs, which all slices are compared with."""
    layer = make_layer(case("gpt-oss-20b", 1), "cuda")
    answers = {}
    for num_tokens in BATCHES:
        tokens = make_tokens(case("gpt-oss-20b", num_tokens), "cuda")
        answers[num_tokens] = (tokens, reference(layer, tokens, "bf16"))
    return layer, answers


@pytest.mark.parametrize("pad", [128, 512])
def test_a_gpt_oss_20b_layer_is_right_with_biases(whole, pad):
    layer, answers = whole
    call = CutlassMxfp4Bf16(tuned=False, pad=pad).prepare(layer, max(BATCHES))
    for tokens, want in answers.values():
        error = compare(call(tokens), want, "bf16")
        assert error.ok, error
        assert error.rel_l2 <= 0.005


@pytest.mark.parametrize(("axis", "size"), [("ep", 1), ("ep", 2), ("ep", 4), ("ep", 8), ("tp", 2), ("tp", 4)])
def test_slices_are_right_and_add_up_to_the_whole(whole, axis, size):
    _, answers = whole
    sums = {num_tokens: torch.zeros_like(want) for num_tokens, (_, want) in answers.items()}
    for rank in range(size):
        point = case("gpt-oss-20b", 1, **{f"{axis}_size": size, f"{axis}_rank": rank})
        layer = make_layer(point, "cuda")
        call = UNTUNED.prepare(layer, max(BATCHES))
        for num_tokens, (tokens, _) in answers.items():
            out = call(tokens)
            assert compare(out, reference(layer, tokens, "bf16"), "bf16").rel_l2 <= 0.005, (rank, num_tokens)
            sums[num_tokens] += out.float()
    for num_tokens, (_, want) in answers.items():
        assert compare(sums[num_tokens], want, "bf16").rel_l2 <= 0.005, num_tokens


def test_300_launches_give_the_same_bits_at_three_token_counts(whole):
    layer, answers = whole
    call = UNTUNED.prepare(layer, max(BATCHES))
    different = {}
    for num_tokens, (tokens, _) in answers.items():
        first = call(tokens).clone()
        changed = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(299):
            changed += (call(tokens).contiguous().view(torch.int16) != first.contiguous().view(torch.int16)).any()
        different[num_tokens] = int(changed)
    assert different == dict.fromkeys(BATCHES, 0)


def test_a_captured_graph_gives_the_bits_of_the_eager_call_for_new_tokens(whole):
    layer, answers = whole
    call = UNTUNED.prepare(layer, max(BATCHES))
    tokens, _ = answers[64]
    fixed = replace(tokens, hidden_states=torch.zeros_like(tokens.hidden_states))
    call(fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(fixed)
    fixed.hidden_states.copy_(tokens.hidden_states)
    graph.replay()
    assert torch.equal(out, call(tokens))


def test_the_helpers_do_to_bytes_what_the_stand_in_and_our_layouts_say():
    layer = make_layer(case("tiny", 1, hidden_size=256, intermediate_size=256), "cuda")
    vendor = versions.load()
    assert torch.equal(vendor.interleave_weights(layer.w2.codes, "fp4").cpu(), interleave(layer.w2.codes.cpu()))
    assert torch.equal(vendor.interleave_scales(layer.w2.scales, 32), layout.fold_sm90_scales(layer.w2.scales))


def test_the_tuned_backend_is_right_faster_to_prepare_the_second_time_and_says_what_it_chose(whole, monkeypatch, tmp_path):
    layer, answers = whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cold = CutlassMxfp4Bf16().prepare(layer, 64)
    warm = CutlassMxfp4Bf16().prepare(layer, 64)
    assert (cold.facts["tuning_cache"], warm.facts["tuning_cache"]) == ("miss", "hit")
    assert warm.facts["tuning_s"] < 0.1 < cold.facts["tuning_s"]
    assert cold.facts["tactics"] == warm.facts["tactics"]
    chosen = json.loads((tuning.cache_dir() / cold.facts["tuning_file"]).read_text())["tactics"]
    assert list(chosen) == ["1", "2", "4", "8", "16", "32", "64"]
    assert max(first for first, _ in chosen.values()) < min(second for _, second in chosen.values())
    for num_tokens in (1, 64):
        tokens, want = answers[num_tokens]
        assert compare(warm(tokens), want, "bf16").rel_l2 <= 0.005


def test_the_kernels_that_ran_match_the_declared_pattern(whole):
    layer, answers = whole
    call = UNTUNED.prepare(layer, max(BATCHES))
    tokens, _ = answers[64]
    call(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(tokens)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    matching = [name for name in names if re.search(CutlassMxfp4Bf16.kernel_pattern, name)]
    assert matching, names


def test_a_layer_of_gpt_oss_120b_is_right_on_one_expert_parallel_rank():
    point = case("gpt-oss-120b", 256, ep_size=8, ep_rank=5)
    layer, tokens = make_layer(point, "cuda"), make_tokens(point, "cuda")
    error = compare(UNTUNED.prepare(layer, 256)(tokens), reference(layer, tokens, "bf16"), "bf16")
    assert error.rel_l2 <= 0.005
