"""A layer and its tokens are what docs/tensors.md says, byte for byte, on every rank."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from moebench import problem
from moebench.case import MODELS, case
from moebench.mx import Mxfp4, dequantize_mxfp4
from moebench.problem import make_layer, make_tokens
from moebench.routing import assign

# docs/tensors.md once more, in Python integers.
STREAMS = {name: i for i, name in enumerate(("w13", "w13 row", "w13 block", "w2", "w2 row", "w2 block", "b13", "b2", "hidden"))}


def mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def draw(seed, expert, stream, index):
    keys = []
    for last in (0, 1):
        state = 0
        for word in (seed % 2**32, (seed >> 32) % 2**32, expert % 2**32, STREAMS[stream], last):
            state = mix((state + word + 0x9E3779B9) % 2**32)
        keys.append(state)
    return mix((mix(index ^ keys[0]) + keys[1]) % 2**32)


def code(byte):
    half, rest = divmod(byte, 128)
    for magnitude, count in enumerate((10, 19, 18, 17, 21, 20, 16, 7)):
        if rest < count:
            return half * 8 + magnitude
        rest -= count
    raise AssertionError


def scale(row_byte, block_byte):
    edges = np.cumsum((2, 14, 62, 100, 62, 14, 2))
    return 117 + int((row_byte >= edges).sum()) + (block_byte >= 64) + (block_byte >= 192) - 1


def gaussian(hashed, std):
    total = sum(hashed.to_bytes(4, "little")) - 510
    return float((torch.tensor(float(total)) * torch.tensor(std / 21845**0.5)).bfloat16())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 1])
def test_weights_are_the_documented_arithmetic(seed):
    point = case("tiny", 1, seed=seed, ep_size=4, ep_rank=3)
    layer = make_layer(point, "cpu")
    random = np.random.default_rng(1)
    for name, w, n, k in (("w13", layer.w13, 384, 320), ("w2", layer.w2, 320, 192)):
        for local, row, column in random.integers(0, (2, n, k), (60, 3)).tolist():
            expert, index = 6 + local, row * k + column
            hashed = draw(seed, expert, name, index // 4)
            byte = int(w.codes[local, row, column // 2])
            assert byte >> 4 * (column % 2) & 15 == code(hashed >> 8 * (index % 4) & 255)
            want = scale(draw(seed, expert, f"{name} row", row) & 255, draw(seed, expert, f"{name} block", index // 32) & 255)
            assert int(w.scales[local, row, column // 32]) == want


def test_biases_and_hidden_states_are_the_documented_arithmetic():
    point = case("tiny", 5, seed=9)
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    weight_std = (6.5078125 * 2.7984619140625 * 1.5625) ** 0.5 / 128
    for column in (0, 1, 77, 319):
        assert float(layer.b13[3, column]) == gaussian(draw(9, 3, "b13", column), 0.75)
        assert float(layer.b2[3, column]) == gaussian(draw(9, 3, "b2", column), 2 * weight_std * 192**0.5)
        got = float(tokens.hidden_states[4, column])
        assert got == gaussian(draw(9, 2**32 - 1, "hidden", 4 * 320 + column), (1.5**2 - 0.75**2) ** 0.5 / (weight_std * 320**0.5))


def test_the_literals_are_what_their_comments_say():
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    counts = np.array(problem.CODE_COUNTS)
    assert 2 * counts.sum() == 256
    assert (2 * counts * values**2).sum() / 256 == problem.CODE_MEAN_SQUARE
    for table, first, mean in ((problem.ROW_OFFSET_COUNTS, -3, 2.7984619140625), (problem.JITTER_COUNTS, -1, 1.5625)):
        assert sum(table) == 256
        assert sum(count * 4.0 ** (first + i) for i, count in enumerate(table)) / 256 == mean


def test_the_bytes_never_change():
    """Pinned: a baseline compares runs of today with runs of a year ago."""
    layer, tokens = make_layer(case("tiny", 64), "cpu"), make_tokens(case("tiny", 64), "cpu")
    digest = hashlib.sha256()
    for part in (layer.w13.codes, layer.w13.scales, layer.w2.codes, layer.w2.scales):
        digest.update(part.numpy().tobytes())
    for part in (layer.b13, layer.b2, tokens.hidden_states):
        digest.update(part.view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == PINNED
    assert layer.checksum() == PINNED_CHECKSUM


def same(a: Mxfp4, b: Mxfp4):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("rank", range(4))
def test_an_expert_parallel_rank_is_a_slice_of_the_whole(rank):
    whole, part = make_layer(case("tiny", 1), "cpu"), make_layer(case("tiny", 1, ep_size=4, ep_rank=rank), "cpu")
    mine = slice(2 * rank, 2 * rank + 2)
    assert part.num_local_experts == 2
    assert part.local_expert_start == 2 * rank
    assert same(part.w13, Mxfp4(whole.w13.codes[mine], whole.w13.scales[mine]))
    assert same(part.w2, Mxfp4(whole.w2.codes[mine], whole.w2.scales[mine]))
    assert torch.equal(part.b13, whole.b13[mine])
    assert torch.equal(part.b2, whole.b2[mine])


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 2)])
def test_a_tensor_parallel_rank_is_rows_of_w13_and_columns_of_w2(size, rank):
    point = case("tiny", 1, tp_size=size, tp_rank=rank)
    start, stop = point.shard
    whole, part = make_layer(case("tiny", 1), "cpu"), make_layer(point, "cpu")
    assert part.intermediate_size == stop - start
    assert same(part.w13, Mxfp4(whole.w13.codes[:, 2 * start : 2 * stop], whole.w13.scales[:, 2 * start : 2 * stop]))
    assert same(part.w2, Mxfp4(whole.w2.codes[..., start // 2 : stop // 2], whole.w2.scales[..., start // 32 : stop // 32]))
    assert torch.equal(part.b13, whole.b13[:, 2 * start : 2 * stop])
    assert torch.equal(part.b2, whole.b2 * (rank == 0))


def test_an_uneven_last_shard_covers_the_rest():
    points = [case("tiny", 1, intermediate_size=224, tp_size=3, tp_rank=rank) for rank in range(3)]
    assert [make_layer(point, "cpu").intermediate_size for point in points] == [96, 96, 32]


def test_experts_seeds_and_tensors_differ():
    layer, other = make_layer(case("tiny", 1), "cpu"), make_layer(case("tiny", 1, seed=1), "cpu")
    assert not torch.equal(layer.w13.codes, other.w13.codes)
    rows = layer.w13.codes.view(-1, 160)
    assert len(set(map(bytes, rows.numpy()))) == len(rows)
    neighbours = (layer.w13.codes[0] == layer.w13.codes[1]).double().mean()
    chance = sum((count / 256) ** 2 for count in problem.CODE_COUNTS * 2) ** 2
    assert abs(neighbours - chance) < 0.003


def test_hidden_states_do_not_depend_on_routing_or_the_number_of_tokens():
    few, many = make_tokens(case("tiny", 3), "cpu"), make_tokens(case("tiny", 500, routing="balanced"), "cpu")
    assert torch.equal(few.hidden_states, many.hidden_states[:3])
    assert many.num_tokens == 500


def test_tokens_take_an_assignment_that_exists_already():
    point = case("tiny", 9)
    given, made = make_tokens(point, "cpu", assign(point)), make_tokens(point, "cpu")
    assert torch.equal(given.topk_ids, made.topk_ids)
    assert given.topk_ids.dtype == torch.int32
    assert torch.equal(given.topk_weights, made.topk_weights)


def test_no_tokens_are_a_batch():
    tokens = make_tokens(case("tiny", 0), "cpu")
    assert tokens.hidden_states.shape == (0, 320)
    assert tokens.topk_ids.shape == (0, 4)


@pytest.mark.parametrize("model", MODELS)
def test_pre_activations_have_std_1_5_and_a_tail_beyond_the_clamp(model):
    preset = MODELS[model]
    experts = 8 if model == "tiny" else 1
    size = preset.intermediate_size if model == "tiny" else 1024  # the first rows tell as much as all
    point = case(model, 64, num_experts=experts, top_k=1, intermediate_size=size)
    layer, tokens = make_layer(point, "cpu"), make_tokens(point, "cpu")
    y = torch.cat([tokens.hidden_states.float() @ w.T for w in dequantize_mxfp4(layer.w13)], 1)
    if layer.b13 is not None:
        y += layer.b13.float().flatten()
    assert 1.35 < float(y.std()) < 1.65
    assert 1e-4 < float((y.abs() > 7).double().mean()) < 1e-2
    assert abs(float(y.mean())) < 0.1


@pytest.mark.parametrize("model", ["gpt-oss-20b", "tiny"])
def test_weights_look_like_quantized_gaussians(model):
    layer = make_layer(case(model, 1, num_experts=1, top_k=1), "cpu")
    for w in (layer.w13, layer.w2):
        assert int(w.scales.min()) >= 116
        assert int(w.scales.max()) <= 124
        values = dequantize_mxfp4(w)
        assert abs(float(values.mean())) < 1e-3
        assert float(values.std()) == pytest.approx(problem.WEIGHT_STD, rel=0.15)
        seen = torch.bincount(torch.stack((w.codes & 15, w.codes >> 4)).flatten().long(), minlength=16) / (2 * w.codes.numel())
        assert torch.allclose(seen, torch.tensor(problem.CODE_COUNTS * 2) / 256, atol=0.004)


@pytest.mark.parametrize("name", ["w13.codes", "w13.scales", "w2.codes", "w2.scales", "b13", "b2"])
def test_the_checksum_sees_any_change_in_any_tensor(name):
    layer = make_layer(case("tiny", 1), "cpu")
    outer, _, inner = name.partition(".")
    tensor = getattr(layer, outer) if not inner else getattr(getattr(layer, outer), inner)
    data = tensor.view(torch.uint8).flatten()
    before = layer.checksum()
    for place in (0, 1, len(data) // 2, len(data) - 1):
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert layer.checksum() != before
            data[place] ^= 1 << bit
    swapped = data[:16].clone()
    data[:8], data[8:16] = swapped[8:], swapped[:8]
    assert layer.checksum() != before
    data[:16] = swapped
    assert layer.checksum() == before


def test_the_checksum_sees_a_missing_bias():
    layer = make_layer(case("tiny", 1), "cpu")
    assert replace(layer, b2=None).checksum() != layer.checksum()


def test_a_bad_routing_is_refused_with_its_sentence():
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        make_tokens(case("tiny", 1, routing="balansed"), "cpu")


PINNED = "ea5177f4307ab1680cd3ab32d662d7cea5590a872812ff14e35db1e974faac2f"
PINNED_CHECKSUM = 3980586650265903815
