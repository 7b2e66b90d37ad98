"""The self-check on a simulated clock, on a stand-in for a GPU, and what it makes of numbers."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import moebench.selfcheck
from moebench.commands import selfcheck as commanded
from moebench.device import Device
from moebench.selfcheck import (
    DEFAULT,
    EAGER,
    HOT,
    LENGTHS_US,
    PARTS,
    READ_FLUSH,
    STREAM,
    WRITE_FLUSH,
    Bias,
    Cold,
    Cost,
    Noise,
    Order,
    Part,
    Tried,
    interval,
    judge,
    main,
    noise,
    on_simulated_clock,
    on_this_gpu,
)
from moebench.simulated import Scenario, SimulatedStopwatch, measured
from moebench.timing import GPU_RULE, StopRule
from tests.running import ENVIRONMENT, ROOT

RUN = "from moebench.commands.selfcheck import selfcheck; selfcheck(prog_name='selfcheck')"
GPU = Device(arch="sm90", name="stand-in", torch="cuda:0", memory_bytes=8 << 30, l2_bytes=60 << 20)


def command(*arguments, code=RUN, check=0):
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == check, (done.stdout, done.stderr)
    return done


def test_without_a_gpu_the_command_checks_the_simulated_clock_and_says_so():
    done = command()
    for title in ("Calls of known length", "The same in fresh processes", "Simulated disturbances", "Two equal backends"):
        assert title in done.stdout
    assert "no GPU here" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("ok ")] == [
        ["ok", "timer:"],
        ["ok", "noise:"],
        ["ok", "flags:"],
        ["ok", "order:"],
    ]
    assert done.stdout.splitlines()[-1] == "simulated clock: all is well; this machine's own times were not tried"


def test_json_has_rows_what_follows_from_them_and_the_exit_code():
    done = command("--simulated", "--json", "--rounds", "3")
    told = json.loads(done.stdout)
    assert list(told["parts"]) == ["bias", "noise", "flags", "order"]
    assert (told["device"], told["exit_code"]) == ("simulated clock", 0)
    assert [check["ok"] for check in told["checks"]] == [True] * 4
    (row,) = told["parts"]["noise"]["rows"]
    assert len(row["medians_us"]) == 3
    assert row["one_run_shows"] == pytest.approx(2.8 * row["cv"])
    default = [row for row in told["parts"]["bias"]["rows"] if row["method"] == DEFAULT]
    assert [row["length_us"] for row in default] == list(LENGTHS_US)
    assert all(row["excess_us"] == pytest.approx(1.0, abs=0.1) for row in default)  # the launch that the scenario has


def test_parts_that_were_finished_before_an_interrupt_are_in_the_document(monkeypatch):
    def until_interrupted(rounds, backend, simulated, console):
        yield "a GPU"
        yield Part(name="bias", failure="it stood still")
        raise KeyboardInterrupt

    monkeypatch.setattr(commanded, "_news", until_interrupted)
    done = CliRunner().invoke(commanded.selfcheck, ["--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["exit_code"], told["device"]) == (130, 130, "a GPU")
    assert told["parts"]["bias"]["failure"] == "it stood still"


def test_no_rounds_leave_the_noise_out():
    told = json.loads(command("--simulated", "--json", "--rounds", "0").stdout)
    assert list(told["parts"]) == ["bias", "flags", "order"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "one process cannot show how processes differ; give 0 or at least 2"),
        (["--backend", "tritn_mxfp4_bf16"], "did you mean 'triton_mxfp4_bf16'?"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    assert message in command(*arguments, check=2).stderr


def test_what_is_not_well_ends_the_command_with_3_and_says_what_to_do():
    code = (
        "import moebench.commands.selfcheck as c; from moebench.selfcheck import Part, Device\n"
        "gpu = Device(arch='sm90', name='GPU of a test', torch='cuda:0', memory_bytes=1)\n"
        "c.on_this_gpu = lambda: iter([gpu, 'timing', Part(name='bias', failure='out of luck')])\n"
        "c.selfcheck(prog_name='selfcheck')"
    )
    done = command("--rounds", "0", code=code, check=3)
    assert "GPU of a test (sm90)\ntiming ...\n" in done.stdout
    assert "Calls of known length: not measured: out of luck" in done.stdout
    assert "not ok  bias: not measured: out of luck\n        → End whatever else uses this machine" in done.stdout
    assert "no time is to be trusted before this is put right: bias" in done.stdout


def test_the_noise_of_a_backend_is_measured_in_fresh_processes_or_said_to_be_missing():
    code = (
        "import moebench.commands.selfcheck as c; from moebench.device import Device\n"
        "c.TOKENS, c.on_this_gpu = (1,), lambda: iter([Device(arch='sm90', name='GPU', torch='cuda:0', memory_bytes=1)])\n"
        "c.selfcheck(prog_name='selfcheck')"
    )
    told = json.loads(command("--rounds", "2", "--json", code=code, check=3).stdout)
    (check,) = told["checks"]
    assert check["name"] == "noise"
    assert check["text"].startswith("not measured: triton_mxfp4_bf16 on gpt-oss-20b M=1: skipped: ")


def test_on_a_cpu_the_child_says_only_what_it_runs_on():
    (device,) = on_this_gpu()
    assert device.arch == "cpu"


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Sets what runs instead of the child: `told(frame)` sends a frame, `asked` is the request."""

    def put(code):
        fake = tmp_path / "python"
        first = "import json, os, sys\nasked = json.loads(sys.stdin.readline())"
        tell = "def told(**frame): os.write(int(sys.argv[3]), json.dumps(frame).encode() + b'\\n')"
        gpu = f"told(device={asdict(GPU)!r})"
        fake.write_text(f"#!{sys.executable}\n{first}\n{tell}\n{gpu}\n{code}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))

    return put


def test_a_part_that_fails_or_kills_its_process_costs_itself_alone(child):
    row = {"kind": "Cost", "what": "NVTX ranges", "without_us": 50.0, "ratios": [1.0, 1.001]}
    child(
        f"""for part in asked["parts"]:
    told(phase=part)
    told(progress="doing " + part)
    if part == "bias":
        told(failed="no luck"); sys.exit(0)
    if part == "cold":
        os.abort()
    if part == "telemetry":
        print("last words", flush=True); sys.exit(7)
    told(rows=[{row!r}])"""
    )
    news = list(on_this_gpu())
    assert news[0] == GPU
    assert [what for what in news if isinstance(what, str)] == [f"doing {part}" for part in PARTS]
    bias, cold, nvtx, telemetry = (what for what in news if isinstance(what, Part))
    assert bias == Part(name="bias", failure="no luck")
    assert "SIGABRT" in cold.failure
    assert nvtx.rows == (Cost(what="NVTX ranges", without_us=50.0, ratios=(1.0, 1.001)),)
    assert "last words" in telemetry.failure


class StandIn:
    """A GPU that does at once what it is asked, in time of its own: 1980 cycles a us, 1 us to launch, 4 TB/s and an L2 of 60 MiB."""

    def __init__(self):
        self.now_us, self.recorded, self.last = 0.0, None, None
        self.slower = 1.0

    def work(self, what, microseconds):
        if self.recorded is not None:
            self.recorded.append((what, microseconds))
            return
        warm = what is not None and what == self.last
        self.last = what
        self.now_us += 1.0 + self.slower * microseconds / (2 if warm else 1)

    def sleep(self, cycles):
        self.work(None, cycles / 1980)

    def amax(self, source, dim, out):
        size = source.numel() * 4
        self.work(id(source) if size < 60 << 20 else None, size / 4e6)
        return out

    def fill_(self, tensor, value):
        self.work(None, tensor.numel() * 4 / 4e6)

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at_us = gpu.now_us

            def query(self):
                return False

            def elapsed_time(self, other):
                return (other.at_us - self.at_us) / 1e3

        class Graph:
            def __init__(self):
                self.work = []

            def replay(self):
                for what, microseconds in self.work:
                    gpu.work(what, microseconds)

        @contextmanager
        def capture(graph):
            gpu.recorded = graph.work
            yield
            gpu.recorded = None

        @contextmanager
        def stream(_):
            yield

        waiting = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "stream": stream,
            "Stream": lambda: waiting,
            "current_stream": lambda: waiting,
            "synchronize": lambda: None,
            "_sleep": self.sleep,
            "get_device_properties": lambda _: SimpleNamespace(uuid="1234"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "amax", self.amax)
        monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: gpu.fill_(tensor, value))

        def elsewhere(make, *size, **options):
            return make(*size, **options | ({"device": "meta"} if options.get("device") == "cuda" else {}))

        for name in ("zeros", "ones", "empty", "rand"):
            make = getattr(torch, name)
            monkeypatch.setattr(torch, name, partial(elsewhere, make))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Runs the child's main in this process on a stand-in; gives the part's frames."""
    device = StandIn()
    device.install(monkeypatch)
    quick = StopRule(min_samples=30, max_samples=30, max_s=1.0)
    monkeypatch.setattr(moebench.selfcheck, "RULE", quick)
    monkeypatch.setattr(moebench.selfcheck, "detect", lambda: GPU)
    monkeypatch.setattr(moebench.selfcheck, "WARMUP_REGIONS", 2)
    monkeypatch.setattr(moebench.selfcheck, "BATCH_REGIONS", 3)

    def run(*parts):
        monkeypatch.setattr(moebench.selfcheck, "take", lambda: {"parts": list(parts)})
        with (tmp_path / "frames").open("wb") as pipe:
            main(pipe)
        return [json.loads(line) for line in (tmp_path / "frames").read_text().splitlines()]

    device.run = run
    return device


def part_of(name, frames):
    (rows,) = (frame["rows"] for frame in frames if "rows" in frame)
    return Part(name=name, rows=tuple(moebench.selfcheck._rows(rows)))


def test_every_method_times_calls_of_known_length_on_the_stand_in(gpu):
    part = part_of("bias", gpu.run("bias"))
    assert [row.method for row in part.rows[::4]] == [DEFAULT, READ_FLUSH, EAGER, HOT]
    assert [row.length_us for row in part.rows[:4]] == pytest.approx(list(LENGTHS_US), rel=1e-3)
    for row in part.rows:
        assert row.excess_us == pytest.approx(1.0, abs=0.01)  # one launch, as an empty kernel has
        assert row.beyond_us == pytest.approx(0.0, abs=0.01)
    assert judge(part)[0].ok


def test_a_read_is_timed_cold_flushed_and_hot_on_the_stand_in(gpu):
    part = part_of("cold", gpu.run("cold"))
    times = {row.method: row.time_us for row in part.rows}
    assert list(times) == [DEFAULT, READ_FLUSH, WRITE_FLUSH, HOT, STREAM]
    assert times[DEFAULT] == times[READ_FLUSH] == times[WRITE_FLUSH] == pytest.approx(1 + 53 / 4)
    assert times[HOT] == pytest.approx(1 + 53 / 8, rel=0.01)
    (check,) = judge(part)
    assert check.ok
    assert "53 MB are read in 14.2 us by rotation (3.72 TB/s), no faster than 1.0 GiB at 3.99 TB/s" in check.text


def test_what_costs_nothing_costs_nothing_on_the_stand_in(gpu, monkeypatch):
    frames = gpu.run("nvtx")
    assert [list(frame) for frame in frames] == [["device"], ["phase"], ["progress"], ["rows"]]
    (row,) = part_of("nvtx", frames).rows
    assert (row.what, row.ratios) == ("NVTX ranges", pytest.approx((1.0,) * 6))

    class Slow:
        problem = ""

        def __init__(self, uuid):
            assert uuid == "1234"
            self.asked = 0

        def __enter__(self):
            gpu.slower = 1.02
            return self

        def __exit__(self, *_):
            gpu.slower = 1.0

        def idle(self):
            self.asked += 1
            return object() if self.asked > 2 else None

    monkeypatch.setattr(moebench.selfcheck, "Sensors", Slow)
    part = part_of("telemetry", gpu.run("telemetry"))
    assert part.rows[0].ratio == pytest.approx(1.02, abs=0.001)
    assert not judge(part)[0].ok


def test_sensors_that_say_nothing_and_parts_that_raise_are_told_in_a_sentence(gpu, monkeypatch):
    class Silent:
        problem = "nvidia-ml-py is not installed"

        def __init__(self, uuid): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def idle(self): ...

    monkeypatch.setattr(moebench.selfcheck, "Sensors", Silent)
    frames = gpu.run("telemetry", "bias")
    assert frames[-1] == {"failed": "RuntimeError: nvidia-ml-py is not installed"}
    (check,) = judge(Part(name="telemetry", failure=frames[-1]["failed"]))
    assert check.do.startswith("Without it throttling is not seen. Install it with `pip install nvidia-ml-py`")


def bias(length_us, beyond_us, method=DEFAULT, **more):
    return Bias(method=method, length_us=length_us, time_us=length_us + 1.2 + beyond_us, empty_us=1.2, **more)


def cold(method, time_us, read_bytes=53_000_000):
    return Cold(method=method, read_bytes=read_bytes, time_us=time_us, empty_us=1.2)


def colds(**times_us):
    known = {DEFAULT: 14.4, READ_FLUSH: 16.0, WRITE_FLUSH: 20.1, HOT: 10.0} | times_us
    return [*(cold(method, time_us) for method, time_us in known.items()), cold(STREAM, 500.0, 2 << 30)]


def rows_of_noise(scale=0.001, **more):
    medians = tuple(100 * (1 + scale * step) for step in (-1, 0, 1))
    return Noise(case="gpt-oss-20b M=1", backend="b", medians_us=medians, within=0.003, **more)


def order(shuffled, ratio):
    return Order(order=f"order {shuffled}", shuffled=shuffled, rounds=9, ratio=ratio, low=ratio - 0.003, high=ratio + 0.003)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([bias(2, 0.49), bias(10, -0.49), bias(50, 0.49), bias(200, 1.9)], "a call of 50.0 us reads 51.69 us, +0.49 us beyond"),
        ([bias(2, 0.1), bias(2, 3.0, method=READ_FLUSH)], "with it the excess is 1.30 us at most, at 2.0 us"),
        (colds(), "53 MB are read in 14.4 us by rotation (3.68 TB/s), no faster than 2.0 GiB at 4.29 TB/s, which no L2 holds"),
        (colds(), "read flush +1.6 us, write flush +5.7 us, hot replay -4.4 us"),
        ([Cost(what="telemetry", without_us=50, ratios=(1.001, 0.999, 1.0, 1.002))], "with telemetry a median changes by +0.05%"),
        ([rows_of_noise(0.001), rows_of_noise(0.01)], "one run can show differences from 2.80%, 3 rounds from 1.62%"),
        (
            [Tried(scenario="quiet", expected="", flags={}), Tried(scenario="hot", expected="throttled", flags={"throttled": "x"})],
            "each of 1",
        ),
        ([order(False, 1.02), order(True, 1.001)], "order False: +2.00% (+1.70% to +2.30%); order True: +0.10%"),
    ],
)
def test_what_is_well_is_said_with_its_numbers(rows, text):
    (check,) = judge(Part(name="any", rows=tuple(rows)))
    assert check.ok
    assert text in check.text
    assert check.do == ""


@pytest.mark.parametrize(
    ("rows", "text", "do"),
    [
        ([bias(2, 0.51), bias(50, 0)], "+0.51 us beyond", "claim no difference below 0.5 us"),
        ([bias(10, -0.6)], "-0.60 us beyond", "claim no difference below 0.6 us"),
        ([bias(50, 0.51)], "(allowed: 0.50)", "End whatever else uses this machine"),
        ([bias(200, 2.5, clock_moved=0.013)], "the SM clock moved by 1.30% meanwhile", "End whatever else uses this machine"),
        (colds(**{DEFAULT: 11.0}), "rotation (default): reads at 4.82 TB/s, faster than memory can (4.29 TB/s)", "Do not trust cold"),
        (colds(**{READ_FLUSH: 11.0}), "read flush: reads at 4.82 TB/s", "Do not trust cold"),
        ([Cost(what="telemetry", without_us=50, ratios=(1.01, 1.011, 1.009, 1.01))], "changes by +1.00%", "all taken with it"),
        ([Cost(what="telemetry", without_us=50, ratios=(0.98, 0.981, 0.979, 0.98))], "changes by -2.00%", "all taken with it"),
        ([Cost(what="telemetry", without_us=50, ratios=(1.03, 0.97, 1.02, 0.98))], "too uncertain to say", "End whatever else"),
        ([rows_of_noise(0.02)], "one run can show differences from 5.60%", "compare with more rounds"),
        ([rows_of_noise(flags=("contended",))], "flags: gpt-oss-20b M=1 contended", "End whatever else"),
        ([Tried(scenario="hot", expected="throttled", flags={"ecc": "x"})], "hot: expected throttled, got ecc", "Do not trust rows"),
        ([Tried(scenario="quiet", expected="", flags={"ecc": "x"})], "quiet: expected no flag, got ecc", "Do not trust rows"),
        ([order(False, 1.02), order(True, 1.02)], "order True: +2.00%", "Do not compare backends"),
        ([order(False, 1.0), order(True, 1.0)], "order False: +0.00%", "Do not compare backends"),
        ([], "not measured: there is nothing to judge", "End whatever else"),
    ],
)
def test_what_is_not_well_is_said_with_what_to_do(rows, text, do):
    (check,) = judge(Part(name="any", rows=tuple(rows)))
    assert not check.ok
    assert text in check.text
    assert do in check.do


def test_a_failure_beside_rows_is_not_well():
    checks = judge(Part(name="noise", rows=(rows_of_noise(),), failure="b on M=64: wrong: off by one"))
    assert [check.ok for check in checks] == [True, False]
    assert "off by one" in checks[1].text


def test_an_interval_is_the_mean_of_logarithms_and_students_t():
    ratio, low, high = interval([1.0, 1.0, 1.21, 1.21])
    assert ratio == pytest.approx(1.1)
    assert high / ratio == pytest.approx(ratio / low) == pytest.approx(1.1914, abs=0.001)  # exp(3.1824 * 0.11006 / 2)


def test_the_noise_of_processes_is_found_again():
    """The standard deviation of 200 draws is known to 5 %."""
    watches = [SimulatedStopwatch(Scenario(process_noise=0.004, noise=0.008), seed=seed) for seed in range(200)]
    records = [measured(watch, replace(GPU_RULE, max_samples=100)) for watch in watches]
    (row,) = noise([*records, replace(records[0], status="wrong")])
    assert len(row.medians_us) == 200
    assert row.cv == pytest.approx(0.004, rel=0.2)
    assert row.within == pytest.approx(0.008, rel=0.1)
    assert row.resolves() == pytest.approx(2.8 * row.cv)
    assert row.resolves(4) == pytest.approx(row.resolves() / 2)
    assert row.flags == ()
    assert list(noise(records[:1])) == []


def test_a_clock_that_adds_much_to_each_region_is_caught_only_where_a_region_is_one_call():
    default, single = (
        [row for row in moebench.selfcheck.simulated_biases(5.0) if row.method == method] for method in (DEFAULT, READ_FLUSH)
    )
    assert max(abs(row.excess_us - 1.0) for row in default) < 1.2  # 5 us over a region of 1 ms
    assert min(row.excess_us for row in single) > 5.5


def test_the_parts_without_a_gpu_are_all_well():
    parts = list(on_simulated_clock(4))
    assert [part.name for part in parts] == ["bias", "noise", "flags", "order"]
    assert all(check.ok for part in parts for check in judge(part))
