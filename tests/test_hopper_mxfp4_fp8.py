"""The Hopper kernel with FP8 activations without a GPU: its rounding, what it refuses, and its own source run on this CPU."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moebench.case import MODELS, case
from moebench.check import compare
from moebench.device import Device
from moebench.kernels.hopper_mxfp4_bf16_details import launch, prefill
from moebench.kernels.hopper_mxfp4_bf16_details.shape import h_scale
from moebench.kernels.hopper_mxfp4_bf16_details.weights import pack_layer
from moebench.kernels.hopper_mxfp4_fp8 import HopperMxfp4Fp8
from moebench.mx import Mxfp4, dequantize_mxfp4, round_fp8_pow2
from moebench.problem import Swiglu, make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from moebench.reference.torch_experts import h_factor, swiglu
from moebench.registry import builtin
from tests.hopper_on_cpu import MISSING, PrefillOnCpu

BACKEND = HopperMxfp4Fp8()
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=1 << 37, num_sms=132)
FORMAT = BACKEND.act_dtype
EXACT_SUMS = 0.003  # of relative L2 where sums are in float32: two roundings to bf16 make 0.0024
runs_on_cpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)


# --- the format


def test_a_row_is_brought_to_448_at_most_by_a_power_of_two_and_rounded_to_e4m3():
    x = torch.tensor([[448.0, 17.0, -0.0098, 0.0], [450.0, 17.0, 19.0, -30.0], [1.75, 1.05, 0.3, -1.75], [0.0, -0.0, 0.0, 0.0]])
    assert round_fp8_pow2(x).tolist() == [
        [448.0, 16.0, -0.009765625, 0.0],  # 17 lies between 16 and 18 and goes to the even one
        [448.0, 16.0, 20.0, -30.0],  # halved: 225 becomes 224
        [1.75, 1.0, 0.3125, -1.75],  # times 256: 268.8 becomes 256 of 256 and 288
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_a_given_power_of_two_serves_all_rows_and_what_exceeds_it_saturates():
    x = torch.tensor([[56.0, 1.05], [57.0, -100.0]])
    assert round_fp8_pow2(x, 8.0).tolist() == [[56.0, 1.0], [56.0, -56.0]]


def test_the_smallest_rows_keep_a_factor_that_is_a_normal_number():
    tiny = torch.full((1, 4), 2.0**-133)  # the least that bf16 has
    assert round_fp8_pow2(tiny).tolist() == tiny.tolist()  # times 2^126 it is 2^-7, a subnormal of E4M3
    assert not round_fp8_pow2(tiny / 16).any()


def test_a_power_of_two_in_front_changes_no_digit():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for power in (-3, 1, 40):
        assert torch.equal(round_fp8_pow2(x * 2.0**power), round_fp8_pow2(x) * 2.0**power)


@pytest.mark.parametrize(
    "constants",
    [
        *(Swiglu(alpha=model.alpha, beta=model.beta, limit=model.limit) for model in MODELS.values()),
        Swiglu(alpha=0.01, beta=1.0, limit=7.0),
        Swiglu(alpha=1.0, limit=20.0),
        Swiglu(alpha=0.5, beta=-3.0, limit=0.25),
        Swiglu(alpha=-1.0, limit=7.0),
        Swiglu(limit=0.0),
    ],
    ids=str,
)
def test_kernel_and_reference_have_the_same_power_for_h_and_no_h_exceeds_it(constants):
    found = h_factor(constants)
    assert found == h_scale(constants.alpha, constants.beta, constants.limit)
    if found is None:
        return
    g = torch.linspace(-200, constants.limit, 100_001)
    gate = g * (constants.alpha * g).sigmoid()
    largest = float(gate.abs().max()) * (constants.limit + abs(constants.beta))
    assert 200 < largest * found <= 448


# --- the tolerance


def in_14_bits(x, w):
    """float64 [n, rows]: x @ w.T as Hopper's FP8 tensor cores add: 32 products and the sum so far, aligned to the largest of them, all cut
    off 13 bits below its leading one. For the exact pair on gpt-oss's sizes it predicts a relative L2 of 0.0023; 0.0020 was measured."""
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for first in range(0, x.shape[1], 32):
        products = x[:, None, first : first + 32].double() * w[None, :, first : first + 32].double()
        largest = torch.maximum(products.abs().amax(-1), total.abs())
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 14)
        total = ((products / unit[..., None]).trunc().sum(-1) + (total / unit).trunc()) * unit
    return total


