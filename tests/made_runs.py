"""Records, runs and run directories made by hand, for tests that compare, choose and export."""

from dataclasses import replace
from pathlib import Path

from moebench.case import case
from moebench.device import Device
from moebench.journal import Journal, Run, write_manifest
from moebench.realized import Realized
from moebench.record import Error, Manifest, Record, Timing

ERROR = Error(rel_l2=1.8e-3, worst=0.01, worst_token=3, worst_column=17, max_abs=0.25, rel_l2_tolerance=5e-3, worst_tolerance=0.05)
H200 = Device(
    arch="sm90",
    name="NVIDIA H200",
    torch="cuda:0",
    memory_bytes=140 << 30,
    l2_bytes=60 << 20,
    num_sms=132,
    clock_mhz=1980,
    driver="580.159.04",
    versions={"torch": "2.13.0"},
)


def timing(median_us, *, spread=0.01, samples=21, **changed):
    """Samples that go up and down by turns around their median, so that neighbours do not resemble each other."""
    half = samples // 2
    offsets = [0, *(step * side for step in range(1, half + 1) for side in (1, -1))]
    values = {"clock": "cuda_graph", "l2": "cold", "l2_method": "256 MiB read before each sample", "warmup_calls": 5} | changed
    return Timing(samples_us=tuple(median_us * (1 + spread * offset / max(half, 1)) for offset in offsets[:samples]), **values)


def timed(backend, num_tokens, median_us, *, how=None, model="gpt-oss-20b", record=None, **case_fields):
    """An ok row; how: of its timing, record: other fields."""
    made = Record(
        case=case(model, num_tokens, **case_fields),
        backend=backend,
        act_dtype="bf16",
        arch="sm90",
        device="NVIDIA H200",
        status="ok",
        error=ERROR,
        timing=timing(median_us, **(how or {})),
        routing=Realized(
            active_experts=4, empty_experts=28, local_pairs=4 * num_tokens, load_max_over_mean=1.5, pairs_per_rank=(4,), sha256="ab"
        ),
        prepare_s=1.25,
        run_id="r1",
        time="2026-11-22T00:00:00+00:00",
    )
    return replace(made, **(record or {}))


def untimed(backend, num_tokens, status, reason, *, record=None, **case_fields):
    return replace(
        timed(backend, num_tokens, 1.0, **case_fields),
        status=status,
        reason=reason,
        timing=None,
        error=None,
        routing=None,
        **(record or {}),
    )


def rounds(backend, num_tokens, medians_us, **more):
    return [timed(backend, num_tokens, us, record={"round": number}, **more) for number, us in enumerate(medians_us)]


def run(*records, device=H200, path="r1", **changed):
    values = {"run_id": "r1", "started": "2026-11-22T00:00:00+00:00", "command": ("moebench", "sweep"), "device": device}
    manifest = Manifest(plan={}, plan_hash="abcdef", **(values | {"versions": {"moebench": "0.1.0"}} | changed))
    return Run(path=Path(path), manifest=manifest, records=records)


def write_run(path, *records, **changed):
    """The directory of such a run."""
    path.mkdir(parents=True)
    write_manifest(path, run(**changed).manifest)
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    return path
