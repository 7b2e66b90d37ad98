"""Telemetry: what a window of samples says, what the child asks of NVML, and that nothing it does reaches the sweep."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from moebench import flags, telemetry
from moebench.case import case
from moebench.record import Error, Record, Telemetry, Timing, energy_per_call_j
from moebench.telemetry import QUERIES, Sample, Sensors, parse, poll, summarize
from tests.nvml_standin import UUID, install

ROOT = Path(__file__).parents[1]

# Whatever a hand on a setting is called in NVML; Get functions are what is left.
HANDS = "Set|Reset|Clear|Freeze|Enable|Disable|Create|Destroy|Register|Validate|Inject|Remove|Modify|Attach|Detach|Discover|Write"
SETTER = re.compile(rf"nvml(?!\w*Get)\w*(?:{HANDS})\w*")
READING = re.compile(r"nvml(Init|Shutdown|Memory_v2|(Device|System)Get\w*)?")  # functions, and the one constant that starts like them
RUNNERS = {"run", "Popen", "call", "check_call", "check_output", "getoutput", "system", "popen", "execvp", "execv", "spawnvp", "which"}


def until(condition, seconds=60):
    """The first true value of condition(); waits for other processes, asserts no speed."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return value


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def at_work(t, **values):
    """A sample of an H200 at 400 W."""
    usual = {"sm_mhz": 1980.0, "mem_mhz": 3201.0, "max_sm_mhz": 1980.0, "power_w": 399.0, "power_limit_w": 700.0, "temperature_c": 50.0}
    usual |= {"reasons": (), "energy_mj": 1e6 + 400e3 * t, "ecc_corrected": 0.0, "ecc_uncorrected": 0.0}
    return Sample(t=t, **(usual | values))


def every_50_ms(start, end, **values):
    return [at_work(start + n / 20, **values) for n in range(round((end - start) * 20) + 1)]


# What a window of samples says


def test_a_window_is_summed_up():
    samples = every_50_ms(0, 2) + [at_work(2.05 + n / 20, temperature_c=71.0, reasons=("sw_power_cap",), sm_mhz=1830.0) for n in range(20)]
    told = summarize(samples, 1.0, 3.0, foreign_bytes=7)
    assert told == Telemetry(
        samples=41,
        sm_mhz=(1830.0, 1980.0, 1980.0),
        max_sm_mhz=1980.0,
        mem_mhz=3201.0,
        power_w=pytest.approx(400.0),  # by the counter, not by the 399 W of the moment
        power_limit_w=700.0,
        temperature_c=71.0,
        reasons={"sw_power_cap": 20 / 41},
        energy_j=pytest.approx(800.0),
        window_s=pytest.approx(2.0),
        ecc_corrected=0,
        ecc_uncorrected=0,
        foreign_bytes=7,
    )


@pytest.mark.parametrize(("slow", "least"), [(2, 1980.0), (3, 1700.0)])
def test_the_low_clock_is_one_that_at_most_a_tenth_of_the_samples_were_below(slow, least):
    samples = [at_work(n / 20, sm_mhz=1700.0 if n < slow else 1980.0) for n in range(20)]
    assert summarize(samples, 0, 0.95).sm_mhz == (least, 1980.0, 1980.0)


def test_a_window_between_two_polls_takes_both():
    samples = [at_work(1.0, sm_mhz=1900.0), at_work(1.05, sm_mhz=1980.0), at_work(1.1, sm_mhz=100.0)]
    told = summarize(samples, 1.01, 1.04)
    assert (told.samples, told.sm_mhz) == (2, (1900.0, 1940.0, 1980.0))


def test_a_row_that_ended_just_now_is_described_by_what_was_heard_so_far():
    told = summarize(every_50_ms(0, 2), 1.0, 2.04)
    assert told.samples == 21
    assert told.energy_j == pytest.approx(400.0)
    assert told.window_s == pytest.approx(1.0)  # as far as samples reach


@pytest.mark.parametrize(
    ("samples", "window"),
    [
        pytest.param([], (0, 1), id="none at all"),
        pytest.param(every_50_ms(0, 2), (3.5, 4), id="all long before"),
        pytest.param(every_50_ms(5, 6), (3.0, 3.9), id="all long after"),
        pytest.param(every_50_ms(0, 2) + every_50_ms(3.5, 5), (1, 4), id="a hole of 1.5 s within"),
        pytest.param(every_50_ms(0, 2), (1, 3.5), id="silence for the last 1.5 s"),
    ],
)
def test_a_window_that_was_not_watched_has_no_telemetry(samples, window):
    assert summarize(samples, *window) is None


