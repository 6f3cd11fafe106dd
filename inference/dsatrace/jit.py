"""Kernels compiled by numba, and kept between runs where this user can write.

numba keeps compiled code beside the source, which an installed package may not allow, and gives up
where it finds no folder at all. Here it goes into NUMBA_CACHE_DIR, else into the user's cache folder,
else into a private temporary one, else nowhere: then every process compiles anew. numba's cache is not
safe against two processes that store at once, so a lock keeps them apart. Who waits at a terminal for
a compilation is told once.

    @cached_njit(nogil=True)
    def total(values): ...
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core import event
from numba.extending import register_jitable

config: Any = numba_config

inner = register_jitable(nogil=True)
"""For what only kernels call. Unlike under `numba.njit`, no wrappers for Python are compiled with it, which
are a sixth of the work; Python that calls it runs it as it is written."""

_PARTS = {
    "dsatrace.trace": "the trace's writer",
    "dsatrace.captures": "the detector of captures",
    "dsatrace.kv.stores": "the stores",
    "dsatrace.kv.simulation": "the block pool's simulator",
    "dsatrace.kv.policies": "the eviction policies",
    "dsatrace.selection_replay": "the replay of selections",
}
"""What is compiled, as a user would call it."""


def cached_njit(signatures: str | Sequence[str] = (), **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` whose code is kept between runs, if there is a folder to keep it in."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        with _caching_in(cache_folder()):
            try:
                dispatcher.enable_caching()
            except RuntimeError as error:
                if "no locator" not in str(error):
                    raise
            else:
                _lock_saving(dispatcher)
        for signature in [signatures] if isinstance(signatures, str) else signatures:
            dispatcher.compile(signature)
        if signatures:
            dispatcher.disable_compile()
        return dispatcher

    return decorate


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None: NUMBA_CACHE_DIR says where, or there is no such place."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return None
    return private_folder("kernels")


def private_folder(name: str) -> Path | None:
    """A folder of that name in the user's cache, else in a temporary one; None where neither is theirs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    private = Path(tempfile.gettempdir()) / f"dsatrace-{os.getuid()}"
    return next(filter(_is_ours, (base / "dsatrace" / name, private / name)), None)


def kept_in() -> str | None:
    """The folder of the compiled kernels, for people; None: they are not kept."""
    return os.environ.get("NUMBA_CACHE_DIR") or (str(cache_folder()) if cache_folder() else None)


def _is_ours(folder: Path) -> bool:
    """Whether this user can write there and nobody else can: what lies there is executed."""
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        found = folder.parent.stat(), folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: a home that is not known
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return all(each.st_uid == os.getuid() and not each.st_mode & others for each in found)


@contextlib.contextmanager
def _caching_in(folder: Path | None) -> Iterator[None]:
    """numba looks for a folder when it decorates; other code's kernels stay where they were."""
    before = config.CACHE_DIR
    if folder is not None:
        config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _lock_saving(dispatcher: Any) -> None:
    """Two processes that store at once could leave one's code under the other's signature."""
    cache = dispatcher._cache
    save, folder = cache.save_overload, Path(cache.cache_path)

    def save_locked(signature: Any, data: Any) -> None:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((folder / ".lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                save(signature, data)
            except OSError:
                return  # a full disk: the code is compiled anew in the next process

    cache.save_overload = save_locked


class _Teller(event.Listener):
    """Says what is compiled, once per part, where somebody watches."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def on_start(self, event: event.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__
        part = next((said for prefix, said in _PARTS.items() if module.startswith(prefix)), None)
        if part is not None and part not in self._told and sys.stderr.isatty():
            self._told.add(part)
            print(f"compiling {part}; this is done once on this machine", file=sys.stderr, flush=True)

    def on_end(self, event: event.Event) -> None:
        """Nothing is said then."""


_TELLER = _Teller()
event.register("numba:compile", _TELLER)
