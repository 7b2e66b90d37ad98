"""The known mistakes, each as an edit of the torch reference: which one reproduces a wrong output?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moebench.backend import ACT_DTYPES, ActDtype
from moebench.reference.torch_experts import experts, plain_float32, swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from moebench.mx import Mxfp4
    from moebench.problem import Layer, Swiglu, Tokens

MAX_TOKENS = 16
MAX_EXPERTS = 8  # of the chosen tokens: each costs a CPU about 0.1 s a mistake at gpt-oss's size


@dataclass(frozen=True, kw_only=True)
class Mistake:
    sentence: str
    tokens: Callable[[Layer, Tokens], Tokens] = lambda layer, tokens: tokens
    layer: Callable[[Layer], Layer] = lambda layer: layer
    activation: Callable[[Tensor, Swiglu], Tensor] = swiglu
    act_dtype: ActDtype | None = None  # None: the one the kernel claims
    plus: Callable[[Layer, Tokens], Tensor] | None = None  # added to the output


def explain(out: Tensor, layer: Layer, tokens: Tokens, act_dtype: ActDtype, reference: Tensor | None = None) -> str:
    """A clause such as 'it looks as if alpha is 1', or '' where no known mistake gives this output.

    Looks at up to 16 tokens that have work on this rank: the worst by `reference`, float [M, H], where given, else the first."""
    from moebench.check import compare

    chosen = _choose(out, layer, tokens, reference)
    few = out[chosen]
    if not chosen or not few.isfinite().all():
        return ""
    part = _subset(tokens, chosen)

    def gives_the_output(mistake: Mistake) -> bool:
        return compare(few, _run(mistake, layer, part, act_dtype), act_dtype).ok

    with plain_float32():
        if gives_the_output(Mistake(sentence="nothing is wrong")):  # with these tokens
            return ""
        if not few.any():
            return "the output is zero"
        found = next(filter(gives_the_output, _mistakes(layer, act_dtype)), None)
        if found and found.act_dtype:  # more than one format may fit
            found = min(_roundings(act_dtype), key=lambda other: compare(few, _run(other, layer, part, act_dtype), act_dtype).rel_l2)
    return f"it looks as if {found.sentence}" if found else ""


def _mistakes(layer: Layer, act_dtype: ActDtype) -> Iterator[Mistake]:
    """Cheap to tell apart: all are wrong in most elements, so the first that fits is the one."""
    yield Mistake(sentence="gate and up are swapped", activation=lambda y, c: swiglu(y.view(len(y), -1, 2).flip(2).flatten(1), c))
    yield Mistake(
        sentence="w13 is read as halves [gate; up], not interleaved", activation=lambda y, c: swiglu(_interleave(*y.chunk(2, 1)), c)
    )
    yield Mistake(
        sentence="w13 is read as halves [up; gate], not interleaved", activation=lambda y, c: swiglu(_interleave(*y.chunk(2, 1)[::-1]), c)
    )
    for alpha in {1.0, 1.702} - {layer.swiglu.alpha}:
        yield Mistake(sentence=f"alpha is {alpha:g}", layer=_with_swiglu(alpha=alpha))
    for beta in {0.0, 1.0} - {layer.swiglu.beta}:
        yield Mistake(sentence=f"beta is {beta:g}", layer=_with_swiglu(beta=beta))
    if layer.swiglu.limit is not None:
        yield Mistake(sentence="gate and up are not clamped", layer=_with_swiglu(limit=None))
        yield Mistake(sentence="up is not clamped", activation=_clamped(gate=(False, True), up=(False, False)))
        yield Mistake(sentence="gate is not clamped", activation=_clamped(gate=(False, False), up=(True, True)))
        yield Mistake(sentence="gate is clamped on both sides", activation=_clamped(gate=(True, True), up=(True, True)))
        yield Mistake(sentence="up is clamped above only", activation=_clamped(gate=(False, True), up=(False, True)))
    if layer.b13 is not None:
        yield Mistake(sentence="b13 is missing", layer=lambda x: replace(x, b13=None))
    if layer.b2 is not None:
        yield Mistake(sentence="b2 is missing", layer=lambda x: replace(x, b2=None))
        yield Mistake(sentence="b2 is added after the router weight", layer=lambda x: replace(x, b2=None), plus=_unweighted_b2)
    yield Mistake(
        sentence="router weights are uniform", tokens=lambda _, t: replace(t, topk_weights=t.topk_weights * 0 + 1 / t.topk_ids.shape[1])
    )
    yield Mistake(sentence="router weights are ignored", tokens=lambda _, t: replace(t, topk_weights=t.topk_weights * 0 + 1))
    yield Mistake(sentence="nibbles are swapped", layer=lambda x: replace(x, w13=_swap_nibbles(x.w13), w2=_swap_nibbles(x.w2)))
    yield Mistake(sentence="nibbles of w13 are swapped", layer=lambda x: replace(x, w13=_swap_nibbles(x.w13)))
    yield Mistake(sentence="nibbles of w2 are swapped", layer=lambda x: replace(x, w2=_swap_nibbles(x.w2)))
    yield Mistake(sentence="each expert has the weights of the next (expert id off by one)", tokens=lambda x, t: _shift_ids(x, t, 1))
    yield Mistake(sentence="each expert has the weights of the one before (expert id off by one)", tokens=lambda x, t: _shift_ids(x, t, -1))
    if layer.local_expert_start:
        yield Mistake(
            sentence=f"ids are taken as local, though this rank begins at expert {layer.local_expert_start}",
            tokens=lambda x, t: replace(t, topk_ids=t.topk_ids + x.local_expert_start),
        )
    yield from _roundings(act_dtype)
    for n in (1, -1, 2, -2):
        yield Mistake(sentence=f"all scales of w13 are off by 2^{n}", layer=lambda x, n=n: replace(x, w13=_scaled(x.w13, n)))  # type: ignore[misc]
        yield Mistake(sentence=f"all scales of w2 are off by 2^{n}", layer=lambda x, n=n: replace(x, w2=_scaled(x.w2, n)))  # type: ignore[misc]
        yield Mistake(
            sentence=f"all scales are off by 2^{n}",
            layer=lambda x, n=n: replace(x, w13=_scaled(x.w13, n), w2=_scaled(x.w2, n)),  # type: ignore[misc]
        )


def _roundings(act_dtype: ActDtype) -> Iterator[Mistake]:
    for other in ACT_DTYPES:
        if other != act_dtype:
            yield Mistake(sentence=f"activations are rounded as {other} does", act_dtype=other)


def _run(mistake: Mistake, layer: Layer, tokens: Tokens, act_dtype: ActDtype) -> Tensor:
    """float32 [M, H] as a kernel with this mistake computes it."""
    small, routed = _active(layer, mistake.tokens(layer, tokens))
    out = experts(mistake.layer(small), routed, mistake.act_dtype or act_dtype, mistake.activation)
    return out if mistake.plus is None else out + mistake.plus(small, routed)


def _choose(out: Tensor, layer: Layer, tokens: Tokens, reference: Tensor | None) -> list[int]:
    """Up to MAX_TOKENS tokens that name up to MAX_EXPERTS experts of this rank, at least one token if any has work."""
    local = [{e for e in ids if 0 <= e - layer.local_expert_start < layer.num_local_experts} for ids in tokens.topk_ids.tolist()]
    order = range(len(local)) if reference is None else (out - reference).abs().sum(1).argsort(descending=True).tolist()
    chosen: list[int] = []
    named: set[int] = set()
    for token in order:
        if len(chosen) == MAX_TOKENS:
            break
        if local[token] and (not chosen or len(named | local[token]) <= MAX_EXPERTS):
            chosen.append(token)
            named |= local[token]
    return chosen


def _subset(tokens: Tokens, chosen: list[int]) -> Tokens:
    return replace(
        tokens,
        hidden_states=tokens.hidden_states[chosen],
        topk_ids=tokens.topk_ids[chosen],
        topk_weights=tokens.topk_weights[chosen],
    )


def _active(layer: Layer, tokens: Tokens) -> tuple[Layer, Tokens]:
    """The same computation by a layer of the named local experts only, so that edits copy little; other ids become -1."""
    from moebench.mx import Mxfp4

    local = tokens.topk_ids - layer.local_expert_start
    mine = (local >= 0) & (local < layer.num_local_experts)
    active = sorted(set(local[mine].tolist()))
    ids = local.new_full(local.shape, -1)
    for position, expert in enumerate(active):
        ids[local == expert] = position

    small = replace(
        layer,
        num_experts=len(active),
        ep_size=1,
        ep_rank=0,
        w13=Mxfp4(layer.w13.codes[active], layer.w13.scales[active]),
        w2=Mxfp4(layer.w2.codes[active], layer.w2.scales[active]),
        b13=None if layer.b13 is None else layer.b13[active],
        b2=None if layer.b2 is None else layer.b2[active],
    )
    return small, replace(tokens, topk_ids=ids)


def _with_swiglu(**constants: float | None) -> Callable[[Layer], Layer]:
    return lambda layer: replace(layer, swiglu=replace(layer.swiglu, **constants))  # type: ignore[arg-type]  # named as its fields


def _clamped(gate: tuple[bool, bool], up: tuple[bool, bool]) -> Callable[[Tensor, Swiglu], Tensor]:
    """swiglu with the clamps (below, above) that are asked for."""

    def activation(y: Tensor, constants: Swiglu) -> Tensor:
        limit = constants.limit or 0.0
        g, u = (
            part.clamp(-limit if below else None, limit if above else None) if below or above else part
            for part, (below, above) in ((y[:, 0::2], gate), (y[:, 1::2], up))
        )
        return swiglu(_interleave(g, u), replace(constants, limit=None))

    return activation


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    import torch

    return torch.stack((even, odd), -1).flatten(1)


def _unweighted_b2(layer: Layer, tokens: Tokens) -> Tensor:
    """float32 [M, H]: the sum of b2 over a token's local experts."""
    assert layer.b2 is not None
    rows = layer.b2.float()[tokens.topk_ids.clamp(min=0).long()]  # [M, top_k, H]
    return (rows * (tokens.topk_ids >= 0).unsqueeze(-1)).sum(1)


def _swap_nibbles(w: Mxfp4) -> Mxfp4:
    return replace(w, codes=w.codes >> 4 | w.codes << 4)


def _scaled(w: Mxfp4, n: int) -> Mxfp4:
    return replace(w, scales=(w.scales.int() + n).clamp(0, 254).to(w.scales.dtype))


def _shift_ids(layer: Layer, tokens: Tokens, step: int) -> Tokens:
    """Local ids turned round by a step within the rank."""
    local = tokens.topk_ids - layer.local_expert_start
    mine = (local >= 0) & (local < layer.num_local_experts)
    shifted = (local + step) % layer.num_local_experts + layer.local_expert_start
    return replace(tokens, topk_ids=shifted.where(mine, tokens.topk_ids))
