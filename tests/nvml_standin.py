"""Takes the place of pynvml in tests: a GPU whose sensors follow a script, and whose settings nobody may touch.

`install` copies this file as pynvml.py beside a script.json. There it answers as nvidia-ml-py does, logs every function that is called to
calls.txt, and raises Touched from any function it does not have, setters first of all."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
UUID = "GPU-00000000-1111-2222-3333-444444444444"

# What an H200 at work says; a script overrides any of it poll by poll.
CALM = {
    "sm": 1980,
    "mem": 3201,
    "max_sm": 1980,
    "milliwatt": 400_000,
    "limit_milliwatt": 700_000,
    "temperature": 50,
    "reasons": 0,
    "millijoule": 0,
    "corrected": 0,
    "uncorrected": 0,
    "used": 3 << 20,
    "busy_percent": 0,
    "pids": [],
}


def install(directory, polls=(), *, gpus=(UUID,), unsupported=(), starts=True, hang_at=None, exit_at=None, lost_at=None):
    """Write the stand-in and its script to a directory for sys.path. Poll n says polls[n], after the last one that again."""
    shutil.copy(__file__, directory / "pynvml.py")
    script = {"polls": list(polls), "gpus": list(gpus), "unsupported": list(unsupported), "starts": starts}
    script |= {"hang_at": hang_at, "exit_at": exit_at, "lost_at": lost_at}
    (directory / "script.json").write_text(json.dumps(script))
    return directory


class NVMLError(Exception):
    pass


class Touched(Exception):
    """Somebody called what telemetry has no business with."""


class Machine:
    """The scripted GPU; one per process."""

    def __init__(self):
        self.script = json.loads((HERE / "script.json").read_text())
        self.poll = -1  # the SM clock is asked once before the first poll, to see whether the driver tells it

    def value(self, name):
        said = CALM | (self.script["polls"][min(max(self.poll, 0), len(self.script["polls"]) - 1)] if self.script["polls"] else {})
        return said[name]

    def called(self, function):
        with (HERE / "calls.txt").open("a") as log:
            log.write(function + "\n")
        if function in self.script["unsupported"]:
            raise NVMLError("Not Supported")
        lost_at = self.script["lost_at"]
        if lost_at is not None and self.poll >= lost_at:
            raise NVMLError("GPU is lost")

    def next_poll(self):
        if self.poll == self.script["hang_at"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a system call that no signal but SIGKILL ends
            (HERE / "hanging.txt").touch()
            while True:
                time.sleep(60)
        if self.poll == self.script["exit_at"]:
            os._exit(3)


_machines = []


def _machine(function):
    if not _machines:
        _machines.append(Machine())
    _machines[0].called(function)
    return _machines[0]


def nvmlInit():
    if not _machine("nvmlInit").script["starts"]:
        raise NVMLError("NVML Shared Library Not Found")


def nvmlDeviceGetCount():
    return len(_machine("nvmlDeviceGetCount").script["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    return _machine("nvmlDeviceGetHandleByIndex").script["gpus"][index]


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid not in _machine("nvmlDeviceGetHandleByUUID").script["gpus"]:
        raise NVMLError("Not Found")
    return uuid


def nvmlDeviceGetClockInfo(_handle, kind):
    machine = _machine("nvmlDeviceGetClockInfo")
    if kind == 1:
        machine.next_poll()
        clock = machine.value("sm")
        machine.poll += 1
        return clock
    return machine.value("mem")


def nvmlDeviceGetMaxClockInfo(_handle, kind):
    assert kind == 1
    return _machine("nvmlDeviceGetMaxClockInfo").value("max_sm")


def nvmlDeviceGetPowerUsage(_handle):
    return _machine("nvmlDeviceGetPowerUsage").value("milliwatt")


def nvmlDeviceGetEnforcedPowerLimit(_handle):
    return _machine("nvmlDeviceGetEnforcedPowerLimit").value("limit_milliwatt")


def nvmlDeviceGetTemperatureV(_handle, sensor):
    assert sensor == 0
    return _machine("nvmlDeviceGetTemperatureV").value("temperature")


def nvmlDeviceGetTemperature(_handle, sensor):
    assert sensor == 0
    return _machine("nvmlDeviceGetTemperature").value("temperature")


def nvmlDeviceGetCurrentClocksEventReasons(_handle):
    return _machine("nvmlDeviceGetCurrentClocksEventReasons").value("reasons")


def nvmlDeviceGetCurrentClocksThrottleReasons(_handle):
    return _machine("nvmlDeviceGetCurrentClocksThrottleReasons").value("reasons")


def nvmlDeviceGetTotalEnergyConsumption(_handle):
    return _machine("nvmlDeviceGetTotalEnergyConsumption").value("millijoule")


def nvmlDeviceGetTotalEccErrors(_handle, error, counter):
    assert counter == 0
    return _machine("nvmlDeviceGetTotalEccErrors").value("uncorrected" if error else "corrected")


def nvmlDeviceGetMemoryInfo(_handle, version=None):
    machine = _machine("nvmlDeviceGetMemoryInfo")
    reserved = 0 if version == 0x02000028 else 500 << 20  # version 1 counts what the driver reserves as used
    return SimpleNamespace(used=machine.value("used") + reserved)


def nvmlDeviceGetUtilizationRates(_handle):
    return SimpleNamespace(gpu=_machine("nvmlDeviceGetUtilizationRates").value("busy_percent"), memory=0)


def nvmlDeviceGetComputeRunningProcesses(_handle):
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in _machine("nvmlDeviceGetComputeRunningProcesses").value("pids")]


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)

    def touched(*_arguments):
        (HERE / "touched.txt").write_text(name)
        raise Touched(name)

    return touched
