"""Axes from the command line or a TOML file become validated points, or all their errors at once."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from random import Random
from typing import get_args

from moebench.case import MODELS, Case, case, did_you_mean, shape_error
from moebench.record import SCOPES, L2State, Scope
from moebench.routing import routing_error, worst_rank

AXES = ("model", "tokens", "top_k", "ep", "ep_ranks", "tp", "tp_ranks", "arch", "routing", "backend", "seed")
MAX_POINTS = 20_000
MAX_ROUNDS = 1000
MAX_FILE_BYTES = 1 << 20
MAX_TOKENS = 1 << 20
MAX_TABLES = 1000
MAX_ERRORS = 50  # found before the rest of a file is not looked at
SHIPPED = Path(__file__).parent / "plans"
ARCHS = ("cpu", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")

Raw = str | int | list[str | int]  # one axis as TOML gives it; the command line gives str


TIMING = ("l2", "scope", "rounds", "order_seed")


class PlanError(Exception):
    """Everything that is wrong with a plan, one sentence each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True, kw_only=True)
class Point:
    case: Case
    backend: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    points: tuple[Point, ...]
    archs: tuple[str, ...] = ()  # empty: whatever this machine is
    l2: L2State = "cold"
    scope: Scope = "experts"
    rounds: int = 1  # how often everything is measured, each time in fresh processes
    order_seed: int = 0  # of the order in which a layer's backends take turns, another in each round
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was put right on the way, such as duplicates

    @property
    def hash(self) -> str:
        content = {k: v for k, v in self.to_dict().items() if k != "notes"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.backend for point in self.points))

    @property
    def device_bytes(self) -> int:
        """Device memory of the largest point; points run one after the other."""
        return max((point.case.device_bytes for point in self.points), default=0)

    def groups(self) -> Iterator[tuple[int, list[Point]]]:
        """(round, points that share a layer and a backend, and so a process), in the order in which they are to run.

        A backend that always came first would always meet the coolest GPU."""
        layers: dict[str, dict[str, list[Point]]] = {}
        for point in self.points:
            layers.setdefault(point.case.layer_key, {}).setdefault(point.backend, []).append(point)
        for number in range(self.rounds):
            for layer, by_backend in layers.items():
                names = list(by_backend)
                Random(f"{self.order_seed} {number} {layer}").shuffle(names)
                yield from ((number, by_backend[name]) for name in names)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Plan:
        points = [Point(case=Case(**p["case"]), backend=p["backend"]) for p in values["points"]]  # type: ignore[attr-defined]
        timing = {key: values[key] for key in TIMING if key in values}  # a plan of schema 1.0 has l2 only
        return cls(points=tuple(points), archs=tuple(values["archs"]), **timing)  # type: ignore[arg-type]


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def build(
    options: Mapping[str, str | None],
    file: str | None,
    timing: Mapping[str, str | int | None],
    known_backends: Sequence[str],
    unknown_backend: Callable[[str], str],
) -> Plan:
    """The plan of a TOML file (a shipped name or a path) whose axes and timing the given ones replace; of those alone without one.

    Raises PlanError with every error there is."""
    errors: list[str] = []
    tables: list[tuple[str, dict[str, Raw]]] = [("", {})]
    chosen: dict[str, str | int] = {}
    if file is not None:
        tables, chosen = _read(file, errors)
    chosen |= {name: value for name, value in timing.items() if value is not None}
    given: dict[str, Raw] = {name: text for name, text in options.items() if text is not None}
    points: list[Point] = []
    archs: list[str] = []
    notes: list[str] = []
    for where, table in tables:
        expand = _Expansion(where, {**table, **given}, frozenset(given), known_backends, unknown_backend)
        points += expand.points()
        archs += expand.archs
        errors += expand.errors
        if len(errors) >= MAX_ERRORS or len(points) > 10 * MAX_POINTS:  # whatever of them are duplicates, it is too much
            break
    unique = tuple(dict.fromkeys(points))
    if len(unique) < len(points):
        notes.append(f"{len(points) - len(unique)} duplicate points dropped")
    if len(unique) > MAX_POINTS:
        errors.append(f"the plan has {len(unique)} points and the limit is {MAX_POINTS}; split it or take fewer values on an axis")
    if not unique and not errors:
        errors.append("the plan has no points; give at least one model, token count and backend")
    if errors:
        raise PlanError(list(dict.fromkeys(errors)))
    return Plan(points=unique, archs=tuple(dict.fromkeys(archs)), notes=tuple(notes), **chosen)  # type: ignore[arg-type]  # _timing and the command line check them


