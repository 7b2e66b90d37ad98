"""A layer ready to run: its workspaces, its kernels, and which of them a call gets."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebench.kernels.hopper_mxfp4_bf16_details import prefill
from moebench.kernels.hopper_mxfp4_bf16_details.compiler import cubin
from moebench.kernels.hopper_mxfp4_bf16_details.prefill import Weights
from moebench.kernels.hopper_mxfp4_bf16_details.shape import (
    MAX_TOP_K,
    SPLIT_ONCE_ABOVE,
    THREADS,
    TIERS,
    Sizes,
    Tier,
    Variant,
    tier_of,
    variant,
)
from moebench.kernels.hopper_mxfp4_bf16_details.weights import PackedLayer, pack_layer

if TYPE_CHECKING:
    from moebench.problem import Layer, Tokens

SOURCE = "moe.cu"
SURE_BLOCKS = 64  # every sm90 GPU has more multiprocessors; moe.cu wants one for each token, and above so many prefill.cu stands by
KERNEL = b"hopper_mxfp4_bf16"


class Arguments(ctypes.Structure):
    """`struct Arguments` of moe.cu."""

    _fields_ = [
        ("up", Weights),
        ("down", Weights),
        *((name, ctypes.c_void_p) for name in ("x_high", "x_low", "x_factor", "h_high", "h_low", "h", "z", "counters")),
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "top_k", "first_expert")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit", "h_scale")),
    ]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What a launch writes besides its output. One launch at a time: two streams need two of these."""

    x_high: Tensor  # uint8 (e4m3) [tokens, padded H]; the padding is 0 and stays so, here and below
    x_low: Tensor
    x_factor: Tensor  # float32 [tokens]
    h_high: Tensor  # uint8 (e4m3) [pairs, padded I]
    h_low: Tensor
    h: Tensor  # bf16 [pairs, I]
    z: Tensor  # float32 [pairs, H]
    counters: Tensor  # int32, zeros between launches


@dataclass(frozen=True, kw_only=True)
class Many:
    """What calls of more tokens than the one before get: variants of prefill.cu and their workspace."""

    max_tokens: int
    format: prefill.Format
    variants: tuple[prefill.Variant, ...]
    workspace: prefill.Workspace


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A layer's weights in our layout, and what the kernels for its token counts need."""

    layer: PackedLayer
    variants: tuple[Variant, ...]  # of moe.cu, by rising token count
    workspace: Workspace | None  # of them
    many: tuple[Many, ...]  # by rising token count


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A variant of moe.cu that is loaded and may be launched."""

    variant: Variant
    module: object  # keeps the function alive
    function: object
    blocks: int


@dataclass(frozen=True, kw_only=True)
class ManyKernels:
    """Variants of prefill.cu that are loaded and may be launched."""

    many: Many
    modules: tuple[object, ...]
    functions: dict[int, object]  # by columns
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The call that a backend returns."""

    prepared: Prepared
    kernels: tuple[Kernel, ...]
    many: tuple[ManyKernels, ...] = ()
    facts: dict[str, str | int | float]

    def __call__(self, tokens: Tokens) -> Tensor:
        return run(self, tokens)


def prepare(layer: Layer, max_num_tokens: int) -> Prepared:
    """Copy the weights into our layout; the layer itself is not kept. Works on any device."""
    packed = pack_layer(layer)
    sizes, bounded, outliers = packed.sizes, packed.h_scale is not None, packed.num_outliers > 0
    variants = []
    for tier in tiers_up_to(sizes, max_num_tokens):
        found = variant(sizes, tier, h_static=bounded, outliers=outliers)
        if found is None:
            raise ValueError(f"hidden_size={sizes.hidden}, intermediate_size={sizes.intermediate} need more shared memory than a block has")
        variants.append(found)
    formats = [(sizes.pair_up_to, prefill.E4M3_PAIR)] if bounded else []
    many, before = [], min(sizes.few_up_to, SURE_BLOCKS)
    for up_to, used in (*formats, (max_num_tokens, prefill.BF16)):
        if before < max_num_tokens and before < up_to:
            before = min(up_to, max_num_tokens)
            many.append(many_of(packed, before, used))
    return Prepared(
        layer=packed,
        variants=tuple(variants),
        workspace=_workspace(sizes, variants, packed.device) if variants else None,
        many=tuple(many),
    )


def prepare_format(layer: Layer, max_num_tokens: int, used: prefill.Format) -> Prepared:
    """For one format of prefill.cu at every token count."""
    packed = pack_layer(layer)
    return Prepared(layer=packed, variants=(), workspace=None, many=(many_of(packed, max(max_num_tokens, 1), used),))


