"""Stored baselines: runs kept to be compared with later, by the device, power limit, driver and contract they were measured under."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import exp, isfinite, log
from pathlib import Path
from statistics import fmean, median

from moebench.case import Case
from moebench.compare import Key
from moebench.conform import misfit
from moebench.journal import Journal, Run, load_run, merge, write_manifest
from moebench.record import Record, Scope
from moebench.verdict import Stored

STORE = Path("baselines")  # in the working directory, to be committed beside the code it judges
FILE = "baseline.json"
SCHEMA = "1.0"
FILE_BYTES_LIMIT = 64 << 20


class BaselineError(Exception):
    """What keeps a baseline from being stored or found; the message names the way out."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What two runs must share for one to be the other's baseline."""

    device: str
    power_limit_w: int  # 0: not known
    driver: str
    contracts: tuple[str, ...]

    @property
    def name(self) -> str:
        """A directory's name."""
        contract = self.contracts[0] if len(self.contracts) == 1 else sha256(",".join(self.contracts).encode()).hexdigest()[:12]
        power = f"{self.power_limit_w}W" if self.power_limit_w else "unknown-power"
        words = [self.device, power, f"driver-{self.driver or 'none'}", contract]
        return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", word).strip("-.") or "unnamed" for word in words)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """When and why a run became the baseline."""

    run_id: str
    time: str  # UTC, given by who accepts
    reason: str
    cells: int


@dataclass(frozen=True, kw_only=True)
class CellJobs:
    """One cell's time in each of the jobs that its band comes from."""

    case: Case
    backend: str
    scope: Scope
    centers_us: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    conditions: Conditions
    history: tuple[Accepted, ...]  # the last is the one that holds
    jobs: tuple[CellJobs, ...]
    schema: str = SCHEMA

    def stored(self, name: str, trusted: bool) -> Stored:
        jobs: dict[Key, tuple[float, ...]] = {
            (cell.case, cell.backend, cell.scope): tuple(log(center) for center in cell.centers_us) for cell in self.jobs
        }
        return Stored(name=name, trusted=trusted, jobs=jobs)


def conditions(run: Run) -> Conditions:
    """Raises BaselineError where it has no times."""
    timed = [record for record in run.records if record.timing]
    if not timed:
        raise BaselineError(f"{run.path} has no times, so it cannot be a baseline")
    limits = [record.telemetry.power_limit_w for record in timed if record.telemetry and record.telemetry.power_limit_w]
    return Conditions(
        device=run.manifest.device.name,
        power_limit_w=round(median(limits)) if limits else 0,
        driver=run.manifest.device.driver,
        contracts=tuple(sorted({record.contract_id for record in timed})),
    )


def save(store: Path, runs: Sequence[Run], *, reason: str, time: str, replaces: bool = False) -> Path:
    """The last run becomes the baseline of its conditions, all of them calibrate its band; where it is stored.

    A baseline that is there already is replaced only if asked for. Raises BaselineError, RecordError or OSError."""
    here = conditions(runs[-1])
    others = [run.path for run in runs if conditions(run) != here]
    if others:
        raise BaselineError(f"{others[0]} was not measured under the same conditions as {runs[-1].path}: {conditions(runs[0])} / {here}")
    paths = {run.path.resolve() for run in runs}
    if len(paths) < len(runs):
        raise BaselineError("the same run is given twice, and a band needs jobs of their own")
    place = store / here.name
    before = load(place).history if (place / FILE).exists() else ()
    if before and not replaces:
        raise BaselineError(
            f"{place} holds a baseline already (run {before[-1].run_id}); moebench baseline accept {runs[-1].path} --reason ... replaces it"
        )
    if replaces and not before:
        raise BaselineError(f"there is no baseline for {here.name} to replace; moebench baseline save {runs[-1].path} makes the first")
    kept = [_condensed(record) for record in merge([runs[-1]]) if record.status != "interrupted"]
    accepted = Accepted(run_id=runs[-1].manifest.run_id, time=time, reason=reason, cells=len({_key(record) for record in kept}))
    baseline = Baseline(conditions=here, history=(*before, accepted), jobs=tuple(_jobs(runs)))
    _write(place, runs[-1], kept, baseline)
    return place


