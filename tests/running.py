"""Runs the command line as a user would, with the fault backends installed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).parent / "faults"
FOUND_FIRST = [str(ROOT), str(FAULTS), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(FOUND_FIRST), "COLUMNS": "150"}


def heed_interrupts():
    """For Popen's preexec_fn: a shell that puts the tests in the background makes their children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def moebench(*arguments, cwd, check=None, timeout=300, **environment):
    """The finished process; its exit code must be `check` where one is given."""
    command = [sys.executable, "-m", "moebench", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=timeout, check=False)
    if check is not None:
        assert done.returncode == check, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done