def test_a_hole_outside_the_window_does_not_matter():
    assert summarize(every_50_ms(0, 1) + every_50_ms(5, 7), 5.125, 6.875).samples == 35


def test_energy_is_that_of_the_window_and_not_of_the_polls_around_it():
    counter = {0.0: 0.0, 1.0: 100e3, 2.0: 500e3, 3.0: 600e3}  # 400 W in the second second, 100 W around it
    told = summarize([at_work(t, energy_mj=mj) for t, mj in counter.items()], 0.5, 2.5)
    assert told.energy_j == pytest.approx(50 + 400 + 50)
    assert told.power_w == pytest.approx(250)


def test_too_short_a_window_has_no_energy_and_the_power_of_the_moment():
    told = summarize(every_50_ms(0, 1), 0.5, 0.7)
    assert told.energy_j is None
    assert told.power_w == pytest.approx(399.0)


def test_a_counter_that_was_reset_gives_no_energy():
    samples = [at_work(n / 20, energy_mj=1e6 if n < 10 else 0.0) for n in range(21)]
    assert summarize(samples, 0, 1).energy_j is None


def test_memory_errors_next_to_the_window_are_counted_too():
    before, after = at_work(0.9, ecc_corrected=4.0), at_work(2.05, ecc_corrected=5.0, ecc_uncorrected=1.0)
    told = summarize([before, *every_50_ms(1, 2, ecc_corrected=5.0), after], 1, 2)
    assert (told.ecc_corrected, told.ecc_uncorrected) == (1, 1)


def test_memory_errors_of_the_past_are_not_the_rows():
    told = summarize(every_50_ms(0, 2, ecc_corrected=12.0, ecc_uncorrected=3.0), 0.5, 1.5)
    assert (told.ecc_corrected, told.ecc_uncorrected) == (0, 0)


def test_the_clock_of_an_idle_neighbour_is_not_the_rows():
    samples = [at_work(1.0, sm_mhz=345.0, reasons=("gpu_idle",)), at_work(1.05)]
    told = summarize(samples, 1.01, 1.06)
    assert told.sm_mhz == (1980.0, 1980.0, 1980.0)
    assert told.reasons == {"gpu_idle": 0.5}


def test_what_the_driver_does_not_tell_is_zero_or_empty():
    told = summarize([Sample(t=0.0), Sample(t=0.5), Sample(t=1.0)], 0, 1)
    assert told.samples == 3
    assert told.sm_mhz == (0.0, 0.0, 0.0)
    assert (told.max_sm_mhz, told.mem_mhz, told.power_w, told.power_limit_w, told.temperature_c) == (0.0,) * 5
    assert (told.reasons, told.energy_j, told.ecc_corrected) == ({}, None, 0)


def timed(samples=1000, calls=2, window=(1.0, 3.0)):
    return Timing(
        samples_us=(1000.0,) * samples, clock="cuda_graph", l2=None, l2_method="", warmup_calls=0, calls_per_region=calls, window_s=window
    )


def test_energy_of_a_call_is_that_of_the_window_over_its_calls():
    told = summarize(every_50_ms(0, 4), 1.0, 3.0)
    assert energy_per_call_j(told, timed()) == pytest.approx(800 / 2000)


def test_energy_of_a_call_counts_the_calls_that_were_watched():
    told = summarize(every_50_ms(0, 2), 1.0, 3.0 - 1e-9)
    assert told.window_s == pytest.approx(1.0)
    assert energy_per_call_j(told, timed()) == pytest.approx(400 / 1000)


def test_there_is_no_energy_of_a_call_without_a_counter_or_a_window():
    told = summarize(every_50_ms(0, 4), 1.0, 3.0)
    assert energy_per_call_j(told, timed(window=None)) is None
    assert energy_per_call_j(summarize(every_50_ms(0, 4, energy_mj=None), 1.0, 3.0), timed()) is None


