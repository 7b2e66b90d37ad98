"""Expert-parallel groups of which every rank was timed, and how evenly their ranks are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moebench.reports.grid import Family, Grid, Point


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """One backend's expert-parallel groups of one layer: EP size -> its points, in the order of tokens."""

    family: Family  # of any of the sizes
    grid: Grid
    backend: str
    sizes: Mapping[int, Mapping[int, Point]]  # ep_size -> num_tokens -> point, every rank timed

    @property
    def title(self) -> str:
        case = self.family.case
        return f"{case.model} top_k={case.top_k} tp={case.tp_size} {case.routing}" + (f" seed={case.seed}" if case.seed else "")

    @property
    def worst(self) -> tuple[float, int, int]:
        """Lowest balancedness, and the EP size and token count it has there."""
        return min((balancedness(point), size, tokens) for size, row in self.sizes.items() if size > 1 for tokens, point in row.items())


def imbalances(groups: Iterable[tuple[Family, Grid]]) -> list[Imbalance]:
    """Where every rank of an EP size above 1 was timed."""
    found: dict[tuple[object, ...], tuple[Family, Grid, str, dict[int, dict[int, Point]]]] = {}
    for family, grid in groups:
        case = family.case
        same = (family.device, family.arch, case.model, case.top_k, case.tp_size, case.routing, case.seed, grid.scope, grid.contract_id)
        for tokens, row in grid.rows.items():
            for point in row.values():
                if point.counts and len(point.timed) == case.ep_size * len({rank.case.tp_rank for rank in point.timed}):
                    kept = found.setdefault((*same, point.backend), (family, grid, point.backend, {}))
                    kept[3].setdefault(case.ep_size, {})[tokens] = point
    return [
        Imbalance(family=family, grid=grid, backend=backend, sizes=dict(sorted(sizes.items())))
        for family, grid, backend, sizes in found.values()
        if any(size > 1 for size in sizes)
    ]


def balancedness(point: Point) -> float:
    """Mean over slowest of the ranks: 1 where all take equally long, 1 / ep_size where one does all."""
    return point.mean_us / point.slowest_us if point.slowest_us else 1.0
