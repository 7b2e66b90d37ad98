"""A record from the text of its line, in one pass, where everything in it is as it should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

import msgspec

from moebench.case import Case
from moebench.conform import hints
from moebench.record import Kernel, Record, Timing

# Fields that are the same in many lines, by the class that has them: each text of one is decoded once for all of them.
# They are most of a line: kernels alone are up to 6.7 of 9 KB.
SHARED: dict[type, frozenset[str]] = {
    Record: frozenset({"case", "error", "routing", "facts", "kernels", "contract", "roofline"}),
    Timing: frozenset({"proof"}),
}
MOST_SEEN = 1 << 14  # texts of such a field that are kept while a journal is read

# Two thirds of a line: texts that were seen are left out of what is decoded. They come after the facts; in those there are no objects.
NAME = b'"kernels"'
ESCAPE = b"\\u"  # by which the name may be written as well
KERNELS = b"}," + NAME + b":"
MOST_KERNELS = 32
LONG = 500  # bytes; to look for shorter ones takes as long as to decode them

NAMED: dict[type, frozenset[str]] = {Record: frozenset({"schema"})}  # fields with a default that a line has to have all the same
EXPERTS_LIMIT = 1 << 16
# What has to hold before a value is made: a case names the sizes that its number of experts can be divided by, one by one.
BOUNDED: dict[type, dict[str, Any]] = {Case: {"num_experts": Annotated[int, msgspec.Meta(le=EXPERTS_LIMIT)]}}

T = TypeVar("T")
_Make = Callable[[Any], Any]  # from what msgspec decoded to what a record holds


class Read(Protocol):
    """What reads a line, from where in it the record begins."""

    def __call__(self, line: bytes, start: int = 0) -> Record | None: ...


def reader() -> Read:
    """For the lines of one journal, or of several whose records may share what they have in common.

    None is for what is not certain to be a whole record; record_from_dict and misfit say why. What it gives is what they give, but for a
    number without a point where a float belongs: it becomes a float."""
    decode = _decoder(_twin(Record)).decode
    make = _maker(Record)
    assert make is not None  # Record is no twin of itself
    known: list[tuple[bytes, tuple[Kernel, ...]]] = []  # with what they say

    def read(line: bytes, start: int = 0) -> Record | None:
        place = line.find(KERNELS, start)
        for text, kernels in known:
            after = place + len(text)
            if line.startswith(text, place) and line.find(NAME, after) < 0 and line.find(ESCAPE, after) < 0:  # else others may come last
                without = b"".join((line[start:place], KERNELS, b"[]", line[after:]))
                record: Record | None = make(decode(without)) if without.isascii() else None
                if record is not None:
                    record.__dict__["kernels"] = kernels
                return record
        if not line.isascii():  # as ours are; other encodings are for others
            return None
        decoded = decode(memoryview(line)[start:])
        record = make(decoded)
        if len(decoded.kernels) > LONG and len(known) < MOST_KERNELS:
            text = KERNELS + bytes(decoded.kernels)
            if line.startswith(text, place):
                known.append((text, record.kernels))
        return record

    def read_if_sure(line: bytes, start: int = 0) -> Record | None:
        try:
            return read(line, start)
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return None

    return read_if_sure


@cache
def _twin(annotation: object) -> Any:
    """What msgspec decodes in place of the annotation. It tolerates unknown fields in a dataclass; in a Struct it need not."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _struct(annotation)
    inner = _optional(annotation) or _repeated(annotation)
    if inner is None:
        assert not any(is_dataclass(one) for one in get_args(annotation)), f"no rule for {annotation}"
        return annotation
    return _twin(inner) | None if _optional(annotation) else tuple[_twin(inner), ...]  # type: ignore[misc]


def _struct(kind: type) -> type[msgspec.Struct]:
    twins: list[tuple[str, Any, Any]] = []
    for field in fields(kind):
        annotation = BOUNDED.get(kind, {}).get(field.name) or _twin(hints(kind)[field.name])
        default: Any = msgspec.NODEFAULT if field.default is MISSING else field.default
        if field.name in SHARED.get(kind, ()):
            annotation = msgspec.Raw
            if field.default_factory is not MISSING:
                default = field.default_factory()
            default = default if default is msgspec.NODEFAULT else msgspec.Raw(msgspec.json.encode(default))
        elif field.default_factory is not MISSING:
            default = msgspec.field(default_factory=field.default_factory)
        if field.name in NAMED.get(kind, ()):
            default = msgspec.NODEFAULT
        twins.append((field.name, annotation, default))
    # gc=False: they live for one line and hold no cycles
    return msgspec.defstruct(f"{kind.__name__}Line", twins, kw_only=True, forbid_unknown_fields=True, gc=False)


@cache
def _decoder(twin: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(twin)


def _maker(annotation: object) -> _Make | None:
    """What makes a value of the annotation from one of its twin that is not None; None: it is one."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _maker_of_one(annotation)
    if inner := _optional(annotation):
        return _maker(inner)
    each = _maker(inner) if (inner := _repeated(annotation)) else None
    return (lambda decoded: tuple(map(each, decoded))) if each else None


def _maker_of_one(kind: type[T]) -> Callable[[msgspec.Struct], T]:
    own: list[tuple[str, _Make]] = []
    shared: list[tuple[str, list[Any], _Make]] = []
    for name, annotation in hints(kind).items():
        make = _maker(annotation)
        if name in SHARED.get(kind, ()):
            shared.append((name, [None, None], _keeping(_decoder(_twin(annotation)).decode, make)))
        elif make:
            own.append((name, make))
    checked = hasattr(kind, "__post_init__")
    if not (own or shared or checked):
        return partial(_unchanged, kind)

    def make_one(decoded: msgspec.Struct) -> T:
        values = msgspec.structs.asdict(decoded)
        for name, latest, find in shared:
            text = values[name]
            if text != latest[0]:  # most often it is that of the line before; to copy 7 KB takes 5 us, and to look them up 4 more
                latest[:] = text, find(bytes(text))
            values[name] = latest[1]
        for name, make in own:
            if values[name] is not None:
                values[name] = make(values[name])
        made = _made(kind, values)
        if checked:
            made.__post_init__()  # type: ignore[attr-defined]
        return made

    return make_one


def _unchanged(kind: type[T], decoded: msgspec.Struct) -> T:
    return _made(kind, msgspec.structs.asdict(decoded))


def _made(kind: type[T], values: dict[str, Any]) -> T:
    """In a quarter of the time of kind(**values): a frozen one assigns them one by one."""
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", values)
    return made


def _keeping(decode: Callable[[bytes], Any], make: _Make | None) -> Callable[[bytes], object]:
    known: dict[bytes, object] = {}

    def find(text: bytes) -> object:
        if text in known:
            return known[text]
        decoded = decode(text)
        value = decoded if make is None or decoded is None else make(decoded)
        if len(known) < MOST_SEEN:
            known[text] = value
        return value

    return find


def _optional(annotation: object) -> object:
    """T of `T | None`."""
    arguments = get_args(annotation)
    return arguments[0] if get_origin(annotation) in (Union, UnionType) and arguments[1:] == (type(None),) else None


def _repeated(annotation: object) -> object:
    """T of `tuple[T, ...]`."""
    arguments = get_args(annotation)
    return arguments[0] if get_origin(annotation) is tuple and arguments[1:] == (...,) else None
