# ruff: noqa: T201
"""Run every peer backend once on this GPU and tell all about it in one go: a developer tool, not a test.

    python tests/gpu/smoke_peers.py [--pack DIR] [--backends a,b] [--tokens 1,8,64,1024] [--no-ep] [--no-time]

--pack: a directory that pack_peers.py made, or where its peers.tar.xz was unpacked. For each backend: gpt-oss-20b at some token counts
and expert-parallel slices,
relative L2 and worst element against the torch reference, the sum of the slices against the whole, kernel names and counts of one
call, cold-L2 CUDA-graph medians. What raises is printed in full, and the rest goes on."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKENDS = ("openai_triton_kernels", "marlin_mxfp4_bf16", "cutlass_mxfp4_bf16@untuned", "cutlass_mxfp4_fp8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--tokens", default="1,8,64,1024")
    parser.add_argument("--no-ep", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.pack:
        sys.path.insert(0, str(options.pack.resolve()))
    import torch

    from moebench import registry
    from moebench.case import case
    from moebench.device import detect

    tokens = [int(count) for count in options.tokens.split(",")]
    device = detect()
    print(device, flush=True)
    failures = []
    for name in options.backends.split(","):
        print(f"\n==== {name}", flush=True)
        try:
            backend = registry.load(name)
            reason = backend.unsupported(case("gpt-oss-20b", tokens[0]), device)
        except Exception:  # noqa: BLE001  the tool reports everything and goes on
            traceback.print_exc(file=sys.stdout)
            failures.append(f"{name}: does not load")
            continue
        if reason:
            print("unsupported:", reason)
            continue
        slices = [(1, tokens)] + ([] if options.no_ep else [(2, [1, 64]), (4, [1, 64])])
        for ep_size, counts in slices:
            try:
                whole(backend, device, ep_size, counts, failures, timed=not options.no_time)
            except Exception:  # noqa: BLE001  the tool reports everything and goes on
                traceback.print_exc(file=sys.stdout)
                failures.append(f"{name} ep={ep_size}: {sys.exc_info()[1]!r}"[:300])
            if not alive():
                failures.append(f"{name} ep={ep_size}: the CUDA context is lost, later backends need a new process")
                break
            torch.cuda.empty_cache()
    print("\n==== " + (f"{len(failures)} problem(s)" if failures else "all right"))
    print(*failures, sep="\n")
    return bool(failures)


def whole(backend, device, ep_size, counts, failures, timed):
    """Every rank of a layer, then their sum. Ranks one after the other, so that one slice at a time is in memory."""
    import torch

    from moebench.case import case
    from moebench.problem import make_layer, make_tokens
    from moebench.reference.torch_experts import experts as reference

    sums, references = {}, {}
    for rank in range(ep_size):
        points = [case("gpt-oss-20b", m, ep_size=ep_size, ep_rank=rank) for m in counts]
        layer = make_layer(points[0], "cuda:0")
        checksum = layer.checksum()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call = backend.prepare(layer, max(counts))
        torch.cuda.synchronize()
        print(f"ep {rank}/{ep_size}: prepared in {time.perf_counter() - started:.1f} s, facts {getattr(call, 'facts', None)}", flush=True)
        if layer.checksum() != checksum:
            failures.append(f"{backend.name}: prepare changed the layer")
        for point in points:
            tokens = make_tokens(point, "cuda:0")
            m = point.num_tokens
            want = reference(layer, tokens, backend.act_dtype)
            try:
                one(backend, device, layer, call, tokens, want, point, failures, timed=timed and rank == 0)
                got = call(tokens).float()
                torch.cuda.synchronize()
            except Exception:  # noqa: BLE001  the tool reports everything and goes on
                traceback.print_exc(file=sys.stdout)
                failures.append(f"{backend.name} {point.label}: {sys.exc_info()[1]!r}"[:300])
                if not alive():
                    return
                continue
            sums[m] = sums.get(m, 0) + got
            references[m] = references.get(m, 0) + want
        del layer, call
        torch.cuda.empty_cache()
    if ep_size > 1:
        for m in sums:
            print(f"sum of {ep_size} slices, M={m}: relative L2 {((sums[m] - references[m]).norm() / references[m].norm()).item():.5f}")


def one(backend, device, layer, call, tokens, want, point, failures, timed):
    """Check, bit-identity, kernels, time."""
    import torch

    from moebench.check import inspect
    from moebench.timing import GPU_RULE, CudaStopwatch, measure

    found = inspect(call, layer, tokens, want, backend.act_dtype)
    error = found.error
    text = f"relative L2 {error.rel_l2:.5f} worst {error.worst:.4f}" if error else "no output to compare"
    empty = (tokens.topk_ids - layer.local_expert_start).div(layer.num_local_experts, rounding_mode="floor").ne(0).all(1)
    print(f"{point.label}: {found.status} {found.reason} {text}; {int(empty.sum())} tokens without a local expert", flush=True)
    if found.status != "ok":
        failures.append(f"{backend.name} {point.label}: {found.status} {found.reason}"[:400])
        detail(call(tokens).float(), want)
    names = kernels(lambda: call(tokens))
    for kernel, count in names.items():
        print(f"    {count} x {kernel[:150]}")
    pattern = getattr(backend, "kernel_pattern", None)
    if pattern and not any(re.search(pattern, kernel) for kernel in names) and bool((~empty).any()):
        failures.append(f"{backend.name} {point.label}: no kernel matches {pattern!r}; full names: {list(names)}"[:1500])
    if not timed:
        return
    watch = CudaStopwatch(lambda: call(tokens), "cold", device.l2_bytes)
    timing = measure(watch, GPU_RULE)
    replayed = watch.run().float()
    torch.cuda.synchronize()
    rel = ((replayed - want).norm() / want.norm().clamp(min=1e-30)).item()
    print(
        f"    {timing.clock} cold L2: median {statistics.median(timing.samples_us):.1f} us of {len(timing.samples_us)}; {timing.note}"
        f" what was timed: relative L2 {rel:.5f}",
        flush=True,
    )


def detail(got, want):
    """Where it is wrong: by token and by column, and what a factor or a shift would explain."""
    import torch

    rows = ((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30))[:8]
    columns = (got - want).norm(dim=0) / want.norm(dim=0).clamp(min=1e-30)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=got.device)
    quantiles = [round(v, 4) for v in torch.quantile(columns, levels).tolist()]
    print("    by token:", [round(v, 4) for v in rows.tolist()], "by column, quantiles:", quantiles)
    scale = (got * want).sum() / want.pow(2).sum().clamp(min=1e-30)
    cosine = (got * want).sum() / (got.norm() * want.norm()).clamp(min=1e-30)
    odd = f"nonfinite {int((~got.isfinite()).sum())}, zeros {int((got == 0).sum())}"
    print(f"    best factor {scale.item():.4f}, cosine {cosine.item():.4f}, {odd}")
    print("    got ", [round(v, 4) for v in got[0, :8].tolist()])
    print("    want", [round(v, 4) for v in want[0, :8].tolist()])


def kernels(call):
    """CUDA kernel names of one call, with counts."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(event.name for event in events)


def alive():
    import torch

    try:
        return int(torch.ones(8, device="cuda").sum()) == 8
    except RuntimeError:
        return False


if __name__ == "__main__":
    sys.exit(main())