def kernel(layer, tokens, times):
    """What prefill.cu computes, with another sum; h and slots rounded as there."""
    x, slots = round_fp8_pow2(tokens.hidden_states), torch.zeros(*tokens.topk_ids.shape, layer.hidden_size)
    for expert in range(layer.num_local_experts):
        token, slot = (tokens.topk_ids == expert).nonzero(as_tuple=True)
        w13, w2 = (dequantize_mxfp4(Mxfp4(w.codes[expert], w.scales[expert])) for w in (layer.w13, layer.w2))
        y = times(x[token], w13).float() + layer.b13[expert].float()
        z = times(round_fp8_pow2(swiglu(y, layer.swiglu), h_factor(layer.swiglu)), w2).float() + layer.b2[expert].float()
        slots[token, slot] = (z * tokens.topk_weights[token, slot, None]).bfloat16().float()
    return slots.sum(1).bfloat16()


def test_sums_in_14_bits_turn_few_values_of_h_and_leave_a_right_kernel_far_within_tolerance():
    point = case("tiny", 64)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    want = reference(layer, batch, FORMAT)
    exact, cut = (compare(kernel(layer, batch, times), want, FORMAT) for times in (lambda x, w: x.double() @ w.double().T, in_14_bits))
    assert 0.002 < exact.rel_l2 < cut.rel_l2 < 0.005
    assert cut.worst < 0.1
    without = compare(reference(layer, batch, "bf16").bfloat16(), want, FORMAT)
    assert without.rel_l2 > cut.rel_l2_tolerance > 4 * cut.rel_l2


# --- what is refused, and how it is called


@pytest.fixture
def _installed(monkeypatch):
    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", lambda module: module)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("point", "device", "words"),
    [
        (case("gpt-oss-20b", 1), replace(H200, arch="sm100"), "only sm90 has; this is sm100"),
        (case("gpt-oss-20b", 1), replace(H200, arch="cpu"), "this is cpu"),
        (case("tiny", 1, hidden_size=352), H200, "hidden_size=352 is not a multiple of 64"),
        (case("gpt-oss-20b", 1, top_k=9), H200, "top_k=9 is more than the 8 slots"),
        (case("deepseek-v3", 1), H200, "alpha=1, beta=0, limit=None does not bound h, so that no power of two"),
        (case("mixtral-8x7b", 1), H200, "use hopper_mxfp4_bf16, or a model with a limit, such as gpt-oss-20b"),
    ],
    ids=lambda value: value.label if hasattr(value, "label") else "",
)
def test_what_cannot_run_is_refused_with_a_sentence(point, device, words):
    assert words in BACKEND.unsupported(point, device)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("moebench.kernels.hopper_mxfp4_bf16_details.needs.find_spec", lambda module: None)
    assert "pip install 'moebench[hopper]'" in BACKEND.unsupported(case("gpt-oss-20b", 1), H200)


@pytest.mark.usefixtures("_installed")
def test_every_count_and_slice_of_gpt_oss_is_supported():
    for model in ("gpt-oss-20b", "gpt-oss-120b", "tiny"):
        for tokens in (0, 1, 64, 129, 16384):
            for fields in ({}, {"ep_size": 4}, {"tp_size": 2, "tp_rank": 1}):
                assert BACKEND.unsupported(case(model, tokens, **fields), H200) is None


@pytest.mark.parametrize("constants", [Swiglu(), Swiglu(alpha=1.702, beta=1.0), Swiglu(alpha=-1.0, limit=7.0)], ids=str)
def test_a_layer_that_bounds_no_h_is_refused_before_anything_is_packed(constants, monkeypatch):
    monkeypatch.setattr(launch, "pack_layer", lambda layer: pytest.fail("packed"))
    layer = replace(make_layer(case("tiny", 1), "cpu"), swiglu=constants)
    with pytest.raises(ValueError, match=rf"limit={constants.limit} does not bound h.*use hopper_mxfp4_bf16"):
        BACKEND.prepare(layer, 8)


def test_the_backend_is_found_without_torch_or_cuda():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'cuda')))\n"
    code = blocked + "from moebench.registry import builtin; print('hopper_mxfp4_fp8' in [backend.name for backend in builtin()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_no_other_backend_has_its_activation_format():
    assert [backend.name for backend in builtin() if backend.act_dtype == "fp8_pow2"] == ["hopper_mxfp4_fp8"]


def test_its_pattern_is_the_kernel_that_it_launches_and_no_other():
    assert re.search(BACKEND.kernel_pattern, prefill.KERNEL.decode())
    assert not re.search(BACKEND.kernel_pattern, launch.KERNEL.decode())


