"""What we run on, as facts."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "flashinfer-python", "vllm", "cuda-bindings", "nvidia-cuda-nvrtc", "nvtx", "nvidia-ml-py")


@dataclass(frozen=True, kw_only=True)
class Device:
    """The accelerator of this machine, or its CPU where there is none."""

    arch: str  # "sm90", "sm100", "cpu"
    name: str
    torch: str | None  # what torch calls it, "cuda:0" or "cpu"; None where torch is not installed
    memory_bytes: int
    l2_bytes: int = 0
    num_sms: int = 0
    clock_mhz: int = 0
    driver: str = ""
    uuid: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.arch != "cpu"


def detect() -> Device:
    """Ask torch; imports it, so the supervisor asks a worker instead. Only a torch whose version says that it knows no GPU is not asked."""
    if "torch" not in sys.modules and versions().get("torch", "").endswith("+cpu"):
        return _cpu("cpu")  # importing it takes 3 s of a core
    try:
        import torch
    except ImportError:
        return _cpu(None)
    if not torch.cuda.is_available():
        return _cpu("cpu")
    facts = torch.cuda.get_device_properties(0)
    return Device(
        arch=f"sm{facts.major}{facts.minor}",
        name=facts.name,
        torch="cuda:0",
        memory_bytes=facts.total_memory,
        l2_bytes=facts.L2_cache_size,
        num_sms=facts.multi_processor_count,
        clock_mhz=int(getattr(facts, "clock_rate", 0) // 1000),
        driver=_driver(),
        uuid=str(getattr(facts, "uuid", "")),
        versions=versions() | {"cuda": torch.version.cuda or ""},
    )


def versions() -> dict[str, str]:
    """Installed versions of what can change a number, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version  # 40 ms, of no use to who reads about other machines

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu(torch: str | None) -> Device:
    return Device(arch="cpu", name=_cpu_name(), torch=torch, memory_bytes=_memory_bytes(), versions=versions())


def _cpu_name() -> str:
    lines = _read("/proc/cpuinfo")
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine() or "cpu")


def _memory_bytes() -> int:
    return next((int(line.split()[1]) * 1024 for line in _read("/proc/meminfo") if line.startswith("MemTotal")), 0)


def _driver() -> str:
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  ..."
    words = " ".join(_read("/proc/driver/nvidia/version")[:1]).split()
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
