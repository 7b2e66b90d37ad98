"""Processes that begin with all that this one has read and imported, and send back what they find."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

WORTH = 64 << 20  # bytes of journals from which several processes take less time than one
SHARE = 16 << 20  # bytes for each, at least


class Forked:
    """One of them, as its parent sees it."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        """It ends when its work is done; where its parent is gone by then, for nobody. Raises OSError where there is no room for one more
        process."""
        from multiprocessing import get_context  # 30 ms, which small journals need not wait for

        context = get_context("fork")  # what is imported need not be again, and hashes of strings stay the same
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, self.pipe, theirs), daemon=True)
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C is for the parent, which ends the process
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        theirs.close()  # or its end would not be seen

    def end(self) -> None:
        self._process.kill()  # one that is done is past caring
        self._process.join()
        self.pipe.close()


def processes_for(size: int) -> int:
    """How many are worth their while for so many bytes of journals."""
    return min(_cores(), size // SHARE) if size >= WORTH else 1


def _cores() -> int:
    """That this process may use; 1 where that cannot be asked, as forking is no good idea there either."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _serve(work: Callable[[Connection], None], theirs: Connection, pipe: Connection) -> None:
    theirs.close()  # else the end of a parent that was killed would not be seen
    try:
        work(pipe)
    except BaseException:  # noqa: BLE001  whoever asked does it alone and says what is wrong, or is gone
        os._exit(1)
    os._exit(0)
