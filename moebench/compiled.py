"""What a compiler made of one kernel, as plain numbers, and whether two such lists tell of something that got worse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from moebench.conform import misfit

LOOP_SLACK = 1.02  # more instructions a weight than before: schedules of two compiler versions differ by a few of some hundred
REGISTER_STEP = 8  # registers are given to warps in steps of as many a thread


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel of one shipped configuration."""

    kernel: str
    config: str  # for people; with the kernel, the architecture and the compiler's name it tells rows apart
    arch: str  # "sm90"
    compiler: str  # name and version, "triton 3.7.1"
    registers: int  # per thread
    stack_bytes: int  # per thread
    spills: int  # loads and stores of local memory, each counted once
    loop_spills: int  # of them in the main loop
    shared_bytes: int  # per block
    tensor_cores: dict[str, int]  # instructions by kind, {"HGMMA": 8}
    loop_instructions_per_weight: float | None  # of a thread, in the main loop, everything included; None without such a loop
    cubin: bytes = b""  # empty where the backend does not give it

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.arch, self.compiler.partition(" ")[0], self.kernel, self.config


NUMBERS = tuple(field.name for field in fields(Compiled) if field.name != "cubin")


def to_dict(compiled: Compiled) -> dict[str, object]:
    """Without the cubin, fit for JSON."""
    return {name: getattr(compiled, name) for name in NUMBERS}


def from_dict(row: object, where: str) -> Compiled:
    """The inverse. Raises ValueError with a sentence that begins with where."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    if odd := sorted(set(NUMBERS) ^ set(row)):
        raise ValueError(f"{where} has other fields than it should: {', '.join(map(str, odd))[:200]}")
    found = Compiled(**row)
    if problem := misfit(found, Compiled, where):
        raise ValueError(problem)
    return found


def worse(before: Iterable[Compiled], now: Iterable[Compiled]) -> Iterator[str]:
    """A sentence for each kernel that lost by it, that is gone, or that is new; nothing where all is as it was or better.

    Only of architectures and compilers that both have: another machine has others."""
    before, now = list(before), list(now)
    both = {row.key[:2] for row in before} & {row.key[:2] for row in now}
    old, new = ({row.key: row for row in rows if row.key[:2] in both} for rows in (before, now))
    for key, row in new.items():
        if key not in old:
            yield f"{_named(row)} is not in the stored numbers"
        elif reasons := list(_reasons(old[key], row)):
            yield f"{_named(row)}: {'; '.join(reasons)}"
    for key, row in old.items():
        if key not in new:
            yield f"{_named(row)} is in the stored numbers and was not compiled"


def unjudged(before: Iterable[Compiled], now: Iterable[Compiled]) -> list[str]:
    """What was compiled now and has no stored numbers at all: sm120 by triton."""
    known = {row.key[:2] for row in before}
    return list(dict.fromkeys(f"{row.arch} by {row.key[1]}" for row in now if row.key[:2] not in known))


def _reasons(old: Compiled, new: Compiled) -> Iterator[str]:
    if _given(new.registers) > _given(old.registers):
        yield f"{new.registers} registers, were {old.registers}"
    for name, unit in (("stack_bytes", "bytes of stack"), ("spills", "spills"), ("loop_spills", "spills in the main loop")):
        if getattr(new, name) > getattr(old, name):
            yield f"{getattr(new, name)} {unit}, were {getattr(old, name)}"
    if new.shared_bytes > old.shared_bytes:
        yield f"{new.shared_bytes} bytes of shared memory, were {old.shared_bytes}"
    if new.tensor_cores != old.tensor_cores:
        yield f"tensor-core instructions are {kinds(new.tensor_cores)}, were {kinds(old.tensor_cores)}"
    loop, was = new.loop_instructions_per_weight, old.loop_instructions_per_weight
    if (loop is None) != (was is None):
        yield f"a main loop is {'no longer' if loop is None else 'now'} found"
    elif loop is not None and was is not None and loop > LOOP_SLACK * was:
        yield f"{loop:.2f} loop instructions a weight, were {was:.2f}"


def kinds(tensor_cores: Mapping[str, int]) -> str:
    """8 HGMMA."""
    return ", ".join(f"{count} {name}" for name, count in tensor_cores.items()) or "none"


def _given(registers: int) -> int:
    return -(-registers // REGISTER_STEP) * REGISTER_STEP


def _named(row: Compiled) -> str:
    return f"{row.kernel} ({row.config}) for {row.arch} by {row.compiler}"
