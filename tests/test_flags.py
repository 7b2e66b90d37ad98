"""Flags: each on its cause, none on a clean row."""

from dataclasses import replace

import pytest

from moebench.case import case
from moebench.flags import FLAGS, raised
from moebench.realized import Realized
from moebench.record import Canary, Error, L2Proof, Record, Roofline, Telemetry, Timing

L2 = 60 << 20

# What a clean row of an H200 looks like: noise of 0.4 % around 100 us without a trend.
SAMPLES = tuple(100.0 + 0.4 * ((7 * n) % 11 - 5) / 5 for n in range(200))
TELEMETRY = Telemetry(
    samples=40,
    sm_mhz=(1965.0, 1980.0, 1980.0),
    max_sm_mhz=1980.0,
    mem_mhz=3201.0,
    power_w=450.0,
    power_limit_w=700.0,
    temperature_c=55.0,
    reasons={},
    energy_j=900.0,
    window_s=2.0,
    ecc_corrected=0,
    ecc_uncorrected=0,
    foreign_bytes=600 << 20,
)
TIMING = Timing(
    samples_us=SAMPLES,
    clock="cuda_graph",
    l2="cold",
    l2_method="",
    warmup_calls=100,
    calls_per_region=10,
    stop_reason="interval",
    proof=L2Proof(token_sets=8, weight_copies=1, bytes_between_uses=6 * L2, l2_bytes=L2),
    host_us=40.0,
    busy_us=99.0,
    span_us=101.0,
    window_s=(10.0, 12.0),
)
ROOFLINE = Roofline(
    weight_bytes=1,
    activation_bytes=1,
    flop=1.0,
    padded_flop=None,
    floor_us=60.0,
    limiter="memory",
    bandwidth_bytes_s=4e12,
    flop_s=8e14,
    source="the data sheet",
)
CLEAN = Record(
    case=case("tiny", 4),
    backend="b",
    act_dtype="bf16",
    arch="sm90",
    device="NVIDIA H200",
    status="ok",
    error=Error(rel_l2=0.002, worst=0.01, worst_token=0, worst_column=0, max_abs=0.1, rel_l2_tolerance=0.01, worst_tolerance=0.1),
    timing=TIMING,
    roofline=ROOFLINE,
    telemetry=TELEMETRY,
    canary=Canary(before_us=200.0, after_us=202.0),
)


def row(**changes):
    """The clean row with something else about it; of a part, a dict says which fields."""
    parts = {"timing": TIMING, "telemetry": TELEMETRY, "roofline": ROOFLINE}
    return replace(CLEAN, **{n: replace(parts[n], **value) if isinstance(value, dict) else value for n, value in changes.items()})


def drifting(percent):
    """The clean samples with a step of the median in the last third."""
    return SAMPLES[:134] + tuple(sample * (1 + percent / 100) for sample in SAMPLES[134:])


def test_a_clean_row_has_no_flag():
    assert raised(CLEAN) == {}