# What the child writes


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"t": NaN}',
        b'{"t": 1e999}',
        b'{"t": "1"}',
        b'{"t": true}',
        b'{"t": 1, "sm_mhz": null}',
        b'{"t": 1, "sm_mhz": -Infinity}',
        b'{"t": 1, "reasons": "sw_power_cap"}',
        b'{"t": 1, "reasons": [1]}',
        b'{"t": 1, "processes": [true]}',
        b'{"t": 1' + b"0" * 400 + b"}",
        b'{"t": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda line: repr(line[:40]),
)
def test_what_is_no_sample_is_refused(line):
    with pytest.raises((ValueError, RecursionError, OverflowError)):
        parse(line)


def test_a_sample_of_a_newer_child_is_read():
    line = b'{"t": 1.5, "sm_mhz": 1980, "reasons": ["sw_power_cap"], "processes": [4], "fan": {}}'
    assert parse(line) == Sample(t=1.5, sm_mhz=1980.0, reasons=("sw_power_cap",), processes=(4,))


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Call it with a script: the stand-in is then what `import pynvml` finds, in this process and in children."""

    def ready(*arguments, **script):
        install(tmp_path, *arguments, **script)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        return tmp_path

    yield ready
    sys.modules.pop("pynvml", None)


def polled(count, uuid=""):
    """The child's first lines as the supervisor reads them, 50 ms apart."""
    lines = list(islice(poll(uuid), count))
    assert len(lines) == count
    return [parse(json.dumps(line | {"t": n / 20}).encode()) for n, line in enumerate(lines)]


def last_words(uuid=""):
    *_, line = islice(poll(uuid), 100)
    return line["unavailable"]


def test_every_answer_arrives_in_its_unit(nvml):
    nvml([{"reasons": 0x24, "millijoule": 123456, "corrected": 2, "uncorrected": 1, "busy_percent": 30, "pids": [17, 4]}])
    (sample,) = polled(1)
    assert sample == Sample(
        t=0.0,
        sm_mhz=1980.0,
        mem_mhz=3201.0,
        power_w=400.0,
        temperature_c=50.0,
        reasons=("sw_power_cap", "sw_thermal"),
        energy_mj=123456.0,
        ecc_corrected=2.0,
        ecc_uncorrected=1.0,
        max_sm_mhz=1980.0,
        power_limit_w=700.0,
        used_bytes=3.0 * (1 << 20),
        utilization=0.3,
        processes=(17, 4),
    )


def test_a_reason_that_is_not_known_yet_keeps_its_bit(nvml):
    nvml([{"reasons": 0x1008}])
    assert polled(1)[0].reasons == ("hw_slowdown", "reason_0x1000")


@pytest.mark.parametrize("function", sorted({query.function for query in QUERIES}))
def test_a_question_that_the_driver_does_not_answer_is_left_out_or_asked_otherwise(nvml, function):
    nvml(unsupported=[function])
    sample = polled(1)[0]
    fields = {query.field for query in QUERIES if query.function == function}
    others = {query.field for query in QUERIES if query.function != function}
    missing = {name for name in Sample.__slots__ if getattr(sample, name) is None}
    assert missing == fields - others


def test_a_question_that_fails_for_a_moment_is_asked_again(nvml, monkeypatch):
    nvml()
    lines = poll("")
    assert "power_w" in next(lines)
    pynvml = sys.modules["pynvml"]

    def refuse(_handle):
        raise pynvml.NVMLError("In use")

    with monkeypatch.context() as patch:
        patch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refuse)
        assert "power_w" not in next(lines)
    assert "power_w" in next(lines)


def test_memory_without_the_drivers_own_share_is_preferred(nvml):
    nvml([{"used": 5 << 20}])
    assert polled(1)[0].used_bytes == 5 << 20


def test_slow_answers_are_repeated_until_they_are_asked_again(nvml):
    nvml([{"busy_percent": n} for n in range(1, 20)])
    assert [sample.utilization for sample in polled(11)] == pytest.approx([0.02] * 10 + [0.12])  # asked once before the first poll


@pytest.mark.parametrize("uuid", [UUID, UUID.removeprefix("GPU-")])
def test_a_gpu_is_found_by_its_uuid_with_and_without_prefix(nvml, uuid):
    nvml(gpus=["GPU-other", UUID])
    assert polled(1, uuid)[0].sm_mhz == 1980.0


