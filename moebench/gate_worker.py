"""Child process that measures some cells of one backend when its turn comes, with a spin kernel after each call if it is told so.

The parent is `moebench.gate_check`. Nothing else can ask for the spin kernel: a sweep's worker does not know it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moebench import registry
from moebench.case import Case
from moebench.device import Device, detect
from moebench.gate_check import RULE, SIMULATED, Sample, Turn, simulated_samples, to_frame, wait_for
from moebench.leash import send, serve, take
from moebench.record import Canary, Contract, Record

if TYPE_CHECKING:
    from moebench.rotation import Rotation
    from moebench.timing import Call


class WorkerError(Exception):
    """Why nothing can be measured here."""


def main(pipe: BinaryIO) -> None:
    asked = take()
    told: dict[str, object] = asked["turn"]  # type: ignore[assignment]
    turn = Turn(side=told["side"], round=int(str(told["round"])), appended=tuple(told["appended"]))  # type: ignore[arg-type]
    cases = [Case(**fields) for fields in asked["cases"]]  # type: ignore[attr-defined]
    start, go = Path(str(asked["start"])), Path(str(asked["go"]))
    try:
        send(pipe, {"phase": "import"})
        bench = None
        if not asked["simulated"] and find_spec("torch"):
            import triton  # noqa: F401  it and torch take 5 s of CPU, which a GPU should not have to wait for

            import moebench.trial  # noqa: F401
        send(pipe, {"imported": True, "phase": "prepare"})
        wait_for(start)
        device = SIMULATED if asked["simulated"] else detect()
        send(pipe, {"device": asdict(device)})
        if not device.is_gpu:
            return
        if not asked["simulated"]:
            bench = Bench(str(asked["backend"]), cases, device)
            bench.prepare(check=bool(asked.get("check")))
        send(pipe, {"prepared": True, "phase": "turn"})
        wait_for(go)
        samples = list(bench.measure(turn)) if bench else simulated_samples(turn, seed=int(str(asked["seed"])))
        send(pipe, to_frame(samples))
    except Exception as error:  # noqa: BLE001  a driver may raise anything
        traceback.print_exc()
        send(pipe, {"failed": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"})
        return
    wait_for(Path(str(asked["end"])))
    os._exit(0)  # Python and torch would take a second to tidy up what the driver tidies up all the same


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cell's calls."""

    case: Case
    calls: Sequence[Call]
    rotation: Rotation
    blank: Record


class Bench:
    """One backend on cells of one layer."""

    def __init__(self, backend: str, cases: Sequence[Case], device: Device) -> None:
        self._cases, self.device = cases, device
        self._backend = registry.load(backend)
        self._ready: list[Ready] = []
        for case in cases:
            if reason := self._backend.unsupported(case, self.device):
                raise WorkerError(f"{backend} on {case.label}: {reason}")

    def prepare(self, *, check: bool) -> None:
        """All that is done before the clock runs. Raises WorkerError where an output is wrong."""
        import torch

        from moebench.check import compare
        from moebench.problem import make_layer
        from moebench.reference.torch_experts import experts as reference
        from moebench.rotation import plan_rotation, token_sets
        from moebench.routing import assign, realized
        from moebench.trial import Batch, Copies, reseeded

        where = self.device.torch or "cuda"
        layer = make_layer(self._cases[0], where)
        copies = Copies(self._backend, layer, max(case.num_tokens for case in self._cases), self.device)
        for case in self._cases:
            assignment = assign(case)
            rotation = plan_rotation(case, assignment, self.device.l2_bytes, copies.most())
            sets = list(token_sets(case, assignment, rotation.token_sets))
            batches = [Batch(reseeded(case, i) if i else case, where, each, "experts") for i, each in enumerate(sets)]
            calls = [partial(batch.call, experts) for experts in copies.take(rotation.weight_copies) for batch in batches]
            if check:
                want = reference(layer, batches[0].routed(), self._backend.act_dtype)
                error = compare(calls[0](), want, self._backend.act_dtype)
                if not error.ok:
                    raise WorkerError(f"{self._backend.name} on {case.label} is wrong: relative L2 error {error.rel_l2:.2e}")
            for call in calls:
                call()
            blank = Record(
                case=case,
                backend=self._backend.name,
                act_dtype=self._backend.act_dtype,
                arch=self.device.arch,
                device=self.device.name,
                status="ok",
                routing=realized(case, assignment),
            )
            self._ready.append(Ready(case=case, calls=calls, rotation=rotation, blank=blank))
        if self.device.is_gpu:
            torch.cuda.synchronize()

    def measure(self, turn: Turn) -> Iterator[Sample]:
        """Each cell with each length appended. Lengths are shares of what the cell takes with an empty spin kernel, which comes first."""
        from moebench.selfcheck import cycles_per_us
        from moebench.trial import controls, copy_us

        before = controls()
        found: list[Sample] = []
        for ready in self._ready:
            if not turn.appended:
                found.append(Sample(record=self._measured(ready, turn, ready.calls)))
                continue
            rate = cycles_per_us()
            own_us = 0.0
            for place, share in enumerate(turn.appended):
                cycles = round(share * own_us * rate)
                record = self._measured(ready, turn, [followed_by_spin(call, cycles) for call in ready.calls])
                own_us = own_us or record.median_us or 0.0
                found.append(Sample(record=record, place=place, length=cycles / rate / own_us))
        canary = Canary(before_us=before.copy_us, after_us=copy_us(), matmul_us=before.matmul_us)
        yield from (replace(sample, record=replace(sample.record, canary=canary)) for sample in found)

    def _measured(self, ready: Ready, turn: Turn, calls: Sequence[Call]) -> Record:
        from moebench.timing import CudaStopwatch, measure
        from moebench.trial import FLUSH_BYTES, FLUSH_L2S, REFERENCE, sm_mhz

        flush_bytes = 0 if ready.rotation.is_cold else max(FLUSH_L2S * self.device.l2_bytes, FLUSH_BYTES)
        watch = CudaStopwatch(calls, "cold", flush_bytes, sm_mhz)
        timing = replace(measure(watch, RULE), proof=ready.rotation.proof(flush_bytes))
        contract = Contract(
            scope="experts",
            inside="the call, and in gates of slower calls a spin kernel after it",
            clock=watch.clock,
            l2=watch.l2,
            l2_method=watch.l2_method,
            warmup=RULE.warmup,
            rank_aggregate="each rank alone",
            reference=REFERENCE,
        )
        return replace(ready.blank, timing=timing, contract=contract, round=turn.round, run_id=turn.side)


def followed_by_spin(call: Call, cycles: int) -> Call:
    """The call, then a kernel that does nothing for so many cycles of the SM clock."""
    import torch

    def both() -> torch.Tensor:
        out = call()
        torch.cuda._sleep(cycles)
        return out

    return both


if __name__ == "__main__":
    serve(main)
