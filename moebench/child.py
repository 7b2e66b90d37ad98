"""A child process on a leash: a request in, JSON frames out, a deadline for each phase, a log of bounded size, an end without orphans."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from moebench.failure import Failure, innermost, of_exit, overdue
from moebench.leash import GO

ROOT = Path(__file__).parents[1]  # so that a child of a bare checkout finds moebench from any working directory
SILENCE_S = 60.0  # the deadline of a phase that has none of its own
TICK_S = 0.2  # between two looks at whether the child is still there and whether the user wants to stop
TERM_S, KILL_S, DUMP_S = 2.0, 10.0, 2.0  # the ladder: stack dump, SIGTERM, SIGKILL to the session
LOG_HEAD_BYTES = LOG_TAIL_BYTES = 256 << 10  # a backend that writes 200 MB of warnings may not fill the disk
FRAME_BYTES_LIMIT = 64 << 20
SECRET = re.compile(
    r"PASSW|SECRET|CREDENTIAL|APIKEY|(?:^|_)(?:TOKEN|AUTH|PASS|PAT)(?:_|$)|(?:API|ACCESS|PRIVATE|SIGNING|ENCRYPTION)_KEY", re.IGNORECASE
)

Frame = dict[str, object]


@contextmanager
def spawn(module: str, request: Mapping[str, object], deadlines_s: Mapping[str, float], log: Path | None = None) -> Iterator[Child]:
    """Runs `python -m module FD`; leaving the block ends it and whatever it started."""
    with leashed(Child(module, request, deadlines_s, log)) as child:
        yield child


@contextmanager
def leashed(child: Child) -> Iterator[Child]:
    """Leaving the block ends it and whatever it started."""
    try:
        yield child
    except BaseException:
        child.dismiss()
        raise
    finally:
        child.stop()


def environment() -> dict[str, str]:
    """Ours without what is secret by its name: a child runs other people's kernels, which need none of it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in os.environ.items() if not SECRET.search(name)} | {"PYTHONPATH": path}


