"""What this machine has, as facts: asked of NVML, of torch and of the host, each by a child process, since each may hang.

`python -m moebench.machine FD PART` writes the facts of one part, one line of JSON, on the file descriptor FD. It sets nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, cast, get_args

from moebench.trace import INJECTED

Part = Literal["gpu", "host", "torch"]

WALK_S = 3.0  # for the size of one cache
PACKAGES = ("torch", "triton", "nvtx", "nvidia-ml-py", "flashinfer-python", "cupti-python")
ENVIRONMENT = ("CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "NVTX_DISABLE", "TRITON_INTERPRET", *INJECTED)
CAP_SYS_ADMIN = 21

# All that is ever asked of NVML; every name reads.
NVML_READS = frozenset(
    {
        "nvmlDeviceGetApplicationsClock",
        "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetCount",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetDefaultApplicationsClock",
        "nvmlDeviceGetEccMode",
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetMaxClockInfo",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetName",
        "nvmlDeviceGetPersistenceMode",
        "nvmlDeviceGetPowerManagementDefaultLimit",
        "nvmlDeviceGetPowerManagementLimit",
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetUtilizationRates",
        "nvmlSystemGetCudaDriverVersion",
        "nvmlSystemGetDriverVersion",
    }
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML sees it; None is what it does not tell."""

    index: int
    name: str
    arch: str | None = None
    memory_bytes: int = 0
    used_bytes: int = 0
    busy_percent: int | None = None
    processes: tuple[int, ...] | None = None  # ids; of other containers, none are seen
    sm_mhz: int | None = None
    sm_max_mhz: int | None = None
    memory_mhz: int | None = None
    memory_max_mhz: int | None = None
    set_mhz: int | None = None  # the application clock of the SMs
    default_mhz: int | None = None
    power_mw: int | None = None  # the cap
    power_default_mw: int | None = None
    event_reasons: int | None = None
    ecc: bool | None = None
    ecc_after_reset: bool | None = None
    corrected: int | None = None  # errors since the driver was loaded
    uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    persistence: bool | None = None
    mig: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Nvml:
    installed: bool = True  # nvidia-ml-py
    problem: str = ""
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # the newest that the driver knows
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Torch:
    version: str
    cuda: str = ""  # "13.0"; "" in a build for CPUs
    archs: tuple[str, ...] = ()  # "sm_90", "compute_120"
    available: bool = False
    problem: str = ""  # why it is not
    kineto: bool = False  # built with CUPTI
    traced: int | None = None  # kernels seen of those launched to be seen
    trace_problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Lock:
    path: str
    age_s: float
    holder: int | None = None  # a process; None for a lock that is the file itself


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory that is written to, or the nearest one above it that is there."""

    name: str
    path: str
    writable: bool
    file_system: str
    free_bytes: int
    variable: str = ""  # that moves it
    size_bytes: int | None = None  # None where nothing is there
    whole: bool = True  # the size is all of it, not what was added up in time
    locks: tuple[Lock, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tool:
    name: str
    path: str = ""
    version: str = ""
    on_path: bool = False


@dataclass(frozen=True, kw_only=True)
class Host:
    driver: str = ""  # of the kernel, whether or not NVML answers
    packages: Mapping[str, str]
    environment: Mapping[str, str]
    tools: Mapping[str, Tool]
    counters_for_admin_only: bool | None = None  # None without a driver
    sys_admin: bool = False
    runs: Place
    caches: tuple[Place, ...] = ()
    governor: str = ""
    cores: float
    all_cores: int
    memory_bytes: int


def main(pipe: BinaryIO, part: Part) -> None:
    """The child."""
    facts: Nvml | Torch | Host | None = ask_nvml() if part == "gpu" else ask_torch() if part == "torch" else ask_host()
    pipe.write(json.dumps(asdict(facts) if facts else None).encode() + b"\n")


# ---- in the child that asks NVML


def ask_nvml() -> Nvml:
    try:
        import pynvml
    except ImportError:
        return Nvml(installed=False, problem="nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
        driver = str(_read(pynvml, "nvmlSystemGetDriverVersion") or "")
        cuda = int(_read(pynvml, "nvmlSystemGetCudaDriverVersion") or 0)  # type: ignore[call-overload]  # pynvml has no types
        count = int(_read(pynvml, "nvmlDeviceGetCount") or 0)  # type: ignore[call-overload]
        gpus = tuple(_gpu(pynvml, index) for index in range(count))
    except pynvml.NVMLError as error:
        return Nvml(problem=str(error))
    return Nvml(driver=driver, cuda=(cuda // 1000, cuda % 1000 // 10), gpus=gpus)


def _gpu(nvml: ModuleType, index: int) -> Gpu:
    handle = _read(nvml, "nvmlDeviceGetHandleByIndex", index)

    def get(name: str, *arguments: object) -> object:
        return _read(nvml, f"nvmlDeviceGet{name}", handle, *arguments)

    def whole(name: str, *arguments: object) -> int | None:
        value = get(name, *arguments)
        return value if isinstance(value, int) else None

    def pair(name: str) -> tuple[bool | None, bool | None]:
        value = get(name)
        return (bool(value[0]), bool(value[1])) if isinstance(value, (list, tuple)) else (None, None)

    capability, rows, processes = get("CudaComputeCapability"), get("RemappedRows"), get("ComputeRunningProcesses")
    # version 2 counts what the driver reserves for itself apart; without it an idle H200 seems to be in use
    memory = get("MemoryInfo", nvml.nvmlMemory_v2) or get("MemoryInfo")
    ecc, ecc_after_reset = pair("EccMode")
    persistence, reasons = whole("PersistenceMode"), whole("CurrentClocksEventReasons")
    return Gpu(
        index=index,
        name=str(get("Name") or "unknown GPU"),
        arch=f"sm{capability[0]}{capability[1]}" if isinstance(capability, (list, tuple)) else None,
        memory_bytes=int(getattr(memory, "total", 0)),
        used_bytes=int(getattr(memory, "used", 0)),
        busy_percent=getattr(get("UtilizationRates"), "gpu", None),
        processes=tuple(int(process.pid) for process in processes) if isinstance(processes, list) else None,
        sm_mhz=whole("ClockInfo", nvml.NVML_CLOCK_SM),
        sm_max_mhz=whole("MaxClockInfo", nvml.NVML_CLOCK_SM),
        memory_mhz=whole("ClockInfo", nvml.NVML_CLOCK_MEM),
        memory_max_mhz=whole("MaxClockInfo", nvml.NVML_CLOCK_MEM),
        set_mhz=whole("ApplicationsClock", nvml.NVML_CLOCK_SM),
        default_mhz=whole("DefaultApplicationsClock", nvml.NVML_CLOCK_SM),
        power_mw=whole("PowerManagementLimit"),
        power_default_mw=whole("PowerManagementDefaultLimit"),
        event_reasons=reasons if reasons is not None else whole("CurrentClocksThrottleReasons"),  # its name in older drivers
        ecc=ecc,
        ecc_after_reset=ecc_after_reset,
        corrected=whole("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC),
        uncorrected=whole("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        remap_pending=bool(rows[2]) if isinstance(rows, tuple) else None,
        remap_failed=bool(rows[3]) if isinstance(rows, tuple) else None,
        persistence=None if persistence is None else bool(persistence),
        mig=pair("MigMode")[0],
    )


def _read(nvml: ModuleType, name: str, *arguments: object) -> object:
    """One fact; None where this GPU, driver or nvidia-ml-py does not have it."""
    assert name in NVML_READS, name
    function = getattr(nvml, name, None)
    if function is None:
        return None
    unanswered = (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_FunctionNotFound,
        nvml.NVMLError_InvalidArgument,
        nvml.NVMLError_NoPermission,
        nvml.NVMLError_ArgumentVersionMismatch,
    )
    try:
        value: object = function(*arguments)
    except unanswered:
        return None
    return value


# ---- in the child that asks torch


def ask_torch() -> Torch | None:
    """None where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    facts = Torch(
        version=str(torch.__version__),
        cuda=torch.version.cuda or "",
        archs=tuple(torch.cuda.get_arch_list()),
        available=available,
        problem=" ".join(str(warning.message).splitlines()[0] for warning in told)[:300],
    )
    return _traced(facts) if available else facts


