"""Runs from Python: typed records, and data frames of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.journal import load_run, merge
from moebench.record import Manifest, Record
from moebench.reports import frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run directory, read."""

    path: Path
    manifest: Manifest  # what was asked for and on what it ran
    records: tuple[Record, ...]  # one for each case, backend, scope, round and contract; of several attempts the last
    torn: bool  # the journal's last line was cut off and is left out

    def to_pandas(self) -> DataFrame:
        """One row a record, with units in the column names: median_us with its 95 % interval low_us to high_us, and so on.

        moebench.reports.frame.COLUMNS lists them. What a record does not have, such as the time of one that failed, is pandas.NA."""
        return frame.records(self.records)

    def samples_to_pandas(self) -> DataFrame:
        """One row a sample: what identifies the record, sample (0, 1, ... as they were taken) and sample_us."""
        return frame.samples(self.records)


def load(path: str | Path) -> Results:
    """Read the directory of a run. Raises moebench.record.RecordError for one that cannot be read.

    >>> import moebench
    >>> results = moebench.load("runs/example")
    >>> results.manifest.device.name
    'NVIDIA H200'
    >>> [(r.backend, r.case.num_tokens, r.median_us) for r in results.records if r.status == "ok"]
    [('marlin_mxfp4_bf16', 1, 56.0), ('marlin_mxfp4_bf16', 64, 228.0), ('openai_triton_kernels', 1, 61.0)]

    >>> times = results.to_pandas().query("status == 'ok'")
    >>> times.pivot_table(index="num_tokens", columns="backend", values="median_us")
    backend     marlin_mxfp4_bf16  openai_triton_kernels
    num_tokens
    1                        56.0                   61.0
    64                      228.0                   <NA>
    """
    run = load_run(Path(path))
    return Results(path=run.path, manifest=run.manifest, records=tuple(merge([run])), torn=run.torn)