def load(place: Path) -> Baseline:
    """Raises BaselineError for what is no baseline."""
    file = place / FILE
    try:
        if file.stat().st_size > FILE_BYTES_LIMIT:
            raise BaselineError(f"{file} is larger than {FILE_BYTES_LIMIT} bytes")
        row = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
        if str(row["schema"]).split(".")[0] != SCHEMA.split(".")[0]:
            raise ValueError(f"schema {row['schema']}, this moebench reads {SCHEMA}")
        found = Baseline(
            conditions=Conditions(**{**row["conditions"], "contracts": tuple(row["conditions"]["contracts"])}),
            history=tuple(Accepted(**one) for one in row["history"]),
            jobs=tuple(CellJobs(**{**one, "case": Case(**one["case"]), "centers_us": tuple(one["centers_us"])}) for one in row["jobs"]),
            schema=row["schema"],
        )
        if problem := misfit(found, Baseline, "it"):
            raise ValueError(problem)
        if not found.history or not all(center > 0 and isfinite(center) for cell in found.jobs for center in cell.centers_us):
            raise ValueError("it has no history, or times that are none")
        return found
    except FileNotFoundError:
        raise BaselineError(f"{place} is no baseline: it has no {FILE} (moebench baseline save makes one)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaselineError(f"{file}: {f'lacks {error}' if isinstance(error, KeyError) else error}") from None


def listed(store: Path) -> list[Path]:
    """Where baselines are, by name."""
    return sorted(file.parent for file in store.glob(f"*/{FILE}"))


def matching(store: Path, run: Run) -> Path:
    """The baseline for a run's conditions. Raises BaselineError, and says what is nearest, where there is none."""
    here = conditions(run)
    place = store / here.name
    if (place / FILE).exists():
        return place
    known = [load(path).conditions for path in listed(store)]
    near = [f"{other.name} differs in {', '.join(_apart(here, other))}" for other in known if other.device == here.device]
    told = f"; {near[0]}" if near else f"; it has {', '.join(path.name for path in listed(store)) or 'none'}"
    raise BaselineError(f"{store} has no baseline for {here.name}{told}; moebench baseline save {run.path} makes one")


def is_baseline(path: Path) -> bool:
    return (path / FILE).exists()


def is_store(path: Path) -> bool:
    return not is_baseline(path) and bool(listed(path))


def _condensed(record: Record) -> Record:
    """With its median as the only sample: a baseline is kept in version control."""
    return replace(record, timing=replace(record.timing, samples_us=(record.timing.median_us,))) if record.timing else record


def _jobs(runs: Sequence[Run]) -> Iterable[CellJobs]:
    centers: dict[Key, list[float]] = {}
    for run in runs:
        times: dict[Key, list[float]] = {}
        for record in merge([run]):
            if record.status == "ok" and record.timing and record.timing.median_us > 0:
                times.setdefault(_key(record), []).append(log(record.timing.median_us))
        for key, logs in times.items():
            centers.setdefault(key, []).append(fmean(logs))
    for (case, backend, scope), values in centers.items():
        yield CellJobs(case=case, backend=backend, scope=scope, centers_us=tuple(map(exp, values)))


def _key(record: Record) -> Key:
    return record.case, record.backend, record.scope


def _write(place: Path, run: Run, records: Iterable[Record], baseline: Baseline) -> None:
    """Whole or not at all: a new directory beside, then renames."""
    new, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    write_manifest(new, run.manifest)
    journal = Journal(new)
    for record in records:
        journal.append(record)
    journal.close()
    load_run(new)  # what cannot be read back is no baseline
    (new / FILE).write_text(json.dumps(asdict(baseline), allow_nan=False, indent=1) + "\n", encoding="utf-8")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _apart(here: Conditions, other: Conditions) -> list[str]:
    mine, theirs = asdict(here), asdict(other)
    return [f"{name.replace('_', ' ')} ({theirs[name]} / {mine[name]})" for name in mine if mine[name] != theirs[name]]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
