"""Bytes and FLOP by hand, the table of data sheets, and files of measured roofs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.case import case
from moebench.device import Device
from moebench.realized import Realized
from moebench.roofline import (
    BF16_FLOP_PER_CLOCK,
    NOMINAL,
    Rate,
    Roof,
    Roofs,
    RoofsError,
    best_roof,
    impossible,
    load_roofs,
    nominal,
    padded_flop,
    roofline,
    roofs_from_dict,
    roofs_path,
    roofs_to_dict,
    save_roofs,
    work,
)
from moebench.routing import assign, realized

MEASURED = Roof(bandwidth_bytes_s=4.3e12, bf16_flop_s=790e12, fp8_flop_s=1500e12, source="test")
H200 = Device(arch="sm90", name="NVIDIA H200", torch="cuda:0", memory_bytes=141 << 30, l2_bytes=62_914_560, num_sms=132, clock_mhz=1980)


def worked(model, tokens, **fields):
    it = case(model, tokens, **fields)
    return work(it, realized(it, assign(it)))


def counts(active, pairs):
    return Realized(
        active_experts=active, empty_experts=32 - active, local_pairs=pairs, load_max_over_mean=1.0, pairs_per_rank=(pairs,), sha256=""
    )


def roofs(**fields):
    rate = Rate(value=4.2e12, low=4.1e12, high=4.3e12, samples=50, sm_mhz=1980)
    flop = Rate(value=795e12, low=790e12, high=800e12, samples=50)
    given_ = {"copy_bytes_s": rate, "read_bytes_s": replace(rate, value=4.25e12), "bf16_flop_s": flop} | fields
    return Roofs(**{"device": "NVIDIA H200", "arch": "sm90", "measured": "2026-11-22", "torch": "2.11.0"} | given_)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_one_token_of_gpt_oss_20b_by_hand():
    found = worked("gpt-oss-20b", 1)
    # an expert: 3 * 2880 * 2880 codes of half a byte, a scale for 32 of them, 2 * 2880 + 2880 biases of 2 bytes
    assert found.weight_bytes == 4 * (12_441_600 + 777_600 + 17_280) == 52_945_920
    assert found.input_bytes == 2 * 2880 + 4 * 4 + 4 * 4  # hidden state, ids, router weights
    assert found.output_bytes == 2 * 2880
    assert found.flop == 4 * (2 * 2880 * 5760 + 2 * 2880 * 2880) == 199_065_600
    floor = roofline(found, MEASURED, "bf16", "cold", {})
    assert floor.floor_us == pytest.approx((52_945_920 + 11_552) / 4.3e6)
    assert floor.floor_us == pytest.approx(12.3, abs=0.05)
    assert floor.limiter == "memory"


def test_many_tokens_are_limited_by_multiplication():
    floor = roofline(worked("gpt-oss-20b", 4096), MEASURED, "bf16", "cold", {})
    assert floor.floor_us == pytest.approx(4096 * 199_065_600 / 790e6)
    assert (floor.limiter, floor.flop_s) == ("compute", 790e12)


@pytest.mark.parametrize("act_dtype", ["fp8", "mxfp8", "mxfp8_ocp"])
def test_eight_bit_activations_have_the_fp8_roof(act_dtype):
    found = worked("gpt-oss-20b", 4096)
    assert roofline(found, MEASURED, act_dtype, "cold", {}).flop_s == 1500e12
    assert roofline(found, replace(MEASURED, fp8_flop_s=None), act_dtype, "cold", {}).flop_s == 790e12


@pytest.mark.parametrize("l2", ["hot", None])
def test_memory_is_no_floor_where_a_cache_may_hold_the_weights(l2):
    floor = roofline(worked("gpt-oss-20b", 1), MEASURED, "bf16", l2, {})
    assert floor.floor_us == pytest.approx(199_065_600 / 790e6)
    assert floor.limiter == "compute"


def test_no_tokens_need_nothing():
    found = worked("gpt-oss-20b", 0)
    assert (found.weight_bytes, found.activation_bytes, found.flop) == (0, 0, 0.0)
    assert roofline(found, MEASURED, "bf16", "cold", {}).floor_us == 0


def test_the_weights_of_all_experts_are_those_of_the_case():
    whole = case("gpt-oss-20b", 512)
    assert work(whole, realized(whole, assign(whole))).weight_bytes == whole.weight_bytes


def test_expert_parallel_ranks_share_weights_and_flop_and_each_writes_all_tokens():
    whole = worked("gpt-oss-20b", 64)
    ranks = [worked("gpt-oss-20b", 64, ep_size=4, ep_rank=rank) for rank in range(4)]
    assert sum(rank.weight_bytes for rank in ranks) == whole.weight_bytes
    assert sum(rank.flop for rank in ranks) == whole.flop
    assert {rank.output_bytes for rank in ranks} == {whole.output_bytes} == {64 * 5760}
    assert all(rank.input_bytes < whole.input_bytes for rank in ranks)


def test_a_rank_that_gets_no_pairs_still_reads_the_ids_and_writes_its_rows():
    found = work(case("gpt-oss-20b", 2, ep_size=4, ep_rank=1), counts(0, 0))
    assert (found.weight_bytes, found.input_bytes, found.output_bytes, found.flop) == (0, 2 * 4 * 4, 2 * 5760, 0.0)


def test_tensor_parallel_shards_add_up_with_one_second_bias():
    whole = worked("gpt-oss-20b", 64)
    ranks = [worked("gpt-oss-20b", 64, tp_size=4, tp_rank=rank) for rank in range(4)]
    assert [rank.intermediate_size for rank in ranks] == [736, 736, 736, 672]
    assert sum(rank.weight_bytes for rank in ranks) == whole.weight_bytes
    assert sum(rank.flop for rank in ranks) == whole.flop


def test_a_model_without_biases_counts_none():
    found = work(case("mixtral-8x7b", 1), counts(2, 2))
    assert found.weight_bytes == 2 * 3 * 4096 * 14336 * 17 // 32


@given(active=st.integers(0, 31), pairs=st.integers(0, 4 * 4096 - 1), more_active=st.integers(0, 1), more_pairs=st.integers(0, 1))
@pytest.mark.parametrize("l2", ["cold", "hot"])
def test_the_floor_grows_with_experts_and_pairs(l2, active, pairs, more_active, more_pairs):
    it = case("gpt-oss-20b", 4096)
    less, more = work(it, counts(active, pairs)), work(it, counts(active + more_active, pairs + more_pairs))
    floors = [roofline(found, MEASURED, "bf16", l2, {}).floor_us for found in (less, more)]
    assert floors == sorted(floors)
    assert more_pairs == 0 or less.flop < more.flop
    assert more_active == 0 or less.weight_bytes < more.weight_bytes


@pytest.mark.parametrize(
    ("facts", "times"),
    [
        ({"padded_hidden": 3072, "padded_intermediate": 2944}, 3072 * 2944 / 2880**2),
        ({"padded_intermediate_size": 2944}, 2944 / 2880),
        ({"padded_hidden": 2944, "tuned": "no"}, 2944 / 2880),
    ],
)
def test_padding_a_backend_tells_of_is_counted(facts, times):
    found = worked("gpt-oss-20b", 8)
    assert padded_flop(found, facts) == pytest.approx(found.flop * times)
    assert roofline(found, MEASURED, "bf16", "cold", facts).padded_flop == padded_flop(found, facts)


def test_a_backend_that_tells_nothing_has_no_padded_flop():
    assert padded_flop(worked("gpt-oss-20b", 8), {"tuned": "no", "padded_hidden": "?"}) is None


@pytest.mark.parametrize("name", NOMINAL)
def test_data_sheets_are_sane(name):
    sheet = NOMINAL[name]
    assert 0.8e12 <= sheet.bandwidth_bytes_s <= 8e12
    assert "NVIDIA" in sheet.source
    if sheet.bf16_flop_s is None:
        assert sheet.fp8_flop_s is None
        assert sheet.roof is None
    elif "A100" in name:
        assert (sheet.bf16_flop_s, sheet.fp8_flop_s) == (312e12, None)
    else:
        assert sheet.fp8_flop_s == pytest.approx(2 * sheet.bf16_flop_s, rel=0.015)  # L40S: 362.05 and 733 are what NVIDIA prints


@pytest.mark.parametrize(
    ("name", "sms", "boost_mhz", "arch"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, 1410, "sm80"),
        ("NVIDIA H100 80GB HBM3", 132, 1830, "sm90"),
        ("NVIDIA H100 PCIe", 114, 1620, "sm90"),
        ("NVIDIA L40S", 142, 2490, "sm89"),
    ],
)
def test_what_an_sm_multiplies_in_a_clock_gives_the_data_sheets_rate(name, sms, boost_mhz, arch):
    assert sms * boost_mhz * 1e6 * BF16_FLOP_PER_CLOCK[arch] == pytest.approx(NOMINAL[name].bf16_flop_s, rel=0.002)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H200 NVL", "NVIDIA H200 NVL"),
        ("NVIDIA H20", "NVIDIA H20"),
        ("NVIDIA H20-3e", None),
        ("NVIDIA H2000", None),
        ("NVIDIA B300 SXM6 AC", "NVIDIA B300"),
        ("NVIDIA H100", None),
        ("AMD EPYC 9654", None),
    ],
)
def test_the_longest_beginning_in_whole_words_names_the_row(name, row):
    assert nominal(name) is (NOMINAL[row] if row else None)


def test_a_time_below_what_memory_allows_is_impossible():
    found = worked("gpt-oss-20b", 1)  # 52.95 MB at 4.8 TB/s: 11.03 us
    told = impossible(10.7, found, H200, "bf16", "cold")
    assert told is not None
    assert told.startswith("10.70 us is impossible: moving 53.0 MB takes at least 11.03 us at 4.80 TB/s (NVIDIA H200")
    assert impossible(10.9, found, H200, "bf16", "cold") is None  # within 2 %
    assert impossible(1.0, found, H200, "bf16", "hot") is None
    assert impossible(1.0, found, replace(H200, name="some GPU"), "bf16", "cold") is None


def test_output_that_may_still_be_in_the_cache_is_no_reason_to_call_a_time_impossible():
    it = case("gpt-oss-20b", 8192, ep_size=32, ep_rank=3)  # 47 MB of output, and nothing else but ids
    found = work(it, counts(0, 0))
    assert impossible(1.0, found, H200, "bf16", "cold") is None
    assert impossible(1.0, found, replace(H200, l2_bytes=0), "bf16", "cold") is not None


def test_a_time_below_what_the_tensor_cores_multiply_is_impossible():
    found = worked("gpt-oss-20b", 16384)  # 3.26 TFLOP at 132 * 1980e6 * 4096 = 1070.5 TFLOP/s: 3046.7 us
    assert "on 132 SMs at 1980 MHz" in (impossible(2900, found, H200, "bf16", "hot") or "")
    assert impossible(3000, found, H200, "bf16", "hot") is None
    assert impossible(2900, found, H200, "fp8", "hot") is None
    assert impossible(1400, found, H200, "fp8", "hot") is not None
    silent = replace(H200, clock_mhz=0)
    assert impossible(100, found, silent, "bf16", "hot") is None
    assert impossible(2900, found, silent, "bf16", "hot", max_sm_mhz=1980) is not None
    assert impossible(100, found, replace(H200, arch="sm120"), "bf16", "hot") is None


def test_measured_roofs_come_before_the_data_sheet(cache):
    assert best_roof("NVIDIA H200") == NOMINAL["NVIDIA H200"].roof
    assert best_roof("NVIDIA H200").source == "NVIDIA H200 Tensor Core GPU data sheet (nominal)"
    stored = save_roofs(roofs())
    assert stored == cache / "moebench" / "roofs" / "nvidia-h200.json"
    assert best_roof("NVIDIA H200") == Roof(
        bandwidth_bytes_s=4.25e12, bf16_flop_s=795e12, fp8_flop_s=None, source="measured by moebench calibrate, 2026-11-22"
    )
    assert [path.name for path in stored.parent.iterdir()] == ["nvidia-h200.json"]


def test_a_device_without_data_sheet_and_file_has_no_roof(cache):
    assert best_roof("AMD EPYC 9654") is None
    assert best_roof("NVIDIA GeForce RTX 5090") is None  # its published matmul rate is no roof
    assert best_roof("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert nominal("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is NOMINAL["NVIDIA H100 80GB HBM3"]  # a bound all the same


def test_a_cpu_multiplies_in_whichever_format_is_faster():
    faster = Rate(value=900e9, low=800e9, high=1e12, samples=9)
    assert roofs(float32_flop_s=replace(faster, value=1e15)).roof.bf16_flop_s == 1e15
    assert roofs(float32_flop_s=faster).roof.bf16_flop_s == 795e12


def test_stored_roofs_come_back(cache):
    fp8 = Rate(value=1.5e15, low=1.4e15, high=1.6e15, samples=50)
    for found in (roofs(), roofs(fp8_flop_s=fp8)):
        save_roofs(found)
        assert load_roofs("NVIDIA H200") == found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "9"}, "its schema is '9'"),
        ({"extra": 1}, "these fields are missing or unknown: extra"),
        ({"device": "NVIDIA B200"}, "it is of 'NVIDIA B200', not of 'NVIDIA H200'"),
        ({"torch": ""}, "torch = '' is not a text"),
        ({"measured": "yesterday"}, "Invalid isoformat"),
        ({"copy_bytes_s": 4e12}, "copy_bytes_s is not a rate"),
        ({"read_bytes_s": None}, "read_bytes_s is not a rate"),
        ({"bf16_flop_s.value": "fast"}, "bf16_flop_s.value = 'fast' is not a finite positive number"),
        ({"bf16_flop_s.value": True}, "bf16_flop_s.value = True"),
        ({"bf16_flop_s.low": 0}, "bf16_flop_s.low = 0"),
        ({"bf16_flop_s.high": float("nan")}, "bf16_flop_s.high = nan"),
        ({"bf16_flop_s.high": float("inf")}, "bf16_flop_s.high = inf"),
        ({"bf16_flop_s.low": 799e12}, "its interval 7.99e+14 to 8e+14 does not contain its value 7.95e+14"),
        ({"copy_bytes_s.samples": -1}, "copy_bytes_s.samples = -1"),
        ({"copy_bytes_s.sm_mhz": "?"}, "copy_bytes_s.sm_mhz = '?'"),
        ({"read_bytes_s.value": 5.1e12, "read_bytes_s.high": 5.2e12}, "read_bytes_s = 5.1e+12 on NVIDIA H200 is 1.06 times"),
    ],
)
def test_a_bad_file_of_roofs_is_an_error_that_says_the_way_out(cache, change, reason):
    row = roofs_to_dict(roofs())
    for name, value in change.items():
        field, _, part = name.partition(".")
        row[field] = {**row[field], part: value} if part else value
    path = roofs_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row))
    with pytest.raises(RoofsError) as raised:
        best_roof("NVIDIA H200")
    assert reason in str(raised.value)
    assert str(raised.value).startswith(f"{path} holds no usable roofs: ")
    assert str(raised.value).endswith("; delete it, or run: moebench calibrate")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_an_error(cache, content):
    path = roofs_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(RoofsError, match="holds no usable roofs"):
        load_roofs("NVIDIA H200")


def test_every_field_of_a_file_is_needed():
    for name in roofs_to_dict(roofs()):
        row = roofs_to_dict(roofs())
        del row[name]
        with pytest.raises(ValueError, match="schema" if name == "schema" else f"missing or unknown: {name}"):
            roofs_from_dict(row)


def test_roofs_above_the_data_sheet_are_not_stored(cache):
    too_good = Rate(value=1100e12, low=1000e12, high=1200e12, samples=50)
    with pytest.raises(
        RoofsError, match=r"not stored: bf16_flop_s = 1.1e\+15 on NVIDIA H200 is 1.11 times the 9.894e\+14 of its data sheet"
    ):
        save_roofs(roofs(bf16_flop_s=too_good))
    assert not roofs_path("NVIDIA H200").exists()
    save_roofs(roofs(device="NVIDIA H200 NVL", bf16_flop_s=too_good))  # nothing is known that would contradict it
    assert load_roofs("NVIDIA H200 NVL").bf16_flop_s == too_good
