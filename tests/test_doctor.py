"""What the doctor says of made-up machines, and that a driver which hangs does not take it along."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from moebench import doctor, machine
from moebench.commands import doctor as command
from moebench.doctor import Facts, Finding, Missing, Silence, findings, foremost
from moebench.machine import Gpu, Host, Lock, Nvml, Place, Tool, Torch
from tests.running import ENVIRONMENT

GIB = 2**30
H200 = Gpu(
    index=0,
    name="NVIDIA H200",
    arch="sm90",
    memory_bytes=140 * GIB,
    used_bytes=0,
    busy_percent=0,
    processes=(),
    sm_mhz=345,
    sm_max_mhz=1980,
    memory_mhz=3201,
    memory_max_mhz=3201,
    set_mhz=1980,
    default_mhz=1980,
    power_mw=700_000,
    power_default_mw=700_000,
    event_reasons=doctor.IDLE,
    ecc=True,
    ecc_after_reset=True,
    corrected=0,
    uncorrected=0,
    remap_pending=False,
    remap_failed=False,
    persistence=True,
    mig=False,
)
TORCH = Torch(version="2.11.0+cu130", cuda="13.0", archs=("sm_80", "sm_90", "sm_100"), available=True, kineto=True, traced=2)
RUNS = Place(name="results", path="/home/u/runs", writable=True, file_system="ext4", free_bytes=500 * GIB)
TRITON = replace(RUNS, name="Triton", path="/home/u/.triton/cache", variable="TRITON_CACHE_DIR", size_bytes=3 * GIB)
EXTENSIONS = replace(RUNS, name="torch extensions", path="/home/u/.cache/torch_extensions", variable="TORCH_EXTENSIONS_DIR", size_bytes=0)
HOST = Host(
    driver="580.159.04",
    packages={"torch": "2.11.0+cu130", "nvtx": "0.2.17", "flashinfer-python": "0.7.2.post1", "cupti-python": "13.0.1"},
    environment={},
    tools={
        "nvcc": Tool(name="nvcc", path="/usr/local/cuda/bin/nvcc", version="13.0", on_path=True),
        "nsys": Tool(name="nsys", path="/opt/nvidia/nsight-systems/2025.5.1/bin/nsys", version="2025.5.1"),
        "ncu": Tool(name="ncu", path="/usr/local/cuda/bin/ncu", version="2025.3.1", on_path=True),
    },
    counters_for_admin_only=False,
    runs=RUNS,
    caches=(TRITON, EXTENSIONS),
    governor="performance",
    cores=16,
    all_cores=16,
    memory_bytes=128 * GIB,
)
WELL = Facts(gpu=Nvml(driver="580.159.04", cuda=(13, 0), gpus=(H200,)), torch=TORCH, host=HOST)
NO_GPU = Facts(
    gpu=Nvml(problem="NVML Shared Library Not Found"),
    torch=Torch(version="2.13.0+cpu"),
    host=replace(HOST, driver="", packages={"torch": "2.13.0+cpu", "nvtx": "0.2.17"}, counters_for_admin_only=None),
)


def with_gpu(**changes):
    return replace(WELL, gpu=replace(WELL.gpu, gpus=(replace(H200, **changes),)))


def with_nvml(**changes):
    return replace(WELL, gpu=replace(WELL.gpu, **changes))


def with_torch(**changes):
    return replace(WELL, torch=replace(TORCH, **changes))


def with_host(facts=WELL, **changes):
    return replace(facts, host=replace(facts.host, **changes))


def with_cache(place=TRITON, **changes):
    return with_host(caches=(replace(place, **changes),))


def without(name, facts=WELL):
    return with_host(facts, packages={package: number for package, number in facts.host.packages.items() if package != name})


def without_tool(name, facts=WELL):
    return with_host(facts, tools={**facts.host.tools, name: Tool(name=name)})


def of(facts, check):
    (found,) = (finding for finding in findings(facts) if finding.check == check)
    return found


def test_nothing_is_wrong_with_a_machine_that_is_well():
    found = findings(WELL)
    assert {finding.status for finding in found} == {"ok"}, [finding for finding in found if finding.status != "ok"]
    assert foremost(found) is None
    assert {finding.check: finding.text for finding in found} == {
        "driver": "580.159.04, for CUDA up to 13.0",
        "torch": "2.11.0+cu130, CUDA 13.0",
        "ECC": "on, 0 corrected errors, none uncorrected",
        "other work": "none seen; 0 bytes of memory in use, 0 % busy",
        "slowdown": "nothing holds the clocks down now",
        "clocks": "SM 345 of 1980, memory 3201 of 3201 MHz, idle",
        "power cap": "700 W, the default is 700 W",
        "MIG": "off",
        "model": "NVIDIA H200, sm90, 140 GiB",
        "persistence": "on",
        "environment": "no variable is set that changes what is measured",
        "Kineto": "torch.profiler sees GPU kernels",
        "cupti-python": "13.0.1",
        "NVTX": "nvtx 0.2.17",
        "nsys": "2025.5.1, /opt/nvidia/nsight-systems/2025.5.1/bin/nsys (not on PATH)",
        "ncu": "2025.3.1, /usr/local/cuda/bin/ncu",
        "counters": "this process may read performance counters, as ncu does",
        "libraries": "those of every backend for this GPU are installed",
        "nvcc": "13.0, /usr/local/cuda/bin/nvcc",
        "Triton": "/home/u/.triton/cache, 3.0 GiB",
        "torch extensions": "/home/u/.cache/torch_extensions, 0 bytes",
        "results": "500 GiB free for /home/u/runs",
        "cores": "16 of 16 cores",
        "memory": "128 GiB",
        "CPU governor": "performance",
    }


def test_every_topic_is_one_that_is_shown():
    assert {finding.topic for finding in findings(WELL)} == set(doctor.TOPICS)


HUNG = Silence(reason="no answer in 30 s", hung=True)
STALE = Lock(path="/home/u/.cache/torch_extensions/x/lock", age_s=7200)
HELD = Lock(path="/home/u/.cache/flashinfer/x.lock", age_s=9, holder=4711)
BAD = {
    "a driver that hangs": (replace(WELL, gpu=HUNG), "driver", "fail", "no answer in 30 s", "dmesg"),
    "a driver without nvidia-ml-py": (
        with_nvml(installed=False, problem="x", gpus=()), "driver", "warn", "580.159.04", "pip install nvidia-ml-py"
    ),
    "a driver that NVML cannot reach": (with_nvml(problem="version mismatch", gpus=()), "driver", "fail", "mismatch", "restart"),
    "a container without its GPU": (with_nvml(gpus=()), "driver", "fail", "shows no GPU", "--gpus all"),
    "no GPU": (NO_GPU, "driver", "warn", "say nothing about a GPU", "a machine with an NVIDIA GPU"),
    "torch for CPUs": (with_torch(cuda="", version="2.11.0+cpu"), "torch", "warn", "a build for CPUs", "whl/cu130"),
    "torch newer than the driver": (with_nvml(cuda=(12, 8)), "torch", "fail", "this one knows 12.8", "whl/cu128"),
    "torch without a GPU": (with_torch(available=False, problem="CUDA error 802"), "torch", "fail", "CUDA error 802", "torch.zeros"),
    "torch without this GPU": (with_torch(archs=("sm_80", "sm_100")), "torch", "fail", "no code for sm90", "built for this GPU"),
    "no torch": (replace(without("torch"), torch=Silence(reason="x")), "torch", "fail", "not installed", "pip install --force"),
    "torch that crashes": (replace(WELL, torch=Silence(reason="the process died of SIGSEGV")), "torch", "fail", "SIGSEGV", "python -c"),
    "an unknown GPU": (with_gpu(arch="sm75"), "model", "warn", "no backend was made for it", "sm90"),
    "uncorrected errors": (with_gpu(uncorrected=1), "ECC", "fail", "1 uncorrected error since", "another GPU"),
    "a broken row": (with_gpu(remap_failed=True), "ECC", "fail", "could not be replaced", "replaced"),
    "a row to be replaced": (with_gpu(remap_pending=True), "ECC", "warn", "wait for a reset", "reset"),
    "ECC off": (with_gpu(ecc=False, ecc_after_reset=False), "ECC", "warn", "off", "have it off too"),
    "ECC about to change": (with_gpu(ecc_after_reset=False), "ECC", "warn", "on now, off after", "reset before you measure"),
    "another process": (with_gpu(processes=(17, 18)), "other work", "warn", "2 processes (17, 18)", "end the other work"),
    "memory in use": (with_gpu(used_bytes=2 * GIB), "other work", "warn", "2.0 GiB of memory in use", "wait"),
    "a busy GPU": (with_gpu(busy_percent=40), "other work", "warn", "40 % busy", "wait"),
    "a power cap now": (with_gpu(event_reasons=0x4), "slowdown", "warn", "the power cap", "cool"),
    "two slowdowns": (with_gpu(event_reasons=0x48), "slowdown", "warn", "a hardware slowdown and the temperature (hardware)", "cool"),
    "an application clock": (with_gpu(set_mhz=1200), "clocks", "warn", "set to 1200 MHz, the default is 1980", "-rac"),
    "a locked clock": (with_gpu(event_reasons=0x2), "clocks", "warn", "locked or application clock", "-rgc"),
    "a low cap": (with_gpu(power_mw=500_000), "power cap", "warn", "500 W, the default is 700 W", "under this cap"),
    "MIG": (with_gpu(mig=True), "MIG", "warn", "a slice of this GPU", "has it off"),
    "no persistence": (with_gpu(persistence=False), "persistence", "warn", "set up anew", "nvidia-persistenced"),
    "the interpreter": (with_host(environment={"TRITON_INTERPRET": "1"}), "environment", "warn", "on the CPU", "unset TRITON_INTERPRET"),
    "blocking launches": (with_host(environment={"CUDA_LAUNCH_BLOCKING": "1"}), "environment", "warn", "wait", "CUDA_LAUNCH_BLOCKING"),
    "a hidden GPU": (with_host(environment={"CUDA_VISIBLE_DEVICES": ""}), "environment", "warn", "hides", "unset CUDA_VISIBLE_DEVICES"),
    "no ranges": (with_host(environment={"NVTX_DISABLE": "1"}), "environment", "warn", "hides our ranges", "unset NVTX_DISABLE"),
    "a profiler": (with_host(environment={"CUDA_INJECTION64_PATH": "x"}), "environment", "warn", "a profiler is attached", ""),
    "torch without CUPTI": (with_torch(kineto=False, traced=None), "Kineto", "warn", "without CUPTI", "pytorch.org"),
    "a trace of nothing": (with_torch(traced=0), "Kineto", "warn", "none of the kernels", "pip check"),
    "a trace that fails": (with_torch(traced=None, trace_problem="CUPTI_ERROR_X"), "Kineto", "warn", "CUPTI_ERROR_X", "other profilers"),
    "CUPTI newer than the driver": (
        with_host(packages={**HOST.packages, "cupti-python": "13.4.0"}), "cupti-python", "warn", "newer than the driver", "~=13.0.0"
    ),
    "no nvtx": (without("nvtx"), "NVTX", "fail", "workers do not start", "pip install nvtx"),
    "no nsys": (without_tool("nsys"), "nsys", "warn", "Nsight Systems is not installed", "install it"),
    "no ncu": (without_tool("ncu"), "ncu", "warn", "Nsight Compute is not installed", "install it"),
    "counters for others": (with_host(counters_for_admin_only=True), "counters", "warn", "ERR_NVGPUCTRPERM", "NVreg_Restrict"),
    "a missing library": (
        replace(WELL, missing=(Missing(backend="marlin", arch="sm90", reason="vllm is not installed; pip install vllm"),)),
        "libraries", "warn", "marlin: vllm is not installed", "pip install vllm",
    ),
    "no nvcc": (without_tool("nvcc"), "nvcc", "warn", "FlashInfer compiles with it", "install the CUDA toolkit 13.0"),
    "nvcc of another CUDA": (
        with_host(tools={**HOST.tools, "nvcc": Tool(name="nvcc", path="/cuda/bin/nvcc", version="12.8")}),
        "nvcc", "warn", "another CUDA than torch (13.0)", "CUDA 13 toolkit",
    ),
    "a stale lock": (with_cache(EXTENSIONS, locks=(STALE,)), "torch extensions", "warn", "2.0 h old", f"rm {STALE.path}"),
    "a held lock": (with_cache(locks=(HELD,)), "Triton", "warn", "process 4711 holds", "end process 4711"),
    "a cache that cannot be written": (with_cache(writable=False), "Triton", "warn", "cannot be written", "writable"),
    "a cache far away": (with_cache(file_system="nfs4"), "Triton", "warn", "on nfs4", "TRITON_CACHE_DIR"),
    "a cache without room": (with_cache(free_bytes=GIB), "Triton", "warn", "1.0 GiB free", "TRITON_CACHE_DIR"),
    "no room for results": (with_host(runs=replace(RUNS, free_bytes=2**20)), "results", "fail", "1.0 MiB free", "--out"),
    "little room for results": (with_host(runs=replace(RUNS, free_bytes=GIB)), "results", "warn", "1.0 GiB free", "make room"),
    "results that cannot be written": (with_host(runs=replace(RUNS, writable=False)), "results", "fail", "cannot be written", "--out"),
    "one core": (with_host(cores=1), "cores", "warn", "1 of 16 cores", "two or more"),
    "little memory": (with_host(memory_bytes=2 * GIB), "memory", "warn", "2.0 GiB", "moebench prebuild"),
    "a slow governor": (with_host(governor="powersave"), "CPU governor", "warn", "powersave", "performance"),
    "a host that is silent": (replace(WELL, host=Silence(reason="no answer in 60 s")), "host", "fail", "no answer in 60 s", ""),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "check", "status", "text", "do"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_with_what_to_do(facts, check, status, text, do):
    found = of(facts, check)
    assert found.status == status
    assert text in found.text
    assert do in found.do


@pytest.mark.parametrize("case", BAD)
def test_one_fault_brings_no_finding_about_anything_else(case):
    wrong = [finding.check for finding in findings(BAD[case][0]) if finding.status != "ok"]
    assert wrong == {"torch newer than the driver": ["torch", "cupti-python"], "an unknown GPU": ["torch", "model"]}.get(
        case, [BAD[case][1]]
    )


FINE = {
    "errors that were corrected": (with_gpu(corrected=3), "ECC", "3 corrected errors"),
    "a GPU without ECC": (with_gpu(ecc=None, ecc_after_reset=None), "ECC", "not told"),
    "a GPU without MIG": (with_gpu(mig=None), "MIG", "has none"),
    "a higher cap": (with_gpu(power_mw=750_000), "power cap", "750 W"),
    "no cap told": (with_gpu(power_mw=None), "power cap", "not told"),
    "no reasons told": (with_gpu(event_reasons=None), "slowdown", "not told"),
    "clocks under load": (with_gpu(event_reasons=0, sm_mhz=1980), "clocks", "SM 1980 of 1980, memory 3201 of 3201 MHz"),
    "what the driver keeps": (with_gpu(used_bytes=400 * 2**20), "other work", "none seen"),
    "a driver newer than torch": (with_nvml(cuda=(13, 2)), "torch", "CUDA 13.0"),
    "a driver of the same major": (with_torch(cuda="13.2"), "torch", "CUDA 13.2"),
    "torch for CPUs without a GPU": (NO_GPU, "torch", "a build for CPUs"),
    "no nsys without a GPU": (without_tool("nsys", NO_GPU), "nsys", "with a GPU only"),
    "no nvcc without FlashInfer": (without_tool("nvcc", without("flashinfer-python")), "nvcc", "only FlashInfer's"),
    "no library without a GPU": (NO_GPU, "libraries", "with a GPU only"),
    "a library for another GPU": (
        replace(WELL, missing=(Missing(backend="x", arch="sm100", reason="y is not installed"),)), "libraries", "every backend for this GPU"
    ),
    "counters for an administrator": (with_host(counters_for_admin_only=True, sys_admin=True), "counters", "may read"),
    "Kineto beside another profiler": (with_torch(traced=None), "Kineto", "not tried"),
    "a chosen GPU": (with_host(environment={"CUDA_VISIBLE_DEVICES": "3"}), "environment", "CUDA_VISIBLE_DEVICES=3"),
    "a compiler at work": (with_cache(EXTENSIONS, locks=(replace(STALE, age_s=60),)), "torch extensions", "0 bytes"),
    "a large cache": (with_cache(whole=False), "Triton", "more than 3.0 GiB"),
    "no cache yet": (with_cache(size_bytes=None), "Triton", "empty"),
    "an overlay": (with_cache(file_system="fuse.overlayfs"), "Triton", "3.0 GiB"),
    "a virtual machine": (with_host(governor=""), "CPU governor", "not visible"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "check", "text"), FINE.values(), ids=FINE)
def test_what_is_not_wrong_is_ok(facts, check, text):
    found = of(facts, check)
    assert (found.status, text in found.text) == ("ok", True), found


@pytest.mark.parametrize(
    ("built", "arch", "runs"),
    [
        (("sm_90",), "sm90", True),
        (("sm_80",), "sm86", True),
        (("sm_80",), "sm90", False),
        (("sm_100",), "sm103", True),
        (("sm_100",), "sm120", False),
        (("sm_90a",), "sm90", True),
        (("sm_100a",), "sm103", False),
        (("compute_90",), "sm120", True),
        (("sm_120",), "sm100", False),
        ((), "sm90", True),  # it does not say
    ],
)
def test_code_for_one_gpu_runs_on_some_others(built, arch, runs):
    assert of(replace(with_gpu(arch=arch), torch=replace(TORCH, archs=built)), "torch").status == ("ok" if runs else "fail")


def test_gpus_of_which_the_same_is_to_be_said_share_a_line():
    gpus = tuple(replace(H200, index=index, mig=index == 2) for index in range(4))
    found = [finding for finding in findings(with_nvml(gpus=gpus)) if finding.check in ("MIG", "power cap")]
    assert [(finding.status, finding.text.split(":")[0]) for finding in found] == [
        ("ok", "GPU 0, 1, 3"),
        ("warn", "GPU 2"),
        ("ok", "all 4 GPUs"),
    ]


def test_a_fail_comes_before_an_earlier_warning():
    facts = replace(with_gpu(power_mw=500_000), host=replace(HOST, runs=replace(RUNS, writable=False)))
    assert foremost(findings(facts)).check == "results"
    assert foremost(findings(with_gpu(power_mw=500_000))).check == "power cap"


# ---- gathering


def fake_nvml(folder, **functions):
    """A pynvml that answers for two GPUs, the second of which knows little."""
    answers = {
        "nvmlInit": "lambda: None",
        "nvmlSystemGetDriverVersion": "lambda: '580.159.04'",
        "nvmlSystemGetCudaDriverVersion": "lambda: 13020",
        "nvmlDeviceGetCount": "lambda: 2",
        "nvmlDeviceGetHandleByIndex": "lambda index: index",
        "nvmlDeviceGetName": "lambda gpu: f'GPU number {gpu}'",
        "nvmlDeviceGetCudaComputeCapability": "lambda gpu: (9, 0)",
        "nvmlDeviceGetMemoryInfo": "lambda gpu, version=1: SimpleNamespace(total=100, used=10 if version == 2 else 60)",
        "nvmlDeviceGetUtilizationRates": "lambda gpu: SimpleNamespace(gpu=7)",
        "nvmlDeviceGetComputeRunningProcesses": "lambda gpu: [SimpleNamespace(pid=12)]",
        "nvmlDeviceGetClockInfo": "lambda gpu, kind: 345 if kind == 1 else 3201",
        "nvmlDeviceGetMaxClockInfo": "lambda gpu, kind: 1980 if kind == 1 else 3201",
        "nvmlDeviceGetCurrentClocksEventReasons": "lambda gpu: 1",
        "nvmlDeviceGetEccMode": "lambda gpu: [1, 0]",
        "nvmlDeviceGetTotalEccErrors": "lambda gpu, kind, since: 5 + kind",
        "nvmlDeviceGetRemappedRows": "lambda gpu: (0, 0, 1, 0)",
        "nvmlDeviceGetPersistenceMode": "lambda gpu: unsupported() if gpu else 0",
        "nvmlDeviceGetMigMode": "lambda gpu: unsupported() if gpu else [1, 1]",
    }
    lines = [
        "from types import SimpleNamespace",
        "class NVMLError(Exception): pass",
        *(f"class NVMLError_{name}(NVMLError): pass" for name in ("NotSupported", "FunctionNotFound", "InvalidArgument", "NoPermission")),
        "class NVMLError_ArgumentVersionMismatch(NVMLError): pass",
        "def unsupported(): raise NVMLError_NotSupported('Not Supported')",
        "NVML_CLOCK_SM, NVML_CLOCK_MEM, nvmlMemory_v2 = 1, 2, 2",
        "NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0",
        *(f"{name} = {body}" for name, body in (answers | functions).items()),
    ]
    folder.mkdir()
    (folder / "pynvml.py").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Puts a made-up pynvml before any other in the doctor's children."""

    def put(**functions):
        monkeypatch.setenv("PYTHONPATH", fake_nvml(tmp_path / "nvml", **functions))

    return put


