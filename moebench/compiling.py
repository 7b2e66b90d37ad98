"""Child process that compiles a backend's own kernels for GPUs that need not be here, and says what became of them."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import BinaryIO

from moebench import registry
from moebench.backend import BuildFailed, CannotBuild, Compiles, Prebuilds
from moebench.compiled import Compiled, to_dict
from moebench.leash import send, serve, take
from moebench.registry import RegistryError

COMPILE_S = 1800.0  # deadline of the phase "compile", which begins anew with every kernel


class Unwritten(Exception):
    """A cubin that could not be kept; the message says where and why."""


def main(pipe: BinaryIO) -> None:
    """Frames: {"compiled": numbers, "cubin": path or ""}, {"cannot": sentence, "arch"}, {"failed": sentence, "arch"},
    {"unwritten": sentence, "arch"}."""
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
        except Unwritten as error:
            send(pipe, {"unwritten": str(error), "arch": arch})
        except Exception as error:  # noqa: BLE001  a compiler may raise anything
            traceback.print_exc()
            send(pipe, {"failed": f"{type(error).__name__}: {error}", "arch": arch})


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compiled.cubin)
    except OSError as error:
        raise Unwritten(f"{path} cannot be written: {error.strerror}; give another --out") from error
    return str(path)


if __name__ == "__main__":
    serve(main)
