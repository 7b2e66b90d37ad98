"""What of this machine stands in the way of measuring: findings that follow from facts, which children gather within time limits.

NVML and torch are asked in processes of their own, since a driver that hangs takes along whoever calls it."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal, get_args

from moebench import registry
from moebench.case import case
from moebench.device import Device
from moebench.machine import Gpu, Host, Lock, Nvml, Part, Place, Tool, Torch
from moebench.plan import ARCHS
from moebench.trace import INJECTED

Status = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = get_args(Status)
TOPICS = ("GPU", "profilers", "backends", "caches", "host")

# Importing torch took 3 s on two cores; a cold file system or the first CUDA context of a large machine takes far longer.
LIMITS_S: dict[Part, float] = {"gpu": 30, "host": 60, "torch": 120}
ROOT = Path(__file__).parents[1]  # so that a child of a bare checkout finds moebench from any working directory

# Bits of the clocks event reasons (nvml.h): those that make a time worse than this GPU's, and what each is.
IDLE, CLOCKS_SET = 0x1, 0x2
SLOWED = {
    0x4: "the power cap",
    0x8: "a hardware slowdown",
    0x20: "the temperature (software)",
    0x40: "the temperature (hardware)",
    0x80: "an external power brake",
    0x200: "a board limit",
    0x400: "a reliability limit",
}
NETWORK = re.compile(r"nfs|cifs|smb|lustre|ceph|gpfs|beegfs|afs|9p|glusterfs|fuse\.(?!overlay|snapfuse)|wekafs")
WHEELS = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 6), "cu126"))  # CUDA that a driver must know, and torch's index for it
STALE_S = 600.0  # older than this it was left behind: the lock of a torch extension is a file, which outlives a killed compiler
BUSY_BYTES, BUSY_PERCENT = 512 * 2**20, 5  # of a GPU that nobody uses, less is seen
LOW_DISK_BYTES, NO_DISK_BYTES = 5 * 2**30, 200 * 2**20
UNIT_BYTES = 6 * 2**30  # what compiling one unit of FlashInfer's takes


@dataclass(frozen=True, kw_only=True)
class Silence:
    """A part that gave no facts, and why."""

    reason: str
    hung: bool = False


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why a backend cannot run on an architecture until something is installed."""

    backend: str
    arch: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    gpu: Nvml | Silence
    torch: Torch | Silence
    host: Host | Silence
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    topic: str
    check: str
    status: Status
    text: str
    do: str = ""  # what would make it ok


def findings(facts: Facts) -> list[Finding]:
    """All of them; of two with one status the earlier is the more important."""
    host = facts.host
    found = [*_driver(facts), *_torch(facts), *_gpus(facts)]
    if isinstance(host, Silence):
        return [*found, Finding(topic="host", check="host", status="fail", text=f"the host could not be looked at: {host.reason}")]
    return [*found, *_environment(facts, host), *_profilers(facts, host), *_backends(facts, host), *map(_cache, host.caches), *_host(host)]


def foremost(found: Sequence[Finding]) -> Finding | None:
    """The one to do something about first."""
    return next((finding for status in ("fail", "warn") for finding in found if finding.status == status), None)


def gather() -> Facts:
    host = _start("host")  # beside the others, which follow each other: torch's context would be a stranger to NVML
    try:
        gpu = _gpu_facts(_answer(_start("gpu"), LIMITS_S["gpu"]))
        if isinstance(gpu, Silence) and gpu.hung:
            torch: Torch | Silence = Silence(reason="it was not asked, since the driver does not answer")
        else:
            torch = _torch_facts(_answer(_start("torch"), LIMITS_S["torch"]))
    except BaseException:  # Ctrl-C above all
        _end(host)
        raise
    return Facts(gpu=gpu, torch=torch, host=_host_facts(_answer(host, LIMITS_S["host"])), missing=tuple(_missing()))


# ---- rules


