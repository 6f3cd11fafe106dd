"""A copy of the checkout for scripts that write into it, which shares this checkout's compiled kernels.

numba keeps code per source folder, so a copy would compile everything anew: about a minute.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from numba.core.caching import _CacheLocator

from conftest import ROOT
from dsatrace import jit

PARTIAL = shutil.ignore_patterns("*.egg-info", "*.tmp.*", "*.pyc.*")
"""Not sources, or files that another process may be writing."""


def copied_checkout(copy: Path) -> Path:
    """Copies what the scripts need into `copy`, a new folder, and returns it."""
    for name in ("inference", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=PARTIAL)
    (copy / "data").mkdir()
    for name in ("models", "traces"):
        (copy / "data" / name).symlink_to(ROOT / "data" / name)
    (copy / "outputs").mkdir()
    shutil.copy(ROOT / "pyproject.toml", copy)
    share_kernels(copy / "inference" / "dsatrace", copy / "kernels")
    return copy


def share_kernels(package: Path, kernels: Path) -> None:
    """Makes the folder `kernels`, the NUMBA_CACHE_DIR for a copy of the package; its source is the same."""
    kernels.mkdir()
    kept = jit.kept_in()
    for folder in package.rglob("*/") if kept else ():
        original = ROOT / "inference" / "dsatrace" / folder.relative_to(package)
        ours, theirs = (
            _CacheLocator.get_suitable_cache_subpath(str(each / "any.py")) for each in (original, folder)
        )
        (Path(kept or "") / ours).mkdir(exist_ok=True)
        (kernels / theirs).symlink_to(Path(kept or "") / ours)


def environment_in(copy: Path) -> dict[str, str]:
    """This environment's interpreter on the copy's sources, with nothing set that the scripts read."""
    ours = ("CKPT", "CONFIG", "MP")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | {
        "VENV": "none",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(copy / "inference"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NUMBA_CACHE_DIR": str(copy / "kernels"),
    }
