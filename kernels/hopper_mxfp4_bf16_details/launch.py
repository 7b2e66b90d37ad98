"""A layer in our layout with its workspace, and the one launch of a call."""

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

from moebench.kernels.hopper_mxfp4_bf16_details.compiler import cubin
from moebench.kernels.hopper_mxfp4_bf16_details.layout import Packed, fragment_rows, pack
from moebench.kernels.hopper_mxfp4_bf16_details.shape import (
    MAX_TOKENS,
    MAX_TOP_K,
    SPLIT_ONCE_ABOVE,
    THREADS,
    TIERS,
    Sizes,
    Tier,
    Variant,
    h_scale,
    tier_of,
    variant,
)

if TYPE_CHECKING:
    from moebench.problem import Layer, Swiglu, Tokens

KERNEL = b"hopper_mxfp4_bf16"


class Weights(ctypes.Structure):
    """`struct Weights` of moe.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("stages", "row_factor", "bias", "outlier_starts", "outliers")]


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
class Prepared:
    """A layer's weights in our layout, and what the kernel has to know about it."""

    variants: tuple[Variant, ...]  # by rising token count
    w13: Packed
    w2: Packed
    b13: Tensor  # float32 [E, 2I], rows in the order of the accumulator; zeros for a layer without biases
    b2: Tensor  # float32 [E, H]
    workspace: Workspace
    hidden_size: int
    first_expert: int
    swiglu: Swiglu
    h_scale: float | None  # None: a row of h gets its own power of two at run time

    @property
    def num_outliers(self) -> int:
        return self.w13.outliers.shape[0] + self.w2.outliers.shape[0]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A variant that is loaded and may be launched."""

    variant: Variant
    module: object  # keeps the function alive
    function: object
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The call that a backend returns."""

    prepared: Prepared
    kernels: tuple[Kernel, ...]
    facts: dict[str, str | int | float]

    def __call__(self, tokens: Tokens) -> Tensor:
        return run(self, tokens)


def sizes_of(layer: Layer) -> Sizes:
    return Sizes(
        hidden=layer.hidden_size,
        intermediate=layer.intermediate_size,
        num_experts=layer.num_experts,
        local_experts=layer.num_local_experts,
    )


def prepare(layer: Layer, max_num_tokens: int) -> Prepared:
    """Copy the weights into our layout; the layer itself is not kept. Works on any device."""
    sizes = sizes_of(layer)
    w13 = pack(layer.w13, sizes.stage, interleaved=True)
    w2 = pack(layer.w2, sizes.stage, interleaved=False)
    scale = h_scale(layer.swiglu.alpha, layer.swiglu.beta, layer.swiglu.limit)
    outliers = w13.outliers.shape[0] + w2.outliers.shape[0] > 0
    variants = []
    for tier in tiers_up_to(max_num_tokens):
        found = variant(sizes, tier, h_static=scale is not None, outliers=outliers)
        if found is None:
            raise ValueError(f"hidden_size={sizes.hidden}, intermediate_size={sizes.intermediate} need more shared memory than a block has")
        variants.append(found)
    device = layer.w2.codes.device
    rows13, rows2 = fragment_rows(2 * sizes.intermediate, True, device), fragment_rows(sizes.hidden, False, device)
    return Prepared(
        variants=tuple(variants),
        w13=w13,
        w2=w2,
        b13=_bias(layer.b13, rows13, sizes.local_experts),
        b2=_bias(layer.b2, rows2, sizes.local_experts),
        workspace=_workspace(sizes, variants, device),
        hidden_size=layer.hidden_size,
        first_expert=layer.local_expert_start,
        swiglu=layer.swiglu,
        h_scale=scale,
    )


def tiers_up_to(max_num_tokens: int) -> tuple[Tier, ...]:
    """Those that calls of up to so many tokens need; raises ValueError above MAX_TOKENS."""
    if max_num_tokens > MAX_TOKENS:
        raise ValueError(
            f"num_tokens={max_num_tokens} is more than the {MAX_TOKENS} that the one-launch kernel takes; use triton_mxfp4_bf16"
        )
    last = tier_of(max_num_tokens)
    return tuple(tier for tier in TIERS if tier.max_tokens <= last.max_tokens)


