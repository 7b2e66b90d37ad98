"""Whether a prepared backend call computes the reference, writes all of it, and leaves everything else alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebench.backend import ActDtype, Experts
from moebench.problem import Layer, Tokens
from moebench.record import Error, Status

# Of ||out - ref|| / ||ref||. A right bf16 kernel is at 0.0017 (the last rounding) to 0.0042 (the whole activation in bf16). In MXFP8
# a value of h that rounds the other way may move a whole block's scale: up to 0.016; ignoring MXFP8 costs 0.025 or more. In fp8_pow2 it
# moves by a step of E4M3: with sums in Hopper's 14 bits a right kernel of gpt-oss's sizes is at 0.0024 to 0.0054 over many pairs, and at
# 0.010 in one of a hundred calls with a single pair; ignoring it costs 0.02 or more. mxfp8 is within it, at 0.01: the same steps but for
# tiny elements.
REL_L2_TOLERANCE: dict[ActDtype, float] = {"bf16": 0.005, "mxfp8": 0.02, "mxfp8_ocp": 0.02, "fp8": 0.02, "fp8_pow2": 0.02}
# Of max |out - ref| / max(|ref|, rms of its token, rms of its column): finds one wrong column among thousands, which the norm hides.
# Right kernels on an H200, all models, up to 16384 tokens: 0.081, 0.58, 0.99; one doubled scale of w2, 1024 tokens or more: 0.18 to 1.7.
# fp8_pow2: 0.44, by one value of h, -37.9984, that is nearest to -36 and was -40 after a sum in 14 bits; fp8 rounds h in the same steps.
WORST_TOLERANCE: dict[ActDtype, float] = {"bf16": 0.15, "mxfp8": 1.0, "mxfp8_ocp": 1.5, "fp8": 1.0, "fp8_pow2": 1.0}

ROWS = 1024  # compared at a time: float64 copies of a whole [16384, 2880] output would take 0.4 GB each
SENTINEL = 1.5 * 2.0**100  # the finite poison: exact in bf16 and float32, and no result comes near it


@dataclass(frozen=True, kw_only=True)
class Finding:
    status: Status
    reason: str = ""
    error: Error | None = None
    output: Tensor | None = None  # of a call that is wrong and no more than that, for a diagnosis
    differing: int = 0  # elements that were not the same bits in all launches


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What many launches of one call gave."""

    launches: int  # compared; fewer than asked for where they did not fit
    mismatches: int  # launches of them that came out different
    finding: Finding  # ok, or what the first of those is


