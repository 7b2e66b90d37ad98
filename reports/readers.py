"""A table of all records of large journals, read, told and written by as many processes as there are cores.

Only where no record takes the place of another and the runs are in the order of time: then what one process makes of its stretch of the
journals has nothing to learn from the others. In all other cases, and where anything is wrong, nothing is written, and whoever asked
reads the runs in one piece, which says what is wrong."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.forked import Forked, processes_for
from moebench.journal import Stretch, read_stretch
from moebench.record import Record

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# What becomes of a record, and of the text that the journal has of it. Pieces that many records share are best one object.
Tell = Callable[[Record, bytes], tuple[bytes, ...]]
BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Table:
    """A document of one text for each record."""

    head: bytes
    tell: Tell
    between: bytes = b""
    tail: bytes = b""


@dataclass(kw_only=True)
class _Seen:
    """Of the records of one process, what says whether any of all records takes the place of another."""

    cells: array[int] = field(default_factory=lambda: array("q"))  # hashes, the same in all processes that one process was split into
    tried: set[int] = field(default_factory=set)  # of case, backend and arch
    skipped: set[int] = field(default_factory=set)
    first: str = ""
    last: str = ""
    ordered: bool = True
    size: int = 0  # bytes of the texts

    def add(self, record: Record) -> None:
        what = record.case, record.backend, record.arch
        self.cells.append(hash((*what, record.scope, record.round)))
        (self.skipped if record.status == "skipped" else self.tried).add(hash(what))
        self.first = self.first or record.time
        self.ordered = self.ordered and self.last <= record.time
        self.last = record.time


class _Reader(Forked):
    """A process with a share of the journals."""

    def __init__(self, share: Sequence[Stretch], table: Table) -> None:
        """Raises OSError where there is no room for one more process."""
        super().__init__(lambda pipe: _serve(share, table, pipe))

    def seen(self) -> _Seen | None:
        """None where it did not get to its end."""
        try:
            found: _Seen = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return found

    def write(self, out: Path, offset: int) -> None:
        self.pipe.send((out, offset))

    def wait(self) -> None:
        """Until all is written. Raises OSError."""
        try:
            error: OSError | None = self.pipe.recv()
        except EOFError:
            error = OSError(None, "a process that wrote a part of it has ended")
        if error is not None:
            raise error


def write(journals: Sequence[Stretch], table: Table, out: Path) -> bool:
    """Whether it was written: not where it is not certain to be what a merge gives, and not where one process does as well.

    Raises OSError where it cannot be written."""
    processes = processes_for(sum(one.end - one.start for one in journals))
    if processes < 2:
        return False
    readers: list[_Reader] = []
    try:
        for share in _shares(journals, processes):
            try:
                readers.append(_Reader(share, table))
            except OSError:
                return False
        seen = [found for reader in readers if (found := reader.seen())]
        if len(seen) < len(readers) or not _each_for_itself(seen):
            return False
        out.write_bytes(b"")
        offset = len(table.head) - len(table.between)
        for reader, found in zip(readers, seen, strict=True):
            reader.write(out, offset)
            offset += found.size
        for reader in readers:
            reader.wait()
        with out.open("r+b") as file:
            file.write(table.head)  # whose end takes the place of what would be between the first text and one before it
            file.seek(0, os.SEEK_END)
            file.write(table.tail)
    finally:
        for reader in readers:
            reader.end()
    return True


def _shares(whole: Sequence[Stretch], number: int) -> list[list[Stretch]]:
    """As many bytes for each process, in order."""
    each = sum(one.end - one.start for one in whole) // number + 1
    shares: list[list[Stretch]] = [[]]
    left = each
    for one in whole:
        start = one.start
        while start < one.end:
            end = min(start + left, one.end)
            shares[-1].append(Stretch(path=one.path, start=start, end=end))
            left -= end - start
            start = end
            if not left:
                shares.append([])
                left = each
    return [share for share in shares if share]


def _serve(share: Sequence[Stretch], table: Table, pipe: Connection) -> None:
    """What a process does with its share: tell all, say what it saw, and write when it is told where."""
    seen, texts = _Seen(), []
    for stretch in share:
        for record, text in read_stretch(stretch):
            pieces = table.between, *table.tell(record, text)
            seen.add(record)
            seen.size += sum(map(len, pieces))
            texts.append(pieces)
    pipe.send(seen)
    out, offset = pipe.recv()
    error = None
    try:
        with out.open("r+b", buffering=BUFFER) as file:
            file.seek(offset)
            for pieces in texts:
                file.writelines(pieces)
    except OSError as found:
        error = found
    pipe.send(error)
    os._exit(0)  # without taking all the texts apart


def _each_for_itself(seen: Sequence[_Seen]) -> bool:
    """Whether a merge would leave all records as they are, and where they are. Equal hashes may be of one cell or of two."""
    cells = [cell for one in seen for cell in one.cells]
    tried: set[int] = set().union(*(one.tried for one in seen))
    skipped: set[int] = set().union(*(one.skipped for one in seen))
    there = [one for one in seen if one.cells]
    ordered = all(one.ordered for one in there) and all(a.last <= b.first for a, b in pairwise(there))
    return ordered and len(set(cells)) == len(cells) and not tried & skipped
