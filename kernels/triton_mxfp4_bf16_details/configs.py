"""Tile sizes by regime, from a table in a file: nothing is tuned at run time."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf, isinf
from pathlib import Path

from moebench.conform import misfit
from moebench.tuned import tuned_path

NAME = "triton_mxfp4_bf16"
SHIPPED = Path(__file__).with_name("configs.toml")
# Blocks of these have at most 99 KiB of shared memory; others have at least 163 (CUDA C++ Programming Guide, compute capabilities).
SMALL = frozenset({"sm86", "sm89", "sm120", "sm121"})
HEADER = """\
# Tile sizes by architecture and regime; `configs.py` says what the fields mean, docs/backends.md how to tune them.
# A table is for the architecture it is named after, `small` for others whose blocks have 99 KiB of shared memory, `any` for the rest.
"""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One GEMM's program: 64 * blocks weight rows and 64 * steps of K in each turn of the loop."""

    blocks: int
    warps: int
    stages: int
    steps: int = 2
    splits: int = 1  # of K, each by a program of its own
    raster: int = 1  # token tiles that share a band of weights

    @property
    def label(self) -> str:
        """For people: 128 x 128, 8 warps, 3 stages."""
        parts = [f"{64 * self.blocks} x {64 * self.steps}, {self.warps} warps, {self.stages} stages"]
        parts += [f"{self.splits} splits"] if self.splits > 1 else []
        parts += [f"bands of {self.raster}"] if self.raster > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a layer runs in one regime."""

    up_to: float  # pairs per expert, on average
    tokens: int  # columns of a tile
    gate_up: Tile
    down: Tile
    dense_up_to: int = 0  # batches of at most so many tokens need no sorting: every token is a column of every tile
    fp32_z: bool = False  # w2's outputs; bf16 halves the traffic of large batches and adds 1e-3 of relative error

    @property
    def label(self) -> str:
        """What is tuned, for people; the same for two configurations only if they launch the same kernels."""
        one = self.gate_up == self.down
        tiles = f"both GEMMs {self.gate_up.label}" if one else f"gate_up {self.gate_up.label}; down {self.down.label}"
        more = (f"; dense up to {self.dense_up_to}" if self.dense_up_to else "") + ("; fp32 z" if self.fp32_z else "")
        return f"{self.tokens} tokens; {tiles}{more}"

    @property
    def regime(self) -> str:
        return "any number of pairs" if isinf(self.up_to) else f"up to {self.up_to:g} pairs an expert"


Configs = tuple[Config, ...]


class TableError(ValueError):
    """A table that cannot be used; the message names the file and the place."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    configs: Configs
    source: str  # "shipped", or the file


def configs_for(arch: str) -> Chosen:
    """For "sm90" and so on: what `moebench tune` found for this user, else what is shipped."""
    mine = tuned_path(NAME)
    if mine.exists():
        tables = read(mine)
        if arch in tables:
            return Chosen(configs=tables[arch], source=str(mine))
    return Chosen(configs=shipped(arch), source="shipped")


def shipped(arch: str) -> Configs:
    tables = read(SHIPPED)
    return tables.get(arch) or tables["small" if arch in SMALL else "any"]