def _driver(facts: Facts) -> Iterator[Finding]:
    gpu, loaded = facts.gpu, facts.host.driver if isinstance(facts.host, Host) else ""

    def say(status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="GPU", check="driver", status=status, text=text, do=do)

    if isinstance(gpu, Silence):
        yield say(
            "fail",
            f"the NVIDIA driver cannot be asked: {gpu.reason}",
            "look for lines with Xid in dmesg; whatever uses the GPU may hang until it is reset or the machine is restarted",
        )
    elif loaded and not gpu.installed:
        yield say("warn", f"{loaded}; without nvidia-ml-py nothing about the GPU can be asked", "pip install nvidia-ml-py")
    elif loaded and (gpu.problem or not gpu.gpus):
        why = f"NVML says: {gpu.problem}" if gpu.problem else "it shows no GPU"
        do = "start a container with --gpus all; elsewhere look for NVRM lines in dmesg, and restart after a driver update"
        yield say("fail", f"{loaded} is loaded, but {why}", do)
    elif gpu.problem or not gpu.gpus:
        text = "there is none here; the references and small cases in Triton's interpreter run, and their times say nothing about a GPU"
        yield say("warn", text, "measure on a machine with an NVIDIA GPU")
    else:
        yield say("ok", f"{gpu.driver}, for CUDA up to {_dotted(gpu.cuda)}")


def _torch(facts: Facts) -> Iterator[Finding]:
    torch, known = facts.torch, _gpus_of(facts)
    driver_hangs = isinstance(facts.gpu, Silence) and facts.gpu.hung
    cuda = facts.gpu.cuda if isinstance(facts.gpu, Nvml) else (0, 0)
    index = next((name for least, name in WHEELS if cuda >= least), WHEELS[-1][1])
    install = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}"

    def say(status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="GPU", check="torch", status=status, text=text, do=do)

    if isinstance(torch, Silence):
        if isinstance(facts.host, Host) and "torch" not in facts.host.packages:
            yield say("fail", "torch is not installed, and no backend but numpy runs without it", install if known else "pip install torch")
        else:
            do = "" if driver_hangs else "see what this does: python -c 'import torch; torch.zeros(1).cuda()'"
            yield say("fail", f"torch cannot be asked: {torch.reason}", do)
    elif not torch.cuda and known:
        yield say("warn", f"{torch.version} is a build for CPUs, so the GPU is not used", install)
    elif not torch.cuda:
        yield say("ok", f"{torch.version}, a build for CPUs")
    elif known and cuda[0] and int(torch.cuda.split(".")[0]) > cuda[0]:
        yield say(
            "fail", f"{torch.version} needs a driver for CUDA {torch.cuda}, this one knows {_dotted(cuda)}", f"update it, or {install}"
        )
    elif known and not torch.available:
        do = "look at CUDA_VISIBLE_DEVICES, and see what this does: python -c 'import torch; torch.zeros(1).cuda()'"
        yield say("fail", f"{torch.version} (CUDA {torch.cuda}) cannot use the GPU: {torch.problem or 'it does not say why'}", do)
    elif strange := [gpu for gpu in known if gpu.arch and not _runs_on(torch.archs, gpu.arch)]:
        text = f"{torch.version} holds no code for {strange[0].arch} ({strange[0].name}); it was built for {', '.join(torch.archs)}"
        yield say("fail", text, "install a torch that was built for this GPU")
    else:
        yield say("ok", f"{torch.version}, CUDA {torch.cuda}")


def _gpus(facts: Facts) -> Iterator[Finding]:
    known = _gpus_of(facts)
    for rule in (_model, _memory_errors, _other_work, _mig, _event_reasons, _clocks, _power, _persistence):
        yield from _for_each(rule, known)


def _model(gpu: Gpu) -> Finding:
    text = f"{gpu.name}, {gpu.arch or 'unknown architecture'}, {_size(gpu.memory_bytes)}"
    if gpu.arch in ARCHS:
        return _gpu_finding("model", "ok", text)
    return _gpu_finding("model", "warn", f"{text}; no backend was made for it", f"known architectures: {', '.join(ARCHS)}")


def _other_work(gpu: Gpu) -> Finding:
    processes = gpu.processes or ()
    told = [f"{_size(gpu.used_bytes)} of memory in use", *([f"{gpu.busy_percent} % busy"] if gpu.busy_percent is not None else [])]
    if processes:
        told.append(f"{_count(len(processes), 'process')} ({', '.join(map(str, processes[:8]))}{', ...' if len(processes) > 8 else ''})")
    text = ", ".join(told)
    if processes or gpu.used_bytes > BUSY_BYTES or (gpu.busy_percent or 0) > BUSY_PERCENT:
        return _gpu_finding("other work", "warn", f"{text}: it is shared now, and times would be too", "end the other work, or wait for it")
    return _gpu_finding("other work", "ok", f"none seen; {text}")


