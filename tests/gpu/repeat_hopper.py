"""Our Hopper kernels launched 10,000 times in every regime: does each launch give the first one's bits?

    PYTHONPATH=. python tests/gpu/repeat_hopper.py [LAUNCHES]

Two copies of the weights and two batches in turn; outputs are compared on the device. Exit status 1 where a bit differs."""

import sys
import time

import torch

from moebench.case import case
from moebench.kernels.hopper_mxfp4_bf16_details import launch, prefill
from moebench.problem import make_layer, make_tokens

MODEL = "gpt-oss-20b"
FEW, MANY = (
    (1, 8, 32, 64),
    {"bf16": (prefill.BF16, (512, 1024, 4096)), "e4m3 pair": (prefill.E4M3_PAIR, (128, 256)), "e4m3": (prefill.E4M3, (256,))},
)


def say(*words):
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def differing(calls, num_tokens, launches):
    """Launches, of so many, whose output is not that of the first one with the same batch."""
    batches = [make_tokens(case(MODEL, num_tokens, seed=seed), "cuda") for seed in range(2)]
    first = [calls[0](batch).clone() for batch in batches]
    found = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(launches):
        out = calls[number // 2 % 2](batches[number % 2])
        found += (out.view(torch.int16) != first[number % 2].view(torch.int16)).any()
    return int(found)


def main():
    launches = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    layer = make_layer(case(MODEL, 1), "cuda")
    few = [launch.load(launch.prepare(layer, max(FEW))) for _ in range(2)]
    regimes = [("few tokens", few, FEW)]
    for name, (used, counts) in MANY.items():
        regimes.append((name, [launch.load(launch.prepare_format(layer, max(counts), used)) for _ in range(2)], counts))
    say(torch.cuda.get_device_name(), MODEL)
    bad = 0
    for name, calls, counts in regimes:
        for num_tokens in counts:
            started = time.perf_counter()
            found = differing(calls, num_tokens, launches)
            say(f"{name:10} {num_tokens:5} tokens {launches} launches, {found} differ, {time.perf_counter() - started:.1f} s")
            bad += found
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