def parse_ints(text: str, lowest: int, highest: int) -> list[int]:
    """Whole numbers of one list item: `4`, `0:64:8` (both ends included) or `1:8192:x2`. Raises ValueError with a sentence."""
    parts = text.split(":")
    try:
        if len(parts) == 1:
            values = [int(text)]
        elif len(parts) == 3:
            start, stop = int(parts[0]), int(parts[1])
            values = _geometric(start, stop, int(parts[2][1:])) if parts[2].startswith("x") else _linear(start, stop, int(parts[2]))
        else:
            raise ValueError
    except ValueError as error:
        detail = str(error) if "step" in str(error) else "is not a whole number"
        raise ValueError(f"{detail}; write numbers and ranges such as 1,4,16 or 0:64:8 or 1:8192:x2") from None
    for value in values:
        if not lowest <= value <= highest:
            raise ValueError(f"is out of range; give {lowest} to {highest}")
    return values


def _linear(start: int, stop: int, step: int) -> list[int]:
    if step < 1 or stop < start:
        raise ValueError("needs a step of at least 1 and an end no lower than its start")
    return list(range(start, min(stop, start + step * MAX_POINTS) + 1, step))


def _geometric(start: int, stop: int, factor: int) -> list[int]:
    if factor < 2 or start < 1 or stop < start:
        raise ValueError("needs a step xN with N of at least 2, a start of at least 1 and an end no lower than its start")
    values = [start]
    while values[-1] * factor <= stop:
        values.append(values[-1] * factor)
    return values


