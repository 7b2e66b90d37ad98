"""Backends that go wrong on purpose, one fault each; found through the public entry point like anybody's."""

import os
import signal
from functools import partial

import torch

from moebench.reference.torch_experts import experts


class Fault:
    act_dtype = "bf16"

    def __init__(self, name, call=None, prepare=None, unsupported=None):
        self.name = name
        self._call, self._prepare, self._unsupported = call, prepare, unsupported

    def unsupported(self, case, device):
        return self._unsupported

    def prepare(self, layer, max_num_tokens):
        if self._prepare:
            self._prepare()
        call = partial(self._call or right, layer)
        call.facts = {"largest_batch": max_num_tokens}
        return call


def right(layer, tokens):
    return experts(layer, tokens, "bf16").bfloat16()


def raises(layer, tokens):
    if len(tokens.topk_ids) == 4:  # one bad token count among good ones
        raise RuntimeError("no kernel image is available")
    return right(layer, tokens)


def raise_in_prepare():
    raise MemoryError("workspace of 3 TiB")


def nan(layer, tokens):
    return torch.full_like(tokens.hidden_states, float("nan"))


def zeros(layer, tokens):
    return torch.zeros_like(tokens.hidden_states)


def writes_tokens(layer, tokens):
    out = right(layer, tokens)
    tokens.hidden_states.mul_(2)
    return out


def half_written(layer, tokens):
    out = torch.empty_like(tokens.hidden_states)
    out[:-1] = right(layer, tokens)[:-1]
    return out


def random(layer, tokens):
    out = right(layer, tokens)
    return out * (1 + 1e-2 * torch.rand_like(out, dtype=torch.float32)).bfloat16()


def die(layer, tokens):
    os.kill(os.getpid(), signal.SIGKILL)


def chatty(layer, tokens):
    print('{"record": "not a frame"}', flush=True)  # noqa: T201  a library that prints is the fault
    return right(layer, tokens)


fault_ok = Fault("fault_ok")
fault_raises = Fault("fault_raises", raises)
fault_prepare = Fault("fault_prepare", prepare=raise_in_prepare)
fault_nan = Fault("fault_nan", nan)
fault_zeros = Fault("fault_zeros", zeros)
fault_writes = Fault("fault_writes", writes_tokens)
fault_unwritten = Fault("fault_unwritten", half_written)
fault_random = Fault("fault_random", random)
fault_dies = Fault("fault_dies", die)
fault_chatty = Fault("fault_chatty", chatty)
fault_skips = Fault("fault_skips", unsupported="needs a quantum computer; none is known")
fault_misnamed = Fault("another_name")