def _clocks(gpu: Gpu) -> Finding:
    sm = f"SM {_of(gpu.sm_mhz, gpu.sm_max_mhz)}, memory {_of(gpu.memory_mhz, gpu.memory_max_mhz)} MHz"
    text = f"{sm}{', idle' if (gpu.event_reasons or 0) & IDLE else ''}"
    do = "its administrator can undo it: nvidia-smi -rgc and -rac; until then compare only with times taken at these clocks"
    if gpu.set_mhz and gpu.default_mhz and gpu.set_mhz != gpu.default_mhz:
        return _gpu_finding("clocks", "warn", f"set to {gpu.set_mhz} MHz, the default is {gpu.default_mhz}; {text}", do)
    if (gpu.event_reasons or 0) & CLOCKS_SET:
        return _gpu_finding("clocks", "warn", f"held by a locked or application clock; {text}", do)
    return _gpu_finding("clocks", "ok", text)


def _event_reasons(gpu: Gpu) -> Finding:
    if gpu.event_reasons is None:
        return _gpu_finding("slowdown", "ok", "not told by this GPU")
    active = [name for bit, name in SLOWED.items() if gpu.event_reasons & bit]
    if active:
        text = f"clocks are held down now by {' and '.join(active)}"
        return _gpu_finding("slowdown", "warn", text, "let it cool and be idle, then look again: nvidia-smi -q -d PERFORMANCE")
    return _gpu_finding("slowdown", "ok", "nothing holds the clocks down now")


def _power(gpu: Gpu) -> Finding:
    if gpu.power_mw is None or gpu.power_default_mw is None:
        return _gpu_finding("power cap", "ok", "not told by this GPU")
    text = f"{gpu.power_mw / 1000:.0f} W, the default is {gpu.power_default_mw / 1000:.0f} W"
    if gpu.power_mw < gpu.power_default_mw:
        do = "compare only with times taken under this cap; its administrator can raise it with nvidia-smi -pl"
        return _gpu_finding("power cap", "warn", f"{text}: long points will be slower", do)
    return _gpu_finding("power cap", "ok", text)


def _memory_errors(gpu: Gpu) -> Finding:
    if gpu.uncorrected:
        text = f"{_count(gpu.uncorrected, 'uncorrected error')} since the driver was loaded: its results cannot be trusted"
        return _gpu_finding("ECC", "fail", text, "use another GPU, and have this one reset or replaced")
    if gpu.remap_failed:
        return _gpu_finding("ECC", "fail", "a broken row of memory could not be replaced by a spare one", "have this GPU replaced")
    if gpu.remap_pending:
        return _gpu_finding("ECC", "warn", "broken rows of memory wait for a reset to be replaced", "have this GPU reset")
    if gpu.ecc is None:
        return _gpu_finding("ECC", "ok", "not told by this GPU")
    if gpu.ecc_after_reset is not None and gpu.ecc_after_reset != gpu.ecc:
        text = f"{_on(gpu.ecc)} now, {_on(gpu.ecc_after_reset)} after the next reset; memory and its speed change with it"
        return _gpu_finding("ECC", "warn", text, "have this GPU reset before you measure")
    if not gpu.ecc:
        do = "compare only with GPUs that have it off too; its administrator can turn it on with nvidia-smi -e 1"
        return _gpu_finding("ECC", "warn", "off: wrong bits go unseen, and memory is not as on GPUs that have it on", do)
    return _gpu_finding("ECC", "ok", f"on, {_count(gpu.corrected or 0, 'corrected error')}, none uncorrected")


def _persistence(gpu: Gpu) -> Finding:
    if gpu.persistence is False:
        text = "off: the driver is set up anew, with clocks at rest, for each process that is alone on the GPU"
        return _gpu_finding("persistence", "warn", text, "have nvidia-persistenced started")
    return _gpu_finding("persistence", "ok", "on" if gpu.persistence else "not told by this GPU")


def _mig(gpu: Gpu) -> Finding:
    if gpu.mig:
        text = "on: what is measured is a slice of this GPU, and what runs on the other slices"
        return _gpu_finding("MIG", "warn", text, "use a GPU that has it off; compare with nothing but the same slice")
    return _gpu_finding("MIG", "ok", "off" if gpu.mig is False else "this GPU has none")


