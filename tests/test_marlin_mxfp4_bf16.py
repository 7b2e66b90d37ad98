"""The Marlin adapter, without a GPU: a stand-in for vLLM's operators computes from the bytes it is given, found by Marlin's addresses."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moebench.case import case
from moebench.check import inspect
from moebench.device import Device
from moebench.kernels.marlin_mxfp4_bf16 import MarlinMxfp4Bf16
from moebench.kernels.marlin_mxfp4_bf16_details import forward, layout, library
from moebench.problem import Swiglu, make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference

H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=2**37)
TINY = case("tiny", 9)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


# ---- Marlin's order, from the fragments of mma.m16n8k16: a lane holds, of a 16 x 16 tile, 4 rows of 2 columns 8 apart


def tile_order():
    """[1024] flat places in a 16 x 64 strip, four tiles side by side, in the order in which they are packed."""
    order = []
    for lane in range(32):
        row = 2 * (lane % 4)
        places = [16 * r + lane // 4 + 8 * half for half in (0, 1) for r in (row, row + 1, row + 8, row + 9)]
        for tile in range(4):
            order += [place + 256 * tile for place in places]
    return [order[8 * word + nibble] for word in range(128) for nibble in (0, 2, 4, 6, 1, 3, 5, 7)]


ORDER = torch.tensor(tile_order())


def repack(words, k, n, bits, is_a_8bit):
    """gptq_marlin_repack: int32 [K/8, N], eight codes of a column a word -> int32 [K/16, 2 N]."""
    assert (bits, is_a_8bit) == (4, False)
    assert words.shape == (k // 8, n)
    assert words.is_contiguous()
    assert k % 16 == 0
    assert n % 64 == 0
    codes = (words.long()[:, None] >> 4 * torch.arange(8)[None, :, None] & 15).reshape(k, n)
    tiles = codes.reshape(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)[:, ORDER].reshape(k // 16, -1, 8)
    packed = (tiles << 4 * torch.arange(8)).sum(-1)
    return (packed - (packed >> 31 << 32)).int()


def codes_of(packed, k, n):
    """The inverse: codes [K, N]."""
    nibbles = (packed.long()[..., None] >> 4 * torch.arange(8) & 15).reshape(-1, 1024)
    tiles = torch.empty_like(nibbles)
    tiles[:, ORDER] = nibbles
    return tiles.reshape(k // 16, n // 16, 16, 16).permute(0, 2, 1, 3).reshape(k, n)


def scale_column(n):
    """Where the scale of column n is: of 64, those 8 apart lie together, and of each four the middle two are swapped."""
    within = n % 64
    place = within % 8 * 8 + within // 8
    return n // 64 * 64 + place // 4 * 4 + (place % 2 * 2 + place // 2 % 2)  # 0, 2, 1, 3


def bias_column(n):
    """Where the bias of column n is: of 32 columns, lane pair n % 8 // 2 holds two of each 8."""
    within = n % 32
    return n // 32 * 32 + within % 8 // 2 * 8 + within // 8 * 2 + within % 2


