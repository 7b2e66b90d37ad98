"""How many token sets and weight copies keep the L2 cache from holding weights that are used again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from moebench.case import Case
from moebench.record import L2Proof
from moebench.routing import Assignment, realized

COLD = 5  # times the L2 between two uses of the same bytes; at 2 an H200's L2 still kept a part of what was read


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What to call one after the other: each weight copy with each token set, again and again."""

    token_sets: int
    weight_copies: int
    bytes_per_call: int  # weights of the experts that get tokens
    l2_bytes: int

    @property
    def calls(self) -> int:
        return self.token_sets * self.weight_copies

    @property
    def bytes_between_uses(self) -> int:
        """Weights touched by the calls strictly between two that use the same bytes, whatever the order within a call."""
        return (self.calls - 1) * self.bytes_per_call

    @property
    def is_cold(self) -> bool:
        return self.bytes_per_call == 0 or self.bytes_between_uses >= COLD * self.l2_bytes

    def proof(self, flush_bytes: int = 0) -> L2Proof:
        return L2Proof(
            token_sets=self.token_sets,
            weight_copies=self.weight_copies,
            bytes_between_uses=self.bytes_between_uses,
            l2_bytes=self.l2_bytes,
            flush_bytes=flush_bytes,
        )


def plan_rotation(case: Case, assignment: Assignment, l2_bytes: int, most_copies: int) -> Rotation:
    """The fewest calls that make each other's weights cold, with token sets on disjoint experts first: they cost no memory.

    most_copies: of the weights, as many as fit. The result is not cold where they do not suffice."""
    active = realized(case, assignment).active_experts
    per_call = active * (case.weight_bytes // case.num_local_experts)
    if not per_call:
        return Rotation(token_sets=1, weight_copies=1, bytes_per_call=0, l2_bytes=l2_bytes)
    needed = 1 - (-COLD * l2_bytes // per_call)
    sets = min(case.num_local_experts // active, needed)
    copies = min(-(-needed // sets), max(most_copies, 1))
    return Rotation(token_sets=sets, weight_copies=copies, bytes_per_call=per_call, l2_bytes=l2_bytes)


def token_sets(case: Case, assignment: Assignment, count: int) -> Iterator[Assignment]:
    """The assignment, then the same work on other experts: the rank's experts trade places, `active` further each time.

    Loads, active experts and router weights stay; with count <= experts / active the sets' active experts are disjoint."""
    first = case.ep_rank * case.num_local_experts
    local = np.arange(first, first + case.num_local_experts)
    used = np.isin(local, assignment.topk_ids)
    order = np.concatenate([local[used], local[~used]])
    step = max(int(used.sum()), 1)
    for number in range(count):
        to = np.arange(case.num_experts, dtype=np.int32)
        to[order] = np.roll(order, -number * step)
        yield replace(assignment, topk_ids=to[assignment.topk_ids])
