"""A run as Google Benchmark's JSON, as its compare.py reads it."""

from __future__ import annotations

import json
from collections import defaultdict

from moebench.journal import Run, merge
from moebench.record import Record


def export(run: Run, name: str) -> dict[str, bytes]:
    """One repetition for each round, its median: compare.py tests repetitions against each other as if they were independent, and
    samples of one process are not.

    What has no time is left out, since compare.py would read a failure as a time of zero."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in merge([run]):
        if record.status == "ok" and record.timing:
            groups[_name(record)].append(record)
    entries = [
        {
            "name": title,
            "family_index": family,
            "per_family_instance_index": 0,
            "run_name": title,
            "run_type": "iteration",
            "repetitions": len(records),
            "repetition_index": index,
            "threads": 1,
            "iterations": len(record.timing.samples_us) * record.timing.calls_per_region,
            "real_time": record.timing.median_us,
            "cpu_time": record.timing.median_us,  # compare.py needs both; there is one time, the GPU's
            "time_unit": "us",
            "label": record.case.label,
        }
        for family, (title, records) in enumerate(groups.items())
        for index, record in enumerate(sorted(records, key=lambda record: record.round))
        if record.timing
    ]
    device = run.manifest.device
    context = {
        "date": run.manifest.started,
        "host_name": "",
        "executable": " ".join(run.manifest.command),
        "num_cpus": 0,
        "mhz_per_cpu": 0,
        "cpu_scaling_enabled": False,
        "caches": [],
        "load_avg": [],
        "library_build_type": "release",
        "json_schema_version": 1,
        "device": device.name,
        "driver": device.driver,
        "run_id": run.manifest.run_id,
    }
    return {name: json.dumps({"context": context, "benchmarks": entries}, allow_nan=False, indent=1).encode()}


def _name(record: Record) -> str:
    """What compare.py matches by: the case in full, the scope and the contract, so that no two times are paired that mean different
    things."""
    case = record.case
    spread = [("ep", case.ep_size, case.ep_rank), ("tp", case.tp_size, case.tp_rank)]
    parts = [record.backend, record.scope, case.model, f"num_tokens:{case.num_tokens}", f"top_k:{case.top_k}"]
    parts += [f"{name}:{rank}_of_{size}" for name, size, rank in spread]
    return "/".join([*parts, case.routing, f"seed:{case.seed}", record.contract_id])
