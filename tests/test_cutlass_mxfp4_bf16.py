"""The sm90 adapter, without a GPU: a stand-in for FlashInfer refuses what FlashInfer refuses and computes from the bytes it is given."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moebench.backend import Backend
from moebench.case import case
from moebench.check import compare, inspect
from moebench.device import Device
from moebench.kernels.cutlass_mxfp4_bf16 import BACKENDS, CutlassMxfp4Bf16
from moebench.kernels.flashinfer_details import layout, tuning, versions
from moebench.kernels.flashinfer_details.self_test import self_test
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from tests import flashinfer_standin
from tests.flashinfer_standin import GEMM1_TACTICS, OutOfBounds, Refused, StandIn, deinterleave, interleave

ROOT = Path(__file__).parents[1]
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=2**37)
UNTUNED = CutlassMxfp4Bf16(tuned=False)
TINY = case("tiny", 9)  # H = 320 and I = 192 are 64 over a multiple of 128, as 2880 is
PLAIN = case("mixtral-8x7b", 9, hidden_size=320, intermediate_size=192)  # SwiGLU without constants, no biases


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
    return StandIn("sm90").install(monkeypatch, tmp_path / "flashinfer")


def error_of(call, layer, tokens):
    return compare(call(tokens), reference(layer, tokens, "bf16"), "bf16")


def built(backend, point, max_num_tokens=None):
    """The call without the self-test, which refuses most mutants before they can compute anything."""
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    return backend.build(versions.load(), layer, max_num_tokens or point.num_tokens), layer, tokens


# ---- right results


@pytest.mark.parametrize(
    "point",
    [
        TINY,
        PLAIN,
        case("tiny", 1),
        case("tiny", 130),
        case("tiny", 9, top_k=1),
        case("tiny", 9, top_k=8),
        case("tiny", 9, ep_size=4, ep_rank=3),
        case("tiny", 9, tp_size=2, tp_rank=0),
        case("tiny", 9, tp_size=2, tp_rank=1),
        case("tiny", 9, hidden_size=256, intermediate_size=256),
        case("tiny", 9, hidden_size=32, intermediate_size=32),
        case("deepseek-v3", 9, hidden_size=320, intermediate_size=96, num_experts=16, ep_size=2, ep_rank=1),
    ],
    ids=lambda point: point.label + f" {point.hidden_size}x{point.intermediate_size}",
)
@pytest.mark.parametrize("pad", [128, 512])
def test_the_adapter_is_right_on_shards_slices_and_sizes_that_need_padding(library, point, pad):
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    call = CutlassMxfp4Bf16(tuned=False, pad=pad).prepare(layer, point.num_tokens)
    found = inspect(call, layer, tokens, reference(layer, tokens, "bf16"), "bf16")
    assert (found.status, found.reason) == ("ok", "")
    assert found.error.rel_l2 <= 0.005


@pytest.mark.parametrize(("axis", "size"), [("ep", 2), ("ep", 8), ("tp", 2), ("tp", 3)])
def test_ranks_sum_to_the_whole_and_add_each_bias_once(library, axis, size):
    tokens = make_tokens(TINY, "cpu")
    whole = reference(make_layer(TINY, "cpu"), tokens, "bf16")
    summed = torch.zeros_like(whole)
    for rank in range(size):
        point = replace(TINY, **{f"{axis}_size": size, f"{axis}_rank": rank})
        summed += UNTUNED.prepare(make_layer(point, "cpu"), 9)(tokens).float()
        assert (library.calls[-1][f"{axis}_size"], library.calls[-1][f"{axis}_rank"]) == (size, rank)
    assert compare(summed, whole, "bf16").rel_l2 <= 0.005


def test_the_layers_second_bias_reaches_the_vendor_on_the_first_tensor_parallel_rank_only():
    """FlashInfer adds it where tp_rank is 0, our layers hold it there: twice or never would both be wrong."""
    held = [make_layer(case("tiny", 1, tp_size=2, tp_rank=rank), "cpu").b2.abs().max().item() for rank in (0, 1)]
    assert held[0] > 0
    assert held[1] == 0


def test_router_ids_with_strides_are_handed_over_contiguous(library):
    call, layer, tokens = built(UNTUNED, TINY)
    wide = torch.stack((tokens.topk_ids, torch.zeros_like(tokens.topk_ids)), -1)
    strided = replace(tokens, topk_ids=wide[..., 0], topk_weights=tokens.topk_weights.T.contiguous().T)
    assert not strided.topk_ids.is_contiguous()
    assert error_of(call, layer, strided).rel_l2 <= 0.005


def test_a_shorter_batch_after_a_longer_one_is_right_and_no_tokens_are_no_call(library):
    call, layer, _ = built(UNTUNED, case("tiny", 130))
    for num_tokens in (130, 3, 77):
        assert error_of(call, layer, make_tokens(case("tiny", num_tokens), "cpu")).rel_l2 <= 0.005
    before = len(library.calls)
    none = call(make_tokens(case("tiny", 0), "cpu"))
    assert (none.shape, none.dtype, len(library.calls)) == ((0, 320), torch.bfloat16, before)


def test_more_tokens_than_prepared_for_are_refused(library):
    call, _, _ = built(UNTUNED, case("tiny", 8))
    with pytest.raises(ValueError, match="9 tokens are more than the 8"):
        call(make_tokens(TINY, "cpu"))


def test_every_argument_is_what_the_contract_says(library):
    point = case("tiny", 9, ep_size=2, ep_rank=1)
    call, _, tokens = built(UNTUNED, point)
    call(tokens)
    given = library.calls[-1]
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in given.items() if isinstance(value, torch.Tensor)}
    h, i, local = 384, 256, 4
    assert kinds.pop("workspace_buffer")[0] == torch.uint8
    assert kinds == {
        "input": (torch.bfloat16, (9, h)),
        "token_selected_experts": (torch.int32, (9, 4)),
        "token_final_scales": (torch.float32, (9, 4)),
        "fc1_expert_weights": (torch.uint8, (local, 2 * i, h // 2)),
        "fc2_expert_weights": (torch.uint8, (local, h, i // 2)),
        "fc1_expert_biases": (torch.bfloat16, (local, 2 * i)),
        "fc2_expert_biases": (torch.bfloat16, (local, h)),
        "swiglu_alpha": (torch.float32, (local,)),
        "swiglu_beta": (torch.float32, (local,)),
        "swiglu_limit": (torch.float32, (local,)),
        "output": (torch.bfloat16, (9, h)),
    }
    assert [(s.dtype, tuple(s.shape)) for s in given["quant_scales"]] == [
        (torch.uint8, (local, 2 * i // 64, h // 128, 16, 16)),
        (torch.uint8, (local, h // 64, i // 128, 16, 16)),
    ]
    assert given["use_w4_group_scaling"]
    assert not given["use_mxfp8_act_scaling"]
    assert given["input_sf"] is None
    assert (given["swiglu_alpha"].unique().item(), given["swiglu_beta"].unique().item()) == (pytest.approx(1.702), 1.0)
    assert given["swiglu_limit"].unique().item() == 7.0
    assert given["token_selected_experts"].max() >= 4, "ids are global"


def test_a_layer_without_constants_and_biases_gets_the_plain_kernel(library):
    call, _, tokens = built(UNTUNED, PLAIN)
    call(tokens)
    absent = ("fc1_expert_biases", "fc2_expert_biases", "swiglu_alpha", "swiglu_beta", "swiglu_limit")
    assert [library.calls[-1][name] for name in absent] == [None] * 5


def test_the_call_allocates_its_output_and_nothing_else(library):
    call, _, tokens = built(UNTUNED, TINY)
    call(tokens)
    first = library.calls[-1]
    call(tokens)
    second = library.calls[-1]
    for name in ("input", "fc1_expert_weights", "fc2_expert_weights", "workspace_buffer"):
        assert first[name].data_ptr() == second[name].data_ptr()
    assert first["output"].data_ptr() != second["output"].data_ptr()


# ---- wrong adapters


def converted(**change):
    """A backend whose converted weights have gone through change: field name -> function of (weights, layer)."""

    class Mutant(CutlassMxfp4Bf16):
        def convert(self, vendor, layer):
            weights = super().convert(vendor, layer)
            return replace(weights, **{name: function(weights, layer) for name, function in change.items()})

    return Mutant(tuned=False)


def prepared_with(**change):
    """A backend that sees a library some of whose helpers are replaced: name -> function of (the right one)."""

    class Mutant(CutlassMxfp4Bf16):
        def convert(self, vendor, layer):
            return super().convert(replace(vendor, **{name: wrap(getattr(vendor, name)) for name, wrap in change.items()}), layer)

    return Mutant(tuned=False)


def swapped_halves(monkeypatch):
    def gate_first(pairs, rows):
        up, gate = right(pairs, rows).chunk(2, 1)
        return torch.cat((gate, up), 1)

    right = layout.halves
    monkeypatch.setattr(layout, "halves", gate_first)
    return UNTUNED


def pairs_left_interleaved(monkeypatch):
    monkeypatch.setattr(layout, "halves", lambda pairs, rows: layout.zero_padded(pairs, 2 * rows, *pairs.shape[2:]))
    return UNTUNED


def halves_of_weights_only(monkeypatch):
    right = layout.halves
    plain = lambda pairs, rows: layout.zero_padded(pairs, 2 * rows, *pairs.shape[2:])  # noqa: E731
    monkeypatch.setattr(layout, "halves", lambda pairs, rows: (right if pairs.ndim == 2 or pairs.shape[2] > 20 else plain)(pairs, rows))
    return UNTUNED


def weights_not_interleaved(monkeypatch):
    return prepared_with(interleave_weights=lambda right: lambda weight, kind: weight.contiguous())


def scales_not_folded(monkeypatch):
    def unfolded(scales, group_size):
        num_experts, n, groups = scales.shape
        return scales.reshape(num_experts, n // 64, groups // 4, 16, 16)

    return prepared_with(interleave_scales=lambda right: unfolded)


def scale_row_shifted(monkeypatch):
    return prepared_with(interleave_scales=lambda right: lambda scales, size: right(scales.roll(1, 1), size))


def one_scale_row_is_its_neighbours(monkeypatch):
    def shifted(scales, size):
        scales = scales.clone()
        scales[:, 5] = scales[:, 6] + 1  # rows of one expert share most of their bytes
        return right_(scales, size)

    right_ = versions.load().interleave_scales
    return prepared_with(interleave_scales=lambda right: shifted)


def router_weights_of_another_slot(monkeypatch):
    class Mutant(CutlassMxfp4Bf16):
        def build(self, vendor, layer, max_num_tokens):
            def fused_moe(*, token_final_scales, **rest):
                return vendor.fused_moe(token_final_scales=token_final_scales.roll(1, 1).contiguous(), **rest)

            return super().build(replace(vendor, fused_moe=fused_moe), layer, max_num_tokens)

    return Mutant(tuned=False)


@pytest.mark.parametrize(
    ("mutant", "at_least"),
    [
        (swapped_halves, 0.2),
        (pairs_left_interleaved, 0.5),
        (halves_of_weights_only, 0.2),
        (weights_not_interleaved, 0.5),
        (scales_not_folded, 0.2),
        (scale_row_shifted, 0.2),
        (one_scale_row_is_its_neighbours, 0.01),
        (router_weights_of_another_slot, 0.2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutant_that_the_vendor_accepts_computes_something_else(library, monkeypatch, mutant, at_least):
    wrong = mutant(monkeypatch)
    error = error_of(*built(wrong, TINY))
    assert error.rel_l2 >= at_least
    assert not error.ok
    with pytest.raises(RuntimeError, match=r"FlashInfer 0\.7\.2\.post1 changed the weight or scale layout .* relative error"):
        wrong.prepare(make_layer(TINY, "cpu"), 9)


@pytest.mark.parametrize(
    ("mutant", "refusal"),
    [
        (
            converted(w13=lambda w, _: w.w13.view(torch.int64), w2=lambda w, _: w.w2.view(torch.int64)),
            "Expecting 6 quant scales for nvfp4",
        ),
        (converted(alpha=lambda w, layer: torch.ones(layer.num_experts)), r"swiglu_alpha must have 4 element\(s\)"),
        (converted(b13=lambda w, _: w.b13.float(), b2=lambda w, _: w.b2.float()), "biases have the output's"),
        (converted(b2=lambda w, _: None), "both biases are looked at"),
        (converted(quant_scales=lambda w, _: w.quant_scales[:1]), "Expecting 2 quant scales"),
    ],
    ids=["int64 view", "global-size alpha vector", "fp32 biases", "one bias", "one scale tensor"],
)
def test_a_mutant_that_breaks_the_contract_is_refused_by_the_vendors_own_checks(library, mutant, refusal):
    call, _, tokens = built(mutant, case("tiny", 9, ep_size=2))
    with pytest.raises(Refused, match=refusal):
        call(tokens)


def test_sizes_left_unpadded_are_refused_when_scales_are_folded(library, monkeypatch):
    monkeypatch.setattr(layout, "padded_size", lambda size, multiple: size)
    point = case("gpt-oss-20b", 1, num_experts=1, top_k=1, intermediate_size=64)  # H = 2880
    with pytest.raises(ValueError, match=r"K/group_size=90 must be divisible by .* 4"):
        built(UNTUNED, point)


def test_hidden_states_left_unpadded_are_read_past_their_end(library):
    """The binding compares no width: 2880 columns given to a kernel of 2944 shift every row but the first."""
    call, _, tokens = built(UNTUNED, TINY)
    with pytest.raises(OutOfBounds):
        replace(call, padded=None)(tokens)


@pytest.mark.parametrize(
    "spoil", [lambda s: s.float(), lambda s: s.flatten(3), lambda s: s.transpose(3, 4)], ids=["type", "shape", "strides"]
)
def test_scales_that_the_vendor_would_not_look_at_are_checked_by_us(library, spoil):
    mutant = prepared_with(interleave_scales=lambda right: lambda scales, size: spoil(right(scales, size)))
    with pytest.raises(RuntimeError, match=r"quant_scales\[0\] is .* but the kernel reads contiguous torch.uint8 \(8, 8, 3, 16, 16\)"):
        built(mutant, TINY)


# ---- layouts


def test_folded_scales_are_at_the_documented_addresses():
    num_experts, n, k = 2, 192, 384
    groups = k // 32
    scales = torch.randint(0, 256, (num_experts, n, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    folded = layout.fold_sm90_scales(scales)
    assert folded.shape == (num_experts, n // 64, k // 128, 16, 16)
    assert folded.is_contiguous()
    for e, row, g in ((e, row, g) for e in range(num_experts) for row in range(n) for g in range(groups)):
        place = ((e * (n // 64) + row // 64) * (k // 128) + g // 4) * 256 + row % 16 * 16 + (row % 64) // 16 * 4 + g % 4
        assert folded.flatten()[place] == scales[e, row, g]
    assert torch.equal(layout.unfold_sm90_scales(folded), scales)


@pytest.mark.parametrize(("n", "k"), [(96, 128), (64, 96)])
def test_sizes_that_do_not_fold_are_refused(n, k):
    with pytest.raises(ValueError, match=f"{n} rows of {k // 32} scales do not fold"):
        layout.fold_sm90_scales(torch.zeros(1, n, k // 32, dtype=torch.uint8))


def test_halves_are_up_then_gate_each_padded_with_zeros():
    pairs = torch.tensor([[10, 20, 11, 21, 12, 22]])  # gate 10, 11, 12; up 20, 21, 22
    assert layout.halves(pairs, 4).tolist() == [[20, 21, 22, 0, 10, 11, 12, 0]]


def test_2880_is_padded_to_23_or_to_6_tiles():
    assert [layout.padded_size(2880, pad) for pad in (128, 512)] == [2944, 3072]
    assert 2944 == 23 * 128
    assert all(3072 % tile == 0 for tile in (64, 128, 256, 512))


def test_the_stand_ins_weight_interleave_is_the_vendors_word_by_word():
    """moe_gemm_mixed_utils.cu, one thread at a time: rows r and r + 8, bytes c and c + 4, then bits moved within the word."""
    n, k = 32, 128
    weight = torch.randint(0, 256, (1, n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    got = interleave(weight)[0]
    moves = {
        7: 31,
        4: 22,
        3: 15,
        0: 6,
        15: 28,
        12: 19,
        11: 12,
        8: 3,
        23: 25,
        20: 16,
        19: 9,
        16: 0,
        31: 30,
        28: 29,
        29: 26,
        27: 14,
        24: 13,
        25: 10,
    }
    lengths = {7: 1, 4: 3, 3: 1, 0: 3, 15: 1, 12: 3, 11: 1, 8: 3, 23: 1, 20: 3, 19: 1, 16: 3, 31: 1, 28: 1, 29: 2, 27: 1, 24: 1, 25: 2}
    for block in range(n // 2):
        for partition in range(k // 64):
            for lane in range(16):
                row, mma = block // 8 * 16 + block % 8, lane // 4
                column = partition * 32 + mma * 8 + lane % 4
                word = sum(
                    int(weight[0, r, c]) << 8 * place
                    for place, (r, c) in enumerate([(row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4)])
                )
                moved = sum((word >> source & (1 << lengths[source]) - 1) << target for source, target in moves.items())
                first = partition * 32 + lane // 8 * 16 + lane % 4 * 4
                assert got[row + mma % 2 * 8, first : first + 4].tolist() == list(moved.to_bytes(4, "little"))
    assert torch.equal(deinterleave(interleave(weight)), weight)


# ---- versions


@pytest.mark.parametrize(
    ("have", "why"),
    [
        ("0.6.4", "it reads weights as they are packed"),
        ("0.6.11.post2", "its sm90 scales are [E, K/128, 4 N], not folded"),
        ("0.6.16.post4", "its autotuner dies of an illegal instruction"),
        ("0.6.18", "its layouts were not verified"),
        ("0.7.3", "this one was not verified"),
        ("0.7.2.dev20261101", None),
        ("0.8.0rc1", "this one was not verified"),
        ("main", "this one was not verified"),
    ],
)
def test_a_version_that_was_not_verified_is_refused_with_the_reason(library, monkeypatch, tmp_path, have, why):
    library.install(monkeypatch, tmp_path / "other", version=have)
    told = UNTUNED.unsupported(TINY, H200)
    if why is None:  # between two that were read
        assert told is None
        return
    assert f"flashinfer-python {have} is installed, 0.6.18.post1 to 0.7.2.post1 is needed" in told
    assert why in told
    assert told.endswith("pip install flashinfer-python==0.7.2.post1")
    with pytest.raises(RuntimeError, match=re.escape(told)):
        UNTUNED.prepare(make_layer(TINY, "cpu"), 9)


@pytest.mark.parametrize("have", ["0.6.18.post1", "0.7.0", "0.7.1", "0.7.2.post1", "0.7.2.post1+cu130"])
def test_verified_versions_are_taken_with_and_without_package_metadata(library, monkeypatch, tmp_path, have):
    library.install(monkeypatch, tmp_path / "other", version=have)
    assert versions.installed() == have
    assert UNTUNED.unsupported(TINY, H200) is None
    monkeypatch.setattr(versions, "version", lambda name: "0.6.4")
    assert "0.6.4 is installed" in UNTUNED.unsupported(TINY, H200)


def test_absence_and_other_architectures_are_sentences_with_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert UNTUNED.unsupported(TINY, H200) == "flashinfer-python is not installed; pip install flashinfer-python==0.7.2.post1"
    told = UNTUNED.unsupported(TINY, replace(H200, arch="sm100"))
    assert "sm90" in told
    assert "cutlass_mxfp4_mxfp8" in told


def test_reasons_are_given_without_torch_and_without_importing_flashinfer(tmp_path):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('flashinfer was imported')")
    (package / "_build_meta.py").write_text('__version__ = "0.6.4"\n')
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton')))\n"
        "from moebench.case import case; from moebench.device import Device\n"
        "from moebench.kernels import cutlass_mxfp4_bf16, cutlass_mxfp4_mxfp8\n"
        "for module, arch in ((cutlass_mxfp4_bf16, 'sm90'), (cutlass_mxfp4_mxfp8, 'sm100')):\n"
        "    device = Device(arch=arch, name='', torch=None, memory_bytes=0)\n"
        "    for backend in module.BACKENDS: print(backend.name, backend.unsupported(case('tiny', 1), device))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "cutlass_mxfp4_bf16",
        "cutlass_mxfp4_bf16@untuned",
        "cutlass_mxfp4_bf16@pad3072",
        "cutlass_mxfp4_mxfp8",
        "cutlass_mxfp4_mxfp8@untuned",
    ]
    assert all("flashinfer-python 0.6.4 is installed" in line for line in lines)


def test_a_function_without_a_parameter_that_we_pass_is_refused_by_its_name(library, monkeypatch):
    right = library.cutlass_fused_moe
    monkeypatch.setattr(sys.modules["flashinfer.fused_moe"], "cutlass_fused_moe", lambda input, output=None: right(input))
    with pytest.raises(RuntimeError, match=r"flashinfer-python 0\.7\.2\.post1 takes no token_selected_experts, .*, workspace_buffer"):
        versions.load()


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs flashinfer-python")
def test_the_installed_flashinfer_has_all_that_is_needed_and_folds_scales_as_documented():
    assert versions.load().version == versions.installed()


def test_a_missing_helper_is_refused_with_the_versions_that_have_it(library, monkeypatch):
    monkeypatch.delattr(sys.modules["flashinfer.fused_moe"], "interleave_moe_weights_for_sm90_mixed_gemm")
    with pytest.raises(RuntimeError, match=r"cannot be used: cannot import name .*; 0\.6\.18\.post1 to 0\.7\.2\.post1 has all"):
        versions.load()


def test_a_scale_helper_of_another_generation_is_refused_before_anything_is_launched(library, monkeypatch):
    def transposed(scales, group_size=32):  # 0.6.10 to 0.6.15
        num_experts, n, groups = scales.shape
        return scales.reshape(num_experts, n, groups // 4, 4).permute(0, 2, 1, 3).reshape(num_experts, groups // 4, n * 4)

    monkeypatch.setattr(sys.modules["flashinfer.fused_moe"], "interleave_moe_scales_for_sm90_mixed_gemm", transposed)
    with pytest.raises(RuntimeError, match=r"folds sm90 scales to \(2, 2, 512\) in an order that was not verified"):
        versions.load()


@pytest.mark.parametrize("changed", ["scales", "weights"])
def test_a_layout_that_changed_in_silence_stops_the_run_in_prepare(monkeypatch, tmp_path, changed):
    """Same version, signature, helpers and shapes; only what the kernel makes of the bytes is another generation's."""
    library = StandIn("sm90", kernel_scales="transposed" if changed == "scales" else "folded")
    library.install(monkeypatch, tmp_path / "flashinfer")
    if changed == "weights":
        monkeypatch.setattr(flashinfer_standin, "deinterleave", lambda weight: weight)
    with pytest.raises(RuntimeError, match=r"FlashInfer 0\.7\.2\.post1 changed the weight or scale layout .*: self-test relative error"):
        UNTUNED.prepare(make_layer(TINY, "cpu"), 9)


