"""Medians of one gpt-oss layer next to our Triton kernels: `PYTHONPATH=. python tests/gpu/bench_hopper_mxfp4_bf16.py [MODEL]`.

A CUDA graph of one call, 30 replays. "read": 256 MB are read before each, so the L2 holds other lines, and clean ones; "filled": 256 MB are
zeroed, which leaves 50 MB of dirty lines to write back; "rotating": a graph of 8 calls that alternate two copies of the weights, over 8.
The first version of the kernel had these on an H200, with 4 experts for 1 token, 22 for 8 and 32 for 64."""

import sys

import torch

from moebench.case import MODELS, case
from moebench.kernels.hopper_mxfp4_bf16 import HopperMxfp4Bf16
from moebench.kernels.triton_mxfp4_bf16 import TritonMxfp4Bf16
from moebench.problem import make_layer, make_tokens

FIRST_VERSION_FILLED_US = {1: 31.0, 8: 93.1, 64: 153.9}
FIRST_VERSION_ROTATING_US = {1: 24.8, 8: 83.0, 64: 148.2}
REPLAYS, CALLS = 30, 8


def say(*words):
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def captured(calls):
    for call, tokens in calls[:2]:
        call(tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, tokens in calls:
            call(tokens)
    return graph


def median_us(graph, before):
    samples = []
    for _ in range(REPLAYS):
        before()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3)
    return sorted(samples)[REPLAYS // 2]


def main():
    model = sys.argv[1] if len(sys.argv) > 1 else "gpt-oss-20b"
    buffer = torch.zeros(2**26, dtype=torch.float32, device="cuda")
    layer = make_layer(case(model, 1), "cuda")
    backends = {backend.name: [backend.prepare(layer, 64) for _ in range(2)] for backend in (HopperMxfp4Bf16(), TritonMxfp4Bf16())}
    say(torch.cuda.get_device_name(), "torch", torch.__version__, model, backends["hopper_mxfp4_bf16"][0].facts)
    for num_tokens in (1, 2, 4, 8, 16, 32, 64):
        sets = [make_tokens(case(model, num_tokens, seed=seed), "cuda") for seed in range(CALLS)]
        experts = len(sets[0].topk_ids.unique())
        weight_mb = experts * 3 * MODELS[model].hidden_size * MODELS[model].intermediate_size * 17 / 32 / 1e6
        for name, calls in backends.items():
            one = captured([(calls[0], sets[0])])
            rotating = captured([(calls[i % 2], tokens) for i, tokens in enumerate(sets)])
            read, filled = median_us(one, buffer.sum), median_us(one, buffer.zero_)
            turning = median_us(rotating, buffer.sum) / CALLS
            line = f"{num_tokens:3} tokens {experts:3} experts  {name:20} read {read:6.1f} us ({weight_mb / read:.2f} TB/s)"
            line += f"  filled {filled:6.1f}  rotating {turning:6.1f}"
            if name.startswith("hopper") and model == "gpt-oss-20b" and num_tokens in FIRST_VERSION_FILLED_US:
                line += f"  first version: {FIRST_VERSION_FILLED_US[num_tokens]}, {FIRST_VERSION_ROTATING_US[num_tokens]}"
            say(line)


if __name__ == "__main__":
    main()
