"""Child process that decides, after a worker died, whether the device takes the next case."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moebench.leash import send, serve, take
from moebench.memory import free_bytes

Floats = NDArray[np.float32]

SIZE = 256  # of the product; small integers, so that every sum is exact in float32 and has one right answer
WAIT_S = 10.0  # the driver frees a killed process's memory a moment after it is gone


@dataclass(frozen=True, kw_only=True)
class Verdict:
    reason: str  # empty: the device takes the next case
    free_bytes: int
    ecc_uncorrected: int | None = None  # since the driver was loaded; None where nobody counts


def main(pipe: BinaryIO) -> None:
    request = take()
    on_gpu, needed = bool(request["on_gpu"]), int(str(request["needed_bytes"]))
    send(pipe, {"phase": "probe"})
    send(pipe, {"verdict": asdict(_gpu(needed) if on_gpu else _cpu())})


def _cpu() -> Verdict:
    """A fresh process starts, gets memory and computes: more can hardly be wrong with a CPU that runs us."""
    a, b, expected = _product()
    reason = "" if np.array_equal(a @ b, expected) else "a product of small integers came out wrong"
    return Verdict(reason=reason, free_bytes=free_bytes(False))


def _gpu(needed_bytes: int) -> Verdict:
    import torch

    try:
        a, b, expected = (torch.from_numpy(x).cuda() for x in _product())
        wrong = int((a.bfloat16() @ b.bfloat16() != expected.bfloat16()).sum())
        torch.cuda.synchronize()
        reason = f"{wrong} of {SIZE * SIZE} elements of a product of small integers came out wrong" if wrong else ""
        _, total = torch.cuda.mem_get_info()
        until = time.monotonic() + WAIT_S
        while (free := free_bytes(True)) < needed_bytes <= total and time.monotonic() < until:
            time.sleep(0.25)
    except (RuntimeError, AssertionError) as error:
        return Verdict(reason=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}", free_bytes=0)
    ecc, remapping = _ecc()
    if not reason and free < needed_bytes <= total:
        reason = f"only {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free and the next case needs about {needed_bytes / 2**30:.2f}"
    if not reason and remapping:
        reason = "a memory row waits to be remapped after an uncorrectable ECC error; the device needs a reset, which its owner must do"
    return Verdict(reason=reason, free_bytes=free, ecc_uncorrected=ecc)


def _product() -> tuple[Floats, Floats, Floats]:
    """Two matrices of -2 to 2 and their product in integers; the first is one sixteenth full, so that sums are exact in bf16."""
    dice = np.random.default_rng(0)
    a, b = dice.integers(-2, 3, (2, SIZE, SIZE))
    row, column = np.indices((SIZE, SIZE))
    a = a * (row % 16 == column % 16)
    return a.astype(np.float32), b.astype(np.float32), (a @ b).astype(np.float32)


def _ecc() -> tuple[int | None, bool]:
    """Uncorrected errors, and whether a row waits to be remapped; only asked, never set."""
    try:
        import pynvml
    except ImportError:
        return None, False
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        try:
            pending = bool(pynvml.nvmlDeviceGetRemappedRows(handle)[2])
        except pynvml.NVMLError:
            pending = False
        kind, counter = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter)), pending
    except pynvml.NVMLError:
        return None, False


if __name__ == "__main__":
    serve(main)
