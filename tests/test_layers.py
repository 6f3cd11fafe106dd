"""Who may import whom: every import resolved to a module of ours, held against the table, and no circle.

What counts as an import: absolute and relative ones, `from dsatrace import trace`, those inside
functions and under TYPE_CHECKING, and `importlib.import_module` of a name that is written out.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import INFERENCE

PACKAGE = INFERENCE / "dsatrace"
BASE = {"schema", "errors", "version", "files", "flags", "jit", "processes", "text", "units"}


class Rule(NamedTuple):
    """What a layer may import: layers of ours, third parties, third parties inside functions only."""

    ours: Set[str]
    early: Set[str] = frozenset()
    late: Set[str] = frozenset()


RULES: dict[str, Rule] = {
    "schema": Rule(set()),
    "text": Rule(set()),
    "errors": Rule({"text"}),
    "version": Rule(set()),
    "files": Rule({"errors"}),
    "jit": Rule(set(), {"numba"}),
    "processes": Rule({"errors"}),
    "flags": Rule({"errors"}),
    "units": Rule(set()),
    "verify": Rule({"schema", "errors"}, set(), {"numpy", "pyarrow"}),
    "kv": Rule({"schema", "errors", "jit"}, {"numpy", "numba"}, {"memcache_hybrid", "mooncake", "nixl"}),
    "model": Rule({"errors", "files"}, {"torch", "safetensors"}, {"tilelang", "fast_hadamard_transform"}),
    "trace": Rule(BASE | {"kv"}, {"numpy", "numba", "orjson", "pyarrow"}, {"fsspec", "pandas", "polars"}),
    "workloads": Rule(
        {"schema", "errors", "files", "units", "text"},
        set(),
        {"tokenizers", "transformers", "datasets", "huggingface_hub", "pyarrow"},
    ),
    "layerwise": Rule(BASE | {"kv", "model", "trace", "workloads"}, {"numpy", "torch"}),
    "engine": Rule(BASE | {"kv", "trace", "workloads"}, {"numpy"}),
    "runner": Rule(BASE | {"engine", "model", "kv", "trace"}, {"numpy", "torch"}),
    "study": Rule(BASE | {"kv", "trace", "workloads", "engine"}, {"numpy", "numba", "orjson"}),
    "captures": Rule(BASE | {"kv", "trace"}, {"numpy"}, {"torch", "transformers", "pyarrow", "safetensors"}),
    "selection_replay": Rule(BASE | {"kv", "trace"}, {"numpy", "numba"}, {"ray"}),
    "report": Rule(BASE | {"trace", "study", "selection_replay"}, {"numpy", "rich"}, {"matplotlib"}),
}
EXCEPTIONS = {
    ("dsatrace.trace.observe", "torch"): "the tensor side of the tracer",
    ("dsatrace.model.kernels.tilelang_kernels", "tilelang"): "itself imported only when asked for",
    ("dsatrace.verify.fast", "numpy"): "itself imported only where numpy is installed",
    ("dsatrace.verify.fast", "orjson"): "the same",
    ("dsatrace.verify.chosen", "numpy"): "the same",
    ("dsatrace.verify.fast_summary", "numpy"): "the same",
    ("dsatrace.verify.parquet_steps", "numpy"): "itself imported only for a run in Parquet",
    ("dsatrace.verify.parquet_steps", "pyarrow"): "the same",
}
ABOVE_ALL = {"__main__", "cli", "commands"}
"""Import what they like; nobody imports them."""


class Import(NamedTuple):
    """One import of a module: what it names, and whether it runs only inside a function or for types."""

    target: str
    late: bool


def module_name(path: Path, root: Path = INFERENCE) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, source: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """Every import of the module `name`. Of `from a import b`, `a.b` where that is one of the `known`."""
    package = name.split(".") if is_package else name.split(".")[:-1]

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            yield from (Import(target, late) for target in sorted(inner & known))
            if not inner <= known:
                yield Import(module, late)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            written_out = [name for name in node.args[:1] if isinstance(name, ast.Constant)]
            yield from (Import(str(name.value), late) for name in written_out)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late or is_function or is_for_types)

    yield from walk(ast.parse(source), False)


@functools.cache
def graph() -> dict[str, list[Import]]:
    known = set(MODULES)
    return {
        name: list(imports_of(name, path.read_text(), path.name == "__init__.py", known))
        for name, path in MODULES.items()
    }


def layer_of(module: str) -> str:
    """`dsatrace.kv.blocks` -> `kv`; the package itself -> ``."""
    return ([*module.split("."), ""])[1]


def objections(name: str, found: list[Import]) -> list[str]:
    """What of a module's imports the table does not allow."""
    rule, bad = RULES[layer_of(name)], []
    for target, late in found:
        top = target.split(".")[0]
        if top in sys.stdlib_module_names or (name, top) in EXCEPTIONS:
            continue
        if top == "dsatrace":
            if layer_of(target) not in rule.ours | {layer_of(name)}:
                bad.append(f"{name} imports {target}")
        elif top not in rule.early | (rule.late if late else set()):
            bad.append(f"{name} imports {target}{'' if late else ' at its top'}")
    return bad


