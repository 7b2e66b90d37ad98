"""What only a GPU can show: that calls are told from flushes, that phases cover a call, that nsys and ncu agree."""

import shutil

import pytest
import torch

from moebench import registry
from moebench.case import case
from moebench.device import detect
from moebench.profile import Request, capture, read_ncu, read_nsys, run_tool, view
from moebench.timeline import Profile, ProfileError, classify
from moebench.trace import launched_kernels, timeline, timelines

POINT = case("gpt-oss-20b", 64)
BACKENDS = [backend for backend in registry.builtin() if backend.name not in ("torch", "numpy")]
LEAST_COVERAGE = 0.95  # of the time of a call, in kernels whose phase is known


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Profiles of backends, each taken once: a child takes some ten seconds."""
    device, known = detect(), {}

    def profile(backend):
        if reason := backend.unsupported(POINT, device):
            pytest.skip(reason)
        if backend.name not in known:
            log = tmp_path_factory.mktemp("profile") / "log"
            *_, known[backend.name] = capture(Request(case=POINT, backend=backend.name, calls=10), log)
        found = known[backend.name]
        assert isinstance(found, Profile)
        return found

    return profile


def test_a_timeline_has_what_ran_in_order():
    x = torch.ones(1 << 20, device="cuda")
    events = timeline(lambda: (x.zero_(), x.add_(1), x.clone()))
    assert len(events) == 3
    assert all(event.end_ns > event.start_ns for event in events)
    assert [event.start_ns for event in events] == sorted(event.start_ns for event in events)
    assert sum(kernel.count for kernel in launched_kernels(lambda: x.add_(1))) == 1


@pytest.mark.parametrize("graph", [False, True])
def test_what_runs_between_calls_is_not_in_them(graph):
    x, big, sink = torch.ones(1 << 20, device="cuda"), torch.ones(1 << 26, device="cuda"), torch.empty((), device="cuda")
    x.add_(1), x.mul_(2)  # loaded before they are captured
    run = lambda: x.add_(1)  # noqa: E731
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            x.add_(1)
            x.mul_(2)
        run = captured.replay
    calls = timelines(run, lambda: torch.amax(big, dim=0, out=sink), 5)
    assert [len(call) for call in calls] == [1 + graph] * 5
    assert not [event.name for call in calls for event in call if "reduce" in event.name]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_phases_cover_a_call_and_add_up(backend, profiled):
    found = profiled(backend)
    shown = view(found)
    parts = shown.breakdown
    assert parts.coverage >= LEAST_COVERAGE, [part.name for part in parts.parts if part.phase == "unclassified"]
    assert {"gemm1", "gemm2"} <= {name for phase in parts.phases_us for name in phase.split("+")}
    assert sum(parts.phases_us.values()) + parts.gaps_us == pytest.approx(parts.span_us, abs=1e-3)
    assert len({tuple(event.name for event in call) for call in found.calls}) == 1
    assert all(parts.phases_us[phase] > least.us for phase, least in shown.floors.items())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_nsys_sees_the_kernels_that_kineto_sees(backend, profiled, tmp_path):
    if shutil.which("nsys") is None:
        pytest.skip("nsys is not installed")
    expected = profiled(backend)
    (found,) = read_nsys(run_tool("nsys", Request(case=POINT, backend=backend.name, calls=10, tool="nsys"), tmp_path / "out"))
    assert [len(call) for call in found.calls] == [len(call) for call in expected.calls]
    assert view(found).breakdown.phases_us.keys() == view(expected).breakdown.phases_us.keys()


def test_ncu_counts_the_kernels_of_one_call(profiled, tmp_path):
    if shutil.which("ncu") is None:
        pytest.skip("ncu is not installed")
    backend = next(backend for backend in BACKENDS if backend.name == "triton_mxfp4_bf16")
    expected = profiled(backend)
    try:
        report = run_tool("ncu", Request(case=POINT, backend=backend.name, calls=1, tool="ncu"), tmp_path / "out")
    except ProfileError as error:
        pytest.skip(str(error))
    seen = read_ncu(report)
    assert [kernel.name for kernel in seen] == [event.name for event in expected.calls[0]]
    assert [kernel.phase for kernel in seen] == classify(expected.calls[0])
    assert all(kernel.us > 0 for kernel in seen)
