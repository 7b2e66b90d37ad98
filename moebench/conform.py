"""Whether a value read from a file is what its dataclass says it is."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Literal, Union, get_args, get_origin, get_type_hints


def misfit(value: object, annotation: object, where: str) -> str:
    """What is wrong with it, as a sentence that begins with where, or nothing. Floats must be finite."""
    return "" if _fits(annotation)(value) else _misfit(value, annotation, where)


@cache
def _fits(annotation: object) -> Callable[[object], bool]:
    """A quick yes: some 10 us for a record, where sentences take 240. What it does not know to be good, _misfit judges."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return lambda value: type(value) is str and value in arguments
    if origin in (Union, types.UnionType) and arguments[1:] == (type(None),):
        inner = _fits(arguments[0])
        return lambda value: value is None or inner(value)
    if arguments == (float, ...):
        return lambda value: type(value) is tuple and set(map(type, value)) <= {float} and math.isfinite(sum(value))
    if origin is tuple and arguments[1:] == (...,):
        each = _fits(arguments[0])
        return lambda value: type(value) is tuple and all(map(each, value))
    if origin is tuple:
        places = [_fits(one) for one in arguments]
        return lambda value: (
            type(value) is tuple and len(value) == len(places) and all(fits(v) for fits, v in zip(places, value, strict=True))
        )
    if origin in (Union, types.UnionType):
        choices = [_fits(one) for one in arguments]
        return lambda value: any(fits(value) for fits in choices)
    if origin is dict and arguments[0] is str:
        item = _fits(arguments[1])
        return lambda value: type(value) is dict and set(map(type, value)) <= {str} and all(map(item, value.values()))
    if is_dataclass(annotation):
        return _fits_dataclass(annotation)  # type: ignore[arg-type]
    return lambda value: type(value) is annotation and (annotation is not float or math.isfinite(value))  # type: ignore[arg-type]


def _fits_dataclass(kind: type) -> Callable[[object], bool]:
    plain = [(name, hint) for name, hint in _fields(kind) if hint in (str, int, bool)]
    others = [(name, _fits(hint)) for name, hint in _fields(kind) if hint not in (str, int, bool)]
    plain_values, plain_types = _getter([name for name, _ in plain]), tuple(hint for _, hint in plain)
    other_values, checks = _getter([name for name, _ in others]), [check for _, check in others]

    def fits(value: object) -> bool:
        if type(value) is not kind or tuple(map(type, plain_values(value))) != plain_types:
            return False
        for check, part in zip(checks, other_values(value), strict=True):  # noqa: SIM110  all() of a generator takes twice as long
            if not check(part):
                return False
        return True

    return fits


def _getter(names: list[str]) -> Callable[[object], tuple[object, ...]]:
    get = attrgetter(*names) if names else None
    if get is None:
        return lambda value: ()
    return get if len(names) > 1 else lambda value: (get(value),)


def _misfit(value: object, annotation: object, where: str) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if good else f"{where} is {_shown(value)}, not a finite number"
    if annotation in (int, str, bool):
        return "" if type(value) is annotation else f"{where} is {_shown(value)}, not {annotation.__name__}"
    if annotation is type(None):
        return "" if value is None else f"{where} is {_shown(value)}, not null"
    if annotation is object:
        return ""
    if origin is Literal:
        known = isinstance(value, (str, int, type(None))) and value in arguments
        return "" if known else f"{where} is {_shown(value)}, not one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        problems = {one: _misfit(value, one, where) for one in arguments}
        return "" if "" in problems.values() else next(told for one, told in problems.items() if one is not type(None))
    if origin is tuple:
        return _tuple(value, arguments, where)
    if origin is dict:
        if not isinstance(value, dict):
            return f"{where} is {_shown(value)}, not a table"
        pairs = (_misfit(k, arguments[0], f"a key of {where}") or _misfit(v, arguments[1], f"{where}.{k}") for k, v in value.items())
        return next((problem for problem in pairs if problem), "")
    assert is_dataclass(annotation), f"{where}: no rule for {annotation}"
    if type(value) is not annotation:
        return f"{where} is {_shown(value)}, not {getattr(annotation, '__name__', annotation)}"
    parts = (_misfit(getattr(value, name), kind, f"{where}.{name}") for name, kind in _fields(annotation))
    return next((problem for problem in parts if problem), "")


def _tuple(value: object, arguments: tuple[object, ...], where: str) -> str:
    if not isinstance(value, tuple):
        return f"{where} is {_shown(value)}, not a list"
    if arguments[1:] == (...,):
        if arguments[0] is float and all(type(one) is float and math.isfinite(one) for one in value):
            return ""  # samples: the one long list there is
        kinds: tuple[object, ...] = arguments[:1] * len(value)
    else:
        kinds = arguments
    if len(kinds) != len(value):
        return f"{where} has {len(value)} items, not {len(kinds)}"
    problems = (_misfit(one, kind, f"{where}[{i}]") for i, (one, kind) in enumerate(zip(value, kinds, strict=True)))
    return next((problem for problem in problems if problem), "")


@cache
def _fields(kind: type) -> tuple[tuple[str, object], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
