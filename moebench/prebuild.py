"""Compiling, in a process of its own, what a vendor library would otherwise compile at its first call.

Vendor libraries import torch; the command line does not. The child sends JSON lines on a pipe, since compilers print on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import BinaryIO

from moebench import registry
from moebench.backend import BuildFailed, BuildState, BuildStep, CannotBuild, Prebuilds
from moebench.child import environment
from moebench.leash import send

GRACE_S = 60.0  # for compilers to end and ninja to remove what they left half written
NO_ARCHS, NO_JOBS = "-", "-"


def prebuild(backend: str, archs: Sequence[str], jobs: int | None, dry_run: bool) -> Iterator[BuildStep | BuildState]:
    """As Prebuilds.prebuild; an exception or a closed iterator interrupts the child and waits for its end."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "moebench.prebuild", str(write_end), backend, ",".join(archs) or NO_ARCHS, str(jobs or NO_JOBS)]
    process = subprocess.Popen(
        [*command, *(["dry"] if dry_run else [])],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        pass_fds=[write_end],
        env=environment(),
        start_new_session=True,  # Ctrl-C is ours to hand on, once
    )
    os.close(write_end)
    try:
        with open(read_end, "rb") as pipe:  # noqa: PTH123  a file descriptor
            for line in pipe:
                yield _received(json.loads(line))
        if code := process.wait(GRACE_S):
            raise BuildFailed(f"the process that builds ended with exit code {code}; what it said is above")
    except (CannotBuild, BuildFailed):
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)  # it ends by itself
        raise
    finally:
        _interrupt(process)


def main(pipe: BinaryIO, backend: str, archs: Sequence[str], jobs: int | None, dry_run: bool) -> None:
    """The child."""
    try:
        loaded = registry.load(backend)
        if not isinstance(loaded, Prebuilds):
            others = ", ".join(b.name for b in registry.builtin() if isinstance(b, Prebuilds))
            raise CannotBuild(f"{backend} compiles nothing ahead of time; these do: {others}")
        for news in loaded.prebuild(archs, jobs, dry_run):
            send(pipe, {type(news).__name__: asdict(news)})
    except (CannotBuild, registry.RegistryError) as error:
        send(pipe, {"refused": str(error)})
    except BuildFailed as error:
        send(pipe, {"failed": str(error)})


def _received(frame: dict[str, object]) -> BuildStep | BuildState:
    ((kind, content),) = frame.items()
    if kind == "refused":
        raise CannotBuild(str(content))
    if kind == "failed":
        raise BuildFailed(str(content))
    assert isinstance(content, dict)  # asdict in main
    return BuildStep(**content) if kind == BuildStep.__name__ else BuildState(**content | {"ship": tuple(content["ship"])})


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


if __name__ == "__main__":
    number, name, arch_list, job_count, *dry = sys.argv[1:]
    with open(int(number), "wb") as opened:  # noqa: PTH123  a file descriptor
        try:
            main(
                opened,
                name,
                [] if arch_list == NO_ARCHS else arch_list.split(","),
                None if job_count == NO_JOBS else int(job_count),
                bool(dry),
            )
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # the parent is gone; nobody is left to tell
            os._exit(1)
