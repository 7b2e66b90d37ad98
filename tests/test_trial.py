"""What a trial makes of a profiler's events, and of a call that is right until its tokens change."""

import contextlib
from dataclasses import replace

import pytest
import torch

from moebench.case import case
from moebench.device import Device
from moebench.problem import make_layer
from moebench.record import Record, Timing
from moebench.reference.torch_experts import experts as reference
from moebench.routing import assign, realized
from moebench.timeline import Event
from moebench.trial import Batch, Copies, Trial, kernels_of_a_call, reseeded, stages

CPU = Device(arch="cpu", name="a CPU without roofs", torch="cpu", memory_bytes=1)


def events(*names, each_ns=1000, gap_ns=500):
    return tuple(Event(name=name, start_ns=i * (each_ns + gap_ns), end_ns=i * (each_ns + gap_ns) + each_ns) for i, name in enumerate(names))


def test_kernels_are_counted_by_the_call():
    seen = events("sort_pairs", "gate_up_kernel", "down_kernel", "sort_pairs", "gate_up_kernel", "down_kernel")
    assert [(k.name, k.count) for k in kernels_of_a_call(seen, 2)] == [("sort_pairs", 1), ("gate_up_kernel", 1), ("down_kernel", 1)]
    assert [(k.name, k.count) for k in kernels_of_a_call(events("a", "a", "b"), 2)] == [("a", 1), ("b", 1)]


def test_a_layers_stages_are_those_of_one_call():
    one = ("gatherTopK", "direct_copy_kernel", "softmax", "sort_pairs", "gate_up_kernel", "down_kernel", "add_slots")
    assert stages(events(*one, *one), 2, routing=3) == pytest.approx({"route": 4.0, "experts": 2.0, "finalize": 1.0})


def test_without_a_router_or_with_calls_that_differ_there_are_no_stages():
    one = ("sort_pairs", "gate_up_kernel", "down_kernel")
    assert stages(events(*one, *one), 2, routing=0) == {}
    assert stages(events(*one, *one, "add_slots"), 2, routing=1) == {}


class Once:
    """Right for the tokens it saw in the first place, and for no others."""

    name, act_dtype, kernel_pattern = "once", "bf16", None

    def __init__(self, calls_that_look):
        self.left = calls_that_look

    def unsupported(self, case, device):
        return None

    def prepare(self, layer, max_num_tokens):
        kept = {}

        def call(tokens):
            if self.left > 0 or tokens.num_tokens not in kept:
                self.left -= 1
                kept[tokens.num_tokens] = reference(layer, tokens, "bf16").bfloat16()
            return kept[tokens.num_tokens].clone()

        return call


@pytest.mark.parametrize("scope", ["experts", "layer"])
def test_a_call_that_repeats_an_old_answer_is_wrong_after_timing(scope):
    point = case("tiny", 4)
    layer = make_layer(point, "cpu")
    backend = Once(calls_that_look=1)
    trial = Trial(
        backend=backend,
        device=CPU,
        copies=Copies(backend, layer, 4, CPU),
        layer_checksum=layer.checksum(),
        l2="cold",
        scope=scope,
        repeat_check=0,
        phase=lambda name: contextlib.nullcontext(),
        block=contextlib.nullcontext,
    )
    blank = Record(case=point, backend="once", act_dtype="bf16", arch="cpu", device="", status="failed", scope=scope)
    found = trial.run(blank)
    assert found.status == "wrong"
    assert "fresh tokens" in found.reason
    assert found.timing is None


def test_a_time_that_physics_does_not_allow_is_refused():
    point = case("gpt-oss-20b", 1024)
    slow = Device(arch="sm90", name="a GPU of 1 MHz", torch="cuda:0", memory_bytes=1, num_sms=132, clock_mhz=1)
    trial = Trial(
        backend=Once(0),
        device=slow,
        copies=None,
        layer_checksum=0,
        l2="cold",
        scope="experts",
        repeat_check=0,
        phase=contextlib.nullcontext,
        block=contextlib.nullcontext,
    )
    blank = Record(case=point, backend="once", act_dtype="bf16", arch="sm90", device=slow.name, status="failed")
    timing = Timing(samples_us=(10.0,), clock="cuda_graph", l2="cold", l2_method="", warmup_calls=0)
    found = trial._judged(replace(blank, timing=timing, routing=realized(point, assign(point))))
    assert (found.status, found.timing) == ("too_fast", None)
    assert "10.00 us is impossible" in found.reason
    hours = replace(timing, samples_us=(1e10,))
    assert trial._judged(replace(blank, timing=hours, routing=realized(point, assign(point)))).status == "ok"


@pytest.mark.parametrize("scope", ["experts", "layer"])
def test_a_batch_is_refilled_in_place_and_routes_like_a_new_one(scope):
    point = case("tiny", 5)
    batch = Batch(point, "cpu", assign(point), scope)
    address = batch.routed().hidden_states.data_ptr()
    other = reseeded(point, 1)
    assert other.seed != point.seed
    batch.fill(other, assign(other))
    assert batch.routed().hidden_states.data_ptr() == address
    assert same(batch.routed(), Batch(other, "cpu", assign(other), scope).routed())
    batch.restore()
    assert batch.routed().hidden_states.data_ptr() == address
    assert same(batch.routed(), Batch(point, "cpu", assign(point), scope).routed())


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("hidden_states", "topk_ids", "topk_weights"))
