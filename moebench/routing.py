"""Which experts each token goes to, with which router weights, from a seed or a trace."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebench.case import Case, did_you_mean
from moebench.realized import Realized

FAMILIES: dict[str, str] = {
    "uniform": "uniform",
    "balanced": "balanced",
    "zipf": "zipf:S with S >= 0, such as zipf:1.2",
    "hotspot": "hotspot:SHARE@N, such as hotspot:0.5@2 (half of all pairs go to 2 experts)",
    "trace": 'trace:FILE, JSON lines of {"ids": [...], "weights": [...]}',
}
TRACE_BYTES_LIMIT = 64 * 2**20
SPEC_CHARACTERS_LIMIT = 100
TRACE_CHARACTERS_LIMIT = 5000  # a path has at most 4096

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    topk_ids: NDArray[np.int32]  # [M, top_k], over all experts, distinct within a token
    topk_weights: NDArray[np.float32]  # [M, top_k], each exact in bf16


def assign(case: Case) -> Assignment:
    """A pure function of (seed, routing, num_tokens, num_experts, top_k): the same on every rank, machine and NumPy version.

    Integer arithmetic on raw Philox bits throughout (NumPy keeps bit generators stable, not distributions).
    Raises ValueError with routing_error's sentence."""
    tokens, experts, top_k = case.num_tokens, case.num_experts, case.top_k
    if problem := routing_error(case.routing, num_experts=experts, top_k=top_k, num_tokens=tokens):
        raise ValueError(problem)
    family, _, argument = case.routing.partition(":")
    if family == "trace":
        rows = _read_trace(argument, experts, top_k, tokens)
        ids = np.array([ids for ids, _ in rows], np.int32).reshape(tokens, top_k)
        weights = _to_bf16(np.array([weights for _, weights in rows], np.float64).reshape(tokens, top_k))
        return Assignment(topk_ids=ids, topk_weights=weights)
    if family == "uniform":
        chosen = _smallest(_bits(case.seed, "uniform", tokens, experts), top_k)
    elif family == "balanced":
        chosen = _balanced(case.seed, tokens, experts, top_k)
    elif family == "zipf":
        chosen = _zipf(case.seed, tokens, experts, top_k, Decimal(argument))
    else:
        share, _, hot = argument.partition("@")
        chosen = _hotspot(case.seed, tokens, experts, top_k, float(share), int(hot))
    return Assignment(topk_ids=chosen.astype(np.int32), topk_weights=_router_weights(case.seed, tokens, top_k))


def realized(case: Case, assignment: Assignment) -> Realized:
    load = np.bincount(assignment.topk_ids.ravel(), minlength=case.num_experts)
    per_rank = load.reshape(case.ep_size, -1)
    local = per_rank[case.ep_rank]
    digest = hashlib.sha256(assignment.topk_ids.astype("<i4").tobytes())
    digest.update(assignment.topk_weights.astype("<f4").tobytes())
    return Realized(
        active_experts=int((local > 0).sum()),
        empty_experts=int((local == 0).sum()),
        local_pairs=int(local.sum()),
        load_max_over_mean=float(load.max() * case.num_experts / load.sum()) if load.any() else 1.0,
        pairs_per_rank=tuple(int(n) for n in per_rank.sum(1)),
        sha256=digest.hexdigest(),
    )


def worst_rank(case: Case) -> int:
    """The expert-parallel rank with most pairs, the first of them where several have: a layer is as slow as it."""
    pairs = realized(case, assign(case)).pairs_per_rank
    return pairs.index(max(pairs))


def routing_error(spec: str, *, num_experts: int, top_k: int, num_tokens: int) -> str | None:
    """What is wrong with a routing for these numbers, as a sentence with a way out, or None. Reads the file of a trace."""
    if len(spec) > (limit := TRACE_CHARACTERS_LIMIT if spec.startswith("trace:") else SPEC_CHARACTERS_LIMIT):
        return f"routing={spec[:40]!r}... has {len(spec)} characters; the limit is {limit}"
    family, colon, argument = spec.partition(":")
    if family not in FAMILIES:
        return f"unknown routing {spec!r}{did_you_mean(family, FAMILIES)}; known routings: {'; '.join(FAMILIES.values())}"
    if family in ("uniform", "balanced"):
        return f"routing={spec!r}: {family} takes nothing after it; write {family!r}" if colon else None
    if family == "zipf":
        exponent = _number(argument)
        if exponent is None or exponent < 0:
            return f"routing={spec!r}: {argument!r} is not a number of 0 or more; write {FAMILIES['zipf']}"
        return None
    if family == "hotspot":
        return _hotspot_error(spec, argument, num_experts, top_k)
    if not argument:
        return f"routing={spec!r} names no file; write {FAMILIES['trace']}"
    try:
        _read_trace(argument, num_experts, top_k, num_tokens)
    except _TraceError as error:
        return str(error)
    return None


