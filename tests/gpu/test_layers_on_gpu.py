"""What only a GPU can show: the same bytes there, and backends that are right at real sizes."""

import pytest
import torch

from moebench.backend import Backend
from moebench.case import case
from moebench.check import compare
from moebench.device import detect
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from moebench.registry import builtin

pytestmark = pytest.mark.gpu
BACKENDS = [backend for backend in builtin() if backend.name not in ("torch", "numpy")]


def prepared(backend: Backend, point, layer):
    if reason := backend.unsupported(point, detect()):
        pytest.skip(reason)
    return backend.prepare(layer, point.num_tokens)


@pytest.mark.parametrize("ep", [1, 4])
def test_a_layer_has_the_same_bytes_on_both_devices(ep):
    point = case("tiny", 8, ep_size=ep, ep_rank=ep - 1)
    on_cpu, on_gpu = make_layer(point, "cpu"), make_layer(point, "cuda")
    for name in ("w13", "w2"):
        assert torch.equal(getattr(on_cpu, name).codes, getattr(on_gpu, name).codes.cpu())
        assert torch.equal(getattr(on_cpu, name).scales, getattr(on_gpu, name).scales.cpu())
    assert torch.equal(on_cpu.b13, on_gpu.b13.cpu())
    assert torch.equal(make_tokens(point, "cpu").hidden_states, make_tokens(point, "cuda").hidden_states.cpu())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("tokens", [0, 1, 3, 33, 129, 2881])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2", "hotspot:0.5@2"])
def test_odd_token_counts_and_skewed_routing_are_right(backend, tokens, routing):
    point = case("gpt-oss-20b", tokens, routing=routing)
    layer = make_layer(point, "cuda")
    batch = make_tokens(point, "cuda")
    error = compare(prepared(backend, point, layer)(batch), reference(layer, batch, backend.act_dtype), backend.act_dtype)
    assert error.ok, error


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(("axis", "size"), [("ep", 1), ("ep", 2), ("ep", 4), ("ep", 8), ("tp", 2), ("tp", 4)])
@pytest.mark.parametrize("tokens", [4, 257])
def test_the_ranks_slices_add_up_to_the_whole(backend, axis, size, tokens):
    whole = case("gpt-oss-20b", tokens)
    batch = make_tokens(whole, "cuda")
    total = torch.zeros(tokens, whole.hidden_size, device="cuda")
    for rank in range(size):
        point = case("gpt-oss-20b", tokens, **{f"{axis}_size": size, f"{axis}_rank": rank})
        total += prepared(backend, point, layer := make_layer(point, "cuda"))(batch).float()
        del layer
    want = reference(make_layer(whole, "cuda"), batch, backend.act_dtype)
    error = compare(total.bfloat16(), want, backend.act_dtype)
    assert error.ok, error


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_other_top_k_are_right(backend, top_k):
    point = case("gpt-oss-20b", 65, top_k=top_k)
    layer, batch = make_layer(point, "cuda"), make_tokens(point, "cuda")
    error = compare(prepared(backend, point, layer)(batch), reference(layer, batch, backend.act_dtype), backend.act_dtype)
    assert error.ok, error
