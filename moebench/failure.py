"""What an abnormal end means: an exception, a signal or a missed deadline becomes a status and a sentence."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from dataclasses import dataclass

from moebench.record import Status

# What cudaError_t calls them. Those in POISONS leave a context in which every later call fails; the CUDA documentation says that the
# process must end and be launched again.
CUDA_ERRORS: dict[int, str] = {
    1: "invalid argument",
    2: "out of memory",
    9: "invalid configuration argument",
    98: "invalid device function",
    209: "no kernel image is available for execution on the device",
    214: "uncorrectable ECC error encountered",
    222: "the provided PTX was compiled with an unsupported toolchain",
    700: "an illegal memory access was encountered",
    701: "too many resources requested for launch",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    720: "too many blocks in cooperative launch",
    802: "system not yet initialized",
    999: "unknown error",
}
CUDA_NAMES: dict[str, int] = {
    "illegaladdress": 700,
    "launchoutofresources": 701,
    "launchtimeout": 702,
    "assert": 710,
    "hardwarestackerror": 714,
    "illegalinstruction": 715,
    "misalignedaddress": 716,
    "invalidaddressspace": 717,
    "invalidpc": 718,
    "launchfailure": 719,
    "launchfailed": 719,
    "eccuncorrectable": 214,
    "memoryallocation": 2,
    "outofmemory": 2,
}
CUDA_WORDS = re.compile(r"cuda (?:driver |runtime )?error|triton error \[cuda\]|cudaerror|cuda_error_", re.IGNORECASE)
CUDA_NAME = re.compile(r"cuda_?error_?(?=[a-z])([a-z_]+)", re.IGNORECASE)
MEMORY_TYPES = frozenset({"OutOfMemoryError", "MemoryError"})
MEMORY_WORDS = re.compile(
    r"(?:cuda|hip|device) out of memory|can't allocate memory|cannot allocate memory|out of host memory", re.IGNORECASE
)
COMPILE_TYPES = frozenset(
    {"CompilationError", "CompileError", "CompileTimeAssertionFailure", "PTXASError", "OutOfResources", "InductorError"}
)
COMPILE_WORDS = re.compile(
    r"error building extension|ninja: build stopped|ninja exited|ptxas (?:fatal|error)|nvcc (?:fatal|error)|nvrtc_error|nvrtc: error|"
    r"internal triton ptx codegen error|unsupported gpu architecture",
    re.IGNORECASE,
)
LEAVES: frozenset[Status] = frozenset({"cuda_error", "oom"})  # after these the rest goes to a fresh process
SENTENCE_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Failure:
    status: Status
    reason: str


def of_exception(error: BaseException, phase: str) -> Failure:
    """Of what a backend raised in that phase."""
    names = [kind.__name__ for kind in type(error).__mro__]
    code = getattr(error, "error_code", None)  # torch.AcceleratorError has it from torch 2.8 on
    return classify(names, str(error), phase, code if type(code) is int else None)


def classify(type_names: Collection[str], text: str, phase: str, cuda_code: int | None = None) -> Failure:
    """type_names: of the exception and what it derives from, itself first. cuda_code: where the exception says it."""
    said = f"{next(iter(type_names), 'exception')}: {_first_line(text)}"
    code = cuda_code or _cuda_code(text)
    if MEMORY_TYPES & set(type_names) or MEMORY_WORDS.search(text) or code == 2:
        return Failure(status="oom", reason=f"in phase {phase}: {said}")
    if COMPILE_TYPES & set(type_names) or COMPILE_WORDS.search(text):
        return Failure(status="compile_error", reason=f"in phase {phase}: {said}")
    if code is not None:
        number = f"CUDA error {code}" if code else "CUDA error"
        return Failure(status="cuda_error", reason=f"{number} in phase {phase}: {said}")
    return Failure(status="failed", reason=f"in phase {phase}: {said}")


def of_exit(code: int | None, phase: str) -> Failure:
    """Of a process that ended without a result; code as subprocess gives it, negative for a signal, None where it never ended."""
    if code is None:
        return Failure(
            status="hang", reason=f"in phase {phase}: the worker does not end even after SIGKILL; its driver call never returned"
        )
    if code < 0:
        return Failure(status="crash", reason=f"in phase {phase}: the worker died of {_signal_name(-code)}")
    return Failure(status="crash", reason=f"in phase {phase}: the worker ended with exit code {code} and without a result")


def overdue(phase: str, deadline_s: float, where: str) -> Failure:
    """Of a process that stayed silent for longer than its phase may; where: what its stack said, if it said anything."""
    status: Status = "compile_timeout" if phase == "jit" else "hang"
    stack = f"; it was in {where}" if where else ""
    return Failure(
        status=status,
        reason=f"in phase {phase}: the worker gave no sign of life for {deadline_s:g} s and was stopped "
        f"(--deadline {phase}=SECONDS gives it longer){stack}",
    )


def without_advice(reason: str) -> str:
    """For commands that have no --deadline."""
    return re.sub(r" \(--deadline [^)]*\)", "", reason)


def shortage(predicted_bytes: int, free_bytes: int) -> Failure | None:
    """Before trying: out of memory where the estimate does not fit what is free."""
    if predicted_bytes <= free_bytes:
        return None
    return Failure(
        status="oom", reason=f"not tried: it needs about {_gib(predicted_bytes)} by estimate (predicted) and {_gib(free_bytes)} are free"
    )


def with_memory(failure: Failure, predicted_bytes: int, free_bytes: int) -> Failure:
    """An out-of-memory failure with what was predicted and what was free; any other as it is."""
    if failure.status != "oom":
        return failure
    memory = f" (predicted {_gib(predicted_bytes)}, {_gib(free_bytes)} free)"
    return Failure(status="oom", reason=failure.reason + memory)


def innermost(dump: str, frames: int = 3) -> str:
    """The innermost frames of a faulthandler dump as words: `spin (backend.py:88), called by run (worker.py:60)`."""
    _, _, current = dump.rpartition("Current thread")
    found = re.findall(r'File "([^"]*)", line (\d+) in ([^\n]+)', current.split("\n\n")[0])
    return ", called by ".join(f"{name.strip()} ({file.rpartition('/')[2]}:{line})" for file, line, name in found[:frames])


def _cuda_code(text: str) -> int | None:
    """0 where it is a CUDA error without a code that is known, None where it is no CUDA error."""
    if not CUDA_WORDS.search(text):
        return None
    lowered = text.lower()
    for code, meaning in CUDA_ERRORS.items():
        if meaning in lowered:
            return code
    if name := CUDA_NAME.search(text):
        return CUDA_NAMES.get(name[1].replace("_", "").lower(), 0)
    number = re.search(r"cuda (?:driver |runtime )?error:? (\d{1,4})\b", lowered)
    return int(number[1]) if number else 0


def _first_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[0][:SENTENCE_CHARACTERS]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
