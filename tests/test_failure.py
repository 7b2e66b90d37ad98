"""Endings become statuses and sentences."""

import signal

import pytest

from moebench.failure import classify, innermost, of_exception, of_exit, overdue, shortage, with_memory


@pytest.mark.parametrize(
    ("types", "text", "status", "part"),
    [
        (["OutOfMemoryError", "RuntimeError"], "CUDA out of memory. Tried to allocate 2.00 GiB", "oom", "Tried to allocate"),
        (["MemoryError"], "", "oom", "MemoryError: no message"),
        (["RuntimeError"], "CUDA error: out of memory", "oom", ""),
        (["RuntimeError"], "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes", "oom", ""),
        (["CompilationError", "TritonError"], "at 3:4: bad", "compile_error", ""),
        (
            ["OutOfResources", "TritonError"],
            "out of resource: shared memory, Required: 300000, Hardware limit: 232448",
            "compile_error",
            "",
        ),
        (["RuntimeError"], "Error building extension 'fused_moe_90'", "compile_error", ""),
        (["RuntimeError"], "Ninja build failed. Ninja output:\nninja: build stopped: subcommand failed.", "compile_error", ""),
        (
            ["AcceleratorError", "RuntimeError"],
            "CUDA error: an illegal memory access was encountered\nmore",
            "cuda_error",
            "CUDA error 700",
        ),
        (["RuntimeError"], "CUDA error: device-side assert triggered", "cuda_error", "CUDA error 710"),
        (["RuntimeError"], "CUDA error: unspecified launch failure", "cuda_error", "CUDA error 719"),
        (["RuntimeError"], "Triton Error [CUDA]: an illegal memory access was encountered", "cuda_error", "CUDA error 700"),
        (["RuntimeError"], "Triton Error [CUDA]: misaligned address", "cuda_error", "CUDA error 716"),
        (["RuntimeError"], "cudaErrorIllegalAddress", "cuda_error", "CUDA error 700"),
        (["RuntimeError"], "call failed: CUDA_ERROR_ILLEGAL_ADDRESS", "cuda_error", "CUDA error 700"),
        (["RuntimeError"], "cudaErrorLaunchFailure", "cuda_error", "CUDA error 719"),
        (["RuntimeError"], "CUDA error: something nobody has seen", "cuda_error", "CUDA error in phase check"),
        (["RuntimeError"], "CUDA driver error: 717", "cuda_error", "CUDA error 717"),
        (["ValueError"], "shapes differ", "failed", "in phase check: ValueError: shapes differ"),
        (["AssertionError"], "", "failed", "AssertionError: no message"),
    ],
)
def test_what_an_exception_says_decides_its_status(types, text, status, part):
    found = classify(types, text, "check")
    assert found.status == status
    assert part in found.reason
    assert "in phase check" in found.reason
    assert "\n" not in found.reason


def test_a_subclass_of_runtime_error_is_known_by_its_name_and_its_code():
    class AcceleratorError(RuntimeError):
        error_code = 700

    found = of_exception(AcceleratorError("the message is in another language"), "time")
    assert (found.status, found.reason[:31]) == ("cuda_error", "CUDA error 700 in phase time: A")
    assert len(of_exception(ValueError("x" * 10_000), "jit").reason) < 1000


@pytest.mark.parametrize(
    ("code", "status", "part"),
    [
        (-signal.SIGSEGV, "crash", "died of SIGSEGV"),
        (-signal.SIGKILL, "crash", "died of SIGKILL"),
        (-63, "crash", "died of signal 63"),
        (0, "crash", "exit code 0 and without a result"),
        (3, "crash", "exit code 3"),
        (None, "hang", "not end even after SIGKILL"),
    ],
)
def test_how_a_process_ended_decides_its_status(code, status, part):
    found = of_exit(code, "time")
    assert found.status == status
    assert part in found.reason
    assert found.reason.startswith("in phase time: ")


def test_a_missed_deadline_is_a_compile_timeout_in_phase_jit_and_a_hang_elsewhere():
    assert overdue("jit", 1800, "").status == "compile_timeout"
    found = overdue("time", 0.5, "spin (a.py:3)")
    assert found.status == "hang"
    assert found.reason == (
        "in phase time: the worker gave no sign of life for 0.5 s and was stopped (--deadline time=SECONDS gives it longer); "
        "it was in spin (a.py:3)"
    )


def test_what_does_not_fit_is_out_of_memory_before_it_is_tried():
    assert shortage(3 << 30, 3 << 30) is None
    found = shortage(3 << 30, 1 << 29)
    assert found is not None
    assert found.status == "oom"
    assert "3.00 GiB by estimate" in found.reason
    assert "0.50 GiB are free" in found.reason


def test_predicted_and_free_memory_are_told_where_memory_ran_out_and_nowhere_else():
    assert with_memory(classify(["OutOfMemoryError"], "no", "jit"), 2 << 30, 1 << 30).reason.endswith("(predicted 2.00 GiB, 1.00 GiB free)")
    other = classify(["ValueError"], "no", "jit")
    assert with_memory(other, 1, 1) is other


def test_the_innermost_frames_of_a_dump_are_named():
    dump = (
        'Thread 0x1 (most recent call first):\n  File "/x/queue.py", line 9 in wait\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/x/kernel.py", line 7 in spin\n  File "/x/worker.py", line 5 in run\n'
    )
    assert innermost(dump) == "spin (kernel.py:7), called by run (worker.py:5)"
    assert innermost("") == ""
