"""Who may import whom, as the design says: walked over the source, module by module."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from conftest import INFERENCE

PACKAGE = INFERENCE / "dsatrace"
BASE = {"schema", "errors"}  # may be imported by every layer but the model

# layer: (layers of ours, third parties at import time, third parties inside functions)
RULES: dict[str, tuple[set[str], set[str], set[str]]] = {
    "schema": (set(), set(), set()),
    "errors": (set(), set(), set()),
    "kv": (BASE, {"numpy", "numba"}, {"memcache_hybrid", "mooncake"}),
    "model": (set(), {"torch", "safetensors"}, {"tilelang"}),
    "trace": (BASE | {"kv"}, {"numpy", "numba", "orjson", "pyarrow"}, set()),
    "workloads": (BASE, set(), {"tokenizers", "transformers", "datasets", "huggingface_hub"}),
    "training": (BASE | {"model", "workloads"}, {"torch", "safetensors"}, {"tokenizers"}),
    "engine": (BASE | {"model", "kv", "trace", "workloads"}, {"numpy"}, {"torch"}),
    "study": (BASE | {"kv", "trace", "workloads", "engine"}, {"numpy", "numba", "orjson"}, set()),
    "report": (BASE | {"trace", "study"}, {"numpy", "rich"}, {"matplotlib"}),
}
MODEL_SIDE = "serves a model; the loop, the scheduler and the simulator need no torch"
EXCEPTIONS = {
    ("engine/cache_size.py", "torch"): MODEL_SIDE,
    ("engine/distributed.py", "torch"): MODEL_SIDE,
    ("engine/model_runner.py", "torch"): MODEL_SIDE,
    ("engine/offload/cache.py", "torch"): MODEL_SIDE,
    ("engine/offload/index_keys.py", "torch"): MODEL_SIDE,
    ("engine/offload/layer_units.py", "torch"): MODEL_SIDE,
    ("engine/offload/opening.py", "torch"): MODEL_SIDE,
    ("engine/offload/unit_buffer.py", "torch"): MODEL_SIDE,
    ("engine/sampler.py", "torch"): MODEL_SIDE,
    ("engine/setup.py", "torch"): MODEL_SIDE,
    ("trace/observe.py", "torch"): "the tensor side of the tracer",
    ("model/kernels/tilelang_kernels.py", "tilelang"): "itself imported only when asked for",
}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0].split(".")[0] in RULES
)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module, absolute, and whether that happens inside a function."""
    package = ("dsatrace", *path.relative_to(PACKAGE).parent.parts)
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            found.append((".".join(filter(None, (base, node.module))), late))
        for child in ast.iter_child_nodes(node):
            walk(child, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    walk(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_layers(path):
    name = str(path.relative_to(PACKAGE))
    layer = name.split("/", maxsplit=1)[0].removesuffix(".py")
    ours, early, lazy = RULES[layer]
    for module, late in imports(path):
        top, *rest = module.split(".")
        if top in sys.stdlib_module_names or (name, top) in EXCEPTIONS:
            continue
        if top == "dsatrace":
            inner = rest[0] if rest else ""
            assert inner in {"", layer} | ours, f"{name} imports {module}"
        else:
            assert top in early | (lazy if late else set()), f"{name} imports {module}"


def test_every_layer_of_the_package_has_a_rule():
    layers = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert layers - set(RULES) == {"__init__", "cli", "commands"}


def test_nothing_under_inference_bears_a_standard_name():
    names = {path.stem for path in INFERENCE.glob("*.py")} | {path.name for path in INFERENCE.iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_nobody_imports_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("cli.py", "commands"):
            continue
        assert not [m for m, _ in imports(path) if m.startswith(("dsatrace.cli", "dsatrace.commands"))], path
