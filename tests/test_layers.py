"""Imports run downward only: bench → dino_fast → pipelines → shards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("shards", "pipelines", "dino_fast", "bench")  # lowest first
ABOVE = {layer: {*LAYERS[number + 1 :], "tests"} for number, layer in enumerate(LAYERS)}
# shards runs on machines that only pack; the data path and the model are torch's.
FORBIDDEN = {
    layer: ABOVE[layer] | ({"torch", "torchvision", "nvidia"} if layer == "shards" else set()) for layer in LAYERS
}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every top-level package that a module imports, anywhere in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (
                (str(arg.value).split(".")[0], node.lineno) for arg in node.args[:1] if isinstance(arg, ast.Constant)
            )


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downward(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imported(ast.parse(path.read_text(), str(path)))
        if name in FORBIDDEN[layer]
    ]
    assert not upward, "\n".join(upward)
    assert files or layer == "bench", f"{layer}/ has no Python file"


def test_the_check_sees_every_form_of_import() -> None:
    lines = [
        "import bench.loader as b",
        "from tests import x",
        "importlib.import_module('torch.nn')",
        "from . import y",
    ]
    source = "def f():\n " + "\n ".join(lines)
    assert {name for name, _ in imported(ast.parse(source))} == {"bench", "tests", "torch"}
