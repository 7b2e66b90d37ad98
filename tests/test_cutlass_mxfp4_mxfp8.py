"""The adapter for Blackwell, without one: known addresses, and a stand-in that computes from the bytes it is given."""

import re
from dataclasses import replace

import pytest
import torch

from moebench.case import case
from moebench.check import compare, inspect
from moebench.device import Device
from moebench.kernels.cutlass_mxfp4_bf16 import CutlassMxfp4Bf16
from moebench.kernels.cutlass_mxfp4_mxfp8 import ARCHITECTURES, BACKENDS, CutlassMxfp4Mxfp8
from moebench.kernels.flashinfer_details import layout, versions
from moebench.mx import quantize_mxfp8
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from tests import flashinfer_standin
from tests.flashinfer_standin import OutOfBounds, Refused, StandIn

UNTUNED = CutlassMxfp4Mxfp8(tuned=False)
TINY = case("tiny", 9)
PLAIN = case("mixtral-8x7b", 9, hidden_size=320, intermediate_size=192)


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: two threads on two busy cores take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return StandIn("sm100").install(monkeypatch, tmp_path / "flashinfer")


def on(arch):
    return Device(arch=arch, name="", torch="cuda:0", memory_bytes=2**37)


def built(backend, point):
    """The call without the self-test, which refuses most mutants before they can compute anything."""
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    return backend.build(versions.load(), layer, point.num_tokens), layer, tokens


def error_of(call, layer, tokens):
    return compare(call(tokens), reference(layer, tokens, "mxfp8"), "mxfp8")


# ---- right results


@pytest.mark.parametrize(
    "point",
    [
        TINY,
        PLAIN,
        case("tiny", 1),
        case("tiny", 130),  # more than one tile of 128 rows of activation scales
        case("tiny", 9, top_k=1),
        case("tiny", 9, top_k=8),
        case("tiny", 9, ep_size=4, ep_rank=3),
        case("tiny", 9, tp_size=2, tp_rank=1),
        case("tiny", 9, hidden_size=256, intermediate_size=256),
        case("tiny", 9, hidden_size=32, intermediate_size=32),
    ],
    ids=lambda point: point.label + f" {point.hidden_size}x{point.intermediate_size}",
)
def test_the_adapter_is_right_on_shards_slices_and_sizes_that_need_padding(library, point):
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    call = UNTUNED.prepare(layer, point.num_tokens)
    found = inspect(call, layer, tokens, reference(layer, tokens, "mxfp8"), "mxfp8")
    assert (found.status, found.reason) == ("ok", "")
    assert found.error.rel_l2 <= 0.02


@pytest.mark.parametrize(("axis", "size"), [("ep", 2), ("ep", 8), ("tp", 2), ("tp", 3)])
def test_ranks_sum_to_the_whole_and_add_each_bias_once(library, axis, size):
    tokens = make_tokens(TINY, "cpu")
    whole = reference(make_layer(TINY, "cpu"), tokens, "mxfp8")
    summed = torch.zeros_like(whole)
    for rank in range(size):
        point = replace(TINY, **{f"{axis}_size": size, f"{axis}_rank": rank})
        summed += UNTUNED.prepare(make_layer(point, "cpu"), 9)(tokens).float()
    assert compare(summed, whole, "mxfp8").rel_l2 <= 0.02


def test_the_activations_are_rounded_as_the_reference_of_mxfp8_says(library):
    """Against bf16 activations the same output is off by what MXFP8 costs: the stand-in's agreement is no accident of a wide bound."""
    call, layer, tokens = built(UNTUNED, TINY)
    assert error_of(call, layer, tokens).rel_l2 < 0.008
    assert compare(call(tokens), reference(layer, tokens, "bf16"), "mxfp8").rel_l2 > 0.02