def _environment(facts: Facts, host: Host) -> Iterator[Finding]:
    told = host.environment
    found = [name for name in INJECTED if name in told]
    wrong: list[tuple[str, str]] = []
    if _gpus_of(facts):
        if told.get("TRITON_INTERPRET") == "1":
            wrong.append(("TRITON_INTERPRET=1 runs Triton kernels on the CPU", "unset TRITON_INTERPRET"))
        if told.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
            wrong.append(("CUDA_LAUNCH_BLOCKING makes each launch wait for its end", "unset CUDA_LAUNCH_BLOCKING"))
        if told.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            wrong.append(("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES"))
    if told.get("NVTX_DISABLE"):
        wrong.append(("NVTX_DISABLE hides our ranges from profilers", "unset NVTX_DISABLE"))
    if found:
        wrong.append((f"a profiler is attached ({found[0]}): kernels are not traced, and times are not those of a plain run", ""))
    for text, do in wrong:
        yield Finding(topic="host", check="environment", status="warn", text=text, do=do)
    if not wrong:
        seen = told.get("CUDA_VISIBLE_DEVICES")
        text = f"CUDA_VISIBLE_DEVICES={seen}; its first is used" if seen else "no variable is set that changes what is measured"
        yield Finding(topic="host", check="environment", status="ok", text=text)


def _profilers(facts: Facts, host: Host) -> Iterator[Finding]:
    known = _gpus_of(facts)

    def say(check: str, status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="profilers", check=check, status=status, text=text, do=do)

    torch = facts.torch
    if isinstance(torch, Torch) and torch.available:
        if not torch.kineto:
            yield say("Kineto", "warn", "this torch was built without CUPTI, so no kernel is traced", "install one from pytorch.org")
        elif torch.trace_problem:
            yield say(
                "Kineto", "warn", f"tracing a kernel failed: {torch.trace_problem}", "end other profilers on this GPU, then try again"
            )
        elif torch.traced == 0:
            text = "it traced none of the kernels it was shown: CUPTI does not work, or another tool has it"
            yield say("Kineto", "warn", text, "end other profilers; check that nvidia-cuda-cupti is the one torch asks for: pip check")
        elif torch.traced is None:
            yield say("Kineto", "ok", "not tried, since another profiler is attached")
        else:
            yield say("Kineto", "ok", "torch.profiler sees GPU kernels")
    if cupti := host.packages.get("cupti-python"):
        cuda = facts.gpu.cuda if isinstance(facts.gpu, Nvml) else (0, 0)
        if known and _numbers(cupti) > cuda:
            text = f"cupti-python {cupti} is newer than the driver, which knows CUDA {_dotted(cuda)}"
            yield say("cupti-python", "warn", text, f"pip install 'cupti-python~={_dotted(cuda)}.0'")
        else:
            yield say("cupti-python", "ok", cupti)
    if "nvtx" in host.packages:
        yield say("NVTX", "ok", f"nvtx {host.packages['nvtx']}")
    else:
        yield say("NVTX", "fail", "nvtx is not installed, and workers do not start without it", "pip install nvtx")
    for name, title in (("nsys", "Nsight Systems"), ("ncu", "Nsight Compute")):
        tool = host.tools[name]
        if tool.path:
            yield say(name, "ok", f"{tool.version or 'unknown version'}, {tool.path}{'' if tool.on_path else ' (not on PATH)'}")
        elif known:
            yield say(name, "warn", f"{title} is not installed", f"install it to profile with {name}; Kineto needs nothing")
        else:
            yield say(name, "ok", f"{title} is not installed; it is of use with a GPU only")
    if host.counters_for_admin_only and not host.sys_admin:
        text = "the driver keeps performance counters for administrators: ncu will end with ERR_NVGPUCTRPERM; nsys and Kineto work"
        do = "sudo ncu; in a container --cap-add=SYS_ADMIN; or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        yield say("counters", "warn", text, do)
    elif host.counters_for_admin_only is not None:
        yield say("counters", "ok", "this process may read performance counters, as ncu does")


