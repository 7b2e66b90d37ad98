"""Backends that are wrong in one way each, for tests: a check that lets one pass is no check.

They compute by themselves, in float64 and by einsum over all experts at once, so that a slip in the reference does not excuse them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moebench.mx import Mxfp4, dequantize_mxfp4
from moebench.problem import Layer, Tokens


@dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str
    call: Callable[[Layer, Tokens], torch.Tensor]
    status: str = "wrong"
    told: str = ""  # what a diagnosis says, where it can tell
    on: str = "gpt-oss"  # what shows it: a case like gpt-oss's, "gentle" activation constants, or "ep" for ranks other than the first


def computed(
    layer,
    tokens,
    *,
    gate_rows=slice(0, None, 2),
    up_rows=slice(1, None, 2),
    gate_floor=False,
    up_limit=True,
    b2_weighted=True,
    router=None,
):
    """bf16 [M, H], right unless an argument says otherwise."""
    weights = tokens.topk_weights if router is None else router
    local = tokens.topk_ids.long() - layer.local_expert_start
    mine = (local >= 0) & (local < layer.num_local_experts)
    share = torch.zeros(tokens.num_tokens, layer.num_local_experts, dtype=torch.float64)
    hits = share.clone()
    share.scatter_add_(1, local.clamp(0, layer.num_local_experts - 1), (weights * mine).double())
    hits.scatter_add_(1, local.clamp(0, layer.num_local_experts - 1), mine.double())
    w13, w2 = dequantize_mxfp4(layer.w13, torch.float64), dequantize_mxfp4(layer.w2, torch.float64)
    y = torch.einsum("mh,enh->men", tokens.hidden_states.double(), w13)
    if layer.b13 is not None:
        y += layer.b13.double()
    gate, up = y[..., gate_rows], y[..., up_rows]
    alpha, beta, limit = layer.swiglu.alpha, layer.swiglu.beta, layer.swiglu.limit
    if limit is not None:
        gate = gate.clamp(-limit if gate_floor else None, limit)
        up = up.clamp(-limit, limit) if up_limit else up
    h = (gate * torch.sigmoid(alpha * gate) * (up + beta)).bfloat16().double()
    z = torch.einsum("mei,ehi->meh", h, w2)
    out = torch.einsum("meh,me->mh", z, share)
    if layer.b2 is not None:
        out += (share if b2_weighted else hits) @ layer.b2.double()
    return out.bfloat16()


def edited(**changes):
    """A right computation on a wrong layer; a change is a value or a function of the layer."""
    return lambda layer, tokens: computed(
        replace(layer, **{name: change(layer) if callable(change) else change for name, change in changes.items()}), tokens
    )


def constants(**changes):
    return edited(swiglu=lambda layer: replace(layer.swiglu, **changes))


def one_scale_doubled(layer):
    scales = layer.w2.scales.clone()
    scales[:, 5, 1] += 1
    return replace(layer.w2, scales=scales)


def swapped_nibbles(w: Mxfp4) -> Mxfp4:
    return replace(w, codes=(w.codes & 15) << 4 | w.codes >> 4)


def stale_expert(layer):
    """The rank's second expert still has the weights of the first."""
    codes, scales = layer.w13.codes.clone(), layer.w13.scales.clone()
    codes[1], scales[1] = codes[0], scales[0]
    return Mxfp4(codes, scales)


def transposed_scale_tiles(layer):
    """Scales of each 2 x 2 tile (row, block) transposed, as a wrong swizzle leaves them."""
    e, n, blocks = layer.w13.scales.shape
    tiles = layer.w13.scales.view(e, n // 2, 2, blocks // 2, 2)
    return replace(layer.w13, scales=tiles.transpose(2, 4).reshape(e, n, blocks))


def last_token_unwritten(layer, tokens):
    out = torch.empty_like(tokens.hidden_states)
    out[:-1] = computed(layer, tokens)[:-1]
    return out


def rank_dropped(layer, tokens):
    """Ids read as if every rank began at expert 0: right on the first rank only."""
    return computed(replace(layer, ep_rank=0), tokens)


def tokens_dropped(layer, tokens):
    """Only tokens whose first slot is local are computed."""
    first = tokens.topk_ids[:, :1] - layer.local_expert_start
    return computed(layer, tokens) * ((first >= 0) & (first < layer.num_local_experts))


def uniform(layer, tokens):
    return computed(layer, tokens, router=torch.full_like(tokens.topk_weights, 1 / tokens.topk_ids.shape[1]))


def shifted(layer, tokens):
    return computed(layer, replace(tokens, topk_ids=(tokens.topk_ids + 1) % layer.num_experts))


def halves(layer, tokens):
    size = layer.intermediate_size
    return computed(layer, tokens, gate_rows=slice(0, size), up_rows=slice(size, None))


MUTANTS = (
    Mutant(name="zero output", call=lambda _, tokens: torch.zeros_like(tokens.hidden_states), told="the output is zero"),
    Mutant(
        name="gate and up swapped",
        call=lambda layer, tokens: computed(layer, tokens, gate_rows=slice(1, None, 2), up_rows=slice(0, None, 2)),
        told="gate and up are swapped",
    ),
    Mutant(name="w13 as halves", call=halves, told="w13 is read as halves [gate; up]"),
    Mutant(name="alpha 1", call=constants(alpha=1.0), told="alpha is 1"),
    Mutant(name="beta 0", call=constants(beta=0.0), told="beta is 0"),
    Mutant(
        name="gate clamped on both sides",
        call=lambda layer, tokens: computed(layer, tokens, gate_floor=True),
        told="gate is clamped on both sides",
        on="gentle",  # gpt-oss's sigmoid(1.702 * gate) is 7e-6 below -7, and hides it
    ),
    Mutant(name="up not clamped", call=lambda layer, tokens: computed(layer, tokens, up_limit=False), told="up is not clamped"),
    Mutant(name="nothing clamped", call=constants(limit=None), told="gate and up are not clamped"),
    Mutant(name="no b13", call=edited(b13=None), told="b13 is missing"),
    Mutant(name="no b2", call=edited(b2=None), told="b2 is missing"),
    Mutant(
        name="b2 after the router weight",
        call=lambda layer, tokens: computed(layer, tokens, b2_weighted=False),
        told="b2 is added after the router weight",
    ),
    Mutant(name="uniform router weights", call=uniform, told="router weights are uniform"),
    Mutant(name="one block scale doubled", call=edited(w2=one_scale_doubled)),
    Mutant(
        name="nibbles swapped",
        call=edited(w13=lambda layer: swapped_nibbles(layer.w13), w2=lambda layer: swapped_nibbles(layer.w2)),
        told="nibbles are swapped",
    ),
    Mutant(
        name="w2 scales doubled",
        call=edited(w2=lambda layer: replace(layer.w2, scales=layer.w2.scales + 1)),
        told="all scales of w2 are off by 2^1",
    ),
    Mutant(name="one expert stale", call=edited(w13=stale_expert)),
    Mutant(name="expert id off by one", call=shifted, told="expert id off by one"),
    Mutant(name="last token unwritten", call=last_token_unwritten, status="unwritten"),
    Mutant(name="scales transposed within a tile", call=edited(w13=transposed_scale_tiles)),
    Mutant(
        name="ids not moved by the rank", call=rank_dropped, on="ep", told="ids are taken as local, though this rank begins at expert 4"
    ),
    Mutant(name="tokens of other ranks' first choice dropped", call=tokens_dropped, on="ep"),
)
