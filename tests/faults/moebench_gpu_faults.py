"""Calls that do to a GPU what broken kernels do; each ends by itself, so that no bug of ours can keep a GPU busy."""

import torch
import triton
import triton.language as tl

ENDLESS_S = 20


def out_of_bounds(tokens):
    """Writes a terabyte beyond its buffer: CUDA error 700."""
    out = torch.zeros_like(tokens.hidden_states)
    _write_far[(1,)](out, 1 << 39)
    return out


def device_assert(tokens):
    """Gathers a row that is not there: CUDA error 710."""
    return tokens.hidden_states[torch.full((len(tokens.topk_ids),), 1 << 20, device="cuda")]


def endless(tokens):
    """Spins on the device, for longer than its deadline and not for ever."""
    torch.cuda._sleep(int(ENDLESS_S * 1.98e9))  # cycles; an H200 runs at most at 1.98 GHz
    return tokens.hidden_states.clone()


def huge(tokens):
    """Asks for 4 TiB."""
    return torch.empty(1 << 42, dtype=torch.uint8, device="cuda")


@triton.jit
def _write_far(pointer, distance):
    offsets = tl.arange(0, 128)
    tl.store(pointer + distance + offsets, tl.zeros((128,), tl.bfloat16))