def test_the_self_test_runs_once_and_its_error_is_a_fact(library):
    layer = make_layer(TINY, "cpu")
    first = UNTUNED.prepare(layer, 9)
    assert len(library.calls) == 1
    assert tuple(library.calls[0]["input"].shape) == (6, 256)
    UNTUNED.prepare(layer, 9)
    assert len(library.calls) == 1
    assert 0 < first.facts["self_test_rel_l2"] < 0.004
    assert self_test(UNTUNED, versions.load(), "cpu") == first.facts["self_test_rel_l2"]


# ---- tuning


def test_the_tuned_backend_tunes_up_to_the_largest_token_count_in_prepare_and_never_after(library):
    backend = CutlassMxfp4Bf16()
    call = backend.prepare(make_layer(TINY, "cpu"), 300)
    buckets = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    assert sorted(library.tuned) == sorted((gemm, bucket) for gemm in (1, 2) for bucket in buckets)
    assert (call.facts["tuned"], call.facts["tuned_tokens"], call.facts["tuning_cache"]) == ("yes", 300, "miss")
    assert call.facts["tuning_s"] > 0
    assert not library.active
    calls, tuned = len(library.calls), len(library.tuned)
    for num_tokens, bucket in ((1, 1), (3, 4), (9, 16), (257, 300), (300, 300)):
        call(make_tokens(case("tiny", num_tokens), "cpu"))
        assert library.calls[-1]["profile_ids"] == [bucket.bit_length(), GEMM1_TACTICS + bucket.bit_length()]
    assert not any(made["tuning"] for made in library.calls[calls:])
    assert len(library.tuned) == tuned
    assert call.facts["tactics"].split()[:3] == ["1:1/41", "2:2/42", "4:3/43"]


