"""What a routing gives the ranks to do, as plain numbers: records are read without NumPy, whose import takes 0.2 s."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Realized:
    """What an assignment gives one expert-parallel rank to do."""

    active_experts: int  # of this rank
    empty_experts: int  # of this rank
    local_pairs: int  # (token, slot) pairs that go to this rank
    load_max_over_mean: float  # over all experts; 1.0 where there are no tokens
    pairs_per_rank: tuple[int, ...]
    sha256: str  # of the ids' bytes, then the weights'
