"""Coverage does not look at the import of torch and triton: none of it is ours, and being asked about each of its lines took 2 of 6 s.

Python imports this at its start where the folder is on PYTHONPATH, as `tests/conftest.py` puts it."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

NAMES = {"torch", "triton"}


class Untraced(MetaPathFinder):
    """Finds what others would find, and has it executed without the trace function that there was."""

    def find_spec(self, name, path=None, target=None):
        if name not in NAMES or sys.gettrace() is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = without_trace(spec.loader.exec_module)
        return spec


def without_trace(execute):
    def executed(module):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            execute(module)
        finally:
            sys.settrace(tracer)
            called()

    return executed


def called():
    """Coverage's tracer, set from Python, takes over from the next call on."""


sys.meta_path.insert(0, Untraced())
