"""Opens the store that a user's spec names: `ram`, `mmap:PATH`, `file:PATH`, `redis://...` and others.

`STORES` is the one table of them: a new store is one row and the function that opens it.

    store = open_store("unix:///run/valkey.sock", unit_bytes=41984)
    store = open_store("sim:pcie5-x16+ram", unit_bytes=41984, capacity_units=4096)
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import DEFAULT_TIMEOUT_S, Store, StoreSettings

if TYPE_CHECKING:
    from dsatrace.kv.stores.simulated import Preset


@dataclasses.dataclass(frozen=True)
class StoreKind:
    usage: str  # how a spec is written, for the message that refuses one
    needs: Literal["nothing", "file", "address"]  # after the scheme
    opener: str  # MODULE.FUNCTION in this package, imported only when such a store is opened

    def open(self, settings: StoreSettings) -> Store:
        module, function = self.opener.split(".")
        opened: Store = getattr(importlib.import_module(f"dsatrace.kv.stores.{module}"), function)(settings)
        return opened


STORES: dict[str, StoreKind] = {
    "ram": StoreKind("ram", "nothing", "memory.ram_store"),
    "mmap": StoreKind("mmap:PATH", "file", "memory.mmap_store"),
    "file": StoreKind("file:PATH", "file", "direct_file.direct_file_store"),
    "redis": StoreKind("redis://HOST:PORT", "address", "valkey.valkey_store"),
    "valkey": StoreKind("valkey://HOST:PORT", "address", "valkey.valkey_store"),
    "unix": StoreKind("unix://PATH", "address", "valkey.valkey_store"),
    "mooncake": StoreKind("mooncake://HOST:PORT", "address", "mooncake.mooncake_store"),
    "nixl": StoreKind("nixl:PATH (experimental)", "file", "nixl.nixl_store"),
    "memcache": StoreKind("memcache:FILE (untested on hardware)", "address", "memcache.memcache_store"),
}
"""By scheme. `sim:PRESET+SPEC` wraps any of them and models its times."""


def check_spec(spec: str) -> None:
    """Raises `UserError` if `spec` names no store; whether it can be opened, only `open_store` finds out."""
    scheme, separator, rest = spec.partition(":")
    if scheme == "sim" and separator:
        check_spec(_simulated(spec)[1])
        return
    given = {"nothing": not separator, "file": bool(rest), "address": bool(separator)}
    if scheme not in STORES or not given[STORES[scheme].needs]:
        usages = ", ".join(kind.usage for kind in STORES.values())
        raise UserError(f"{spec}: no such store; use one of {usages}, sim:PRESET+SPEC")


def lies_in_file(spec: str) -> bool:
    """Whether the store keeps its units in a file, which no two stores may share."""
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
    """An empty store of units of `unit_bytes`, as `spec` names it.

    Stores on this machine need `capacity_units`. `memory` is for `ram` only: the array for the units,
    such as pinned memory. Raises `UserError` for what the user can mend: a bad spec, a server that is
    down, a file that cannot be opened.
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
    return STORES[scheme].open(StoreSettings(spec, unit_bytes, capacity_units, timeout_s, memory))


def _simulated(spec: str) -> tuple[Preset, str]:
    """The preset and the inner spec."""
    from dsatrace.kv.stores.simulated import load_preset

    name, plus, inner = spec.removeprefix("sim:").partition("+")
    if not plus or inner.startswith("sim:"):
        raise UserError(f"{spec}: name what keeps the bytes, as in sim:{name or 'pcie5-x16'}+ram")
    return load_preset(name), inner
