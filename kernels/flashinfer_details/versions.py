"""Which FlashInfer is installed, and whether its fused MoE is one whose layouts were verified."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "flashinfer-python"
# Both ends were read, 0.7.2.post1 also ran on an H200. Between them the weight interleave (moe_gemm_mixed_utils.cu) is the same byte
# for byte, the scale helper the same but for comments, and the signatures only grew.
OLDEST, NEWEST = "0.6.18.post1", "0.7.2.post1"
# What is different before a version, newest last.
BEFORE = (
    ("0.6.10", "it reads weights as they are packed and has no helpers that interleave them"),
    ("0.6.16", "its sm90 scales are [E, K/128, 4 N], not folded by 64 x 128"),
    ("0.6.18", "its autotuner dies of an illegal instruction on MXFP8 x MXFP4"),
    (OLDEST, "its layouts were not verified"),
)
# What we pass to cutlass_fused_moe by name.
# fmt: off
PARAMETERS = (
    "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights", "output_dtype",
    "quant_scales", "fc1_expert_biases", "fc2_expert_biases", "input_sf", "swiglu_alpha", "swiglu_beta", "swiglu_limit", "tp_size",
    "tp_rank", "ep_size", "ep_rank", "output", "use_w4_group_scaling", "use_mxfp8_act_scaling", "swizzled_input_sf", "profile_ids",
    "workspace_buffer",
)
# fmt: on


class TunerKey(Protocol):
    """What one winner of the autotuner is for."""

    @property
    def custom_op(self) -> str: ...
    @property
    def nearest_profile(self) -> tuple[tuple[int, ...], ...]: ...  # shapes of (x, w13, b13, w2, b2), tokens rounded to the bucket


class Tuner(Protocol):
    """FlashInfer's autotuner, which is one for the process."""

    warmup: int  # calls of a tactic before it is timed
    repeat: int  # timed calls of a tactic

    @property
    def profiling_cache(self) -> dict[TunerKey, tuple[int, object]]: ...  # to (tactic, profile)
    def clear_cache(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FlashInfer:
    """The functions of the installed version that the backends use."""

    version: str
    fused_moe: Callable[..., list[Tensor]]
    workspace_size: Callable[..., int]
    interleave_weights: Callable[[Tensor, str], Tensor]
    interleave_scales: Callable[[Tensor, int], Tensor]
    mxfp8_quantize: Callable[..., tuple[Tensor, Tensor]]
    autotune: Callable[..., AbstractContextManager[None]]
    tuner: Callable[[], Tuner]


def installed() -> str | None:
    """The version, from metadata or, for a tree copied without it, from the package's own file; imports nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        pass
    spec = find_spec("flashinfer")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "_build_meta.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"""__version__\s*=\s*["']([^"']+)""", text)
    return found[1] if found else "unknown"


def unusable() -> str | None:
    """Why no FlashInfer backend can run here, with what would change that, or None; imports nothing."""
    have = installed()
    if have is None or find_spec("flashinfer") is None:
        return f"{PACKAGE} is not installed; pip install {PACKAGE}=={NEWEST}"
    return refusal(have)


def refusal(have: str) -> str | None:
    """Why this version is not used, or None."""
    number = _number(have)
    if number is not None and _number(OLDEST) <= number <= _number(NEWEST):  # type: ignore[operator]  # our own parse
        return None
    why = "a layout that changed gives wrong numbers and no error, and this one was not verified"
    if number is not None:
        why = next((reason for before, reason in BEFORE if number < (_number(before) or ())), why)
    return f"{PACKAGE} {have} is installed, {OLDEST} to {NEWEST} is needed: {why}; pip install {PACKAGE}=={NEWEST}"


def load() -> FlashInfer:
    """Import what is needed of FlashInfer; raises RuntimeError with a sentence where it lacks something."""
    import torch

    if problem := unusable():
        raise RuntimeError(problem)
    have = installed() or "unknown"
    try:
        from flashinfer import mxfp8_quantize
        from flashinfer.autotuner import AutoTuner, autotune
        from flashinfer.fused_moe import (
            cutlass_fused_moe,
            cutlass_fused_moe_workspace_size,
            interleave_moe_scales_for_sm90_mixed_gemm,
            interleave_moe_weights_for_sm90_mixed_gemm,
        )
    except ImportError as error:
        raise RuntimeError(
            f"{PACKAGE} {have} cannot be used: {error}; {OLDEST} to {NEWEST} has all that is needed, pip install {PACKAGE}=={NEWEST}"
        ) from error
    lacking = [name for name in PARAMETERS if name not in signature(cutlass_fused_moe).parameters]
    lacking += [name for name in ("tuning_buckets", "round_up") if name not in signature(autotune).parameters]
    lacking += [name for name in ("is_sf_swizzled_layout", "alignment") if name not in signature(mxfp8_quantize).parameters]
    if lacking:
        raise RuntimeError(f"{PACKAGE} {have} takes no {', '.join(lacking)}; {OLDEST} to {NEWEST} does, pip install {PACKAGE}=={NEWEST}")
    found = FlashInfer(
        version=have,
        fused_moe=cutlass_fused_moe,
        workspace_size=cutlass_fused_moe_workspace_size,
        interleave_weights=interleave_moe_weights_for_sm90_mixed_gemm,
        interleave_scales=interleave_moe_scales_for_sm90_mixed_gemm,
        mxfp8_quantize=mxfp8_quantize,
        autotune=autotune,
        tuner=AutoTuner.get,
    )
    _check_scale_helper(found, torch.arange(2 * 128 * 8, dtype=torch.int32).remainder_(251).to(torch.uint8).reshape(2, 128, 8))
    return found


def _check_scale_helper(vendor: FlashInfer, scales: Tensor) -> None:
    """The helper is plain torch, so its layout is known before anything is launched."""
    from moebench.kernels.flashinfer_details.layout import fold_sm90_scales

    folded, known = vendor.interleave_scales(scales, 32), fold_sm90_scales(scales)
    if folded.shape != known.shape or not folded.eq(known).all():
        raise RuntimeError(
            f"{PACKAGE} {vendor.version} folds sm90 scales to {tuple(folded.shape)} in an order that was not verified (known: "
            f"{tuple(known.shape)} of versions {OLDEST} to {NEWEST}); pip install {PACKAGE}=={NEWEST}"
        )


def _number(text: str) -> tuple[int, int, int, int] | None:
    """(0, 7, 2, 1) of 0.7.2.post1; a pre-release of 0.7.2 is (0, 7, 2, -1)."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(?:\.?post(\d+))?([^+]*)", text)
    if found is None:
        return None
    major, minor, patch, post, rest = found.groups()
    return int(major), int(minor), int(patch), -1 if rest else int(post or 0)
