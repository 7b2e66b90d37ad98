"""What a case needs at least in bytes and multiplications, and what the device can do at most.

Bytes are what must cross the memory bus once: weights of the experts that get tokens, hidden states, ids and router weights in, the
output out. What lies between the two GEMMs is not among them, since a fused kernel need not write it; biases, activation and
weighted sum are not among the FLOP. Two questions are asked of them, with two answers:

- How near to the roof is a time? `roofline`, with roofs measured on this device (`moebench calibrate`) where there are any, else
  those of the data sheet. The compute roof is the dense matmul rate of the activation format: bf16 for bf16, FP8 for the 8-bit
  formats (bf16 where the device multiplies no FP8). It is the roof of the best matmul, not a law: a kernel better than the measured one
  has a share above 1.
- Is a time impossible? `impossible`, which asks the hardware only: the bandwidth of the data sheet, and what the tensor cores multiply in a
  clock. Other exact routes give no more: bf16 has 8 significant bits, so it is 2 FP8 or 4 FP4 numbers, at 2 and 4 times the rate."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from moebench.backend import ActDtype
from moebench.case import BLOCK, MODELS, Case
from moebench.device import Device
from moebench.realized import Realized
from moebench.record import L2State, Roofline

SCHEMA = "1.0"  # of a stored file of roofs
SLACK = 1.02  # of the data sheet's bandwidth and of time: a sheet rounds 3.938 TB/s to 3.9, and events tick in steps
IMPLAUSIBLE = 1.05  # times the data sheet: a measured roof above is a mistake of the measurement


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank must at least move and multiply for one batch."""

    weight_bytes: int  # codes, scales and biases of the experts that get tokens, once
    input_bytes: int  # hidden states, ids of all tokens, router weights of this rank's pairs
    output_bytes: int  # every token's row: a rank without pairs for it still writes zeros
    flop: float
    pairs: int
    hidden_size: int
    intermediate_size: int  # of this rank's shard

    @property
    def activation_bytes(self) -> int:
        return self.input_bytes + self.output_bytes


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What a device reaches at most."""

    bandwidth_bytes_s: float
    bf16_flop_s: float
    fp8_flop_s: float | None
    source: str

    def flop_s(self, act_dtype: ActDtype) -> float:
        return self.bf16_flop_s if act_dtype == "bf16" or self.fp8_flop_s is None else self.fp8_flop_s


@dataclass(frozen=True, kw_only=True)
class Nominal:
    """A row of a data sheet: dense rates, no sparsity."""

    bandwidth_bytes_s: float
    source: str
    bf16_flop_s: float | None = None  # None: nothing that could be confirmed, or no bound (see NOMINAL)
    fp8_flop_s: float | None = None

    @property
    def roof(self) -> Roof | None:
        if self.bf16_flop_s is None:
            return None
        return Roof(
            bandwidth_bytes_s=self.bandwidth_bytes_s,
            bf16_flop_s=self.bf16_flop_s,
            fp8_flop_s=self.fp8_flop_s,
            source=f"{self.source} (nominal)",
        )


def _sheet(tb_s: float, bf16_tflop_s: float | None, fp8_tflop_s: float | None, source: str) -> Nominal:
    return Nominal(
        bandwidth_bytes_s=tb_s * 1e12,
        bf16_flop_s=bf16_tflop_s * 1e12 if bf16_tflop_s else None,
        fp8_flop_s=fp8_tflop_s * 1e12 if fp8_tflop_s else None,
        source=source,
    )


# By the beginning of torch's device name, whole words, the longest wins: "NVIDIA H20" is no beginning of "NVIDIA H20-3e", which has
# faster memory. Where a sheet shows rates with sparsity, half of them is here.
NOMINAL: Mapping[str, Nominal] = {
    "NVIDIA A100-SXM4-40GB": _sheet(1.555, 312, None, "NVIDIA A100 Tensor Core GPU data sheet"),
    "NVIDIA A100-PCIE-40GB": _sheet(1.555, 312, None, "NVIDIA A100 Tensor Core GPU data sheet"),
    "NVIDIA A100-SXM4-80GB": _sheet(2.039, 312, None, "NVIDIA A100 Tensor Core GPU data sheet"),
    "NVIDIA A100 80GB PCIe": _sheet(1.935, 312, None, "NVIDIA A100 Tensor Core GPU data sheet"),
    "NVIDIA H100 80GB HBM3": _sheet(3.35, 989.4, 1978.9, "NVIDIA H100 Tensor Core GPU data sheet"),
    "NVIDIA H100 PCIe": _sheet(2.0, 756.5, 1513, "NVIDIA H100 Tensor Core GPU data sheet"),
    "NVIDIA H100 NVL": _sheet(3.9, 835.5, 1671, "NVIDIA H100 Tensor Core GPU data sheet"),
    "NVIDIA H200": _sheet(4.8, 989.4, 1978.9, "NVIDIA H200 Tensor Core GPU data sheet"),
    "NVIDIA H200 NVL": _sheet(4.8, None, None, "NVIDIA H200 Tensor Core GPU data sheet"),
    "NVIDIA H20": _sheet(4.0, 148, 296, "NVIDIA HGX H20 specifications"),
    "NVIDIA GH200 480GB": _sheet(4.0, None, None, "NVIDIA GH200 Grace Hopper Superchip data sheet"),  # 480 GB is the CPU's; HBM3
    "NVIDIA B200": _sheet(8.0, 2250, 4500, "NVIDIA DGX B200 data sheet"),  # an eighth of the system's 64 TB/s, 36 and 72 PFLOP/s
    "NVIDIA GB200": _sheet(8.0, 2500, 5000, "NVIDIA DGX SuperPOD GB200 data sheet"),  # a 72nd of 360 and 720 PFLOP/s
    "NVIDIA B300": _sheet(8.0, 2250, 4500, "NVIDIA HGX B300 specifications"),
    "NVIDIA L40S": _sheet(0.864, 362.05, 733, "NVIDIA L40S data sheet"),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": _sheet(1.792, 503.8, 1007.6, "NVIDIA RTX PRO 6000 Blackwell data sheet"),
    # Its published 209.5 bf16 TFLOP/s do not bound it: a matmul was seen at 224, and bare MMA instructions on zeros at 370.
    "NVIDIA GeForce RTX 5090": _sheet(1.792, None, None, "NVIDIA GeForce RTX 5090 specifications"),
}

# Dense bf16 FLOP of one SM in one clock: a data sheet's rate over SMs and boost clock (H100 SXM: 989.4e12 / 132 / 1.83e9). Sheets quote a
# clock that GPUs exceed (1830 MHz against 1980 on Hopper), so a bound needs the real one. Not sm103, whose FP4 is more than 4
# times its bf16, and not sm120, see the RTX 5090 above.
BF16_FLOP_PER_CLOCK: Mapping[str, int] = {"sm80": 2048, "sm89": 1024, "sm90": 4096, "sm100": 8192}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A measured rate: median of the samples with its 95 % interval, per second."""

    value: float
    low: float
    high: float
    samples: int
    sm_mhz: int | None = None  # clock of the SMs meanwhile, where NVML tells


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """What `moebench calibrate` measured on a device."""

    device: str
    arch: str
    measured: str  # the day, 2026-11-22
    torch: str
    copy_bytes_s: Rate  # bytes read plus bytes written
    read_bytes_s: Rate
    bf16_flop_s: Rate
    fp8_flop_s: Rate | None = None  # None where torch or the device has no FP8 matmul
    float32_flop_s: Rate | None = None  # CPUs, some of which multiply float32 faster than bf16

    @property
    def rates(self) -> dict[str, Rate]:
        found = {name: getattr(self, name) for name in RATES}
        return {name: rate for name, rate in found.items() if rate is not None}

    @property
    def roof(self) -> Roof:
        return Roof(
            bandwidth_bytes_s=max(self.copy_bytes_s.value, self.read_bytes_s.value),
            bf16_flop_s=max(rate.value for rate in (self.bf16_flop_s, self.float32_flop_s) if rate),
            fp8_flop_s=self.fp8_flop_s.value if self.fp8_flop_s else None,
            source=f"measured by moebench calibrate, {self.measured}",
        )