class Child:
    """The parent's side. The child's is `moebench.leash`."""

    def __init__(
        self, module: str, request: Mapping[str, object], deadlines_s: Mapping[str, float], log: Path | None, *, held: bool = False
    ) -> None:
        """held: it is started before its turn, and waits for release."""
        self.phase = "start"  # the last that it announced
        self.failure: Failure | None = None  # what is known against it: complete once the block is left
        self.interrupted = False  # stopped because the user wanted to, before it was done
        self._deadlines_s = deadlines_s
        self._log = Log(log)
        self._unsent = json.dumps(request).encode() + b"\n"
        self._dismissed = False
        self._selector = selectors.DefaultSelector()
        read_end, write_end = os.pipe()
        gate, opener = os.pipe() if held else (None, None)
        theirs = [fd for fd in (write_end, gate) if fd is not None]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=theirs,
                env=environment(),
                start_new_session=True,  # Ctrl-C is the parent's to handle, and killpg reaches what the child starts
            )
        except BaseException:
            for fd in (read_end, opener):
                if fd is not None:
                    os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._opener = opener
        assert self._process.stdin is not None  # PIPE, as stdout
        assert self._process.stdout is not None
        self._frames, self._in, self._out = read_end, self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self._frames, self._in, self._out):
            os.set_blocking(fd, False)
        self._selector.register(self._frames, selectors.EVENT_READ)
        self._selector.register(self._out, selectors.EVENT_READ)
        self._selector.register(self._in, selectors.EVENT_WRITE)
        if held:
            self._send()  # at once: nobody listens to it before its turn

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self) -> None:
        """Send the request now; otherwise frames() does when it is first asked for one."""
        self._send()

    def frames(self, halt: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        """Until the child closes its pipe, dies, stays silent past the deadline of its phase, or outlives a halt by `interrupt` seconds."""
        pending = b""
        heard, halted_at = time.monotonic(), None
        while True:
            now = time.monotonic()
            if halted_at is None and halt():
                halted_at = now
            if halted_at is not None and now - halted_at >= self._deadline_s("interrupt"):
                self.interrupted = True
                return
            deadline_s = self._deadline_s(self.phase)
            if now - heard >= deadline_s:
                self.failure = overdue(self.phase, deadline_s, innermost(self._dump()))
                return
            chunk = self._pump(min(TICK_S, heard + deadline_s - now))
            if chunk == b"" or (chunk is None and self._process.poll() is not None and (chunk := self._pump(0.0)) is None):
                return  # closed its pipe; or is gone, and something that it started holds the pipe open
            if not chunk:
                continue
            heard = time.monotonic()
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines if len(pending) <= FRAME_BYTES_LIMIT else [b"?"]:
                frame = _frame(line)
                if frame is None:
                    sent = f"a frame of more than {FRAME_BYTES_LIMIT} bytes" if line == b"?" else f"what is no frame: {line[:60]!r}"
                    self.failure = Failure(status="crash", reason=f"in phase {self.phase}: the worker sent {sent}")
                    return
                self.phase = str(frame.get("phase", self.phase))
                yield frame
                heard = time.monotonic()  # what the parent did with it is not the child's silence

    def release(self) -> None:
        """Its turn has come; nothing where it was not held."""
        if self._opener is not None:
            with suppress(OSError):  # it died while it waited; its exit code tells
                os.write(self._opener, GO)
            os.close(self._opener)
            self._opener = None

    def dismiss(self) -> None:
        """Leave it no time to end by itself."""
        self._dismissed = True

    def stop(self) -> None:
        """End it and what it started: it may end by itself, then politely, then not."""
        wanted = self.failure is not None or self.interrupted or self._dismissed
        with suppress(KeyError):
            self._selector.unregister(self._in)
        left = self._wait(0.0 if wanted else self._deadline_s("teardown"))
        code = self._process.returncode
        for number, patience_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
            if not left:
                _kill_session(self.pid, number)
                left = self._wait(patience_s)
        _kill_session(self.pid, signal.SIGKILL)  # what outlived it
        if not left:
            self.failure = of_exit(None, self.phase)
        elif self.failure is None and not wanted and code != 0:
            slow = "; it did not end by itself after its last frame" if code is None else ""
            ended = of_exit(self._process.returncode if code is None else code, self.phase)
            self.failure = Failure(status=ended.status, reason=ended.reason + slow)
        self._pump(0.0)
        self._log.close()
        self._selector.close()
        os.close(self._frames)
        if self._opener is not None:
            os.close(self._opener)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]  # both are pipes

    def last_words(self) -> str:
        """The last line that it wrote, as `: line`, or nothing."""
        words = self._log.tail.decode(errors="replace").strip().splitlines()
        return f": {words[-1][:500]}" if words else ""

    def _deadline_s(self, phase: str) -> float:
        return self._deadlines_s.get(phase, SILENCE_S)

    def _wait(self, seconds: float) -> bool:
        """Whether it has ended, within so many seconds; meanwhile its output is read, or it might wait for that."""
        until = time.monotonic() + seconds
        while self._process.poll() is None:
            left = until - time.monotonic()
            if left <= 0:
                return False
            if not self._selector.get_map():
                time.sleep(min(left, TICK_S / 10))
            self._pump(min(left, TICK_S / 10))
        return True

    def _dump(self) -> str:
        """Every thread's stack, which it is asked to write to its log; empty where it does not."""
        self._log.mark()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + DUMP_S
        said = ""
        while time.monotonic() < until and self._process.poll() is None:
            self._pump(TICK_S)
            before, said = said, self._log.since_mark.decode(errors="replace")
            if "Current thread" in said and said == before:
                break
        return said

    def _pump(self, timeout_s: float) -> bytes | None:
        """Moves bytes for at most so long: the request out, the log in. What came on the frame pipe; b"" at its end, None if nothing."""
        chunk: bytes | None = None
        for key, _ in self._selector.select(max(timeout_s, 0.0)):
            if key.fd == self._frames:
                chunk = _read(self._frames)
                if chunk == b"":
                    self._selector.unregister(self._frames)
            elif key.fd == self._out:
                said = _read(self._out)
                if said:
                    self._log.feed(said)
                elif said == b"":
                    self._selector.unregister(self._out)
            else:
                self._send()
        return chunk

    def _send(self) -> None:
        """The pipe stays open when all is sent: its end is what tells the child that we are gone."""
        try:
            self._unsent = self._unsent[os.write(self._in, self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it died at once; its exit code tells
            self._unsent = b""
        if not self._unsent:
            self._selector.unregister(self._in)


class Log:
    """What a child writes, as far as it fits: the first bytes and the last. A log that cannot be written stops nothing."""

    def __init__(self, path: Path | None) -> None:
        self.tail = b""
        self._path, self._room, self._left_out = path, LOG_HEAD_BYTES, 0
        self._since: bytes | None = None
        self._append(b"")

    def feed(self, data: bytes) -> None:
        if self._since is not None:
            self._since = (self._since + data)[-LOG_TAIL_BYTES:]
        head, rest = data[: self._room], data[self._room :]
        self._room -= len(head)
        if head:
            self._append(head)
        if rest:
            self._left_out += len(rest)
        self.tail = (self.tail + data)[-LOG_TAIL_BYTES:]

    def mark(self) -> None:
        self._since = b""

    @property
    def since_mark(self) -> bytes:
        return self._since or b""

    def close(self) -> None:
        shown = self.tail[-self._left_out :] if self._left_out else b""
        if self._left_out > len(shown):
            self._append(f"\n... {self._left_out - len(shown)} bytes left out ...\n".encode())
        if shown:
            self._append(shown)
        self._left_out = 0

    def _append(self, data: bytes) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError:
            self._path = None


class Halt:
    """Turns Ctrl-C and SIGTERM into a request to stop, and a second one into KeyboardInterrupt at once."""

    def __init__(self, patient: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self.patient = patient  # False: even the first one stops at once
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As a shell counts: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Halt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us

    def _on(self, number: int, frame: object) -> None:
        again = self.signal is not None
        self.signal = self.signal or signal.Signals(number)
        if again or not self.patient:
            raise KeyboardInterrupt


def _frame(line: bytes) -> Frame | None:
    try:
        frame = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return frame if isinstance(frame, dict) else None


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _kill_session(leader: int, number: signal.Signals) -> None:
    """The leader's process group, and processes of its session that made groups of their own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
    for pid in _session(leader):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _session(leader: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text(errors="replace").rpartition(")")[2].split()  # state, ppid, pgrp, session, ...
        except OSError:
            continue
        if len(after_name) > 3 and after_name[3] == str(leader):
            yield int(entry.parent.name)