def _backends(facts: Facts, host: Host) -> Iterator[Finding]:
    known, nvcc = _gpus_of(facts), host.tools["nvcc"]

    def say(check: str, status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="backends", check=check, status=status, text=text, do=do)

    told: dict[str, list[str]] = {}
    for missing in facts.missing:
        if missing.arch in {gpu.arch for gpu in known}:
            told.setdefault(missing.reason, []).append(missing.backend)
    for reason, names in told.items():
        what, _, do = reason.partition("; ")
        yield say("libraries", "warn", f"{', '.join(dict.fromkeys(names))}: {what}", do)
    if not told and not known:
        yield say("libraries", "ok", "vendor libraries are of use with a GPU only: moebench backends")
    elif not told:
        yield say("libraries", "ok", "those of every backend for this GPU are installed")
    cuda = facts.torch.cuda if isinstance(facts.torch, Torch) else ""
    if not nvcc.path:
        if known and "flashinfer-python" in host.packages:
            text = "not found; FlashInfer compiles with it whatever is not in its cache"
            yield say("nvcc", "warn", text, f"install the CUDA toolkit{f' {cuda}' if cuda else ''}, or set CUDA_HOME to where it is")
        else:
            yield say("nvcc", "ok", "not found; only FlashInfer's kernels need it")
    elif cuda and nvcc.version and nvcc.version.split(".")[0] != cuda.split(".")[0]:
        text = f"{nvcc.version} in {nvcc.path} is of another CUDA than torch ({cuda}); extensions may not compile or not load"
        yield say("nvcc", "warn", text, f"set CUDA_HOME to a CUDA {cuda.split('.')[0]} toolkit")
    else:
        yield say("nvcc", "ok", f"{nvcc.version or 'unknown version'}, {nvcc.path}")


def _cache(cache: Place) -> Finding:
    def say(status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="caches", check=cache.name, status=status, text=text, do=do)

    where = f" with {cache.variable}" if cache.variable else ""
    holder = next((lock for lock in cache.locks if lock.holder is not None), None)
    stale = next((lock for lock in cache.locks if lock.holder is None and lock.age_s > STALE_S), None)
    size = "" if cache.size_bytes is None else f", {'' if cache.whole else 'more than '}{_size(cache.size_bytes)}"
    if stale:
        text = f"{stale.path} is {stale.age_s / 3600:.1f} h old: a killed compiler left it, and every later one waits for it"
        return say("warn", text, f"if nothing compiles now: rm {stale.path}")
    if not cache.writable:
        return say("warn", f"{cache.path} cannot be written: kernels are compiled in each run anew, or not at all", "make it writable")
    if holder:
        text = f"process {holder.holder} holds {holder.path}: it compiles, or hangs; whoever needs the same kernels waits"
        return say("warn", text, f"wait for it; if it does nothing, end process {holder.holder}")
    if NETWORK.match(cache.file_system):
        text = f"{cache.path} is on {cache.file_system}, a network file system: locks may hang and loading is slow"
        return say("warn", text, f"move it to a local disk{where}")
    if cache.free_bytes < LOW_DISK_BYTES:
        return say("warn", f"{_size(cache.free_bytes)} free for {cache.path}{size}", f"make room, or move it{where}")
    return say("ok", f"{cache.path}{size or ', empty'}")


def _host(host: Host) -> Iterator[Finding]:
    def say(check: str, status: Status, text: str, do: str = "") -> Finding:
        return Finding(topic="host", check=check, status=status, text=text, do=do)

    free = f"{_size(host.runs.free_bytes)} free for {host.runs.path}"
    if not host.runs.writable:
        yield say("results", "fail", f"{host.runs.path} cannot be written", "go to another directory, or name one with --out")
    elif host.runs.free_bytes < NO_DISK_BYTES:
        yield say("results", "fail", free, "make room, or name a directory elsewhere with --out")
    elif host.runs.free_bytes < LOW_DISK_BYTES:
        yield say("results", "warn", free, "make room before a long sweep")
    else:
        yield say("results", "ok", free)
    cores = f"{host.cores:g} of {host.all_cores} cores"
    if host.cores < 2:
        yield say("cores", "warn", f"{cores}: the sweep, its worker and the driver share one", "give it two or more")
    else:
        yield say("cores", "ok", cores)
    if host.memory_bytes < UNIT_BYTES:
        text = f"{_size(host.memory_bytes)}: compiling one unit of FlashInfer's takes about {_size(UNIT_BYTES)}"
        yield say("memory", "warn", text, "raise the container's limit, or compile on a larger machine: moebench prebuild")
    else:
        yield say("memory", "ok", _size(host.memory_bytes))
    if host.governor in ("", "performance"):
        yield say("CPU governor", "ok", host.governor or "not visible here")
    else:
        text = f"{host.governor}: launches and eager calls take longer at times"
        yield say("CPU governor", "warn", text, "its administrator can set it: cpupower frequency-set -g performance")


def _gpu_finding(check: str, status: Status, text: str, do: str = "") -> Finding:
    return Finding(topic="GPU", check=check, status=status, text=text, do=do)


