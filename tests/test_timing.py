"""The stopping rule and the wall clock, without a GPU."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from moebench.record import Timing
from moebench.simulated import Scenario, SimulatedStopwatch
from moebench.timing import CPU_RULE, GPU_RULE, StopRule, WallStopwatch, measure


class FakeStopwatch:
    """Gives the samples it is told to, counts them, and lets simulated time pass."""

    clock, l2, l2_method, note, host_bound, calls_per_region = "simulated", "cold", "rotation", "", False, 1

    def __init__(self, samples, clocks=(1980.0,)):
        self._samples, self._clocks = cycle(samples), cycle(clocks)
        self.taken, self.seconds = 0, 0.0

    def outputs(self):
        return iter(())

    def now(self):
        return self.seconds

    def sm_mhz(self):
        return next(self._clocks)

    def sample(self, count):
        self.taken += count
        found = [next(self._samples) for _ in range(count)]
        self.seconds += sum(found) / 1e6
        return found


RULE = StopRule(min_samples=20, max_samples=200, max_s=5.0, target=0.005, batch_s=1e-4)


def test_a_steady_clock_stops_at_the_least_number_of_samples():
    watch = FakeStopwatch([10.0])
    timing = measure(watch, RULE)
    assert timing.samples_us == (10.0,) * 25  # 5, then batches of 10
    assert timing.median_us == 10.0
    assert (timing.clock, timing.l2, timing.stop_reason) == ("simulated", "cold", "interval")
    assert timing.window_s == (0.0, pytest.approx(250e-6))


def test_a_steady_clock_is_sampled_for_the_least_time_too():
    timing = measure(FakeStopwatch([10.0]), replace(RULE, min_s=1e-3))
    assert len(timing.samples_us) == 105
    assert timing.stop_reason == "interval"


def test_a_noisy_clock_is_sampled_to_the_limit():
    timing = measure(FakeStopwatch([8.0, 12.0]), RULE)
    assert len(timing.samples_us) == 200
    assert timing.stop_reason == "max_samples"


def test_a_slow_call_gets_five_samples_when_time_runs_out():
    timing = measure(FakeStopwatch([8.0, 12.0]), replace(RULE, max_s=0.0))
    assert len(timing.samples_us) == 5
    assert timing.stop_reason == "max_s"
    assert len(measure(FakeStopwatch([8.0, 12.0]), replace(RULE, max_s=0.0, min_samples=3)).samples_us) == 3


def test_batches_follow_the_length_of_a_sample():
    assert len(measure(FakeStopwatch([3e5]), replace(RULE, max_s=30.0)).samples_us) == 20  # one at a time, and all alike
    assert len(measure(FakeStopwatch([10.0]), replace(RULE, min_samples=21)).samples_us) == 25  # 5, then 10 at a time


def test_nothing_is_trimmed():
    samples = [10.0] * 24 + [500.0]
    assert sorted(measure(FakeStopwatch(samples), RULE).samples_us) == samples


def test_samples_that_resemble_their_neighbours_count_for_less():
    slow_waves = [10.0 + 0.1 * (i // 20 % 2) for i in range(40)]
    mixed = [10.0, 10.1] * 20
    rule = replace(RULE, max_samples=2000, target=0.003)
    assert len(measure(FakeStopwatch(slow_waves), rule).samples_us) >= len(measure(FakeStopwatch(mixed), rule).samples_us)
    assert Timing(samples_us=tuple(slow_waves), clock="simulated", l2=None, l2_method="", warmup_calls=0).effective_samples < 10


def test_warm_up_is_counted_and_not_kept():
    watch = FakeStopwatch([10.0])
    timing = measure(watch, replace(RULE, warmup_s=1e-3, max_warmup_s=1.0))
    assert timing.settled
    assert timing.warmup_calls >= 100
    assert timing.warmup_s == pytest.approx(timing.warmup_calls * 10e-6)
    assert watch.taken == timing.warmup_calls + len(timing.samples_us)


def test_warm_up_goes_on_until_two_batches_agree():
    falling = [max(20.0 * 0.98**i, 10.0) for i in range(1000)]
    timing = measure(FakeStopwatch(falling), replace(RULE, warmup_s=1e-6, max_warmup_s=1.0))
    assert timing.settled
    assert set(timing.samples_us) == {10.0}


def test_warm_up_waits_for_the_sm_clock_too():
    watch = FakeStopwatch([10.0], clocks=[1000.0, 1500.0, 1900.0, 1980.0])
    timing = measure(watch, replace(RULE, warmup_s=1e-6, max_warmup_s=2e-3))
    assert not timing.settled  # it never stood still
    assert timing.warmup_s >= 2e-3


@pytest.mark.parametrize("scenario", [Scenario(), Scenario(call_us=5.0), Scenario(call_us=5000.0)])
def test_a_clean_simulated_gpu_gives_its_time_back(scenario):
    timing = measure(SimulatedStopwatch(scenario), GPU_RULE)
    assert timing.median_us == pytest.approx(scenario.call_us, rel=0.003)
    low, high = timing.interval_us
    assert low <= timing.median_us <= high
    assert timing.stop_reason == "interval"


def test_the_wall_clock_times_the_call_and_returns_its_output():
    calls = []

    def call():
        calls.append(None)
        return torch.full((1,), float(len(calls)))

    watch = WallStopwatch(call)
    ((index, output),) = watch.outputs()
    assert (index, output.item()) == (0, 1.0)
    timing = measure(watch, CPU_RULE)
    assert len(timing.samples_us) == len(calls) - 1 >= 3
    assert all(sample > 0 for sample in timing.samples_us)
    assert timing.clock == "wall"
    assert timing.l2 is None


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["cold", "hot"])
def test_a_cuda_graph_times_a_copy_near_its_bandwidth(l2):
    from moebench.timing import CudaStopwatch

    source = torch.ones(1 << 27, dtype=torch.bfloat16, device="cuda")
    watch = CudaStopwatch([lambda: source + 1], l2)
    timing = measure(watch, GPU_RULE)
    assert timing.clock == "cuda_graph"
    assert 2 * (1 << 28) / timing.median_us / 1e6 > 0.5  # TB/s read plus written; any data-centre GPU has more
    ((index, output),) = watch.outputs()
    assert index == 0
    assert torch.equal(output, torch.full_like(source, 2))


@pytest.mark.gpu
def test_calls_take_turns_in_a_region_and_each_output_is_there():
    from moebench.timing import CudaStopwatch

    sources = [torch.full((1 << 16,), float(i), device="cuda") for i in range(3)]
    watch = CudaStopwatch([lambda s=s: s + 1 for s in sources], "cold")
    assert watch.calls_per_region % 3 == 0
    assert watch.calls_per_region > 3
    assert {index: output[0].item() for index, output in watch.outputs()} == {0: 1.0, 1: 2.0, 2: 3.0}
    sources[1].fill_(10)
    assert {index: output[0].item() for index, output in watch.outputs()} == {0: 1.0, 1: 11.0, 2: 3.0}


@pytest.mark.gpu
def test_a_shared_output_buffer_is_read_from_its_last_writer():
    from moebench.timing import CudaStopwatch

    sources = [torch.full((1 << 16,), float(i), device="cuda") for i in range(3)]
    shared = torch.empty_like(sources[0])
    watch = CudaStopwatch([lambda s=s: torch.add(s, 1, out=shared) for s in sources], "cold")
    assert [(index, output[0].item()) for index, output in watch.outputs()] == [(2, 3.0)]


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_is_timed_eagerly_and_says_so():
    from moebench.timing import CudaStopwatch

    source = torch.ones(1 << 20, device="cuda")

    def synchronizes():
        return source * source.sum().item()

    watch = CudaStopwatch([synchronizes], "cold", flush_bytes=256 << 20)
    assert watch.clock == "cuda_events"
    assert "not captured" in watch.note
    timing = measure(watch, GPU_RULE)
    assert timing.median_us > 0
    assert timing.host_bound  # it waits for the GPU in the middle of the call
