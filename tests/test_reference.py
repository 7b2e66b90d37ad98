"""Two references that share no formula agree; ranks add up; what belongs to other ranks is left out."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from moebench.backend import ACT_DTYPES
from moebench.case import case
from moebench.check import compare
from moebench.device import Device
from moebench.problem import Swiglu, make_layer, make_tokens
from moebench.reference import numpy_experts, torch_experts

CPU = Device(arch="cpu", name="a CPU", torch="cpu", memory_bytes=2**34)
GPU = Device(arch="sm90", name="a GPU", torch="cuda:0", memory_bytes=2**37)
MOE_MODELS_IN_SMALL = [
    case("tiny", 40),
    case("deepseek-v3", 5, hidden_size=256, intermediate_size=128, num_experts=16),
    case("gpt-oss-20b", 3, hidden_size=288, intermediate_size=96),
    case("mixtral-8x7b", 6, hidden_size=64, intermediate_size=224),
]


def both(point, act_dtype, **layer_changes):
    layer, tokens = replace(make_layer(point, "cpu"), **layer_changes), make_tokens(point, "cpu")
    return torch_experts.experts(layer, tokens, act_dtype), numpy_experts.experts(layer, tokens, act_dtype)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("point", MOE_MODELS_IN_SMALL, ids=lambda point: point.model)
def test_both_references_agree_to_float32(point):
    in_torch, in_numpy = both(point, None)
    assert in_torch.dtype == torch.float32
    assert in_numpy.dtype == np.float64
    assert relative(in_torch, in_numpy) < 1e-6


@pytest.mark.parametrize("act_dtype", ACT_DTYPES)
@pytest.mark.parametrize("point", MOE_MODELS_IN_SMALL, ids=lambda point: point.model)
def test_both_references_agree_with_rounding(point, act_dtype):
    """Measured: 5e-8 to 5e-6. A value of h on the edge between two bf16 numbers may fall on either side: 3e-5 allows for some,
    mxfp8 more, because such a value may also move its block's scale; fp8 most: its steps are as coarse, its scale not a power of two;
    fp8_pow2 as much, since h comes from float32 and not from bf16, so that any value may be on an edge."""
    limit = {"bf16": 3e-5, "fp8": 2e-3, "fp8_pow2": 2e-3}.get(act_dtype, 3e-4)
    assert relative(*both(point, act_dtype)) < limit


@pytest.mark.parametrize("constants", [Swiglu(), Swiglu(alpha=0.5, limit=1.0), Swiglu(beta=-1.0), Swiglu(alpha=-3.0, beta=2.0, limit=0.0)])
def test_both_references_agree_for_any_activation_constants(constants):
    assert relative(*both(case("tiny", 9), None, swiglu=constants)) < 2e-6


def test_each_rounding_moves_the_result_by_what_its_format_costs():
    results = {act_dtype: both(case("tiny", 64), act_dtype)[1] for act_dtype in (None, *ACT_DTYPES)}
    exact = results[None]
    assert 5e-4 < relative(results["bf16"], exact) < 2e-3
    assert 0.015 < relative(results["mxfp8"], exact) < 0.035
    assert relative(results["mxfp8"], exact) < relative(results["mxfp8_ocp"], exact) < 0.06
    assert 0.02 < relative(results["fp8_pow2"], exact) < 0.03


@pytest.mark.parametrize("act_dtype", [None, "bf16"])
def test_a_hand_computed_expert(act_dtype):
    """One token, one expert, one column at a time, in plain Python."""
    point = case("tiny", 1, num_experts=1, top_k=1, hidden_size=32, intermediate_size=32)
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

    def element(w, n, k):
        nibble = int(w.codes[0, n, k // 2]) >> 4 * (k % 2) & 15
        return table[nibble % 8] * (-1 if nibble > 7 else 1) * 2.0 ** (int(w.scales[0, n, 0]) - 127)

    x = tokens.hidden_states[0].double().tolist()
    y = [sum(element(layer.w13, n, k) * x[k] for k in range(32)) + float(layer.b13[0, n]) for n in range(64)]
    h = []
    for gate, up in zip(y[0::2], y[1::2], strict=True):
        g, u = min(gate, 7.0), max(min(up, 7.0), -7.0)
        value = g / (1 + np.exp(-1.702 * g)) * (u + 1)
        h.append(float(torch.tensor(value).bfloat16()) if act_dtype else value)
    z = [sum(element(layer.w2, n, k) * h[k] for k in range(32)) + float(layer.b2[0, n]) for n in range(32)]
    for result in both(point, act_dtype):
        assert np.allclose(np.asarray(result)[0], z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["ep", "tp"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_sum_to_the_whole(axis, size):
    if (axis, size) in {("ep", 3), ("tp", 4), ("tp", 8)}:  # do not divide tiny's 8 experts and 6 blocks
        size = 6 if axis == "tp" else 1
    for experts in (torch_experts.experts, numpy_experts.experts):
        whole = np.asarray(experts(make_layer(case("tiny", 17), "cpu"), make_tokens(case("tiny", 17), "cpu"), None))
        points = [case("tiny", 17, **{f"{axis}_size": size, f"{axis}_rank": rank}) for rank in range(size)]
        parts = [np.asarray(experts(make_layer(point, "cpu"), make_tokens(point, "cpu"), None), np.float64) for point in points]
        assert relative(sum(parts), whole) < 1e-6
        if size > 1:
            assert all(relative(part, whole) > 0.1 for part in parts)


@pytest.mark.parametrize("experts", [torch_experts.experts, numpy_experts.experts])
def test_ids_of_no_expert_are_ignored(experts):
    point = case("tiny", 6)
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    ids = tokens.topk_ids.clone()
    ids[0] = -1
    ids[1, 2:] = 8
    out = np.asarray(experts(layer, replace(tokens, topk_ids=ids), "bf16"))
    without = tokens.topk_weights.clone()
    without[0] = 0
    without[1, 2:] = 0
    assert not out[0].any()
    assert np.allclose(out, np.asarray(experts(layer, replace(tokens, topk_weights=without), "bf16")), atol=1e-6)


@pytest.mark.parametrize("experts", [torch_experts.experts, numpy_experts.experts])
@pytest.mark.parametrize("act_dtype", ACT_DTYPES)
def test_no_tokens_give_no_rows(experts, act_dtype):
    assert experts(make_layer(case("tiny", 0), "cpu"), make_tokens(case("tiny", 0), "cpu"), act_dtype).shape == (0, 320)


def test_the_process_keeps_its_settings():
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both(case("tiny", 2), "bf16")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [*torch_experts.BACKENDS, *numpy_experts.BACKENDS], ids=lambda backend: backend.name)
def test_each_reference_is_a_right_backend(backend):
    point = case("tiny", 30, ep_size=2, ep_rank=1)
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    out = backend.prepare(layer, 30)(tokens)
    assert out.dtype == torch.bfloat16
    error = compare(out, torch_experts.experts(layer, tokens, backend.act_dtype), backend.act_dtype)
    assert error.rel_l2 < 0.0025


@pytest.mark.parametrize("backend", [*torch_experts.BACKENDS, *numpy_experts.BACKENDS], ids=lambda backend: backend.name)
def test_a_reference_refuses_what_would_take_minutes_on_a_cpu(backend):
    for tokens in (0, 1, 4, 16):
        assert backend.unsupported(case("gpt-oss-20b", tokens), CPU) is None
    assert "more than 60 s; use fewer tokens" in backend.unsupported(case("gpt-oss-20b", 16384), CPU)
    assert "more than 60 s" in backend.unsupported(case("mixtral-8x7b", 4096), CPU)


def test_torch_takes_everything_on_a_gpu_and_numpy_stays_on_the_cpu():
    assert torch_experts.BACKENDS[0].unsupported(case("gpt-oss-120b", 16384), GPU) is None
    assert numpy_experts.BACKENDS[0].unsupported(case("gpt-oss-120b", 16384), GPU) is not None


def test_references_are_listed_where_torch_is_not_installed():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from moebench.reference import diagnosis, numpy_experts, torch_experts\n"
        "print([b.name for m in (torch_experts, numpy_experts) for b in m.BACKENDS])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch', 'numpy']"


@pytest.mark.parametrize("backend", [*torch_experts.BACKENDS, *numpy_experts.BACKENDS], ids=lambda backend: backend.name)
def test_a_missing_torch_is_a_sentence(backend, monkeypatch):
    module = sys.modules[type(backend).__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install torch" in backend.unsupported(case("tiny", 1), CPU)