def circles(imports: dict[str, list[Import]]) -> list[list[str]]:
    """Modules that reach themselves: the strongly connected parts with more than one, or a loop."""
    edges = {
        name: {i.target for i in found if i.target in imports and i.target != name}
        for name, found in imports.items()
    }
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for target in sorted(edges[name] - seen):
            if target not in seen:
                visit(target)
        order.append(name)

    for name in edges:
        if name not in seen:
            visit(name)
    back: dict[str, set[str]] = {name: set() for name in edges}
    for name, targets in edges.items():
        for target in targets:
            back[target].add(name)
    found, placed = [], set[str]()
    for name in reversed(order):
        part, todo = [], [name]
        while todo:
            one = todo.pop()
            if one not in placed:
                placed.add(one)
                part.append(one)
                todo += back[one]
        if len(part) > 1:
            found.append(sorted(part))
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if layer_of(name) not in ABOVE_ALL | {""}])
def test_imports_keep_to_the_layers(name):
    assert objections(name, graph()[name]) == []


def test_what_is_imported_of_ours_is_there():
    """mypy takes a module of ours that is missing for a library without types."""
    targets = {i.target for found in graph().values() for i in found}
    assert {target for target in targets if target.split(".")[0] == "dsatrace"} <= set(MODULES)


def test_there_is_no_circle():
    inside = {name: found for name, found in graph().items() if name != "dsatrace"}
    assert circles(inside) == []


def test_every_layer_of_the_package_has_a_rule():
    assert {layer_of(name) for name in MODULES} - set(RULES) == ABOVE_ALL | {""}


def test_nobody_imports_the_command_line():
    for name, found in graph().items():
        if layer_of(name) not in ABOVE_ALL:
            assert not [i.target for i in found if layer_of(i.target) in ABOVE_ALL], name


def test_nothing_under_inference_bears_a_standard_name():
    names = {path.stem for path in INFERENCE.glob("*.py")} | {path.name for path in INFERENCE.iterdir()}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dsatrace.kv.blocks", "from dsatrace import trace"),
        ("dsatrace.kv.blocks", "from .. import engine"),
        ("dsatrace.kv.blocks", "from ..engine import engine"),
        ("dsatrace.kv.blocks", "import dsatrace"),
        ("dsatrace.schema", "from dsatrace import kv"),
        ("dsatrace.model.config", "from dsatrace import schema"),
        ("dsatrace.kv.blocks", "import importlib\nimportlib.import_module('dsatrace.engine.engine')"),
        (
            "dsatrace.kv.blocks",
            "def f():\n    from importlib import import_module\n    import_module('torch')",
        ),
        ("dsatrace.kv.blocks", "if TYPE_CHECKING:\n    from dsatrace.trace.tracer import Tracer"),
        ("dsatrace.trace.records", "import torch"),
        ("dsatrace.engine.engine", "def f():\n    import torch"),
        ("dsatrace.verify.run", "import numpy"),
        ("dsatrace.verify.run", "from dsatrace.trace import reader"),
    ],
)
def test_the_check_sees(name, line):
    """Each line, added to a module that is sound, is found."""
    path = MODULES[name]
    found = list(imports_of(name, f"{path.read_text()}\n{line}\n", path.name == "__init__.py", set(MODULES)))
    assert len(found) > len(graph()[name])
    assert len(objections(name, found)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dsatrace.kv.blocks", "from dsatrace.kv.simulation.replay import replay"),
        ("dsatrace.kv.blocks", "def f():\n    from .prefix_pool import PrefixPool"),
        (
            "dsatrace.schema",
            "if TYPE_CHECKING:\n    from dsatrace import errors, schema\n    from .verify import run",
        ),
    ],
)
def test_a_circle_is_seen(name, line):
    path = MODULES[name]
    found = imports_of(name, f"{path.read_text()}\n{line}\n", path.name == "__init__.py", set(MODULES))
    assert circles(graph() | {name: list(found)})
