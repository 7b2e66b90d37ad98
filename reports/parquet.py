"""A run as one Parquet file: the columns of the data frame, what the run was in its metadata."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO

from moebench.journal import Run, merge
from moebench.record import to_json
from moebench.reports import frame


class NotInstalled(Exception):
    """A package that this format needs is missing; the message says how to get it."""


def export(run: Run, name: str) -> dict[str, bytes]:
    """Raises NotInstalled without pyarrow. The manifest is JSON in the file's metadata, under moebench."""
    if find_spec("pyarrow") is None:
        raise NotInstalled("Parquet needs pyarrow, which is not installed; pip install 'moebench[parquet]'")
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pandas(frame.records(merge([run])), preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"moebench": to_json(run.manifest).encode()})
    file = BytesIO()
    parquet.write_table(table, file)
    return {name: file.getvalue()}