@pytest.mark.parametrize("most", [1, 40, 3000])
def test_one_kernel_source_serves_every_count_with_columns_that_are_ready(most):
    prepared = launch.prepare_format(make_layer(case("tiny", 1), "cpu"), most, prefill.E4M3)
    assert (prepared.variants, prepared.workspace) == ((), None)
    (many,) = prepared.many
    assert (many.max_tokens, many.format) == (most, prefill.E4M3)
    ready = {variant.columns for variant in many.variants}
    for tokens in range(1, most + 1, 1 + most // 100):
        for top_k in range(1, 9):
            assert many.format.columns_for(tokens * top_k / 8) in ready


def test_no_tokens_need_no_launch():
    prepared = launch.prepare_format(make_layer(case("tiny", 0), "cpu"), 0, prefill.E4M3)
    out = launch.run(launch.Loaded(prepared=prepared, kernels=(), facts={}), make_tokens(case("tiny", 0), "cpu"))
    assert (out.shape, out.dtype) == ((0, 320), torch.bfloat16)


# --- the kernel's own source, on this CPU


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8_on_cpu")


def on_cpu(libraries, layer, tokens, columns=64, **options):
    return PrefillOnCpu(pack_layer(layer), prefill.E4M3, columns, tokens.num_tokens, libraries).run(tokens, **options)


def assert_right(libraries, layer, tokens, **options):
    out = on_cpu(libraries, layer, tokens, **options)
    error = compare(out, reference(layer, tokens, FORMAT), FORMAT)
    assert error.ok, error
    assert error.rel_l2 <= EXACT_SUMS
    return out


@runs_on_cpu
@pytest.mark.parametrize("tokens", [1, 33, 150])
def test_a_layer_is_what_the_reference_of_its_format_says_and_of_no_other(libraries, tokens):
    point = case("tiny", tokens)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    out = assert_right(libraries, layer, batch)
    for other in ("bf16", "fp8"):
        assert compare(out, reference(layer, batch, other), FORMAT).rel_l2 > 4 * EXACT_SUMS


@runs_on_cpu
def test_duplicates_count_twice_foreign_ids_are_skipped_and_unserved_tokens_are_zero(libraries):
    point = case("tiny", 30, ep_size=2, ep_rank=1)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    batch.topk_ids[0] = 5
    batch.topk_ids[1] = torch.tensor([-1, 0, 1 << 30, 8], dtype=torch.int32)
    assert not assert_right(libraries, layer, batch)[1].any()
    nobody = replace(batch, topk_ids=torch.full_like(batch.topk_ids, -3))
    assert not on_cpu(libraries, layer, nobody).any()


@runs_on_cpu
def test_slices_add_up_to_the_whole(libraries):
    whole = case("tiny", 20)
    batch = make_tokens(whole, "cpu")
    total = torch.zeros(20, 320)
    for rank in range(4):
        total += assert_right(libraries, make_layer(case("tiny", 20, ep_size=4, ep_rank=rank), "cpu"), batch).float()
    assert compare(total.bfloat16(), reference(make_layer(whole, "cpu"), batch, FORMAT), FORMAT).rel_l2 <= 0.004


@runs_on_cpu
def test_rows_of_very_different_sizes_have_each_their_own_power(libraries):
    point = case("tiny", 12)
    layer, batch = replace(make_layer(point, "cpu"), b13=None, b2=None), make_tokens(point, "cpu")
    batch.hidden_states[:4] *= 2.0**-20
    batch.hidden_states[4:8] *= 2.0**20  # gates and ups at their limits: h is 56, which its power takes to 448
    batch.hidden_states[8] = 0
    out = on_cpu(libraries, layer, batch)
    want = reference(layer, batch, FORMAT)
    assert not out[8].any()
    for rows in (slice(0, 4), slice(4, 8), slice(9, 12)):
        # h below 2^-9 falls into E4M3's subnormals, as the reference says too
        assert compare(out[rows], want[rows], FORMAT).rel_l2 <= EXACT_SUMS, rows


@runs_on_cpu
def test_a_nan_stays_in_its_token(libraries):
    point = case("tiny", 6)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    batch.hidden_states[2, 17] = torch.nan
    out = on_cpu(libraries, layer, batch)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


@runs_on_cpu
def test_bits_do_not_depend_on_speeds_or_on_the_number_of_blocks(libraries):
    """Stages of 320 columns as gpt-oss has them; warps at random speeds and late copies."""
    point = case("tiny", 40, hidden_size=640, intermediate_size=320, num_experts=4)
    layer, batch = make_layer(point, "cpu"), make_tokens(point, "cpu")
    first = assert_right(libraries, layer, batch)
    for seed in (1, 2):
        assert torch.equal(on_cpu(libraries, layer, batch, blocks=1 + seed, seed=seed), first), seed


@runs_on_cpu
def test_scales_outside_of_a_rows_window_are_added(libraries):
    point = case("tiny", 20, hidden_size=640, intermediate_size=320)
    layer = make_layer(point, "cpu")
    layer.w13.scales[:, ::3, 0] = 133
    layer.w13.scales[:, ::3, 1:] -= 6
    layer.w2.scales[:, 1::5, 2] = 100
    batch = make_tokens(point, "cpu")
    batch.hidden_states[:, :32] /= 1024
    assert pack_layer(layer).num_outliers > 100
    assert_right(libraries, layer, batch, columns=32)
