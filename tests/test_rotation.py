"""What is rotated makes the cache cold, by arithmetic and by the realized routing."""

from itertools import cycle, islice

import numpy as np
import pytest

from moebench.case import case
from moebench.rotation import COLD, plan_rotation, token_sets
from moebench.routing import assign, realized

L2 = 62_914_560  # bytes, of an H200


def least_bytes_between_uses(point, rotation, count=64):
    """By replaying the calls: weights touched strictly between two calls that use the same expert of the same copy."""
    sets = list(token_sets(point, assign(point), rotation.token_sets))
    expert_bytes = point.weight_bytes // point.num_local_experts
    first = point.ep_rank * point.num_local_experts
    calls = [(copy, chosen) for copy in range(rotation.weight_copies) for chosen in sets]
    last_seen, touched_by, least = {}, [], None
    for number, (copy, chosen) in enumerate(islice(cycle(calls), count)):
        used = {int(e) for e in np.unique(chosen.topk_ids) if first <= e < first + point.num_local_experts}
        for expert in used:
            if (copy, expert) in last_seen:
                between = sum(touched_by[last_seen[copy, expert] + 1 :])
                least = between if least is None else min(least, between)
            last_seen[copy, expert] = number
        touched_by.append(len(used) * expert_bytes)
    return least


@pytest.mark.parametrize("model", ["gpt-oss-20b", "gpt-oss-120b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 16, 64, 1024])
@pytest.mark.parametrize("ep", [1, 8])
def test_between_two_uses_of_the_same_bytes_five_times_the_l2_is_touched(model, tokens, ep):
    point = case(model, tokens, ep_size=ep, ep_rank=ep // 2)
    rotation = plan_rotation(point, assign(point), L2, most_copies=99)
    assert rotation.is_cold
    least = least_bytes_between_uses(point, rotation)
    if rotation.bytes_per_call:
        assert rotation.bytes_between_uses == least >= COLD * L2


def test_one_token_of_gpt_oss_20b_needs_seven_sets_and_no_copy():
    point = case("gpt-oss-20b", 1)
    rotation = plan_rotation(point, assign(point), L2, most_copies=99)
    assert (rotation.token_sets, rotation.weight_copies) == (7, 1)  # 6 calls of 4 experts of 13.2 MB lie between
    assert rotation.proof().bytes_between_uses == 6 * 4 * (point.weight_bytes // 32)


def test_a_batch_that_touches_every_expert_needs_a_second_copy():
    point = case("gpt-oss-20b", 1024)
    rotation = plan_rotation(point, assign(point), L2, most_copies=99)
    assert (rotation.token_sets, rotation.weight_copies) == (1, 2)
    alone = plan_rotation(point, assign(point), L2, most_copies=1)
    assert not alone.is_cold  # and is flushed instead


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2", "hotspot:0.5@2"])
def test_token_sets_are_the_same_work_on_other_experts(ep, routing):
    point = case("gpt-oss-120b", 2, ep_size=ep, ep_rank=ep - 1, routing=routing)
    first, *others = token_sets(point, assign(point), 3)
    assert np.array_equal(first.topk_ids, assign(point).topk_ids)
    facts = realized(point, first)
    local = set(range(point.ep_rank * point.num_local_experts, (point.ep_rank + 1) * point.num_local_experts))
    used = [set(first.topk_ids.ravel().tolist()) & local]
    for other in others:
        same = realized(point, other)
        assert (same.active_experts, same.local_pairs, same.pairs_per_rank) == (
            facts.active_experts,
            facts.local_pairs,
            facts.pairs_per_rank,
        )
        assert np.array_equal(other.topk_weights, first.topk_weights)
        assert all(len(set(row)) == point.top_k for row in other.topk_ids.tolist())
        used.append(set(other.topk_ids.ravel().tolist()) & local)
    assert sum(map(len, used)) == len(set().union(*used))  # disjoint


def test_without_tokens_nothing_needs_to_be_cold():
    rotation = plan_rotation(case("gpt-oss-20b", 0), assign(case("gpt-oss-20b", 0)), L2, most_copies=9)
    assert (rotation.calls, rotation.is_cold, rotation.bytes_between_uses) == (1, True, 0)
