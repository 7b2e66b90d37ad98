"""Child process that compiles a backend's own kernels for GPUs that need not be here, and says what became of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from moebench import registry
from moebench.backend import BuildFailed, CannotBuild, Compiles, Prebuilds
from moebench.compiled import Compiled, to_dict
from moebench.leash import send, serve, take
from moebench.registry import RegistryError

COMPILE_S = 1800.0  # deadline of the phase "compile", which begins anew with every kernel


def main(pipe: BinaryIO) -> None:
    """Frames: {"compiled": numbers, "cubin": path or ""}, {"cannot": sentence, "arch"}, {"failed": sentence, "arch"}."""
    request = take()
    name, archs = str(request["backend"]), str(request["archs"]).split(",")
    out = Path(str(request["out"])) if request["out"] else None
    os.environ.pop("TRITON_INTERPRET", None)  # what interprets cannot compile
    send(pipe, {"phase": "compile"})
    for arch in archs:
        try:
            backend = registry.load(name)
            if not isinstance(backend, Compiles):
                raise CannotBuild(_pointer(name, isinstance(backend, Prebuilds)))
            for compiled in backend.compiled(arch):
                path = _keep(compiled, out) if out else ""
                send(pipe, {"phase": "compile", "compiled": to_dict(compiled), "cubin": path})
        except (CannotBuild, RegistryError) as error:
            send(pipe, {"cannot": str(error), "arch": arch})
        except BuildFailed as error:
            send(pipe, {"failed": str(error), "arch": arch})
        except OSError as error:
            if out is None or error.filename is None:
                raise
            send(pipe, {"unwritten": f"{error.filename} cannot be written: {error.strerror}; give another --out", "arch": arch})


def _pointer(name: str, prebuilds: bool) -> str:
    """Where to go from a backend that compiles nothing of its own."""
    if prebuilds:
        return f"{name} runs a vendor's kernels, which are compiled by: moebench prebuild {name}"
    others = ", ".join(backend.name for backend in registry.builtin() if isinstance(backend, Compiles))
    return f"{name} has no kernels of its own to compile; these have: {others}"


def _keep(compiled: Compiled, out: Path) -> str:
    """Where the cubin was written; empty where the backend does not give it."""
    if not compiled.cubin:
        return ""
    words = (compiled.kernel, compiled.config, compiled.compiler.partition(" ")[0])
    name = "-".join(filter(None, ("".join(c if c.isalnum() else "-" for c in word).strip("-") for word in words)))
    path = out / compiled.arch / f"{name[:200]}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compiled.cubin)
    return str(path)


if __name__ == "__main__":
    serve(main)
