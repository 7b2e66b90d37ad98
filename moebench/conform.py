"""Whether a value read from a file is what its dataclass says it is."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (str, int, bool, float)
_OPTIONAL_FLOAT = float | None


def misfit(value: object, annotation: object, where: str, known: frozenset[str] = frozenset()) -> str:
    """What is wrong with it, as a sentence that begins with where, or nothing. Floats must be finite.

    known: fields of the dataclass that were judged before."""
    quick = _fits_dataclass(annotation, known) if known and isinstance(annotation, type) else _fits(annotation)
    return "" if quick(value) else _misfit(value, annotation, where)


def hints(kind: type) -> dict[str, object]:
    """What each field of a dataclass is annotated as."""
    return dict(_fields(kind))


@cache
def _fits(annotation: object) -> Callable[[object], bool]:
    """A quick yes: some 5 us for a record, where sentences take 240. What it does not know to be good, _misfit judges."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    union = origin in (Union, types.UnionType)
    if origin is Literal:
        return lambda value: type(value) is str and value in arguments
    if union and arguments[1:] == (type(None),):
        inner = _fits(arguments[0])
        return lambda value: value is None or inner(value)
    if union and set(arguments) <= {str, int, float, bool}:
        return lambda value: type(value) in arguments and (type(value) is not float or math.isfinite(value))
    if union:
        choices = [_fits(one) for one in arguments]
        return lambda value: any(fits(value) for fits in choices)
    if arguments == (float, ...):
        return lambda value: type(value) is tuple and set(map(type, value)) <= {float} and math.isfinite(sum(value))
    if origin is tuple and arguments[1:] == (...,):
        each = _fits(arguments[0])
        return lambda value: type(value) is tuple and all(map(each, value))
    if origin is tuple and set(arguments) == {float}:
        kinds = list(arguments)
        return lambda value: type(value) is tuple and list(map(type, value)) == kinds and math.isfinite(sum(value))
    if origin is tuple:
        places = [_fits(one) for one in arguments]
        return lambda value: (
            type(value) is tuple and len(value) == len(places) and all(fits(v) for fits, v in zip(places, value, strict=True))
        )
    if origin is dict and arguments[0] is str and (plain := set(get_args(arguments[1]) or arguments[1:])) <= {str, int, float, bool}:
        return lambda value: type(value) is dict and (not value or _fits_table(value, plain))
    if origin is dict and arguments[0] is str:
        item = _fits(arguments[1])
        return lambda value: type(value) is dict and set(map(type, value)) <= {str} and all(map(item, value.values()))
    if is_dataclass(annotation):
        return _fits_dataclass(annotation, frozenset())  # type: ignore[arg-type]
    return lambda value: type(value) is annotation and (annotation is not float or math.isfinite(value))  # type: ignore[arg-type]


def _fits_table(table: dict[object, object], plain: set[type]) -> bool:
    kinds = set(map(type, table.values()))
    if not (set(map(type, table)) <= {str} and kinds <= plain):
        return False
    return float not in kinds or all(math.isfinite(value) for value in table.values() if type(value) is float)


@cache
def _fits_dataclass(kind: type, known: frozenset[str]) -> Callable[[object], bool]:
    hints = [(name, hint) for name, hint in _fields(kind) if name not in known]
    plain_values = _getter([name for name, hint in hints if hint in _PLAIN])
    plain_types = [hint for _, hint in hints if hint in _PLAIN]
    floats = _getter([name for name, hint in hints if hint is float])
    optional_floats = _getter([name for name, hint in hints if hint == _OPTIONAL_FLOAT])
    others = [(name, _fits(hint)) for name, hint in hints if hint not in _PLAIN and hint != _OPTIONAL_FLOAT]
    other_values, checks = _getter([name for name, _ in others]), [check for _, check in others]

    def fits(value: object) -> bool:
        if type(value) is not kind or list(map(type, plain_values(value))) != plain_types:
            return False
        if not math.isfinite(sum(floats(value))):  # type: ignore[arg-type]  # they are floats, by the line above
            return False
        for part in optional_floats(value):
            if part is not None and not (type(part) is float and math.isfinite(part)):
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
