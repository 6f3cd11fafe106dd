"""Compiled kernels are kept where this user can write, by one process at a time, and told of once."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from numba.core import config

from dsatrace import jit
from helpers.forked import call

SOURCE = """
from dsatrace.jit import cached_njit

@cached_njit(nogil=True)
def double(value):
    return value + value
"""
VALUES = (1, 1.5, 2j, True)


@pytest.fixture(autouse=True)
def _fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jit.cache_folder.cache_clear()
    yield
    jit.cache_folder.cache_clear()


def module_at(path: Path, name: str = "kernels_of_a_test") -> ModuleType:
    """The module, executed anew."""
    if not path.exists():
        path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # numba looks its functions up there
    spec.loader.exec_module(module)
    return module


def double_in_process(path: Path, value: object, cache: str) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    jit.cache_folder.cache_clear()
    module_at(path).double(value)


def test_code_is_kept_in_the_users_folder(tmp_path: Path) -> None:
    first, again = module_at(tmp_path / "kernels.py"), module_at(tmp_path / "kernels.py")
    assert first.double(3) == again.double(3) == 6
    assert (sum(first.double.stats.cache_misses.values()), sum(first.double.stats.cache_hits.values())) == (
        1,
        0,
    )
    assert (sum(again.double.stats.cache_misses.values()), sum(again.double.stats.cache_hits.values())) == (
        0,
        1,
    )
    assert list((tmp_path / "cache" / "dsatrace" / "kernels").rglob("*.nbc"))
    assert jit.kept_in() == str(tmp_path / "cache" / "dsatrace" / "kernels")


def test_other_code_keeps_its_folder(tmp_path: Path) -> None:
    before = config.CACHE_DIR
    module_at(tmp_path / "kernels.py")
    assert before == config.CACHE_DIR


def test_a_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "named"))  # numba read the variable at its start
    module_at(tmp_path / "kernels.py").double(1)
    assert list((tmp_path / "named").rglob("*.nbc"))
    assert not (tmp_path / "cache").exists()
    assert jit.kept_in() == str(tmp_path / "named")


@pytest.mark.parametrize("home", ["file", "open to others"])
def test_without_a_home_a_private_folder_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "file":
        (tmp_path / "cache").write_text("no folder")
    else:
        (tmp_path / "cache" / "dsatrace").mkdir(parents=True)
        (tmp_path / "cache" / "dsatrace").chmod(0o777)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    module_at(tmp_path / "kernels.py").double(1)
    kept = list((tmp_path / "tmp").rglob("*.nbc"))
    assert kept
    folder = jit.cache_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_any_folder_it_compiles_uncached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    (tmp_path / "tmp").write_text("no folder")
    monkeypatch.setattr(jit, "_is_ours", lambda folder: False)
    space: dict[str, object] = {"__name__": "made_up"}
    exec(compile(SOURCE, "<no file>", "exec"), space)  # numba finds no place for it
    double = space["double"]
    assert callable(double)
    assert double(4) == 8
    assert jit.kept_in() is None


def test_processes_do_not_spoil_each_others_code(tmp_path: Path) -> None:
    """All store into one index at once; without the lock some are lost, or stand for another."""
    path = tmp_path / "kernels.py"
    module_at(path)
    cache = os.environ["XDG_CACHE_HOME"]
    processes = [call(double_in_process, path, value, cache) for value in VALUES]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    again = module_at(path)
    assert [again.double(value) for value in VALUES] == [2, 3.0, 4j, 2]
    assert not again.double.stats.cache_misses


def test_a_full_disk_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        fired.append(1)
        raise OSError(28, "No space left on device")

    fired: list[int] = []
    monkeypatch.setattr(jit.fcntl, "flock", full)
    assert module_at(tmp_path / "kernels.py").double(2) == 4
    assert fired


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_who_waits_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(jit._TELLER, "_told", set())
    module = module_at(tmp_path / "kernels.py", "dsatrace.kv.policies.of_a_test")
    module.double(1)
    module.double(1.5)
    said = sys.stderr.getvalue()
    assert said == "compiling the eviction policies; this is done once on this machine\n"
    monkeypatch.setattr(jit._TELLER, "_told", set())
    module_at(tmp_path / "kernels.py", "dsatrace.kv.policies.of_a_test").double(1)
    assert sys.stderr.getvalue() == said  # it was loaded
    del sys.modules["dsatrace.kv.policies.of_a_test"]