def gpu_facts(limit_s=60.0):
    return doctor._gpu_facts(doctor._answer(doctor._start("gpu"), limit_s))


def test_a_gpu_is_described_as_nvml_tells_and_none_is_what_it_does_not(nvml):
    nvml()
    facts = gpu_facts()
    assert (facts.driver, facts.cuda, facts.installed, facts.problem) == ("580.159.04", (13, 2), True, "")
    assert facts.gpus[0] == Gpu(
        index=0,
        name="GPU number 0",
        arch="sm90",
        memory_bytes=100,
        used_bytes=10,
        busy_percent=7,
        processes=(12,),
        sm_mhz=345,
        sm_max_mhz=1980,
        memory_mhz=3201,
        memory_max_mhz=3201,
        event_reasons=1,
        ecc=True,
        ecc_after_reset=False,
        corrected=5,
        uncorrected=6,
        remap_pending=True,
        remap_failed=False,
        persistence=False,
        mig=True,
    )
    assert facts.gpus[1] == replace(facts.gpus[0], index=1, name="GPU number 1", persistence=None, mig=None)


def test_an_nvml_that_refuses_is_quoted(nvml):
    nvml(nvmlDeviceGetCount="lambda: (_ for _ in ()).throw(NVMLError('GPU is lost'))")
    assert gpu_facts() == Nvml(problem="GPU is lost")