class _Expansion:
    """One table of axes on its way to points; collects errors instead of stopping at the first."""

    def __init__(
        self,
        where: str,
        table: Mapping[str, Raw],
        given: frozenset[str],
        known_backends: Sequence[str],
        unknown_backend: Callable[[str], str],
    ) -> None:
        self.where, self.table, self.given = where, table, given
        self.errors: list[str] = []
        self.models = self._words("model", ["gpt-oss-20b"], MODELS, lambda word: f"unknown model{did_you_mean(word, MODELS)}")
        self.models_are_known = not self.errors
        self.tokens = self._ints("tokens", [1], 0, MAX_TOKENS)
        self.top_ks = self._ints("top_k", [], 1, 1 << 16)
        self.eps = self._ints("ep", [1], 1, 1 << 16)
        self.tps = self._ints("tp", [1], 1, 1 << 16)
        self.seeds = self._ints("seed", [0], 0, (1 << 31) - 1)
        self.routings = self._items("routing") or ["uniform"]
        self.archs = self._words("arch", [], ARCHS, lambda word: f"unknown architecture{did_you_mean(word, ARCHS)}")
        plain = [name for name in known_backends if "@" not in name]  # a variant runs when it is named
        self.backends = self._words("backend", plain, known_backends, unknown_backend)
        self.ep_ranks = self._ranks("ep_ranks", "all")
        self.tp_ranks = self._ranks("tp_ranks", "worst")

    def key(self, axis: str) -> str:
        """How the user wrote this axis: `--top-k`, or `sweep[0].top_k` in a file."""
        return f"--{axis.replace('_', '-')}" if axis in self.given or not self.where else f"{self.where}.{axis}"

    def points(self) -> list[Point]:
        count = len(self.models) * len(self.tokens) * max(len(self.top_ks), 1) * len(self.eps) * len(self.tps)
        if count * len(self.routings) * len(self.seeds) * len(self.backends) > MAX_POINTS:
            self.errors.append(f"{self.where or 'the plan'} expands to more than {MAX_POINTS} points; take fewer values on an axis")
            return []
        cases = [c for model in self.models for c in self._cases(model)]
        return [] if self.errors else [Point(case=c, backend=b) for b in self.backends for c in cases]

    def _cases(self, model: str) -> list[Case]:
        preset = MODELS[model]
        top_ks = self._fitting("top_k", self.top_ks, lambda k: self._shape(model, top_k=k)) if self.top_ks else [preset.top_k]
        eps = self._fitting("ep", self.eps, lambda ep: self._shape(model, ep_size=ep))
        tps = self._fitting("tp", self.tps, lambda tp: self._shape(model, tp_size=tp))
        found: list[Case] = []
        for seed, routing, top_k, tp, ep in product(self.seeds, self.routings, top_ks, tps, eps):
            if len(found) * len(self.backends) > MAX_POINTS:  # ranks multiply what was counted before
                self.errors.append(f"{self.where or 'the plan'} expands to more than {MAX_POINTS} points; take fewer values on an axis")
                break
            for num_tokens in self.tokens:
                whole = case(model, num_tokens, top_k=top_k, tp_size=tp, ep_size=ep, seed=seed)
                if problem := routing_error(routing, num_experts=preset.num_experts, top_k=top_k, num_tokens=num_tokens):
                    self.errors.append(f"{self.key('routing')} {routing}: {problem}")
                    break
                whole = replace(whole, routing=routing)
                found += [
                    replace(whole, tp_rank=tp_rank, ep_rank=ep_rank)
                    for tp_rank in self._chosen("tp_ranks", self.tp_ranks, tp, lambda: 0)  # rank 0 holds a largest shard, and b2
                    for ep_rank in self._chosen("ep_ranks", self.ep_ranks, ep, lambda c=whole: worst_rank(c))  # type: ignore[misc]
                ]
        return found

    def _shape(self, model: str, **changed: int) -> str | None:
        blank = case(model, 0)
        values = {**asdict(blank), **changed}
        probe = object.__new__(Case)  # a Case that is allowed to be wrong, to ask what is wrong with it
        probe.__dict__.update(values)
        return shape_error(probe)

    def _fitting(self, axis: str, values: Iterable[int], problem: Callable[[int], str | None]) -> list[int]:
        good = []
        for value in values:
            if sentence := problem(value):
                self.errors.append(f"{self.key(axis)} {value}: {sentence}")
            else:
                good.append(value)
        return good

    def _chosen(self, axis: str, ranks: str | int, size: int, worst: Callable[[], int]) -> list[int]:
        if ranks == "all":
            return list(range(size))
        if ranks == "worst":
            return [worst() if size > 1 else 0]
        if int(ranks) >= size > 1:
            self.errors.append(f"{self.key(axis)} {ranks}: there are ranks 0 to {size - 1} of {size}")
            return []
        return [int(ranks) if size > 1 else 0]

    def _items(self, axis: str) -> list[str]:
        raw = self.table.get(axis, [])
        parts = raw if isinstance(raw, list) else [raw]
        texts = [str(part) for part in parts if not isinstance(part, bool)]
        split = [piece.strip() for text in texts for piece in (text.split(",") if axis != "routing" or "trace:" not in text else [text])]
        return [piece for piece in split if piece]

    def _ints(self, axis: str, default: list[int], lowest: int, highest: int) -> list[int]:
        items = self._items(axis)
        values: list[int] = [] if items else default
        for item in items:
            try:
                values += parse_ints(item, lowest, highest)
            except ValueError as error:
                self.errors.append(f"{self.key(axis)} {_cut(item)!r} {error}")
            if len(self.errors) >= MAX_ERRORS or len(values) > 10 * MAX_POINTS:
                break
        return list(dict.fromkeys(values))

    def _words(self, axis: str, default: list[str], known: Iterable[str], complaint: Callable[[str], str]) -> list[str]:
        known = list(known)
        good = []
        for item in self._items(axis):
            if item in known:
                good.append(item)
            elif axis == "backend" and "*" in item and any(fnmatchcase(name, item) for name in known):
                good += [name for name in known if fnmatchcase(name, item)]
            else:
                hint = "" if axis == "backend" else f" (known: {', '.join(known)})"
                self.errors.append(f"{self.key(axis)} {_cut(item)!r}: {complaint(_cut(item))}{hint}")
                if len(self.errors) >= MAX_ERRORS:
                    break
        return list(dict.fromkeys(good)) if self._items(axis) else default

    def _ranks(self, axis: str, default: str) -> str | int:
        items = self._items(axis) or [default]
        if len(items) == 1 and (items[0] in ("all", "worst") or (items[0].isdecimal() and len(items[0]) < 10)):
            return items[0] if items[0] in ("all", "worst") else int(items[0])
        self.errors.append(f"{self.key(axis)} {_cut(','.join(items))!r} is not all, worst or one rank number")
        return "worst"


