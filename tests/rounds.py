"""Makes runs of several rounds with times that a test chooses."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from moebench.case import Case, case
from moebench.device import Device
from moebench.journal import JOURNAL, Run, write_manifest
from moebench.journal import _line as line
from moebench.realized import Realized
from moebench.record import Canary, Contract, Error, Kernel, L2Proof, Manifest, Record, Telemetry, Timing

CONTRACT = Contract(
    scope="experts",
    inside="from ids and weights to the weighted sum",
    clock="cuda_graph",
    l2="cold",
    l2_method="rotation",
    warmup="none",
    rank_aggregate="none",
    reference="torch_experts 1",
)
DEVICE = Device(
    arch="sm90",
    name="NVIDIA H200",
    torch="cuda:0",
    memory_bytes=140 << 30,
    l2_bytes=60 << 20,
    num_sms=132,
    clock_mhz=1980,
    driver="580.159",
)
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
ERROR = Error(rel_l2=0.002, worst=0.01, worst_token=0, worst_column=0, max_abs=0.1, rel_l2_tolerance=0.01, worst_tolerance=0.1)
ROUTING = Realized(active_experts=8, empty_experts=24, local_pairs=32, load_max_over_mean=1.5, pairs_per_rank=(32,), sha256="0" * 64)
PROOF = L2Proof(token_sets=8, weight_copies=1, bytes_between_uses=360 << 20, l2_bytes=60 << 20)


def record(of: Case, number: int, us: float, *, backend: str = "triton_mxfp4_bf16", samples: int = 5, minute: int = 0, **changes) -> Record:
    """An ok row of one round whose median is `us`."""
    spread = range(-(samples // 2), samples - samples // 2)
    timing = Timing(
        samples_us=tuple(us * (1 + 0.001 * k) for k in spread),
        clock="cuda_graph",
        l2="cold",
        l2_method="calls rotate over other experts and weight copies",
        warmup_calls=10,
        stop_reason="interval",
        proof=PROOF,
        window_s=(1.0, 2.0),
    )
    row = Record(
        case=of,
        backend=backend,
        act_dtype="bf16",
        arch="sm90",
        device=DEVICE.name,
        status="ok",
        error=ERROR,
        timing=timing,
        routing=ROUTING,
        facts={"padded_hidden_size": 2944, "tactic": 7},
        kernels=(Kernel(name="moe_gemm", count=2), Kernel(name="finalize", count=1)),
        round=number,
        contract=CONTRACT,
        telemetry=TELEMETRY,
        canary=Canary(before_us=120.0, after_us=120.1, matmul_us=25.0),
        run_id="r",
        time=f"2026-01-01T00:{minute + number:02}:00.000+00:00",
    )
    return replace(row, **changes)


@cache
def cases(count: int) -> tuple[Case, ...]:
    return tuple(case("gpt-oss-20b", 1 + n % 500, seed=n // 500) for n in range(count))


def run(path: Path, records: list[Record], device: Device = DEVICE) -> Run:
    """Written as a sweep writes it."""
    path.mkdir(parents=True)
    manifest = Manifest(
        run_id=path.name,
        started="2026-01-01T00:00:00+00:00",
        command=("moebench", "sweep"),
        device=device,
        plan={},
        plan_hash="0" * 16,
        versions={"moebench": "0.1"},
    )
    write_manifest(path, manifest)
    (path / JOURNAL).write_bytes(b"".join(map(line, records)))
    return Run(path=path, manifest=manifest, records=tuple(records))


def rows(count: int, rounds: int, us: Callable[[int, int], float], **changes) -> list[Record]:
    """A row for each case and round; us(cell, round) is its median."""
    return [record(of, number, us(cell, number), **changes) for number in range(rounds) for cell, of in enumerate(cases(count))]
