"""Backends that go wrong on purpose, one fault each; found through the public entry point like anybody's."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path


class Fault:
    act_dtype = "bf16"

    def __init__(self, name, call=None, prepare=None, unsupported=None, needs_gpu=False):
        self.name = name
        self._call, self._prepare, self._unsupported, self._needs_gpu = call, prepare, unsupported, needs_gpu

    def unsupported(self, case, device):
        return "needs a GPU to go wrong on" if self._needs_gpu and not device.is_gpu else self._unsupported

    def prepare(self, layer, max_num_tokens):
        if self._prepare:
            self._prepare()
        call = partial(self._call or right, layer)
        call.facts = {"largest_batch": max_num_tokens, "process": os.getpid()}
        return call


class CompilationError(Exception):
    """Named as Triton's."""


KNOWN = {}


def right(layer, tokens):
    """Computed once for each input, down to its last bit: what goes wrong around it is tested, and timing it took a second a case."""
    from moebench.reference.torch_experts import experts

    if tokens.hidden_states.device.type != "cpu" or not len(tokens.topk_ids):  # ids of none have no stride to view
        return experts(layer, tokens, "bf16").bfloat16()
    import torch

    read = (tokens.hidden_states, tokens.topk_ids, tokens.topk_weights)
    key = (id(layer), *(part.contiguous().view(torch.uint8).numpy().tobytes() for part in read))
    if key not in KNOWN:
        KNOWN[key] = layer, experts(layer, tokens, "bf16").bfloat16()  # with the layer, so that no other gets its id
    return KNOWN[key][1].clone()


def raises(layer, tokens):
    raise RuntimeError("no kernel image is available")


def raises_at_4(layer, tokens):
    return raises(layer, tokens) if len(tokens.topk_ids) == 4 else right(layer, tokens)  # one bad token count among good ones


def raise_in_prepare():
    raise ValueError("this layout has no packed form")


def compile_error():
    raise CompilationError("at 12:7: cannot convert fp6 to bf16")


def compile_for_a_minute():
    time.sleep(60)


def nan(layer, tokens):
    import torch

    return torch.full_like(tokens.hidden_states, float("nan"))


def inf(layer, tokens):
    out = right(layer, tokens)
    out[-1, -1] = float("inf")
    return out


def zeros(layer, tokens):
    import torch

    return torch.zeros_like(tokens.hidden_states)


def writes_tokens(layer, tokens):
    out = right(layer, tokens)
    tokens.hidden_states.mul_(2)
    return out


def half_written(layer, tokens):
    import torch

    out = torch.empty_like(tokens.hidden_states)
    out[:-1] = right(layer, tokens)[:-1]
    return out


def random(layer, tokens):
    import torch

    out = right(layer, tokens)
    return out * (1 + 1e-2 * torch.rand_like(out, dtype=torch.float32)).bfloat16()


def die(layer, tokens):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(layer, tokens):
    os._exit(0)


def hang(layer, tokens):
    """With a grandchild in a process group of its own; neither heeds SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    grandchild = subprocess.Popen([sys.executable, "-c", stubborn], process_group=0)
    Path("grandchild.pid").write_text(str(grandchild.pid))
    Path("hanging.pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def flood(layer, tokens):
    line = b"a warning that says the same as the one before it\n" * 1311
    for _ in range(200 * 2**20 // len(line)):
        os.write(2, line)
    raise RuntimeError("after 200 MB of warnings")


def out_of_memory(layer, tokens):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4096.00 GiB")


POISONED = []


def poison(layer, tokens):
    POISONED.append(True)
    return poisoned(layer, tokens)


def poisoned(layer, tokens):
    if POISONED:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported asynchronously")
    return right(layer, tokens)


def chatty(layer, tokens):
    print('{"record": "not a frame"}', flush=True)  # noqa: T201  a library that prints is the fault
    return right(layer, tokens)


def slow(layer, tokens):
    time.sleep(0.2)
    return right(layer, tokens)


class Sporadic(Fault):
    """Wrong in every hundredth launch and right in all others."""

    def prepare(self, layer, max_num_tokens):
        launches = []

        def call(tokens):
            out = right(layer, tokens)
            launches.append(None)
            if len(launches) % 100 == 0:
                out[-1] = 0
            return out

        return call


# Token count -> fault; right at every other: sixty cases, twelve of them bad.
STORM = {
    5: raises,
    10: nan,
    15: inf,
    20: zeros,
    25: half_written,
    30: writes_tokens,
    33: hang,
    36: die,
    40: leave,
    45: flood,
    50: out_of_memory,
    55: poison,
}


def storm(layer, tokens):
    return STORM.get(len(tokens.topk_ids), poisoned)(layer, tokens)


# The impossible allocation comes first: after a case that was measured it would be tried again, in one process more.
GPU_STORM = {1: "huge", 3: "out_of_bounds", 5: "device_assert", 7: "endless"}


class GpuStorm(Fault):
    """Right in between, at once and in a CUDA graph: a neighbour that is slow to time costs GPU time."""

    def prepare(self, layer, max_num_tokens):
        import moebench_gpu_faults  # it imports torch

        dense = moebench_gpu_faults.Dense(layer)

        def call(tokens):
            name = GPU_STORM.get(len(tokens.topk_ids))
            return getattr(moebench_gpu_faults, name)(tokens) if name else dense(tokens)

        call.facts = {"process": os.getpid()}
        return call


fault_ok = Fault("fault_ok")
fault_raises = Fault("fault_raises", raises_at_4)
fault_prepare = Fault("fault_prepare", prepare=raise_in_prepare)
fault_compile = Fault("fault_compile", prepare=compile_error)
fault_slow_compile = Fault("fault_slow_compile", prepare=compile_for_a_minute)
fault_nan = Fault("fault_nan", nan)
fault_zeros = Fault("fault_zeros", zeros)
fault_writes = Fault("fault_writes", writes_tokens)
fault_unwritten = Fault("fault_unwritten", half_written)
fault_random = Fault("fault_random", random)
fault_dies = Fault("fault_dies", die)
fault_hangs = Fault("fault_hangs", hang)
fault_chatty = Fault("fault_chatty", chatty)
fault_slow = Fault("fault_slow", slow)
fault_sporadic = Sporadic("fault_sporadic")
fault_storm = Fault("fault_storm", storm)
fault_skips = Fault("fault_skips", unsupported="needs a quantum computer; none is known")
fault_misnamed = Fault("another_name")
fault_gpu_storm = GpuStorm("fault_gpu_storm", needs_gpu=True)
