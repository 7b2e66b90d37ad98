"""One worker in this process: the frames it sends and the ranges it shows to profilers."""

import io
import json

import pytest

from moebench import timing, worker
from moebench.case import case
from moebench.worker import Request, Worker


class Recorder:
    """Stands for an NVTX domain; knows whether a sample is being taken."""

    def __init__(self):
        self.open, self.seen, self.sampling = [], [], False

    def get_event_attributes(self, message):
        return message

    def push_range(self, message):
        assert not self.sampling, f"{message} begins inside a timed region"
        self.open.append(message)
        self.seen.append(tuple(self.open))

    def pop_range(self):
        assert not self.sampling, f"{self.open[-1]} ends inside a timed region"
        self.open.pop()


@pytest.fixture(params=["experts", "layer"])
def run(monkeypatch, request):
    """Frames and ranges of a worker on two cases."""
    domain = Recorder()
    monkeypatch.setattr(worker.nvtx, "get_domain", lambda name: domain if name == "moebench" else None)
    once = timing.WallStopwatch._once

    def sampled(self):
        domain.sampling = True
        try:
            return once(self)
        finally:
            domain.sampling = False

    monkeypatch.setattr(timing.WallStopwatch, "_once", sampled)
    pipe = io.BytesIO()
    Worker(pipe, Request(run_id="r1", backend="torch", cases=[case("tiny", 1), case("tiny", 2)], scope=request.param, round=3)).run()
    return [json.loads(line) for line in pipe.getvalue().splitlines()], domain


def test_ranges_nest_run_case_phase_and_stay_outside_timed_regions(run):
    _, domain = run
    assert domain.open == []
    timed = [ranges for ranges in domain.seen if ranges[-1] == "phase|time"]
    assert [ranges[:2] for ranges in timed] == [("run|r1", f"case|torch|{case('tiny', m).key}") for m in (1, 2)]


def test_every_phase_is_announced_before_it_begins(run):
    frames, _ = run
    assert [frame["phase"] for frame in frames if "phase" in frame] == [
        "import",
        "import",
        "alloc",
        "jit",
        *["alloc", "check", "time", "check"] * 2,
    ]


def test_one_record_a_case_in_order(run):
    frames, _ = run
    records = [frame["record"] for frame in frames if "record" in frame]
    assert [(record["case"]["num_tokens"], record["status"]) for record in records] == [(1, "ok"), (2, "ok")]
    assert all(record["kernels"] == [] and record["timing"]["clock"] == "wall" for record in records)


def test_a_record_says_what_was_timed_and_where_the_time_went(run, request):
    frames, _ = run
    scope = request.node.callspec.params["run"]
    for frame in (frame for frame in frames if "record" in frame):
        record = frame["record"]
        assert (record["scope"], record["round"]) == (scope, 3)
        assert record["contract"]["scope"] == scope
        assert ("router logits" in record["contract"]["inside"]) == (scope == "layer")
        assert set(record["phases_s"]) >= {"alloc", "check", "time"}
