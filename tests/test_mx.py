"""The MX codec, code by code and tie by tie, against ml_dtypes and against the definition."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench import mx

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)  # 0 .. 448, ascending


def nearest_even(x, grid):
    """Index of the grid value nearest to each |x|, the even index on a tie, the last beyond the end."""
    distance = np.abs(np.minimum(np.abs(x), grid[-1])[:, None] - grid)
    tied = distance == distance.min(1, keepdims=True)
    even = np.arange(len(grid)) % 2 == 0
    return np.where((tied & even).any(1), (tied & even).argmax(1), tied.argmax(1))


def ties_and_neighbours(grid):
    """float32: every midpoint, the values just beside it, the grid, and beyond its end; both signs."""
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    values = np.concatenate([middle, *beside, grid.astype(np.float32), np.float32([grid[-1] * 1.2, 1e30, 1e-30])])
    return np.concatenate([values, -values])


def block(*values, fill=0.0):
    return torch.tensor([list(values) + [fill] * (32 - len(values))])


def test_every_e2m1_code_decodes_as_ml_dtypes_has_it():
    codes = torch.arange(256, dtype=torch.uint8)
    got = mx.decode_e2m1(codes)
    for column, nibble in enumerate((codes & 15, codes >> 4)):
        want = nibble.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        assert np.array_equal(got[:, column].numpy().view(np.uint32), want.view(np.uint32))  # -0 is -0


def test_every_e8m0_byte_decodes_as_ml_dtypes_has_it():
    got = mx.decode_e8m0(torch.arange(256, dtype=torch.uint8)).numpy()
    want = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(got, want, equal_nan=True)
    assert got[0] == 2.0**-127
    assert np.isnan(got[255])


def test_e2m1_rounds_to_nearest_even_and_saturates():
    x = ties_and_neighbours(E2M1)
    got = mx.encode_e2m1(torch.from_numpy(x)).numpy()
    assert np.array_equal(got, nearest_even(x.astype(np.float64), E2M1) + 8 * np.signbit(x))
    finite = np.abs(x) <= 6
    assert np.array_equal(got[finite], x[finite].astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_e4m3_rounds_to_nearest_even_and_saturates():
    x = ties_and_neighbours(E4M3)
    got = mx.encode_e4m3(torch.from_numpy(x)).view(torch.uint8).numpy()
    assert np.array_equal(got, nearest_even(x.astype(np.float64), E4M3) + 128 * np.signbit(x))
    finite = np.abs(x) <= 448
    assert np.array_equal(got[finite], x[finite].astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_every_e4m3_code_survives_a_round_trip():
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.array_equal(mx.encode_e4m3(values).view(torch.uint8).numpy(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantizing_is_exact_for_every_code_under_every_scale(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)  # 16 blocks hold every byte
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 16, 1)
    got = mx.dequantize_mxfp4(mx.Mxfp4(codes, scales), dtype).double().numpy()
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).numpy()
    want = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    fits = np.isnan(want) | (np.abs(want) < 2.0**128) | (dtype is torch.float64)
    assert np.array_equal(got[fits], want[fits], equal_nan=True)
    assert np.isinf(got[~fits]).all()


def test_the_low_nibble_is_the_even_element():
    got = mx.quantize_mxfp4(block(0.5, -6.0))
    assert got.codes[0, 0] == 0xF1
    assert got.scales[0, 0] == 127


@pytest.mark.parametrize(
    ("amax", "rule", "exponent"),
    [
        (6.0, "ocp", 0),
        (7.9, "ocp", 0),
        (8.0, "ocp", 1),
        (4.0, "ocp", 0),
        (3.9, "ocp", -1),
        (6.0, "round_up", 0),
        (float(np.nextafter(np.float32(6), np.float32(7))), "round_up", 1),
        (3.0, "round_up", -1),
        (3.1, "round_up", 0),
    ],
)
def test_an_mxfp4_scale_follows_its_rule(amax, rule, exponent):
    got = mx.quantize_mxfp4(block(amax, 0.1), rule)
    assert int(got.scales[0, 0]) == 127 + exponent
    top = float(mx.dequantize_mxfp4(got)[0, 0])
    assert top == min(float(E2M1[nearest_even(np.array([amax / 2**exponent]), E2M1)[0]]), 6.0) * 2**exponent


@pytest.mark.parametrize("power", [-140, -126, -120, -1, 0, 1, 60, 119])
@pytest.mark.parametrize(
    ("rule", "ulps", "exponent"), [("round_up", 0, 0), ("round_up", 1, 1), ("round_up", -1, 0), ("ocp", 0, 0), ("ocp", 1, 0)]
)
def test_an_mxfp8_scale_is_exact_at_448_times_any_power_of_two(power, rule, ulps, exponent):
    amax = np.ldexp(np.float32(448), power)
    for _ in range(abs(ulps)):
        amax = np.nextafter(amax, np.float32(np.inf if ulps > 0 else 0))
    got = mx.quantize_mxfp8(block(float(amax)), rule)
    assert int(got.scales[0, 0]) == max(127 + power + exponent, 0)


def test_round_up_never_saturates_and_ocp_does():
    amax = 500.0  # 448 < 500 < 512
    up, down = (mx.round_mxfp8(block(amax, 1.0), rule)[0] for rule in ("round_up", "ocp"))
    assert up[0] == 512.0  # scale 2: 250 lies between 240 and 256
    assert down[0] == 448.0
    assert down[1] == up[1] == 1.0


@pytest.mark.parametrize("rule", ["ocp", "round_up"])
def test_a_zero_block_has_scale_byte_0_and_keeps_its_signs(rule):
    four, eight = mx.quantize_mxfp4(block(-0.0), rule), mx.quantize_mxfp8(block(-0.0), rule)
    assert four.scales[0, 0] == eight.scales[0, 0] == 0
    assert four.codes[0].tolist() == [8] + [0] * 15
    assert torch.signbit(mx.dequantize_mxfp8(eight))[0].tolist() == [True] + [False] * 31


@pytest.mark.parametrize("rule", ["ocp", "round_up"])
def test_a_nan_makes_its_block_nan_and_no_other(rule):
    x = torch.ones(1, 64)
    x[0, 3] = float("nan")
    for got in (mx.dequantize_mxfp4(mx.quantize_mxfp4(x, rule)), mx.round_mxfp8(x, rule)):
        assert got[0, :32].isnan().all()
        assert (got[0, 32:] == 1).all()


@pytest.mark.parametrize("rule", ["ocp", "round_up"])
def test_infinity_stays_infinite_in_mxfp8(rule):
    got = mx.round_mxfp8(block(float("-inf"), 1.0), rule)
    assert got[0, 0] == float("-inf")
    assert got[0, 1] == 0


def test_a_length_that_is_no_multiple_of_32_is_refused_with_the_number():
    with pytest.raises(ValueError, match="48, is not a multiple of 32"):
        mx.round_mxfp8(torch.ones(2, 48))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 32), (3, 4, 96)])
def test_leading_shapes_are_kept(shape):
    x = torch.ones(shape)
    assert torch.equal(mx.round_mxfp8(x), x)
    assert torch.equal(mx.dequantize_mxfp4(mx.quantize_mxfp4(x)), x)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32), st.booleans())
def test_mxfp8_of_any_block_is_the_definition_in_float64(values, round_up):
    x = np.array(values, np.float32)
    amax = float(np.abs(x).max())
    if amax == 0:
        exponent = -127
    elif round_up:
        exponent = next(e for e in range(-127, 129) if amax <= 448 * 2.0**e)
    else:
        exponent = max(int(np.frexp(amax)[1]) - 1 - 8, -127)
    grid = E4M3 * 2.0**exponent
    want = np.copysign(grid[nearest_even(x.astype(np.float64), grid)], x)
    got = mx.round_mxfp8(torch.from_numpy(x)[None], "round_up" if round_up else "ocp")[0].double().numpy()
    assert np.array_equal(got, want)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32), st.booleans())
def test_quantizing_what_was_dequantized_changes_nothing(values, round_up):
    rule = "round_up" if round_up else "ocp"
    once = mx.dequantize_mxfp4(mx.quantize_mxfp4(torch.tensor([values]), rule))
    assert torch.equal(mx.dequantize_mxfp4(mx.quantize_mxfp4(once, rule)), once)
