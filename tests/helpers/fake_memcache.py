"""A FAKE of the package memcache_hybrid, which starts on Ascend machines only.

Written by hand from its documented signatures and published codes: it shows that our adapter
keeps the contract on top of them, not that the real package behaves so. Objects lie in a
dictionary that all clients share.
"""

from __future__ import annotations

import ctypes
from types import ModuleType

OUT_OF_MEMORY, NO_SUCH_KEY, LEASED, BROKEN = -3016, -3102, -3104, -1


class FakePool:
    """What the clients share, and what a test may do to it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.most_objects = 1 << 20
        self.leased: set[str] = set()
        self.init_code = 0
        self.is_broken = False
        self.devices: list[int] = []

    def module(self) -> ModuleType:
        """What `import memcache_hybrid` is to give."""
        module = ModuleType("memcache_hybrid")
        module.DistributedObjectStore = lambda: FakeObjectStore(self)  # type: ignore[attr-defined]
        return module


class FakeObjectStore:
    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self._registered: dict[int, int] = {}

    def init(self, device_id: int, init_bm: bool = True) -> int:
        self._pool.devices.append(device_id)
        return self._pool.init_code

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        self._registered[buffer_ptr] = size
        return 0

    def unregister_buffer(self, buffer_ptr: int, size: int) -> int:
        return 0 if self._registered.pop(buffer_ptr) == size else BROKEN

    def batch_put_from(
        self, keys: list[str], buffer_ptrs: list[int], sizes: list[int], direct: int = 3
    ) -> list[int]:
        return [self._put(*piece) for piece in zip(keys, buffer_ptrs, sizes, strict=True)]

    def _put(self, key: str, address: int, size: int) -> int:
        objects = self._pool.objects
        if self._pool.is_broken:
            return BROKEN
        if key in objects:
            return 0  # as the package does: the older one stays
        if len(objects) >= self._pool.most_objects:
            return OUT_OF_MEMORY
        objects[key] = ctypes.string_at(self._checked(address, size), size)
        return 0

    def batch_get_into(
        self, keys: list[str], buffer_ptrs: list[int], sizes: list[int], direct: int = 2
    ) -> list[int]:
        return [self._get(*piece) for piece in zip(keys, buffer_ptrs, sizes, strict=True)]

    def _get(self, key: str, address: int, size: int) -> int:
        if self._pool.is_broken:
            return BROKEN
        if key not in self._pool.objects:
            return NO_SUCH_KEY
        held = self._pool.objects[key][:size]
        ctypes.memmove(self._checked(address, size), held, len(held))
        return 0

    def _checked(self, address: int, size: int) -> int:
        """Addresses must lie in registered memory."""
        inside = (begin <= address <= begin + room - size for begin, room in self._registered.items())
        assert any(inside), f"{size} bytes at {address} were never registered"
        return address

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        return [BROKEN if self._pool.is_broken else int(key in self._pool.objects) for key in keys]

    def remove_batch(self, keys: list[str]) -> list[int]:
        return [self._remove(key) for key in keys]

    def _remove(self, key: str) -> int:
        if self._pool.is_broken:
            return BROKEN
        if key in self._pool.leased:
            return LEASED
        return 0 if self._pool.objects.pop(key, None) is not None else NO_SUCH_KEY

    def close(self) -> int:
        assert not self._registered, "memory is still registered"
        return 0