def _for_each(rule: Callable[[Gpu], Finding], gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """One finding for all GPUs of which the same is to be said."""
    same: dict[Finding, list[int]] = {}
    for gpu in gpus:
        same.setdefault(rule(gpu), []).append(gpu.index)
    for finding, indices in same.items():
        which = f"GPU {', '.join(map(str, indices))}: " if len(gpus) > 1 and len(indices) < len(gpus) else ""
        every = f"all {len(gpus)} GPUs: " if len(gpus) > 1 and len(indices) == len(gpus) else ""
        yield replace(finding, text=f"{which}{every}{finding.text}")


def _gpus_of(facts: Facts) -> tuple[Gpu, ...]:
    return facts.gpu.gpus if isinstance(facts.gpu, Nvml) else ()


def _runs_on(built: Sequence[str], arch: str) -> bool:
    """Machine code runs on later GPUs of its generation, PTX (compute_*) on all later ones; sm_90a only on sm90."""
    want = int(arch.removeprefix("sm"))
    for kind, number, special in re.findall(r"\b(sm|compute)_(\d+)(\w?)", " ".join(built)):
        have = int(number)
        if have == want or (have < want and not special and (kind == "compute" or have // 10 == want // 10)):
            return True
    return not built


def _of(now: int | None, most: int | None) -> str:
    return f"{'?' if now is None else now} of {'?' if most is None else most}"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _size(size_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.{1 if size_bytes < 10 * unit else 0}f} {name}"
    return f"{size_bytes} bytes"


# ---- asking the children


@dataclass(frozen=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    pipe: int
    errors: IO[bytes]
    started: float


def _start(part: Part) -> _Child:
    read_end, write_end = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by _answer
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "moebench.machine", str(write_end), part],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[write_end],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            start_new_session=True,  # to be ended with all that it started
        )
    finally:
        os.close(write_end)
    return _Child(process=process, pipe=read_end, errors=errors, started=time.monotonic())


def _answer(child: _Child, limit_s: float) -> str | Silence:
    """The child's line of JSON, or why there is none; the child is ended either way."""
    told, hung = b"", False
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(child.pipe, selectors.EVENT_READ)
            while not told.endswith(b"\n"):
                if not selector.select(max(0.0, child.started + limit_s - time.monotonic())):
                    hung = True
                    break
                if not (chunk := os.read(child.pipe, 1 << 16)):
                    break
                told += chunk
        if not hung:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(5.0)  # to end by itself, and give its CUDA context back
        if told.endswith(b"\n"):
            return told.decode()
        child.errors.seek(0)
        words = child.errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        why = f"no answer in {limit_s:g} s" if hung else _ending(child.process.returncode)
        return Silence(reason=f"{why}{f' ({words[-1][:200]})' if words else ''}", hung=hung)
    finally:
        _end(child)


def _end(child: _Child) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(2.0)  # a process that sleeps in the driver does not even die of SIGKILL; we go on without it
    os.close(child.pipe)
    child.errors.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "the process closed its pipe and goes on"
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with exit code {code}"


def _gpu_facts(answer: str | Silence) -> Nvml | Silence:
    if isinstance(answer, Silence):
        return answer
    told = json.loads(answer)
    gpus = [Gpu(**gpu | {"processes": None if gpu["processes"] is None else tuple(gpu["processes"])}) for gpu in told["gpus"]]
    return Nvml(**told | {"cuda": tuple(told["cuda"]), "gpus": tuple(gpus)})


def _torch_facts(answer: str | Silence) -> Torch | Silence:
    if isinstance(answer, Silence):
        return answer
    told = json.loads(answer)
    return Torch(**told | {"archs": tuple(told["archs"])}) if told else Silence(reason="it is not installed")


def _host_facts(answer: str | Silence) -> Host | Silence:
    if isinstance(answer, Silence):
        return answer
    told = json.loads(answer)
    caches = [Place(**place | {"locks": tuple(Lock(**lock) for lock in place["locks"])}) for place in told["caches"]]
    decoded = {
        "tools": {name: Tool(**tool) for name, tool in told["tools"].items()},
        "runs": Place(**told["runs"] | {"locks": ()}),
        "caches": tuple(caches),
    }
    return Host(**told | decoded)


def _missing() -> Iterator[Missing]:
    """A reason with what to install is one about a library; others are about the GPU."""
    large = case("gpt-oss-20b", 1)
    for backend in registry.builtin():
        for arch in ARCHS:
            reason = backend.unsupported(large, Device(arch=arch, name=arch, torch="cuda:0", memory_bytes=2**40))
            if reason and "install" in reason:
                yield Missing(backend=backend.name, arch=arch, reason=reason)