RATES = ("copy_bytes_s", "read_bytes_s", "bf16_flop_s", "fp8_flop_s", "float32_flop_s")


class RoofsError(Exception):
    """Roofs that cannot be believed; the message names the file or the rate, and the way out."""


def work(case: Case, realized: Realized) -> Work:
    """Of this rank's slice, at unpadded sizes.

    Hidden states count for as many tokens as the pairs of this rank need at least: without expert parallelism, all."""
    h, i = case.hidden_size, case.local_intermediate_size
    tokens, pairs = case.num_tokens, realized.local_pairs
    elements = 3 * h * i  # of an expert's w13 and w2
    # b2 is zero on every tensor-parallel rank but the first, so a backend need not even keep it there
    biases = 2 * i + (h if case.tp_rank == 0 else 0) if MODELS[case.model].bias else 0
    tokens_here = math.ceil(pairs / min(case.top_k, case.num_local_experts))
    return Work(
        weight_bytes=realized.active_experts * (elements // 2 + elements // BLOCK + 2 * biases),
        input_bytes=2 * tokens_here * h + 4 * tokens * case.top_k + 4 * pairs,
        output_bytes=2 * tokens * h,
        flop=float(2 * pairs * elements),
        pairs=pairs,
        hidden_size=h,
        intermediate_size=i,
    )


def padded_flop(work: Work, facts: Mapping[str, str | int | float]) -> float | None:
    """FLOP at the sizes a backend says it pads to, or None where it says nothing. Rows that fill up tiles are not known here."""
    hidden = _first_number(facts, "padded_hidden", "padded_hidden_size")
    intermediate = _first_number(facts, "padded_intermediate", "padded_intermediate_size")
    if hidden is None and intermediate is None:
        return None
    h = work.hidden_size if hidden is None else hidden
    i = work.intermediate_size if intermediate is None else intermediate
    return float(6 * work.pairs * h * i)


def roofline(work: Work, roof: Roof, act_dtype: ActDtype, l2: L2State | None, facts: Mapping[str, str | int | float]) -> Roofline:
    """The floor under a time of this work. Memory is a floor only where the cache was made cold: otherwise weights may come from it,
    on a CPU (l2 None) as well."""
    moved_us = (work.weight_bytes + work.activation_bytes) / roof.bandwidth_bytes_s * 1e6 if l2 == "cold" else 0.0
    computed_us = work.flop / roof.flop_s(act_dtype) * 1e6
    return Roofline(
        weight_bytes=work.weight_bytes,
        activation_bytes=work.activation_bytes,
        flop=work.flop,
        padded_flop=padded_flop(work, facts),
        floor_us=max(moved_us, computed_us),
        limiter="memory" if moved_us > computed_us else "compute",
        bandwidth_bytes_s=roof.bandwidth_bytes_s,
        flop_s=roof.flop_s(act_dtype),
        source=roof.source,
    )


def impossible(time_us: float, work: Work, device: Device, act_dtype: ActDtype, l2: L2State | None, max_sm_mhz: float = 0) -> str | None:
    """Why no kernel can have done this work on this device in this time, as a sentence, or None.

    Of the output, what fits the L2 need not have reached memory yet. max_sm_mhz: the highest clock the SMs may run at, else what
    the device says; a device that says nothing is asked about memory only."""
    sheet = nominal(device.name)
    if sheet is not None and l2 == "cold":
        moved = work.weight_bytes + work.input_bytes + max(0, work.output_bytes - device.l2_bytes)
        least_us = moved / sheet.bandwidth_bytes_s * 1e6
        if time_us * SLACK < least_us:
            return (
                f"{time_us:.2f} us is impossible: moving {moved / 1e6:.1f} MB takes at least {least_us:.2f} us at "
                f"{sheet.bandwidth_bytes_s / 1e12:.2f} TB/s ({sheet.source}); the call left work out, or the caches were not cold"
            )
    per_clock = BF16_FLOP_PER_CLOCK.get(device.arch, 0) * device.num_sms * (1 if act_dtype == "bf16" else 2)
    flop_s = per_clock * (max_sm_mhz or device.clock_mhz) * 1e6
    if flop_s and time_us * SLACK < work.flop / flop_s * 1e6:
        return (
            f"{time_us:.2f} us is impossible: {work.flop / 1e9:.1f} GFLOP take at least {work.flop / flop_s * 1e6:.2f} us on "
            f"{device.num_sms} SMs at {max_sm_mhz or device.clock_mhz:.0f} MHz; the call left work out"
        )
    return None


def nominal(device_name: str) -> Nominal | None:
    """The data sheet's row for what torch calls a device."""
    found = [name for name in NOMINAL if device_name == name or device_name.startswith(f"{name} ")]
    return NOMINAL[max(found, key=len)] if found else None


def best_roof(device_name: str) -> Roof | None:
    """Measured where there is a file, else the data sheet's, else None: then `moebench calibrate` makes one. Raises RoofsError."""
    measured = load_roofs(device_name)
    if measured is not None:
        return measured.roof
    sheet = nominal(device_name)
    return sheet.roof if sheet and " MIG " not in device_name else None  # a slice of a GPU has a share of its roofs


def roofs_path(device_name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(cache) / "moebench" / "roofs" / f"{slug}.json"


def load_roofs(device_name: str) -> Roofs | None:
    """What was measured on such a device, or None if nothing was. Raises RoofsError for a file that is not that."""
    path = roofs_path(device_name)
    try:
        found = roofs_from_dict(json.loads(path.read_bytes()))
        if found.device != device_name:
            raise ValueError(f"it is of {found.device!r}, not of {device_name!r}")
        if problem := implausible(found):
            raise ValueError(problem)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: JSON nested thousands deep
        raise RoofsError(f"{path} holds no usable roofs: {error}; delete it, or run: moebench calibrate") from None
    return found


def save_roofs(roofs: Roofs) -> Path:
    """Whole or not at all. Raises RoofsError for what load_roofs would not take, OSError where it cannot be written."""
    if problem := implausible(roofs):
        raise RoofsError(f"not stored: {problem}; run moebench calibrate again while nothing else uses the device")
    path = roofs_path(roofs.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(roofs_to_dict(roofs), allow_nan=False, indent=2) + "\n")
    temporary.replace(path)
    return path


def implausible(roofs: Roofs) -> str | None:
    """Which rate is above anything the device can do, as a sentence, or None."""
    sheet = nominal(roofs.device)
    for name, rate in roofs.rates.items():
        limit = nominal_rate(sheet, name) if sheet else None
        if limit is not None and rate.value > IMPLAUSIBLE * limit:
            share = f"{rate.value / limit:.2f} times the {limit:.4g} of its data sheet"
            return f"{name} = {rate.value:.4g} on {roofs.device} is {share}, and {IMPLAUSIBLE} is the most that can be true"
    return None


def nominal_rate(sheet: Nominal, name: str) -> float | None:
    """What a data sheet says of one of RATES."""
    both = {"copy_bytes_s": sheet.bandwidth_bytes_s, "read_bytes_s": sheet.bandwidth_bytes_s}
    return {**both, "bf16_flop_s": sheet.bf16_flop_s, "fp8_flop_s": sheet.fp8_flop_s}.get(name)


def roofs_to_dict(roofs: Roofs) -> dict[str, object]:
    return {"schema": SCHEMA, **asdict(roofs)}


def roofs_from_dict(row: object) -> Roofs:
    """Exactly what roofs_to_dict writes; raises ValueError for anything else."""
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    if row.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {row.get('schema')!r}, and this version reads {SCHEMA!r}")
    if different := set(row) ^ {"schema", *(field.name for field in fields(Roofs))}:
        raise ValueError(f"these fields are missing or unknown: {', '.join(sorted(map(str, different)))}")
    text: dict[str, str] = {}
    for name in ("device", "arch", "measured", "torch"):
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{name} = {row[name]!r} is not a text")
        text[name] = row[name]
    date.fromisoformat(text["measured"])
    optional = [name for name in ("fp8_flop_s", "float32_flop_s") if row[name] is None]
    rates = {name: _rate(name, row[name]) for name in RATES if name not in optional}
    return Roofs(
        device=text["device"],
        arch=text["arch"],
        measured=text["measured"],
        torch=text["torch"],
        copy_bytes_s=rates["copy_bytes_s"],
        read_bytes_s=rates["read_bytes_s"],
        bf16_flop_s=rates["bf16_flop_s"],
        fp8_flop_s=rates.get("fp8_flop_s"),
        float32_flop_s=rates.get("float32_flop_s"),
    )


def _rate(name: str, row: object) -> Rate:
    if not isinstance(row, dict) or set(row) != {field.name for field in fields(Rate)}:
        raise ValueError(f"{name} is not a rate with value, low, high, samples and sm_mhz")
    numbers = [_positive(f"{name}.{part}", row[part]) for part in ("low", "value", "high")]
    low, value, high = numbers
    if numbers != sorted(numbers):
        raise ValueError(f"{name}: its interval {low:.4g} to {high:.4g} does not contain its value {value:.4g}")
    samples = _positive(f"{name}.samples", row["samples"])
    sm_mhz = None if row["sm_mhz"] is None else _positive(f"{name}.sm_mhz", row["sm_mhz"])
    return Rate(value=value, low=low, high=high, samples=int(samples), sm_mhz=None if sm_mhz is None else int(sm_mhz))


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:  # NaN fails both comparisons
        raise ValueError(f"{name} = {value!r} is not a finite positive number")
    return float(value)


def _first_number(facts: Mapping[str, str | int | float], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := facts.get(name), int)), None)
