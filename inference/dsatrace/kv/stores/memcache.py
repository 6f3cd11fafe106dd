"""Units in MemCache, the pool of Ascend machines (packages memcache-hybrid and memfabric-hybrid).

*Untested on hardware*: its client starts only with an Ascend driver. With the real package, 1.3.0, we
tried only that it loads, and that a client that does not start gives one clear error. The rest follows
its signatures, the return values in its Python API's documentation, and the codes in its published
headers; the tests run against a fake made from these.

    store = open_store("memcache:/etc/mmc-local.conf?device=0", unit_bytes=41984)

`mmc-local.conf` is MemCache's own file (addresses, protocol, memory that this process lends); plain
`memcache:` takes the one that `MMC_LOCAL_CONFIG_PATH` names. A MetaService must run: `python -c "from
memcache_hybrid import MetaService; MetaService.main()"`. The package allows one client per process.
"""

from __future__ import annotations

import itertools
import os
import socket
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.interface import StoreSettings
from dsatrace.kv.stores.pooled import OK, Codes, PoolClient, PooledMedium

CONFIG_VARIABLE = "MMC_LOCAL_CONFIG_PATH"
META_SERVICE_KEY = "ock.mmc.meta_service_url"
START = 'python -c "from memcache_hybrid import MetaService; MetaService.main()"'
UNTESTED = "this store is untested on hardware"


class MemcacheClient(PoolClient):
    """`DistributedObjectStore` under the common names.

    Its put leaves an existing object unchanged and returns 0. So every version of a unit has a new
    name, and the older one is removed; a leased one is left to the pool's eviction.
    """

    name = "memcache"
    codes = Codes(
        no_room=(-3001, -3013, -3016),  # allocation failed, capacity exceeded, not enough memory
        absent=(-3007, -3102, -3106),  # no such object, no such key, its lease ran out during the read
        damaged=(-3103,),
        leased=(-3104,),
        timed_out=(-3004,),
    )

    def __init__(self, store: Any) -> None:
        self._store = store
        self._versions: dict[str, str] = {}  # full names of the stored versions
        self._numbers = itertools.count()

    def store(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        fresh = [f"{name}.{next(self._numbers):x}" for name in names]
        codes: Sequence[int] = self._store.batch_put_from(fresh, addresses, sizes)
        older = []
        for name, version, code in zip(names, fresh, codes, strict=True):
            if code == OK and name in self._versions:
                older.append(self._versions[name])
            if code == OK:
                self._versions[name] = version
        if older:
            self._store.remove_batch(older)
        return codes

    def load(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        codes = self._store.batch_get_into(self._full(names), addresses, sizes)
        return [size if code == OK else code for code, size in zip(codes, sizes, strict=True)]

    def exist(self, names: list[str]) -> Sequence[int]:
        codes: Sequence[int] = self._store.batch_is_exist(self._full(names))
        return codes

    def remove(self, names: list[str], force: bool) -> Sequence[int]:
        codes: Sequence[int] = self._store.remove_batch(self._full(names))
        for name, code in zip(names, codes, strict=True):
            if code == OK or code in self.codes.absent:
                self._versions.pop(name, None)
        return codes

    def register(self, address: int, num_bytes: int) -> int:
        code: int = self._store.register_buffer(address, num_bytes)
        return code

    def unregister(self, address: int, num_bytes: int) -> None:
        self._store.unregister_buffer(address, num_bytes)

    def close(self) -> None:
        self._store.close()

    def _full(self, names: list[str]) -> list[str]:
        return [self._versions.get(name, name) for name in names]


def memcache_store(settings: StoreSettings) -> CheckedStore:
    """A store in the pool of MemCache's configuration file; raises `UserError` if it cannot be joined."""
    spec, timeout_s = settings.spec, settings.timeout_s
    path, device = _parse(spec)
    host, port = _meta_service(spec, path)
    os.environ[CONFIG_VARIABLE] = str(path)  # read when its client starts
    try:
        from memcache_hybrid import DistributedObjectStore
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        raise UserError(f"{spec}: {error}; pip install memcache-hybrid ({UNTESTED})") from error
    try:  # checked first: MemCache itself keeps retrying
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise UserError(
            f"{spec}: no MetaService at {host}:{port} ({error.strerror or error}); start one with `{START}`"
        ) from error
    store = DistributedObjectStore()
    if code := store.init(device):
        raise UserError(
            f"{spec}: MemCache does not start (code {code}); it needs an Ascend driver, and {UNTESTED}"
        )
    return CheckedStore(PooledMedium(MemcacheClient(store), settings), settings)


def _parse(spec: str) -> tuple[Path, int]:
    """Configuration file and device of `memcache:[FILE][?device=N]`."""
    name, _, query = spec.partition(":")[2].partition("?")
    try:
        fields = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
        device = int(fields.pop("device", 0))
        if fields or device < 0 or name.startswith("//"):
            raise ValueError
    except ValueError:
        raise UserError(f"{spec}: use memcache:FILE?device=0, FILE being MemCache's mmc-local.conf") from None
    name = name or os.environ.get(CONFIG_VARIABLE, "")
    if not name:
        raise UserError(f"{spec}: name MemCache's mmc-local.conf, as memcache:FILE or in {CONFIG_VARIABLE}")
    return Path(name), device


def _meta_service(spec: str, path: Path) -> tuple[str, int]:
    """Host and port of the MetaService in a configuration file of `key = value` lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{spec}: {path}: {error.strerror}; name MemCache's mmc-local.conf") from error
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    values = {key.strip(): value.strip() for key, _, value in pairs}
    try:
        url = urllib.parse.urlsplit(values.get(META_SERVICE_KEY, ""))
        if url.hostname and url.port:
            return url.hostname, url.port
    except ValueError:  # not a port
        pass
    raise UserError(f"{spec}: {path} has no line `{META_SERVICE_KEY} = tcp://HOST:PORT`")