def test_the_untuned_backend_asks_the_autotuner_nothing_and_takes_the_default_tactics(library):
    call = UNTUNED.prepare(make_layer(TINY, "cpu"), 300)
    call(make_tokens(TINY, "cpu"))
    assert library.tuned == []
    assert not any(made["tuning"] for made in library.calls)
    assert {tuple(made["profile_ids"]) for made in library.calls} == {(-1, -1)}
    assert (call.facts["tuned"], call.facts["tactics"]) == ("no", "default")


def test_a_second_prepare_finds_its_tactics_on_disk_and_measures_only_larger_buckets(library):
    layer, backend = make_layer(TINY, "cpu"), CutlassMxfp4Bf16()
    first = backend.prepare(layer, 16)
    measured = len(library.tuned)
    again = backend.prepare(layer, 16)
    assert (again.facts["tuning_cache"], len(library.tuned)) == ("hit", measured)
    assert again.facts["tactics"] == first.facts["tactics"]
    assert again.facts["tuning_cold_s"] == first.facts["tuning_cold_s"] > again.facts["tuning_s"]
    larger = backend.prepare(layer, 64)
    assert larger.facts["tuning_cache"] == "partial"
    assert library.tuned[measured:] == [(1, 32), (2, 32), (1, 64), (2, 64)]


