"""Check our Triton kernels on a GPU, then time candidates for their table: `PYTHONPATH=. python tests/gpu/bench_triton_mxfp4_bf16.py`.

gpt-oss-20b, top-4, random routing. Cold L2: 256 MB are zeroed before each replay of a CUDA graph; median of 20. What a candidate
changes is one GEMM's tile, so differences between rows of a block are differences of that GEMM."""

import itertools
import multiprocessing
import sys
import time
from collections import defaultdict
from dataclasses import replace

import torch

from moebench.kernels.triton_mxfp4_bf16_details import launch
from moebench.kernels.triton_mxfp4_bf16_details.configs import Tile, choose, shipped
from moebench.kernels.triton_mxfp4_bf16_details.layout import Packed
from moebench.mx import Mxfp4, dequantize_mxfp4
from moebench.problem import Layer, Swiglu, Tokens

HIDDEN = INTERMEDIATE = 2880
EXPERTS, TOP_K = 32, 4
CONFIGS = shipped("sm90")
TARGETS_US = {1: 136, 64: 342, 1024: 881, 8192: 5336}  # 1.5 times OpenAI's triton_kernels on the same machine
DEVICE = "cuda"


def say(*words):
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def make_weight(experts, rows, columns, scale_bytes):
    codes = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(scale_bytes[0], scale_bytes[1] + 1, (experts, rows, columns // 32), dtype=torch.uint8, device=DEVICE)
    return Mxfp4(codes, scales)


def make_layer(
    hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS, scale_bytes=(116, 120), scale_bytes_w2=(116, 124), bias=True, limit=7.0
):
    """Scales of W13 that bring y near 2, so that the clamp is reached, but not by all."""
    return Layer(
        num_experts=experts,
        ep_size=1,
        ep_rank=0,
        tp_size=1,
        tp_rank=0,
        hidden_size=hidden,
        intermediate_size=intermediate,
        w13=make_weight(experts, 2 * intermediate, hidden, scale_bytes),
        w2=make_weight(experts, hidden, intermediate, scale_bytes_w2),
        b13=torch.randn(experts, 2 * intermediate, device=DEVICE).bfloat16() if bias else None,
        b2=torch.randn(experts, hidden, device=DEVICE).bfloat16() if bias else None,
        swiglu=Swiglu(alpha=1.702, beta=1.0, limit=limit),
    )


def make_tokens(num_tokens, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K):
    ids = torch.rand(num_tokens, experts, device=DEVICE).topk(top_k, dim=1).indices.int()
    weights = torch.softmax(torch.randn(num_tokens, top_k, device=DEVICE), 1)
    return Tokens(hidden_states=torch.randn(num_tokens, hidden, device=DEVICE).bfloat16(), topk_ids=ids, topk_weights=weights)


def rank_of(layer, rank, size):
    count = layer.num_experts // size
    mine = slice(rank * count, (rank + 1) * count)
    return replace(
        layer,
        ep_size=size,
        ep_rank=rank,
        w13=Mxfp4(layer.w13.codes[mine], layer.w13.scales[mine]),
        w2=Mxfp4(layer.w2.codes[mine], layer.w2.scales[mine]),
        b13=None if layer.b13 is None else layer.b13[mine],
        b2=None if layer.b2 is None else layer.b2[mine],
    )


def reference(layer, tokens):
    x, ids = tokens.hidden_states.float(), tokens.topk_ids
    out = torch.zeros_like(x)
    for e in range(layer.num_local_experts):
        hit = ids == layer.local_expert_start + e
        mine = hit.any(1).nonzero().flatten()
        if not len(mine):
            continue
        y = x[mine] @ dequantize_mxfp4(Mxfp4(layer.w13.codes[e], layer.w13.scales[e])).T
        y = y if layer.b13 is None else y + layer.b13[e].float()
        gate, up = y[:, 0::2], y[:, 1::2]
        if layer.swiglu.limit is not None:
            gate, up = gate.clamp(max=layer.swiglu.limit), up.clamp(-layer.swiglu.limit, layer.swiglu.limit)
        h = (gate * torch.sigmoid(layer.swiglu.alpha * gate) * (up + layer.swiglu.beta)).bfloat16().float()
        z = h @ dequantize_mxfp4(Mxfp4(layer.w2.codes[e], layer.w2.scales[e])).T
        z = z if layer.b2 is None else z + layer.b2[e].float()
        out[mine] += z * (tokens.topk_weights * hit).sum(1)[mine, None]
    return out


def poison():
    """Leave NaN in the memory that the next call's buffers come from."""
    for size in (2**20, 2**24, 2**28, 2**30):
        torch.full((size // 4,), float("nan"), device=DEVICE)


def check(name, layer, tokens, config=None, prepared=None):
    prepared = prepared or launch.prepare(layer)
    poison()
    got = launch.run(prepared, tokens, config)
    poison()
    again = launch.run(prepared, tokens, config)
    want = reference(layer, tokens)
    error = ((got.float() - want).norm() / want.norm().clamp_min(1e-30)).item()
    verdict = "ok" if error < 4e-3 and torch.equal(got, again) else "WRONG" if error >= 4e-3 or error != error else "NOT REPRODUCIBLE"
    say(f"  {verdict:8} {error:.2e}  {name}")
    return got


def check_all(layer, prepared):
    say("relative L2 error against fp32 torch, and the same bits twice:")
    for num_tokens in (1, 3, 8, 9, 64, 129, 1024, 8192):
        tokens = make_tokens(num_tokens)
        check(f"M={num_tokens}", layer, tokens, prepared=prepared)
    for config in CONFIGS:
        tokens = make_tokens(77)
        ptx = check(f"config of {config.tokens} tokens, M=77", layer, tokens, replace(config, dense_up_to=0), prepared)
        ops = launch.run(replace(prepared, mode="ops"), tokens, replace(config, dense_up_to=0))
        say(f"  {'ok' if torch.equal(ptx, ops) else 'DIFFER'}: inline PTX and Triton's own operations, config of {config.tokens} tokens")
    tokens = make_tokens(40)
    tokens.topk_ids[0] = 3
    tokens.topk_ids[1:5] = torch.tensor([-1, 32, 1 << 30, 5], dtype=torch.int32, device=DEVICE)
    check("duplicate ids and ids of nobody", layer, tokens, prepared=prepared)
    for size, rank in ((2, 1), (8, 3)):
        for num_tokens in (2, 300, 5000):
            check(f"EP rank {rank} of {size}, M={num_tokens}", rank_of(layer, rank, size), make_tokens(num_tokens))
    for hidden, intermediate in ((2880, 1440), (2880, 736), (2880, 672), (320, 192), (96, 32), (4096, 1536)):
        small = make_layer(hidden, intermediate, 8, bias=False, limit=None)
        for num_tokens in (5, 100, 600):
            check(f"H={hidden} I={intermediate} M={num_tokens}, top-8, no biases, no limit", small, make_tokens(num_tokens, hidden, 8, 8))
    wide = make_layer(512, 416, 8, scale_bytes=(118, 130), scale_bytes_w2=(1, 126))
    wide.w13.scales[:, :, 0] = 129
    check("scales above 2", wide, make_tokens(50, 512, 8))
    many = make_layer(256, 128, 256)
    for num_tokens in (4, 500, 8192):
        check(f"256 experts, top-8, M={num_tokens}", many, make_tokens(num_tokens, 256, 256, 8))
    tokens = make_tokens(1000, 256, 65, 1)
    tokens.topk_ids.fill_(64)
    check("65 experts, all tokens to the last", make_layer(256, 128, 65), tokens)
    dequantizing(layer, prepared)


def dequantizing(layer, prepared):
    """With unit vectors for tokens, and the first half of the swiglu undone, h shows single weights: all of one expert are compared."""
    identity = torch.eye(HIDDEN, device=DEVICE).bfloat16()
    tokens = Tokens(
        hidden_states=identity,
        topk_ids=torch.full((HIDDEN, 1), 5, dtype=torch.int32, device=DEVICE),
        topk_weights=torch.ones(HIDDEN, 1, device=DEVICE),
    )
    for name, linear in (("fast", replace(prepared, b13=None, b2=None)), ("ops", replace(prepared, b13=None, b2=None, mode="ops"))):
        got = launch.run(linear, tokens)
        want = reference(replace(layer, b13=None, b2=None), tokens)
        worst = ((got.float() - want).abs().max() / want.abs().max()).item()
        say(f"  {'ok' if worst < 8e-3 else 'WRONG':8} {worst:.2e}  largest error, unit vectors as tokens, {name}")


# --- timing -------------------------------------------------------------------------------------------------------------------------


def tile(blocks, warps, stages, steps=2, **more):
    return Tile(blocks=blocks, warps=warps, stages=stages, steps=steps, **more)


DECODE = [
    tile(1, 4, 3),
    *(tile(1, 4, 4), tile(1, 4, 5), tile(1, 4, 6), tile(1, 4, 3, 4), tile(1, 4, 4, 4), tile(2, 4, 3), tile(2, 4, 4), tile(2, 4, 5)),
    *(tile(2, 4, 3, 4), tile(2, 8, 4), tile(2, 8, 3, 4), tile(4, 8, 3), tile(4, 8, 4)),
]
MIDDLE = [
    *(tile(1, 4, 3), tile(1, 4, 4), tile(1, 4, 4, 1), tile(2, 4, 3), tile(2, 8, 3), tile(2, 8, 4), tile(2, 8, 4, 1)),
    *(tile(4, 8, 3), tile(4, 8, 4)),
]
LARGE = [
    *(tile(1, 4, 3, 1), tile(1, 4, 4, 1), tile(1, 4, 2), tile(2, 8, 3), tile(2, 8, 3, 1), tile(2, 8, 4, 1), tile(2, 8, 5, 1)),
    *(tile(4, 8, 2), tile(4, 8, 3), tile(4, 8, 3, 1), tile(4, 8, 4, 1)),
]
HUGE = [tile(1, 4, 2, 1), tile(2, 8, 2), tile(2, 8, 2, 1), tile(2, 8, 3, 1), tile(2, 8, 4, 1)]  # 256 tokens


def rasters(tiles, values):
    return [replace(t, raster=raster) for t, raster in itertools.product(tiles, values)]


def candidates():
    """(num_tokens, base configuration, tiles to try in it)."""
    decode, low, middle, large, _ = (replace(c, dense_up_to=16) if c.tokens == 16 else c for c in CONFIGS)
    split = [replace(t, splits=s) for t in (tile(1, 4, 4), tile(2, 4, 3), tile(1, 4, 3, 4)) for s in (2, 3, 4)]
    yield 1, decode, DECODE, DECODE + split
    yield 8, decode, DECODE, DECODE + split
    yield 16, decode, DECODE[:2], DECODE[:2]
    yield 16, replace(decode, dense_up_to=0), DECODE[:2], DECODE[:2]
    yield 64, replace(decode, dense_up_to=0), DECODE, DECODE + split[:3]
    yield 64, replace(low, fp32_z=True), MIDDLE, MIDDLE
    yield 128, replace(low, fp32_z=True), MIDDLE, MIDDLE
    yield 256, low, MIDDLE, MIDDLE
    yield 256, middle, MIDDLE, MIDDLE
    yield 512, middle, MIDDLE, MIDDLE
    yield 512, large, LARGE, LARGE
    yield 1024, middle, rasters(MIDDLE[4:], (1, 4)), rasters(MIDDLE[4:], (1, 4))
    yield 1024, large, rasters(LARGE, (1, 4)), rasters(LARGE, (1, 4))
    yield 8192, large, rasters(LARGE, (4, 8)), rasters(LARGE, (4, 8))
    yield 8192, replace(large, tokens=256), rasters(HUGE, (2, 4)), rasters(HUGE, (2, 4))


def configs_of(base, ups, downs):
    yield "base", base
    for up in ups:
        yield "gate_up", replace(base, gate_up=up)
    for down in downs:
        if down.splits == 1 or base.fp32_z:
            yield "down", replace(base, down=down)


def blank_layer():
    """Weights of the right shape and any content, for compiling."""

    def packed(rows):
        codes = torch.zeros(EXPERTS, rows // 64, HIDDEN // 32, 512, dtype=torch.int16, device=DEVICE)
        return Packed(codes, torch.zeros(EXPERTS, rows // 64, HIDDEN // 64, 32, dtype=torch.int32, device=DEVICE), False)

    bias = torch.zeros(EXPERTS, 2 * INTERMEDIATE, device=DEVICE).bfloat16()
    return launch.Prepared(
        w13=packed(2 * INTERMEDIATE), w2=packed(HIDDEN), b13=bias, b2=bias, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS, num_local_experts=EXPERTS, first_expert=0, alpha=1.702, beta=1.0, limit=7.0,
        mode="ptx", configs=CONFIGS, configs_from="shipped",
    )  # fmt: skip


def compile_share(share):
    layer, failed = blank_layer(), []
    for num_tokens, config in share:
        try:
            launch.run(layer, make_tokens(min(num_tokens, 20) if num_tokens > config.dense_up_to else 1), config)
        except Exception as error:  # noqa: BLE001  a candidate may need more shared memory than there is
            failed.append((config, str(error).splitlines()[0][:90]))
    torch.cuda.synchronize()
    return failed


def compile_in_parallel(wanted, processes=16):
    """Fill Triton's cache; returns the configurations that do not compile or launch."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        shares = pool.map(compile_share, [wanted[i::processes] for i in range(processes)])
    return dict(failure for share in shares for failure in share)


def cold_us(call, flush, replays=20):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    samples = []
    for _ in range(replays + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3)
    return sorted(samples[3:])[replays // 2]


def breakdown(call, flush):
    """Microseconds of each kernel in one call with cold L2."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        flush.zero_()
        call()
        torch.cuda.synchronize()
    ours = ("sort_pairs", "count_pairs", "place_pairs", "gate_up_kernel", "down_kernel", "add_slots")
    return ", ".join(f"{e.name} {e.device_time:.1f}" for e in prof.events() if e.name in ours)


def describe(which, config):
    if which == "base":
        return f"base: gate_up {brief(config.gate_up)} down {brief(config.down)}"
    return f"{which} {brief(getattr(config, which))}"


def brief(t):
    more = (f" split{t.splits}" if t.splits > 1 else "") + (f" raster{t.raster}" if t.raster > 1 else "")
    return f"rows{64 * t.blocks} k{64 * t.steps} w{t.warps} s{t.stages}{more}"


def bench(prepared, full):
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    say("\nas shipped, cold:")
    for num_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        tokens = make_tokens(num_tokens)
        us = cold_us(lambda: launch.run(prepared, tokens), flush)  # noqa: B023  called at once
        target = TARGETS_US.get(num_tokens)
        against = f"  (target {target}: {us / target:.2f})" if target else ""
        say(f"  M={num_tokens:5} {us:8.1f} us  {num_tokens * 199.1e6 / us / 1e6:6.1f} TFLOP/s{against}")
    for num_tokens in (1, 8, 64, 1024, 8192):
        tokens = make_tokens(num_tokens)
        say(f"  M={num_tokens} by kernel:", breakdown(lambda: launch.run(prepared, tokens), flush))  # noqa: B023
    if not full:
        return
    regimes = [(m, base, list(configs_of(base, ups, downs))) for m, base, ups, downs in candidates()]
    wanted = list(dict.fromkeys((m, config) for m, _, configs in regimes for _, config in configs))
    begin = time.time()
    failed = compile_in_parallel(wanted)
    say(f"\n{len(wanted)} candidates compiled in {time.time() - begin:.0f} s; {len(failed)} cannot run:")
    for reason, count in sorted(defaultdict(int, ((r, list(failed.values()).count(r)) for r in failed.values())).items()):
        say(f"  {count} x {reason}")
    for num_tokens, base, configs in regimes:
        torch.manual_seed(num_tokens)
        tokens = make_tokens(num_tokens)
        say(f"\nM={num_tokens}, tiles of {base.tokens} tokens, dense up to {base.dense_up_to}, z {'fp32' if base.fp32_z else 'bf16'}")
        rows = []
        for which, config in configs:
            if config not in failed:
                us = cold_us(lambda: launch.run(prepared, tokens, config), flush)  # noqa: B023
                rows.append((us, which, config))
        for part in ("base", "gate_up", "down"):
            best = sorted((row for row in rows if row[1] == part), key=lambda row: row[0])
            for us, which, config in best[: 6 if part != "base" else 1]:
                say(f"  {us:8.1f} us  {describe(which, config)}")
            if len(best) > 7:
                say(f"  {best[-1][0]:8.1f} us  {describe(part, best[-1][2])} (slowest)")


def main():
    torch.manual_seed(0)
    begin = time.time()
    properties = torch.cuda.get_device_properties(0)
    say(properties.name, "torch", torch.__version__, "triton", launch.triton.__version__)
    layer = make_layer()
    prepared = launch.prepare(layer)
    launch.warm_up(prepared, 8192)
    torch.cuda.synchronize()
    say(f"prepared and warm after {time.time() - begin:.0f} s")
    say("config of 256 pairs:", choose(CONFIGS, 256, EXPERTS).tokens, "tokens a tile;", "of 32768:", choose(CONFIGS, 32768, EXPERTS).tokens)
    if "--no-check" not in sys.argv:
        check_all(layer, prepared)
    say(f"checked after {time.time() - begin:.0f} s")
    bench(prepared, "--no-tune" not in sys.argv)
    say(f"done after {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