def _read(file: str, errors: list[str]) -> tuple[list[tuple[str, dict[str, Raw]]], dict[str, str | int]]:
    path = SHIPPED / f"{file}.toml" if file in shipped() else Path(file)
    try:
        if path.exists() and not path.is_file():  # a pipe or /dev/zero never ends
            raise PlanError([f"plan {file}: is not a regular file"])
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PlanError([f"plan {file}: larger than {MAX_FILE_BYTES} bytes"])
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(
            [f"plan {file!r} is neither a file nor a shipped plan{did_you_mean(file, shipped())}; shipped: {', '.join(shipped())}"]
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # not text, not TOML, a number of 5000 digits, a thousand brackets
        raise PlanError([f"plan {file}: {error}"]) from None
    for key in content:
        if key not in ("description", "sweep", "timing") and len(errors) < MAX_ERRORS:
            hint = did_you_mean(_cut(key), ("description", "sweep", "timing"))
            errors.append(f"{file}: unknown key {_cut(key)!r}{hint}; known: description, sweep, timing")
    tables = content.get("sweep", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise PlanError([*errors, f"{file}: needs at least one [[sweep]] table"])
    if len(tables) > MAX_TABLES:
        raise PlanError([*errors, f"{file}: has {len(tables)} [[sweep]] tables; the limit is {MAX_TABLES}"])
    axes = [(f"sweep[{i}]", _axes(f"sweep[{i}]", table, errors)) for i, table in enumerate(tables)]
    return axes, _timing(content.get("timing", {}), errors)


def _axes(where: str, table: Mapping[str, object], errors: list[str]) -> dict[str, Raw]:
    good: dict[str, Raw] = {}
    for key, value in table.items():
        items = value if isinstance(value, list) else [value]
        if len(errors) >= MAX_ERRORS:
            break
        if key not in AXES:
            errors.append(f"{where}.{_cut(key)}: unknown axis{did_you_mean(_cut(key), AXES)}; known: {', '.join(AXES)}")
        elif not all(isinstance(item, (str, int)) and not isinstance(item, bool) for item in items):
            errors.append(f"{where}.{key} = {_cut(repr(value))}: give a number, a string, or a list of them")
        else:
            good[key] = value  # type: ignore[assignment]  # checked above
    return good


def _timing(table: object, errors: list[str]) -> dict[str, str | int]:
    if not isinstance(table, dict):
        errors.append('timing: must be a table, such as [timing] with l2 = "cold"')
        return {}
    good: dict[str, str | int] = {}
    words = {"l2": get_args(L2State), "scope": SCOPES}
    numbers = {"rounds": (1, MAX_ROUNDS), "order_seed": (0, (1 << 31) - 1)}
    for key, value in table.items():
        if key in words and value in words[key]:
            good[key] = value
        elif key in words:
            choices = " or ".join(f'"{word}"' for word in words[key])
            errors.append(f"timing.{key} = {_cut(repr(value))}: give {choices}")
        elif key not in numbers:
            errors.append(f"timing.{_cut(key)}: unknown key{did_you_mean(_cut(key), TIMING)}; known: {', '.join(TIMING)}")
        elif type(value) is int and numbers[key][0] <= value <= numbers[key][1]:
            good[key] = value
        else:
            errors.append(f"timing.{key} = {_cut(repr(value))}: give a whole number, {numbers[key][0]} to {numbers[key][1]}")
    return good


def _cut(text: str) -> str:
    """Enough of it to recognize; a hostile file may hold a word of a million letters."""
    return text if len(text) <= 80 else f"{text[:79]}…"
