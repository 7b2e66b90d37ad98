"""Records as a GPU run leaves them, with everything that schema 1.1 has, for tests of pages and figures."""

from dataclasses import replace

from moebench.realized import Realized
from moebench.record import Canary, Contract, Roofline, Telemetry
from tests.made_runs import timed, untimed

CONTRACT = Contract(
    scope="experts",
    inside="from ids and weights to the weighted sum in bf16",
    clock="cuda_graph",
    l2="cold",
    l2_method="rotation",
    warmup="until two batches agree",
    rank_aggregate="slowest",
    reference="the torch reference of the activation format",
)
TELEMETRY = Telemetry(
    samples=40,
    sm_mhz=(1965.0, 1980.0, 1980.0),
    max_sm_mhz=1980.0,
    mem_mhz=3201.0,
    power_w=420.0,
    power_limit_w=700.0,
    temperature_c=61.0,
    reasons={"sw_power_cap": 0.1},
    energy_j=12.0,
    window_s=0.4,
    ecc_corrected=0,
    ecc_uncorrected=0,
    foreign_bytes=0,
)
HOSTILE = "</script><script>alert(1)</script> \"'<img src=x onerror=alert(2)>\u2028\x1b[31m$x$&amp;{{7*7}}"


def full(backend, num_tokens, median_us, *, flags=None, pairs=(64,), how=None, record=None, **case_fields):
    """Memory is the limit below 256 tokens."""
    floor_us = max(12.0, num_tokens / 4)
    roofline = Roofline(
        weight_bytes=50_000_000,
        activation_bytes=num_tokens * 11520,
        flop=2e8 * num_tokens,
        padded_flop=2.1e8 * num_tokens,
        floor_us=floor_us,
        limiter="memory" if num_tokens < 256 else "compute",
        bandwidth_bytes_s=4.3e12,
        flop_s=7.9e14,
        source="measured by moebench calibrate, 2026-11-22",
    )
    rest = {"roofline": roofline, "contract": CONTRACT, "telemetry": TELEMETRY, "canary": Canary(before_us=31.0, after_us=31.1)}
    made = timed(backend, num_tokens, median_us, how={"spread": 0.004} | (how or {}), record=rest | (record or {}), **case_fields)
    routing = Realized(
        active_experts=4, empty_experts=28, local_pairs=pairs[0], load_max_over_mean=1.5, pairs_per_rank=tuple(pairs), sha256="ab"
    )
    return replace(made, flags=flags or {}, routing=routing)


def whole_run():
    """Four backends over six token counts, one of them untuned, an expert-parallel layer, a skip, a failure and a flag."""
    tokens = (1, 4, 16, 64, 256, 1024)
    speeds = {"triton_mxfp4_bf16": 30, "openai_triton_kernels": 45, "cutlass_mxfp4_bf16": 60, "cutlass_mxfp4_bf16@untuned": 75}
    rows = [
        full(
            name,
            m,
            us + m * (0.5 if name.startswith("openai") else 0.9),
            flags={"throttled": "SM clock 1830 of 1980 MHz"} if m > 999 else {},
        )
        for name, us in speeds.items()
        for m in tokens
    ]
    for size in (2, 4):
        pairs = [100 - 10 * rank for rank in range(size)]
        rows += [
            full("triton_mxfp4_bf16", m, (40 + m / 2) / size * (1 - 0.1 * rank), pairs=pairs, ep_size=size, ep_rank=rank)
            for m in tokens
            for rank in range(size)
        ]
    rows.append(untimed("cutlass_mxfp4_mxfp8", 1, "skipped", "needs sm100 for MXFP8 activations, this is sm90"))
    rows.append(untimed("marlin_mxfp4_bf16", 4, "cuda_error", "in phase check: an illegal memory access was encountered"))
    return rows


def hostile_run():
    """Every text that a record takes from elsewhere is an attack."""
    name = f"bad{HOSTILE}"
    rows = [full(each, m, us + m, flags={HOSTILE: HOSTILE}) for each, us in ((name, 30.0), ("good", 60.0)) for m in (1, 4, 16)]
    rows = [replace(row, device=HOSTILE, arch=HOSTILE, act_dtype=HOSTILE, facts={HOSTILE: HOSTILE}) for row in rows]
    routed = f"trace:{HOSTILE}.jsonl"
    rows += [replace(full(name, m, 30.0 + m, routing=routed), device=HOSTILE, arch=HOSTILE) for m in (1, 4)]
    return [*rows, untimed(name, 1, "failed", HOSTILE, routing=routed)]