def test_a_driver_that_hangs_is_left_after_its_time_and_torch_is_not_asked(nvml, monkeypatch):
    nvml(nvmlInit="lambda: __import__('time').sleep(600)")
    monkeypatch.setitem(doctor.LIMITS_S, "gpu", 1.0)
    facts = doctor.gather()
    assert facts.gpu == Silence(reason="no answer in 1 s", hung=True)
    assert facts.torch == Silence(reason="it was not asked, since the driver does not answer")
    assert [of(facts, check).status for check in ("driver", "torch")] == ["fail", "fail"]
    assert isinstance(facts.host, Host)


def test_a_child_that_is_given_up_is_ended(nvml):
    nvml(nvmlInit="lambda: __import__('time').sleep(600)")
    child = doctor._start("gpu")
    assert doctor._answer(child, 0.5).hung
    assert child.process.poll() is not None


def test_an_interrupt_leaves_no_child_behind(nvml, monkeypatch):
    nvml(nvmlInit="lambda: __import__('time').sleep(600)")
    started = []

    def start(part, begin=doctor._start):
        started.append(begin(part))
        return started[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_start", start)
    monkeypatch.setattr(doctor.selectors.DefaultSelector, "select", interrupt)
    with pytest.raises(KeyboardInterrupt):
        doctor.gather()
    assert [child.process.poll() is not None for child in started] == [True, True]


def test_a_driver_library_that_crashes_is_named_with_its_signal(nvml):
    nvml(nvmlInit="lambda: __import__('os').abort()")
    answer = gpu_facts()
    assert not answer.hung
    assert answer.reason.startswith("the process died of SIGABRT")


def test_the_last_words_of_a_child_that_ends_with_an_error_are_kept(nvml):
    nvml(nvmlInit="lambda: 1 / 0")
    assert gpu_facts().reason == "the process ended with exit code 1 (ZeroDivisionError: division by zero)"


def test_nvml_is_only_read():
    assert all(re.fullmatch(r"nvml(Device|System)Get\w+", name) for name in machine.NVML_READS)
    tree = ast.parse(Path(machine.__file__).read_text(encoding="utf-8"))
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("nvml")}
    assert called == {"nvmlInit", "nvmlMemory_v2"}  # a call and a number; all else goes through NVML_READS
    with pytest.raises(AssertionError, match="nvmlDeviceSetPersistenceMode"):
        machine._read(sys, "nvmlDeviceSetPersistenceMode", 0, 1)


