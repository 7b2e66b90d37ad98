"""What goes wrong once in many launches is found, counted and told from what may differ."""

import pytest
import torch

from moebench.check import repeat_check


def outputs(count):
    torch.manual_seed(0)
    return [torch.randn(8, 64).bfloat16() for _ in range(count)]


class Kernel:
    """Right but for some launches, in which it does what it is told to its output."""

    def __init__(self, right, bad, harm):
        self.right, self.bad, self.harm = right, bad, harm
        self.seen = []

    def __call__(self, index):
        out = self.right[index].clone()
        if len(self.seen) in self.bad:
            out = self.harm(out)
        self.seen.append(index)
        return out


def zero_a_tile(out):
    out[4:, 32:] = 0
    return out


def last_bit(out):
    bits = out.view(torch.int16)
    bits[0, 0] ^= 1
    return out


def not_a_number(out):
    out[1, 2] = float("nan")
    return out


def test_right_launches_are_counted_and_every_input_takes_its_turn():
    kernel = Kernel(outputs(3), (), None)
    found = repeat_check(kernel, kernel.right, "bf16", launches=100, budget_s=60)
    assert (found.launches, found.mismatches, found.finding.status) == (100, 0, "ok")
    assert kernel.seen == [i % 3 for i in range(100)]


@pytest.mark.parametrize(
    ("harm", "status", "part"),
    [
        (zero_a_tile, "wrong", "relative L2 error"),
        (last_bit, "nondeterministic", "1 of 512 elements"),
        (not_a_number, "nonfinite", "1 NaN"),
    ],
)
@pytest.mark.parametrize("bad", [{0}, {137}, {99, 199, 299}])
def test_one_bad_launch_among_300_is_found(harm, status, part, bad):
    kernel = Kernel(outputs(4), bad, harm)
    found = repeat_check(kernel, kernel.right, "bf16", launches=300, budget_s=60)
    assert (found.launches, found.mismatches, found.finding.status) == (300, len(bad), status)
    assert f"{len(bad)} of 300 launches came out different, the first of them launch {min(bad)}" in found.finding.reason
    assert part in found.finding.reason


def test_a_part_that_is_not_written_cannot_pass_with_what_the_launch_before_wrote():
    right = outputs(1)
    buffer = right[0].clone()

    def run(index):
        buffer[:-1] = right[index][:-1]  # the last row stays as it is
        return buffer

    found = repeat_check(run, right, "bf16", launches=10, budget_s=60)
    assert (found.mismatches, found.finding.status) == (9, "nonfinite")


def test_a_backend_whose_bits_may_differ_is_held_to_its_tolerance():
    right = [out.float() for out in outputs(2)]
    noisy = Kernel([out.bfloat16() for out in right], range(0, 50, 2), lambda out: out * 1.0078125)  # a bit of bf16, 0.8 %
    assert repeat_check(noisy, right, "fp8", launches=50, budget_s=60, deterministic=False).finding.status == "ok"
    wrong = Kernel([out.bfloat16() for out in right], {31}, zero_a_tile)
    found = repeat_check(wrong, right, "fp8", launches=50, budget_s=60, deterministic=False)
    assert (found.mismatches, found.finding.status) == (1, "wrong")
    missing = Kernel([out.bfloat16() for out in right], {7}, not_a_number)
    assert repeat_check(missing, right, "fp8", launches=50, budget_s=60, deterministic=False).finding.status == "nonfinite"


def test_as_many_launches_are_compared_as_fit_and_one_at_least():
    kernel = Kernel(outputs(1), (), None)
    assert repeat_check(kernel, kernel.right, "bf16", launches=10**6, budget_s=0.05).launches < 10**6
    assert repeat_check(kernel, kernel.right, "bf16", launches=300, budget_s=0.0).launches == 1
    assert repeat_check(kernel, kernel.right, "bf16", launches=0).launches == 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_tokens_and_all_zero_outputs_are_right(deterministic):
    for expected in (torch.zeros(0, 64).bfloat16(), torch.zeros(4, 64).bfloat16()):
        found = repeat_check(lambda i, e=expected: e.clone(), [expected], "bf16", launches=5, budget_s=60, deterministic=deterministic)
        assert (found.launches, found.finding.status) == (5, "ok")
