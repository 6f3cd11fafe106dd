"""A store with the times of hardware that is not here: the bytes are real, the latency is modelled.

A batch takes `alpha_batch + ops * alpha_op + bytes / bandwidth`, with the operations and bytes that
the wrapped store counted. Nothing waits for that long; `stats().latency_kind` says `modelled`.

A `Preset` is four figures, each with its source. Most sources publish bandwidths only. An alpha that
nobody published is 0 with confidence `unknown`: the time is then a lower bound, and says nothing
about small operations. `dsatrace calibrate` fits all four on the machine it runs on.

    load_preset("pcie5-x16").read_us(ops=64, num_bytes=64 * 41984)
    load_preset("calibration.json#ram")
    store = SimulatedStore(open_store("ram", 41984, 1024), load_preset("pcie5-x16"))
"""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store, StoreStats

Confidence = Literal["measured", "published", "unverified", "unknown"]
"""`measured`: by `dsatrace calibrate`; `published`: in a source that we read; `unverified`: commonly
quoted; `unknown`: no figure, the value means nothing."""


@dataclasses.dataclass(frozen=True)
class Figure:
    value: float
    source: str
    confidence: Confidence

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"{self.value} is no time and no bandwidth")


@dataclasses.dataclass(frozen=True)
class Preset:
    name: str
    what: str  # the hardware, and how it is used
    alpha_batch_us: Figure
    alpha_op_us: Figure
    read_gb_per_s: Figure
    write_gb_per_s: Figure

    def __post_init__(self) -> None:
        if not (self.read_gb_per_s.value and self.write_gb_per_s.value):
            raise ValueError(f"{self.name}: a bandwidth of 0 moves nothing")

    def read_us(self, ops: int, num_bytes: int) -> float:
        return self._us(ops, num_bytes, self.read_gb_per_s)

    def write_us(self, ops: int, num_bytes: int) -> float:
        return self._us(ops, num_bytes, self.write_gb_per_s)

    def _us(self, ops: int, num_bytes: int, bandwidth: Figure) -> float:
        return self.alpha_batch_us.value + ops * self.alpha_op_us.value + num_bytes / bandwidth.value / 1e3


UNKNOWN = Figure(0.0, "not published; fit it with `dsatrace calibrate`", "unknown")
_ESS = "ESS, arXiv 2512.10576: gather of 656-byte rows by unified addressing"
_COPY_CALL = Figure(6.0, "DualPath, arXiv 2602.21548, section 5.2: 5-7 us per cudaMemcpyAsync", "published")


def _preset(
    name: str, what: str, read: Figure, write: Figure | None = None, alpha_op_us: Figure = UNKNOWN
) -> Preset:
    write = write or dataclasses.replace(read, source=f"taken as for reads; {read.source}")
    return Preset(name, what, UNKNOWN, alpha_op_us, read, write)


# fmt: off
_ALL = (
    _preset("hbm-h200", "H200 memory, 141 GB",
            Figure(4800, "NVIDIA H200 data sheet, from memory", "unverified")),
    _preset("hbm-h100", "H100 SXM memory", Figure(3350, "NVIDIA H100 data sheet, from memory", "unverified")),
    _preset("hbm-h20", "H20 memory", Figure(4000, "NVIDIA H20 data sheet, from memory", "unverified")),
    _preset("pcie5-x16", "host memory to GPU, one copy call per operation",
            Figure(55, "64 GB/s raw, usual share of it", "unverified"), alpha_op_us=_COPY_CALL),
    _preset("pcie5-gather", "host memory to GPU, rows gathered by a kernel",
            Figure(37, _ESS, "unverified"), Figure(43, _ESS, "unverified")),
    _preset("pcie4-x16", "host memory to GPU, one copy call per operation",
            Figure(25, "32 GB/s raw, rule of thumb", "unverified"), alpha_op_us=_COPY_CALL),
    _preset("nvlink-c2c", "Grace memory to Hopper GPU",
            Figure(450, "NVIDIA GH200 data sheet: 900 GB/s both ways, from memory", "unverified")),
    _preset("rdma-400g", "one 400 Gb/s link, 50 GB/s raw",
            Figure(23.75, "Mooncake README: 190 GB/s over 8 x 400 Gb/s RoCE", "published")),
    _preset("rdma-200g", "one 200 Gb/s link, 25 GB/s raw",
            Figure(21.75, "Mooncake README: 87 GB/s over 4 x 200 Gb/s RoCE", "published")),
    _preset("nvme-gen4", "one drive", Figure(7.0, "Mooncake's SSD benchmark", "published")),
    _preset("nvme-gen3", "one drive", Figure(3.0, "Mooncake's SSD benchmark", "published")),
)
# fmt: on
PRESETS = {preset.name: preset for preset in _ALL}


def load_preset(name: str) -> Preset:
    """One of `PRESETS`, or `FILE.json#NAME` from `dsatrace calibrate`; `#NAME` is optional if the file has
    one preset only."""
    if name in PRESETS:
        return PRESETS[name]
    path, _, entry = name.partition("#")
    if not path.endswith(".json"):
        raise UserError(f"sim:{name}: no such preset; use one of {', '.join(PRESETS)}, or FILE.json#NAME")
    try:
        presets = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {preset["name"]: preset for preset in presets}
        if not entry and len(entries) == 1:
            entry = next(iter(entries))
        if entry not in entries:
            raise UserError(f"sim:{name}: {path} has {', '.join(entries)}; name one after a #")
        return _preset_of(entries[entry])
    except OSError as error:
        raise UserError(f"sim:{name}: {error.strerror}; write it with `dsatrace calibrate`") from error
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"sim:{name}: not a file that `dsatrace calibrate` wrote: {what}") from error


def _preset_of(values: dict[str, Any]) -> Preset:
    """A preset as the file holds it; raises `ValueError` or `TypeError` naming the field that is wrong."""
    read: dict[str, Any] = {}
    for field in dataclasses.fields(Preset):
        value = values[field.name]
        if field.type == "str":
            if not isinstance(value, str):
                raise ValueError(f"{field.name} is no text")
            read[field.name] = value
        else:
            try:
                read[field.name] = Figure(**value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{field.name}: {error}") from error
    return Preset(**read)


class SimulatedStore:
    """See `Store`; calls go to `store`, which must have no other user."""

    def __init__(self, store: Store, preset: Preset) -> None:
        self.unit_bytes = store.unit_bytes
        self.capacity_units = store.capacity_units
        self.preset = preset
        self._store = store
        self._read_us = 0.0
        self._write_us = 0.0
        self._lock = threading.Lock()

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        with self._lock:
            before = self._store.stats()
            stored = self._store.put(keys, data, rows)
            done = self._store.stats() - before
            if done.write_ops:
                self._write_us += self.preset.write_us(done.write_ops, done.bytes_written)
        return stored

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        with self._lock:
            before = self._store.stats()
            hits = self._store.fetch(keys, out, rows)
            done = self._store.stats() - before
            if done.read_ops:
                self._read_us += self.preset.read_us(done.read_ops, done.bytes_read)
        return hits

    def contains(self, keys: np.ndarray) -> np.ndarray:
        return self._store.contains(keys)

    def evict(self, keys: np.ndarray) -> np.ndarray:
        return self._store.evict(keys)

    def register(self, buffer: np.ndarray) -> None:
        self._store.register(buffer)

    def stats(self) -> StoreStats:
        with self._lock:
            return dataclasses.replace(
                self._store.stats(),
                read_us=self._read_us,
                write_us=self._write_us,
                latency_kind="modelled",
            )

    def close(self) -> None:
        self._store.close()