def read(path: Path) -> dict[str, Configs]:
    """By architecture. Raises TableError."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error


def parse(text: str, where: str) -> dict[str, Configs]:
    try:
        document: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{where}: {error}; mend it, or remove the file") from error
    return {arch: _table(rows, f"{where}: {arch}") for arch, rows in document.items()}


def written(tables: Mapping[str, Configs]) -> str:
    """The text that `parse` reads."""
    return HEADER + "".join(f"\n[[{arch}]]\n{_lines(config)}" for arch, configs in tables.items() for config in configs)


def from_label(label: str) -> Config:
    """A configuration that runs like the one of this label; for how many pairs it is, a label does not say."""
    words = re.fullmatch(r"(\d+) tokens; (?:both GEMMs (.+?)|gate_up (.+?); down (.+?))(?:; dense up to (\d+))?(; fp32 z)?", label)
    if words is None:
        raise TableError(f"{label!r} is no label of a configuration")
    tokens, both, up, down, dense, fp32_z = words.groups()
    return Config(
        up_to=inf,
        tokens=int(tokens),
        gate_up=_tile_of(both or up),
        down=_tile_of(both or down),
        dense_up_to=int(dense or 0),
        fp32_z=fp32_z is not None,
    )


def with_choices(text: str, arch: str, chosen: Mapping[str, Config]) -> str:
    """A table file's text with an architecture's own table, in which these regimes run like these configurations."""
    tables = parse(text, "the table to write to")
    now = tables.get(arch) or configs_for(arch).configs
    if unknown := sorted(set(chosen) - {config.regime for config in now}):
        raise TableError(f"{arch} has no regime {unknown[0]!r} in the table to write to")
    new = (replace(chosen.get(config.regime, config), up_to=config.up_to) for config in now)
    return written({**tables, arch: tuple(new)})


def choose(configs: Sequence[Config], num_pairs: int, num_experts: int) -> Config:
    """The regime of a batch; num_experts over all ranks, since pairs spread over all of them."""
    return next(config for config in configs if num_pairs <= config.up_to * num_experts)


# What `moebench tune` tries: tiles by columns of a tile, the shipped one first. All of them compile for sm90 and sm100 without a spill.
# With 4 warps and 128 rows two blocks fit on a multiprocessor of sm90 (255 registers, 115712 bytes at most), and one dequantizes while
# the other multiplies; 256 rows read tokens half as often and need fewer instructions a weight.
TILES: dict[int, tuple[Tile, ...]] = {
    16: (
        Tile(blocks=1, warps=4, stages=4),
        Tile(blocks=1, warps=4, stages=5),
        Tile(blocks=1, warps=4, stages=6),
        Tile(blocks=1, warps=4, stages=3, steps=4),
        Tile(blocks=2, warps=4, stages=4),
        Tile(blocks=2, warps=8, stages=4),
    ),
    32: (
        Tile(blocks=2, warps=8, stages=4),
        Tile(blocks=2, warps=4, stages=3),
        Tile(blocks=2, warps=4, stages=4),
        Tile(blocks=1, warps=4, stages=4),
        Tile(blocks=4, warps=8, stages=3),
    ),
    64: (
        Tile(blocks=2, warps=8, stages=3),
        Tile(blocks=2, warps=8, stages=4),
        Tile(blocks=2, warps=4, stages=3),
        Tile(blocks=2, warps=4, stages=4, steps=1),
        Tile(blocks=4, warps=8, stages=3),
        Tile(blocks=4, warps=8, stages=4, steps=1),
    ),
    128: (
        Tile(blocks=2, warps=8, stages=3),
        Tile(blocks=2, warps=4, stages=3),
        Tile(blocks=2, warps=4, stages=4, steps=1),
        Tile(blocks=2, warps=8, stages=4, steps=1),
        Tile(blocks=4, warps=8, stages=2),
        Tile(blocks=4, warps=8, stages=3, steps=1),
        Tile(blocks=4, warps=8, stages=4, steps=1),
    ),
    256: (Tile(blocks=2, warps=8, stages=2), Tile(blocks=2, warps=8, stages=3, steps=1)),
}
RASTERS = (1, 4, 8, 16)  # for tiles of 64 tokens and more: below, an expert rarely has two


def neighbours(config: Config) -> Iterator[Config]:
    """Other ways to run the same regime: another tile for both GEMMs or for one, other bands, the next wider or narrower tile."""
    up, down = config.gate_up, config.down
    for tile in TILES.get(config.tokens, ()):
        for_up, for_down = replace(tile, raster=up.raster), replace(tile, raster=down.raster, splits=down.splits)
        yield replace(config, gate_up=for_up, down=for_down)
        yield replace(config, gate_up=for_up)
        yield replace(config, down=for_down)
    if config.fp32_z:
        yield from (replace(config, down=replace(down, splits=splits)) for splits in (1, 2, 3, 4))
    if config.tokens >= 64:
        yield from (replace(config, gate_up=replace(up, raster=r), down=replace(down, raster=r)) for r in RASTERS)
    for tokens in (config.tokens // 2, config.tokens * 2):
        if tokens in TILES and not config.dense_up_to:
            tile = TILES[tokens][0]
            yield replace(config, tokens=tokens, gate_up=replace(tile, raster=up.raster), down=replace(tile, raster=down.raster))


def _tile_of(label: str) -> Tile:
    words = re.fullmatch(r"(\d+) x (\d+), (\d+) warps, (\d+) stages(?:, (\d+) splits)?(?:, bands of (\d+))?", label)
    if words is None:
        raise TableError(f"{label!r} is no label of a tile")
    rows, k, warps, stages, splits, raster = (int(word or 1) for word in words.groups())
    return Tile(blocks=rows // 64, steps=k // 64, warps=warps, stages=stages, splits=splits, raster=raster)


def _table(rows: object, where: str) -> Configs:
    if not isinstance(rows, list) or not rows:
        raise TableError(f"{where} is no list of tables")
    configs = tuple(_config(row, f"{where}[{number}]") for number, row in enumerate(rows))
    ends = [config.up_to for config in configs]
    if ends != sorted(set(ends)) or ends[-1] != inf:
        raise TableError(f"{where}: up_to must grow from row to row and end with inf, and is {', '.join(map(str, ends))}")
    return configs


def _config(row: object, where: str) -> Config:
    values = _fields(row, Config, where)
    values["up_to"] = float(values["up_to"]) if isinstance(values["up_to"], int) else values["up_to"]
    for name in ("gate_up", "down"):
        values[name] = Tile(**_fields(values[name], Tile, f"{where}.{name}"))  # type: ignore[arg-type]  # misfit looks at it below
    config = Config(**values)  # type: ignore[arg-type]
    finite = replace(config, up_to=0.0) if config.up_to == inf else config
    if problem := misfit(finite, Config, where):
        raise TableError(problem)
    numbers = (config.tokens, *(getattr(tile, field.name) for tile in (config.gate_up, config.down) for field in fields(Tile)))
    if min(numbers) < 1 or config.up_to <= 0:
        raise TableError(f"{where} has a number below 1")
    return config


def _fields(row: object, kind: type[Config] | type[Tile], where: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise TableError(f"{where} is no table")
    known = {field.name for field in fields(kind)}
    needed = {"up_to", "tokens", "gate_up", "down"} if kind is Config else {"blocks", "warps", "stages"}
    if odd := sorted((set(row) - known) | (needed - set(row))):
        raise TableError(
            f"{where}: {', '.join(odd)} {'is' if len(odd) == 1 else 'are'} missing or unknown; it has {', '.join(sorted(known))}"
        )
    return dict(row)


def _lines(config: Config) -> str:
    lines = [f"up_to = {'inf' if isinf(config.up_to) else f'{config.up_to:g}'}", f"tokens = {config.tokens}"]
    for name, tile in (("gate_up", config.gate_up), ("down", config.down)):
        plain = Tile(blocks=0, warps=0, stages=0)
        parts = [f"{key} = {value}" for key, value in asdict(tile).items() if value != getattr(plain, key)]
        lines.append(f"{name} = {{ {', '.join(parts)} }}")
    lines += [f"dense_up_to = {config.dense_up_to}"] if config.dense_up_to else []
    lines += ["fp32_z = true"] if config.fp32_z else []
    return "\n".join(lines) + "\n"
