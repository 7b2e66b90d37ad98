"""What a cubin needs and does, read with NVIDIA's own tools: registers, local memory, tensor-core instructions, the main loop."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*);")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_LOCAL = re.compile(r"(?:LDL|STL)\b")

Line = tuple[str, str]  # (label before it or "", operation); a branch's operation is "BRA@" and where to


class NoTool(Exception):
    """NVIDIA's disassembler is not here; the message says what brings it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    registers: int  # per thread
    stack_bytes: int  # per thread
    spills: int  # loads and stores of local memory, each counted once
    loop_spills: int  # of them in the main loop
    tensor_cores: dict[str, int]  # instructions by kind; HMMA: of a warp, sm80; HGMMA, QGMMA: of a warpgroup, sm90; UTC*MMA: sm100
    loop_instructions: int | None  # of a thread in the main loop, the shortest that multiplies on tensor cores; None without one


def read(code: bytes) -> Reading:
    """Of a cubin with one kernel. Raises NoTool."""
    disassemble, dump = _tool("nvdisasm"), _tool("cuobjdump")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(code)
        usage = _output(dump, "-res-usage", path)
        lines = instructions(_output(disassemble, "-c", path))
    return summed(usage, lines)


def summed(usage: str, lines: list[Line]) -> Reading:
    """Of what cuobjdump says of one kernel's resources, and its instructions."""
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    loop = _main_loop(lines)
    kinds = Counter(_kind(operation) for _, operation in lines if _multiplies(operation))
    return Reading(
        registers=int(numbers["REG"]),
        stack_bytes=int(numbers["STACK"]) + int(numbers["LOCAL"]),
        spills=_spills(lines),
        loop_spills=_spills(loop),
        tensor_cores=dict(sorted(kinds.items())),
        loop_instructions=len(loop) or None,
    )


def instructions(sass: str) -> list[Line]:
    """Of what nvdisasm printed."""
    found, label = [], ""
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            label = match[1]
        elif match := _LINE.match(line):
            target = _TARGET.search(match[2])
            found.append((label, f"{match[1]}@{target[1]}" if target else match[1]))
            label = ""
    return found


def _main_loop(lines: list[Line]) -> list[Line]:
    """Empty without one."""
    starts = {label: i for i, (label, _) in enumerate(lines) if label}
    loops = []
    for end, (_, operation) in enumerate(lines):
        begin = starts.get(operation.partition("@")[2], end + 1)
        if begin < end and any(_multiplies(op) for _, op in lines[begin : end + 1]):
            loops.append(lines[begin : end + 1])
    return min(loops, key=len, default=[])


def _kind(operation: str) -> str:
    return operation.partition(".")[0]


def _multiplies(operation: str) -> bool:
    return _kind(operation).endswith("MMA")


def _spills(lines: list[Line]) -> int:
    return sum(1 for _, operation in lines if _LOCAL.match(operation))


def _tool(name: str) -> str:
    """Of a CUDA toolkit, or the one that triton's wheel brings."""
    if path := shutil.which(name):
        return path
    triton = find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / name if triton else None
    if bundled is None or not bundled.exists():
        raise NoTool(f"{name} is not here, which reads what was compiled; a CUDA toolkit has it, and so has pip install triton")
    return str(bundled)


def _output(tool: str, option: str, path: Path) -> str:
    done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
