"""Child process that touches the device: makes the layer, prepares one backend, checks it, times it, reports frames.

Frames are JSON lines on a pipe of their own, since vendor libraries print on stdout. The parent is `moebench.sweep`."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from time import perf_counter
from typing import Any, BinaryIO

import nvtx

from moebench import failure, registry
from moebench.case import Case
from moebench.device import Device, detect
from moebench.leash import send, serve, take, wait_for_turn
from moebench.memory import free_bytes
from moebench.record import L2State, Record, Scope, to_json

AHEAD = ("torch", "triton", "moebench.trial")  # neither of the first two looks at a GPU before it is used


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker is asked to measure."""

    run_id: str
    backend: str
    cases: Sequence[Case]
    l2: L2State = "cold"
    scope: Scope = "experts"
    round: int = 0
    repeat_check: int = 0  # launches whose outputs are compared


def main(pipe: BinaryIO) -> None:
    request: dict[str, Any] = take()  # our own parent's JSON
    wait_for_turn(lambda: import_ahead(pipe))
    cases = [Case(**fields) for fields in request["cases"]]
    if request["op"] == "survey":
        survey(pipe, request["backends"], cases, Device(**request["device"]) if request["device"] else detect())
    else:
        asked = {field.name: request[field.name] for field in fields(Request) if field.name in request and field.name != "cases"}
        Worker(pipe, Request(cases=cases, **asked)).run()


def import_ahead(pipe: BinaryIO) -> None:
    """What takes seconds and touches no GPU, while another worker has it. A plug-in, which may do anything when imported, waits."""
    send(pipe, {"phase": "import"})
    for name in AHEAD:
        with suppress(ImportError):  # whoever needs it will say so
            import_module(name)


def survey(pipe: BinaryIO, backends: Sequence[str], cases: Sequence[Case], device: Device) -> None:
    """What device this is, and for each backend and case the reason it cannot run, if there is one."""
    send(pipe, {"device": asdict(device)})
    for name in backends:
        try:
            backend = registry.load(name)
            reasons = [backend.unsupported(case, device) for case in cases]
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything; it must not take the others along
            traceback.print_exc()
            send(pipe, {"backend": name, "broken": f"cannot be loaded: {_sentence(error)}"})
        else:
            send(pipe, {"backend": name, "act_dtype": backend.act_dtype, "unsupported": reasons})


class Worker:
    """One backend on one layer, case by case."""

    def __init__(self, pipe: BinaryIO, request: Request) -> None:
        self._pipe, self._request = pipe, request
        self._nvtx = nvtx.get_domain("moebench")
        self._phase = "import"
        self._spent_s: dict[str, float] = {}
        self._free_bytes = 0  # before the case in progress

    def run(self) -> None:
        with self._range(f"run|{self._request.run_id}"):
            self._run()

    def _run(self) -> None:
        ask = self._request
        with self._in("import"):
            device = detect()
            backend = registry.load(ask.backend)
        blank = Record(
            case=ask.cases[0],
            backend=backend.name,
            act_dtype=backend.act_dtype,
            arch=device.arch,
            device=device.name,
            status="failed",
            scope=ask.scope,
            round=ask.round,
        )
        cases: list[Case] = []
        for case in ask.cases:
            self._free_bytes = free_bytes(device.is_gpu)
            if short := failure.shortage(case.device_bytes, self._free_bytes):
                self._record(replace(blank, case=case, status=short.status, reason=short.reason))
            else:
                cases.append(case)
        if not cases:
            return
        try:
            with self._in("import"):
                from moebench.problem import make_layer
                from moebench.trial import Copies, Trial
            with self._in("alloc"):
                layer = make_layer(cases[0], device.torch or "cpu")
                checksum = layer.checksum()
            started = perf_counter()
            with self._in("jit"):
                copies = Copies(backend, layer, max(case.num_tokens for case in cases), device)
                _synchronize(device)
            prepare_s = perf_counter() - started
        except Exception as error:  # noqa: BLE001  a kernel may raise anything
            for case in cases:
                self._record(self._failure(replace(blank, case=case), error))
            return
        trial = Trial(
            backend=backend,
            device=device,
            copies=copies,
            layer_checksum=checksum,
            l2=ask.l2,
            scope=ask.scope,
            repeat_check=ask.repeat_check,
            phase=self._in,
            block=lambda: self._range("timed"),
        )
        for case in cases:
            with self._range(f"case|{ask.backend}|{case.key}"):
                started_record = replace(blank, case=case, prepare_s=prepare_s)
                self._free_bytes = free_bytes(device.is_gpu)
                try:
                    record = trial.run(started_record)
                except Exception as error:  # noqa: BLE001  a kernel may raise anything
                    failed = self._failure(started_record, error)
                    self._record(failed)
                    if failed.status in failure.LEAVES or _device_is_poisoned(device):
                        return  # every later call could fail; the parent starts a fresh process for the rest
                else:
                    self._record(record)

    def _failure(self, record: Record, error: Exception) -> Record:
        traceback.print_exc()
        found = failure.with_memory(failure.of_exception(error, self._phase), record.case.device_bytes, self._free_bytes)
        return replace(record, status=found.status, reason=found.reason)

    def _record(self, record: Record) -> None:
        record = replace(record, phases_s=self._spent_s)  # since the record before, so that all of a worker's sum up to its life
        self._spent_s = {}
        send(self._pipe, {"record": json.loads(to_json(record))})

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        """Announce a phase to the parent, whose deadline it starts, and to profilers."""
        self._phase = phase
        send(self._pipe, {"phase": phase})
        started = perf_counter()
        try:
            with self._range(f"phase|{phase}"):
                yield
        finally:
            self._spent_s[phase] = self._spent_s.get(phase, 0.0) + perf_counter() - started

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


if __name__ == "__main__":
    serve(main)
