"""Where the time of a call goes: phases by name and place, sums that add up, differences that add up."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.case import case
from moebench.roofline import work
from moebench.routing import assign, realized
from moebench.timeline import (
    GAPS,
    UNKNOWN,
    Event,
    PhaseWork,
    ProfileError,
    breakdown,
    classify,
    diff,
    floor,
    from_json,
    gemm_work,
    median_call,
    repeats,
    to_json,
)
from tests.profiles import COPY, GROUPED, LAUNCHES, MARLIN, OURS, REDUCE, SWIGLU, TRTLLM, call, profile

FUSED = "_matmul_ogs_NNT_bf16xbf16xmxfp4_128x256x128x1_swiglu"
ACTIVATION = f"void {TRTLLM}doActivationKernel<__nv_bfloat16, __nv_bfloat16>(__nv_bfloat16*)"


def phases(*names):
    return classify(call([(name, 1000) for name in names]))


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("triton_mxfp4_bf16", "route gemm1+activation gemm2 finalize"),
        ("openai_triton_kernels", "route route route route route gemm1+activation gemm2 finalize"),
        ("cutlass_mxfp4_bf16", "permute route route route permute route route gemm1 activation route gemm2 finalize"),
        ("marlin_mxfp4_bf16", "route permute gemm1 activation gemm2 finalize"),
    ],
)
def test_the_kernels_that_an_h200_ran_fall_into_phases(backend, expected):
    assert phases(*(name for name, _ in LAUNCHES[backend])) == expected.split()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("count_pairs", "place_pairs", "gate_up_kernel", "down_kernel"), ["route", "route", "gemm1+activation", "gemm2"]),
        (("hopper_mxfp4_bf16",), ["route+gemm1+activation+gemm2+finalize"]),
        (("hopper_mxfp4_prefill",), ["route+gemm1+activation+gemm2+finalize"]),
        ((GROUPED, GROUPED), ["gemm1", "gemm2"]),
        ((GROUPED, GROUPED, ACTIVATION, GROUPED), ["gemm1", "gemm1", "activation", "gemm2"]),  # split along K, say
        ((FUSED, FUSED.removesuffix("_swiglu")), ["gemm1+activation", "gemm2"]),
        ((COPY, MARLIN, SWIGLU, MARLIN, COPY), ["permute", "gemm1", "activation", "gemm2", "finalize"]),
        ((REDUCE, MARLIN, SWIGLU, MARLIN, REDUCE), ["other", "gemm1", "activation", "gemm2", "finalize"]),
        (("Memcpy DtoD (Device -> Device)", "Memset (Device)", MARLIN), ["permute", "other", "gemm1"]),
        ((f"void {TRTLLM}expandInputRowsKernel<__nv_bfloat16, __nv_fp8_e4m3, false>()",), ["quantize+permute"]),
        ((f"void {TRTLLM}doActivationKernel<__nv_fp8_e4m3, __nv_bfloat16>()",), ["quantize+activation"]),
        (("void cutlass::device_kernel<ScaledAccPerRowBiasPerColScaleScatter<float>>()", COPY), ["gemm2+finalize", "finalize"]),
        (("void tensorrt_llm::kernels::quantize_with_block_size<true>()",), ["quantize"]),
        (("void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid_kernel_cuda>()",), [UNKNOWN]),
    ],
)
def test_a_kernel_s_phase_comes_from_its_name_and_its_place(names, expected):
    assert phases(*names) == expected


def test_the_two_gemms_of_one_name_are_told_apart_in_every_call():
    found = breakdown(profile("marlin_mxfp4_bf16").calls)
    assert found.phases_us["gemm1"] == pytest.approx(118.18)
    assert found.phases_us["gemm2"] == pytest.approx(70.18)
    assert list(found.phases_us) == ["route", "permute", "gemm1", "activation", "gemm2", "finalize"]


def test_operations_on_a_cpu_are_told_apart_by_their_shapes():
    def of(*names):
        ops = tuple(Event(name=name, start_ns=n, end_ns=n + 1, kind="op") for n, name in enumerate(names))
        return classify(ops, case("gpt-oss-20b", 4))

    assert of("aten::matmul [1, 2880] [2880, 5760]", "aten::matmul [1, 2880] [2880, 2880]") == ["gemm1", "gemm2"]
    assert of("aten::index_select [256] [8294400]", "aten::eq [5760, 90]", "aten::index [16]") == ["dequantize"] * 3
    assert of("aten::index_add_ [4, 2880] [1] [1, 2880]", "aten::index [4, 2880] [1]") == ["finalize", "permute"]
    assert of("aten::sub [4, 4]", "aten::sigmoid [1, 2880]", "aten::arange") == ["route", "activation", UNKNOWN]
    assert of("aten::argsort [16]", "aten::searchsorted [16] [33]") == ["route"] * 2


@st.composite
def timelines(draw):
    starts = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
    lengths = draw(st.lists(st.integers(0, 10**8), min_size=len(starts), max_size=len(starts)))
    names = draw(st.lists(st.sampled_from([name for name, _ in OURS] + ["who knows"]), min_size=len(starts), max_size=len(starts)))
    return tuple(
        Event(name=name, start_ns=start, end_ns=start + length, stream=length % 3)
        for name, start, length in zip(names, starts, lengths, strict=True)
    )


@given(st.lists(timelines(), min_size=1, max_size=4))
def test_parts_and_gaps_add_up_to_the_span(calls):
    found = breakdown(calls)
    assert sum(part.us for part in found.parts) + found.gaps_us == pytest.approx(found.span_us, abs=1e-3)
    assert sum(found.phases_us.values()) == pytest.approx(found.busy_us, abs=1e-3)
    lasted = sum(event.end_ns - event.start_ns for events in calls for event in events) / 1e3 / len(calls)
    assert found.busy_us + found.overlap_us == pytest.approx(lasted, abs=1e-3)
    assert 0 <= found.coverage <= 1


def test_kernels_that_overlap_are_counted_once_for_the_first():
    events = (
        Event(name="gate_up_kernel", start_ns=0, end_ns=10_000, stream=1),
        Event(name="down_kernel", start_ns=8_000, end_ns=15_000, stream=1),  # programmatic dependent launch
        Event(name="add_slots", start_ns=9_000, end_ns=9_500, stream=2),
        Event(name="add_slots", start_ns=16_000, end_ns=18_000, stream=2),
    )
    found = breakdown([events])
    assert found.phases_us == {"gemm1+activation": 10.0, "gemm2": 5.0, "finalize": 2.0}
    assert (found.gaps_us, found.overlap_us, found.span_us) == (1.0, 2.5, 18.0)


def test_a_breakdown_is_the_mean_of_calls_and_keeps_their_spans():
    found = breakdown([call([("down_kernel", 10_000)]), call([("down_kernel", 20_000)], 10**6)])
    assert found.spans_us == (10.0, 20.0)
    assert found.phases_us == {"gemm2": 15.0}


def test_what_is_not_known_is_not_covered():
    found = breakdown([call([("down_kernel", 30_000), ("who knows", 10_000)])])
    assert found.phases_us == {"gemm2": 30.0, UNKNOWN: 10.0}
    assert found.coverage == 0.75


@pytest.mark.parametrize("calls", [[], [()]])
def test_a_call_without_kernels_has_no_time(calls):
    found = breakdown(calls)
    assert (found.parts, found.span_us, found.gaps_us, found.coverage) == ((), 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "point",
    [
        case("gpt-oss-20b", 64),
        case("gpt-oss-20b", 0),
        case("gpt-oss-120b", 7, ep_size=4, ep_rank=3),
        case("gpt-oss-20b", 9, tp_size=4, tp_rank=2),
        case("deepseek-v3", 3, ep_size=128, ep_rank=1),
    ],
    ids=lambda point: point.label,
)
def test_the_gemms_need_together_what_the_roofline_says(point):
    found = realized(point, assign(point))
    whole, parts = work(point, found), gemm_work(point, found)
    hidden = 2 * -(-found.local_pairs // min(point.top_k, point.num_local_experts)) * point.hidden_size
    assert sum(part.flop for part in parts.values()) == whole.flop
    assert sum(part.moved_bytes for part in parts.values()) == whole.weight_bytes + hidden


def test_a_floor_is_the_larger_of_memory_and_compute():
    needs = {"gemm1": PhaseWork(moved_bytes=4_000_000, flop=1e9), "gemm2": PhaseWork(moved_bytes=2_000_000, flop=8e9)}
    slow = floor("gemm1+activation", needs, 1e12, 1e15)
    assert (slow.us, slow.limiter) == (4.0, "memory")
    busy = floor("gemm2", needs, 1e12, 1e15)
    assert (busy.us, busy.limiter) == (8.0, "compute")
    both = floor("route+gemm1+activation+gemm2+finalize", needs, 1e12, 1e15)
    assert (both.us, both.limiter) == (9.0, "compute")
    assert floor("gemm1", needs, None, 1e15).us == 1.0
    assert floor("finalize", needs, 1e12, 1e15) is None


def launches(**changed):
    return [(name, changed.get(name, ns)) for name, ns in OURS]


def test_a_difference_names_the_kernels_that_made_it_and_adds_up():
    before = breakdown([call(launches())])
    after = breakdown([call([*launches(down_kernel=69_000), ("Memset (Device)", 1_000)])])
    changes = diff(before, after)
    assert [(c.what, c.after, round(c.delta_us, 3)) for c in changes if c.what != "same"] == [
        ("slower", "down_kernel", 10.0),
        ("new", "Memset (Device)", 1.0),
        ("slower", GAPS, 0.9),
    ]
    assert sum(c.delta_us for c in changes) == pytest.approx(after.span_us - before.span_us)


def test_a_kernel_with_another_name_in_its_phase_has_replaced_it():
    before = breakdown([call(LAUNCHES["triton_mxfp4_bf16"])])
    after = breakdown([call(LAUNCHES["openai_triton_kernels"])])
    changes = {(c.phase, c.before): c for c in diff(before, after)}
    assert changes["gemm2", "down_kernel"].what == "replaced"
    assert changes["gemm2", "down_kernel"].delta_us == pytest.approx(4.0)
    assert changes["route", "sort_pairs"].what == "gone"
    assert [c.what for c in diff(before, after) if c.phase == "route"].count("new") == 5


@given(timelines(), timelines())
def test_any_two_profiles_differ_by_the_sum_of_their_changes(one, other):
    before, after = breakdown([one]), breakdown([other])
    changes = diff(before, after)
    assert sum(c.delta_us for c in changes) == pytest.approx(after.span_us - before.span_us, abs=1e-3)
    sizes = [abs(c.delta_us) for c in changes]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("names", "lengths"), [("abcabcabc", [3, 3, 3]), ("aaaa", [1, 1, 1, 1]), ("abcab", [5]), ("abab", [2, 2]), ("", [])]
)
def test_calls_are_told_apart_by_the_sequence_that_repeats(names, lengths):
    events = call([(name, 10) for name in names])
    found = repeats(events)
    assert [len(one) for one in found] == lengths
    assert tuple(event for one in found for event in one) == events


def test_the_call_that_is_drawn_is_the_median_one():
    calls = [call([("down_kernel", ns)]) for ns in (30_000, 10_000, 20_000)]
    assert median_call([*calls, ()]) == calls[2]
    assert median_call([()]) == ()


@pytest.mark.parametrize("backend", LAUNCHES)
def test_a_saved_profile_comes_back_as_it_was(backend):
    saved = profile(backend, calls=2)
    assert from_json(to_json(saved)) == saved
    assert from_json(to_json(replace(saved, routing=None, calls=()))).calls == ()


def test_a_newer_profile_is_read_without_what_it_added():
    row = json.loads(to_json(profile(calls=1)))
    row["moebench_profile"], row["device"]["nvlink"] = "1.7", 18
    assert from_json(json.dumps(row)) == profile(calls=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"moebench_profile": "2.0"}, "its schema is '2.0'"),
        ({"names": [1]}, "names is not a list of texts"),
        ({"calls": [[[0, 1, 2, 3]]]}, "unpack"),
        ({"calls": [[[0, 1, -2, 3, 0]]]}, "five whole numbers"),
        ({"calls": [[[99, 1, 2, 3, 0]]]}, "index out of range"),
        ({"calls": [[[0, 1, 2, 3, 9]]]}, "index out of range"),
        ({"case": {"model": "gpt-9"}}, "missing"),
        ({"device": {"name": 7}}, "Device.name is '7'"),
        ({"routing": {"active_experts": "all"}}, "Realized.active_experts is 'all'"),
        ({"untraced_us": [float("nan")]}, "untraced_us"),
        ({"launch": "magic"}, "'magic' is unknown"),
        ({"notes": "text"}, "notes"),
    ],
)
def test_a_profile_that_was_tampered_with_is_refused_with_the_reason(change, told):
    row = json.loads(to_json(profile(calls=1)))
    with pytest.raises(ProfileError, match=told):
        from_json(json.dumps(row | change))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 200_000, b'{"moebench_profile": "1.0"}'])
def test_anything_else_is_no_profile(text):
    with pytest.raises(ProfileError):
        from_json(text)