@pytest.mark.parametrize(
    ("script", "uuid", "words"),
    [
        ({"gpus": ["GPU-a", "GPU-b"]}, "", "NVML sees 2 GPUs and was not told which one is measured"),
        ({"gpus": []}, "", "NVML sees 0 GPUs"),
        ({"gpus": ["GPU-a", "GPU-b"]}, "c", "NVML has no GPU GPU-c: Not Found; its 2 are listed by nvidia-smi -L"),
        ({"starts": False}, "", "a part of the NVIDIA driver, does not answer: NVML Shared Library Not Found"),
        ({"unsupported": [query.function for query in QUERIES]}, "", "answers nothing about it"),
        ({"lost_at": 3}, "", "the GPU no longer answers NVML"),
    ],
)
def test_no_telemetry_is_a_sentence(nvml, script, uuid, words):
    nvml(**script)
    assert words in last_words(uuid)


def test_without_nvidia_ml_py_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert last_words().endswith("pip install nvidia-ml-py")


def test_a_driver_that_tells_the_slow_things_only_is_not_taken_for_a_lost_gpu(nvml):
    nvml(unsupported=[query.function for query in QUERIES if query.every == 1])
    assert [sample.power_limit_w for sample in polled(12)] == [700.0] * 12


def test_a_scripted_power_cap_becomes_a_flag_that_names_it(nvml):
    capped = {"sm": 1830, "reasons": 0x4, "milliwatt": 699_000}
    nvml([{"millijoule": n * 35_000, **(capped if n >= 10 else {})} for n in range(60)])
    told = summarize(polled(50), 0, 2.4)
    assert told.power_w == pytest.approx(700)
    row = Record(
        case=case("tiny", 4), backend="b", act_dtype="bf16", arch="sm90", device="", status="ok", timing=timed(), telemetry=told, error=GOOD
    )
    assert flags.raised(row) == {"throttled": "SM clock 1830 to 1980 MHz of 1980; sw_power_cap active in 82% of 49 samples at 700 of 700 W"}


GOOD = Error(rel_l2=0.0, worst=0.0, worst_token=0, worst_column=0, max_abs=0.0, rel_l2_tolerance=1.0, worst_tolerance=1.0)


# The supervisor's end


def child(code):
    """A command that does as `code` says with the pipe `fd`."""
    return sys.executable, "-c", "import json, os, signal, sys, time\nfd = int(sys.argv[1])\n" + code


SAMPLE = "os.write(fd, json.dumps({'t': time.monotonic(), 'sm_mhz': 1980}).encode() + b'\\n')\n"


def heard(sensors):
    """Telemetry of the half second up to now."""
    return sensors.window(time.monotonic() - 0.5, time.monotonic())


def test_sensors_watch_a_gpu_and_leave_no_process_behind(nvml):
    nvml([{"used": 2 << 30, "busy_percent": 40, "pids": [1]}])
    with Sensors() as sensors:
        told = until(lambda: heard(sensors))
        assert told.sm_mhz == (1980.0, 1980.0, 1980.0)
        assert told.foreign_bytes == 2 << 30
        idle = sensors.idle()
        assert (idle.used_bytes, idle.utilization, idle.processes) == (2 << 30, pytest.approx(0.4), (1,))
        assert sensors.problem == ""
        pid = sensors._process.pid
        assert os.getsid(pid) == pid != os.getsid(0)  # Ctrl-C does not reach it
    assert not alive(pid)
    assert sensors.problem == ""
    assert not sensors._listener.is_alive()


def test_idle_is_what_was_there_before_the_first_worker():
    code = (
        "for n in range(100):\n"
        " line = {'t': n / 20, 'used_bytes': 5 if n <= 20 else 99, 'utilization': 0.5, 'processes': [7]}\n"
        " os.write(fd, json.dumps(line).encode() + b'\\n')\n"
        "time.sleep(60)"
    )
    with Sensors(command=child(code)) as sensors:
        until(lambda: sensors.window(4.0, 4.9))
        idle = sensors.idle()
    assert (idle.used_bytes, idle.utilization, idle.processes) == (5, 0.5, (7,))


