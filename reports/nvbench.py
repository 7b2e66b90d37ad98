"""A run as NVBench's JSON 1.0.0 with its binary sample files, as nvbench-compare reads it."""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from moebench.device import Device
from moebench.journal import Run, merge
from moebench.record import Record, Timing

Value = str | int | float | bool | None
Json = Value | list["Json"] | dict[str, "Json"]

# Always the same ones, so that the states of two files match.
AXES: dict[str, tuple[str, Callable[[Record], Value]]] = {
    "model": ("string", lambda record: record.case.model),
    "num_tokens": ("int64", lambda record: record.case.num_tokens),
    "top_k": ("int64", lambda record: record.case.top_k),
    "ep_size": ("int64", lambda record: record.case.ep_size),
    "ep_rank": ("int64", lambda record: record.case.ep_rank),
    "tp_size": ("int64", lambda record: record.case.tp_size),
    "tp_rank": ("int64", lambda record: record.case.tp_rank),
    "routing": ("string", lambda record: record.case.routing),
    "seed": ("int64", lambda record: record.case.seed),
    "round": ("int64", lambda record: record.round),
}
SAMPLES_TAG = "nv/json/bin:nv/cold/sample_times"


def export(run: Run, name: str) -> dict[str, bytes]:
    """The JSON and, beside it in NAME-bin/, one file of float32 seconds for each state.

    One benchmark for each backend and contract, whose name says both, since nvbench-compare pairs by name and two contracts are never
    compared. NVBench's tags say "cold" whatever the L2 was; the benchmark's name tells."""
    files: dict[str, bytes] = {}
    benchmarks: list[Json] = []
    for index, (title, records) in enumerate(_benchmarks(merge([run])).items()):
        states: list[Json] = []
        for record in records:
            samples_name = f"{name}-bin/{len(files)}.bin"
            if record.status == "ok" and record.timing:
                seconds = [sample * 1e-6 for sample in record.timing.samples_us]
                files[samples_name] = struct.pack(f"<{len(seconds)}f", *seconds)
            states.append(_state(record, samples_name))
        benchmarks.append({"name": title, "index": index, "devices": [0], "axes": _axes(records), "states": states})
    version: Json = {"major": 1, "minor": 0, "patch": 0, "string": "1.0.0"}
    root: Json = {
        "meta": {"argv": list(run.manifest.command), "version": {"json": version}},
        "devices": [_device(run.manifest.device)],
        "benchmarks": benchmarks,
    }
    return {name: json.dumps(root, allow_nan=False, indent=1).encode(), **files}


def _benchmarks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by benchmark. What has no time stands where its backend's times do, so that nvbench-compare finds it skipped, not gone:
    of a benchmark whose states differ it compares nothing."""
    usual: dict[tuple[str, str], str] = {}
    for record in records:
        if record.timing:
            usual.setdefault((record.backend, record.scope), _title(record))
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[_title(record) if record.timing else usual.get((record.backend, record.scope), _title(record))].append(record)
    return found


def _title(record: Record) -> str:
    timing = record.timing
    return "/".join([record.backend, record.scope, *([timing.clock, timing.l2 or "no-cache", record.contract_id] if timing else [])])


def _device(device: Device) -> Json:
    digits = re.fullmatch(r"sm(\d+)", device.arch)
    return {
        "id": 0,
        "name": device.name,
        "sm_version": int(digits[1]) * 10 if digits else 0,
        "sm_default_clock_rate": device.clock_mhz * 1_000_000,
        "number_of_sms": device.num_sms,
        "global_memory_size": device.memory_bytes,
        "l2_cache_size": device.l2_bytes,
    }


def _axes(records: Sequence[Record]) -> list[Json]:
    axes: list[Json] = []
    for name, (kind, value) in AXES.items():
        values = dict.fromkeys(str(value(record)) for record in records)
        listed: list[Json] = [{"input_string": text, "description": "", "value": text} for text in values]
        axes.append({"name": name, "type": kind, "flags": "", "values": listed})
    return axes


def _state(record: Record, samples_name: str) -> Json:
    values = {name: str(value(record)) for name, (_, value) in AXES.items()}
    timed = record.timing if record.status == "ok" else None
    return {
        "name": " ".join(["Device=0", *(f"{name}={text}" for name, text in values.items())]),
        "device": 0,
        "type_config_index": 0,
        "axis_values": [{"name": name, "type": AXES[name][0], "value": text} for name, text in values.items()],
        "summaries": _summaries(record, timed, samples_name) if timed else None,
        "is_skipped": timed is None,
        "skip_reason": None if timed else f"{record.status}: {record.reason}",
    }


def _summaries(record: Record, timing: Timing, samples_name: str) -> list[Json]:
    seconds = [sample * 1e-6 for sample in timing.samples_us]
    center, mean = timing.median_us * 1e-6, fmean(seconds)
    q1, q3 = (quartile * 1e-6 for quartile in timing.quartiles_us)
    gpu = "nv/cold/time/gpu/"
    found = [
        _summary("nv/cold/sample_size", "Samples", "sample_size", len(seconds)),
        _summary(f"{gpu}min", "Min GPU Time", "duration", min(seconds)),
        _summary(f"{gpu}max", "Max GPU Time", "duration", max(seconds)),
        _summary(f"{gpu}mean", "GPU Time", "duration", mean),
        _summary(f"{gpu}median", "Median GPU Time", "duration", center),
        _summary(f"{gpu}q1", "Q1 GPU Time", "duration", q1),
        _summary(f"{gpu}q3", "Q3 GPU Time", "duration", q3),
        _summary(f"{gpu}iqr/absolute", "IQR GPU Time", "duration", q3 - q1),
        _summary(f"{gpu}iqr/relative", "Relative IQR", "percentage", (q3 - q1) / center),
    ]
    if len(seconds) > 1:
        found += [
            _summary(f"{gpu}stdev/absolute", "Stdev GPU Time", "duration", stdev(seconds)),
            _summary(f"{gpu}stdev/relative", "Noise", "percentage", stdev(seconds) / mean),
        ]
    if record.telemetry:
        found.append(_summary("nv/cold/sm_clock_rate/mean", "Clock Rate", "frequency", record.telemetry.sm_mhz[1] * 1e6))
    if record.roofline:
        rate = (record.roofline.weight_bytes + record.roofline.activation_bytes) / center
        found.append(_summary("nv/cold/bw/global/bytes_per_second", "GlobalMem BW", "byte_rate", rate))
        found.append(_summary("nv/cold/bw/global/utilization", "BWUtil", "percentage", rate / record.roofline.bandwidth_bytes_s))
    binary: list[Json] = [
        {"name": "filename", "type": "string", "value": samples_name},
        {"name": "size", "type": "int64", "value": str(len(seconds))},
    ]
    found.append(
        {"tag": SAMPLES_TAG, "name": "Samples Times File", "hint": "file/sample_times", "hide": "Not needed in table.", "data": binary}
    )
    return found


def _summary(tag: str, name: str, hint: str, value: int | float) -> Json:
    """NVBench writes numbers as text."""
    kind = "int64" if isinstance(value, int) else "float64"
    return {"tag": tag, "name": name, "hint": hint, "data": [{"name": "value", "type": kind, "value": repr(value)}]}
