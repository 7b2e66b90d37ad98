"""The child's side of `moebench.child`: takes its request, sends frames, and lets the kernel end its group when the parent dies."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from typing import BinaryIO

GO = b"!"  # what the parent sends a process that it started before its turn


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


def wait_for_turn(meanwhile: Callable[[], None]) -> None:
    """Where the parent started this process before its turn: do what may be done by then, and wait. Ends it where the turn never comes."""
    if len(sys.argv) < 3:
        return
    meanwhile()
    with open(int(sys.argv[2]), "rb") as gate:  # noqa: PTH123  a file descriptor
        if gate.read(1) != GO:
            sys.exit()


def send(pipe: BinaryIO, frame: Mapping[str, object]) -> None:
    """One frame is one line of JSON, on a pipe of its own, since libraries print on stdout."""
    pipe.write(json.dumps(frame, allow_nan=False, separators=(",", ":")).encode() + b"\n")
    pipe.flush()


def serve(main: Callable[[BinaryIO], None]) -> None:
    """Run main with the pipe whose file descriptor is the first argument of this process; a second is of the pipe that says GO."""
    with open(int(sys.argv[1]), "wb") as pipe:  # noqa: PTH123  a file descriptor
        main(pipe)