def inspect(
    call: Experts,
    layer: Layer,
    tokens: Tokens,
    reference: Tensor,
    act_dtype: ActDtype,
    *,
    launches: int = 3,
    layer_checksum: int | None = None,
    deterministic: bool = True,
) -> Finding:
    """Run the call launches + 2 times and judge it by `reference`, float32 or float64 [M, H] before the last rounding to bf16.

    layer_checksum: of the layer before prepare, so that a prepare that changes it is found too; else taken now.
    deterministic: False for a call whose bits may differ from launch to launch: then every launch is judged, the worst counts, and
    the elements that differed are counted."""
    checksum = layer.checksum() if layer_checksum is None else layer_checksum
    before = {field.name: getattr(tokens, field.name).clone() for field in fields(tokens)}
    returned = call(tokens)
    if problem := _form_error(returned, tokens):
        return Finding(status="wrong", reason=problem)
    if problem := _alias_error(returned, tokens):
        return Finding(status="input_changed", reason=problem)
    first = returned.clone()  # a backend may return the same buffer every time
    again: list[Tensor] = []
    for _ in range(launches - 1):
        returned = call(tokens)
        again.append(returned.clone())
    poisoned: list[Tensor] = []
    for poison in (float("nan"), SENTINEL):
        returned.fill_(poison)
        with _Poison(poison):
            returned = call(tokens)
        poisoned.append(returned.clone())
    for out in (*again, *poisoned):
        if problem := _form_error(out, tokens):
            return Finding(status="wrong", reason=f"not at the first call: {problem}")

    changed = [name for name, value in before.items() if not _same_bits(getattr(tokens, name), value)]
    if layer.checksum() != checksum:
        changed.append("the layer's weights")
    if changed:
        return Finding(status="input_changed", reason=f"the call changed {' and '.join(changed)}; it may only read them")
    nan, sentinel = poisoned
    if reason := _unwritten(nan, sentinel):
        return Finding(status="unwritten", reason=reason)
    for out in (first, *again, nan, sentinel):
        if reason := _nonfinite(out, "" if out is not nan and out is not sentinel else " once unwritten memory is poisoned"):
            return Finding(status="nonfinite", reason=reason)
    outputs = (first, *again, nan, sentinel)
    differing = _differing(outputs)
    if deterministic:
        for out in again:
            if not _same_bits(first, out):
                error = compare(first, reference, act_dtype)
                return Finding(status="nondeterministic", reason=_difference(first, out), error=error, differing=differing)
        for out in (nan, sentinel):
            if not _same_bits(first, out):
                reason = f"{_difference(first, out)}, once unwritten memory is poisoned: the result depends on what that holds"
                return Finding(status="nondeterministic", reason=reason, error=compare(first, reference, act_dtype), differing=differing)
    judged = [(out, compare(out, reference, act_dtype)) for out in (outputs if differing and not deterministic else (first,))]
    # a launch out of tolerance before any within it, by either measure
    worst, error = max(judged, key=lambda pair: (not pair[1].ok, pair[1].rel_l2))
    if error.ok:
        return Finding(status="ok", error=error, differing=differing)
    return Finding(status="wrong", reason=_sentence(worst, reference, error), error=error, output=worst, differing=differing)


def compare(out: Tensor, ref: Tensor, act_dtype: ActDtype) -> Error:
    """Distances of a finite output, in float64. Where the reference is all zero (no token of this rank) any other output is 100 % off."""
    assert out.shape == ref.shape
    columns = max(ref.shape[1], 1)
    parts = [slice(first, first + ROWS) for first in range(0, len(ref), ROWS)]
    by_column = torch.zeros(columns, dtype=torch.float64, device=ref.device)
    for part in parts:
        by_column += ref[part].double().square().sum(0)
    norm = float(by_column.sum()) ** 0.5
    if norm == 0.0:
        largest, place = _largest(out)
        off = 0.0 if largest == 0 else 1.0
        return _error(act_dtype, rel_l2=off, worst=off, place=place, columns=columns, max_abs=largest)
    # an element's size is its token's times its column's, roughly, and both spread: a heavy row of W2 makes large sums that cancel
    floor = norm / ref.numel() ** 0.5 * 1e-6  # where token and column are zero throughout
    column_rms = (by_column / len(ref)).sqrt().clamp_min(floor)
    rows = []  # of float64 scalars a chunk: sum of squares, worst, where, largest
    for part in parts:
        exact = ref[part].double()
        difference = (out[part].double() - exact).abs()
        size = torch.maximum(exact.square().mean(1, keepdim=True).sqrt(), column_rms)
        relative, place_ = (difference / torch.maximum(exact.abs(), size)).flatten().max(0)
        rows.append(torch.stack((difference.square().sum(), relative, place_.double(), difference.max())))
    chunks = torch.stack(rows).tolist()  # one synchronization for all
    worst_chunk = max(range(len(chunks)), key=lambda i: chunks[i][1])
    return _error(
        act_dtype,
        rel_l2=sum(chunk[0] for chunk in chunks) ** 0.5 / norm,
        worst=chunks[worst_chunk][1],
        place=worst_chunk * ROWS * columns + int(chunks[worst_chunk][2]),
        columns=columns,
        max_abs=max(chunk[3] for chunk in chunks),
    )


