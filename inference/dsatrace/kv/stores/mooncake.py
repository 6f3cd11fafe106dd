"""Units in Mooncake Store, the distributed pool that vLLM and SGLang use; one batch call each way.

    store = open_store("mooncake://127.0.0.1:50051?segment_mib=1024", unit_bytes=41984)

Needs the package `mooncake-transfer-engine-non-cuda` (or the CUDA one), the library libibverbs
(`apt install libibverbs1`), also over TCP, and a master:
`mooncake_master --rpc_address=127.0.0.1 --rpc_port=50051`. This process adds a segment of `segment_mib`
of its memory to the pool; with 0, other processes must have added some. A recently read unit is
leased: `evict` returns False until the lease (default: 10 s) is over.

Mooncake's calls cannot be cancelled. Those on registered buffers end by Mooncake's own limits:
`timeout_s` for requests to the master (set as `MC_RPC_TIMEOUT_MS` unless that is set), half a minute
for the bytes. Calls on other memory always end within `timeout_s` (see `pooled`).
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Sequence
from typing import Any

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.client_calls import STAGING_BYTES
from dsatrace.kv.stores.interface import StoreSettings
from dsatrace.kv.stores.pooled import Codes, PoolClient, PooledMedium

DEFAULT_PORT = 50051
DEFAULT_SEGMENT_MIB = 1024
PACKAGE = "mooncake-transfer-engine-non-cuda"


class MooncakeClient(PoolClient):
    """`MooncakeDistributedStore` under the common names."""

    name = "mooncake"
    codes = Codes(
        no_room=(-200,),
        absent=(-704, -707),  # -707: its lease ran out during the read, so it may have been replaced
        damaged=(-600,),
        leased=(-706,),
        timed_out=(-901,),
    )

    def __init__(self, store: Any) -> None:
        self._store = store

    def store(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        codes: Sequence[int] = self._store.batch_upsert_from(names, addresses, sizes)
        return codes

    def load(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        codes: Sequence[int] = self._store.batch_get_into(names, addresses, sizes)
        return codes

    def exist(self, names: list[str]) -> Sequence[int]:
        codes: Sequence[int] = self._store.batch_is_exist(names)
        return codes

    def remove(self, names: list[str], force: bool) -> Sequence[int]:
        codes: Sequence[int] = self._store.batch_remove(names, force)
        return codes

    def register(self, address: int, num_bytes: int) -> int:
        code: int = self._store.register_buffer(address, num_bytes)
        return code

    def unregister(self, address: int, num_bytes: int) -> None:
        self._store.unregister_buffer(address)

    def close(self) -> None:
        self._store.close()


def mooncake_store(settings: StoreSettings) -> CheckedStore:
    """A store in the pool of the master that the spec names; raises `UserError` if there is none."""
    spec, timeout_s = settings.spec, settings.timeout_s
    host, port, segment_mib = _parse(spec)
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MC_RPC_TIMEOUT_MS", str(int(timeout_s * 1000)))
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        if "libibverbs" in str(error):  # the package is there; it needs this even over TCP
            raise UserError(f"{spec}: {error}; apt install libibverbs1") from error
        raise UserError(f"{spec}: {error}; pip install {PACKAGE} and apt install libibverbs1") from error
    start = f"start one with `mooncake_master --rpc_address={host} --rpc_port={port}`"
    try:  # checked first: Mooncake itself retries for a minute and a half
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise UserError(f"{spec}: no master ({error.strerror or error}); {start}") from error
    store = MooncakeDistributedStore()
    code = store.setup(
        socket.gethostbyname(host) if host in ("localhost", "127.0.0.1") else socket.gethostname(),
        "P2PHANDSHAKE",
        segment_mib << 20,
        STAGING_BYTES,
        "tcp",
        "",
        f"{host}:{port}",
    )
    if code:
        raise UserError(f"{spec}: what listens there is not a Mooncake master (code {code}); {start}")
    return CheckedStore(PooledMedium(MooncakeClient(store), settings), settings)


def _parse(spec: str) -> tuple[str, int, int]:
    """Host, port and segment of `mooncake://HOST[:PORT][?segment_mib=N]`."""
    try:
        url = urllib.parse.urlsplit(spec)
        fields = dict(urllib.parse.parse_qsl(url.query, strict_parsing=bool(url.query)))
        segment_mib = int(fields.pop("segment_mib", DEFAULT_SEGMENT_MIB))
        if url.scheme != "mooncake" or not url.hostname or fields or url.path.strip("/") or segment_mib < 0:
            raise ValueError
        return url.hostname, url.port or DEFAULT_PORT, segment_mib
    except ValueError:
        raise UserError(f"{spec}: not an address; use mooncake://HOST:PORT?segment_mib=1024") from None