def test_the_answer_of_each_child_is_what_it_found():
    assert doctor._host_facts(doctor._answer(doctor._start("host"), 60.0)).tools == machine.ask_host().tools
    told = doctor._torch_facts(doctor._answer(doctor._start("torch"), 120.0))
    assert told == machine.ask_torch()


def test_facts_survive_the_pipe():
    for facts, read in ((WELL.gpu, doctor._gpu_facts), (TORCH, doctor._torch_facts), (with_cache(locks=(HELD,)).host, doctor._host_facts)):
        assert read(json.dumps(machine.asdict(facts))) == facts


def test_a_cache_is_added_up_and_its_locks_are_found(tmp_path):
    import fcntl

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kernel.so").write_bytes(bytes(1000))
    (tmp_path / "x" / "lock").touch()
    os.utime(tmp_path / "x" / "lock", (time.time() - 7200, time.time() - 7200))
    (tmp_path / "y.lock").touch()
    (tmp_path / "z.lock").touch()  # nobody holds it: it means nothing
    with (tmp_path / "y.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        place = machine._sized(machine._place("torch extensions", "TORCH_EXTENSIONS_DIR", tmp_path))
    assert (place.size_bytes, place.whole, place.writable) == (1000, True, True)
    baton, other = sorted(place.locks, key=lambda lock: lock.path)
    assert (baton.path, baton.holder, round(baton.age_s / 3600, 1)) == (str(tmp_path / "x" / "lock"), None, 2.0)
    assert (other.path, other.holder) == (str(tmp_path / "y.lock"), os.getpid())


def test_a_place_that_is_not_there_is_judged_by_what_is_above_it(tmp_path):
    place = machine._sized(machine._place("results", "", tmp_path / "a" / "b"))
    assert (place.path, place.writable, place.size_bytes) == (str(tmp_path / "a" / "b"), True, None)
    assert place.free_bytes > 0


def test_the_innermost_mount_tells_the_file_system():
    mounts = (
        "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n2 1 0:5 / /home rw - nfs4 filer:/home rw\n"
        "3 2 0:6 / /home/a\\040b rw - tmpfs tmpfs rw\n4 2 0:7 / /home/a\\040b rw - xfs /dev/b rw"
    )
    paths = ("/etc", "/home/u/.triton", "/home/a b/c", "/homes")
    assert [machine._file_system(Path(path), mounts) for path in paths] == ["ext4", "nfs4", "xfs", "ext4"]


def test_the_limits_of_a_container_are_read(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("8589934592\n")
    assert machine._cgroup_limits(tmp_path) == (1.5, 8 * GIB)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_limits(tmp_path) == (None, None)


@pytest.mark.parametrize(
    ("told", "number"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", "13.0"),
        ("NVIDIA Nsight Systems version 2025.5.1.121-255136380782v0", "2025.5.1.121"),
        ("NVIDIA (R) Nsight Compute Command Line Profiler\nVersion 2025.3.1.0 (build 36398880)", "2025.3.1.0"),
        ("what is this", ""),
    ],
)
def test_a_tool_is_found_with_its_version(tmp_path, monkeypatch, told, number):
    (tmp_path / "text").write_text(told)
    (tmp_path / "ncu").write_text(f"#!/bin/sh\ncat {tmp_path}/text\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine._tool("ncu") == Tool(name="ncu", path=str(tmp_path / "ncu"), version=number, on_path=True)


def test_a_tool_that_is_nowhere_has_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._tool("no-such-tool") == Tool(name="no-such-tool")


def test_a_missing_library_is_what_a_backend_says_of_the_gpus_it_is_for():
    told = [missing for missing in doctor._missing() if missing.backend == "marlin_mxfp4_bf16"]
    assert {missing.arch for missing in told} <= {arch for arch in doctor.ARCHS if arch != "cpu"}
    assert all("vllm" in missing.reason for missing in told)
    assert not [missing for missing in doctor._missing() if missing.backend in ("torch", "numpy")]


# ---- the command


@pytest.fixture
def printed(monkeypatch):
    def show(facts, *arguments, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(command, "gather", lambda: facts)
        return CliRunner().invoke(command.doctor, list(arguments))

    return show


@pytest.mark.parametrize(("facts", "code"), [(WELL, 0), (with_gpu(mig=True), 0), (with_gpu(uncorrected=1), 3)])
def test_the_exit_code_is_3_only_where_something_fails(printed, facts, code):
    assert printed(facts).exit_code == code
    assert printed(facts, "--json").exit_code == code


def test_the_last_line_counts_and_says_what_to_do_first(printed):
    *_, last = printed(replace(with_gpu(mig=True), torch=Silence(reason="x")), width=200).stdout.splitlines()
    assert last.startswith("22 ok, 1 warn, 1 fail; start with torch: see what this does: python -c")
    *_, last = printed(WELL).stdout.splitlines()
    assert last == "25 ok"


@pytest.mark.parametrize("width", [40, 80, 130])
def test_every_finding_is_shown_within_the_width(printed, width):
    facts = BAD["a stale lock"][0]
    lines = printed(facts, width=width).stdout.splitlines()
    assert max(map(len, lines)) <= width
    shown = "".join("".join(lines).split())
    for finding in findings(facts):
        assert re.search(rf"{finding.status}{re.escape(''.join(finding.check.split()))}", shown), finding.check


def test_what_others_wrote_cannot_control_the_terminal(printed):
    assert "\x1b" not in printed(with_gpu(name="\x1b[2J[bold]GPU[/]")).stdout
    assert "[bold]GPU[/]" in printed(with_gpu(name="\x1b[2J[bold]GPU[/]")).stdout


def test_json_is_one_document_with_every_finding(printed):
    facts = with_gpu(uncorrected=2)
    told = json.loads(printed(facts, "--json").stdout)
    assert [Finding(**finding) for finding in told["findings"]] == findings(facts)
    assert told["counts"] == {"ok": 24, "warn": 0, "fail": 1}
    assert told["first"]["check"] == "ECC"
    assert told["exit_code"] == 3


def test_this_machine_is_looked_at_without_torch_in_the_process_that_prints(tmp_path):
    code = (
        "import sys\nfrom moebench.commands.doctor import doctor\ntry:\n    doctor(['--json'])\nfinally:\n"
        "    print(*({'torch', 'triton', 'pynvml', 'flashinfer'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_code"]
    assert done.stderr.strip() == ""
    assert {"driver", "torch", "results"} <= {finding["check"] for finding in told["findings"]}