def test_every_argument_is_what_the_contract_says(library):
    call, _, tokens = built(UNTUNED, case("tiny", 9, ep_size=2, ep_rank=1))
    call(tokens)
    given = library.calls[-1]
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in given.items() if isinstance(value, torch.Tensor)}
    h, i, local = 384, 256, 4
    assert kinds.pop("workspace_buffer")[0] == torch.uint8
    assert kinds == {
        "input": (torch.float8_e4m3fn, (9, h)),
        "input_sf": (torch.uint8, (128 * h // 32,)),
        "token_selected_experts": (torch.int32, (9, 4)),
        "token_final_scales": (torch.float32, (9, 4)),
        "fc1_expert_weights": (torch.int64, (local, 2 * i, h // 16)),
        "fc2_expert_weights": (torch.int64, (local, h, i // 16)),
        "fc1_expert_biases": (torch.bfloat16, (local, 2 * i)),
        "fc2_expert_biases": (torch.bfloat16, (local, h)),
        "swiglu_alpha": (torch.float32, (local,)),
        "swiglu_beta": (torch.float32, (local,)),
        "swiglu_limit": (torch.float32, (local,)),
        "output": (torch.bfloat16, (9, h)),
    }
    assert [(s.dtype, tuple(s.shape)) for s in given["quant_scales"]] == [
        (torch.int32, (local, 2 * i, h // 128)),
        (torch.float32, (local,)),
        (torch.int32, (local, h, i // 128)),
        (torch.float32, (local,)),
    ]
    assert given["use_mxfp8_act_scaling"]
    assert given["swizzled_input_sf"]
    assert not given["use_w4_group_scaling"]


def test_quantizing_is_inside_the_call_with_the_swizzle_and_the_block_named(library, monkeypatch):
    asked = []

    def quantize(x, **options):
        asked.append((tuple(x.shape), x.dtype, options))
        return right(x, **options)

    right = library.mxfp8_quantize
    layer, tokens = make_layer(TINY, "cpu"), make_tokens(TINY, "cpu")
    call = UNTUNED.build(replace(versions.load(), mxfp8_quantize=quantize), layer, 9)
    assert asked == []
    call(tokens)
    call(tokens)
    assert asked == [((9, 384), torch.bfloat16, {"is_sf_swizzled_layout": True, "alignment": 32})] * 2


def test_weights_are_the_same_bytes_under_another_type(library):
    layer = make_layer(case("tiny", 1, hidden_size=256, intermediate_size=256), "cpu")
    weights = UNTUNED.convert(layer)
    assert torch.equal(weights.w2.view(torch.uint8), layer.w2.codes)
    assert torch.equal(weights.w13.view(torch.uint8)[:, 256:], layer.w13.codes[:, 0::2])
    assert torch.equal(weights.w13.view(torch.uint8)[:, :256], layer.w13.codes[:, 1::2])


# ---- wrong adapters


def swapped_halves(monkeypatch):
    def gate_first(pairs, rows):
        up, gate = right(pairs, rows).chunk(2, 1)
        return torch.cat((gate, up), 1)

    right = layout.halves
    monkeypatch.setattr(layout, "halves", gate_first)
    return UNTUNED


def halves_of_weights_and_biases_only(monkeypatch):
    """What comes of swapping the scales' halves after the swizzle, or not at all."""
    right = layout.halves
    plain = lambda pairs, rows: layout.zero_padded(pairs, 2 * rows, *pairs.shape[2:])  # noqa: E731
    monkeypatch.setattr(layout, "halves", lambda pairs, rows: (right if pairs.ndim == 2 or pairs.shape[2] > 20 else plain)(pairs, rows))
    return UNTUNED


def weight_scales_not_swizzled(monkeypatch):
    monkeypatch.setattr(layout, "swizzle_128x4", lambda scales: scales.contiguous())
    return UNTUNED


def scale_row_shifted(monkeypatch):
    right = layout.swizzle_128x4
    monkeypatch.setattr(layout, "swizzle_128x4", lambda scales: right(scales.roll(1, 1)))
    return UNTUNED


def scales_of_the_other_nibble_order(monkeypatch):
    right = layout.swizzle_128x4
    monkeypatch.setattr(layout, "swizzle_128x4", lambda scales: right(scales.flip(-1)))
    return UNTUNED


class UnswizzledActivations(CutlassMxfp4Mxfp8):
    """vLLM had this at first, and has it still behind a data-parallel dispatch (vllm-project/vllm#49335). The bytes are as many as
    the swizzled ones here, so nothing but the numbers tells."""

    def quantize(self, vendor, x):
        codes, scales = vendor.mxfp8_quantize(x, is_sf_swizzled_layout=False, alignment=32)
        room = torch.zeros(layout.padded_size(len(x), 128) * x.shape[1] // 32, dtype=torch.uint8)
        room[: scales.numel()] = scales
        return codes, room


class SwapAfterSwizzle(CutlassMxfp4Mxfp8):
    """Swizzle the interleaved rows, then take halves of what comes out."""

    def convert(self, layer):
        right = super().convert(layer)
        h, i = right.hidden_size, right.intermediate_size
        rows = layout.zero_padded(layer.w13.scales, h // 32)
        swizzled = layout.swizzle_128x4(layout.zero_padded(rows, 2 * i, h // 32))
        return replace(right, quant_scales=(layout.halves(swizzled, i).view(torch.int32), *right.quant_scales[1:]))


class ScalesInAnotherOrder(CutlassMxfp4Mxfp8):
    def convert(self, layer):
        right = super().convert(layer)
        first, ones, second, more = right.quant_scales
        return replace(right, quant_scales=(second, ones, first, more))


@pytest.mark.parametrize(
    ("mutant", "at_least"),
    [
        (swapped_halves, 0.2),
        (halves_of_weights_and_biases_only, 0.2),
        (weight_scales_not_swizzled, 0.2),
        (scale_row_shifted, 0.2),
        (scales_of_the_other_nibble_order, 0.1),
        (lambda monkeypatch: UnswizzledActivations(tuned=False), 0.2),
        (lambda monkeypatch: SwapAfterSwizzle(tuned=False), 0.2),
    ],
    ids=[
        "swapped halves",
        "halves not of scales",
        "no swizzle",
        "row shifted",
        "groups reversed",
        "activation scales row-major",
        "swap after",
    ],
)
def test_a_mutant_that_the_vendor_accepts_computes_something_else(library, monkeypatch, mutant, at_least):
    wrong = mutant(monkeypatch)
    error = error_of(*built(wrong, TINY))
    assert error.rel_l2 >= at_least
    assert not error.ok
    with pytest.raises(RuntimeError, match=r"FlashInfer 0\.7\.2\.post1 changed the weight or scale layout .* relative error"):
        wrong.prepare(make_layer(TINY, "cpu"), 9)


def converted(**change):
    class Mutant(CutlassMxfp4Mxfp8):
        def convert(self, layer):
            weights = super().convert(layer)
            return replace(weights, **{name: function(weights, layer) for name, function in change.items()})

    return Mutant(tuned=False)


@pytest.mark.parametrize(
    ("mutant", "refusal"),
    [
        (converted(w13=lambda w, _: w.w13.view(torch.uint8), w2=lambda w, _: w.w2.view(torch.uint8)), "Could not construct fused moe op"),
        (converted(alpha=lambda w, layer: torch.ones(layer.num_experts)), r"swiglu_alpha must have 4 element\(s\)"),
        (converted(quant_scales=lambda w, layer: tuple(s.repeat(2) if s.ndim == 1 else s for s in w.quant_scales)), "global size must be"),
        (converted(b13=lambda w, _: w.b13.float(), b2=lambda w, _: w.b2.float()), "biases have the output's"),
        (converted(quant_scales=lambda w, _: tuple(s.view(torch.uint8) for s in w.quant_scales)), "Inconsistency of Tensor type"),
        (converted(quant_scales=lambda w, _: w.quant_scales[::2]), "Expecting 4 quant scales"),
        (ScalesInAnotherOrder(tuned=False), "weight block size must be"),
    ],
    ids=["uint8 weights", "global-size alpha", "global-size ones", "fp32 biases", "uint8 scales", "two scales", "another order"],
)
def test_a_mutant_that_breaks_the_contract_is_refused_by_the_vendors_own_checks(library, mutant, refusal):
    with pytest.raises(Refused, match=refusal):
        error_of(*built(mutant, case("tiny", 9, ep_size=2)))


def test_sizes_left_unpadded_are_refused(library, monkeypatch):
    monkeypatch.setattr(layout, "padded_size", lambda size, multiple: size)
    point = case("gpt-oss-20b", 1, num_experts=1, top_k=1, intermediate_size=128)  # H = 2880, 90 groups: no whole words
    with pytest.raises((RuntimeError, ValueError)):
        built(UNTUNED, point)


def test_hidden_states_left_unpadded_are_seen_by_their_scales(library):
    call, _, tokens = built(UNTUNED, TINY)
    with pytest.raises(OutOfBounds):  # the binding compares no width
        replace(call, padded=None)(tokens)


def test_row_major_activation_scales_are_refused_for_their_size(library):
    """mxfp8_quantize gives ceil(M / 128) * 128 rows of swizzled scales and M of row-major ones."""

    class RowMajor(CutlassMxfp4Mxfp8):
        def quantize(self, vendor, x):
            right = vendor.mxfp8_quantize
            plain = replace(vendor, mxfp8_quantize=lambda x, is_sf_swizzled_layout, alignment: right(x, False, alignment))
            return super().quantize(plain, x)

    call, _, tokens = built(RowMajor(tuned=False), TINY)
    with pytest.raises(RuntimeError, match=r"input_sf is .* \(108,\), but the kernel reads contiguous torch.uint8 \(1536,\)"):
        call(tokens)


# ---- layouts


@pytest.mark.parametrize(("n", "groups"), [(128, 4), (256, 12), (384, 8), (130, 5), (1, 1)])
def test_swizzled_scales_are_at_the_documented_addresses(n, groups):
    scales = torch.randint(1, 256, (2, n, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    swizzled = layout.swizzle_128x4(scales)
    rows, columns = -(-n // 128) * 128, -(-groups // 4) * 4
    assert swizzled.shape == (2, rows, columns)
    assert swizzled.is_contiguous()
    seen = torch.zeros(2, rows * columns, dtype=torch.bool)
    for e, m, g in ((e, m, g) for e in range(2) for m in range(n) for g in range(groups)):
        place = (m // 128) * (columns // 4 * 512) + (g // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + g % 4
        assert swizzled[e].flatten()[place] == scales[e, m, g]
        seen[e, place] = True
    assert seen.sum() == 2 * n * groups
    assert swizzled.flatten(1)[~seen].eq(0).all()
    assert torch.equal(layout.unswizzle_128x4(swizzled)[:, :n, :groups], scales)


def test_some_addresses_by_hand():
    scales = torch.arange(256 * 8).remainder(251).to(torch.uint8).reshape(1, 256, 8)
    flat = layout.swizzle_128x4(scales).flatten().tolist()
    for (m, g), place in {
        (0, 0): 0,
        (0, 3): 3,
        (32, 0): 4,
        (1, 0): 16,
        (0, 4): 512,
        (127, 7): 1023,
        (128, 0): 1024,
        (160, 5): 1541,
    }.items():
        assert flat[place] == scales[0, m, g]


def test_the_stand_ins_quantizer_is_the_projects():
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 6, 40)[:, None]
    x[3, :32], x[4, :32], x[5, 0] = 0, 448 * 2.0**5, 1e38
    codes, scales = flashinfer_standin.quantized(x)
    ours = quantize_mxfp8(x, "round_up")
    assert torch.equal(scales, ours.scales)
    assert torch.equal(codes.view(torch.uint8), ours.codes.view(torch.uint8))


# ---- where it runs


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_hopper_is_told_what_does_not_exist_there_and_what_does(backend):
    told = backend.unsupported(TINY, on("sm90"))
    assert "MXFP4 x MXFP8 does not exist on Hopper" in told
    assert "cutlass_mxfp4_bf16" in told


@pytest.mark.parametrize(("arch", "word"), [("sm110", "#3134"), ("sm80", "sm100"), ("cpu", "this is cpu")])
def test_other_devices_are_told_why(arch, word):
    assert word in UNTUNED.unsupported(TINY, on(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blackwell_is_supported_with_a_verified_library_only(library, monkeypatch, tmp_path, arch):
    assert UNTUNED.unsupported(TINY, on(arch)) is None
    library.install(monkeypatch, tmp_path / "old", version="0.6.17")
    assert "illegal instruction" in UNTUNED.unsupported(TINY, on(arch))


def test_the_two_backends_do_not_run_on_each_others_chips(library, monkeypatch, tmp_path):
    with pytest.raises(Refused, match="No valid tactics"):
        CutlassMxfp4Bf16(tuned=False).prepare(make_layer(TINY, "cpu"), 9)
    StandIn("sm90").install(monkeypatch, tmp_path / "hopper")
    with pytest.raises(Refused, match="Could not construct fused moe op"):
        UNTUNED.prepare(make_layer(TINY, "cpu"), 9)


# ---- tuning, and what the registry sees


def test_tuning_goes_up_to_the_largest_token_count_in_prepare_only(library):
    call = CutlassMxfp4Mxfp8().prepare(make_layer(TINY, "cpu"), 20)
    assert sorted({bucket for _, bucket in library.tuned}) == [1, 2, 4, 8, 16, 20]
    assert (call.facts["tuned_tokens"], call.facts["tuning_cache"]) == (20, "miss")
    tuned = len(library.tuned)
    call(make_tokens(TINY, "cpu"))
    assert library.calls[-1]["profile_ids"] == [5, 45]
    assert len(library.tuned) == tuned
    assert error_of(call, make_layer(TINY, "cpu"), make_tokens(TINY, "cpu")).ok


def test_the_untuned_variant_tunes_nothing(library):
    call = UNTUNED.prepare(make_layer(TINY, "cpu"), 20)
    call(make_tokens(TINY, "cpu"))
    assert library.tuned == []
    assert library.calls[-1]["profile_ids"] == [-1, -1]


def test_the_tactics_of_the_two_formats_are_in_different_files(library, monkeypatch, tmp_path):
    layer = make_layer(TINY, "cpu")
    mxfp8 = CutlassMxfp4Mxfp8().prepare(layer, 1).facts["tuning_file"]
    StandIn("sm90").install(monkeypatch, tmp_path / "hopper")
    assert CutlassMxfp4Bf16().prepare(layer, 1).facts["tuning_file"] != mxfp8


def test_the_variants_have_stable_names():
    assert [backend.name for backend in BACKENDS] == ["cutlass_mxfp4_mxfp8", "cutlass_mxfp4_mxfp8@untuned"]
    assert {backend.act_dtype for backend in BACKENDS} == {"mxfp8"}


@pytest.mark.parametrize(
    ("kernel", "ours"),
    [
        (
            "GemmUniversal<MainloopSm100ArrayTmaUmmaWarpSpecializedBlockScaled<...>, tuple<float_e2m1_t, float_ue8m0_t>, float_e4m3_t>",
            True,
        ),
        (
            "GemmUniversal<MainloopSm120ArrayTmaWarpSpecializedBlockScaled<...>, tuple<float_e4m3_t, float_ue8m0_t>, float_e2m1_t>",
            True,
        ),
        (
            "GemmUniversal<MainloopSm100ArrayTmaUmmaWarpSpecializedBlockScaled<...>, tuple<float_e2m1_t, float_ue4m3_t>, float_e2m1_t>",
            False,
        ),
        ("GemmUniversal<MainloopSm100ArrayTmaUmmaWarpSpecialized<...>, bfloat16_t, bfloat16_t>", False),
        ("GemmUniversal<MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInput<...>, float_e2m1_t, float_ue8m0_t, F32BF16BF16_RS>", False),
    ],
)
def test_the_kernel_pattern_names_the_block_scaled_grouped_gemm_of_the_two_formats(kernel, ours):
    assert bool(re.search(CutlassMxfp4Mxfp8.kernel_pattern, kernel)) == ours
