"""A source of ours to a cubin through NVRTC, once for each set of constants and each compiler.

NVRTC and the driver are called through NVIDIA's cuda-bindings, which torch's CUDA wheels bring along with NVRTC itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType

ARCH = "sm_90a"  # wgmma is not in plain sm_90
HEADERS = ("ptx.cuh", "layer.cuh")
SOURCES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Cubin:
    code: bytes
    compiler: str  # "nvrtc 13.0"
    cached: bool


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/moebench/hopper_mxfp4_bf16, ~/.cache for the first where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebench" / "hopper_mxfp4_bf16"


def options(defines: Mapping[str, int]) -> list[str]:
    """What nvcc and NVRTC both take."""
    return [f"-arch={ARCH}", "-std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]


def cubin(name: str, defines: Mapping[str, int]) -> Cubin:
    """From the cache, or compiled and put there. Raises RuntimeError with NVRTC's log where it does not compile."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    error, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, error, None)
    compiler = f"nvrtc {major}.{minor}"
    path = cache_dir() / f"{_key(compiler, name, defines)}.cubin"
    with suppress(FileNotFoundError):
        return Cubin(code=path.read_bytes(), compiler=compiler, cached=True)
    code = _compile(name, defines)
    with suppress(OSError):  # a home that cannot be written costs a second at each start
        _write(path, code)
    return Cubin(code=code, compiler=compiler, cached=False)


def _key(compiler: str, name: str, defines: Mapping[str, int]) -> str:
    """Everything that the code depends on; the architecture is one of the options."""
    parts = [compiler, *options(defines), *((SOURCES / source).read_text() for source in (*HEADERS, name))]
    return sha256("\0".join(parts).encode()).hexdigest()


def _write(path: Path, code: bytes) -> None:
    """All of it or nothing, whoever else writes the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _compile(name: str, defines: Mapping[str, int]) -> bytes:
    nvrtc = import_module("cuda.bindings.nvrtc")
    source, *headers = ((SOURCES / file).read_bytes() for file in (name, *HEADERS))
    error, program = nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), headers, [header.encode() for header in HEADERS])
    _check(nvrtc, error, None)
    given = [option.encode() for option in options(defines)]
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        _check(nvrtc, error, program, name)
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, error, None)
        code = bytearray(size)
        (error,) = nvrtc.nvrtcGetCUBIN(program, code)
        _check(nvrtc, error, None)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


def _check(nvrtc: ModuleType, error: int, program: object, name: str = "") -> None:
    if not error:
        return
    _, text = nvrtc.nvrtcGetErrorString(error)
    log = bytearray()
    if program is not None:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
    what = f" for {name}" if name else ""
    raise RuntimeError(f"NVRTC: {text.decode()}{what}\n{log.decode(errors='replace').rstrip(chr(0))}".rstrip())