def test_the_file_of_tactics_serves_another_machine_of_the_same_kind(library, monkeypatch, tmp_path):
    layer, backend = make_layer(TINY, "cpu"), CutlassMxfp4Bf16()
    file = tuning.cache_dir() / backend.prepare(layer, 16).facts["tuning_file"]
    assert file.exists()
    assert file.parent == tmp_path / "cache" / "moebench" / "flashinfer"
    there = tmp_path / "there" / "moebench" / "flashinfer"
    there.mkdir(parents=True)
    (there / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    measured = len(library.tuned)
    assert backend.prepare(layer, 16).facts["tuning_cache"] == "hit"
    assert len(library.tuned) == measured


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"device": "cpu"', '"device": "NVIDIA H20"'),
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: json.dumps(json.loads(text) | {"tactics": {"1": [3]}}),
    ],
    ids=["half of it", "a list", "another device", "another schema", "one tactic"],
)
def test_a_file_that_is_not_ours_is_measured_anew_and_replaced(library, spoil):
    layer, backend = make_layer(TINY, "cpu"), CutlassMxfp4Bf16()
    first = backend.prepare(layer, 4)
    file = tuning.cache_dir() / first.facts["tuning_file"]
    good = json.loads(file.read_text())["tactics"]
    file.write_text(spoil(file.read_text()))
    assert backend.prepare(layer, 4).facts["tuning_cache"] == "miss"
    assert json.loads(file.read_text())["tactics"] == good == {"1": [1, 41], "2": [2, 42], "4": [3, 43]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TINY, replace(TINY, ep_size=2)),
        (TINY, replace(TINY, tp_size=2)),
        (TINY, replace(TINY, hidden_size=512)),
        (TINY, replace(TINY, num_experts=16, ep_size=2)),
    ],
)
def test_another_shape_or_parallel_size_is_another_file_and_a_rank_is_not(library, one, other):
    def file(point):
        return CutlassMxfp4Bf16().prepare(make_layer(point, "cpu"), 1).facts["tuning_file"]

    assert file(one) != file(other)
    assert file(replace(one, ep_size=4, ep_rank=1)) == file(replace(one, ep_size=4, ep_rank=3))


