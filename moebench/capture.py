"""Child process that profiles one backend on one case: checks it, makes it warm, then runs a few calls under a profiler.

`python -m moebench.capture WHERE [REQUEST]`: frames, JSON lines, go to WHERE, a file descriptor or a file ("-": nowhere); the request is
JSON, the second argument or the first line of stdin. nsys and ncu start it as well: it then leaves the recording to them, and
tells them with cudaProfilerStart and the NVTX range `call`, which holds what one call launches and nothing else."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, BinaryIO, Literal

import nvtx

from moebench import registry
from moebench.backend import Experts
from moebench.case import Case
from moebench.device import Device, detect
from moebench.leash import send, take
from moebench.routing import assign, realized
from moebench.timeline import Launch, Profile, to_json
from moebench.trace import operations, stands_aside, timelines

if TYPE_CHECKING:  # torch is imported in phase "import", under its deadline
    import torch

    from moebench.problem import Tokens

WARM_UP = 5  # calls, after the check and the capture
FLUSH_BYTES = 256 << 20  # read before each call, or 4 times the L2 if that is more
CPU_S = 5.0  # of calls on a CPU, where one may take a minute

Phase = Literal["import", "alloc", "jit", "check", "warm up", "profile"]


class Refused(Exception):
    """Nothing to profile; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A call that is right, and how it is launched."""

    run: Callable[[], object]
    between: Callable[[], object]  # makes the L2 cold
    launch: Launch
    notes: tuple[str, ...]


def main(arguments: list[str]) -> int:
    where, *rest = arguments
    request: dict[str, object] = json.loads(rest[0]) if rest else take()
    case = Case(**request["case"])  # type: ignore[arg-type]  # Case checks them
    path = os.devnull if where == "-" else int(where) if where.isdigit() else where
    with open(path, "wb") as frames:  # noqa: PTH123  a file descriptor or a path
        capture = Capture(frames, case, str(request["backend"]), int(str(request["calls"])), bool(request["tool"]))
        try:
            capture.run()
        except Refused as refusal:
            send(frames, {"refused": str(refusal)})
            sys.stderr.write(f"{refusal}\n")
            return 3
        except Exception as error:  # noqa: BLE001  a kernel may raise anything
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0][:500]
            send(frames, {"refused": f"in phase {capture.phase}: {type(error).__name__}: {first}"})
            return 3
    return 0


class Capture:
    """One backend on one case."""

    def __init__(self, frames: BinaryIO, case: Case, backend: str, calls: int, for_a_tool: bool) -> None:
        self._frames, self._case, self._name, self._calls, self._for_a_tool = frames, case, backend, calls, for_a_tool
        self._nvtx = nvtx.get_domain("moebench")
        self.phase: Phase = "import"

    def run(self) -> None:
        with self._range(f"case|{self._name}|{self._case.key}"):
            self._run()

    def _run(self) -> None:
        case = self._case
        with self._in("import"):
            device = detect()
            if device.torch is None:
                raise Refused("torch is not installed, and it runs every backend; install it with: pip install torch")
            backend = registry.load(self._name)
            if reason := backend.unsupported(case, device):
                raise Refused(reason)
        with self._in("alloc"):
            from moebench.problem import make_layer, make_tokens

            layer, assignment = make_layer(case, device.torch), assign(case)
            tokens = make_tokens(case, device.torch, assignment)
        with self._in("jit"):
            experts = backend.prepare(layer, case.num_tokens)
            experts(tokens)
            _synchronize(device)
        with self._in("check"):
            from moebench.check import compare
            from moebench.reference.torch_experts import experts as reference

            error = compare(experts(tokens), reference(layer, tokens, backend.act_dtype), backend.act_dtype)
            if not error.ok:
                raise Refused(
                    f"its output is wrong, at relative L2 {error.rel_l2:.2e}, and where a wrong kernel spends its time says nothing"
                )
        on_gpu = device.is_gpu and not getattr(backend, "computes_on_cpu", False)
        with self._in("warm up"):
            ready = (
                _on_gpu(experts, tokens, device)
                if on_gpu
                else Ready(run=lambda: experts(tokens), between=_nothing, launch="eager", notes=())
            )
            for _ in range(WARM_UP if on_gpu else 1):
                ready.run()
            _synchronize(device)
        with self._in("profile"):
            if self._for_a_tool:
                if not on_gpu:
                    raise Refused(f"{self._name} does not run on a GPU here, and there is nothing else that nsys or ncu could show")
                self._leave_it_to_the_tool(ready)
                return
            if on_gpu and stands_aside():
                raise Refused("another profiler is attached to this process, and CUDA serves one at a time; detach it")
            untraced = _untraced_gpu(ready, self._calls) if on_gpu else _untraced_cpu(ready, self._calls)
            calls = timelines(ready.run, ready.between, self._calls) if on_gpu else operations(ready.run, len(untraced))
            if on_gpu and case.num_tokens and not all(calls):
                raise Refused("the profiler saw no kernels of a call; CUPTI may be held by another tool, or not work on this machine")
            profile = Profile(
                case=case,
                backend=self._name,
                act_dtype=backend.act_dtype,
                device=device,
                source="kineto" if on_gpu else "cpu",
                launch=ready.launch,
                calls=calls,
                untraced_us=untraced,
                routing=realized(case, assignment),
                notes=ready.notes,
            )
            send(self._frames, {"profile": json.loads(to_json(profile))})

    def _leave_it_to_the_tool(self, ready: Ready) -> None:
        import torch

        started = torch.cuda.cudart().cudaProfilerStart()
        if int(started):
            raise Refused(f"cudaProfilerStart returned error {int(started)}")
        for _ in range(self._calls):
            ready.between()
            torch.cuda.synchronize()
            with self._range("call"):
                ready.run()
                torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()

    @contextmanager
    def _in(self, phase: Phase) -> Iterator[None]:
        self.phase = phase
        send(self._frames, {"phase": phase})
        with self._range(f"phase|{phase}"):
            yield

    @contextmanager
    def _range(self, message: str) -> Iterator[None]:
        self._nvtx.push_range(self._nvtx.get_event_attributes(message=message))
        try:
            yield
        finally:
            self._nvtx.pop_range()


def _on_gpu(experts: Experts, tokens: Tokens, device: Device) -> Ready:
    """A replay of a CUDA graph of one call, or the eager call where it cannot be captured."""
    import torch

    flush = torch.ones(max(4 * device.l2_bytes, FLUSH_BYTES) // 4, dtype=torch.float32, device="cuda")
    sink = torch.empty((), device="cuda")

    def between() -> None:
        torch.amax(flush, dim=0, out=sink)  # reads: dirty lines would be written back while the next kernel runs

    def eager() -> torch.Tensor:
        return experts(tokens)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants lazily made handles and workspaces to exist
        eager()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = eager()
    except RuntimeError as error:
        torch.cuda.synchronize()
        note = f"not captured as a CUDA graph ({str(error).splitlines()[0]}): gaps hold the time the host needs to launch"
        return Ready(run=eager, between=between, launch="eager", notes=(note,))

    def replay() -> torch.Tensor:
        graph.replay()
        return kept

    return Ready(run=replay, between=between, launch="cuda_graph", notes=())


def _untraced_gpu(ready: Ready, count: int) -> tuple[float, ...]:
    import torch

    times = []
    for _ in range(count):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ready.between()
        start.record()
        ready.run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return tuple(times)


def _untraced_cpu(ready: Ready, count: int) -> tuple[float, ...]:
    """As many calls as fit CPU_S, and one at least."""
    times: list[float] = []
    while len(times) < count and sum(times) < CPU_S * 1e6:
        start = perf_counter_ns()
        ready.run()
        times.append((perf_counter_ns() - start) / 1e3)
    return tuple(times)


def _nothing() -> None:
    pass


def _synchronize(device: Device) -> None:
    if device.is_gpu:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
