"""From what a user writes to a store: `ram`, `mmap:PATH`, `file:PATH`, `redis://...`, and the others.

`STORES` is the one table of them: a new store is a row, and the function that opens it.

store = open_store("unix:///run/valkey.sock", unit_bytes=41984)
store = open_store("sim:pcie5-x16+ram", unit_bytes=41984, capacity_units=4096)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store

if TYPE_CHECKING:
    from dsatrace.kv.stores.simulated import Preset

DEFAULT_TIMEOUT_S = 5.0


class Asked(NamedTuple):
    """What a store is opened with."""

    spec: str
    path: Path  # what follows the scheme, for a store in a file
    unit_bytes: int
    capacity_units: int | None
    timeout_s: float
    memory: np.ndarray | None  # for `ram` alone

    @property
    def room(self) -> int:
        """Units that it may hold; a store on this machine cannot do without."""
        if self.capacity_units is None:
            raise ValueError(f"{self.spec}: say how many units it may hold")
        return self.capacity_units


def _ram(asked: Asked) -> Store:
    from dsatrace.kv.stores.array import ram_store

    return ram_store(asked.unit_bytes, asked.room, asked.memory)


def _mmap(asked: Asked) -> Store:
    from dsatrace.kv.stores.array import mmap_store

    return mmap_store(asked.spec, asked.path, asked.unit_bytes, asked.room)


def _file(asked: Asked) -> Store:
    from dsatrace.kv.stores.direct_file import direct_file_store

    return direct_file_store(asked.spec, asked.path, asked.unit_bytes, asked.room)


def _nixl(asked: Asked) -> Store:
    from dsatrace.kv.stores.nixl import nixl_store

    return nixl_store(asked.spec, asked.path, asked.unit_bytes, asked.room, asked.timeout_s)


def _valkey(asked: Asked) -> Store:
    from dsatrace.kv.stores.valkey import valkey_store

    return valkey_store(asked.spec, asked.unit_bytes, asked.capacity_units, asked.timeout_s)


def _mooncake(asked: Asked) -> Store:
    from dsatrace.kv.stores.mooncake import mooncake_store

    return mooncake_store(asked.spec, asked.unit_bytes, asked.capacity_units, asked.timeout_s)


def _memcache(asked: Asked) -> Store:
    from dsatrace.kv.stores.memcache import memcache_store

    return memcache_store(asked.spec, asked.unit_bytes, asked.capacity_units, asked.timeout_s)


@dataclasses.dataclass(frozen=True)
class StoreKind:
    """One kind of store."""

    usage: str  # how a user writes it, as a refused spec is told
    needs: Literal["nothing", "file", "address"]  # what stands behind its scheme
    open: Callable[[Asked], Store]


STORES: dict[str, StoreKind] = {
    "ram": StoreKind("ram", "nothing", _ram),
    "mmap": StoreKind("mmap:PATH", "file", _mmap),
    "file": StoreKind("file:PATH", "file", _file),
    "redis": StoreKind("redis://HOST:PORT", "address", _valkey),
    "valkey": StoreKind("valkey://HOST:PORT", "address", _valkey),
    "unix": StoreKind("unix://PATH", "address", _valkey),
    "mooncake": StoreKind("mooncake://HOST:PORT", "address", _mooncake),
    "nixl": StoreKind("nixl:PATH (experimental)", "file", _nixl),
    "memcache": StoreKind("memcache:FILE (untested on hardware)", "address", _memcache),
}
"""By scheme. `sim:PRESET+SPEC` stands around any of them and models its times."""


def check_spec(spec: str) -> None:
    """Raises `UserError` where `spec` names no store; whether the store opens, only `open_store` tells."""
    scheme, separator, rest = spec.partition(":")
    if scheme == "sim" and separator:
        check_spec(_simulated(spec)[1])
        return
    given = {"nothing": not separator, "file": bool(rest), "address": bool(separator)}
    if scheme not in STORES or not given[STORES[scheme].needs]:
        usages = ", ".join(kind.usage for kind in STORES.values())
        raise UserError(f"{spec}: no such store; use one of {usages}, sim:PRESET+SPEC")


def lies_in_file(spec: str) -> bool:
    """Whether the store keeps its units in a file of its own, which no other may share."""
    inner = spec.partition("+")[2] if spec.startswith("sim:") else spec
    kind = STORES.get(inner.partition(":")[0])
    return kind is not None and kind.needs == "file"


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
    scheme, _, rest = spec.partition(":")
    if scheme == "sim":
        from dsatrace.kv.stores.simulated import SimulatedStore

        preset, inner = _simulated(spec)
        store = open_store(inner, unit_bytes, capacity_units, timeout_s=timeout_s, memory=memory)
        return SimulatedStore(store, preset)
    if memory is not None and spec != "ram":
        raise ValueError(f"{spec}: only `ram` takes memory")
    asked = Asked(spec, Path(rest), unit_bytes, capacity_units, timeout_s, memory)
    return STORES[scheme].open(asked)


def _simulated(spec: str) -> tuple[Preset, str]:
    """Whose times, and what keeps the bytes."""
    from dsatrace.kv.stores.simulated import load_preset

    name, plus, inner = spec.removeprefix("sim:").partition("+")
    if not plus or inner.startswith("sim:"):
        raise UserError(f"{spec}: name what keeps the bytes, as in sim:{name or 'pcie5-x16'}+ram")
    return load_preset(name), inner