def many_of(packed: PackedLayer, max_tokens: int, used: prefill.Format) -> Many:
    sizes, outliers = packed.sizes, packed.num_outliers > 0
    if sizes.local_experts > prefill.MOST_EXPERTS:
        raise ValueError(f"{sizes.local_experts} experts are more than the {prefill.MOST_EXPERTS} that the kernel sorts for")
    columns = used.columns_up_to(max_tokens * MAX_TOP_K / sizes.num_experts)
    return Many(
        max_tokens=max_tokens,
        format=used,
        variants=tuple(prefill.Variant(sizes=sizes, format=used, columns=n, outliers=outliers) for n in columns),
        workspace=prefill.workspace(sizes, used, max_tokens, packed.device),
    )


def tiers_up_to(sizes: Sizes, max_num_tokens: int) -> tuple[Tier, ...]:
    """Those of moe.cu that calls of up to so many tokens need."""
    last = tier_of(min(max_num_tokens, sizes.few_up_to))
    return tuple(tier for tier in TIERS if tier.max_tokens <= last.max_tokens)


def load(prepared: Prepared) -> Loaded:
    """Compile, load, and make sure that all blocks of a launch of moe.cu can run at the same time, since they wait for each other."""
    started = perf_counter()
    layer = prepared.layer
    multiprocessors = torch.cuda.get_device_properties(layer.device).multi_processor_count
    driver = import_module("cuda.bindings.driver")
    wanted = [(SOURCE, KERNEL, v.shared_bytes, v.defines) for v in prepared.variants]
    wanted += [(prefill.SOURCE, prefill.KERNEL, v.shared_bytes, v.defines) for many in prepared.many for v in many.variants]
    with ThreadPoolExecutor() as threads:  # half a second each, those of prefill.cu several
        cubins = list(threads.map(cubin, [source for source, *_ in wanted], [defines for *_, defines in wanted]))
    functions = []
    with torch.cuda.device(layer.device):  # makes torch's context the driver's current one
        for (_, name, shared_bytes, _), compiled in zip(wanted, cubins, strict=True):
            module = _done(driver, driver.cuModuleLoadData(compiled.code))
            function = _done(driver, driver.cuModuleGetFunction(module, name))
            shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver, driver.cuFuncSetAttribute(function, shared, shared_bytes))
            functions.append((module, function))
        kernels = []
        for v, (module, function) in zip(prepared.variants, functions, strict=False):
            resident = _done(driver, driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, v.shared_bytes))
            assert isinstance(resident, int)
            if problem := residency_error(multiprocessors, resident * multiprocessors, v):
                raise RuntimeError(problem)
            kernels.append(Kernel(variant=v, module=module, function=function, blocks=multiprocessors))
    rest = iter(functions[len(kernels) :])
    loaded = []
    for many in prepared.many:
        own = [next(rest) for _ in many.variants]
        by_columns = {v.columns: function for v, (_, function) in zip(many.variants, own, strict=True)}
        loaded.append(ManyKernels(many=many, modules=tuple(m for m, _ in own), functions=by_columns, blocks=multiprocessors))
    facts: dict[str, str | int | float] = {
        "compiler": ", ".join(sorted({compiled.compiler for compiled in cubins})),
        "compiled": sum(not compiled.cached for compiled in cubins),
        "load_s": perf_counter() - started,
        "stage_k": layer.sizes.stage.columns,
        "outlier_blocks": layer.num_outliers,
        "h_scale": layer.h_scale or "per row",
        "blocks": multiprocessors,
    }
    return Loaded(prepared=prepared, kernels=tuple(kernels), many=tuple(loaded), facts=facts)


def residency_error(blocks: int, fit: int, wanted: Variant) -> str | None:
    """A sentence if a launch would wait for blocks that cannot start."""
    if fit < blocks:
        return (
            f"the launch needs {blocks} blocks of {THREADS} threads and {wanted.shared_bytes} bytes of shared memory "
            f"to run at the same time, and {fit} fit on this GPU; use triton_mxfp4_bf16"
        )
    return None