class _TraceError(ValueError):
    """The message names file, line and reason."""


def _bits(seed: int, purpose: str, *shape: int) -> NDArray[np.uint64]:
    """Raw 64-bit draws of a stream named by seed and purpose."""
    stream = int.from_bytes(hashlib.sha256(f"moebench routing {purpose}".encode()).digest()[:8], "little")
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Philox(key=key).random_raw(math.prod(shape)).reshape(shape)


def _smallest(keys: NDArray[np.uint64], count: int) -> Ints:
    """Columns of the `count` smallest keys of each row, smallest first: that many distinct draws, in random order."""
    chosen = np.broadcast_to(np.arange(count), (len(keys), count))
    if keys.shape[1] > count:
        chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
    # argpartition leaves an order that depends on the CPU's vector width; the sort removes it
    order = np.argsort(np.take_along_axis(keys, chosen, 1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, 1)


def _shuffle_slots(seed: int, ids: Ints) -> Ints:
    return np.take_along_axis(ids, np.argsort(_bits(seed, "slots", *ids.shape), axis=1, kind="stable"), 1)


def _balanced(seed: int, tokens: int, experts: int, top_k: int) -> Ints:
    """Deal the experts round, in an order drawn afresh whenever a round ends together with a token.

    Any top_k <= experts neighbours of a round-robin are distinct, and whole rounds load all experts alike."""
    cycle = math.lcm(experts, top_k)
    pair = np.arange(tokens * top_k)
    orders = np.argsort(_bits(seed, "balanced", -(-pair.size // cycle), experts), axis=1, kind="stable")
    return orders[pair // cycle, pair % experts].reshape(tokens, top_k)


def _zipf(seed: int, tokens: int, experts: int, top_k: int, exponent: Decimal) -> Ints:
    """Draw top_k experts a token without replacement, in proportion to 1 / rank^S over a seeded order of the experts.

    Weights are integers, 2^40 for rank 1 and at least 1, so that no platform's pow() decides a draw."""
    context = Context(prec=40)
    by_rank = [max(1, int(context.multiply(context.power(rank, -exponent), Decimal(2**40)))) for rank in range(1, experts + 1)]
    order = np.argsort(_bits(seed, "zipf order", experts), kind="stable")
    weight = np.empty(experts, np.int64)
    weight[order] = by_rank
    left = np.tile(weight, (tokens, 1))
    chosen = np.empty((tokens, top_k), np.int64)
    draws = (_bits(seed, "zipf", tokens, top_k) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    for slot in range(top_k):
        edges = left.cumsum(1)
        target = np.floor(draws[:, slot] * edges[:, -1])  # sums stay below 2^53: exact in float64
        chosen[:, slot] = (edges <= target[:, None]).sum(1)
        np.put_along_axis(left, chosen[:, slot, None], 0, 1)
    return _shuffle_slots(seed, chosen)  # else the first slot would be the hottest


def _hotspot(seed: int, tokens: int, experts: int, top_k: int, share: float, hot: int) -> Ints:
    """Spread round(share * pairs) hot pairs evenly over the tokens, then draw within the hot and the other experts."""
    order = np.argsort(_bits(seed, "hotspot order", experts), kind="stable")
    pairs = round(share * tokens * top_k)
    each, more = divmod(pairs, max(tokens, 1))
    hot_slots = np.full(tokens, each)
    hot_slots[np.argsort(_bits(seed, "hotspot tokens", tokens), kind="stable")[:more]] += 1
    keys = _bits(seed, "hotspot", tokens, experts)
    most_hot, most_cold = min(hot, top_k), min(experts - hot, top_k)
    candidates = np.concatenate([order[:hot][_smallest(keys[:, :hot], most_hot)], order[hot:][_smallest(keys[:, hot:], most_cold)]], axis=1)
    taken = np.concatenate([np.arange(most_hot) < hot_slots[:, None], np.arange(most_cold) < top_k - hot_slots[:, None]], axis=1)
    return _shuffle_slots(seed, candidates[taken].reshape(tokens, top_k))


def _hotspot_error(spec: str, argument: str, num_experts: int, top_k: int) -> str | None:
    share_text, _, hot_text = argument.partition("@")
    share = _number(share_text)
    if share is None or not 0 <= share <= 1 or not (hot_text.isascii() and hot_text.isdigit() and len(hot_text) < 10):
        return f"routing={spec!r}: not a share between 0 and 1 and a number of experts; write {FAMILIES['hotspot']}"
    hot = int(hot_text)
    if not 1 <= hot < num_experts:
        return f"routing={spec!r}: {hot} hot experts of {num_experts}; give 1 to {num_experts - 1}"
    most, least = min(hot, top_k) / top_k, max(0, top_k - (num_experts - hot)) / top_k
    if share > most:
        return (
            f"routing={spec!r}: a token has top_k={top_k} distinct experts, so {hot} hot experts take at most {most:g} of all pairs; "
            f"lower the share or raise the number of hot experts"
        )
    if share < least:
        return (
            f"routing={spec!r}: only {num_experts - hot} experts are not hot, so with top_k={top_k} the hot ones take at least "
            f"{least:g} of all pairs; raise the share or lower the number of hot experts"
        )
    return None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _router_weights(seed: int, tokens: int, top_k: int) -> Floats:
    """Positive, uneven, each exact in bf16, a token's sum 1 within bf16's rounding.

    As a softmax of logits that spread by about 1: powers of two from the sum of two 2-bit draws, times 1 to 2."""
    bits = _bits(seed, "router weights", tokens, top_k)
    exponent = (bits & np.uint64(3)) + (bits >> np.uint64(2) & np.uint64(3))
    score = (np.uint64(1 << 20) + (bits >> np.uint64(44))) << exponent  # below 2^27: sums are exact
    return _to_bf16(score.astype(np.float64) / score.sum(1, keepdims=True).astype(np.float64))


def _to_bf16(values: NDArray[np.float64]) -> Floats:
    """Nearest bf16, ties to even, as float32."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def _read_trace(name: str, num_experts: int, top_k: int, num_tokens: int) -> list[tuple[list[int], list[float]]]:
    """The first num_tokens lines of a trace. Raises _TraceError."""
    path = Path(name)
    if "\0" in name:
        raise _TraceError(f"trace {name!r}: a path holds no NUL")
    try:
        if not path.is_file() and path.exists():  # a pipe or /dev/zero never ends
            raise _TraceError(f"trace {name} cannot be read: it is not a regular file")
        size = path.stat().st_size
        if size > TRACE_BYTES_LIMIT:
            raise _TraceError(f"trace {name} has {size} bytes; the limit is {TRACE_BYTES_LIMIT}, keep the lines you need (head -n)")
        rows = []
        with path.open("rb") as file:
            for number, line in zip(range(1, num_tokens + 1), file, strict=False):
                try:
                    rows.append(_trace_row(line, num_experts, top_k))
                except ValueError as error:
                    raise _TraceError(f"trace {name}, line {number}: {error}") from None
    except OSError as error:
        raise _TraceError(f"trace {name} cannot be read: {error.strerror or error}; the path is relative to {Path.cwd()}") from None
    if len(rows) < num_tokens:
        raise _TraceError(f"trace {name} has {len(rows)} lines and num_tokens={num_tokens} needs as many; use a longer trace")
    return rows


def _trace_row(line: bytes, num_experts: int, top_k: int) -> tuple[list[int], list[float]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {line[:60]!r}") from None
    if not isinstance(row, dict) or not isinstance(row.get("ids"), list) or not isinstance(row.get("weights"), list):
        raise ValueError('needs {"ids": [...], "weights": [...]}')
    ids, weights = row["ids"], row["weights"]
    for name, values in (("ids", ids), ("weights", weights)):
        if len(values) != top_k:
            raise ValueError(f"{len(values)} {name} and top_k={top_k}; use the trace with the top_k it was taken with")
    for expert in ids:
        if type(expert) is not int or not 0 <= expert < num_experts:
            raise ValueError(f"expert {expert!r} is not between 0 and {num_experts - 1}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"ids {ids} name an expert twice; a token's experts are distinct")
    for weight in weights:
        if type(weight) not in (int, float) or not abs(weight) <= 3e38:
            raise ValueError(f"weight {weight!r} is not a finite float32")
    return ids, weights
