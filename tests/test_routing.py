"""Routing families keep their promises, and the same bits, for any numbers they accept."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.case import case
from moebench.routing import assign, realized, routing_error, worst_rank

SPECS = ["uniform", "balanced", "zipf:0", "zipf:1.2", "zipf:40", "hotspot:0.25@1", "hotspot:0.3@2", "hotspot:1@6"]
GPT_OSS = {"num_experts": 32, "top_k": 4, "num_tokens": 8}


def loads(point):
    return np.bincount(assign(point).topk_ids.ravel(), minlength=point.num_experts)


def write_trace(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return f"trace:{path}"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 500])
def test_ids_are_distinct_and_weights_positive_uneven_and_exact_in_bf16(spec, tokens):
    got = assign(case("tiny", tokens, routing=spec))
    assert got.topk_ids.shape == got.topk_weights.shape == (tokens, 4)
    assert got.topk_ids.dtype == np.int32
    assert got.topk_weights.dtype == np.float32
    assert all(len(set(row)) == 4 for row in got.topk_ids.tolist())
    assert ((got.topk_ids >= 0) & (got.topk_ids < 8)).all()
    assert (got.topk_weights > 0).all()
    assert not (got.topk_weights.view(np.uint32) & 0xFFFF).any()
    assert np.abs(got.topk_weights.sum(1) - 1).max(initial=0) <= 2**-8
    if tokens == 500:
        assert got.topk_weights.std(1).mean() > 0.1
        assert (np.diff(got.topk_ids) < 0).mean() > 0.3  # slots are in no order of the experts


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_accepted_routing_gives_distinct_experts(data):
    experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(0, 30))
    share, hot = data.draw(st.floats(0, 1)), data.draw(st.integers(1, 40))
    spec = data.draw(st.sampled_from(["uniform", "balanced", f"zipf:{share * 5}", f"hotspot:{share}@{hot}"]))
    if routing_error(spec, num_experts=experts, top_k=top_k, num_tokens=tokens):
        assert spec.startswith("hotspot")
        return
    point = case("tiny", tokens, num_experts=experts, top_k=top_k, routing=spec)
    got = assign(point).topk_ids
    assert all(len(set(row)) == top_k for row in got.tolist())
    load = loads(point)
    if spec == "balanced":
        assert load.max() - load.min() <= 1
    if spec.startswith("hotspot"):
        assert np.sort(load)[::-1][:hot].sum() >= round(share * tokens * top_k)


def test_the_bits_never_change():
    """Pinned: a baseline compares runs of today with runs of a year ago."""
    pinned = {
        spec: realized(point, assign(point)).sha256[:16] for spec in SPECS for point in [case("gpt-oss-20b", 64, routing=spec, seed=3)]
    }
    assert pinned == PINNED


@pytest.mark.parametrize("spec", SPECS)
def test_ranks_see_the_same_assignment(spec):
    whole = assign(case("tiny", 33, routing=spec))
    for rank in ({"ep_size": 4, "ep_rank": 2}, {"tp_size": 2, "tp_rank": 1}):
        other = assign(case("tiny", 33, routing=spec, **rank))
        assert np.array_equal(whole.topk_ids, other.topk_ids)
        assert np.array_equal(whole.topk_weights, other.topk_weights)


@pytest.mark.parametrize("spec", ["uniform", "zipf:1"])
def test_a_longer_batch_begins_with_a_shorter_one(spec):
    short, long = assign(case("tiny", 5, routing=spec)), assign(case("tiny", 50, routing=spec))
    assert np.array_equal(short.topk_ids, long.topk_ids[:5])


def test_another_seed_gives_other_tokens():
    assert not np.array_equal(assign(case("tiny", 50)).topk_ids, assign(case("tiny", 50, seed=1)).topk_ids)
    assert assign(case("tiny", 2, seed=-1)).topk_ids.shape == (2, 4)


def test_uniform_loads_are_those_of_chance():
    load = loads(case("gpt-oss-20b", 8000))
    expected = 8000 * 4 / 32
    assert ((load - expected) ** 2 / expected).sum() < 62  # chi-squared, 31 degrees of freedom, p = 0.001; less without replacement


def test_zipf_loads_fall_with_the_rank():
    load = np.sort(loads(case("gpt-oss-20b", 8000, top_k=1, routing="zipf:1")))[::-1]
    share = 1 / np.arange(1, 33)
    assert np.allclose(load / 8000, share / share.sum(), rtol=0.15, atol=0.004)


def test_zipf_0_is_uniform_and_a_steep_zipf_always_hits_the_same_experts():
    assert loads(case("tiny", 4000, routing="zipf:0")).std() < 60
    assert np.sort(loads(case("tiny", 100, routing="zipf:40")))[::-1][0] == 100


@pytest.mark.parametrize(("spec", "hot", "share"), [("hotspot:0.5@2", 2, 0.5), ("hotspot:0.1@1", 1, 0.1), ("hotspot:0.33@3", 3, 0.33)])
def test_a_hotspot_gets_its_share_to_a_pair(spec, hot, share):
    load = np.sort(loads(case("gpt-oss-20b", 777, routing=spec)))[::-1]
    assert load[:hot].sum() == round(share * 777 * 4)


def test_realized_counts_what_a_rank_gets():
    point = case("tiny", 3, ep_size=2, ep_rank=1, routing="hotspot:1@4", seed=5)
    assignment = assign(point)
    got = realized(point, assignment)
    local = [expert for expert in assignment.topk_ids.ravel().tolist() if expert >= 4]
    assert got.local_pairs == len(local) == got.pairs_per_rank[1]
    assert got.active_experts == len(set(local))
    assert got.active_experts + got.empty_experts == 4
    assert sum(got.pairs_per_rank) == 12
    assert got.load_max_over_mean == 2.0  # 3 pairs on each of 4 experts, mean 1.5
    assert got.pairs_per_rank[worst_rank(point)] == max(got.pairs_per_rank)


def test_no_tokens_are_balanced():
    point = case("tiny", 0)
    assert realized(point, assign(point)).load_max_over_mean == 1.0
    assert worst_rank(point) == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("unifrom", "did you mean 'uniform'?"),
        ("", "known routings: uniform; balanced; zipf:S"),
        ("uniform:2", "uniform takes nothing after it"),
        ("zipf", "is not a number of 0 or more"),
        ("zipf:-1", "'-1' is not a number of 0 or more"),
        ("zipf:nan", "'nan' is not a number"),
        ("hotspot:0.5", "write hotspot:SHARE@N"),
        ("hotspot:1.5@2", "not a share between 0 and 1"),
        ("hotspot:0.5@0", "0 hot experts of 32; give 1 to 31"),
        ("hotspot:0.5@32", "32 hot experts of 32"),
        ("hotspot:0.6@2", "2 hot experts take at most 0.5 of all pairs"),
        ("hotspot:0.1@30", "the hot ones take at least 0.5 of all pairs"),
        ("trace:", "names no file"),
        ("trace:/no/such/file", "cannot be read: No such file"),
        ("trace:/", "cannot be read"),
    ],
)
def test_a_wrong_routing_is_told_with_its_value_and_the_way_out(spec, words):
    problem = routing_error(spec, **GPT_OSS)
    assert problem is not None
    assert words in problem
    with pytest.raises(ValueError, match=r"routing|trace"):
        assign(case("gpt-oss-20b", 8, routing=spec))


def test_a_trace_is_replayed_line_by_line(tmp_path):
    spec = write_trace(
        tmp_path / "t.jsonl",
        [{"ids": [3, 0], "weights": [0.75, 0.2501]}, {"ids": [1, 2], "weights": [1, 0]}, {"ids": [5, 4], "weights": [0.5, 0.5]}],
    )
    got = assign(case("tiny", 2, top_k=2, routing=spec))
    assert got.topk_ids.tolist() == [[3, 0], [1, 2]]
    assert got.topk_weights.tolist() == [[0.75, 0.25], [1.0, 0.0]]  # to the nearest bf16


GOOD = {"ids": [0, 1], "weights": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ([1], "line 2: needs"),
        ({"ids": [0, 1]}, "line 2: needs"),
        ({"ids": [0, 1, 2], "weights": [1, 1]}, "line 2: 3 ids and top_k=2"),
        ({"ids": [0, 1], "weights": [1]}, "line 2: 1 weights and top_k=2"),
        ({"ids": [0, 8], "weights": [1, 1]}, "line 2: expert 8 is not between 0 and 7"),
        ({"ids": [0, -1], "weights": [1, 1]}, "line 2: expert -1"),
        ({"ids": [0, True], "weights": [1, 1]}, "line 2: expert True"),
        ({"ids": [0, 0.5], "weights": [1, 1]}, "line 2: expert 0.5"),
        ({"ids": [3, 3], "weights": [1, 1]}, "name an expert twice"),
        ({"ids": [0, 1], "weights": [1, math.nan]}, "weight nan is not a finite"),
        ({"ids": [0, 1], "weights": [1, math.inf]}, "weight inf is not a finite"),
        ({"ids": [0, 1], "weights": [1, 10**400]}, "is not a finite"),
        ({"ids": [0, 1], "weights": [1, "x"]}, "weight 'x'"),
        (None, "has 1 lines and num_tokens=2"),
    ],
)
def test_a_bad_trace_is_told_with_file_and_line(tmp_path, bad, words):
    spec = write_trace(tmp_path / "t.jsonl", [GOOD] if bad is None else [GOOD, bad])
    problem = routing_error(spec, num_experts=8, top_k=2, num_tokens=2)
    assert problem is not None
    assert words in problem
    assert "t.jsonl" in problem


def test_lines_beyond_the_batch_are_not_read(tmp_path):
    spec = write_trace(tmp_path / "t.jsonl", [GOOD, "{"])
    assert routing_error(spec, num_experts=8, top_k=2, num_tokens=1) is None


def test_a_huge_trace_is_refused_unread(tmp_path):
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse
    problem = routing_error(f"trace:{path}", num_experts=8, top_k=2, num_tokens=1)
    assert problem is not None
    assert "67108865 bytes; the limit is 67108864" in problem


PINNED = {
    "uniform": "6108dde4fbf817bb",
    "balanced": "864ec159496503dc",
    "zipf:0": "d900684f0977f1ba",
    "zipf:1.2": "9fabfe28e507454f",
    "zipf:40": "8e9d8be6e7441bf2",
    "hotspot:0.25@1": "6ef11373b19caa87",
    "hotspot:0.3@2": "a2c6102b3d181ead",
    "hotspot:1@6": "a9c56a2626a191fc",
}
