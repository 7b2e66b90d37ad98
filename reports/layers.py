"""Which layers a report shows one by one, and what all of them say together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean, median

from moebench.record import Record
from moebench.reports.grid import Family, Method, families, method_name

MOST_LAYERS = 60  # of 15 token counts and 6 backends: 5400 rows, and more tables than anybody reads
WHERE_ALL_ARE = "results.csv of a run's directory, and moebench report --format csv or json, have every row"


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Families in which something was timed, in the order of reports."""

    shown: tuple[Family, ...]
    left_out: tuple[Family, ...]

    @property
    def note(self) -> str:
        """What is left out, and where it is; empty where nothing is."""
        if not self.left_out:
            return ""
        total = len(self.shown) + len(self.left_out)
        return f"{total} layers were timed. One by one the first {len(self.shown)} are shown, lowest seeds first; {WHERE_ALL_ARE}."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One backend over all layers that differ in routing and seed only, under one contract, among those of its activation format."""

    layer: str
    device: str
    how: str
    backend: str
    compared: int  # layers and token counts at which it and another have a time that counts
    fastest: int  # of those, where its median is the lowest
    mean_ratio: float  # of its median to the lowest, geometric

    @property
    def share(self) -> float:
        return self.fastest / self.compared


def layers(records: Iterable[Record], most: int = MOST_LAYERS) -> Layers:
    """All, or where there are more than `most` those with the lowest seeds."""
    timed = [family for family in families(records) if any(record.status == "ok" and record.timing for record in family.records)]
    kept = {id(family) for family in sorted(timed, key=lambda family: family.case.seed)[:most]}
    return Layers(
        shown=tuple(family for family in timed if id(family) in kept),
        left_out=tuple(family for family in timed if id(family) not in kept),
    )


def standings(found: Sequence[Family]) -> list[Standing]:
    """The most often fastest first within a layer. Of medians alone, since intervals of 100 000 rows take 2 s: near ties count as won."""
    logs: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for family in found:
        layer = replace(family, case=replace(family.case, routing="uniform", seed=0)).name
        for (scope, contract_id, act_dtype, how), row in _times_us(family):
            lowest = min(row.values())
            for backend, time_us in row.items() if len(row) > 1 and lowest > 0 else ():
                logs[layer, family.device, scope, contract_id, act_dtype, how][backend].append(log(time_us / lowest))
    formats = {key[4] for key in logs}
    found_standings = [
        Standing(
            layer=layer,
            device=device,
            how=f"{how}{', whole layer' if scope == 'layer' else ''}{f', {act_dtype} activations' if len(formats) > 1 else ''}",
            backend=backend,
            compared=len(ratios),
            fastest=sum(ratio == 0.0 for ratio in ratios),
            mean_ratio=exp(fmean(ratios)),
        )
        for (layer, device, scope, _, act_dtype, how), by_backend in logs.items()
        for backend, ratios in sorted(by_backend.items(), key=lambda item: fmean(item[1]))
    ]
    return found_standings


def _times_us(family: Family) -> Iterable[tuple[tuple[str, str, str, str], dict[str, float]]]:
    """What each backend of a format took at each token count under each contract: the slowest rank, where every rank counts."""
    cells: dict[tuple[str, str, str, Method, int], dict[str, dict[tuple[int, int], list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for record in family.records:
        timing, case = record.timing, record.case
        if record.status == "ok" and timing is not None and timing.comparable:
            cell = cells[record.scope, record.contract_id, record.act_dtype, (timing.clock, timing.l2), case.num_tokens]
            cell[record.backend].setdefault((case.tp_rank, case.ep_rank), []).append(timing.median_us)
    num_ranks = family.num_ranks
    for (scope, contract_id, act_dtype, method, _), backends in cells.items():
        whole = {name: max(map(_median, ranks.values())) for name, ranks in backends.items() if len(ranks) == num_ranks}
        if whole:
            yield (scope, contract_id, act_dtype, method_name(method)), whole


def _median(rounds: Sequence[float]) -> float:
    """Most runs have one round, and statistics.median takes 1 us for it."""
    return rounds[0] if len(rounds) == 1 else median(rounds)
