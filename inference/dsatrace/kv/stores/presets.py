"""What a batch costs on hardware that is not here: a few numbers, each with where it comes from.

The model is `alpha_batch + ops * alpha_op + bytes / bandwidth`. Most sources publish bandwidths
only. An alpha nobody published is 0 with confidence `unknown`: the time is then a lower bound,
and says nothing about small operations. `dsatrace calibrate` fits all four where it runs.

    load_preset("pcie5-x16").read_us(ops=64, num_bytes=64 * 41984)
    load_preset("calibration.json#ram")
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from dsatrace.errors import UserError

Confidence = Literal["measured", "published", "unverified", "unknown"]
"""`measured` by `dsatrace calibrate`; `published` in a source that was read; `unverified`: commonly
quoted; `unknown`: no figure, the value stands for nothing."""


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
    """One kind of hardware, and how it is used."""

    name: str
    what: str
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
_COPY_CALL = Figure(6.0, "DualPath, arXiv 2602.21548, section 5.2: 5-7 us a cudaMemcpyAsync", "published")


def _preset(
    name: str, what: str, read: Figure, write: Figure | None = None, alpha_op_us: Figure = UNKNOWN
) -> Preset:
    write = write or dataclasses.replace(read, source=f"taken as for reads; {read.source}")
    return Preset(name, what, UNKNOWN, alpha_op_us, read, write)


_ALL = (
    _preset(
        "hbm-h200", "H200 memory, 141 GB", Figure(4800, "NVIDIA H200 data sheet, from memory", "unverified")
    ),
    _preset("hbm-h100", "H100 SXM memory", Figure(3350, "NVIDIA H100 data sheet, from memory", "unverified")),
    _preset("hbm-h20", "H20 memory", Figure(4000, "NVIDIA H20 data sheet, from memory", "unverified")),
    _preset(
        "pcie5-x16",
        "host memory to GPU, one copy call an operation",
        Figure(55, "64 GB/s raw, usual share of it", "unverified"),
        alpha_op_us=_COPY_CALL,
    ),
    _preset(
        "pcie5-gather",
        "host memory to GPU, rows gathered by a kernel",
        Figure(37, _ESS, "unverified"),
        Figure(43, _ESS, "unverified"),
    ),
    _preset(
        "pcie4-x16",
        "host memory to GPU, one copy call an operation",
        Figure(25, "32 GB/s raw, rule of thumb", "unverified"),
        alpha_op_us=_COPY_CALL,
    ),
    _preset(
        "rdma-400g",
        "one 400 Gb/s link, 50 GB/s raw",
        Figure(23.75, "Mooncake README: 190 GB/s over 8 x 400 Gb/s RoCE", "published"),
    ),
    _preset(
        "rdma-200g",
        "one 200 Gb/s link, 25 GB/s raw",
        Figure(21.75, "Mooncake README: 87 GB/s over 4 x 200 Gb/s RoCE", "published"),
    ),
    _preset("nvme-gen4", "one drive", Figure(7.0, "Mooncake's SSD benchmark", "published")),
    _preset("nvme-gen3", "one drive", Figure(3.0, "Mooncake's SSD benchmark", "published")),
)
PRESETS = {preset.name: preset for preset in _ALL}


def load_preset(name: str) -> Preset:
    """One of `PRESETS`, or `FILE.json#NAME` as `dsatrace calibrate` wrote it; `#NAME` may be left out
    if the file has one only."""
    if name in PRESETS:
        return PRESETS[name]
    path, _, entry = name.partition("#")
    if not path.endswith(".json"):
        raise UserError(f"sim:{name}: no such preset; use one of {', '.join(PRESETS)}, or FILE.json#NAME")
    try:
        entries = {preset["name"]: preset for preset in json.loads(Path(path).read_text(encoding="utf-8"))}
        if not entry and len(entries) == 1:
            entry = next(iter(entries))
        if entry not in entries:
            raise UserError(f"sim:{name}: {path} has {', '.join(entries)}; name one after a #")
        return preset_from_json(entries[entry])
    except OSError as error:
        raise UserError(f"sim:{name}: {error.strerror}; write it with `dsatrace calibrate`") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"sim:{name}: not a file that `dsatrace calibrate` wrote ({error!r})") from error


def preset_from_json(fields: dict[str, Any]) -> Preset:
    """The inverse of `dataclasses.asdict`; a missing or unknown field raises `TypeError`."""
    values: dict[str, Any] = {
        key: Figure(**value) if isinstance(value, dict) else value for key, value in fields.items()
    }
    return Preset(**values)
