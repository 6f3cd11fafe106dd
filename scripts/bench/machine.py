"""What every benchmark says first, its machine, and how it says the rest: row by row, as each is measured.

To import it is to find the checkout's package, and the helpers of scripts and tests.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "inference"))
sys.path += [str(_ROOT / "scripts"), str(_ROOT / "tests")]


def flag_parser(doc: str | None) -> argparse.ArgumentParser:
    """For a benchmark whose docstring this is; its help shows the defaults."""
    from dsatrace.commands.parser import HelpFormatter

    return argparse.ArgumentParser(description=(doc or "").splitlines()[0], formatter_class=HelpFormatter)


def announce(*packages: str, threads: int | str) -> dict[str, Any]:
    """Prints the machine, the versions and the threads; every line from here on leaves at once."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    about = machine() | {name: version(name) for name in packages} | {"threads": threads}
    print(", ".join(f"{name} {told}" for name, told in about.items()))
    return about


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, Python, and the load of the last minutes."""
    return {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


class Rows:
    """A table that is printed row by row. A heading that ends in spaces is as wide as its column, of text."""

    def __init__(self, title: str, *headings: str) -> None:
        self._headings = headings
        print(f"\n{title}")
        self.add(*(heading.strip() for heading in headings))

    def add(self, *cells: str) -> None:
        pairs = zip(self._headings, cells, strict=True)
        print("  ".join(f"{cell:{'<' if of[-1] == ' ' else '>'}{max(len(of), 7)}}" for of, cell in pairs))


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Processor time of this process in the fastest run."""
    times = []
    for _ in range(repeats):
        begin_s = time.process_time()
        work()
        times.append(time.process_time() - begin_s)
    return min(times)


def peak_bytes() -> int:
    """Peak memory of this process; Linux. (`ru_maxrss` would include the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no VmHWM")


def _cpu_model() -> str | None:
    """Linux names it in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
