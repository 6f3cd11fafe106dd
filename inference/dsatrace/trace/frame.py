"""Rows as columns that are read when they are asked for: as pandas, polars or Arrow, whole or in batches.

Whatever takes Arrow's C stream (DuckDB, polars, pandas, pyarrow) takes a `Frame` itself, and then reads it
batch by batch. pandas and polars need not be installed. Knows no file.

    frame = Frame(schema, lambda columns: read(path, columns))
    frame.to_pandas(("layer_id", "unique_blocks"))
    for batch in frame.batches(): ...              # a pyarrow.RecordBatch at a time
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dsatrace.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Read = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]
"""Batches with these columns, in this order and of the frame's types."""


class Frame:
    """Columns of `schema`, which `read` gives batch by batch, anew each time they are asked for.

    A column that is not there, or a library that is missing, raises `UserError` naming it.
    """

    def __init__(self, schema: pa.Schema, read: Read) -> None:
        self.schema = schema
        self._read = read

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Frame:
        """From values in memory, those of a column of one type or None."""
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        return cls(table.schema, lambda wanted: table.select(list(wanted)).to_batches())

    @property
    def columns(self) -> list[str]:
        return list(self.schema.names)

    def batches(self, columns: Sequence[str] | None = None) -> pa.RecordBatchReader:
        """An iterator of record batches, for what is larger than memory."""
        names = self.columns if columns is None else list(columns)
        if unknown := [name for name in names if name not in self.schema.names]:
            raise UserError(f"no column {unknown[0]!r}; `columns` lists them")
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.RecordBatchReader.from_batches(schema, self._read(names))

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self.batches(columns).read_all()

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        require("pandas")
        return self.to_arrow(columns).to_pandas()

    def to_polars(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        return require("polars").from_arrow(self.to_arrow(columns))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.batches().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        return f"<Frame of {len(self.columns)} columns: {', '.join(self.columns[:6])}, ...>"


def require(library: str) -> Any:
    """The module; one that is not installed raises `UserError`."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{library} is not installed; install it (pip install {library}), or use to_arrow()"
        ) from error
