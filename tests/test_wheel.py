"""The wheel outside a checkout: built, installed into an empty folder, and its verbs run from another one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import INFERENCE, ROOT
from dsatrace import __version__
from helpers.checkouts import share_kernels

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))),
    reason="building a wheel needs pip and setuptools",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of the sources, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(INFERENCE, copy / "inference", ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", copy, "--no-build-isolation", "--wheel-dir", copy / "dist")
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", folder, "--no-compile")
    share_kernels(folder / "dsatrace", folder / "kernels")
    return folder


def pip(*arguments: str | Path) -> None:
    flags = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *flags],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dsatrace", f"dsatrace-{__version__}.dist-info"}
    assert "dsatrace/model/config_tiny.json" in names
    assert not [name for name in names if "training" in name or "train_" in name]


def test_the_verbs_run_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    def run(*argv: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dsatrace", *argv],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed), "NUMBA_CACHE_DIR": str(installed / "kernels")},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"dsatrace {__version__}\n"
    assert "usage: dsatrace report" in run("report", "--help")
    assert "verified" in run("sanity")
    assert [path.name.startswith("sanity_no_torch_") for path in (tmp_path / "outputs").iterdir()] == [True]
    run("make-tiny-checkpoint", "--out", "tiny")
    assert (tmp_path / "tiny" / "config.json").is_file()
    config = installed / "dsatrace" / "model" / "config_tiny.json"
    assert config.read_bytes() == (INFERENCE / "config_tiny.json").read_bytes()
    estimate = json.loads(run("estimate", "--config", config, "--steps", "2", "--batch", "1", "--json"))
    assert estimate["num_records"] == 2 * estimate["records_per_step"]