CAUSES = [
    ("throttled", {"telemetry": {"sm_mhz": (1830.0, 1845.0, 1875.0), "reasons": {"sw_power_cap": 0.9}, "power_w": 698.0}},
     "SM clock 1830 to 1875 MHz of 1980; sw_power_cap active in 90% of 40 samples at 698 of 700 W"),
    ("throttled", {"telemetry": {"sm_mhz": (1200.0, 1980.0, 1980.0)}},
     "SM clock 1200 to 1980 MHz of 1980; the driver gives no reason"),
    ("throttled", {"telemetry": {"reasons": {"sw_thermal": 0.05, "hw_thermal": 0.025}}},
     "SM clock 1965 to 1980 MHz of 1980; sw_thermal active in 5% of 40 samples, hw_thermal active in 2% of 40 samples"),
    ("throttled", {"telemetry": {"reasons": {"power_brake": 0.1}}},
     "SM clock 1965 to 1980 MHz of 1980; power_brake active in 10% of 40 samples"),
    ("throttled", {"telemetry": {"reasons": {"user_clocks": 1.0}, "sm_mhz": (1300.0, 1400.0, 1410.0)}},
     "SM clock 1300 to 1410 MHz of 1410; the driver gives no reason"),
    ("throttled", {"telemetry": {"max_sm_mhz": 0.0, "sm_mhz": (1700.0, 1980.0, 1980.0)}},
     "SM clock 1700 to 1980 MHz of 1980; the driver gives no reason"),
    ("contended", {"canary": Canary(before_us=200.0, after_us=210.0)},
     "the same copy took 200.0 us before and 210.0 us after (+5.0%); the SM clock varied by 0.8%"),
    ("contended", {"canary": Canary(before_us=210.0, after_us=200.0)},
     "the same copy took 210.0 us before and 200.0 us after (-4.8%); the SM clock varied by 0.8%"),
    ("contended", {"canary": Canary(before_us=200.0, after_us=204.2), "telemetry": None},
     "the same copy took 200.0 us before and 204.2 us after (+2.1%); the SM clock is not known"),
    ("contended", {"telemetry": {"foreign_bytes": (1 << 30) + (1 << 29)}},
     "1.5 GiB of the GPU's memory were in use before the first worker started"),
    ("unstable", {"timing": {"samples_us": (100.0, 110.0) * 6, "stop_reason": "max_s", "span_us": None}},
     "12 samples, stopped by time, know the median to 4.8% only"),
    ("unstable", {"timing": {"samples_us": (90.0,) * 5 + (110.0,) * 6, "stop_reason": "max_samples", "span_us": None}},
     "11 samples, stopped by their number, know the median to 9.1% only"),
    ("unstable", {"timing": {"samples_us": drifting(6), "span_us": None}},
     "the samples drift: median 100.0 us in the first third and 106.0 us in the last (+6.0%)"),
    ("unstable", {"timing": {"samples_us": drifting(-6), "span_us": None}},
     "the samples drift: median 100.0 us in the first third and 94.0 us in the last (-6.0%)"),
    ("host_bound", {"timing": {"host_bound": True, "host_us": 95.25}},
     "the GPU waited for the host within calls of 100.0 us: enqueueing a call takes the host 95.2 us"),
    ("host_bound", {"timing": {"host_bound": True, "host_us": None}},
     "the GPU waited for the host within calls of 100.0 us"),
    ("l2_warm", {"timing": {"proof": None}},
     "nothing was recorded that shows the L2 to be cold"),
    ("l2_warm", {"timing": {"proof": L2Proof(token_sets=2, weight_copies=1, bytes_between_uses=L2, l2_bytes=L2, flush_bytes=2 * L2)}},
     "60 MiB between two uses of the same bytes and a flush of 120 MiB, against an L2 of 60 MiB"),
    ("unchecked", {"error": None},
     "a time without a comparison of the output with the reference"),
    ("above_roof", {"roofline": {"floor_us": 103.0}},
     "100.0 us is 1.03 of what memory allows: at least 103.0 us by the data sheet"),
    ("timing_disagree", {"timing": {"traced_us": 105.0, "span_us": 100.0}},
     "105.0 us by cuda_graph, 100.0 us by the profiler: 5.0 us apart"),
    ("timing_disagree", {"timing": {"span_us": 96.0}},
     "100.0 us by cuda_graph, 96.0 us by the profiler: 4.0 us apart"),
    ("ecc", {"telemetry": {"ecc_corrected": 2}},
     "0 uncorrected and 2 corrected memory errors in 2.0 s"),
    ("ecc", {"telemetry": {"ecc_uncorrected": 1}},
     "1 uncorrected and 0 corrected memory errors in 2.0 s"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "changes", "sentence"), CAUSES)
def test_a_cause_raises_its_flag_and_no_other(flag, changes, sentence):
    assert raised(row(**changes)) == {flag: sentence}


