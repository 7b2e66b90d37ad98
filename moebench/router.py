"""The router's last step, as servers do it: from logits to expert ids and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.routing import Assignment

NOT_CHOSEN = -30.0  # a logit far below any chosen one: weights are above 2^-24


def logits(assignment: Assignment, num_experts: int, device: str) -> Tensor:
    """float32 [M, E] from which `route` gives the assignment's ids, and its weights scaled to a sum of 1."""
    ids = torch.from_numpy(assignment.topk_ids.copy()).long()
    weights = torch.from_numpy(assignment.topk_weights.copy())
    found = torch.full((len(ids), num_experts), NOT_CHOSEN)
    found.scatter_(1, ids, weights.clamp_min(1e-9).log())
    return found.to(device)


def route(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids int32, weights float32) of the largest logits, the softmax taken over those."""
    chosen, ids = torch.topk(router_logits, top_k, dim=-1)
    return ids.int(), torch.softmax(chosen, dim=-1)