def _traced(facts: Torch) -> Torch:
    """Whether Kineto sees kernels, tried on a few; the first use of CUDA too, which may say that it does not work."""
    import torch
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile, supported_activities

    try:
        numbers = torch.ones(8, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError as error:
        return replace(facts, available=False, problem=str(error).splitlines()[0])
    if ProfilerActivity.CUDA not in supported_activities():
        return facts
    if any(name in os.environ for name in INJECTED):
        return replace(facts, kineto=True)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            numbers.add_(1)
            torch.cuda.synchronize()
        seen = sum(event.device_type == DeviceType.CUDA for event in trace.events() or [])
    except RuntimeError as error:
        return replace(facts, kineto=True, trace_problem=str(error).splitlines()[0])
    return replace(facts, kineto=True, traced=seen)


# ---- in the child that looks at the host


def ask_host() -> Host:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, limit = _cgroup_limits(Path("/sys/fs/cgroup"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    restricted = re.search(r"RmProfilingAdminOnly: (\d)", _text("/proc/driver/nvidia/params"))
    driver = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _text("/proc/driver/nvidia/version"))
    capabilities = re.search(r"CapEff:\s*([0-9a-f]+)", _text("/proc/self/status"))
    return Host(
        driver=driver[1] if driver else "",
        packages={name: found for name in PACKAGES if (found := _version(name))},
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        tools={name: _tool(name) for name in ("nvcc", "nsys", "ncu")},
        counters_for_admin_only=restricted[1] == "1" if restricted else None,
        sys_admin=bool(capabilities and int(capabilities[1], 16) >> CAP_SYS_ADMIN & 1),
        runs=_place("results", "", Path.cwd() / "runs"),
        caches=tuple(_sized(_place(*cache)) for cache in _caches()),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        cores=min(cores, quota or cores),
        all_cores=os.cpu_count() or 1,
        memory_bytes=min(memory, limit or memory),
    )


def _caches() -> Iterator[tuple[str, str, Path]]:
    """Name, the variable that moves it, and where it is now."""
    env, home = os.environ, Path.home()
    cached = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    yield "Triton", "TRITON_CACHE_DIR", Path(env.get("TRITON_CACHE_DIR") or Path(env.get("TRITON_HOME") or home) / ".triton" / "cache")
    yield "FlashInfer", "FLASHINFER_WORKSPACE_BASE", Path(env.get("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer"
    yield "torch extensions", "TORCH_EXTENSIONS_DIR", Path(env.get("TORCH_EXTENSIONS_DIR") or cached / "torch_extensions")
    yield "CUDA", "CUDA_CACHE_PATH", Path(env.get("CUDA_CACHE_PATH") or home / ".nv" / "ComputeCache")
    yield "moebench", "XDG_CACHE_HOME", cached / "moebench"


def _place(name: str, variable: str, path: Path) -> Place:
    there = path
    while not there.exists():
        there = there.parent
    return Place(
        name=name,
        path=str(path),
        variable=variable,
        writable=os.access(there, os.W_OK | os.X_OK),
        file_system=_file_system(there.resolve(), _text("/proc/self/mountinfo")),
        free_bytes=shutil.disk_usage(there).free,
    )


def _sized(place: Place) -> Place:
    """With what it holds, as far as WALK_S reaches."""
    if not Path(place.path).is_dir():
        return place
    until, size, locks = time.monotonic() + WALK_S, 0, []
    held = _held_locks(_text("/proc/locks"))
    for folder, _, names in os.walk(place.path):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):  # caches change while they are looked at
                facts = path.lstat()
                size += facts.st_size
                age_s = time.time() - facts.st_mtime
                if (holder := held.get((facts.st_dev, facts.st_ino))) is not None:
                    locks.append(Lock(path=str(path), age_s=age_s, holder=holder))
                elif name == "lock" and place.name == "torch extensions":  # torch's FileBaton: it is locked while the file is there
                    locks.append(Lock(path=str(path), age_s=age_s))
        if time.monotonic() > until:
            return replace(place, size_bytes=size, whole=False, locks=tuple(locks))
    return replace(place, size_bytes=size, locks=tuple(locks))


def _held_locks(told: str) -> dict[tuple[int, int], int]:
    """/proc/locks, "1: FLOCK  ADVISORY  WRITE 1234 08:01:131104 0 EOF", as (device, inode) to process."""
    found = re.findall(r"^\d+: FLOCK\s+\S+\s+\S+\s+(-?\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ", told, re.MULTILINE)
    return {(os.makedev(int(major, 16), int(minor, 16)), int(inode)): int(pid) for pid, major, minor, inode in found}


def _file_system(path: Path, mounts: str) -> str:
    """The type of the innermost mount that holds path: "36 35 98:0 / /mnt rw - ext4 /dev/root rw"."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        where = left.split()[4].replace("\\040", " ")
        if path.is_relative_to(where) and len(where) >= best:  # of two mounts on one point, the later covers the earlier
            best, kind = len(where), right.split()[0]
    return kind


def _cgroup_limits(root: Path) -> tuple[float | None, int | None]:
    """Cores and bytes that a container may use (cgroup v2), where they are limited."""
    quota, _, period = _text(root / "cpu.max").partition(" ")
    memory = _text(root / "memory.max").strip()
    return int(quota) / int(period) if quota.isdigit() else None, int(memory) if memory.isdigit() else None


def _tool(name: str) -> Tool:
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    found = shutil.which(name)
    places = [*(Path(home) / "bin" / name for home in homes), *([Path(found)] if found else []), Path("/usr/local/cuda/bin", name)]
    places += sorted(Path("/opt/nvidia").glob(f"nsight-*/*/bin/{name}"), reverse=True)
    places += sorted(Path("/opt/nvidia").glob(f"nsight-*/*/{name}"), reverse=True)
    path = next((place for place in places if os.access(place, os.X_OK) and place.is_file()), None)
    if path is None:
        return Tool(name=name)
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    number = re.findall(r"(?:[Rr]elease|[Vv]ersion) (\d[\d.]*\d)", told)
    return Tool(name=name, path=str(path), version=number[-1] if number else "", on_path=found is not None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    number, asked = sys.argv[1:]
    assert asked in get_args(Part), asked
    with open(int(number), "wb") as opened:  # noqa: PTH123  a file descriptor
        main(opened, cast(Part, asked))