def run(loaded: Loaded, tokens: Tokens) -> Tensor:
    """bf16 [M, H], every element written by one launch on the current stream."""
    layer = loaded.prepared.layer
    out = torch.empty(tokens.num_tokens, layer.sizes.hidden, dtype=torch.bfloat16, device=tokens.hidden_states.device)
    if tokens.num_tokens == 0:
        return out
    x, ids, weights = _aligned(tokens.hidden_states), tokens.topk_ids.contiguous(), tokens.topk_weights.contiguous()
    few = next((kernel for kernel in loaded.kernels if tokens.num_tokens <= kernel.variant.tier.max_tokens), None)
    # a launch of moe.cu above SPLIT_ONCE_ABOVE tokens wants a block for each
    if few is not None and (tokens.num_tokens <= few.blocks or tokens.num_tokens <= SPLIT_ONCE_ABOVE or not loaded.many):
        _launch_few(few, arguments(loaded.prepared, x, ids, weights, out), tokens.num_tokens, out.device)
        return out
    many = next((kernel for kernel in loaded.many if tokens.num_tokens <= kernel.many.max_tokens), None)
    if many is None:
        most = max([*(k.variant.tier.max_tokens for k in loaded.kernels), *(k.many.max_tokens for k in loaded.many)])
        raise ValueError(f"num_tokens={tokens.num_tokens} is more than the {most} this layer was prepared for")
    given = prefill.arguments(layer, many.many.workspace, x, ids, weights, out, many.blocks)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(given))  # the launch copies what it points at
    driver = import_module("cuda.bindings.driver")
    stream = driver.CUstream(torch.cuda.current_stream(out.device).cuda_stream)
    columns = many.many.format.columns_for(tokens.num_tokens * ids.shape[1] / layer.sizes.num_experts)
    wanted = next(v for v in many.many.variants if v.columns == columns)
    with torch.cuda.device(out.device):
        _done(
            driver,
            driver.cuLaunchKernel(
                many.functions[columns],
                many.blocks,
                1,
                1,
                prefill.THREADS,
                1,
                1,
                wanted.shared_bytes,
                stream,
                ctypes.addressof(pointers),
                0,
            ),
        )
    return out


def _launch_few(kernel: Kernel, given: Arguments, num_tokens: int, device: torch.device) -> None:
    if num_tokens > kernel.blocks and num_tokens > SPLIT_ONCE_ABOVE:
        raise ValueError(f"num_tokens={num_tokens} needs as many blocks to split them, and this GPU runs {kernel.blocks}")
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(given))
    driver = import_module("cuda.bindings.driver")
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        _done(
            driver,
            driver.cuLaunchCooperativeKernel(
                kernel.function, kernel.blocks, 1, 1, THREADS, 1, 1, kernel.variant.shared_bytes, stream, ctypes.addressof(pointers)
            ),
        )


def arguments(prepared: Prepared, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Arguments:
    """For moe.cu, of contiguous tensors; they must outlive the launch, or belong to torch's allocator and its stream."""
    top_k = ids.shape[1]
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is more than the {MAX_TOP_K} slots that the kernel is written for")
    work, layer = prepared.workspace, prepared.layer
    assert work is not None
    swiglu = layer.swiglu
    return Arguments(
        up=Weights(*layer.w13_pointers),
        down=Weights(*layer.w2_pointers),
        x_high=work.x_high.data_ptr(),
        x_low=work.x_low.data_ptr(),
        x_factor=work.x_factor.data_ptr(),
        h_high=work.h_high.data_ptr(),
        h_low=work.h_low.data_ptr(),
        h=work.h.data_ptr(),
        z=work.z.data_ptr(),
        counters=work.counters.data_ptr(),
        x=x.data_ptr(),
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
        out=out.data_ptr(),
        tokens=ids.shape[0],
        top_k=top_k,
        first_expert=layer.first_expert,
        alpha=swiglu.alpha,
        beta=swiglu.beta,
        limit=float("inf") if swiglu.limit is None else swiglu.limit,
        h_scale=layer.h_scale or 0.0,
    )


def _workspace(sizes: Sizes, variants: list[Variant], device: torch.device) -> Workspace:
    tokens = variants[-1].tier.max_tokens
    pairs = variants[-1].max_pairs
    padded_hidden, padded_intermediate = sizes.stage.padded(sizes.hidden), sizes.stage.padded(sizes.intermediate)
    split_pairs, bf16_pairs = (pairs, 0) if variants[-1].h_static else (0, pairs)

    def zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, columns, dtype=dtype, device=device)

    return Workspace(
        x_high=zeros(tokens, padded_hidden, torch.uint8),
        x_low=zeros(tokens, padded_hidden, torch.uint8),
        x_factor=torch.zeros(tokens, dtype=torch.float32, device=device),
        h_high=zeros(split_pairs, padded_intermediate, torch.uint8),
        h_low=zeros(split_pairs, padded_intermediate, torch.uint8),
        h=zeros(bf16_pairs, sizes.intermediate, torch.bfloat16),
        z=zeros(pairs, sizes.hidden, torch.float32),
        counters=torch.zeros(max(v.counters for v in variants), dtype=torch.int32, device=device),
    )


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and where 16-byte loads may begin; only a view at an odd offset is copied."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _done(driver: ModuleType, result: tuple[int, *tuple[object, ...]]) -> object:
    """What a driver call returned besides its status."""
    error, *values = result
    if error:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA driver: {text.decode()}")
    return values[0] if values else None
