"""A run as the CSV that FlashInfer's benchmarks write, for tools that read those."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import StringIO
from statistics import stdev

from moebench.journal import Run, merge
from moebench.record import Record, Timing
from moebench.reports.reproduce import command

Value = str | int | float | bool

# The groups perf, moe and general of output_column_dict in FlashInfer's benchmarks/routines/flashinfer_benchmark_utils.py, in its
# order; columns that do not apply here are left out, and none is twice as in theirs (csv.DictReader would keep the empty one).
COLUMNS: dict[str, Callable[[Record, Timing], Value]] = {
    "routine": lambda record, timing: f"moebench_{record.scope}",
    "median_time": lambda record, timing: timing.median_us / 1e3,  # ms
    "std_time": lambda record, timing: stdev(timing.samples_us) / 1e3 if len(timing.samples_us) > 1 else 0.0,  # ms
    "tflops": lambda record, timing: record.roofline.flop / timing.median_us / 1e6 if record.roofline else "",
    "tb_per_sec": lambda record, timing: _bytes(record) / timing.median_us / 1e6 if record.roofline else "",
    "backend": lambda record, timing: record.backend,
    "resolved_backend": lambda record, timing: record.backend,
    "num_tokens": lambda record, timing: record.case.num_tokens,
    "intermediate_size": lambda record, timing: record.case.intermediate_size,
    "num_experts": lambda record, timing: record.case.num_experts,
    "top_k": lambda record, timing: record.case.top_k,
    "local_expert_offset": lambda record, timing: record.case.local_expert_start,
    "local_num_experts": lambda record, timing: record.case.num_local_experts,
    "routing_method": lambda record, timing: record.case.routing,
    "weight_dtype": lambda record, timing: "mxfp4",
    "fp4_mode": lambda record, timing: f"mxfp4_{record.act_dtype}",
    "tp_size": lambda record, timing: record.case.tp_size,
    "tp_rank": lambda record, timing: record.case.tp_rank,
    "ep_size": lambda record, timing: record.case.ep_size,
    "ep_rank": lambda record, timing: record.case.ep_rank,
    "hidden_size": lambda record, timing: record.case.hidden_size,
    "input_dtype": lambda record, timing: "bfloat16",
    "out_dtype": lambda record, timing: "bfloat16",
    "quant_dtype": lambda record, timing: record.act_dtype,
    "refcheck": lambda record, timing: record.error is not None,
    "no_cuda_graph": lambda record, timing: timing.clock != "cuda_graph",
    "use_cupti": lambda record, timing: False,
    "random_seed": lambda record, timing: record.case.seed,
    "case_tag": lambda record, timing: f"{record.run_id} round {record.round} contract {record.contract_id}",
    "repro_command": lambda record, timing: command(record),
}


def export(run: Run, name: str) -> dict[str, bytes]:
    """One row for each record that has a time; FlashInfer writes none for what failed."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in merge([run]):
        if record.status == "ok" and record.timing:
            writer.writerow([value(record, record.timing) for value in COLUMNS.values()])
    return {name: text.getvalue().encode()}


def _bytes(record: Record) -> int:
    return record.roofline.weight_bytes + record.roofline.activation_bytes if record.roofline else 0