def repeat_check(
    run: Callable[[int], Tensor],
    expected: Sequence[Tensor],
    act_dtype: ActDtype,
    *,
    launches: int = 300,
    budget_s: float = 1.0,
    deterministic: bool = True,
) -> Repeats:
    """Launch inputs 0 to len(expected) - 1 in turn, launches times in all or as often as fits into budget_s, and compare every output.

    run(i) launches input i and returns its output, which is filled with NaN after it was compared, so that a launch that leaves out a
    part cannot pass with what the one before it wrote. expected[i]: bf16 [M, H], what a checked launch of input i gave, whose bits every
    launch must give; where deterministic is False, the reference of input i, within whose tolerance every launch must be. Nothing is
    copied to the host but counts, in stretches that grow to budget_s / 4, so a launch waits for no other."""
    assert expected  # at least one input
    judges = [_Judge(want, act_dtype, deterministic) for want in expected]
    total = torch.zeros((), dtype=torch.int64, device=expected[0].device)  # launches that are off
    first = torch.full_like(total, -1)  # the first of them
    kept: Tensor | None = None  # and its output
    done, mismatches, stretch, started = 0, 0, 1, time.perf_counter()
    while done < launches:
        for number in range(done, min(done + stretch, launches)):
            judge = judges[number % len(judges)]
            out = run(number % len(judges))
            bad = judge.is_off(out)  # bool []
            new = bad & (first < 0)
            first = torch.where(new, number, first)
            kept = torch.where(new, out, torch.zeros_like(out) if kept is None else kept)
            total += bad
            out.fill_(float("nan"))
            done += 1
        mismatches = int(total)  # waits for the device
        elapsed_s = time.perf_counter() - started
        if elapsed_s >= budget_s:
            break
        fitting = int((budget_s - elapsed_s) * done / elapsed_s)
        stretch = max(1, min(4 * done, fitting, 1 + int(budget_s / 4 * done / elapsed_s)))
        if not fitting:
            break
    if not mismatches or kept is None:
        return Repeats(launches=done, mismatches=0, finding=Finding(status="ok"))
    number = int(first)
    return Repeats(launches=done, mismatches=mismatches, finding=judges[number % len(judges)].finding(kept, number, mismatches, done))


class _Judge:
    """Whether an output of one input is what it should be, decided where it is."""

    def __init__(self, expected: Tensor, act_dtype: ActDtype, deterministic: bool) -> None:
        self._expected, self._act_dtype, self._deterministic = expected, act_dtype, deterministic
        if deterministic:
            return
        exact = expected.double().square()
        self._norm = exact.sum().sqrt()  # compare's measures, with what does not depend on the output taken once
        floor = self._norm / max(exact.numel(), 1) ** 0.5 * 1e-6
        token = exact.mean(1, keepdim=True).sqrt().float()
        column = (exact.sum(0) / max(len(exact), 1)).sqrt().clamp_min(floor).float()
        self._size = torch.maximum(expected.float().abs(), torch.maximum(token, column))  # float32 [M, H]

    def is_off(self, out: Tensor) -> Tensor:
        if self._deterministic:
            return (_bits(out) != _bits(self._expected)).any()
        difference = (out.float() - self._expected.float()).abs()
        far = ~(difference <= WORST_TOLERANCE[self._act_dtype] * self._size).all()  # written so that NaN is far
        norm = difference.double().square().sum().sqrt()
        return far | ~(norm <= REL_L2_TOLERANCE[self._act_dtype] * self._norm)

    def finding(self, out: Tensor, number: int, mismatches: int, launches: int) -> Finding:
        which = f"{mismatches} of {launches} launches came out different, the first of them launch {number}"
        if reason := _nonfinite(out, f" in launch {number}"):
            return Finding(status="nonfinite", reason=f"{which}: {reason}")
        expected = self._expected.float()
        error = compare(out, expected, self._act_dtype)
        differing = int((out != expected).sum())
        if error.ok and self._deterministic:
            reason = f"{which}: {_difference(out, self._expected)}, all within tolerance"
            return Finding(status="nondeterministic", reason=reason, error=error, differing=differing)
        return Finding(status="wrong", reason=f"{which}: {_sentence(out, expected, error)}", error=error, output=out, differing=differing)