def test_nothing_but_listed_getters_is_called_in_a_whole_run(nvml):
    directory = nvml([{"sm": 1980}], gpus=["GPU-other", UUID])
    with Sensors(UUID) as sensors:
        until(lambda: heard(sensors))
        until(lambda: len(sensors._samples) > 25)  # every question has been asked more than once
    assert not (directory / "touched.txt").exists()
    called = set((directory / "calls.txt").read_text().split())
    assert called == {query.function for query in QUERIES} - {
        "nvmlDeviceGetTemperature",  # the first of its field answered
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    } | {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByUUID"}


def test_the_stand_in_notices_a_hand_on_a_setting(nvml):
    directory = nvml()
    import pynvml

    with pytest.raises(pynvml.Touched):
        pynvml.nvmlDeviceSetPowerManagementLimit(None, 500_000)
    assert (directory / "touched.txt").read_text() == "nvmlDeviceSetPowerManagementLimit"


def test_a_call_that_hangs_in_the_driver_costs_the_telemetry_only(nvml, monkeypatch):
    nvml(hang_at=5)
    monkeypatch.setattr(telemetry, "SILENT_S", 0.2)
    with Sensors() as sensors:
        until(lambda: len(sensors._samples) >= 5)
        assert "the driver may hang" in until(lambda: sensors.problem)
        now = time.monotonic()
        assert sensors.window(now + 5, now + 6) is None  # a row long after
        pid = sensors._process.pid
    assert not alive(pid)  # although it ignores SIGTERM


def test_a_child_that_cannot_be_killed_is_left_behind(nvml, monkeypatch):
    directory = nvml(hang_at=2)
    kill = telemetry._kill_group
    with Sensors() as sensors:
        until((directory / "hanging.txt").exists)
        process = sensors._process
        monkeypatch.setattr(telemetry, "_kill_group", lambda pid, number: None)
    assert alive(process.pid)  # close came back all the same
    kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not sensors._listener.is_alive())


def test_a_child_that_dies_is_named_and_what_it_said_stays(nvml):
    nvml(exit_at=8)
    with Sensors() as sensors:
        assert "has ended; to see why: python -m moebench.telemetry 1" in until(lambda: sensors.problem)
        assert len(sensors._samples) == 8
        first = sensors._samples[0].t
        assert sensors.window(first, first + 0.3).sm_mhz == (1980.0, 1980.0, 1980.0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        pytest.param(SAMPLE + "while True: os.write(fd, b'x' * 4096)", "floods its pipe", id="an endless line"),
        pytest.param('line = b\'{"unavailable": "x"}\\n\' * 200\nwhile True: os.write(fd, line)', "floods its pipe", id="endless lines"),
        pytest.param(SAMPLE + "os.write(fd, b'Segmentation fault\\n'); time.sleep(60)", "wrote something else", id="garbage"),
        pytest.param(SAMPLE + "os.write(fd, b'[' * 60000 + b'\\n'); time.sleep(60)", "wrote something else", id="a bomb"),
        pytest.param('os.write(fd, b\'{"t": 2}\\n{"t": 1}\\n\'); time.sleep(60)', "time runs backwards", id="time runs backwards"),
    ],
)
def test_a_child_that_writes_nonsense_is_stopped(code, words):
    with Sensors(command=child(code)) as sensors:
        assert words in until(lambda: sensors.problem if words in sensors.problem else "")
        process = sensors._process
        until(lambda: process.poll() is not None)
        until(lambda: not sensors._listener.is_alive())
        assert words in sensors.problem  # its end does not hide why


def test_a_child_that_never_says_anything_is_named(monkeypatch):
    monkeypatch.setattr(telemetry, "START_S", 0.1)
    with Sensors(command=child("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")) as sensors:
        assert "has said nothing for" in until(lambda: sensors.problem)
        assert sensors.window(time.monotonic() - 1, time.monotonic()) is None
        assert sensors.idle() is None
        pid = sensors._process.pid
    assert not alive(pid)


def test_what_the_child_started_is_ended_too(tmp_path):
    code = (
        "import subprocess\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[fd])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\n" + SAMPLE + "sys.stdin.read()"
    )
    with Sensors(command=child(code)) as sensors:
        until(lambda: len(sensors._samples))
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not alive(pid))
    until(lambda: not sensors._listener.is_alive())