HARMLESS = {
    "capped at times, at full clock": {"telemetry": {"reasons": {"sw_power_cap": 0.5}}},
    "a clock of 95 %": {"telemetry": {"sm_mhz": (1881.0, 1980.0, 1980.0), "reasons": {"sw_power_cap": 1.0}}},
    "clocks set by the owner": {"telemetry": {"sm_mhz": (1395.0, 1410.0, 1410.0), "reasons": {"user_clocks": 1.0}}},
    "too short to be seen running": {"telemetry": {"sm_mhz": (345.0, 345.0, 345.0), "reasons": {"gpu_idle": 1.0}}},
    "a driver that tells nothing": {"telemetry": {"sm_mhz": (0.0, 0.0, 0.0), "max_sm_mhz": 0.0, "power_limit_w": 0.0}},
    "no telemetry": {"telemetry": None},
    "a copy slowed down by 2 %": {"canary": Canary(before_us=200.0, after_us=204.0)},
    "a copy that the SM clock slowed down": {
        "canary": Canary(before_us=200.0, after_us=209.0),
        "telemetry": {"sm_mhz": (1900.0, 1970.0, 1980.0)},
    },
    "a copy that was not timed": {"canary": Canary(before_us=0.0, after_us=0.0)},
    "no canary": {"canary": None},
    "a driver's own memory": {"telemetry": {"foreign_bytes": 1 << 30}},
    "stopped by time, but known": {"timing": {"stop_reason": "max_s"}},
    "a drift of 1.5 %": {"timing": {"samples_us": drifting(1.5)}},
    "few samples that drift": {"timing": {"samples_us": (100.0,) * 15 + (103.0,) * 14, "span_us": None}},
    "a single sample": {"timing": {"samples_us": (100.0,), "stop_reason": "once"}},
    "a time that says nothing": {"timing": {"samples_us": (80.0, 100.0, 120.0), "stop_reason": "max_s", "comparable": False}},
    "a hot L2": {"timing": {"l2": "hot", "proof": None}},
    "no L2": {"timing": {"l2": None, "proof": None, "clock": "wall"}},
    "a flush instead of a rotation": {
        "timing": {"proof": L2Proof(token_sets=1, weight_copies=1, bytes_between_uses=0, l2_bytes=L2, flush_bytes=4 * L2)}
    },
    "a share of 1.02": {"roofline": {"floor_us": 102.0}},
    "no roof": {"roofline": None},
    "no profiler": {"timing": {"span_us": None}},
    "calls that the profiler slows down": {"timing": {"traced_us": 120.5, "span_us": 120.0}},
    "2 us apart at 20 us": {"timing": {"samples_us": (20.0,) * 100, "span_us": 18.0}, "roofline": None},
    "3 % apart": {"timing": {"span_us": 97.0}},
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_no_cause_raises_nothing(changes):
    assert raised(row(**changes)) == {}


def test_a_batch_without_work_for_this_rank_needs_no_cold_l2():
    proof = L2Proof(token_sets=1, weight_copies=1, bytes_between_uses=0, l2_bytes=L2)
    routing = Realized(active_experts=0, empty_experts=8, local_pairs=0, load_max_over_mean=1.0, pairs_per_rank=(0, 4), sha256="")
    assert raised(row(timing={"proof": proof}, routing=routing)) == {}
    assert list(raised(row(timing={"proof": proof}, routing=replace(routing, active_experts=1)))) == ["l2_warm"]


def test_a_gpu_that_was_busy_before_we_came_is_contended():
    assert raised(CLEAN, foreign_utilization=0.4) == {"contended": "the GPU was busy 40% of the time before the first worker started"}
    assert raised(CLEAN, foreign_utilization=0.05) == {}


def test_memory_in_use_says_more_than_a_busy_gpu():
    assert "GiB" in raised(row(telemetry={"foreign_bytes": 2 << 30}), foreign_utilization=0.4)["contended"]


def test_a_row_without_a_time_has_no_time_to_doubt():
    failed = row(status="failed", timing=None, error=None, telemetry={"reasons": {"hw_slowdown": 1.0}, "foreign_bytes": 2 << 30})
    assert raised(failed, foreign_utilization=1.0) == {}


def test_memory_errors_are_told_of_a_failed_row_too():
    failed = row(status="cuda_error", telemetry={"ecc_uncorrected": 1}, timing=None, error=None)
    assert list(raised(failed)) == ["ecc"]


def test_several_flags_come_in_the_order_of_the_table():
    record = row(error=None, timing={"host_bound": True, "proof": None}, telemetry={"ecc_corrected": 1, "reasons": {"hw_slowdown": 1.0}})
    assert list(raised(record)) == ["throttled", "host_bound", "l2_warm", "unchecked", "ecc"]
    assert set(raised(record)) < set(FLAGS)


def test_every_flag_of_the_table_has_a_cause_here_and_two_sentences():
    assert {flag for flag, _, _ in CAUSES} == set(FLAGS)
    for flag in FLAGS.values():
        assert flag.meaning.endswith(".")
        assert flag.remedy.endswith(".")
