"""The child's side of `moebench.child`: takes its request, and lets the kernel end its whole process group when the parent dies."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import select
import signal
import sys


def take() -> dict[str, object]:
    """The request. From here on SIGUSR1 writes every thread's stack to stderr, and this process group does not outlive its parent,
    however either of them ends or hangs: the kernel itself sends the SIGKILL."""
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    request: dict[str, object] = json.loads(sys.stdin.readline())
    held = os.dup(0)  # close-on-exec; what the worker starts gets an empty stdin instead
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if hasattr(fcntl, "F_SETSIG") and os.getpgrp() == os.getpid():  # Linux, and started by moebench.child rather than by hand
        fcntl.fcntl(held, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(held, fcntl.F_SETFL, fcntl.fcntl(held, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([held], [], [], 0)[0]:  # the parent was gone before the signal was set up
            os.killpg(os.getpgrp(), signal.SIGKILL)
    return request
