"""The stopping rule and the wall clock, without a GPU."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from moebench.timing import CPU_RULE, StopRule, WallStopwatch, measure


class FakeStopwatch:
    """Gives the samples it is told to, and counts."""

    clock, l2, l2_method, note = "simulated", "cold", "simulated", ""

    def __init__(self, samples):
        self._samples = cycle(samples)
        self.taken = 0

    def run(self):
        return torch.zeros(1)

    def sample(self, count):
        self.taken += count
        return [next(self._samples) for _ in range(count)]


RULE = StopRule(min_samples=20, max_samples=200, max_s=5.0, target=0.005, batch=10)


def test_a_steady_clock_stops_at_the_least_number_of_samples():
    watch = FakeStopwatch([10.0])
    timing = measure(watch, RULE)
    assert timing.samples_us == (10.0,) * 25  # 5, then batches of 10
    assert timing.median_us == 10.0
    assert (timing.clock, timing.l2) == ("simulated", "cold")


def test_a_noisy_clock_is_sampled_to_the_limit():
    assert len(measure(FakeStopwatch([8.0, 12.0]), RULE).samples_us) == 200


def test_a_slow_call_gets_five_samples_when_time_runs_out():
    assert len(measure(FakeStopwatch([8.0, 12.0]), replace(RULE, max_s=0.0)).samples_us) == 5
    assert len(measure(FakeStopwatch([8.0, 12.0]), replace(RULE, max_s=0.0, min_samples=3)).samples_us) == 5


def test_batches_follow_the_length_of_a_sample():
    assert len(measure(FakeStopwatch([3e5]), replace(RULE, max_s=3.0)).samples_us) == 20  # one at a time, and all alike
    assert len(measure(FakeStopwatch([10.0]), replace(RULE, min_samples=21)).samples_us) == 25  # 5, then 10 at a time


def test_nothing_is_trimmed():
    samples = [10.0] * 24 + [500.0]
    assert sorted(measure(FakeStopwatch(samples), RULE).samples_us) == samples


def test_warm_up_is_counted_and_not_kept():
    watch = FakeStopwatch([10.0])
    timing = measure(watch, replace(RULE, warmup_s=0.01))
    assert timing.warmup_calls >= 5
    assert watch.taken == timing.warmup_calls + len(timing.samples_us)


def test_the_wall_clock_times_the_call_and_returns_its_output():
    calls = []

    def call():
        calls.append(None)
        return torch.full((1,), float(len(calls)))

    watch = WallStopwatch(call)
    assert watch.run().item() == 1.0
    timing = measure(watch, CPU_RULE)
    assert len(timing.samples_us) == len(calls) - 1 >= 3
    assert all(sample > 0 for sample in timing.samples_us)
    assert timing.clock == "wall"
    assert timing.l2 is None


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["cold", "hot"])
def test_a_cuda_graph_times_a_copy_near_its_bandwidth(l2):
    from moebench.timing import GPU_RULE, CudaStopwatch

    source = torch.ones(1 << 27, dtype=torch.bfloat16, device="cuda")
    watch = CudaStopwatch(lambda: source + 1, l2, torch.cuda.get_device_properties(0).L2_cache_size)
    timing = measure(watch, GPU_RULE)
    assert timing.clock == "cuda_graph"
    assert 2 * (1 << 28) / timing.median_us / 1e6 > 0.5  # TB/s read plus written; any data-centre GPU has more
    assert torch.equal(watch.run(), torch.full_like(source, 2))


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_is_timed_eagerly_and_says_so():
    from moebench.timing import GPU_RULE, CudaStopwatch

    source = torch.ones(1 << 20, device="cuda")

    def synchronizes():
        return source * source.sum().item()

    watch = CudaStopwatch(synchronizes, "cold", 60 << 20)
    assert watch.clock == "cuda_events"
    assert "not captured" in watch.note
    assert measure(watch, GPU_RULE).median_us > 0
