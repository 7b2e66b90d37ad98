"""Where triton_kernels is, which generation of its interface it has, and how it is imported from there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Literal

# By the tag of triton that each came with. 3.5: matmul_ogs, routing data from a bit matrix. 3.6: matmul_ogs, sparse matrices.
# 3.8: matmul; it has neither scatter nor the sum over slots, and wants another adapter.
Generation = Literal["3.5", "3.6"]
NAME = "triton_kernels"
HINT = "pip install vllm, whose vllm/third_party holds one, or put triton/python/triton_kernels of triton 3.6 on PYTHONPATH"


@dataclass(frozen=True, kw_only=True)
class Package:
    directory: Path
    generation: Generation
    source: str  # "vllm 0.33.0"


def find() -> Package | str:
    """The package, or a sentence saying why there is none. Reads files and imports nothing.

    A package of that name outside vLLM comes first, as in vLLM, unless it is something else: triton_kernels 0.1.0 on PyPI is."""
    outside = _directory(NAME)
    vllm = _directory("vllm")
    inside = vllm / "third_party" / NAME if vllm else None
    refused = []
    for directory in (outside, inside):
        if directory is None or not directory.is_dir():
            continue
        generation = _generation(directory)
        if generation is not None:
            # once loaded, vLLM's is found under its short name too
            return Package(directory=directory, generation=generation, source=_with_version("vllm" if directory == inside else NAME))
        refused.append(f"the one in {directory} {_what_else(directory)}")
    if refused:
        return f"no {NAME} with matmul_ogs, of triton 3.5 or 3.6: {'; '.join(refused)}; {HINT}"
    return f"{NAME} is not installed (the package of that name on PyPI is another one); {HINT}"


def load(package: Package) -> ModuleType:
    """The package as a top-level `triton_kernels`, the name its own modules import each other by; vLLM itself is not imported."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        if Path(loaded.__path__[0]) != package.directory:
            raise RuntimeError(f"{NAME} was imported from {loaded.__path__[0]}, not {package.directory}; start a new process")
        return loaded
    spec = spec_from_file_location(NAME, package.directory / "__init__.py", submodule_search_locations=[str(package.directory)])
    assert spec is not None  # only without a loader for .py
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    try:
        spec.loader.exec_module(module)
        for part in ("matmul_ogs", "numerics", "swiglu", "tensor", "target_info", "tensor_details.layout", "matmul_ogs_details.opt_flags"):
            import_module(f"{NAME}.{part}")
        if package.generation == "3.5":
            import_module(f"{NAME}.routing")
    except BaseException:
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]
        raise
    return module


def _generation(directory: Path) -> Generation | None:
    matmul, tensor = _text(directory / "matmul_ogs.py"), _text(directory / "tensor.py")
    if "def matmul_ogs(" not in matmul or "def wrap_torch_tensor(" not in tensor:
        return None
    if all(name in tensor for name in ("class SparseMatrix", "make_ragged_tensor_metadata")) and "class RoutingData" in matmul:
        return "3.6"
    return "3.5" if "def routing_from_bitmatrix(" in _text(directory / "routing.py") else None


def _what_else(directory: Path) -> str:
    if (directory / "matmul.py").is_file() and (directory / "tensor.py").is_file():
        return "is newer (it has matmul instead of matmul_ogs)"
    return "is another package" if not (directory / "matmul_ogs.py").is_file() else "is of a generation between those"


def _directory(package: str) -> Path | None:
    """find_spec of a top-level name runs none of its code."""
    try:
        spec = find_spec(package)
    except ValueError:  # a half-imported module has no spec
        return None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _with_version(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
