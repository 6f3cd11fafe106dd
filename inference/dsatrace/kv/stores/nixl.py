"""Units in a file that NIXL reads and writes: its POSIX backend, host memory to file. *Experimental.*

    store = nixl_store(StoreSettings("nixl:/mnt/nvme/kv", unit_bytes=41984, capacity_units=1024))

NIXL is the transfer library with which vLLM, SGLang and Dynamo move KV. A batch is one transfer of two
descriptor lists, memory and file, by Linux's asynchronous I/O, through the page cache as with `mmap`.
Needs the package `nixl-cu12`, which works without CUDA. Other backends (UCX between processes, GDS)
are not used.

A transfer that does not end within `timeout_s` raises `StoreError`. Until it has ended no other may
begin, and it may still write into registered memory. Transfers of registered memory are submitted by
the caller's thread: a disk that hangs at that moment blocks the caller, as with `file` and `mmap`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import time
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import FOUND, Batch, CheckedStore, Medium, Moved
from dsatrace.kv.stores.client_calls import StagedMemory, TimedCaller
from dsatrace.kv.stores.files import open_private_file
from dsatrace.kv.stores.interface import StoreError, StoreSettings

PACKAGES = ("nixl_cu12", "nixl_cu13", "nixl")  # the first needs no torch to be imported
BACKEND = ["POSIX"]
SPIN_S, POLL_S = 0.005, 0.0005


class NixlMedium(Medium):
    """Unit = `unit_bytes` at slot x `unit_bytes` of the file; one descriptor and operation each."""

    def __init__(self, agent: Any, fd: int, settings: StoreSettings) -> None:
        """`agent`: a `nixl_agent` with the POSIX backend; `fd`: a file with room for all units."""
        self._agent = agent
        self._fd = fd
        self._unit_bytes = unit_bytes = settings.unit_bytes
        self._registered: list[Any] = []
        self._caller = TimedCaller("nixl", settings.timeout_s)
        self._register("FILE", 0, unit_bytes * settings.room, fd)
        self._memory = StagedMemory(
            unit_bytes, lambda buffer: self._register("DRAM", buffer.ctypes.data, buffer.nbytes, 0)
        )

    def write(self, batch: Batch) -> Moved:
        self._caller.check_idle()
        self._memory.send(partial(self._move, "WRITE"), batch)
        return Moved(np.ones(len(batch.keys), bool), len(batch.keys), len(batch.keys) * self._unit_bytes)

    def read(self, batch: Batch) -> Moved:
        self._caller.check_idle()
        self._memory.receive(partial(self._move, "READ"), batch)
        outcome = np.full(len(batch.keys), FOUND, np.uint8)
        return Moved(outcome, len(batch.keys), len(batch.keys) * self._unit_bytes)

    def register(self, buffer: np.ndarray) -> None:
        self._memory.register(buffer)

    def close(self, keys: np.ndarray) -> None:
        if self._caller.is_idle:
            for descriptors in self._registered:
                self._agent.deregister_memory(descriptors, backends=BACKEND)
            os.close(self._fd)  # else left to the transfer that goes on
        self._caller.close()

    def _register(self, kind: str, address: int, num_bytes: int, device: int) -> None:
        region = [(address, num_bytes, device, "")]
        with _nixl_errors("registering memory"):
            self._registered.append(self._agent.register_memory(region, kind, backends=BACKEND))

    def _move(
        self, operation: str, keys: np.ndarray, slots: np.ndarray, addresses: np.ndarray, direct: bool
    ) -> np.ndarray:
        """Moves all units, or raises `StoreError`: NIXL does not say which of them failed."""
        if direct:  # begun in this thread: changing threads takes longer than a small transfer
            handle, state = self._begin(operation, slots, addresses)
            if state == "PROC":
                self._caller.in_time(self._wait, operation, handle)
        else:
            self._caller.in_time(self._begin_and_wait, operation, slots, addresses)
        return np.zeros(len(slots), dtype=np.int64)

    def _begin_and_wait(self, operation: str, slots: np.ndarray, addresses: np.ndarray) -> None:
        handle, state = self._begin(operation, slots, addresses)
        if state == "PROC":
            self._wait(operation, handle)

    def _begin(self, operation: str, slots: np.ndarray, addresses: np.ndarray) -> tuple[Any, str]:
        """Begins a transfer and polls it for up to `SPIN_S`; returns it and its state."""
        agent = self._agent
        memory = agent.get_xfer_descs(self._descriptors(addresses, 0), "DRAM")
        file = agent.get_xfer_descs(self._descriptors(slots * self._unit_bytes, self._fd), "FILE")
        with _nixl_errors(operation):
            handle = agent.initialize_xfer(operation, memory, file, agent.name, backends=BACKEND)
            state = agent.transfer(handle)
            until = time.monotonic() + SPIN_S
            while state == "PROC" and time.monotonic() < until:
                state = agent.check_xfer_state(handle)
        if state != "PROC":
            _end(operation, handle, state)
        return handle, state

    def _wait(self, operation: str, handle: Any) -> None:
        state = "PROC"
        with _nixl_errors(operation):
            while state == "PROC":
                time.sleep(POLL_S)
                state = self._agent.check_xfer_state(handle)
        _end(operation, handle, state)

    def _descriptors(self, begins: np.ndarray, device: int) -> np.ndarray:
        """(N, 3) uint64: address or place in the file, bytes, device (for a file: its descriptor)."""
        descriptors = np.empty((len(begins), 3), dtype=np.uint64)
        descriptors[:, 0] = begins
        descriptors[:, 1] = self._unit_bytes
        descriptors[:, 2] = device
        return descriptors


@contextlib.contextmanager
def _nixl_errors(operation: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # NIXL's errors are separate classes without a common base
        raise StoreError("io", f"nixl: {operation}: {error}") from error


def _end(operation: str, handle: Any, state: str) -> None:
    handle.release()
    if state != "DONE":
        raise StoreError("io", f"nixl: {operation}: state {state}")


def nixl_store(settings: StoreSettings) -> CheckedStore:
    """A store in a new private file; raises `UserError` if NIXL or the file cannot be opened."""
    agent = _open_agent(settings.spec, _import_nixl(settings.spec))
    fd = open_private_file(settings, settings.unit_bytes * settings.room)
    return CheckedStore(NixlMedium(agent, fd, settings), settings)


def _import_nixl(spec: str) -> ModuleType:
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")  # it logs to stdout
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if error.name != name:  # installed, but it does not load
                raise UserError(f"{spec}: {error}; reinstall it with pip install nixl-cu12") from error
    raise UserError(f"{spec}: NIXL is not installed; pip install nixl-cu12 (experimental)")


def _open_agent(spec: str, nixl: ModuleType) -> Any:
    config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
    try:
        agent = nixl.nixl_agent(f"dsatrace-{secrets.token_hex(8)}", config)
        agent.create_backend("POSIX")
    except Exception as error:  # see `_nixl_errors`
        raise UserError(f"{spec}: NIXL has no POSIX backend here ({error}); use file:PATH") from error
    return agent