def test_an_interrupted_tuning_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layer, backend = make_layer(TINY, "cpu"), CutlassMxfp4Bf16()
    short_of_memory = StandIn("sm90", untunable={8}).install(monkeypatch, tmp_path / "flashinfer")
    with pytest.raises(RuntimeError, match=r"chose no tactic for 8 tokens .*@untuned"):
        backend.prepare(layer, 16)
    assert short_of_memory.tuned == [(gemm, bucket) for bucket in (1, 2, 4) for gemm in (1, 2)]
    recovered = StandIn("sm90").install(monkeypatch, tmp_path / "flashinfer")
    assert backend.prepare(layer, 16).facts["tuning_cache"] == "partial"
    assert recovered.tuned == [(gemm, bucket) for bucket in (8, 16) for gemm in (1, 2)]


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "bucket"),
    [(1, 4, 1), (8, 4, 8), (9, 4, 16), (17, 4, 20), (999, 4, 20), (8, 8, 16), (8, 1, 2), (1, 1, 1)],
)
def test_a_batch_gets_the_tactics_of_the_bucket_that_holds_its_rows(num_tokens, top_k, bucket):
    by_bucket = {b: (b, 100 + b) for b in tuning.token_buckets(20)}
    assert list(by_bucket) == [1, 2, 4, 8, 16, 20]
    assert tuning.Tactics(top_k=4, by_bucket=by_bucket).ids(num_tokens, top_k) == [bucket, 100 + bucket]


