"""Ways to run a command without the time that Python takes to give memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def uncollected() -> Iterator[None]:
    """Records form no cycles, and looking for them among 100,000 took 6 of 17 s of a comparison."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def kept(found: T) -> T:
    """Until the process has ended: to take 100,000 records apart before it does takes 1 s, and the system takes all at once."""
    itself: list[object] = [found]
    itself.append(itself)  # so nobody's last reference to it ever goes
    gc.freeze()  # and the search for cycles at the end of Python, which looks at all there is for 1 s, leaves it out
    return found
