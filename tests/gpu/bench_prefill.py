"""Medians of prefill.cu by format and columns.

    PYTHONPATH=. python tests/gpu/bench_prefill.py MODEL TOKENS[,..] [FORMAT[:COLUMNS],..]

Each is compared with the reference first. A CUDA graph of 4 calls that alternate two copies of the weights, 12 replays, microseconds a
call. Without COLUMNS a format runs with those that it takes for the count."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moebench.case import MODELS, case
from moebench.check import compare
from moebench.kernels.hopper_mxfp4_bf16_details import launch, prefill
from moebench.kernels.hopper_mxfp4_bf16_details.compiler import cubin
from moebench.kernels.hopper_mxfp4_bf16_details.weights import pack_layer
from moebench.problem import make_layer, make_tokens
from moebench.reference.torch_experts import experts as reference

FORMATS = {"bf16": prefill.BF16, "pair": prefill.E4M3_PAIR, "fp8": prefill.E4M3}
REPLAYS, CALLS = 12, 4


@dataclass(frozen=True, kw_only=True)
class Fixed(prefill.Format):
    """A format that takes the same columns whatever the count."""

    def columns_for(self, pairs):
        return int(self.name.split(":")[1])


def say(*words):
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def format_of(text):
    name, *rest = text.split(":")
    used = FORMATS[name]
    if not rest:
        return used
    return Fixed(name=text, bf16=used.bf16, parts=used.parts, weight_slots=used.weight_slots, columns=used.columns)


def median_us(calls):
    for call, tokens in calls[:2]:
        call(tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, tokens in calls:
            call(tokens)
    graph.replay()
    samples = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(samples)[REPLAYS // 2]


def main():
    model, counts = sys.argv[1], [int(n) for n in sys.argv[2].split(",")]
    texts = sys.argv[3].split(",") if len(sys.argv) > 3 else list(FORMATS)
    layer = make_layer(case(model, 1), "cuda")
    packed = [pack_layer(layer) for _ in range(2)]
    sizes = MODELS[model]
    started = time.perf_counter()
    many = [launch.many_of(packed[0], max(counts), format_of(text)) for text in texts]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda v: cubin(prefill.SOURCE, v.defines), {str(v.defines): v for m in many for v in m.variants}.values()))
    say(torch.cuda.get_device_name(), model, f"compiled in {time.perf_counter() - started:.1f} s")
    loaded = [[launch.load(launch.Prepared(layer=p, variants=(), workspace=None, many=(m,))) for p in packed] for m in many]
    few = [launch.load(launch.prepare(layer, 64)) for _ in range(2)] if min(counts) <= 64 else []
    for num_tokens in counts:
        tokens = make_tokens(case(model, num_tokens), "cuda")
        flop = 6 * num_tokens * sizes.top_k * sizes.hidden_size * sizes.intermediate_size
        want = reference(layer, tokens, "bf16")
        runs = [("few", few)] if few and num_tokens <= 64 else []
        for text, calls in [*runs, *zip(texts, loaded, strict=True)]:
            outs = [calls[i % 2](tokens).clone() for i in range(6)]
            same = all(torch.equal(out, outs[0]) for out in outs)
            error = compare(outs[0], want, "bf16")
            us = median_us([(calls[i % 2], tokens) for i in range(CALLS)])
            columns = "" if text == "few" else format_of(text).columns_for(num_tokens * sizes.top_k / sizes.num_experts)
            say(
                f"{model} {num_tokens:6} {text:12} {columns:4} {us:9.1f} us {flop / us / 1e6:7.1f} TFLOP/s  rel_l2 {error.rel_l2:.5f}"
                f"{'' if same else '  BITS DIFFER'}"
            )


if __name__ == "__main__":
    main()