def test_a_child_that_cannot_be_started_is_a_problem_and_not_an_error():
    with Sensors(command=("/nowhere/python",)) as sensors:
        assert "cannot be started" in sensors.problem
        assert sensors.window(0, 1) is None
        assert sensors.idle() is None
    sensors.close()
    assert "cannot be started" in sensors.problem


def test_without_nvml_the_problem_is_the_childs_sentence(nvml):
    nvml(starts=False)
    with Sensors() as sensors:
        assert until(lambda: sensors.problem) == ("NVML, a part of the NVIDIA driver, does not answer: NVML Shared Library Not Found")
        process = sensors._process
        until(lambda: process.poll() is not None)  # and it has ended, cleanly
        assert process.returncode == 0
        until(lambda: not sensors._listener.is_alive())
        assert "NVML Shared Library Not Found" in sensors.problem


@pytest.mark.parametrize("hang_at", [None, 3], ids=["answering", "hanging in the driver"])
def test_the_child_dies_with_its_parent(nvml, hang_at):
    waits_for = str(nvml(hang_at=hang_at) / ("hanging.txt" if hang_at else "calls.txt"))
    code = (
        "import os, signal, sys, time; from moebench.telemetry import Sensors\n"
        "sensors = Sensors().__enter__()\n"
        f"while len(sensors._samples) < 3 or not os.path.exists({waits_for!r}): time.sleep(0.01)\n"
        "print(sensors._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: not alive(int(done.stdout)))


@pytest.mark.parametrize("closed", ["stdin", "pipe"])
def test_the_child_ends_when_stdin_or_its_pipe_closes(nvml, closed):
    nvml()
    read_end, write_end = os.pipe()
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    with subprocess.Popen(
        [sys.executable, "-m", "moebench.telemetry", str(write_end)],
        stdin=subprocess.PIPE,
        pass_fds=[write_end],
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        os.close(write_end)
        assert parse(os.read(read_end, 1 << 16).split(b"\n")[0]).sm_mhz == 1980.0
        if closed == "stdin":
            process.stdin.close()
            process.wait(60)
            os.close(read_end)
        else:
            os.close(read_end)
            process.wait(60)
    assert process.returncode == 0


# Settings are never changed


def sources():
    for directory in ("moebench", "kernels", "reference", "reports"):
        for path in sorted((ROOT / directory).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def names(tree):
    """Every identifier and every string of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def hands_on_settings(tree):
    """Names of NVML functions that change something, and commands that could."""
    found = [match for name in names(tree) for match in SETTER.findall(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"(\S*/)?nvidia-smi\b", node.value):
            found.append(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in RUNNERS:
            found += [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and "nvidia-smi" in str(c.value)]
    return found


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sources()])
def test_no_module_can_change_a_setting_of_the_gpu(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert hands_on_settings(tree) == []
    called = {name for name in names(tree) if name.startswith("nvml")}
    assert [name for name in called if not READING.fullmatch(name)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pynvml; pynvml.nvmlDeviceSetPowerManagementLimit(h, 1)",
        "from pynvml import nvmlDeviceResetGpuLockedClocks as f",
        "getattr(nvml, 'nvmlDeviceSetGpuLockedClocks')(h, 1, 2)",
        "nvml.nvmlDeviceClearEccErrorCounts(h, 0)",
        "nvml.nvmlGpuInstanceDestroy(i)",
        "nvml.nvmlDeviceCreateGpuInstance(h, 0)",
        "subprocess.run(['nvidia-smi', '-lgc', '1980'])",
        "subprocess.run('sudo nvidia-smi -pm 1', shell=True)",
        "command = ['/usr/bin/nvidia-smi', '-r']",
    ],
)
def test_a_hand_on_a_setting_is_seen(code):
    assert len(hands_on_settings(ast.parse(code))) >= 1


def test_all_that_is_asked_is_a_getter():
    assert all(query.function.startswith("nvmlDeviceGet") for query in QUERIES)
    text = (ROOT / "moebench/telemetry.py").read_text()
    written = set(re.findall(r"\bnvml(?=[A-Z])\w+", text)) - {query.function for query in QUERIES}
    types_in_comments = {"nvmlClockType_t", "nvmlMemoryErrorType_t", "nvmlEccCounterType_t"}
    assert written - types_in_comments == {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByIndex"}
