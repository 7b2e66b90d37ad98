"""Calls that do to a GPU what broken kernels do; each ends by itself, so that no bug of ours can keep a GPU busy."""

import torch
import triton
import triton.language as tl

from moebench.mx import dequantize_mxfp4
from moebench.reference.torch_experts import swiglu

ENDLESS_S = 15  # the supervisor's patience and its kill ladder end before
SPUN = []


class Dense:
    """The layer right, every expert on every token, with all weights unpacked beforehand: a dozen launches and no look at the ids."""

    def __init__(self, layer):
        self._layer = layer
        self._w13, self._w2 = dequantize_mxfp4(layer.w13), dequantize_mxfp4(layer.w2)  # float32
        torch.bmm(self._w13, self._w13.mT)  # loads the library here, in a phase that is patient

    def __call__(self, tokens):
        layer, x = self._layer, tokens.hidden_states.float()
        experts = layer.num_local_experts
        y = torch.einsum("mh,enh->emn", x, self._w13) + layer.b13.float()[:, None]
        h = swiglu(y.flatten(0, 1), layer.swiglu).bfloat16().float().unflatten(0, (experts, -1))
        z = torch.bmm(h, self._w2.mT) + layer.b2.float()[:, None]  # [E, M, H]
        shares = torch.zeros(len(x), experts, device=x.device).scatter_add_(1, tokens.topk_ids.long(), tokens.topk_weights)
        return torch.einsum("me,emh->mh", shares, z).bfloat16()


def out_of_bounds(tokens):
    """Writes a terabyte beyond its buffer: CUDA error 700."""
    out = torch.zeros_like(tokens.hidden_states)
    _write_far[(1,)](out, 1 << 39)
    return out


def device_assert(tokens):
    """Gathers a row that is not there: CUDA error 710."""
    return tokens.hidden_states[torch.full((len(tokens.topk_ids),), 1 << 20, device="cuda")]


def endless(tokens):
    """Spins on the device, for longer than its deadline and not for ever: the calls behind the first do not add to it."""
    if not SPUN:
        SPUN.append(True)
        torch.cuda._sleep(int(ENDLESS_S * 1.98e9))  # cycles; an H200 runs at most at 1.98 GHz
    return tokens.hidden_states.clone()


def huge(tokens):
    """Asks for 4 TiB."""
    return torch.empty(1 << 42, dtype=torch.uint8, device="cuda")


@triton.jit
def _write_far(pointer, distance):
    offsets = tl.arange(0, 128)
    tl.store(pointer + distance + offsets, tl.zeros((128,), tl.bfloat16))
