"""From what a user writes to a store: `ram`, `mmap:PATH`, `file:PATH`, `redis://...`, and the others.

`nixl:PATH` is experimental; `memcache:FILE` is untested on hardware.

store = open_store("unix:///run/valkey.sock", unit_bytes=41984)
store = open_store("sim:pcie5-x16+ram", unit_bytes=41984, capacity_units=4096)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store

if TYPE_CHECKING:
    from dsatrace.kv.stores.presets import Preset

SPECS = (
    "ram, mmap:PATH, file:PATH, redis://HOST:PORT, unix://PATH, mooncake://HOST:PORT, sim:PRESET+SPEC, "
    "nixl:PATH (experimental), memcache:FILE (untested on hardware)"
)
_IN_FILES, _ELSEWHERE = ("mmap", "file", "nixl"), ("redis", "valkey", "unix", "mooncake", "memcache")
DEFAULT_TIMEOUT_S = 5.0


def check_spec(spec: str) -> None:
    """Raises `UserError` where `spec` names no store; whether the store opens, only `open_store` tells."""
    scheme, separator, rest = spec.partition(":")
    if scheme == "sim" and separator:
        check_spec(_simulated(spec)[1])
    elif spec != "ram" and not (scheme in _IN_FILES and rest) and not (scheme in _ELSEWHERE and separator):
        raise UserError(f"{spec}: no such store; use one of {SPECS}")


def open_store(
    spec: str,
    unit_bytes: int,
    capacity_units: int | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory: np.ndarray | None = None,
) -> Store:
    """An empty store of units of `unit_bytes`, by what `spec` names.

    Local ones need `capacity_units`; `memory` is for `ram` alone: the array to keep the units in,
    such as pinned memory. Raises `UserError` where the user can mend it: a spec that is none, a
    server that is down, a file that cannot be.
    """
    if unit_bytes < 1 or (capacity_units is not None and capacity_units < 1):
        raise ValueError(f"a store holds at least 1 unit of 1 byte, not {capacity_units} of {unit_bytes}")
    check_spec(spec)
    scheme = spec.partition(":")[0]
    if scheme == "sim":
        from dsatrace.kv.stores.simulated import SimulatedStore

        preset, inner = _simulated(spec)
        store = open_store(inner, unit_bytes, capacity_units, timeout_s=timeout_s, memory=memory)
        return SimulatedStore(store, preset)
    if memory is not None and spec != "ram":
        raise ValueError(f"{spec}: only `ram` takes memory")
    if scheme in ("redis", "valkey", "unix"):
        from dsatrace.kv.stores.valkey import valkey_store

        return valkey_store(spec, unit_bytes, capacity_units, timeout_s)
    if scheme == "mooncake":
        from dsatrace.kv.stores.mooncake import mooncake_store

        return mooncake_store(spec, unit_bytes, capacity_units, timeout_s)
    if scheme == "memcache":
        from dsatrace.kv.stores.memcache import memcache_store

        return memcache_store(spec, unit_bytes, capacity_units, timeout_s)
    return _open_local(spec, unit_bytes, capacity_units, timeout_s, memory)


def _simulated(spec: str) -> tuple[Preset, str]:
    """Whose times, and what keeps the bytes."""
    from dsatrace.kv.stores.presets import load_preset

    name, plus, inner = spec.removeprefix("sim:").partition("+")
    if not plus or inner.startswith("sim:"):
        raise UserError(f"{spec}: name what keeps the bytes, as in sim:{name or 'pcie5-x16'}+ram")
    return load_preset(name), inner


def _open_local(
    spec: str, unit_bytes: int, capacity_units: int | None, timeout_s: float, memory: np.ndarray | None
) -> Store:
    scheme, _, path = spec.partition(":")
    if capacity_units is None:
        raise ValueError(f"{spec}: say how many units it may hold")
    if spec == "ram":
        from dsatrace.kv.stores.ram import ram_store

        return ram_store(unit_bytes, capacity_units, memory)
    if scheme == "mmap":
        from dsatrace.kv.stores.mmap_file import mmap_store

        return mmap_store(spec, Path(path), unit_bytes, capacity_units)
    if scheme == "nixl":
        from dsatrace.kv.stores.nixl import nixl_store

        return nixl_store(spec, Path(path), unit_bytes, capacity_units, timeout_s)
    from dsatrace.kv.stores.direct_file import direct_file_store

    return direct_file_store(spec, Path(path), unit_bytes, capacity_units)
