"""Calibration from the command line to the stored file, on this machine's CPU."""

import json
import os
import subprocess
import sys

import pytest

import moebench.calibrate
from moebench.calibrate import calibrate, main, roofs_of_this_machine
from moebench.device import Device
from moebench.roofline import Roofs, RoofsError, roofs_from_dict
from tests.running import ENVIRONMENT, ROOT

CPU = Device(arch="cpu", name="this CPU", torch="cpu", memory_bytes=1 << 30)
RUN = "from moebench.commands.calibrate import calibrate; calibrate(prog_name='calibrate')"
RUN_WITHOUT_MEASURING = (
    "import moebench.commands.calibrate as c; from moebench.roofline import Rate, Roofs\n"
    "rate = Rate(value=9e9, low=8e9, high=1e10, samples=5)\n"
    "roofs = Roofs(device='this CPU', arch='cpu', measured='2026-11-22', torch='2',"
    " copy_bytes_s=rate, read_bytes_s=rate, bf16_flop_s=rate, float32_flop_s=rate)\n"
    "c.roofs_of_this_machine = lambda: iter([roofs]); c.calibrate(prog_name='calibrate')"
)


def command(*arguments, cache, code=RUN, check=0):
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == check, (done.stdout, done.stderr)
    return done


@pytest.fixture
def small(monkeypatch):
    """Little work: what is measured is not looked at."""
    monkeypatch.setattr(moebench.calibrate, "CPU_S", 0.0)
    monkeypatch.setattr(moebench.calibrate, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(moebench.calibrate, "CPU_SIZE", 64)


def test_the_command_measures_stores_and_prints_json(tmp_path):
    done = command("--json", cache=tmp_path)
    printed = json.loads(done.stdout)
    path = printed.pop("path")
    assert path.startswith(str(tmp_path / "moebench" / "roofs"))
    with open(path) as file:  # noqa: PTH123  a text the command printed
        assert json.load(file) == printed
    found = roofs_from_dict(printed)
    assert (found.arch, found.fp8_flop_s) == ("cpu", None)
    assert set(found.rates) == {"copy_bytes_s", "read_bytes_s", "bf16_flop_s", "float32_flop_s"}
    assert all(5 <= rate.samples <= 50 and rate.sm_mhz is None for rate in found.rates.values())
    assert [line for line in done.stderr.splitlines() if line.endswith("...")] == [
        "copying ...",
        "reading ...",
        "multiplying float32 ...",
        "multiplying bf16 ...",
    ]


def test_the_command_prints_a_table_and_where_it_stored(tmp_path):
    done = command(cache=tmp_path, code=RUN_WITHOUT_MEASURING)
    (path,) = (tmp_path / "moebench" / "roofs").iterdir()
    assert done.stdout.splitlines()[-1] == f"stored in {path}"
    assert all(word in done.stdout for word in ("copy", "read", "bf16 matmul", "float32 matmul", "FLOP/s", "95 % interval"))
    assert "FP8" not in done.stdout


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "moebench").write_text("in the way")
    done = command("--json", cache=tmp_path, code=RUN_WITHOUT_MEASURING, check=5)
    assert done.stdout == ""
    assert "cannot be written" in done.stderr
    assert "set XDG_CACHE_HOME" in done.stderr


def test_roofs_that_cannot_be_true_end_the_command_and_leave_no_file(tmp_path):
    code = (
        "import moebench.commands.calibrate as c; from moebench.roofline import Rate, Roofs\n"
        "rate = Rate(value=9e12, low=9e12, high=9e12, samples=50)\n"
        "roofs = Roofs(device='NVIDIA H200', arch='sm90', measured='2026-11-22', torch='2',"
        " copy_bytes_s=rate, read_bytes_s=rate, bf16_flop_s=rate)\n"
        "c.roofs_of_this_machine = lambda: iter([roofs]); c.calibrate(prog_name='calibrate')"
    )
    done = command(cache=tmp_path, code=code, check=3)
    assert "187.5%" in done.stdout  # the table is shown all the same
    assert "error: not stored: copy_bytes_s = 9e+12 on NVIDIA H200 is 1.88 times the 4.8e+12 of its data sheet" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_child_without_torch_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(moebench.calibrate, "detect", lambda: Device(arch="cpu", name="CPU", torch=None, memory_bytes=1))
    with (tmp_path / "frames").open("wb") as pipe:
        main(pipe)
    (frame,) = (tmp_path / "frames").read_text().splitlines()
    assert json.loads(frame) == {"failed": "torch is not installed, and it is what measures; install it with: pip install torch"}


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Sets what runs instead of the child; its file descriptor is `fd`."""

    def replace(code):
        fake = tmp_path / "python"
        fake.write_text(f"#!{sys.executable}\nimport os, sys, time\nfd = int(sys.argv[3])\n{code}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))

    return replace


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('no such device', flush=True); sys.exit(7)", "in phase start: the worker ended with exit code 7.*: no such device"),
        ("""os.write(fd, b'{"phase": "copying"}\\n'); os.abort()""", "in phase copying: the worker died of SIGABRT"),
        (
            """os.write(fd, b'{"phase": "dozing"}\\n'); time.sleep(600)""",
            "in phase dozing: the worker gave no sign of life for 0.1 s and was st",
        ),
        ("""os.write(fd, b'{"failed": "no luck"}\\n')""", "^no luck$"),
    ],
)
def test_a_child_that_ends_without_roofs_is_an_error(child, monkeypatch, code, message):
    child(code)
    monkeypatch.setitem(moebench.calibrate.DEADLINES_S, "dozing", 0.1)
    with pytest.raises(RoofsError, match=message):
        list(roofs_of_this_machine())


def test_leaving_early_ends_the_child(child):
    child("""os.write(fd, b'{"phase": "%d"}\\n' % os.getpid()); time.sleep(600)""")
    news = roofs_of_this_machine()
    number = int(next(news))
    news.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_frames_are_progress_and_then_roofs(monkeypatch, small, tmp_path):
    monkeypatch.setattr(moebench.calibrate, "detect", lambda: CPU)
    with (tmp_path / "frames").open("wb") as pipe:
        main(pipe)
    *told, last = map(json.loads, (tmp_path / "frames").read_text().splitlines())
    assert [list(frame) for frame in told] == [["phase"]] * 4
    assert roofs_from_dict(last["roofs"]).device == "this CPU"


def test_calibrating_in_this_process_gives_roofs_with_their_intervals(small):
    found = calibrate(CPU)
    assert isinstance(found, Roofs)
    assert found.device == "this CPU"
    assert all(0 < rate.low <= rate.value <= rate.high for rate in found.rates.values())
    assert {rate.samples for rate in found.rates.values()} == {5}
