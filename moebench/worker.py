"""Child process that touches the device: makes the layer, prepares one backend, checks it, times it, reports frames.

Frames are JSON lines on a pipe of their own, since vendor libraries print on stdout. The parent is `moebench.sweep`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, BinaryIO, Literal

import nvtx

from moebench import registry
from moebench.backend import Backend
from moebench.case import Case
from moebench.device import Device, detect
from moebench.record import L2State, Record, to_json

if TYPE_CHECKING:  # torch is imported in phase "import", under its deadline
    from moebench.backend import Experts
    from moebench.problem import Layer

Phase = Literal["import", "alloc", "jit", "check", "time", "trace"]


def main(pipe: BinaryIO) -> None:
    request = json.loads(sys.stdin.readline())
    cases = [Case(**fields) for fields in request["cases"]]
    if request["op"] == "survey":
        survey(pipe, request["backends"], cases, Device(**request["device"]) if request["device"] else detect())
    else:
        Worker(pipe, request["run_id"], request["backend"], cases, request["l2"]).run()


def survey(pipe: BinaryIO, backends: Sequence[str], cases: Sequence[Case], device: Device) -> None:
    """What device this is, and for each backend and case the reason it cannot run, if there is one."""
    _send(pipe, {"device": asdict(device)})
    for name in backends:
        try:
            backend = registry.load(name)
            reasons = [backend.unsupported(case, device) for case in cases]
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything; it must not take the others along
            traceback.print_exc()
            _send(pipe, {"backend": name, "broken": f"cannot be loaded: {_sentence(error)}"})
        else:
            _send(pipe, {"backend": name, "act_dtype": backend.act_dtype, "unsupported": reasons})


class Worker:
    """One backend on one layer, case by case."""

    def __init__(self, pipe: BinaryIO, run_id: str, backend: str, cases: Sequence[Case], l2: L2State) -> None:
        self._pipe, self._run_id, self._name, self._cases, self._l2 = pipe, run_id, backend, cases, l2
        self._nvtx = nvtx.get_domain("moebench")
        self._phase: Phase = "import"

    def run(self) -> None:
        with self._range(f"run|{self._run_id}"):
            self._run()

    def _run(self) -> None:
        with self._in("import"):
            device = detect()
            backend = registry.load(self._name)
        blank = Record(
            case=self._cases[0], backend=backend.name, act_dtype=backend.act_dtype, arch=device.arch, device=device.name, status="failed"
        )
        try:
            with self._in("alloc"):
                from moebench.problem import make_layer

                layer = make_layer(self._cases[0], device.torch or "cpu")
                checksum = layer.checksum()
            started = perf_counter()
            with self._in("jit"):
                experts = backend.prepare(layer, max(case.num_tokens for case in self._cases))
                _synchronize(device)
            prepare_s = perf_counter() - started
        except Exception as error:  # noqa: BLE001  a kernel may raise anything
            for case in self._cases:
                self._record(self._failure(replace(blank, case=case), error))
            return
        for case in self._cases:
            with self._range(f"case|{self._name}|{case.key}"):
                started_record = replace(blank, case=case, prepare_s=prepare_s)
                try:
                    record = self._one(started_record, device, backend, layer, checksum, experts)
                except Exception as error:  # noqa: BLE001  a kernel may raise anything
                    self._record(self._failure(started_record, error))
                    if _device_is_poisoned(device):
                        return  # every later call would fail; the parent starts a fresh process for the rest
                else:
                    self._record(record)

    def _one(self, record: Record, device: Device, backend: Backend, layer: Layer, checksum: int, experts: Experts) -> Record:
        """Reference, check, time. No time is taken of a call whose output is wrong."""
        import torch

        from moebench.check import compare, inspect
        from moebench.problem import make_tokens
        from moebench.reference.diagnosis import explain
        from moebench.reference.torch_experts import experts as reference
        from moebench.routing import assign, realized
        from moebench.timing import CPU_RULE, GPU_RULE, ONCE, CudaStopwatch, Stopwatch, WallStopwatch, measure
        from moebench.trace import launched_kernels, missing_kernel

        case = record.case
        with self._in("alloc"):
            assignment = assign(case)
            tokens = make_tokens(case, device.torch or "cpu", assignment)
            facts: dict[str, str | int | float] = dict(getattr(experts, "facts", {}))
            record = replace(record, routing=realized(case, assignment), facts=facts)
        with self._in("check"):
            want = reference(layer, tokens, backend.act_dtype)
            deterministic: bool = getattr(backend, "deterministic", True)
            found = inspect(experts, layer, tokens, want, backend.act_dtype, layer_checksum=checksum, deterministic=deterministic)
            if not deterministic and found.error is not None:  # else it ended before launches were compared
                record = replace(record, facts={**facts, "elements_differing_between_launches": found.differing})
            if found.status != "ok":
                told = explain(found.output, layer, tokens, backend.act_dtype, want) if found.output is not None else ""
                return replace(record, status=found.status, reason=found.reason + (f" ({told})" if told else ""), error=found.error)
        call = lambda: experts(tokens)  # noqa: E731
        on_gpu = device.is_gpu and not getattr(backend, "computes_on_cpu", False)
        with self._in("time"):
            watch: Stopwatch = CudaStopwatch(call, self._l2, device.l2_bytes) if on_gpu else WallStopwatch(call)
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # a time that says nothing is taken once
            timing = measure(watch, GPU_RULE if on_gpu else ONCE if interpreted else CPU_RULE)
        with self._in("check"):
            timed = watch.run()
            if not timed.isfinite().all():
                return replace(
                    record, status="unwritten", reason=f"what was timed ({timing.clock}) leaves elements of its output unwritten"
                )
            again = compare(timed, want, backend.act_dtype)
            if not again.ok:
                reason = f"what was timed ({timing.clock}) gives relative L2 {again.rel_l2:.2e}; the eager call was right"
                return replace(record, status="wrong", reason=reason, error=again)
        if on_gpu:
            with self._in("trace"):
                record = replace(record, kernels=launched_kernels(call))
                if not record.kernels and case.num_tokens:  # ok means right and timed here, not proven to be the backend's own kernels
                    record = replace(record, facts={**record.facts, "kernels": "not traced: another profiler is attached, or it saw none"})
            pattern: str | None = getattr(backend, "kernel_pattern", None)
            if problem := missing_kernel(pattern, record.kernels):
                return replace(record, status="wrong", reason=problem)
        if interpreted:
            timing = replace(timing, comparable=False, note="ran in Triton's interpreter: right or wrong is real, the time is not")
        del watch
        if device.is_gpu:
            torch.cuda.empty_cache()
        return replace(record, status="ok", error=found.error, timing=timing)

    def _failure(self, record: Record, error: Exception) -> Record:
        traceback.print_exc()
        return replace(record, status="failed", reason=f"in phase {self._phase}: {_sentence(error)}")

    def _record(self, record: Record) -> None:
        _send(self._pipe, {"record": json.loads(to_json(record))})

    @contextmanager
    def _in(self, phase: Phase) -> Iterator[None]:
        """Announce a phase to the parent, whose deadline it starts, and to profilers."""
        self._phase = phase
        _send(self._pipe, {"phase": phase})
        with self._range(f"phase|{phase}"):
            yield

    @contextmanager
    def _range(self, message: str) -> Iterator[None]:
        self._nvtx.push_range(self._nvtx.get_event_attributes(message=message))
        try:
            yield
        finally:
            self._nvtx.pop_range()


def _device_is_poisoned(device: Device) -> bool:
    """Whether the CUDA context still computes after an error; a sticky one fails every later call."""
    if not device.is_gpu:
        return False
    import torch

    try:
        return bool(torch.ones(8, device="cuda").sum().item() != 8)
    except RuntimeError:
        return True


def _synchronize(device: Device) -> None:
    if device.is_gpu:
        import torch

        torch.cuda.synchronize()


def _sentence(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:500]}"


def _send(pipe: BinaryIO, frame: dict[str, object]) -> None:
    pipe.write(json.dumps(frame, allow_nan=False).encode() + b"\n")
    pipe.flush()


if __name__ == "__main__":
    with open(int(sys.argv[1]), "wb") as opened:  # noqa: PTH123  a file descriptor
        main(opened)