class Vllm:
    """The operators of vLLM 0.33.0; calls: (name, arguments)."""

    def __init__(self):
        self.calls, self.weights = [], {}

    def ops(self):
        names = ("swigluoai_and_mul", "silu_and_mul", "silu_and_mul_with_clamp", "align", "gemm", "moe_sum")
        return library.Ops(version="0.33.0", repack=repack, **{name: getattr(self, name) for name in names})

    def swigluoai_and_mul(self, out, y, alpha=1.702, limit=7.0):
        gate, up = y[:, 0::2].float().clamp(max=limit), y[:, 1::2].float().clamp(-limit, limit)
        out.copy_(gate * (alpha * gate).sigmoid() * (up + 1))

    def silu_and_mul(self, out, y):
        gate, up = y.float().chunk(2, -1)
        out.copy_(gate * gate.sigmoid() * up)

    def silu_and_mul_with_clamp(self, out, y, limit, alpha=1.0, beta=0.0):
        gate, up = y.float().chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out.copy_(gate * (alpha * gate).sigmoid() * (up + beta))

    def align(self, ids, num_experts, block, order, experts, count, expert_map=None):
        assert ids.dtype == torch.int32
        assert order.dtype == experts.dtype == count.dtype == torch.int32
        order.fill_(ids.numel())
        experts.fill_(12345)
        blocks = 0
        for expert in range(num_experts):
            local = expert if expert_map is None else int(expert_map[expert])
            pairs = (ids.flatten() == expert).nonzero().flatten()
            if local < 0:
                continue
            for start in range(0, len(pairs), block):
                part = pairs[start : start + block]
                order[blocks * block : blocks * block + len(part)] = part.int()
                experts[blocks] = local
                blocks += 1
        assert blocks <= len(experts)
        assert blocks * block <= len(order)
        count[0] = blocks * block

    def gemm(self, a, c, codes, bias, scales, a_scales, global_scale, zeros, locks, order, experts, count, weights, block, top_k, weigh,
             type_id, m, n, k, atomic, fp32_reduce, float_zeros, thread_k=-1, thread_n=-1, blocks_per_sm=-1):  # fmt: skip
        self.calls.append(("gemm", SimpleNamespace(block=block, top_k=top_k, weigh=weigh, m=m, n=n, k=k)))
        assert type_id == 562949953487106  # vllm.scalar_type.scalar_types.float4_e2m1f.id
        assert a_scales is global_scale is zeros is None
        assert (atomic, fp32_reduce, float_zeros, thread_k, thread_n, blocks_per_sm) == (False, True, False, -1, -1, -1)
        assert a.is_contiguous()
        assert c.is_contiguous()
        assert tuple(a.shape) == (m, k)
        assert tuple(c.shape) == (m * top_k, n)
        assert k % 128 == 0
        assert n % 128 == 0
        assert tuple(codes.shape[1:]) == (k // 16, 2 * n)
        assert codes.dtype == torch.int32
        assert tuple(scales.shape[1:]) == (k // 32, n)
        assert scales.dtype == torch.float8_e8m0fnu
        assert locks.dtype == torch.int32
        assert not locks.any()
        assert weights.dtype == torch.float32
        columns, used = torch.arange(n), int(count) // block
        for index in range(used):
            expert = int(experts[index])
            pairs = order[index * block : (index + 1) * block].long()
            pairs = pairs[pairs < m * top_k]
            key = (codes.data_ptr(), expert)
            if key not in self.weights:
                powers = 2.0 ** (scales[expert].view(torch.uint8)[:, scale_column(columns)].int() - 127)
                self.weights[key] = E2M1[codes_of(codes[expert], k, n)] * powers.repeat_interleave(32, 0)  # [K, N]
            out = a[pairs // top_k].float() @ self.weights[key]
            if bias is not None:
                assert bias.dtype == torch.bfloat16
                out = out + bias[expert][bias_column(columns)].float()
            if weigh:
                out = out * weights.flatten()[pairs, None]
            c[pairs] = out.bfloat16()
        return c

    def moe_sum(self, rows, out, ids=None, expert_map=None):
        assert rows.is_contiguous()
        assert out.is_contiguous()
        here = torch.ones_like(ids, dtype=torch.bool) if expert_map is None else expert_map[ids.long()] >= 0
        out.copy_(torch.where(here[..., None], rows.float(), 0).sum(1))


@pytest.fixture
def vllm(monkeypatch):
    torch.set_num_threads(1)  # matrices are small, and a second thread waits where other programs hold its core
    stand_in = Vllm()
    monkeypatch.setattr(library, "find", lambda: library.Found(directory=None, version="0.33.0"))
    monkeypatch.setattr(library, "load", lambda found: stand_in.ops())
    return stand_in


# ---- right results


@pytest.mark.parametrize(
    "point",
    [
        TINY,
        case("tiny", 1),
        case("tiny", 70),
        case("tiny", 9, top_k=1),
        case("tiny", 9, ep_size=4, ep_rank=3),
        case("tiny", 1, ep_size=8, ep_rank=5),
        case("tiny", 9, tp_size=2, tp_rank=1),
        case("tiny", 9, hidden_size=256, intermediate_size=256),
        case("mixtral-8x7b", 9, hidden_size=320, intermediate_size=96),
    ],
    ids=lambda point: point.label + f" {point.hidden_size}x{point.intermediate_size}",
)
def test_the_adapter_is_right_on_shards_slices_and_sizes_that_need_padding(vllm, point):
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    found = inspect(MarlinMxfp4Bf16().prepare(layer, point.num_tokens), layer, tokens, reference(layer, tokens, "bf16"), "bf16")
    assert (found.status, found.reason) == ("ok", "")


@pytest.mark.parametrize(
    "swiglu", [Swiglu(alpha=1.702, beta=1.0, limit=7.0), Swiglu(alpha=1.3, beta=0.5, limit=2.0), Swiglu(), Swiglu(beta=1.0)]
)
def test_every_swiglu_is_expressed_by_one_of_three_operators(vllm, swiglu):
    layer, tokens = replace(make_layer(TINY, "cpu"), swiglu=swiglu), make_tokens(TINY, "cpu")
    found = inspect(MarlinMxfp4Bf16().prepare(layer, 9), layer, tokens, reference(layer, tokens, "bf16"), "bf16")
    assert (found.status, found.reason) == ("ok", "")


def test_no_tokens_give_no_rows_and_too_many_are_refused(vllm):
    layer = make_layer(TINY, "cpu")
    call = MarlinMxfp4Bf16().prepare(layer, 4)
    assert call(make_tokens(case("tiny", 0), "cpu")).shape == (0, 320)
    with pytest.raises(ValueError, match="9 tokens are more than the 4"):
        call(make_tokens(TINY, "cpu"))
    assert call.facts == {"vllm": "0.33.0", "padded_hidden": 512, "padded_intermediate": 256}


@pytest.mark.parametrize("mistake", ["scales", "bias", "codes"])
def test_a_wrong_layout_gives_wrong_numbers(vllm, monkeypatch, mistake):
    if mistake == "scales":
        monkeypatch.setattr(layout, "permute_scales", lambda s: s.T.contiguous().view(torch.float8_e8m0fnu))
    elif mistake == "bias":
        monkeypatch.setattr(layout, "permute_bias", lambda b: b.contiguous())
    else:
        monkeypatch.setattr(layout, "_scale_order", lambda: [i + 8 * j for i in range(8) for j in range(8)])
    layer, tokens = make_layer(TINY, "cpu"), make_tokens(TINY, "cpu")
    assert inspect(MarlinMxfp4Bf16().prepare(layer, 9), layer, tokens, reference(layer, tokens, "bf16"), "bf16").status == "wrong"


# ---- layouts, against known answers


def test_scales_go_where_marlin_looks():
    n, k = 128, 256
    scales = torch.arange(n * (k // 32)).remainder(251).to(torch.uint8).reshape(n, k // 32)
    moved = layout.permute_scales(scales)
    assert moved.dtype == torch.float8_e8m0fnu
    for row, group in ((0, 0), (1, 0), (8, 3), (17, 2), (63, 7), (64, 1), (127, 7)):
        assert moved.view(torch.uint8)[group, scale_column(row)] == scales[row, group]
    # vLLM 0.33.0's own functions, printed once: scale_perm, then [0, 2, 1, 3] of each four
    columns = torch.arange(64, dtype=torch.uint8)[:, None]
    assert layout.permute_scales(columns).view(torch.uint8).flatten()[:16].tolist() == [
        0,
        16,
        8,
        24,
        32,
        48,
        40,
        56,
        1,
        17,
        9,
        25,
        33,
        49,
        41,
        57,
    ]


def test_scale_bytes_only_move():
    """vLLM goes through bf16; it holds 2^-127 as a subnormal, and 255 is NaN there and back."""
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(64, 4)
    assert sorted(layout.permute_scales(scales).view(torch.uint8).flatten().tolist()) == list(range(256))
    through = scales[:-1].view(torch.float8_e8m0fnu).to(torch.bfloat16).to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(through, scales[:-1])


def test_biases_go_where_marlin_looks():
    bias = torch.arange(64.0).bfloat16()
    moved = layout.permute_bias(bias)
    assert all(moved[bias_column(j)] == bias[j] for j in range(64))
    assert moved[:16].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]


def test_the_stand_ins_repack_can_be_undone_and_starts_as_marlins_does():
    codes = torch.randint(0, 16, (64, 128))
    words = (codes.reshape(8, 8, 128) << 4 * torch.arange(8)[:, None]).sum(1)
    packed = repack((words - (words >> 31 << 32)).int(), 64, 128, 4, False)
    assert torch.equal(codes_of(packed, 64, 128), codes)
    assert ORDER[:8].tolist() == [0, 128, 8, 136, 16, 144, 24, 152]  # rows 0, 8 of columns 0 and 8, then rows 1, 9: lane 0's


@pytest.mark.parametrize(
    ("tokens", "ep", "block"), [(1, 1, 8), (64, 1, 16), (128, 1, 32), (300, 1, 48), (1024, 1, 64), (1024, 4, 64), (57, 1, 8), (58, 1, 16)]
)
def test_blocks_are_as_many_rows_as_an_expert_gets(tokens, ep, block):
    layer = make_layer(case("tiny", 1, num_experts=32, hidden_size=32, intermediate_size=32, ep_size=ep), "cpu")
    assert forward.block_size(tokens, 4, layer) == block


# ---- reasons


def fake_vllm(monkeypatch, directory, files=library.FILES, torch_version="2.11.0+cu130"):
    directory.mkdir()
    for name in files:
        (directory / name).touch()
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None, is_package=True)
    module.__spec__.submodule_search_locations.append(str(directory))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(library, "_version", lambda name: {"vllm": "0.33.0", "torch": torch_version}[name])


def test_absences_are_sentences(monkeypatch, tmp_path):
    backend = MarlinMxfp4Bf16()
    assert "sm80" in backend.unsupported(TINY, replace(H200, arch="cpu"))
    assert "this is sm75" in backend.unsupported(TINY, replace(H200, arch="sm75"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert backend.unsupported(TINY, H200) == f"vllm is not installed; {library.HINT}"
    fake_vllm(monkeypatch, tmp_path / "a", files=library.FILES[:1])
    assert "has no _moe_C_stable_libtorch.abi3.so" in backend.unsupported(TINY, H200)
    fake_vllm(monkeypatch, tmp_path / "b", torch_version="2.10.1")
    assert "torch 2.10.1 is installed and vLLM's libraries need 2.11" in backend.unsupported(TINY, H200)
    fake_vllm(monkeypatch, tmp_path / "c")
    assert backend.unsupported(TINY, H200) is None
    assert backend.unsupported(case("deepseek-v3", 4), replace(H200, arch="sm100")) is None


def test_an_operator_declared_otherwise_is_refused():
    found = library.Found(directory=None, version="0.99")
    with pytest.raises(RuntimeError, match=r"0\.99 has no operator _moebench::absent"):
        library._check("_moebench::absent", ("a",), found)
    with pytest.raises(RuntimeError, match=r"declares aten::relu\(self\), not \(other\)"):
        library._check("aten::relu", ("other",), found)
    library._check("aten::relu", ("self",), found)
