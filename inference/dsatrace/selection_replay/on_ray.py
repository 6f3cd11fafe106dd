"""Calls a function for many arguments on a ray cluster: on other machines what a process pool is on one.

It must be a function of a module that every node has installed, and its arguments must lead to files that
every node can open: a shared folder, or URLs. Knows no replay.

    for index, result in call_on_ray(replay_part, work): ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dsatrace.errors import UserError

A = TypeVar("A")
R = TypeVar("R")

WAITING_PER_CPU = 2
"""Calls handed over per CPU of the cluster, so that no worker waits for the next and none hoards."""
RETRIES = 3
"""Of a call whose worker or node was lost."""


def require_ray() -> None:
    """Raises `UserError` where ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray: ray is not installed; pip install 'dsatrace[ray]' on every node")


def call_on_ray(function: Callable[[A], R], arguments: Iterable[A]) -> Iterator[tuple[int, R]]:
    """Each argument's index and result, as they are done.

    Joins the cluster that `RAY_ADDRESS` or `ray start` on this machine names, else starts one of this
    machine alone and says so. Raises `UserError` for a call that raised one and for a cluster that failed.
    """
    require_ray()
    import ray

    with _joined(ray):

        def call(argument: A) -> R:  # ray takes functions only, and no partial
            return function(argument)

        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(call)
        most = max(1, int(WAITING_PER_CPU * ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, int] = {}
        todo = iter(enumerate(arguments))
        try:
            while True:
                while len(running) < most and (following := next(todo, None)) is not None:
                    running[remote.remote(following[1])] = following[0]
                if not running:
                    return
                (done,), _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done), ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise UserError(f"--engine ray: a worker failed: {_last_line(error)}; {_REMEDY}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"--engine ray: {_last_line(error)}; {_REMEDY}") from error
        finally:
            for waiting in running:
                ray.cancel(waiting)


_REMEDY = "see that every node has this version of dsatrace and the files; the same command goes on"


@contextlib.contextmanager
def _joined(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        print("note: no ray cluster was found, so ray starts on this machine alone", file=sys.stderr)
        ray.init(include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
