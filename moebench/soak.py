"""Child process that launches one backend on a few inputs again and again, and counts the launches that come out different."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from moebench import registry
from moebench.case import Case
from moebench.device import detect
from moebench.failure import of_exception
from moebench.leash import send, serve, take

INPUTS = 4  # of different seeds: what goes wrong may need a certain routing
STRETCH_S = 5.0  # between two reports


def main(pipe: BinaryIO) -> None:
    request = take()
    case = Case(**request["case"])  # type: ignore[arg-type]  # the parent is moebench soak
    phase = ["import"]

    def enter(name: str) -> None:
        phase[0] = name
        send(pipe, {"phase": name})

    try:
        _run(pipe, enter, str(request["backend"]), case, float(str(request["seconds"])))
    except Exception as error:  # noqa: BLE001  a kernel may raise anything
        traceback.print_exc()
        failure = of_exception(error, phase[0])
        send(pipe, {"status": failure.status, "reason": failure.reason})


def _run(pipe: BinaryIO, enter: Callable[[str], None], name: str, case: Case, seconds: float) -> None:
    enter("import")
    from moebench.check import inspect, repeat_check
    from moebench.problem import make_layer, make_tokens
    from moebench.reference.torch_experts import experts as reference

    device = detect()
    backend = registry.load(name)
    if reason := backend.unsupported(case, device):
        send(pipe, {"status": "skipped", "reason": reason})
        return
    deterministic: bool = getattr(backend, "deterministic", True)
    where = device.torch or "cpu"
    enter("alloc")
    layer = make_layer(case, where)
    checksum = layer.checksum()
    batches = [make_tokens(replace(case, seed=case.seed + i), where) for i in range(INPUTS)]
    enter("jit")
    call = backend.prepare(layer, case.num_tokens)
    enter("check")
    expected = []
    for tokens in batches:
        want = reference(layer, tokens, backend.act_dtype)
        found = inspect(call, layer, tokens, want, backend.act_dtype, layer_checksum=checksum, deterministic=deterministic)
        if found.status != "ok":
            send(pipe, {"status": found.status, "reason": f"before the soak: {found.reason}"})
            return
        expected.append(call(tokens).clone() if deterministic else want)
    launches = mismatches = 0
    reason = ""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        enter("soak")
        stretch = repeat_check(
            lambda i: call(batches[i]),
            expected,
            backend.act_dtype,
            launches=1 << 20,
            budget_s=min(STRETCH_S, max(until - time.monotonic(), 0.1)),
            deterministic=deterministic,
        )
        reason = reason or stretch.finding.reason
        launches += stretch.launches
        mismatches += stretch.mismatches
        send(pipe, {"launches": launches, "mismatches": mismatches, "reason": reason})
    send(pipe, {"status": "ok" if not mismatches else "wrong", "reason": reason})


if __name__ == "__main__":
    serve(main)
