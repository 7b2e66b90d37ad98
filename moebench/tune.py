"""Child process that tunes one backend on the device that is here: candidates are checked, then timed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

from moebench import registry
from moebench.backend import Backend, Choice, Tunable
from moebench.case import Case
from moebench.check import inspect
from moebench.device import Device, detect
from moebench.failure import LEAVES, of_exception
from moebench.leash import send, serve, take
from moebench.problem import Tokens, make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference
from moebench.rotation import plan_rotation, token_sets
from moebench.routing import assign
from moebench.timing import CudaStopwatch, Stopwatch, WallStopwatch
from moebench.trial import FLUSH_BYTES, FLUSH_L2S, MOST_FREE_SHARE, cloned, layer_bytes, reseeded
from moebench.tuning import tune

Enter = Callable[[str, Choice], None]  # a phase, and the choice it is about


class TunableBackend(Backend, Tunable, Protocol):
    """What is tuned is both."""


def main(pipe: BinaryIO) -> None:
    """Frames: {"phase", "choice"} before each step, {"device"}, {"outcome"} for each regime, {"path", "table"} where one
    was taken; {"cannot"} or {"status", "reason"} where it ends before."""
    request = take()
    phase = ["import"]

    def enter(name: str, choice: Choice = "") -> None:
        phase[0] = name
        send(pipe, {"phase": name, "choice": choice})

    try:
        _run(pipe, enter, request)
    except Exception as error:  # noqa: BLE001  a kernel may raise anything
        traceback.print_exc()
        failure = of_exception(error, phase[0])
        send(pipe, {"status": failure.status, "reason": failure.reason})


def _run(pipe: BinaryIO, enter: Enter, request: Mapping[str, object]) -> None:
    enter("import", "")
    case = Case(**request["case"])  # type: ignore[arg-type]  # the parent is moebench tune
    name = str(request["backend"])
    done: list[str] = request["done"]  # type: ignore[assignment]
    counts: list[int] = request["tokens"]  # type: ignore[assignment]
    rejected: dict[str, str] = request["rejected"]  # type: ignore[assignment]
    device = detect()
    backend = registry.load(name)
    if not isinstance(backend, Tunable):
        others = [one.name for one in registry.builtin() if isinstance(one, Tunable)]
        send(pipe, {"cannot": f"{name} has no table to tune; these have: {', '.join(others)}"})
        return
    regimes = backend.regimes(case, device.arch)
    asked = [replace(regime, tokens=tuple(count for count in regime.tokens if not counts or count in counts)) for regime in regimes]
    known = sorted({count for regime in regimes for count in regime.tokens})
    if unknown := sorted(set(counts) - set(known)):
        send(pipe, {"cannot": f"no regime is judged by {', '.join(map(str, unknown))} tokens; give of {', '.join(map(str, known))}"})
        return
    path = backend.table_path if request["write"] else Path(str(request["out"]))
    if request["write"] and not any((folder / ".git").exists() for folder in path.parents):
        send(pipe, {"cannot": f"--write is for a checkout, and {path} is in none; leave it out, or give --out"})
        return
    largest = max((count for regime in asked for count in regime.tokens), default=0)
    if reason := backend.unsupported(replace(case, num_tokens=largest), device):
        send(pipe, {"cannot": reason})
        return
    bench = DeviceBench(cast(TunableBackend, backend), case, device, largest, enter)
    if os.environ.get("TRITON_INTERPRET") == "1":
        send(pipe, {"cannot": "needs a GPU: Triton's interpreter stands in for one here, and its times say nothing"})
        return
    send(pipe, {"device": device.name, "arch": device.arch})
    chosen: dict[str, str] = dict(request["chosen"])  # type: ignore[call-overload]
    for regime in asked:
        if regime.tokens and regime.name not in done:
            outcome = tune(regime, lambda choice: backend.alternatives(choice, device.arch), bench, rejected=rejected)
            send(pipe, {"phase": "time", "outcome": asdict(outcome)})
            if outcome.after != outcome.before:
                chosen[regime.name] = outcome.after
    if chosen:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        send(pipe, {"path": str(path), "table": backend.table(text, device.arch, chosen)})


class DeviceBench:
    """Real calls on the device that is here; weights are prepared once, and copied as often as a cold L2 takes."""

    def __init__(self, backend: TunableBackend, case: Case, device: Device, max_num_tokens: int, enter: Enter) -> None:
        self._backend, self._case, self._device, self._enter = backend, case, device, enter
        self._max_num_tokens = max_num_tokens
        self._where = device.torch or "cpu"
        enter("alloc", "")
        self._layer = make_layer(case, self._where)
        self._checksum = self._layer.checksum()
        enter("jit", "")
        self._copies = [backend.prepare_choices(self._layer, max_num_tokens)]
        self._wanted: dict[int, tuple[Tokens, Tensor]] = {}

    def reject(self, choice: Choice, tokens: Sequence[int]) -> str:
        self._enter("jit", choice)
        call = self._copies[0](choice)
        for count in tokens:
            batch, want = self._expected(count)
            self._enter("check", choice)
            try:
                found = inspect(
                    call,
                    self._layer,
                    batch,
                    want,
                    self._backend.act_dtype,
                    layer_checksum=self._checksum,
                    deterministic=getattr(self._backend, "deterministic", True),
                )
            except Exception as error:  # a candidate may raise anything
                failure = of_exception(error, "check")
                if failure.status in LEAVES and failure.status != "oom":
                    raise  # the context is lost: a fresh process goes on without this choice
                return f"{failure.status}: {failure.reason}"
            if found.status != "ok":
                return f"{found.status} at {count} tokens: {found.reason}"
        return ""

    @contextmanager
    def ready(self, tokens: int, choices: Sequence[Choice]) -> Iterator[Mapping[Choice, Stopwatch]]:
        case = replace(self._case, num_tokens=tokens)
        self._enter("time", "")
        if not self._device.is_gpu or getattr(self._backend, "computes_on_cpu", False):
            batch, _ = self._expected(tokens)
            yield {choice: WallStopwatch(partial(self._copies[0](choice), batch)) for choice in choices}
            return
        assignment = assign(case)
        rotation = plan_rotation(case, assignment, self._device.l2_bytes, self._most_copies())
        sets = token_sets(case, assignment, rotation.token_sets)
        batches = [make_tokens(reseeded(case, number), self._where, one) for number, one in enumerate(sets)]
        while len(self._copies) < rotation.weight_copies:
            self._copies.append(self._backend.prepare_choices(cloned(self._layer), self._max_num_tokens))
        flush_bytes = 0 if rotation.is_cold else max(FLUSH_L2S * self._device.l2_bytes, FLUSH_BYTES)
        watches: dict[Choice, Stopwatch] = {}
        for choice in choices:
            self._enter("time", choice)
            calls = [partial(copy(choice), batch) for copy in self._copies[: rotation.weight_copies] for batch in batches]
            watches[choice] = CudaStopwatch(calls, "cold", flush_bytes)
        self._enter("time", "")
        try:
            yield watches
        finally:
            watches.clear()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _expected(self, count: int) -> tuple[Tokens, Tensor]:
        if count not in self._wanted:
            self._enter("check", "")
            batch = make_tokens(replace(self._case, num_tokens=count), self._where)
            self._wanted[count] = batch, reference(self._layer, batch, self._backend.act_dtype)
        return self._wanted[count]

    def _most_copies(self) -> int:
        """As many as fit, with those that are; the layer itself is shared by all of them."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free = int(torch.cuda.mem_get_info()[0])
        return len(self._copies) + int(MOST_FREE_SHARE * free / (2 * layer_bytes(self._layer)))


if __name__ == "__main__":
    serve(main)
