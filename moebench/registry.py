"""Every backend by name: ours from two directories, other people's from one entry-point group."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

import moebench.kernels
import moebench.reference
from moebench.backend import Backend
from moebench.case import did_you_mean

GROUP = "moebench.backends"


class RegistryError(Exception):
    """A backend name that two modules claim, that nobody knows, or whose plug-in does not load."""


def names() -> list[str]:
    """All backend names, ours first. Imports no plug-in: an entry point's name is its backend's name."""
    sources: dict[str, str] = {}
    for name, source in (*((b.name, type(b).__module__) for b in builtin()), *((e.name, e.value) for e in plugins())):
        if name in sources:
            raise RegistryError(f"two backends are named {name!r}: {sources[name]} and {source}; rename one or uninstall its package")
        sources[name] = source
    return list(sources)


def load(name: str) -> Backend:
    """The backend of that name; imports a plug-in only when it is the one named."""
    if name not in names():
        raise RegistryError(unknown(name))
    for backend in builtin():
        if backend.name == name:
            return backend
    entry = next(e for e in plugins() if e.name == name)
    backend = entry.load()
    if getattr(backend, "name", None) != name:
        raise RegistryError(
            f"entry point {name!r} ({entry.value}) holds a backend named {getattr(backend, 'name', None)!r}; the names must agree"
        )
    return backend  # type: ignore[no-any-return]  # an entry point is untyped


def source(name: str) -> str:
    """Where a backend comes from: "moebench", or the distribution that brings it."""
    entry = next((e for e in plugins() if e.name == name), None)
    if entry is None:
        return "moebench"
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def unknown(name: str) -> str:
    return f"unknown backend {name!r}{did_you_mean(name, names())} (moebench backends lists all)"


def builtin() -> Iterator[Backend]:
    for package in (moebench.reference, moebench.kernels):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not module.ispkg:
                yield from getattr(importlib.import_module(module.name), "BACKENDS", ())


def plugins() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