class _Poison(TorchDispatchMode):
    """Fills floating memory that torch hands out uninitialized while the mode is on.

    Sees allocations made through torch's dispatcher, from Python or C++; memory a backend keeps from prepare it does not see."""

    _FRESH = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
    _DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What skips it imports it: 879 modules and 3.5 s of CPU time in every worker, for nobody who compiles with it."""
        return False

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's own signature
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self._FRESH and isinstance(result, Tensor) and result.dtype in self._DTYPES:
            result.fill_(self.value)
        return result


def _form_error(out: object, tokens: Tokens) -> str:
    if not isinstance(out, Tensor):
        return f"returned {type(out).__name__}, not a tensor"
    expected = tokens.hidden_states
    if out.shape != expected.shape:
        return f"returned shape {list(out.shape)}, expected {list(expected.shape)}"
    if out.dtype != torch.bfloat16:
        return f"returned {str(out.dtype).removeprefix('torch.')}, expected bfloat16"
    if out.device != expected.device:
        return f"returned a tensor on {out.device}, expected {expected.device}"
    return ""


def _alias_error(out: Tensor, tokens: Tokens) -> str:
    for field in fields(tokens):
        given = getattr(tokens, field.name)
        if given.numel() and out.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            return f"the call returned the memory of {field.name}; the output needs its own"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """torch.equal would call NaN unequal to itself, and -0 equal to 0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def _differing(outputs: Sequence[Tensor]) -> int:
    first, *others = (_bits(out) for out in outputs)
    unequal = torch.zeros_like(first, dtype=torch.bool)
    for other in others:
        unequal |= first != other
    return int(unequal.sum())


def _unwritten(nan: Tensor, sentinel: Tensor) -> str:
    missing = nan.isnan() & (sentinel == SENTINEL)
    count = int(missing.sum())
    if not count:
        return ""
    return f"{count} of {nan.numel()} elements were never written, the first at {_place(missing)}"


def _nonfinite(out: Tensor, when: str) -> str:
    bad = ~out.isfinite()
    count = int(bad.sum())
    if not count:
        return ""
    nans = int(out.isnan().sum())
    return f"{count} of {out.numel()} elements are not finite{when} ({nans} NaN, {count - nans} Inf), the first at {_place(bad)}"


def _difference(a: Tensor, b: Tensor) -> str:
    unequal = _bits(a) != _bits(b)
    largest, _ = _largest(a.float() - b.float())
    return f"{int(unequal.sum())} of {a.numel()} elements differ between two runs of the same call, by up to {largest:.3g}"


def _place(mask: Tensor) -> str:
    token, column = divmod(int(mask.flatten().int().argmax()), mask.shape[1])
    return f"token {token}, column {column}"


def _largest(x: Tensor) -> tuple[float, int]:
    if not x.numel():
        return 0.0, 0
    value, place = x.abs().flatten().max(0)
    return float(value), int(place)


def _error(act_dtype: ActDtype, *, rel_l2: float, worst: float, place: int, columns: int, max_abs: float) -> Error:
    return Error(
        rel_l2=rel_l2,
        worst=worst,
        worst_token=place // columns,
        worst_column=place % columns,
        max_abs=max_abs,
        rel_l2_tolerance=REL_L2_TOLERANCE[act_dtype],
        worst_tolerance=WORST_TOLERANCE[act_dtype],
    )


def _sentence(out: Tensor, ref: Tensor, error: Error) -> str:
    token, column = error.worst_token, error.worst_column
    return (
        f"relative L2 error {error.rel_l2:.3g} (at most {error.rel_l2_tolerance:g}), worst element {error.worst:.3g} "
        f"(at most {error.worst_tolerance:g}): token {token}, column {column} is {float(out[token, column]):.5g}, "
        f"expected {float(ref[token, column]):.5g}"
    )
