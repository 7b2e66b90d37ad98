"""Whether the backend that was asked for is the one that ran."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from moebench import trace
from moebench.record import Kernel
from moebench.registry import builtin
from moebench.timeline import Event
from moebench.trace import INJECTED, RANGE, launched_kernels, missing_kernel, operations, stands_aside, timeline, timelines, windows

RAN = (Kernel(name="Memcpy DtoD (Device -> Device)", count=1), Kernel(name="void cutlass::device_kernel<GemmUniversal<Mixed>>", count=2))


def test_a_backend_whose_kernel_ran_is_believed():
    assert missing_kernel(r"device_kernel<.*Mixed", RAN) is None


def test_a_backend_none_of_whose_kernels_ran_is_told_what_did():
    sentence = missing_kernel("marlin", RAN)
    assert sentence is not None
    assert "'marlin'" in sentence
    assert "Memcpy DtoD" in sentence


@pytest.mark.parametrize(("pattern", "kernels"), [(None, RAN), ("marlin", ())])
def test_nothing_is_claimed_without_a_pattern_or_without_kernels(pattern, kernels):
    assert missing_kernel(pattern, kernels) is None


@pytest.mark.parametrize("variable", INJECTED)
def test_the_trace_stands_aside_where_another_profiler_is_attached(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    called = []
    assert launched_kernels(lambda: called.append(1)) == ()
    assert called == []


@pytest.mark.parametrize("backend", [b for b in builtin() if b.name not in ("torch", "numpy")], ids=lambda b: b.name)
def test_every_gpu_backend_says_which_kernel_must_run(backend):
    re.compile(backend.kernel_pattern)
    assert missing_kernel(backend.kernel_pattern, (Kernel(name="void at::native::vectorized_elementwise_kernel<4>", count=9),))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        # names as a trace on an H200 gave them
        ("triton_mxfp4_bf16", "gate_up_kernel"),
        ("openai_triton_kernels", "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1_swiglu"),
        (
            "marlin_mxfp4_bf16",
            "void marlin_moe_wna16::Marlin<1125899906909960l, 562949953487106l, 1125899906909960l, 2814749767106568l, 128>",
        ),
    ],
)
def test_the_pattern_knows_the_kernels_seen_on_a_gpu(name, kernel):
    (backend,) = (b for b in builtin() if b.name == name)
    assert missing_kernel(backend.kernel_pattern, (Kernel(name=kernel, count=1),)) is None


def seen(name, start_us, end_us, on_device=True, stream=7, **more):
    """A FunctionEvent of torch, as far as it is looked at."""
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    when = SimpleNamespace(start=start_us, end=end_us)
    return SimpleNamespace(name=name, device_type=kind, time_range=when, device_resource_id=stream, **more)


@pytest.fixture
def kineto(monkeypatch):
    """What Kineto is to have seen."""
    found = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr(trace, "_traced", lambda run, **_: run() or found)
    return found


def test_a_timeline_holds_kernels_copies_and_fills_in_order_of_start(kineto):
    kineto += [
        seen("cudaLaunchKernel", 0.0, 9.0, on_device=False),
        seen("down_kernel", 12.064, 14.112),
        seen("Memset (Device)", 10.0, 10.5, stream=13),
        seen("Memcpy DtoD (Device -> Device)", 11.0, 12.0),
        seen(RANGE, 10.0, 14.112),
    ]
    assert timeline(lambda: None) == (
        Event(name="Memset (Device)", start_ns=10_000, end_ns=10_500, stream=13, kind="memset"),
        Event(name="Memcpy DtoD (Device -> Device)", start_ns=11_000, end_ns=12_000, stream=7, kind="memcpy"),
        Event(name="down_kernel", start_ns=12_064, end_ns=14_112, stream=7),
    )
    assert [kernel.name for kernel in launched_kernels(lambda: None)] == [event.name for event in timeline(lambda: None)]


def test_a_call_holds_what_starts_while_it_is_waited_for(kineto):
    kineto += [
        *(seen("flush", start, start + 30.0) for start in (0.0, 100.0)),
        *(seen("down_kernel", start, start + 10.0) for start in (45.0, 140.0)),
        *(seen(RANGE, start, start + 30.0, on_device=False) for start in (40.0, 135.0)),
        *(seen(RANGE, start, start + 10.0) for start in (45.0, 140.0)),
    ]
    done = []
    calls = timelines(lambda: done.append("call"), lambda: done.append("flush"), 2)
    assert done == ["flush", "call"] * 2
    assert [[(event.name, event.start_ns) for event in call] for call in calls] == [[("down_kernel", 45_000)], [("down_kernel", 140_000)]]


def test_windows_take_events_by_their_start():
    events = [Event(name="x", start_ns=start, end_ns=start + 50) for start in (30, 10, 20, 40)]
    assert [[event.start_ns for event in call] for call in windows(events, [(10, 30), (30, 31), (50, 60)])] == [[10, 20], [30], []]


@pytest.mark.parametrize("variable", INJECTED)
def test_no_profiler_is_started_beside_another(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    called = []
    assert stands_aside()
    assert timelines(lambda: called.append(1), lambda: called.append(2), 3) == ()
    assert called == []


def test_operations_are_those_of_the_call_itself_with_their_shapes():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    calls = operations(lambda: (a @ b).sigmoid(), 2)
    assert [[event.name for event in call] for call in calls] == [["aten::matmul [3, 4] [4, 5]", "aten::sigmoid [3, 5]"]] * 2
    assert all(event.kind == "op" and event.end_ns > event.start_ns for call in calls for event in call)
    assert calls[0][-1].end_ns <= calls[1][0].start_ns
