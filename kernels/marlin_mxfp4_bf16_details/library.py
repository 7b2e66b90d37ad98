"""vLLM's two compiled operator libraries: where they are, and their operators once loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Built for torch's stable interface, so that one file serves every torch from 2.11 on; vLLM's Python is not needed.
FILES = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")
OLDEST_TORCH = (2, 11)
HINT = "pip install vllm==0.33.0, with which this was written"

# Arguments as vLLM 0.33.0 declares them. What we pass is positional, so a change of order would be a change of meaning.
# fmt: off
ARGUMENTS = {
    "_C::gptq_marlin_repack": ("b_q_weight", "size_k", "size_n", "num_bits", "is_a_8bit"),
    "_C::swigluoai_and_mul": ("out", "input", "alpha", "limit"),
    "_C::silu_and_mul": ("result", "input"),
    "_C::silu_and_mul_with_clamp": ("result", "input", "limit", "alpha", "beta"),
    "_moe_C::moe_align_block_size": (
        "topk_ids", "num_experts", "block_size", "sorted_token_ids", "experts_ids", "num_tokens_post_pad", "maybe_expert_map",
    ),
    "_moe_C::moe_sum": ("input", "output", "topk_ids", "expert_map"),
    "_moe_C::moe_wna16_marlin_gemm": (
        "a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "a_scales", "global_scale", "b_zeros_or_none", "workspace",
        "sorted_token_ids", "expert_ids", "num_tokens_past_padded", "topk_weights", "moe_block_size", "top_k", "mul_topk_weights",
        "b_type_id", "size_m", "size_n", "size_k", "use_atomic_add", "use_fp32_reduce", "is_zp_float", "thread_k", "thread_n",
        "blocks_per_sm",
    ),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Found:
    directory: Path
    version: str


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operators that a layer needs, called by position."""

    version: str
    repack: Callable[..., Tensor]
    swigluoai_and_mul: Callable[..., None]
    silu_and_mul: Callable[..., None]
    silu_and_mul_with_clamp: Callable[..., None]
    align: Callable[..., None]
    gemm: Callable[..., Tensor]
    moe_sum: Callable[..., None]


def find() -> Found | str:
    """The libraries, or a sentence saying why there are none. Reads names and imports nothing: find_spec of a top-level name does not."""
    try:
        spec = find_spec("vllm")
    except ValueError:
        spec = None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        return f"vllm is not installed; {HINT}"
    directory, have = Path(locations[0]), _version("vllm")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        return f"vllm {have} in {directory} has no {' and no '.join(missing)} (built for another device, or older); {HINT}"
    torch = _version("torch")
    number = re.match(r"(\d+)\.(\d+)", torch)
    if number is None or (int(number[1]), int(number[2])) < OLDEST_TORCH:
        return f"torch {torch} is installed and vLLM's libraries need {'.'.join(map(str, OLDEST_TORCH))} or newer; pip install -U torch"
    return Found(directory=directory, version=have)


def load(found: Found) -> Ops:
    """Registers the operators in this process. Raises RuntimeError where one is not as vLLM 0.33.0 declares it, OSError where a
    library does not load (another CUDA than torch's)."""
    import torch

    for file, name in zip(FILES, ("_C", "_moe_C"), strict=True):
        wanted = [op.split("::")[1] for op in ARGUMENTS if op.startswith(name + "::")]
        if not all(hasattr(getattr(torch.ops, name), op) for op in wanted):  # vLLM may have loaded them
            torch.ops.load_library(str(found.directory / file))
    for op, arguments in ARGUMENTS.items():
        _check(op, arguments, found)
    return Ops(
        version=found.version,
        repack=torch.ops._C.gptq_marlin_repack,
        swigluoai_and_mul=torch.ops._C.swigluoai_and_mul,
        silu_and_mul=torch.ops._C.silu_and_mul,
        silu_and_mul_with_clamp=torch.ops._C.silu_and_mul_with_clamp,
        align=torch.ops._moe_C.moe_align_block_size,
        gemm=torch.ops._moe_C.moe_wna16_marlin_gemm,
        moe_sum=torch.ops._moe_C.moe_sum,
    )


def _check(op: str, arguments: tuple[str, ...], found: Found) -> None:
    import torch

    library, name = op.split("::")
    try:
        overload: Any = getattr(getattr(torch.ops, library), name).default
    except AttributeError:
        raise RuntimeError(f"vllm {found.version} has no operator {op}; {HINT}") from None
    declared = overload._schema.arguments
    names = tuple(argument.name for argument in declared)
    if names[: len(arguments)] != arguments or not all(argument.has_default_value() for argument in declared[len(arguments) :]):
        raise RuntimeError(f"vllm {found.version} declares {op}({', '.join(names)}), not ({', '.join(arguments)}); {HINT}")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