def load(prepared: Prepared) -> Loaded:
    """Compile, load, and make sure that all blocks of a launch can run at the same time, since they wait for each other."""
    started = perf_counter()
    device = prepared.w2.stages.device
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    driver = import_module("cuda.bindings.driver")
    kernels, compilers, fresh = [], set(), 0
    with ThreadPoolExecutor() as threads:  # half a second each
        cubins = list(threads.map(cubin, [wanted.defines for wanted in prepared.variants]))
    with torch.cuda.device(device):  # makes torch's context the driver's current one
        for wanted, compiled in zip(prepared.variants, cubins, strict=True):
            module = _done(driver, driver.cuModuleLoadData(compiled.code))
            function = _done(driver, driver.cuModuleGetFunction(module, KERNEL))
            shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver, driver.cuFuncSetAttribute(function, shared, wanted.shared_bytes))
            resident = _done(driver, driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, wanted.shared_bytes))
            assert isinstance(resident, int)
            blocks = multiprocessors
            if problem := residency_error(blocks, resident * multiprocessors, wanted):
                raise RuntimeError(problem)
            kernels.append(Kernel(variant=wanted, module=module, function=function, blocks=blocks))
            compilers.add(compiled.compiler)
            fresh += not compiled.cached
    facts: dict[str, str | int | float] = {
        "compiler": ", ".join(sorted(compilers)),
        "compiled": fresh,
        "load_s": perf_counter() - started,
        "stage_k": prepared.variants[0].sizes.stage.columns,
        "outlier_blocks": prepared.num_outliers,
        "h_scale": prepared.h_scale or "per row",
        "blocks": multiprocessors,
    }
    return Loaded(prepared=prepared, kernels=tuple(kernels), facts=facts)


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
    prepared = loaded.prepared
    out = torch.empty(tokens.num_tokens, prepared.hidden_size, dtype=torch.bfloat16, device=tokens.hidden_states.device)
    if tokens.num_tokens == 0:
        return out
    kernel = next((kernel for kernel in loaded.kernels if tokens.num_tokens <= kernel.variant.tier.max_tokens), None)
    if kernel is None:
        most = loaded.kernels[-1].variant.tier.max_tokens
        raise ValueError(f"num_tokens={tokens.num_tokens} is more than the {most} this layer was prepared for")
    x, ids, weights = _aligned(tokens.hidden_states), tokens.topk_ids.contiguous(), tokens.topk_weights.contiguous()
    if tokens.num_tokens > kernel.blocks and tokens.num_tokens > SPLIT_ONCE_ABOVE:
        raise ValueError(f"num_tokens={tokens.num_tokens} needs as many blocks to split them, and this GPU runs {kernel.blocks}")
    given = arguments(prepared, x, ids, weights, out)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(given))  # the launch copies what it points at
    driver = import_module("cuda.bindings.driver")
    stream = driver.CUstream(torch.cuda.current_stream(out.device).cuda_stream)
    with torch.cuda.device(out.device):
        _done(
            driver,
            driver.cuLaunchCooperativeKernel(
                kernel.function, kernel.blocks, 1, 1, THREADS, 1, 1, kernel.variant.shared_bytes, stream, ctypes.addressof(pointers)
            ),
        )
    return out


def arguments(prepared: Prepared, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Arguments:
    """Of contiguous tensors; they must outlive the launch, or belong to torch's allocator and its stream."""
    top_k = ids.shape[1]
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is more than the {MAX_TOP_K} slots that the kernel is written for")
    work, swiglu = prepared.workspace, prepared.swiglu
    return Arguments(
        up=_weights(prepared.w13, prepared.b13),
        down=_weights(prepared.w2, prepared.b2),
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
        first_expert=prepared.first_expert,
        alpha=swiglu.alpha,
        beta=swiglu.beta,
        limit=float("inf") if swiglu.limit is None else swiglu.limit,
        h_scale=prepared.h_scale or 0.0,
    )


def _weights(packed: Packed, bias: Tensor) -> Weights:
    return Weights(
        stages=packed.stages.data_ptr(),
        row_factor=packed.row_factor.data_ptr(),
        bias=bias.data_ptr(),
        outlier_starts=packed.outlier_starts.data_ptr(),
        outliers=packed.outliers.data_ptr(),
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


def _bias(bias: Tensor | None, rows: Tensor, experts: int) -> Tensor:
    if bias is None:
        return torch.zeros(experts, len(rows), dtype=torch.float32, device=rows.device)
    return bias[:, rows].float()


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