@pytest.mark.parametrize(("largest", "number", "last"), [(1, 1, (1,)), (2, 2, (1, 2)), (100, 8, (64, 100)), (16384, 15, (8192, 16384))])
def test_buckets_are_powers_of_two_up_to_the_largest_token_count(largest, number, last):
    buckets = tuning.token_buckets(largest)
    assert len(buckets) == number
    assert buckets[-len(last) :] == last


# ---- what the registry and the record see


def test_the_variants_have_stable_names():
    backends: tuple[Backend, ...] = BACKENDS
    assert [backend.name for backend in backends] == ["cutlass_mxfp4_bf16", "cutlass_mxfp4_bf16@untuned", "cutlass_mxfp4_bf16@pad3072"]
    assert [(b.tuned, layout.padded_size(2880, b.pad)) for b in BACKENDS] == [(True, 2944), (False, 2944), (True, 3072)]
    assert {backend.act_dtype for backend in backends} == {"bf16"}


# From nm -C of cutlass_kernel_file_gemm_grouped_sm90_M128_Mixed_group40.generated.cuda.o, FlashInfer 0.7.2.post1, shortened at "...".
MANGLED = (
    "_ZN7cutlass13device_kernelINS_4gemm6kernel33GemmUniversalPrecomputedSchedulerINS1_17GroupProblemShapeI...28CollectiveMmaArrayMixedInput"
    "INS1_49MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInputILi2E...NS1_40KernelPtrArrayTmaWarpSpecializedPingpongEEE...NS6_IJNS_12float_e2m1_t"
    "ENS_13float_ue8m0_tEEEEPNS6_IJlSD_NSC_ILi0EEEEEENS_10bfloat16_tESP_NS5_8TiledMMAINS5_8MMA_AtomIJNS5_4SM904GMMA28MMA_64x256x16_F32BF16BF16_RSI"
)
DEMANGLED = (
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversalPrecomputedScheduler<...CollectiveMmaArrayMixedInput<"
    "cutlass::gemm::MainloopSm90ArrayTmaGmmaWarpSpecializedMixedInput<2, ...>, ..., "
    "cute::tuple<cutlass::float_e2m1_t, cutlass::float_ue8m0_t>, ..., "
    "cutlass::bfloat16_t, ..., cute::TiledMMA<cute::MMA_Atom<cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<..."
)


@pytest.mark.parametrize(
    ("kernel", "ours"),
    [
        (MANGLED, True),
        (DEMANGLED, True),
        (DEMANGLED.replace("F32BF16BF16_RS", "F32E4M3E4M3_RS_TN"), False),
        (DEMANGLED.replace("float_e2m1_t", "integer_subbyte<4, false>"), False),
        (DEMANGLED.replace("MixedInput<2", "<2"), False),
        ("void tensorrt_llm::kernels::cutlass_kernels::doActivationKernel<__nv_bfloat16, ...>(...)", False),
        ("_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1_swiglu", False),
    ],
)
def test_the_kernel_pattern_names_the_mixed_grouped_gemm_and_no_other_kernel(kernel, ours):
    assert bool(re.search(CutlassMxfp4Bf16.kernel_pattern, kernel)) == ours


def test_bit_moves_are_a_permutation_of_a_word():
    words = torch.tensor([random.Random(3).getrandbits(32) for _ in range(64)] + [1 << bit for bit in range(32)])
    moved = flashinfer_standin.move_bits(words)
    assert sorted(moved[64:].tolist()) == [1 << bit for bit in range(32)]
    assert torch.equal(flashinfer_standin.move_bits(moved, inverse=True), words)
