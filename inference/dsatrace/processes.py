"""Calls a function for many arguments in a pool of processes.

They are started anew, not forked: threads of numba and pyarrow do not survive a fork. Knows no run.

    for index, result in call_in_processes(replay_part, work, jobs=4): ...
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from dsatrace.errors import UserError

A = TypeVar("A")
R = TypeVar("R")


def call_in_processes(
    function: Callable[[A], R], arguments: Sequence[A], jobs: int
) -> Iterator[tuple[int, R]]:
    """Each argument's index and result, as they are done; with one job, here and in order.

    Raises what a call raised, and `UserError` where a process was killed.
    """
    jobs = min(jobs, len(arguments))
    if jobs <= 1:
        yield from ((index, function(argument)) for index, argument in enumerate(arguments))
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=_end_with_parent)
    try:
        running = {pool.submit(function, argument): index for index, argument in enumerate(arguments)}
        for future in concurrent.futures.as_completed(running):
            yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process of --jobs was killed, most likely for want of memory; use a smaller N, the same "
            "command goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Else the processes of a pool outlive one that was killed, with all that they hold."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(results: Iterable[tuple[int, R]]) -> Iterator[R]:
    """Of indexes from 0 on without gaps, each result as soon as those before it are there."""
    waiting: dict[int, R] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
